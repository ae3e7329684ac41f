"""Decoders whose layers differ in size, as compression leaves them, in the runtime.

A feed-forward has its own width in every layer, and so have the heads of an attention, whose key heads each turn by the
frequencies that they kept. A paged cache has one width, that of the widest layer, and where the fast kernel of
attention runs, that width rounded up to what it takes; narrower heads are followed by zeros there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hasten.errors import ConfigurationError
from hasten.language import kernels_cpu, kernels_sized
from hasten.language.config import DecoderConfig
from hasten.language.decoder import FeedForward
from hasten.language.executor import Executor, KVCache, _Dense, _Layer, _Long, _Mixture
from hasten.language.kernels_paged import paged_kernel_takes
from hasten.language.linear import best_precision
from hasten.language.placement import PlacedStep, chain_placement
from hasten.language.ragged import RaggedBatch
from hasten.nn.sized import SizedAttention

__all__ = ["SizedExecutor", "executor_of", "is_sized", "layer_sizes", "plain_config"]

_FLASH_FROM = 32
"""Rows of a chunk from which torch's flash kernel beats the row-wise one."""
_FAR = 1024
"""Tokens of context from which a sequence is worth cutting between threads."""
_LANES = 32
"""The fast kernel of attention takes widths that are multiples of this."""
_PARALLEL_ROWS = 64


def _fast(precision: str) -> bool:
    """Whether heads of padded width go through the kernel for pages of sixteen keys."""
    chosen = best_precision("cpu") if precision == "auto" else precision
    return chosen != "fp32" and paged_kernel_takes(16, _LANES)


def layer_sizes(decoder: Any) -> list[dict[str, Any]]:
    """What each layer has of its own: widths of feed-forward, keys and values, rotary pairs, biases."""
    found = []
    for layer in decoder.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        entry: dict[str, Any] = {}
        if isinstance(mlp, FeedForward):
            entry["intermediate_size"] = mlp.down_proj.in_features
        if isinstance(attention, SizedAttention):
            entry |= {
                "key_width": attention.key_width,
                "value_width": attention.value_width,
                "rotary_pairs": attention.pairs.tolist(),
                "bias": attention.q_proj.bias is not None,
                "out_bias": attention.o_proj.bias is not None,
            }
        found.append(entry)
    return found


def is_sized(decoder: Any) -> bool:
    """Whether the layers of a decoder have other sizes than its configuration says."""
    usual = decoder.config.intermediate_size
    return any("key_width" in s or s.get("intermediate_size", usual) != usual for s in layer_sizes(decoder))


def plain_config(decoder: Any) -> DecoderConfig | None:
    """The ordinary configuration that says the same, where there is one: all feed-forwards alike, attention
    untouched."""
    sizes = layer_sizes(decoder)
    widths = {s["intermediate_size"] for s in sizes if "intermediate_size" in s}
    if any("key_width" in s for s in sizes) or len(widths) != 1:
        return None
    config: DecoderConfig = replace(decoder.config, intermediate_size=widths.pop())
    return config


def executor_of(decoder: Any, **options: Any) -> Executor:
    """The runtime of a sized decoder: the ordinary one where an ordinary configuration says the same."""
    config = plain_config(decoder)
    if config is None:
        return SizedExecutor(decoder, **options)
    state = decoder.state_dict()
    return Executor(config, lambda name, shape: state[name].detach(), **options)


