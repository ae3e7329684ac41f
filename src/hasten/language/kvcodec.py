"""Keys and values as a compact bitstream: quantised per layer, entropy coded per channel.

"CacheGen: Fast Context Loading for Language Model Applications", Liu et al., SIGCOMM 2024, arXiv:2310.07240. Inside a
group of tokens the first is the anchor (8 bits), the others are differences to it; bins are wider in later layers;
symbols are range coded with static tables per (layer, channel), fitted once and shipped with the codec. The coded
integers decode bit by bit. Differs from the paper in: keys are turned back to position 0 first, so that neighbours
resemble each other; the fit decides for each channel whether differences or values are shorter.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hasten.errors import ConfigurationError, DataError, MissingExtraError

__all__ = ["LEVELS", "KVCodec", "KeysValues", "Level", "capture", "fingerprint", "fit", "perplexity"]

_MAGIC = b"hkv1"
_SYMBOLS = 255
_EDGE = _SYMBOLS // 2
Ints = NDArray[np.int32]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class KeysValues:
    """Keys and values of one context, keys rotated as the cache has them."""

    keys: Floats
    """(layers, tokens, channels), channels = kv_heads * head_dim"""
    values: Floats
    """the same shape"""
    start: int = 0
    """position of the first token"""

    @property
    def tokens(self) -> int:
        return int(self.keys.shape[1])

    def cut(self, begin: int, end: int) -> KeysValues:
        """Tokens ``begin`` to ``end``."""
        return KeysValues(self.keys[:, begin:end], self.values[:, begin:end], self.start + begin)


@dataclass(frozen=True)
class Level:
    """How coarse: bin widths as multiples of the layer's spread, for thirds of the layers."""

    keys: tuple[float, float, float]
    values: tuple[float, float, float]
    anchor_bits: int = 8

    def width(self, which: int, layer: int, layers: int) -> float:
        """Bin width for keys (0) or values (1) of a layer."""
        return (self.keys, self.values)[which][min(2, 3 * layer // layers)]


LEVELS: dict[int, Level] = {
    1: Level((1.0, 1.5, 2.0), (1.2, 1.8, 2.4)),
    2: Level((0.7, 1.0, 1.4), (0.8, 1.2, 1.6)),
    3: Level((0.5, 0.7, 1.0), (0.6, 0.9, 1.2)),
    4: Level((0.25, 0.35, 0.5), (0.3, 0.45, 0.6)),
}
"""From coarse to fine. Level 0 is no level of this table: it means the exact bytes."""


def _coder() -> Any:
    try:
        import constriction
    except ImportError:
        raise MissingExtraError("constriction", "kv", "coding a KV cache") from None
    return constriction.stream


def fingerprint(model: Any) -> str:
    """Names a model's weights and shape: caches of one model mean nothing to another."""
    digest = hashlib.blake2b(repr(model.config).encode(), digest_size=12)
    executor = model.executor
    digest.update(str(executor.precision).encode())
    some = torch.arange(min(64, model.config.vocab_size))
    digest.update(executor._embed(some).float().cpu().numpy().tobytes())
    digest.update(np.ascontiguousarray(_as_floats(executor._layers[-1].post_norm)).tobytes())
    return digest.hexdigest()


def _as_floats(x: Any) -> Any:
    return x.float().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def capture(model: Any, tokens: Sequence[int]) -> KeysValues:
    """Compute a context and return its keys and values."""
    from hasten.language.speculate.session import Session

    session = Session(model.executor, len(tokens))
    session.feed(list(tokens))
    return read_cache(session.cache, session.table, len(tokens))


def read_cache(cache: Any, table: Sequence[int], tokens: int, start: int = 0) -> KeysValues:
    """Tokens ``start`` to ``tokens`` out of a paged cache."""
    where = torch.tensor(list(table)[: -(-tokens // cache.block_size)])
    halves = []
    for half in (cache.keys, cache.values):
        pages = half[:, where].float()  # (layers, blocks, kv_heads, size, width)
        line = pages.permute(0, 1, 3, 2, 4).reshape(pages.shape[0], -1, pages.shape[2] * pages.shape[4])
        halves.append(np.ascontiguousarray(line[:, start:tokens].numpy()))
    return KeysValues(halves[0], halves[1], start)


def write_cache(cache: Any, table: Sequence[int], kv: KeysValues) -> None:
    """Put keys and values into the blocks of a paged cache, from ``kv.start`` on."""
    size = cache.block_size
    positions = torch.arange(kv.start, kv.start + kv.tokens)
    blocks = torch.tensor(list(table))[positions // size]
    heads, width = cache.keys.shape[2], cache.keys.shape[4]
    for half, content in ((cache.keys, kv.keys), (cache.values, kv.values)):
        rows = torch.from_numpy(np.ascontiguousarray(content)).view(content.shape[0], kv.tokens, heads, width)
        half[:, blocks, :, positions % size] = rows.to(half.dtype).transpose(0, 1)


def perplexity(model: Any, tokens: Sequence[int], kv: KeysValues | None = None, split: int | None = None) -> float:
    """Perplexity of the tokens behind ``split`` (half by default), given the context as computed, or ``kv``."""
    from hasten.language.speculate.session import Session

    split = len(tokens) // 2 if split is None else split
    session = Session(model.executor, len(tokens))
    if kv is None:
        session.feed(list(tokens[:split]))
    else:
        write_cache(session.cache, session.table, kv.cut(0, split))
        session.done = split
    logits = session.feed(list(tokens[split:-1]), every=True, piece=len(tokens))
    logs = torch.log_softmax(logits.double(), -1)
    following = torch.tensor(list(tokens[split + 1 :]))
    return float(torch.exp(-logs[torch.arange(len(following)), following].mean()))


def _turned(keys: Floats, start: int, config: Any, back: bool) -> Floats:
    """Keys (layers, tokens, channels) rotated to their positions, or back to position 0."""
    from hasten.language.decoder import rotary_tables

    layers, tokens, _ = keys.shape
    heads, width = config.num_kv_heads, config.head_dim
    x = keys.reshape(layers, tokens, heads, width)
    out = x.copy()
    pairs = config.rotary_dim // 2
    for layer in range(layers):
        local = config.uses_local_rotary(layer)
        cos, sin = _tables(rotary_tables, config, local)
        c, s = cos[start : start + tokens, None], sin[start : start + tokens, None]
        s = -s if back else s
        scale = c * c + s * s  # one, but for stretched embeddings that scale
        a, b = x[layer, :, :, :pairs], x[layer, :, :, pairs : 2 * pairs]
        if back:
            c, s = c / scale, s / scale
        out[layer, :, :, :pairs] = a * c - b * s
        out[layer, :, :, pairs : 2 * pairs] = b * c + a * s
    return out.reshape(keys.shape)


_TABLES: dict[Any, Any] = {}


def _tables(make: Callable[..., Any], config: Any, local: bool) -> Any:
    key = (config, local)
    if key not in _TABLES:
        _TABLES.clear()
        _TABLES[key] = tuple(t.numpy() for t in make(config, config.max_position_embeddings, local=local))
    return _TABLES[key]


def _anchors(x: Floats, group: int, bits: int) -> tuple[Ints, NDArray[np.float16], Floats]:
    """Every ``group``-th token: symbols (layers, anchors, channels), scales (layers, anchors), what they decode to."""
    some = x[:, ::group]
    most = 2 ** (bits - 1) - 1
    scales = np.maximum(np.abs(some).max(-1) / most, 1e-8).astype(np.float16)
    scales = np.maximum(scales, np.float16(6e-8))
    wide = scales.astype(np.float32)[..., None]
    symbols = np.clip(np.rint(some / wide), -most, most).astype(np.int32)
    return symbols, scales, symbols * wide


def _spread_anchors(anchors: Floats, group: int, tokens: int) -> Floats:
    return np.repeat(anchors, group, axis=1)[:, :tokens]


@dataclass(frozen=True)
class KVCodec:
    """Tables of one model. ``fit`` makes it, ``save`` and ``load`` keep it.

    >>> codec = KVCodec.load("codec.npz")                             # doctest: +SKIP
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
    tables: dict[int, NDArray[np.float32]] = field(repr=False, default_factory=dict)
    """level -> (layers, 2, channels, symbols) probabilities"""
    anchor_tables: NDArray[np.float32] = field(repr=False, default_factory=lambda: np.zeros(0, np.float32))
    """(layers, 2, channels, symbols)"""
    quality: dict[int, float] = field(default_factory=dict)
    """level -> measured ratio of perplexities, with decoded over with computed keys and values"""

    # ---- bytes --------------------------------------------------------------------------------------------------

    def encode(self, kv: KeysValues, level: int = 2) -> bytes:
        """A bitstream that needs this codec. Level 0 keeps the exact numbers (16 bits if they are bfloat16).

        Raises :class:`~hasten.errors.DataError` for numbers that are not finite or of another shape.
        """
        layers, tokens, channels = kv.keys.shape
        if kv.values.shape != kv.keys.shape or (layers, channels) != self.delta.shape[::2]:
            raise DataError(
                f"keys {kv.keys.shape} and values {kv.values.shape} do not belong to this codec, which has "
                f"{self.delta.shape[0]} layers of {self.delta.shape[2]} channels"
            )
        if not (np.isfinite(kv.keys).all() and np.isfinite(kv.values).all()):
            raise DataError("keys or values hold numbers that are not finite; compute the context again")
        if level == 0:
            payload = _exact(kv)
        else:
            if level not in self.tables:
                level = max((n for n in self.tables if n < level), default=min(self.tables))
            payload = self._compress(self._symbols(kv, level), level)
        head = json.dumps(
            {"model": self.model, "layers": layers, "tokens": tokens, "channels": channels, "start": kv.start,
             "level": level, "check": zlib.crc32(payload)}, separators=(",", ":")
        ).encode()  # fmt: skip
        return _MAGIC + struct.pack("<II", len(head), len(payload)) + head + payload

    def decode(self, blob: bytes) -> KeysValues:
        """The inverse. Raises :class:`~hasten.errors.DataError` for a corrupt, truncated or foreign stream."""
        head, payload = self._checked(blob)
        if head["level"] == 0:
            return _from_exact(payload, head)
        return self._restore(self._decompress(payload, head), head)

    def check(self, blob: bytes) -> None:
        """Raise what ``decode`` would raise; needs no model."""
        head, payload = self._checked(blob)
        if head["level"] == 0:
            _from_exact(payload, head)
        else:
            self._decompress(payload, head)

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
        return head, payload

    # ---- symbols ------------------------------------------------------------------------------------------------

    def _halves(self, kv: KeysValues) -> tuple[Floats, Floats]:
        return _turned(kv.keys, kv.start, self.config, back=True), kv.values

    def _symbols(self, kv: KeysValues, level: int) -> list[tuple[Ints, NDArray[np.float16], Ints]]:
        """For keys and values: anchor symbols, their scales, and symbols of all tokens but the anchors."""
        out = []
        for which, x in enumerate(self._halves(kv)):
            anchors, scales, decoded = _anchors(x, self.group, LEVELS[level].anchor_bits)
            width = self._widths(which, level)
            base = np.where(
                self.delta[:, None, which], _spread_anchors(decoded, self.group, x.shape[1]), self.mean[:, None, which]
            )
            symbols = np.clip(np.rint((x - base) / width), -_EDGE, _EDGE).astype(np.int32)
            out.append((anchors, scales, symbols))
        return out

    def _widths(self, which: int, level: int) -> Floats:
        layers = self.delta.shape[0]
        steps = [LEVELS[level].width(which, n, layers) for n in range(layers)]
        widths: Floats = (self.spread[:, which] * np.asarray(steps, np.float32))[:, None, None]
        return widths

    def _restore(self, parts: list[tuple[Ints, NDArray[np.float16], Ints]], head: dict[str, Any]) -> KeysValues:
        halves = []
        for which, (anchors, scales, symbols) in enumerate(parts):
            decoded = anchors * scales.astype(np.float32)[..., None]
            base = np.where(
                self.delta[:, None, which], _spread_anchors(decoded, self.group, head["tokens"]),
                self.mean[:, None, which],
            )  # fmt: skip
            x = (base + symbols * self._widths(which, head["level"])).astype(np.float32)
            at = np.arange(0, head["tokens"], self.group)
            x[:, at] = np.where(self.delta[:, None, which], decoded, x[:, at])
            halves.append(x)
        return KeysValues(_turned(halves[0], head["start"], self.config, back=False), halves[1], head["start"])

    # ---- entropy coding -----------------------------------------------------------------------------------------

    def _models(self, level: int, anchor: bool) -> Any:
        cached = _MODELS.get((id(self), level, anchor))
        if cached is None:
            make = _coder().model.Categorical
            tables = self.anchor_tables if anchor else self.tables[level]
            flat = tables.reshape(-1, tables.shape[-1])
            cached = _MODELS[(id(self), level, anchor)] = (self, [make(t, perfect=False) for t in flat])
        return cached[1]

    def _streams(self, tokens: int) -> NDArray[np.bool_]:
        """(tokens,): which tokens are anchors."""
        mask: NDArray[np.bool_] = np.arange(tokens) % self.group == 0
        return mask

    def _compress(self, parts: list[tuple[Ints, NDArray[np.float16], Ints]], level: int) -> bytes:
        coder, pieces, lengths = _coder(), [], []
        layers, _, channels = self.delta.shape
        models, anchor_models = self._models(level, False), self._models(level, True)
        for which, (anchors, scales, symbols) in enumerate(parts):
            mask = self._streams(symbols.shape[1])
            between = np.ascontiguousarray((symbols[:, ~mask] + _EDGE).transpose(0, 2, 1))
            whole = np.ascontiguousarray((symbols + _EDGE).transpose(0, 2, 1))
            tops = np.ascontiguousarray((anchors + _EDGE).transpose(0, 2, 1))
            for layer in range(layers):
                encoder = coder.queue.RangeEncoder()
                for channel in range(channels):
                    table = (layer * 2 + which) * channels + channel
                    if self.delta[layer, which, channel]:
                        encoder.encode(tops[layer, channel], anchor_models[table])
                        if between.shape[2]:
                            encoder.encode(between[layer, channel], models[table])
                    else:
                        encoder.encode(whole[layer, channel], models[table])
                piece = encoder.get_compressed().astype("<u4").tobytes()
                has = bool(self.delta[layer, which].any())
                lengths.append(len(piece))
                pieces += [scales[layer].tobytes() if has else b"", piece]
        return struct.pack(f"<{len(lengths)}I", *lengths) + b"".join(pieces)

    def _decompress(self, payload: bytes, head: dict[str, Any]) -> list[tuple[Ints, NDArray[np.float16], Ints]]:
        coder = _coder()
        layers, _, channels = self.delta.shape
        tokens = head["tokens"]
        mask = self._streams(tokens)
        count = int(mask.sum())
        models, anchor_models = self._models(head["level"], False), self._models(head["level"], True)
        lengths = struct.unpack_from(f"<{2 * layers}I", payload)
        at, out = 8 * layers, []
        for which in range(2):
            anchors = np.zeros((layers, channels, count), np.int32)
            scales = np.ones((layers, count), np.float16)
            symbols = np.zeros((layers, channels, tokens), np.int32)
            for layer in range(layers):
                if self.delta[layer, which].any():
                    scales[layer] = np.frombuffer(payload, np.float16, count, at)
                    at += 2 * count
                size = lengths[which * layers + layer]
                decoder = coder.queue.RangeDecoder(np.frombuffer(payload, "<u4", size // 4, at).astype(np.uint32))
                at += size
                for channel in range(channels):
                    table = (layer * 2 + which) * channels + channel
                    if self.delta[layer, which, channel]:
                        anchors[layer, channel] = decoder.decode(anchor_models[table], count) - _EDGE
                        if tokens > count:
                            symbols[layer, channel, ~mask] = decoder.decode(models[table], tokens - count) - _EDGE
                    else:
                        symbols[layer, channel] = decoder.decode(models[table], tokens) - _EDGE
            out.append((anchors.transpose(0, 2, 1), scales, symbols.transpose(0, 2, 1)))
        return out

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
        import io

        from hasten.language.kvfiles import write_bytes

        buffer = io.BytesIO()
        levels: dict[str, Any] = {f"level{n}": t.astype(np.float16) for n, t in self.tables.items()}
        np.savez_compressed(
            buffer, delta=self.delta, spread=self.spread, mean=self.mean,
            anchor_tables=self.anchor_tables.astype(np.float16),
            head=np.frombuffer(
                json.dumps({"model": self.model, "group": self.group, "quality": self.quality}).encode(), np.uint8
            ),
            **levels,
        )  # fmt: skip
        write_bytes(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path, config: Any) -> KVCodec:
        """Read what ``save`` wrote. Raises :class:`~hasten.errors.DataError`."""
        try:
            with np.load(path) as file:
                head = json.loads(file["head"].tobytes())
                tables = {int(n[5:]): file[n].astype(np.float32) for n in file.files if n.startswith("level")}
                return cls(
                    head["model"], config, head["group"], file["delta"], file["spread"], file["mean"], tables,
                    file["anchor_tables"].astype(np.float32), {int(k): v for k, v in head["quality"].items()},
                )  # fmt: skip
        except (OSError, ValueError, KeyError, zlib.error) as error:
            raise DataError(f"{str(path)!r} is no codec ({error}); fit one again") from None
        except Exception as error:  # a zip file can be broken in many ways
            raise DataError(f"{str(path)!r} is no codec ({type(error).__name__}); fit one again") from None


_MODELS: dict[tuple[int, int, bool], tuple[KVCodec, list[Any]]] = {}


def _exact(kv: KeysValues) -> bytes:
    both = np.stack([kv.keys, kv.values])
    bits = both.view(np.uint32)
    if not (bits & 0xFFFF).any():  # every number is a bfloat16
        return b"b" + zlib.compress((bits >> 16).astype("<u2").tobytes(), 1)
    return b"f" + zlib.compress(both.astype("<f4").tobytes(), 1)


def _from_exact(payload: bytes, head: dict[str, Any]) -> KeysValues:
    raw = zlib.decompress(payload[1:])
    shape = (2, head["layers"], head["tokens"], head["channels"])
    if payload[:1] == b"b":
        both = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    else:
        both = np.frombuffer(raw, "<f4").reshape(shape)
    return KeysValues(both[0], both[1], head["start"])


def head_and_payload(blob: bytes) -> tuple[dict[str, Any], bytes]:
    """Head and payload of a stream, checked."""
    try:
        if blob[:4] != _MAGIC:
            raise ValueError("it does not begin as a KV stream does")
        first, second = struct.unpack_from("<II", blob, 4)
        head = json.loads(blob[12 : 12 + first])
        payload = blob[12 + first : 12 + first + second]
        if len(payload) != second or len(blob) != 12 + first + second:
            raise ValueError(f"it has {len(blob)} bytes and should have {12 + first + second}")
        if zlib.crc32(payload) != head["check"]:
            raise ValueError("its checksum is wrong")
        for name in ("model", "layers", "tokens", "channels", "start", "level"):
            head[name]
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise DataError(f"this KV stream is corrupt or truncated ({error}); compute the context again") from None
    return head, payload


def fit(
    model: Any,
    contexts: Sequence[Sequence[int]],
    *,
    levels: Sequence[int] = (1, 2, 3, 4),
    group: int = 10,
    delta: bool | None = None,
    measure: bool = True,
    progress: Callable[[float], None] | None = None,
) -> KVCodec:
    """Tables for ``model`` from token lists of the kind that will be stored.

    ``delta`` None decides per channel; True codes differences everywhere (the paper), False values everywhere.
    ``measure``: the perplexity ratio of each level on the last quarter of the contexts (at least one), which the tables
    do not see.
    """
    if not contexts or min(len(c) for c in contexts) < 2 * group:
        raise ConfigurationError(f"a codec is fitted to contexts of at least {2 * group} tokens; give some")
    apart = max(1, len(contexts) // 4) if measure and len(contexts) > 1 else 0
    samples = [capture(model, c) for c in contexts[: len(contexts) - apart]]
    layers, _, channels = samples[0].keys.shape
    halves = [(_turned(kv.keys, kv.start, model.config, back=True), kv.values) for kv in samples]
    chosen = np.zeros((layers, 2, channels), bool)
    spread = np.zeros((layers, 2), np.float32)
    mean = np.zeros((layers, 2, channels), np.float32)
    for which in range(2):
        values = np.concatenate([h[which] for h in halves], 1)
        mean[:, which] = values.mean(1)
        plain = values.var(1)
        between = []
        for h in halves:
            _, _, decoded = _anchors(h[which], group, 8)
            keep = np.arange(h[which].shape[1]) % group != 0
            between.append((h[which] - _spread_anchors(decoded, group, h[which].shape[1]))[:, keep])
        changes = np.concatenate(between, 1).var(1)
        # An anchor costs about five bits more than a value, for one token in `group`.
        better = 0.5 * np.log2((changes + 1e-12) / (plain + 1e-12)) * (1 - 1 / group) + 5.0 / group < 0
        chosen[:, which] = better if delta is None else delta
        spread[:, which] = np.sqrt(np.where(chosen[:, which], changes, plain).mean(-1)) + 1e-8
    if progress is not None:
        progress(0.3)
    codec = KVCodec(fingerprint(model), model.config, group, chosen, spread, mean, {}, np.zeros(0, np.float32))
    shape = (layers, 2, channels, _SYMBOLS)
    anchor_counts = np.zeros(shape, np.float32)
    for number, level in enumerate(levels):
        counts = np.zeros(shape, np.float32)
        for kv in samples:
            mask = np.arange(kv.tokens) % group == 0
            for which, (anchors, _, symbols) in enumerate(codec._symbols(kv, level)):
                _count(counts[:, which], symbols, ~mask, chosen[:, which])
                if number == 0:
                    _count(anchor_counts[:, which], anchors, np.ones(anchors.shape[1], bool), chosen[:, which])
        codec.tables[level] = _smooth(counts)
        if number == 0:
            object.__setattr__(codec, "anchor_tables", _smooth(anchor_counts, wide=True))
        if progress is not None:
            progress(0.3 + 0.3 * (number + 1) / len(levels))
    _round_tables(codec)
    if measure:
        judged = contexts[len(contexts) - apart :] if apart else contexts
        for number, level in enumerate(levels):
            ratios = []
            for tokens in judged:
                kv = capture(model, tokens)
                split = len(tokens) // 2
                back = codec.decode(codec.encode(kv.cut(0, split), level))
                ratios.append(np.log(perplexity(model, tokens, back, split) / perplexity(model, tokens, None, split)))
            codec.quality[level] = float(np.exp(np.mean(ratios)))
            if progress is not None:
                progress(0.6 + 0.4 * (number + 1) / len(levels))
    return codec


def _count(counts: Floats, symbols: Ints, between: NDArray[np.bool_], delta: NDArray[np.bool_]) -> None:
    """Add the symbols (layers, tokens, channels) to counts (layers, channels, symbols)."""
    layers, _, channels = symbols.shape
    for layer in range(layers):
        for some, kept in ((delta[layer], between), (~delta[layer], np.ones_like(between))):
            at = np.flatnonzero(some)
            if len(at):
                codes = symbols[layer][kept][:, at] + _EDGE + np.arange(len(at)) * _SYMBOLS
                found = np.bincount(codes.reshape(-1), minlength=len(at) * _SYMBOLS)
                counts[layer, at] += found.reshape(len(at), _SYMBOLS)


def _smooth(counts: Floats, wide: bool = False) -> Floats:
    """Probabilities in which no symbol is impossible: counts, blurred, and a floor."""
    kernel = np.exp(-0.5 * (np.arange(-12, 13) / (4.0 if wide else 0.6)) ** 2).astype(np.float32)
    kernel /= kernel.sum()
    padded = np.pad(counts, ((0, 0), (0, 0), (0, 0), (12, 12)))
    blurred = sum(kernel[i] * padded[..., i : i + counts.shape[-1]] for i in range(25))
    table = 0.999 * (blurred + 1e-6) / (blurred + 1e-6).sum(-1, keepdims=True) + 0.001 / counts.shape[-1]
    return np.asarray(table, np.float32)


def _round_tables(codec: KVCodec) -> None:
    """Tables as they are in the file, so that a codec codes the same before and after it is saved."""
    for level, table in list(codec.tables.items()):
        codec.tables[level] = table.astype(np.float16).astype(np.float32)
    object.__setattr__(codec, "anchor_tables", codec.anchor_tables.astype(np.float16).astype(np.float32))
