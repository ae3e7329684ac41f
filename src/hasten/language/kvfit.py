"""Tables of a KV codec out of sample contexts: what each channel is coded as, bin widths, frequencies, and the quality.

A channel is coded as differences to its group's anchor where these are narrower by more than the anchor costs, else as
values. Counts are blurred before they become frequencies, so that a table serves contexts that it has not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ConfigurationError
from hasten.language.kvcodec import KVCodec
from hasten.language.kvquantise import EDGE
from hasten.language.kvvalues import KeysValues, capture, fingerprint, perplexity
from hasten.language.rans import ESCAPE, frequencies

__all__ = ["anchors", "fit", "straightened"]

Floats = NDArray[np.float32]


def straightened(kv: KeysValues, config: Any) -> tuple[Floats, Floats]:
    """Keys turned back to position 0, and values: (layers, tokens, channels) each."""
    from hasten.language.kvquantise import turns

    layers, tokens, channels = kv.keys.shape
    back, pairs = turns(config, kv.start, tokens, back=True), config.rotary_dim // 2
    out = kv.keys.reshape(layers, tokens, config.num_kv_heads, -1).copy()
    for layer in range(layers):
        cos, sin = back[int(config.uses_local_rotary(layer)), :, :, None]
        a, b = out[layer, ..., :pairs].copy(), out[layer, ..., pairs : 2 * pairs].copy()
        out[layer, ..., :pairs], out[layer, ..., pairs : 2 * pairs] = a * cos - b * sin, b * cos + a * sin
    return out.reshape(layers, tokens, channels), kv.values


def anchors(x: Floats, group: int) -> Floats:
    """What every token of x (layers, tokens, channels) has as its anchor: the first of its group, in 8 bits."""
    some = x[:, ::group]
    scale = np.maximum(np.abs(some).max(-1, keepdims=True) / EDGE, 1e-8)
    return np.repeat(np.rint(some / scale) * scale, group, axis=1)[:, : x.shape[1]]


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
    halves = [straightened(kv, model.config) for kv in samples]
    chosen = np.zeros((layers, 2, channels), bool)
    spread = np.zeros((layers, 2), np.float32)
    mean = np.zeros((layers, 2, channels), np.float32)
    for which in range(2):
        values = np.concatenate([h[which] for h in halves], 1)
        mean[:, which] = values.mean(1)
        plain = values.var(1)
        between = []
        for h in halves:
            keep = np.arange(h[which].shape[1]) % group != 0
            between.append((h[which] - anchors(h[which], group))[:, keep])
        changes = np.concatenate(between, 1).var(1)
        # An anchor costs about five bits more than a value, for one token in `group`.
        better = 0.5 * np.log2((changes + 1e-12) / (plain + 1e-12)) * (1 - 1 / group) + 5.0 / group < 0
        chosen[:, which] = better if delta is None else delta
        spread[:, which] = np.sqrt(np.where(chosen[:, which], changes, plain).mean(-1)) + 1e-8
    if progress is not None:
        progress(0.3)
    shape = (layers, 2, channels, 256)
    tables: dict[int, Any] = {}
    codec = KVCodec(fingerprint(model), model.config, group, chosen, spread, mean, tables, np.zeros(shape, np.uint16))
    for number, level in enumerate(levels):
        counts, tops = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        for kv in samples:
            codes, _ = codec.codes(kv, level)
            mask = np.arange(kv.tokens) % group == 0
            counts += _counted(codes[:, :, ~mask]) + np.where(chosen[..., None], 0, _counted(codes[:, :, mask]))
            tops += np.where(chosen[..., None], _counted(codes[:, :, mask]), 0)
        tables[level] = _frequencies(counts, 0.6)
        if number == 0:
            object.__setattr__(codec, "anchor_tables", _frequencies(tops, 4.0))
        if progress is not None:
            progress(0.3 + 0.3 * (number + 1) / len(levels))
    if measure:
        judged = contexts[len(contexts) - apart :] if apart else contexts
        for number, level in enumerate(levels):
            ratios = []
            for tokens in judged:
                split = len(tokens) // 2
                kv = capture(model, tokens[:split])
                back = codec.decode(codec.encode(kv, level))
                ratios.append(np.log(perplexity(model, tokens, back, split) / perplexity(model, tokens, None, split)))
            codec.quality[level] = float(np.exp(np.mean(ratios)))
            if progress is not None:
                progress(0.6 + 0.4 * (number + 1) / len(levels))
    return codec


def _counted(codes: NDArray[np.uint8]) -> Floats:
    """codes (layers, 2, tokens, channels) -> how often each is there (layers, 2, channels, 256)."""
    layers, halves, _, channels = codes.shape
    rows = np.arange(layers * halves * channels).reshape(layers, halves, 1, channels)
    found = np.bincount((rows * 256 + codes).reshape(-1), minlength=layers * halves * channels * 256)
    return found.reshape(layers, halves, channels, 256).astype(np.float32)


def _frequencies(counts: Floats, blur: float) -> NDArray[np.uint16]:
    """Counts (layers, 2, channels, 256), blurred by so many bins, as frequencies."""
    kernel = np.exp(-0.5 * (np.arange(-12, 13) / blur) ** 2).astype(np.float32)
    kernel /= kernel.sum()
    flat = counts[..., :ESCAPE].reshape(-1, ESCAPE)
    padded = np.pad(flat, ((0, 0), (12, 12)))
    blurred = np.zeros_like(flat)
    for i, share in enumerate(kernel):
        blurred += share * padded[:, i : i + ESCAPE]
    blurred += 1e-6 / ESCAPE
    chances = 0.999 * blurred / blurred.sum(-1, keepdims=True) + 0.001 / ESCAPE
    return frequencies(chances.astype(np.float32)).reshape(counts.shape)
