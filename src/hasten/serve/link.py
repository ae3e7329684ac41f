"""Messages between the front of a server and its engine process, over one socket pair.

A message is a pickled tuple whose first item names it, with its length before it. Both ends are ours and nobody else
can write to the socket, so pickle is safe here. A step's news travel as one message.
"""

from __future__ import annotations

import pickle
import select
import socket
import struct
from typing import Any

from hasten.errors import EngineDeadError

__all__ = ["Link", "Unpacker", "pack"]

_HEAD = struct.Struct("<I")


def pack(message: tuple[Any, ...]) -> bytes:
    """The bytes of one message.

    >>> Unpacker().feed(pack(("stats", 1)) + pack(("exit",)))
    [('stats', 1), ('exit',)]
    """
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _HEAD.pack(len(body)) + body


class Unpacker:
    """Messages out of a stream of bytes, however it is cut."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[Any, ...]]:
        """The messages that are complete now."""
        buffer = self._buffer
        buffer += data
        out = []
        at = 0
        while len(buffer) - at >= 4:
            (size,) = _HEAD.unpack_from(buffer, at)
            if len(buffer) - at - 4 < size:
                break
            out.append(pickle.loads(memoryview(buffer)[at + 4 : at + 4 + size]))
            at += 4 + size
        if at:
            del buffer[:at]
        return out


class Link:
    """The engine's end: blocking, for one thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.setblocking(True)
        self._unpacker = Unpacker()

    def send(self, *message: Any) -> None:
        """Send one message. Raises :class:`~hasten.errors.EngineDeadError` when the other end is gone."""
        try:
            self._socket.sendall(pack(message))
        except OSError as error:
            raise EngineDeadError("the front process is gone") from error

    def receive(self, timeout: float | None) -> list[tuple[Any, ...]]:
        """Messages that are here; waits up to ``timeout`` seconds for the first (None for ever, 0 not at all).

        Raises :class:`~hasten.errors.EngineDeadError` when the other end is gone.
        """
        if not select.select([self._socket], [], [], timeout)[0]:
            return []
        data = self._socket.recv(1 << 20)
        if not data:
            raise EngineDeadError("the front process is gone")
        return self._unpacker.feed(data)
