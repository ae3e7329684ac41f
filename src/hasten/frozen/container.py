"""One file of tensors, each stored as small as it can be: dense, integer codes, indices into a codebook, or sparse.

    magic (8) · length of the directory (8) · its checksum (4) · deflated JSON directory · parts

Every part has a checksum and is raw (memory-mapped when read) or a raw deflate stream; ``huffman`` is deflate without
matches. A sparse tensor keeps gaps between non-zero values in one byte each; a gap of 255 or more is bridged by zeros.
A file is written whole or not at all, and a broken one is refused with its name and the tensor's.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ConfigurationError, ModelLoadError
from hasten.files import write_bytes

__all__ = ["Container", "Encoding", "Stored", "pack_bits", "unpack_bits", "write_container"]

Array = NDArray[Any]
Encoding = Literal["none", "deflate", "huffman", "best"]
_MAGIC = b"HASTEN\x01\n"
_ALIGN = 64


def pack_bits(values: Array, bits: int) -> NDArray[np.uint8]:
    """Unsigned integers of ``bits`` bits each (up to 16), close together, low bits first.

    >>> unpack_bits(pack_bits(np.array([1, 5, 7]), 3), 3, 3)
    array([1, 5, 7])
    """
    if bits in (8, 16):
        return np.frombuffer(values.astype("<u1" if bits == 8 else "<u2").tobytes(), np.uint8)
    planes = (values.astype(np.uint32).ravel()[:, None] >> np.arange(bits, dtype=np.uint32)) & 1
    return np.packbits(planes.astype(np.uint8).ravel(), bitorder="little")


def unpack_bits(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    """The inverse of :func:`pack_bits`."""
    if bits in (8, 16):
        return np.frombuffer(packed.tobytes(), "<u1" if bits == 8 else "<u2")[:count].astype(np.int64)
    planes = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    return planes.astype(np.int64) @ (1 << np.arange(bits, dtype=np.int64))


@dataclass(frozen=True)
class Stored:
    """A tensor as named arrays and a rule that makes it of them.

    >>> tensor = np.array([[0.5, 0.0], [-0.5, 0.5]], np.float32)
    >>> stored = Stored.codebook(tensor)
    >>> stored.kind, bool((stored.decode() == tensor).all())
    ('codebook', True)
    """

    kind: Literal["dense", "codes", "codebook", "sparse"]
    shape: tuple[int, ...]
    parts: Mapping[str, Array]
    """arrays of the rule; codes and indices as plain unsigned integers"""
    rule: Mapping[str, Any] = field(default_factory=dict)
    """plain values: bits of the codes, offset, how scales spread"""

    @classmethod
    def dense(cls, tensor: Array) -> Stored:
        """As it is."""
        return cls("dense", tuple(tensor.shape), {"values": np.ascontiguousarray(tensor)})

    @classmethod
    def codes(
        cls, codes: Array, scales: Array, bits: int, offset: int, spread: list[Any], zeros: Array | None = None
    ) -> Stored:
        """``(code - zero) · scale``: codes as signed integers of which the least is ``offset``.

        ``spread`` says how scales meet the codes: ``["broadcast"]``, ``["repeat", axis, size]`` or
        ``["rows", size, part]`` (runs of ``size`` rows within parts of ``part`` rows).
        """
        parts = {"codes": codes.astype(np.int64).ravel() - offset, "scales": scales}
        if zeros is not None:
            parts["zeros"] = zeros
        return cls("codes", tuple(codes.shape), parts, {"bits": bits, "offset": offset, "spread": spread})

    @classmethod
    def grid(cls, tensor: Array) -> Stored | None:
        """8-bit codes with one scale, or None where these do not give back the values."""
        found = _entries(tensor.ravel())
        if "scale" not in found:
            return None
        return cls.codes(found["entries"].reshape(tensor.shape), found["scale"], 8, -128, ["broadcast"])

    @classmethod
    def codebook(cls, tensor: Array) -> Stored | None:
        """Indices into the distinct values, or None where there are more than 256 of them."""
        entries, index = np.unique(tensor.ravel(), return_inverse=True)
        if len(entries) > 256:
            return None
        bits = max(1, (len(entries) - 1).bit_length())
        return cls("codebook", tuple(tensor.shape), {"index": index.ravel(), **_entries(entries)}, {"bits": bits})

    @classmethod
    def sparse(cls, tensor: Array) -> Stored | None:
        """Gaps and values of what is not zero, or None where nothing is."""
        flat = tensor.ravel()
        places = np.flatnonzero(flat)
        if len(places) == flat.size or not len(places):
            return None
        gaps = np.diff(places, prepend=-1) - 1
        bridges = gaps // 255
        ends = np.cumsum(bridges + 1) - 1  # the place of each value among gaps and bridges
        out = np.full(int(ends[-1]) + 1, 254, np.int64)
        out[ends] = gaps - 255 * bridges
        entries, index = np.unique(flat[places], return_inverse=True)
        if len(entries) > 255:
            values = np.zeros(len(out), flat.dtype)
            values[ends] = flat[places]
            return cls("sparse", tuple(tensor.shape), {"gaps": out, "values": values})
        chosen = np.zeros(len(out), np.int64)
        chosen[ends] = index.ravel() + 1
        parts = {"gaps": out, "index": chosen, **_entries(np.concatenate([np.zeros(1, flat.dtype), entries]))}
        return cls("sparse", tuple(tensor.shape), parts, {"bits": max(1, len(entries).bit_length())})

    def decode(self) -> Array:
        """The tensor."""
        if self.kind == "dense":
            return self.parts["values"].reshape(self.shape)
        if self.kind == "codes":
            return self._scaled()
        values = self._values()
        if self.kind == "codebook":
            return values.reshape(self.shape)
        flat = np.zeros(int(np.prod(self.shape, dtype=np.int64)), values.dtype)
        flat[np.cumsum(self.parts["gaps"] + 1) - 1] = values
        return flat.reshape(self.shape)

    def _values(self) -> Array:
        if "values" in self.parts:
            plain: Array = self.parts["values"]
            return plain
        entries = self.parts["entries"]
        if "scale" in self.parts:
            entries = entries.astype(np.float32) * self.parts["scale"][0]
        found: Array = entries[self.parts["index"]]
        return found

    def _scaled(self) -> Array:
        codes = (self.parts["codes"] + self.rule["offset"]).astype(np.float32).reshape(self.shape)
        scales, zeros = (self._spread(self.parts[n]) if n in self.parts else None for n in ("scales", "zeros"))
        assert scales is not None
        found: Array = (codes if zeros is None else codes - zeros.astype(np.float32)) * scales.astype(np.float32)
        return found

    def _spread(self, scale: Array) -> Array:
        how, *rest = self.rule["spread"]
        if how == "repeat":
            axis, size = rest
            return np.take(np.repeat(scale, size, axis), np.arange(self.shape[axis]), axis)
        if how == "rows":
            size, part = rest
            runs = -(-part // size)
            parts = scale.reshape(self.shape[0] // part, runs, *scale.shape[1:])
            return np.repeat(parts, size, 1)[:, :part].reshape(self.shape[0], *scale.shape[1:])
        return scale


def _entries(entries: Array) -> dict[str, Array]:
    """A codebook in 8 bits with one scale where that gives back every entry exactly."""
    if entries.dtype == np.float32 and len(entries):
        top = float(np.abs(entries).max())
        for steps in (127.0, 127.5):
            scale = np.float32(top / steps) if top > 0 else np.float32(1)
            codes = np.rint(entries / scale)
            if np.abs(codes).max() <= 128 and np.array_equal(codes.astype(np.float32) * scale, entries):
                return {"entries": codes.astype(np.int8), "scale": np.array([scale], np.float32)}
    return {"entries": entries}


_PACKED = {"codes": "codes", "codebook": "index", "sparse": "index"}


def _raw_parts(stored: Stored) -> dict[str, list[tuple[dict[str, Any], bytes]]]:
    """Part -> its forms: packed and, where entropy coding may like it better, one byte each."""
    result: dict[str, list[tuple[dict[str, Any], bytes]]] = {}
    for name, array in stored.parts.items():
        if _PACKED.get(stored.kind) == name:
            bits = int(stored.rule["bits"])
            size: dict[str, Any] = {} if array.size == np.prod(stored.shape) else {"n": int(array.size)}
            forms = [({**size, "b": bits}, pack_bits(array, bits).tobytes())]
            if bits < 8:
                forms.append(({**size, "b": 8}, array.astype(np.uint8).tobytes()))
        elif name == "gaps":
            forms = [({"n": int(array.size), "b": 8}, array.astype(np.uint8).tobytes())]
        else:
            plain = np.ascontiguousarray(array)
            shape = {} if plain.ndim == 1 else {"s": list(plain.shape)}
            forms = [({"t": plain.dtype.str, **shape}, plain.tobytes())]
        result[name] = forms
    return result


def _encoded(data: bytes, encoding: Encoding) -> tuple[str, bytes]:
    tries: list[tuple[str, bytes]] = [("", data)]
    if encoding in ("deflate", "best"):
        packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
        tries.append(("d", packer.compress(data) + packer.flush()))
    if encoding in ("huffman", "best"):
        packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
        tries.append(("d", packer.compress(data) + packer.flush()))
    return min(tries, key=lambda t: len(t[1]))


def encoded_size(stored: Stored, encoding: Encoding = "best") -> int:
    """Bytes of the parts of a tensor as they would be written."""
    return sum(
        min(len(_encoded(data, encoding)[1]) for _, data in forms[: None if encoding != "none" else 1])
        for forms in _raw_parts(stored).values()
    )


def write_container(
    path: str | os.PathLike[str], tensors: Mapping[str, Stored], meta: Mapping[str, Any], encoding: Encoding = "best"
) -> int:
    """Write the file, whole or not at all; its size in bytes. ``meta`` is anything that JSON holds.

    ``none`` leaves every part as it is, so that it can be read in place from the memory-mapped file.
    """
    if encoding not in ("none", "deflate", "huffman", "best"):
        raise ConfigurationError(f"encoding {encoding!r} is not known; give none, deflate, huffman or best")
    blobs: list[bytes] = []
    entries: list[Any] = []
    at = 0
    for name, stored in tensors.items():
        parts: dict[str, Any] = {}
        check = 0
        for part, forms in _raw_parts(stored).items():
            usable = forms if encoding != "none" else forms[:1]
            layout, how, data = min(((form, *_encoded(raw, encoding)) for form, raw in usable), key=lambda t: len(t[2]))
            if encoding == "none":
                pad = -at % _ALIGN
                blobs.append(b"\0" * pad)
                at += pad
            parts[part] = [len(data), how, layout]
            blobs.append(data)
            at += len(data)
            check = zlib.crc32(data, check)
        entries.append(
            [name, stored.kind, list(stored.shape), parts, check, *([dict(stored.rule)] if stored.rule else [])]
        )
    document = {"meta": dict(meta), "tensors": entries, "aligned": encoding == "none"}
    text = json.dumps(document, separators=(",", ":")).encode()
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    directory = packer.compress(text) + packer.flush()
    head = _MAGIC + struct.pack("<QI", len(directory), zlib.crc32(directory)) + directory
    if encoding == "none":
        head += b"\0" * (-len(head) % _ALIGN)
    return write_bytes(path, head, *blobs)


class Container:
    """A file that was written by :func:`write_container`, memory-mapped; tensors are decoded when asked for.

    Raises :class:`~hasten.errors.ModelLoadError` for a file that is missing, cut off or altered.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"{str(self.path)!r} cannot be opened ({error}); name a file of hasten") from error
        if self._map[:8] != _MAGIC:
            raise ModelLoadError(f"{str(self.path)!r} is not a packed model of hasten, or of another version")
        head = 20
        length, check = struct.unpack("<QI", self._map[8:head]) if len(self._map) >= head else (0, -1)
        directory = self._map[head : head + length]
        if len(directory) != length or zlib.crc32(directory) != check:
            raise ModelLoadError(f"{str(self.path)!r} has a damaged directory; copy or save it again")
        document = json.loads(zlib.decompress(directory, -15))
        self.meta: dict[str, Any] = document["meta"]
        """what was written with the tensors"""
        start = head + length
        aligned = bool(document["aligned"])
        at = start + (-start % _ALIGN) if aligned else start
        begin = at
        self._entries: dict[str, Any] = {}
        for name, kind, shape, parts, check, *rule in document["tensors"]:
            places = {}
            for part, (size, how, layout) in parts.items():
                if aligned:
                    at += -(at - begin) % _ALIGN
                places[part] = (at, size, how, layout)
                at += size
            self._entries[name] = (kind, tuple(shape), places, check, rule[0] if rule else {})

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors."""
        return tuple(self._entries)

    def stored(self, name: str) -> Stored:
        """A tensor as it is stored, its parts checked."""
        if name not in self._entries:
            raise ModelLoadError(f"{str(self.path)!r} holds no tensor {name!r}")
        kind, shape, places, check, rule = self._entries[name]
        found, data = 0, {}
        for part, (at, size, how, layout) in places.items():
            raw = memoryview(self._map)[at : at + size]
            found = zlib.crc32(raw, found)
            data[part] = (raw, how, layout)
        if found != check or any(len(raw) != places[part][1] for part, (raw, _, _) in data.items()):
            raise ModelLoadError(
                f"{str(self.path)!r}: tensor {name!r} does not have the bytes that were written; copy or save the file "
                "again"
            )
        count = int(np.prod(shape, dtype=np.int64))
        return Stored(kind, shape, {part: _part(*piece, count) for part, piece in data.items()}, rule)

    def tensor(self, name: str) -> Array:
        """A tensor, decoded; a dense one that is not encoded is a view of the file."""
        return self.stored(name).decode()


def _part(data: Any, how: str, layout: Mapping[str, Any], count: int) -> Array:
    """An array from its bytes; ``count`` are the elements of the whole tensor."""
    if how == "d":
        data = zlib.decompress(data, -15)
    if "b" in layout:
        return unpack_bits(np.frombuffer(data, np.uint8), layout["b"], layout.get("n", count))
    found = np.frombuffer(data, np.dtype(layout["t"]))
    return found.reshape(layout["s"]) if "s" in layout else found
