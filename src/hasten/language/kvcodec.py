"""Keys and values as a compact bitstream: quantised per layer, entropy coded per channel.

"CacheGen: Fast Context Loading for Language Model Applications", Liu et al., SIGCOMM 2024, arXiv:2310.07240. Inside a
group of tokens the first is the anchor (8 bits), the others are differences to it; bins are wider in later layers
(:mod:`kvquantise`); symbols are coded with static tables per (layer, channel), fitted once (:mod:`kvfit`) and shipped
with the codec (:mod:`rans`). The coded integers decode bit by bit. Differs from the paper in: keys are turned back to
position 0 first, so that neighbours resemble each other; the fit decides for each channel whether differences or values
are shorter; the coder is an interleaved rANS.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import DataError
from hasten.language import rans
from hasten.language.kvquantise import LEVELS, Form, dequantise, quantise, turns
from hasten.language.kvvalues import KeysValues

__all__ = ["KVCodec", "head_and_payload"]

_MAGIC, _OLDER = b"hkv2", (b"hkv1",)
_FORMAT = 2
"""of the file of tables"""
Floats = NDArray[np.float32]
Counts = NDArray[np.uint16]


@dataclass(frozen=True)
class KVCodec:
    """Tables of one model. ``fit`` makes it, ``save`` and ``load`` keep it.

    >>> codec = KVCodec.load("codec.npz", model.config)               # doctest: +SKIP
    >>> blob = codec.encode(capture(model, ids), level=2)             # doctest: +SKIP
    >>> codec.decode(blob).tokens == len(ids)                         # doctest: +SKIP
    True
    """

    model: str
    """fingerprint of the model"""
    config: Any = field(repr=False)
    """its :class:`DecoderConfig`, for the rotation of keys"""
    group: int = 10
    """tokens from one anchor to the next"""
    delta: NDArray[np.bool_] = field(repr=False, default_factory=lambda: np.zeros((0, 2, 0), bool))
    """(layers, 2, channels): whether differences to the anchor are coded, else values"""
    spread: Floats = field(repr=False, default_factory=lambda: np.zeros((0, 2), np.float32))
    """(layers, 2): standard deviation of what is coded, to which bin widths are relative"""
    mean: Floats = field(repr=False, default_factory=lambda: np.zeros((0, 2, 0), np.float32))
    """(layers, 2, channels): taken off channels that are coded as values"""
    tables: dict[int, Counts] = field(repr=False, default_factory=dict)
    """level -> (layers, 2, channels, 256) frequencies of the codes, see :func:`hasten.language.rans.frequencies`"""
    anchor_tables: Counts = field(repr=False, default_factory=lambda: np.zeros((0, 2, 0, 256), np.uint16))
    """(layers, 2, channels, 256)"""
    quality: dict[int, float] = field(default_factory=dict)
    """level -> measured ratio of perplexities, with decoded over with computed keys and values"""

    # ---- bytes --------------------------------------------------------------------------------------------------

    def encode(self, kv: KeysValues, level: int = 2, *, threads: int | None = None) -> bytes:
        """A bitstream that needs this codec. Level 0 keeps the exact numbers (16 bits if they are bfloat16).

        ``threads`` None takes those of numba. Raises :class:`~hasten.errors.DataError` for numbers that are not finite
        or of another shape.
        """
        layers, tokens, channels = kv.keys.shape
        if kv.values.shape != kv.keys.shape or (layers, channels) != self.delta.shape[::2]:
            raise DataError(
                f"keys {kv.keys.shape} and values {kv.values.shape} do not belong to this codec, which has "
                f"{self.delta.shape[0]} layers of {self.delta.shape[2]} channels"
            )
        head = {"model": self.model, "layers": layers, "tokens": tokens, "channels": channels, "start": kv.start}
        if level == 0:
            if not (np.isfinite(kv.keys).all() and np.isfinite(kv.values).all()):
                raise DataError("keys or values hold numbers that are not finite; compute the context again")
            payload = _exact(kv)
        else:
            if level not in self.tables:
                level = max((n for n in self.tables if n < level), default=min(self.tables))
            payload = self._compress(kv, level, threads)
            head["tables"] = self._marks[level]
        words = json.dumps({**head, "level": level}, separators=(",", ":")).encode()
        check = zlib.crc32(payload, zlib.crc32(words))
        return _MAGIC + struct.pack("<III", len(words), len(payload), check) + words + payload

    def decode(self, blob: bytes, *, threads: int | None = None) -> KeysValues:
        """The inverse. Raises :class:`~hasten.errors.DataError` for a corrupt, truncated or foreign stream."""
        head, payload = self._checked(blob)
        if head["level"] == 0:
            return _from_exact(payload, head)
        shape = (head["layers"], head["tokens"], head["channels"])
        keys, values = np.empty(shape, np.float32), np.empty(shape, np.float32)
        form = self._form(head["level"])
        forth = turns(self.config, head["start"], head["tokens"], back=False)

        def put(plane: Any, scales: Any, first: int, last: int) -> None:
            dequantise(form, plane, scales, forth, first, last, keys, values)

        self._decompress(payload, head, put, threads)
        return KeysValues(keys, values, head["start"])

    def check(self, blob: bytes) -> None:
        """Raise what ``decode`` would raise; needs no model."""
        head, payload = self._checked(blob)
        if head["level"] == 0:
            _from_exact(payload, head)
        else:
            self._decompress(payload, head, lambda *_: None, 1)

    def _checked(self, blob: bytes) -> tuple[dict[str, Any], bytes]:
        head, payload = head_and_payload(blob)
        if head["model"] != self.model:
            raise DataError(
                f"this KV stream belongs to the model {head['model'][:8]}…, not to {self.model[:8]}…; compute it again"
            )
        if (head["layers"], head["channels"]) != self.delta.shape[::2]:
            raise DataError("this KV stream has another shape than the codec; compute the context again")
        if head["level"] != 0 and head["level"] not in self.tables:
            raise DataError(f"this KV stream has level {head['level']}, the codec has {sorted(self.tables)}")
        if head["level"] != 0 and head.get("tables") != self._marks[head["level"]]:
            raise DataError("this KV stream was coded with other tables than the codec has; compute the context again")
        return head, payload

    # ---- rows ---------------------------------------------------------------------------------------------------

    @cached_property
    def _marks(self) -> dict[int, int]:
        """Which tables and bins a stream was coded with: it means nothing to others."""
        common = zlib.crc32(np.ascontiguousarray(self.anchor_tables).tobytes())
        for part in (self.delta, self.spread, self.mean):
            common = zlib.crc32(np.ascontiguousarray(part).tobytes(), common)
        return {
            n: zlib.crc32(np.ascontiguousarray(t).tobytes(), zlib.crc32(f"{self.group} {LEVELS[n]}".encode(), common))
            for n, t in self.tables.items()
        }

    @cached_property
    def _coders(self) -> dict[int, rans.Tables]:
        return {}

    def _tables(self, level: int) -> rans.Tables:
        if level not in self._coders:
            both = [t.reshape(-1, 256) for t in (self.tables[level], self.anchor_tables)]
            self._coders[level] = rans.Tables(np.concatenate(both))
        return self._coders[level]

    @cached_property
    def _ids(self) -> NDArray[np.int32]:
        """(rows, 2, lanes): table of each lane, for tokens and for anchors."""
        layers, _, channels = self.delta.shape
        count = layers * 2 * channels
        out = np.full((2 * layers, 2, -(-channels // 16) * 16), 2 * count, np.int32)
        plain = np.arange(count, dtype=np.int32).reshape(2 * layers, channels)
        out[:, 0, :channels] = plain
        out[:, 1, :channels] = plain + np.where(self.delta.reshape(2 * layers, channels), count, 0)
        return out

    def _form(self, level: int) -> Form:
        layers, _, channels = self.delta.shape
        steps = [LEVELS[level].width(which, n, layers) for n in range(layers) for which in range(2)]
        config = self.config
        return Form(
            self.group, np.ascontiguousarray(self.delta.reshape(-1, channels)),
            np.ascontiguousarray(self.mean.reshape(-1, channels)),
            (self.spread.reshape(-1) * np.asarray(steps, np.float32)).astype(np.float32),
            config.num_kv_heads, config.rotary_dim // 2,
            np.array([config.uses_local_rotary(n) for n in range(layers)], bool),
        )  # fmt: skip

    def codes(self, kv: KeysValues, level: int) -> tuple[rans.Codes, NDArray[np.uint16]]:
        """The integers of a level: (layers, keys and values, tokens, channels), and the anchors' scales (rows,
        anchors)."""
        plane, scales = self._empty(kv.tokens)
        back = turns(self.config, kv.start, kv.tokens, back=True)
        quantise(self._form(level), *_whole(kv), back, 0, len(plane), plane, scales)
        layers, _, channels = self.delta.shape
        return plane[..., :channels].reshape(layers, 2, kv.tokens, channels), scales

    def _empty(self, tokens: int) -> tuple[rans.Codes, NDArray[np.uint16]]:
        rows, _, lanes = self._ids.shape
        width = self.delta.shape[2]
        plane = np.empty((rows, tokens, lanes), np.uint8)
        plane[:, :, width:] = 0
        return plane, np.zeros((rows, -(-tokens // self.group)), np.uint16)

    def _with_scales(self) -> NDArray[np.bool_]:
        """(rows,): those that have anchors at all."""
        some: NDArray[np.bool_] = self.delta.any(-1).reshape(-1)
        return some

    # ---- streams ------------------------------------------------------------------------------------------------

    def _compress(self, kv: KeysValues, level: int, threads: int | None) -> bytes:
        tables, form, ids = self._tables(level), self._form(level), self._ids
        plane, scales = self._empty(kv.tokens)
        back = turns(self.config, kv.start, kv.tokens, back=True)
        keys, values = _whole(kv)
        at = rans.cuts(*plane.shape)

        def one(number: int) -> tuple[bytes, bytes]:
            first, last = at[number], at[number + 1]
            if not quantise(form, keys, values, back, first, last, plane, scales):
                raise DataError("keys or values hold numbers that are not finite; compute the context again")
            return rans.encode(plane, self.group, tables, ids, first, last)

        streams = _side_by_side(one, len(at) - 1, threads)
        sizes = [len(part) for stream in streams for part in stream]
        parts = [part for stream in streams for part in stream]
        return b"".join([struct.pack(f"<{len(sizes)}I", *sizes), scales[self._with_scales()].tobytes(), *parts])

    def _decompress(
        self, payload: bytes, head: dict[str, Any], put: Callable[[Any, Any, int, int], None], threads: int | None
    ) -> None:
        """Decode all rows; ``put`` gets the plane of codes, the scales, and the rows that are there now."""
        tables, ids, level = self._tables(head["level"]), self._ids, head["level"]
        plane, scales = self._empty(head["tokens"])
        at = rans.cuts(*plane.shape)
        count, some = len(at) - 1, self._with_scales()
        begin = 8 * count + 2 * int(some.sum()) * scales.shape[1]
        try:
            sizes = struct.unpack_from(f"<{2 * count}I", payload)
            scales[some] = np.frombuffer(payload[8 * count : begin], np.uint16).reshape(-1, scales.shape[1])
            ends = np.cumsum([begin, *sizes]).tolist()
            if ends[-1] != len(payload):
                raise ValueError(f"{len(payload)} bytes instead of {ends[-1]}")
        except (struct.error, ValueError) as error:
            raise DataError(f"this KV stream is corrupt ({error}); compute the context again") from None

        def one(number: int) -> None:
            words, escapes, end = ends[2 * number : 2 * number + 3]
            first, last = at[number], at[number + 1]
            streams = payload[words:escapes], payload[escapes:end]
            if not rans.decode(*streams, plane, self.group, tables, ids, first, last):
                raise DataError(f"this KV stream is corrupt at level {level}; compute the context again")
            put(plane, scales, first, last)

        _side_by_side(one, count, threads)

    # ---- what it does -------------------------------------------------------------------------------------------

    def report(self, kv: KeysValues) -> dict[int, dict[str, float]]:
        """For each level: bytes, bits per value, root mean square error relative to the spread of keys and values."""
        out = {}
        count = kv.keys.size + kv.values.size
        for level in sorted(self.tables):
            blob = self.encode(kv, level)
            back = self.decode(blob)
            errors = [
                float(np.sqrt(np.mean((a - b) ** 2)) / (np.std(a) + 1e-12))
                for a, b in ((kv.keys, back.keys), (kv.values, back.values))
            ]
            out[level] = {
                "bytes": float(len(blob)), "bits_per_value": 8 * len(blob) / count, "key_error": errors[0],
                "value_error": errors[1], "perplexity_ratio": self.quality.get(level, float("nan")),
            }  # fmt: skip
        return out

    def best_level(self, most: float = 1.01) -> int:
        """The coarsest level whose measured perplexity ratio is within ``most``; 0 (exact) if none is."""
        good = [n for n, ratio in self.quality.items() if ratio <= most]
        return min(good) if good else 0

    def save(self, path: str | Path) -> None:
        """Write the tables; the file appears whole or not at all."""
        from hasten.files import write_bytes

        buffer = io.BytesIO()
        levels: dict[str, Any] = {f"level{n}": t for n, t in self.tables.items()}
        head = {"format": _FORMAT, "model": self.model, "group": self.group, "quality": self.quality}
        np.savez_compressed(
            buffer, delta=self.delta, spread=self.spread, mean=self.mean, anchor_tables=self.anchor_tables,
            head=np.frombuffer(json.dumps(head).encode(), np.uint8), **levels,
        )  # fmt: skip
        write_bytes(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path, config: Any) -> KVCodec:
        """Read what ``save`` wrote. Raises :class:`~hasten.errors.DataError`."""
        try:
            with np.load(path) as file:
                head = json.loads(file["head"].tobytes())
                if head.get("format") != _FORMAT:
                    raise ValueError(f"format {head.get('format', 1)}, this version reads {_FORMAT}")
                tables = {int(n[5:]): file[n] for n in file.files if n.startswith("level")}
                codec = cls(
                    head["model"], config, head["group"], file["delta"], file["spread"], file["mean"], tables,
                    file["anchor_tables"], {int(k): v for k, v in head["quality"].items()},
                )  # fmt: skip
                for level in tables:
                    codec._tables(level)
                return codec
        except Exception as error:  # a zip file can be broken in many ways
            raise DataError(f"{str(path)!r} is no codec ({type(error).__name__}: {error}); fit one again") from None


def _whole(kv: KeysValues) -> tuple[Floats, Floats]:
    return np.ascontiguousarray(kv.keys, np.float32), np.ascontiguousarray(kv.values, np.float32)


def _side_by_side(one: Callable[[int], Any], count: int, threads: int | None) -> list[Any]:
    """``one(0)`` to ``one(count - 1)``; the kernels let go of the interpreter."""
    if threads is None:
        import numba

        threads = numba.get_num_threads()
    if min(threads, count) < 2:
        return [one(number) for number in range(count)]
    with ThreadPoolExecutor(min(threads, count), "kv-codec") as pool:
        return list(pool.map(one, range(count)))


def _exact(kv: KeysValues) -> bytes:
    both = np.stack([kv.keys, kv.values])
    bits = both.view(np.uint32)
    if not (bits & 0xFFFF).any():  # every number is a bfloat16
        return b"b" + zlib.compress((bits >> 16).astype("<u2").tobytes(), 1)
    return b"f" + zlib.compress(both.astype("<f4").tobytes(), 1)


def _from_exact(payload: bytes, head: dict[str, Any]) -> KeysValues:
    shape = (2, head["layers"], head["tokens"], head["channels"])
    try:
        raw = zlib.decompress(payload[1:])
        if payload[:1] == b"b":
            both = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
        else:
            both = np.frombuffer(raw, "<f4").reshape(shape)
    except (zlib.error, ValueError) as error:
        raise DataError(f"this KV stream is corrupt ({error}); compute the context again") from None
    return KeysValues(both[0], both[1], head["start"])


def head_and_payload(blob: bytes) -> tuple[dict[str, Any], bytes]:
    """Head and payload of a stream, checked."""
    try:
        if blob[:4] in _OLDER:
            raise ValueError(f"its format {blob[:4].decode()} is an older one, this version reads {_MAGIC.decode()}")
        if blob[:4] != _MAGIC:
            raise ValueError("it does not begin as a KV stream does")
        first, second, check = struct.unpack_from("<III", blob, 4)
        words, payload = blob[16 : 16 + first], blob[16 + first :]
        if len(blob) != 16 + first + second:
            raise ValueError(f"it has {len(blob)} bytes and should have {16 + first + second}")
        if zlib.crc32(payload, zlib.crc32(words)) != check:
            raise ValueError("its checksum is wrong")
        head = json.loads(words)
        for name in ("layers", "tokens", "channels", "start", "level"):
            if not isinstance(head[name], int) or head[name] < 0:
                raise ValueError(f"{name} is {head[name]!r}")
        if not isinstance(head["model"], str):
            raise ValueError("its head names no model")
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise DataError(f"this KV stream is corrupt or truncated ({error}); compute the context again") from None
    return head, payload