class SizedExecutor(Executor):
    """Runs a decoder whose layers differ in size; CPU.

    Contract as of :class:`~hasten.language.executor.Executor`.
    """

    def __init__(self, decoder: Any, **options: Any) -> None:
        if str(options.get("device", "cpu")) != "cpu":
            raise ConfigurationError("layers of different sizes run on the CPU; use device='cpu'")
        self._decoder = decoder
        config = decoder.config
        attentions = [layer.self_attn for layer in decoder.model.layers]
        self._narrow = isinstance(attentions[0], SizedAttention)
        self._key_width = max(a.key_width for a in attentions) if self._narrow else config.head_dim
        self._value_width = max(a.value_width for a in attentions) if self._narrow else config.head_dim
        widest = max(self._key_width, self._value_width)
        if self._narrow and _fast(str(options.get("precision", "auto"))):
            self._key_width = self._value_width = -(-widest // _LANES) * _LANES
        elif self._narrow and options.get("deterministic"):
            self._key_width = self._value_width = widest  # the row-wise kernel knows one width
        usual = np.arange(config.rotary_dim // 2, dtype=np.int32)[None].repeat(config.num_kv_heads, 0)
        self._turns = [a.pairs.to(torch.int32).contiguous().numpy() if self._narrow else usual for a in attentions]
        whole = (config.head_dim, config.head_dim)
        self._own = [(a.key_width, a.value_width) if self._narrow else whole for a in attentions]
        state = decoder.state_dict()
        super().__init__(config, lambda name, shape: state[name].detach(), **options)
        numbers = config.num_kv_heads * (self._key_width + self._value_width)
        self.bytes_per_token = config.num_layers * numbers * self.dtype.itemsize
        # The ordinary stack knows one width of a head, and takes no layers of different sizes.
        self._stack = None
        self._few = _SizedStack.of(self) if self.dtype is torch.bfloat16 else None

    @torch.inference_mode()
    def step(self, batch: RaggedBatch, cache: KVCache) -> Tensor:
        """As :meth:`Executor.step`; few rows, and in deterministic mode all, run in one call."""
        few = batch.num_tokens < _FLASH_FROM or self.deterministic
        sound = not batch.block_tables.numel() or int(batch.block_tables.max()) < cache.num_blocks
        if self._few is None or not few or not sound or batch.special or cache.block_size != 16:
            return super().step(batch, cache)
        return self._few.step(self.embed(batch.tokens), batch, cache)

    def _read_layer(self, read: Callable[[str, tuple[int, ...]], Tensor], index: int) -> _Layer:
        if not self._narrow:
            return super()._read_layer(read, index)
        attention: SizedAttention = self._decoder.model.layers[index].self_attn
        config, prefix = self.config, f"model.layers.{index}."
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        qkv_bias = None
        if attention.q_proj.bias is not None:
            biases = [torch.zeros(m.out_features) if m.bias is None else m.bias.detach().float() for m in parts]
            qkv_bias = torch.cat(biases)
        sandwich, width = config.sandwich_norms, attention.key_width
        names = prefix + "self_attn."
        return _Layer(
            input_norm=self._norm(read, prefix + "input_layernorm.weight"),
            qkv=self._pack(torch.cat([m.weight.detach() for m in parts]), bias=qkv_bias),
            q_norm=self._norm(read, names + "q_norm.weight", width) if attention.q_norm is not None else None,
            k_norm=self._norm(read, names + "k_norm.weight", width) if attention.k_norm is not None else None,
            out=self._pack(
                attention.o_proj.weight.detach(),
                bias=None if attention.o_proj.bias is None else attention.o_proj.bias.detach(),
            ),
            post_norm=self._norm(read, prefix + "post_attention_layernorm.weight"),
            feed_forward=self._read_feed_forward(read, prefix + "mlp.", index),
            pre_ff_norm=self._norm(read, prefix + "pre_feedforward_layernorm.weight") if sandwich else None,
            post_ff_norm=self._norm(read, prefix + "post_feedforward_layernorm.weight") if sandwich else None,
            window=config.window(index),
            local=config.uses_local_rotary(index),
        )

    def _read_feed_forward(
        self, read: Callable[[str, tuple[int, ...]], Tensor], prefix: str, index: int
    ) -> _Dense | _Mixture:
        mlp = self._decoder.model.layers[index].mlp
        if isinstance(mlp, FeedForward):
            return self._read_dense(read, prefix, mlp.down_proj.in_features)
        return super()._read_feed_forward(read, prefix, index)

    def keep_cache_in(self, precision: str) -> None:
        """Only ``auto``."""
        if precision != "auto":
            raise ConfigurationError(
                f"layers of different sizes keep their cache as the activations are, not in {precision}; leave "
                "--kv-precision out"
            )
        self.kv_precision = precision

    def new_cache(self, num_blocks: int, block_size: int = 16) -> KVCache:
        """Zeroed blocks of the widest layer's keys and values."""
        config = self.config
        shape = (config.num_layers, num_blocks, config.num_kv_heads, block_size)
        try:
            return KVCache(self._zeros((*shape, self._key_width)), self._zeros((*shape, self._value_width)))
        except (RuntimeError, MemoryError) as error:
            size = num_blocks * block_size * self.bytes_per_token / 2**30
            raise ConfigurationError(f"a KV cache of {size:.1f} GiB does not fit into memory; ask for less") from error

    def _placed(self, batch: RaggedBatch) -> PlacedStep | None:
        if not self._narrow:
            return super()._placed(batch)
        plain = batch.placement is None
        if batch.placement is None:
            lengths = (batch.starts[1:] - batch.starts[:-1]).tolist()
            batch = replace(batch, placement=chain_placement(batch.contexts.tolist(), lengths))
        return _SizedStep(batch, self, plain)


class _SizedStack:
    """Runs a step of few rows in one call: the table of :func:`kernels_sized.run_sized`.

    Made by :meth:`of`, which returns None for what the call does not cover.
    """

    def __init__(self, executor: SizedExecutor, matrices: Any, norms: Any, head: Any, keep: list[Any]) -> None:
        self._executor, self._keep = executor, keep
        self._matrices, self._norms, self._head = matrices, norms, head
        self._widest = -(-max(int(matrices[..., 2].max()), int(head[2])) // 32) * 32
        layers = executor._layers
        self._windows = np.array([layer.window or 0 for layer in layers], np.int64)
        self._local = np.array([layer.local for layer in layers], np.bool_)
        turns = executor._turns
        most = max(1, max(t.shape[1] for t in turns))
        self._pairs = np.zeros((len(layers), turns[0].shape[0], most), np.int32)
        for index, turn in enumerate(turns):
            self._pairs[index, :, : turn.shape[1]] = turn
        self._widths = np.array([(*w, t.shape[1]) for w, t in zip(executor._own, turns, strict=True)], np.int64)

    @classmethod
    def of(cls, executor: SizedExecutor) -> _SizedStack | None:
        """The table of an executor's layers."""
        from hasten.nn.product.dispatch import describe

        config, layers, head = executor.config, executor._layers, executor._head
        if config.attention_softcap is not None or config.logit_softcap is not None or config.sandwich_norms:
            return None
        if executor._key_width != executor._value_width or not paged_kernel_takes(16, executor._key_width):
            return None
        linears = []
        for layer in layers:
            block = layer.feed_forward
            if not isinstance(block, _Dense):
                return None
            linears.append([layer.qkv, layer.out, block.gate_up, block.down])
        if any(one.packed is None for row in [*linears, [head]] for one in row):
            return None
        matrices = np.stack([np.stack([describe(*one.packed) for one in row]) for row in linears])
        ones = np.ones(executor._key_width, np.float32)
        norms = np.zeros((len(layers), 4), np.int64)
        for index, layer in enumerate(layers):
            found = (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm)
            norms[index] = [(ones if norm is None else norm).ctypes.data for norm in found]
        return cls(executor, matrices, norms, describe(*head.packed), [linears, layers, head, ones])

    def step(self, residual: Tensor, batch: RaggedBatch, cache: KVCache) -> Tensor:
        """residual (rows, hidden) float32, overwritten -> the wanted rows' logits (n, vocabulary) float32."""
        from hasten.language.kernels_stack import threads

        executor, config = self._executor, self._executor.config
        step = kernels_cpu.prepare(batch)
        logits = torch.empty((batch.logit_rows.shape[0], config.vocab_size), dtype=torch.float32)
        items = len(step.positions) * config.num_kv_heads
        work = step.work * config.num_heads * executor._key_width * 2
        alone = work < kernels_cpu.PARALLEL_WORK or items < 2
        cuts = np.array([0, items], np.int64) if alone else step.parts(config.num_kv_heads)
        run: Any = kernels_sized.run_sized
        run(
            residual.numpy(), self._matrices, self._norms, self._head, executor._last_norm.ctypes.data, self._windows,
            self._local, self._widths, self._pairs, *executor._tables, *executor._local_tables,
            cache.keys.view(torch.uint16).numpy(), cache.values.view(torch.uint16).numpy(), step.chunk_of,
            step.positions, step.tables, cuts, batch.logit_rows.numpy(), config.num_heads, config.qk_norm,
            float(config.attention_scale), float(config.norm_eps), config.activation != "silu", self._widest,
            threads(), logits.numpy(),
        )  # fmt: skip
        return logits


class _SizedStep(PlacedStep):
    """Places and attends with heads of a layer's own width."""

    def __init__(self, batch: RaggedBatch, executor: SizedExecutor, plain: bool) -> None:
        super().__init__(batch)
        self._executor, self._layer = executor, 0
        self._turned: dict[int, tuple[Any, Any]] = {}
        self._long: list[_Long] = []
        self._short: tuple[Any, Tensor] | None = None
        self._rows: Any = None
        lengths = np.diff(self.starts)
        far = self.contexts.max(initial=0) >= _FAR and len(lengths) * executor.config.num_kv_heads < 8
        if not plain:
            return
        if executor.deterministic or executor.config.attention_softcap is not None:
            self._rows = kernels_cpu.prepare(batch)  # row by row, whatever else is in the batch
            return
        longest = lengths.max(initial=0)
        if longest < _FLASH_FROM:
            self._rows = None if far else kernels_cpu.prepare(batch)
            return
        starts = self.starts.tolist()
        keep = [c for c, n in enumerate(lengths) if n < _FLASH_FROM]
        for chunk in np.flatnonzero(lengths >= _FLASH_FROM).tolist():
            span = slice(starts[chunk], starts[chunk + 1])
            table = batch.block_tables[chunk].long()
            self._long.append(_Long(span, table, int(self.contexts[chunk]), int(lengths[chunk])))
        if keep:
            rows = torch.cat([torch.arange(starts[c], starts[c + 1]) for c in keep])
            counts = [int(lengths[c]) for c in keep]
            some = RaggedBatch(
                tokens=batch.tokens[rows], positions=batch.positions[rows],
                starts=torch.tensor([0, *np.cumsum(counts).tolist()], dtype=torch.int32),
                contexts=batch.contexts[keep], block_tables=batch.block_tables[keep].contiguous(),
                logit_rows=batch.logit_rows, placement=chain_placement(batch.contexts[keep].tolist(), counts),
            )  # fmt: skip
            self._short = (some, rows)

    def place(
        self, qkv: Tensor, cos: Any, sin: Any, keys: Any, values: Any, heads: int, q_norm: Any, k_norm: Any, eps: float
    ) -> Tensor:
        """Rotate queries and keys, and write the tokens' keys and values to their slots."""
        executor = self._executor
        width, deep = executor._own[self._layer]
        pairs = executor._turns[self._layer]
        self._layer += 1
        tables = self._turned.get(id(cos))
        if tables is None:
            tables = self._turned[id(cos)] = (cos[self.positions], sin[self.positions])
        c, s = (t[:, pairs] for t in tables)  # (tokens, kv_heads, pairs)
        query = torch.zeros((qkv.shape[0], heads, executor._key_width), dtype=qkv.dtype)
        rows, target = (x.view(torch.uint16).numpy() if x.dtype is torch.bfloat16 else x.numpy() for x in (qkv, query))
        ones = np.ones(width, np.float32)
        run = kernels_sized.place_parallel if qkv.shape[0] >= _PARALLEL_ROWS else kernels_sized.place
        run(
            rows, self.placement.slots, self.chunk_of, self.tables, c, s, keys, values, heads, width, deep,
            q_norm is not None, ones if q_norm is None else q_norm, ones if k_norm is None else k_norm, eps, target,
        )  # fmt: skip
        if len(self.copies):
            kernels_cpu.copy_slots(self.copies, keys)
            kernels_cpu.copy_slots(self.copies, values)
        if self.queries is not None:
            self.queries.append(query)
        return query

    def attend(
        self, query: Tensor, keys: Any, values: Any, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """As :meth:`PlacedStep.attend`, without the zeros that fill values up; rows of padded width go through the
        paged kernel, long chunks through torch's flash kernel."""
        full = self._attend_padded(query, keys, values, scale, window, softcap)
        deep = self._executor._own[self._layer - 1][1]
        if deep == values.shape[3]:
            return full
        return full.view(len(full), -1, values.shape[3])[:, :, :deep].reshape(len(full), -1)

    def _attend_padded(
        self, query: Tensor, keys: Any, values: Any, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        even = keys.shape[3] == values.shape[3]
        if not self._long:
            if self._rows is not None and even:
                return kernels_cpu.attend(query, self._rows, keys, values, scale, window, softcap)
            return super().attend(query, keys, values, scale, window, softcap)
        heads, deep = query.shape[1], values.shape[3]
        out = torch.empty(query.shape[0], heads * deep, dtype=query.dtype)
        if self._short is not None:
            some, rows = self._short
            picked = query[rows].contiguous()
            if even:
                out[rows] = kernels_cpu.attend(picked, kernels_cpu.prepare(some), keys, values, scale, window, softcap)
            else:
                out[rows] = PlacedStep(some).attend(picked, keys, values, scale, window, softcap)
        pages = [torch.from_numpy(x) for x in (keys, values)]
        pages = [x.view(torch.bfloat16) if x.dtype == torch.uint16 else x for x in pages]
        for chunk in self._long:
            out[chunk.rows] = _flash(query[chunk.rows], chunk, pages[0], pages[1], scale, window)
        return out


def _flash(query: Tensor, chunk: _Long, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
    """query (length, heads, width) -> (length, heads * value width). The kernel wants one width for keys and values."""
    kv_heads, size, width = keys.shape[1:]
    deep, length, heads = values.shape[3], query.shape[0], query.shape[1]
    total, widest = chunk.context + length, max(width, deep)
    table = chunk.table[: -(-total // size)]

    def gathered(cache: Tensor) -> Tensor:
        pages = cache[table].transpose(0, 1).reshape(1, kv_heads, -1, cache.shape[3])[:, :, :total]
        pages = functional.pad(pages, (0, widest - cache.shape[3]))
        return pages.repeat_interleave(heads // kv_heads, 1)

    plain = chunk.context == 0 and (window is None or window >= total)
    mask = None if plain else chunk.mask(window)
    q = functional.pad(query.transpose(0, 1)[None], (0, widest - width))
    out = functional.scaled_dot_product_attention(
        q, gathered(keys), gathered(values), attn_mask=mask, is_causal=plain, scale=scale
    )
    return out[0, :, :, :deep].transpose(0, 1).reshape(length, heads * deep)
