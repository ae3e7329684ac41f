"""The write-ahead log: what was acknowledged is on the disk before the call returns.

A record is (length u32, crc32 u32, payload); the payload is one call (operation, ids, rows, attributes), so a call is
whole or absent. Replay stops at the first record that is cut or whose checksum is wrong, and the log goes on from
there.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import DataError
from hasten.retrieve.index.io import Folder, Writer

__all__ = ["ADD", "DELETE", "UPSERT", "Log", "Record", "replay"]

ADD, UPSERT, DELETE = 1, 2, 3
_HEAD = struct.Struct("<II")
_BODY = struct.Struct("<BxxxIII")


@dataclass(frozen=True)
class Record:
    """One acknowledged call."""

    operation: int
    """ADD, UPSERT or DELETE"""
    ids: NDArray[np.int64]
    """(m,)"""
    rows: NDArray[Any] | None
    """(m, d) in the dtype of the index; None for DELETE"""
    attributes: dict[str, list[Any]]
    """columns of m values"""

    def encode(self) -> bytes:
        """The record as bytes, checksum included."""
        rows = b"" if self.rows is None else np.ascontiguousarray(self.rows).tobytes()
        told = json.dumps(self.attributes).encode() if self.attributes else b""
        body = _BODY.pack(self.operation, len(self.ids), len(rows), len(told))
        body += np.ascontiguousarray(self.ids, "<i8").tobytes() + rows + told
        return _HEAD.pack(len(body), zlib.crc32(body)) + body


def replay(data: bytes, width: int, dtype: Any) -> Iterator[tuple[Record, int]]:
    """(record, end offset) of every whole record, in order."""
    at = 0
    while at + _HEAD.size <= len(data):
        length, checksum = _HEAD.unpack_from(data, at)
        begin = at + _HEAD.size
        body = data[begin : begin + length]
        if length < _BODY.size or len(body) < length or zlib.crc32(body) != checksum:
            return
        operation, count, size, told = _BODY.unpack_from(body)
        place = _BODY.size
        ids = np.frombuffer(body, "<i8", count, place).astype(np.int64)
        place += 8 * count
        rows = None
        if operation != DELETE:
            rows = np.frombuffer(body[place : place + size], dtype).reshape(count, width)
        place += size
        attributes = json.loads(body[place : place + told]) if told else {}
        at = begin + length
        yield Record(operation, ids, rows, attributes), at


class Log:
    """The open log of an index. After a failed write it refuses more, since nobody knows what is on the disk."""

    def __init__(self, folder: Folder, name: str, size: int) -> None:
        self.name = name
        self._writer: Writer = folder.append(name, size)
        self.size = size
        self._broken = False

    def append(self, record: Record) -> None:
        """Write and sync; durable when this returns."""
        if self._broken:
            raise DataError(f"{self.name!r} could not be written before; close the index and open it again")
        data = record.encode()
        try:
            self._writer.write(data)
            self._writer.sync()
        except BaseException:
            self._broken = True
            raise
        self.size += len(data)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
