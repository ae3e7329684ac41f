"""A small decoder as one numba call: for drafts so small that calling a kernel costs more than running it.

A draft of a million weights needs some 20 µs for a token; as separate operations it needs ten times that in calls. Here
several tokens of several sequences are one call without the interpreter. Weights are bfloat16 where the checkpoint's
are, sums float32. Bound: the output matrix is read once per token. :class:`Executor` runs the same model for every
other purpose, and the tests compare the two.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from numba.extending import overload
from torch import Tensor

from hasten.language.config import DecoderConfig
from hasten.language.decoder import rotary_tables
from hasten.nn import causal_mask, grouped_attention
from hasten.nn.bfloat import FAST, exp, load, store
from hasten.nn.product import supported
from hasten.nn.product.bfloat16 import pack, panels

__all__ = ["FusedDecoder"]

_FEW = 8
"""pending tokens from which a matrix product beats token by token"""


def _array(x: Tensor) -> Any:
    x = x.detach().contiguous()
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.float().numpy()


@njit(cache=True, fastmath=FAST, error_model="numpy", inline="always")
def _product(weight: Any, x: Any, out: Any) -> None:
    """Four rows at a time: their sums do not wait for each other, and ``x`` is loaded once for all."""
    rows, width = weight.shape
    whole = rows - rows % 4
    for row in range(0, whole, 4):
        w0, w1, w2, w3 = weight[row], weight[row + 1], weight[row + 2], weight[row + 3]
        t0 = np.float32(0.0)
        t1 = np.float32(0.0)
        t2 = np.float32(0.0)
        t3 = np.float32(0.0)
        for i in range(width):
            value = x[i]
            t0 += value * load(w0[i])
            t1 += value * load(w1[i])
            t2 += value * load(w2[i])
            t3 += value * load(w3[i])
        out[row], out[row + 1], out[row + 2], out[row + 3] = t0, t1, t2, t3
    for row in range(whole, rows):
        line = weight[row]
        total = np.float32(0.0)
        for i in range(width):
            total += x[i] * load(line[i])
        out[row] = total


def _scores(head: Any, h: Any, half: Any, out: Any) -> None:
    """Logits (1, vocabulary) of one hidden state, by a plain matrix or one in panels."""
    raise NotImplementedError("only inside numba")


@overload(_scores, inline="always")
def _scores_of(head: Any, h: Any, half: Any, out: Any) -> Any:
    if head.ndim == 4:

        def packed(head: Any, h: Any, half: Any, out: Any) -> None:
            for i in range(h.shape[0]):
                store(half[0], i, h[i])
            panels(half, head, np.empty(0, np.float32), out, 0, head.shape[0], False)

        return packed

    def plain(head: Any, h: Any, half: Any, out: Any) -> None:
        _product(head, h, out[0])

    return plain


@njit(cache=True, fastmath=FAST, error_model="numpy")
def _normed(x: Any, weight: Any, eps: Any, out: Any) -> None:
    total = np.float32(0.0)
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    factor = np.float32(1.0) / np.sqrt(total / np.float32(x.shape[0]) + np.float32(eps))
    for i in range(x.shape[0]):
        out[i] = x[i] * factor * weight[i]


@njit(cache=True, fastmath=FAST, error_model="numpy")
def _forward(
    token: Any, position: Any, heads: Any, eps: Any, scale: Any, gelu: Any, last_only_keys: Any,
    embedding: Any, qkv: Any, out: Any, gate_up: Any, down: Any, norms: Any, last_norm: Any, cos: Any, sin: Any,
    keys: Any, values: Any, x: Any, h: Any, wide: Any, mixed: Any, scores: Any,
) -> None:  # fmt: skip
    """One token through all layers; ``h``: its state after the last norm. keys (layers, kv, context, width)."""
    layers, kv_heads, _, width = keys.shape
    hidden, inner, pairs = x.shape[0], down.shape[2], cos.shape[1]
    group = heads // kv_heads
    c, s = cos[position], sin[position]
    for i in range(hidden):
        x[i] = load(embedding[token, i])
    for layer in range(layers):
        _normed(x, norms[layer, 0], eps, h)
        _product(qkv[layer], h, wide)
        for head in range(heads + kv_heads):
            at = head * width
            for i in range(pairs):
                a, b = wide[at + i], wide[at + pairs + i]
                wide[at + i] = a * c[i] - b * s[i]
                wide[at + pairs + i] = b * c[i] + a * s[i]
        for head in range(kv_heads):
            at, past = (heads + head) * width, (heads + kv_heads + head) * width
            for i in range(width):
                keys[layer, head, position, i] = wide[at + i]
                values[layer, head, position, i] = wide[past + i]
        if last_only_keys and layer == layers - 1:
            return
        for head in range(heads):
            at = head * width
            page, content = keys[layer, head // group], values[layer, head // group]
            top = np.float32(-1e30)
            for j in range(position + 1):
                total = np.float32(0.0)
                for i in range(width):
                    total += wide[at + i] * page[j, i]
                scores[j] = total * np.float32(scale)
                top = max(top, scores[j])
            mass = np.float32(0.0)
            for j in range(position + 1):
                scores[j] = exp(scores[j] - top)
                mass += scores[j]
            for i in range(width):
                mixed[at + i] = np.float32(0.0)
            for j in range(position + 1):
                share = scores[j] / mass
                for i in range(width):
                    mixed[at + i] += share * content[j, i]
        _product(out[layer], mixed[: heads * width], h)
        for i in range(hidden):
            x[i] += h[i]
        _normed(x, norms[layer, 1], eps, h)
        _product(gate_up[layer], h, wide)
        for i in range(inner):
            value = wide[i]
            if gelu:
                u = np.float32(1.5957691216) * (value + np.float32(0.044715) * value * value * value)
                wide[i] = value / (np.float32(1.0) + exp(-u)) * wide[inner + i]
            else:
                wide[i] = value / (np.float32(1.0) + exp(-value)) * wide[inner + i]
        _product(down[layer], wide[:inner], h)
        for i in range(hidden):
            x[i] += h[i]
    _normed(x, last_norm, eps, h)


@njit(cache=True, fastmath=FAST, error_model="numpy")
def _guess(
    pending: Any, position: Any, count: Any, least: Any, heads: Any, vocab: Any, eps: Any, scale: Any, gelu: Any,
    embedding: Any, head: Any, qkv: Any, out: Any, gate_up: Any, down: Any, norms: Any, last_norm: Any, cos: Any,
    sin: Any, keys: Any, values: Any, tokens: Any, chances: Any,
) -> Any:  # fmt: skip
    """Compute the pending tokens, then guess up to ``count``; returns how many, and stops below ``least``."""
    hidden = embedding.shape[1]
    x, h = np.empty(hidden, np.float32), np.empty(hidden, np.float32)
    wide = np.empty(max(qkv.shape[1], gate_up.shape[1]), np.float32)
    mixed = np.empty(out.shape[2], np.float32)
    scores = np.empty(keys.shape[2], np.float32)
    half = np.empty((1, hidden), np.uint16)
    scored = np.empty((1, vocab), np.float32)
    logits = scored[0]
    for i in range(len(pending)):
        skip = i < len(pending) - 1
        _forward(pending[i], position + i, heads, eps, scale, gelu, skip, embedding, qkv, out, gate_up, down, norms,
                 last_norm, cos, sin, keys, values, x, h, wide, mixed, scores)  # fmt: skip
    position += len(pending)
    running = np.float32(1.0)
    for j in range(count):
        _scores(head, h, half, scored)
        top = np.float32(-1e30)
        for i in range(len(logits)):
            top = max(top, logits[i])
        mass, best = np.float32(0.0), 0
        for i in range(len(logits)):
            mass += exp(logits[i] - top)
        for i in range(len(logits)):
            if logits[i] == top:
                best = i
                break
        tokens[j] = best
        chances[j] = np.float32(1.0) / mass
        running *= chances[j]
        if running < least or j + 1 == count or position + 1 >= keys.shape[2]:
            return j + 1
        _forward(best, position, heads, eps, scale, gelu, False, embedding, qkv, out, gate_up, down, norms,
                 last_norm, cos, sin, keys, values, x, h, wide, mixed, scores)  # fmt: skip
        position += 1
    return 0


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _guess_serial(
    slots: Any, starts: Any, pending: Any, positions: Any, counts: Any, least: Any, heads: Any, vocab: Any, eps: Any,
    scale: Any, gelu: Any, embedding: Any, head: Any, qkv: Any, out: Any, gate_up: Any, down: Any, norms: Any,
    last_norm: Any, cos: Any, sin: Any, keys: Any, values: Any, tokens: Any, chances: Any, found: Any,
) -> None:  # fmt: skip
    for i in range(len(slots)):
        found[i] = _guess(
            pending[starts[i] : starts[i + 1]], positions[i], counts[i], least, heads, vocab, eps, scale, gelu,
            embedding, head, qkv, out, gate_up, down, norms, last_norm, cos, sin, keys[slots[i]], values[slots[i]],
            tokens[i], chances[i],
        )  # fmt: skip


@njit(cache=True, nogil=True, parallel=True, fastmath=FAST, error_model="numpy")
def _guess_parallel(
    slots: Any, starts: Any, pending: Any, positions: Any, counts: Any, least: Any, heads: Any, vocab: Any, eps: Any,
    scale: Any, gelu: Any, embedding: Any, head: Any, qkv: Any, out: Any, gate_up: Any, down: Any, norms: Any,
    last_norm: Any, cos: Any, sin: Any, keys: Any, values: Any, tokens: Any, chances: Any, found: Any,
) -> None:  # fmt: skip
    for i in prange(len(slots)):
        found[i] = _guess(
            pending[starts[i] : starts[i + 1]], positions[i], counts[i], least, heads, vocab, eps, scale, gelu,
            embedding, head, qkv, out, gate_up, down, norms, last_norm, cos, sin, keys[slots[i]], values[slots[i]],
            tokens[i], chances[i],
        )  # fmt: skip


class FusedDecoder:
    """A plain Llama-like decoder with caches of its own, one per slot.

    Contract: ``guess`` writes the cache of its slots from ``position`` on; not thread-safe.
    """

    def __init__(self, decoder: Any) -> None:
        """``decoder``: a :class:`~hasten.language.decoder.Decoder` for which ``supports(decoder.config)`` holds."""
        config: DecoderConfig = decoder.config
        self.config = config
        self.context = config.max_position_embeddings
        layers = decoder.model.layers
        self._plain = {
            "qkv": [torch.cat([getattr(x.self_attn, f"{n}_proj").weight for n in "qkv"]).detach() for x in layers],
            "out": [x.self_attn.o_proj.weight.detach() for x in layers],
            "gate_up": [torch.cat([x.mlp.gate_proj.weight, x.mlp.up_proj.weight]).detach() for x in layers],
            "down": [x.mlp.down_proj.weight.detach() for x in layers],
        }
        self._norms = torch.stack(
            [torch.stack([x.input_layernorm.weight, x.post_attention_layernorm.weight]) for x in layers]
        )
        self._norms = (self._norms.detach().float() + config.norm_offset).contiguous()
        self._last_norm = (decoder.model.norm.weight.detach().float() + config.norm_offset).contiguous()
        self._embedding = decoder.model.embed_tokens.weight.detach()
        self._cos, self._sin = rotary_tables(config, self.context)
        head = _array(decoder.lm_head.weight)
        if head.dtype == np.uint16 and supported("bf16"):
            head = pack(head)
        self._weights = (
            _array(self._embedding), head,
            *(_array(torch.stack(self._plain[n])) for n in ("qkv", "out", "gate_up", "down")),
            self._norms.numpy(), self._last_norm.numpy(), self._cos.numpy(), self._sin.numpy(),
        )  # fmt: skip
        self._scalars = (
            config.num_heads,
            config.vocab_size,
            config.norm_eps,
            config.attention_scale,
            config.activation != "silu",
        )
        self._reserve(4)

    @staticmethod
    def supports(config: DecoderConfig) -> bool:
        """Whether this file knows everything that the configuration asks for."""
        return not (
            config.num_experts or config.sandwich_norms or config.qk_norm or config.attention_bias
            or config.attention_out_bias or config.attention_softcap or config.logit_softcap
            or config.sliding_window or config.embedding_scale != 1.0 or config.partial_rotary_factor != 1.0
            or config.local_rope_theta
        )  # fmt: skip

    _keys: Any
    _values: Any

    def _reserve(self, slots: int) -> None:
        config = self.config
        shape = (slots, config.num_layers, config.num_kv_heads, self.context, config.head_dim)
        keys, values = np.empty(shape, np.float32), np.empty(shape, np.float32)
        if hasattr(self, "_keys"):
            keys[: len(self._keys)], values[: len(self._keys)] = self._keys, self._values
        self._keys, self._values = keys, values

    @property
    def slots(self) -> int:
        """Sequences that have room now; more are made when asked for."""
        return len(self._keys)

    def reserve(self, slots: int) -> None:
        """Make room for so many sequences; caches are kept."""
        if slots > self.slots:
            self._reserve(max(slots, 2 * self.slots))

    def guess(
        self, slots: Any, pending: list[Any], positions: Any, counts: Any, least: float = 0.0
    ) -> tuple[Any, Any, Any]:
        """The likeliest continuations: tokens (n, most), their probabilities (n, most), how many (n,).

        For each of n sequences: its slot, the tokens that its cache lacks (at least one), the position of the first,
        and guesses at most. A continuation ends early once its probability is below ``least``.
        """
        for i, piece in enumerate(pending):
            if len(piece) > _FEW:
                self._prefill(int(slots[i]), piece[:-1], int(positions[i]))
                positions[i] += len(piece) - 1
                pending[i] = piece[-1:]
        starts = np.zeros(len(pending) + 1, np.int64)
        np.cumsum([len(p) for p in pending], out=starts[1:])
        most = int(max(counts))
        tokens = np.zeros((len(pending), most), np.int64)
        chances = np.zeros((len(pending), most), np.float32)
        found = np.zeros(len(pending), np.int64)
        call = _guess_serial if len(pending) < 4 else _guess_parallel
        call(np.asarray(slots, np.int64), starts, np.concatenate(pending).astype(np.int64),
             np.asarray(positions, np.int64), np.asarray(counts, np.int64), np.float32(least), *self._scalars,
             *self._weights, self._keys, self._values, tokens, chances, found)  # fmt: skip
        return tokens, chances, found

    @torch.inference_mode()
    def _prefill(self, slot: int, tokens: Any, position: int) -> None:
        """Keys and values of many tokens by matrix products; of the last layer nothing else is computed."""
        config, count = self.config, len(tokens)
        end = position + count
        keys, values = torch.from_numpy(self._keys[slot]), torch.from_numpy(self._values[slot])
        x = self._embedding[torch.from_numpy(np.asarray(tokens, np.int64))].float()
        cos, sin = self._cos[position:end, None], self._sin[position:end, None]
        mask = causal_mask(count, end)
        heads, kv, width = config.num_heads, config.num_kv_heads, config.head_dim
        last = config.num_layers - 1
        for layer in range(config.num_layers):
            h = self._rms(x, self._norms[layer, 0])
            if layer == last:
                weight = self._plain["qkv"][layer][heads * width :].float()
                parts = (h @ weight.T).view(count, 2 * kv, width)
                key, value = parts[:, :kv], parts[:, kv:]
            else:
                parts = (h @ self._plain["qkv"][layer].float().T).view(count, heads + 2 * kv, width)
                query, key, value = parts[:, :heads], parts[:, heads : heads + kv], parts[:, heads + kv :]
            keys[layer, :, position:end] = _turn(key, cos, sin).transpose(0, 1)
            values[layer, :, position:end] = value.transpose(0, 1)
            if layer == last:
                return
            attended = grouped_attention(
                _turn(query, cos, sin).transpose(0, 1)[None], keys[layer, :, :end][None], values[layer, :, :end][None],
                scale=config.attention_scale, mask=mask,
            )[0].transpose(0, 1).reshape(count, heads * width)  # fmt: skip
            x = x + attended @ self._plain["out"][layer].float().T
            gate, up = (self._rms(x, self._norms[layer, 1]) @ self._plain["gate_up"][layer].float().T).chunk(2, -1)
            functional = torch.nn.functional
            act = functional.gelu(gate, approximate="tanh") if self._scalars[4] else functional.silu(gate)
            x = x + (act * up) @ self._plain["down"][layer].float().T

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.norm_eps) * weight


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
