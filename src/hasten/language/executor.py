"""The runtime: one forward over a ragged batch, against the paged cache.

No prefill and no decode: the rows of all chunks go through each packed matrix together, so weights are read once per
step for everybody; only attention looks at which row belongs to whom. Query, key and value share one matrix, gate and
up another. The residual stream is float32, products run at the chosen precision. Between products one fused kernel
does norm, rotation, cache writes or gating (:mod:`kernels_cpu`; on CUDA :mod:`kernels_triton`, driven by :mod:`gpu`);
other devices use the plain operations (:mod:`kernels_torch`). Long chunks attend through torch's flash kernel unless
the mode is deterministic.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from hasten.compress.panels import takes
from hasten.compress.quantize.base import Quantized
from hasten.errors import CacheError, ConfigurationError
from hasten.language.codes import joined, moved
from hasten.language.config import DecoderConfig
from hasten.language.decoder import rotary_tables, route
from hasten.language.linear import PackedLinear, best_precision, pack, runs_as_stored
from hasten.language.pages import KVCache, checked, row_bytes, rows_of, widened
from hasten.language.ragged import RaggedBatch
from hasten.nn import causal_mask

if TYPE_CHECKING:
    from hasten.language.placement import PlacedStep

__all__ = ["Executor", "KVCache"]

_log = logging.getLogger("hasten.language")

_LONG = 32
"""Rows of a chunk from which torch's flash kernel beats the row-wise one."""

_FAR = 1024
"""Tokens of context from which a sequence is worth cutting between threads."""

Read = Callable[[str, tuple[int, ...]], Any]
"""Name and shape of a parameter -> its tensor, or codes and scales (:class:`~hasten.compress.quantize.Quantized`)."""
_Place = Callable[..., Tensor]  # (layer, qkv, cos, sin, keys, values) -> query
_Attend = Callable[..., Tensor]  # (layer, index, query, keys, values) -> (rows, heads * head_dim)


@dataclass
class _Dense:
    gate_up: PackedLinear
    down: PackedLinear


@dataclass
class _Mixture:
    router: PackedLinear
    experts: list[_Dense]
    shared: _Dense | None
    shared_gate: PackedLinear | None


@dataclass
class _Layer:
    input_norm: Any
    qkv: PackedLinear
    q_norm: Any | None
    k_norm: Any | None
    out: PackedLinear
    post_norm: Any
    feed_forward: _Dense | _Mixture
    pre_ff_norm: Any | None
    post_ff_norm: Any | None
    window: int | None
    local: bool


@dataclass(frozen=True)
class _Long:
    """A chunk that goes through the flash kernel."""

    rows: slice
    table: Tensor
    context: int
    length: int
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """Who may look where; made once per step for all layers with this window."""
        if window not in self.masks:
            self.masks[window] = causal_mask(self.length, self.context + self.length, window)
        return self.masks[window]


class Executor:
    """Runs a decoder. ``read(name, shape)`` hands out the weights, one at a time.

    Contract: ``step`` writes keys and values of the batch's tokens into the cache blocks that the batch names and
    nothing else; calls must not overlap. Blocks that two chunks share must not be written by either.
    """

    def __init__(
        self,
        config: DecoderConfig,
        read: Read,
        *,
        device: str = "cpu",
        precision: str = "auto",
        deterministic: bool = False,
        rounds: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """``rounds``: whether codes that ``read`` gives are meant for activations that are rounded to bytes."""
        self.config = config
        self.device = torch.device(device)
        self.precision = best_precision(device) if precision == "auto" else precision
        self.deterministic = deterministic
        self.vocab_size = config.vocab_size
        self.max_context = config.max_position_embeddings
        self.dtype = torch.float32 if self.precision == "fp32" else torch.bfloat16
        self.keep_cache_in("auto")
        if deterministic and self.device.type != "cpu":
            raise ConfigurationError("deterministic mode is implemented on the CPU; use device='cpu'")
        self._ops = _operations_of(self.device)
        self._gpu: Any = None
        self._has_codes = False
        self._rounds = rounds
        self._unread: set[str] = set()
        self.weight_bytes = 0
        self._times: dict[int, tuple[float, float]] = {}
        self._load(read, progress)
        self._say_what_is_slower()

    def _load(self, read: Read, progress: Callable[[int, int], None] | None) -> None:
        config = self.config
        hidden = config.hidden_size
        with torch.inference_mode():
            embedding = read("model.embed_tokens.weight", (config.vocab_size, hidden)).to(self.device)
            self._layers = []
            for index in range(config.num_layers):
                self._layers.append(self._read_layer(read, index))
                if progress is not None:
                    progress(index + 1, config.num_layers + 1)
            self._last_norm = self._norm(read, "model.norm.weight")
            head = embedding
            if not config.tie_embeddings:
                head = read("lm_head.weight", (config.vocab_size, hidden)).to(self.device)
            # The output matrix decides between near-equal tokens, so it does not go below 8 bits; with a scale for
            # each 128 inputs of a row these cost 0.0001 bits per byte on pycode-4m. Other kernels keep 16.
            precision = self.precision
            if precision in ("int8", "int4", "fp8") or self._has_codes:
                precision = "int8" if self._runs_bytes(head) else "bf16"
            self._head = self._pack(head, precision, rounds=False)
            self._embed = self._embedding(embedding)
            constant = self._ops.constant
            plain = rotary_tables(config, self.max_context, device=self.device)
            self._tables = tuple(constant(t.contiguous()) for t in plain)
            self._local_tables = self._tables
            if config.local_rope_theta is not None:
                local = rotary_tables(config, self.max_context, local=True, device=self.device)
                self._local_tables = tuple(constant(t.contiguous()) for t in local)
            self._stack: Any = None
            if self.device.type == "cpu":
                from hasten.language.stack import Stack

                tables = (*self._tables, *self._local_tables)
                self._stack = Stack.of(config, self._layers, self._head, self._last_norm, tables)
                if self._stack is not None:
                    self._stack.deterministic = self.deterministic
            elif self._ops.__name__.endswith("kernels_triton"):
                from hasten.language.gpu import GpuSteps

                self._gpu = GpuSteps(self)
        if progress is not None:
            progress(config.num_layers + 1, config.num_layers + 1)

    def _embedding(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        """Tokens (rows,) -> their rows of the embedding (rows, hidden) float32.

        A tied embedding is read out of the packed output matrix where that holds the same numbers, so that it is in
        memory once. Else it is copied, for a view of the file would keep the whole file mapped.
        """
        packed = self._head.packed
        if self.config.tie_embeddings and packed is not None and packed[0].startswith("bf16"):
            panels = torch.from_numpy(packed[1])
            size = panels.shape[2]

            def from_panels(tokens: Tensor) -> Tensor:
                return panels[tokens // size, :, tokens % size].flatten(1).view(torch.bfloat16).float()

            return from_panels
        if self.config.tie_embeddings and packed is not None and packed[0].startswith("bf12"):
            from hasten.nn.product.twelve_bits import rows_of

            width = weight.shape[1]
            return lambda tokens: (
                torch.from_numpy(rows_of(packed[1], tokens.numpy(), width)).view(torch.bfloat16).float()
            )
        own = weight.clone()
        if own.device.type == "cpu" and own.dtype is torch.bfloat16:
            from hasten.language.kernels_cpu import look_up

            return lambda tokens: look_up(own, tokens)
        return lambda tokens: own[tokens].float()

    def _norm(self, read: Read, name: str, width: int | None = None) -> Any:
        weight = read(name, (width or self.config.hidden_size,)).to(self.device).float()
        return self._ops.constant((weight + self.config.norm_offset).contiguous())

    def _pack(
        self, weight: Any, precision: str | None = None, bias: Tensor | None = None, rounds: bool | None = None
    ) -> PackedLinear:
        if not isinstance(weight, Tensor):  # codes, as the folder stores them
            rounds = self._rounds if rounds is None else rounds
            self._has_codes = True
            weight = moved(weight, self.device)
            self._told(weight)
        packed = pack(
            weight.to(self.device) if isinstance(weight, Tensor) else weight,
            precision or self.precision,
            bias=None if bias is None else bias.to(self.device),
            deterministic=self.deterministic,
            rounds=rounds,
        )
        self.weight_bytes += packed.num_bytes
        for rows, (mine, plain) in packed.times.items():
            before = self._times.get(rows, (0.0, 0.0))
            self._times[rows] = (before[0] + mine, before[1] + plain)
        return packed

    @property
    def speed(self) -> dict[int, float]:
        """How many times as fast as in bfloat16 the products with codes are, by rows, as a GPU measured them."""
        return {rows: plain / mine for rows, (mine, plain) in self._times.items()}

    def _say_what_is_slower(self) -> None:
        """Codes are there for their bytes; where they cost time, one line tells."""
        slower = {rows: ratio for rows, ratio in self.speed.items() if ratio < 0.97}
        if slower:
            told = ", ".join(f"{ratio:.2f}x with {rows} rows" for rows, ratio in self.speed.items())
            _log.warning("products with codes on %s, against bfloat16: %s", self.device, told)

    def _runs_bytes(self, matrix: Tensor) -> bool:
        """Whether a kernel of this device runs the matrix in 8 bits."""
        if self.device.type == "cpu":
            return takes("int8", *matrix.shape)
        return self._ops.__name__.endswith("kernels_triton")

    def _told(self, weight: Quantized) -> None:
        """Say once of each format that no kernel of the device runs it as it is stored."""
        if self.device.type == "cpu" or runs_as_stored(weight, self.device):
            return
        label = weight.format.label
        if label not in self._unread:
            self._unread.add(label)
            _log.warning("matrices in %s have no kernel on %s; they run in %s", label, self.device, self.dtype)

    def _read_layer(self, read: Read, index: int) -> _Layer:
        config = self.config
        prefix, hidden, width = f"model.layers.{index}.", config.hidden_size, config.head_dim
        heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
        attention = prefix + "self_attn."
        qkv = joined([read(f"{attention}{n}_proj.weight", (h * width, hidden)) for n, h in heads.items()])
        qkv_bias = out_bias = None
        if config.attention_bias:
            qkv_bias = torch.cat([read(f"{attention}{n}_proj.bias", (h * width,)) for n, h in heads.items()])
        if config.attention_out_bias:
            out_bias = read(f"{attention}o_proj.bias", (hidden,))
        out = read(f"{attention}o_proj.weight", (hidden, config.num_heads * width))
        sandwich = config.sandwich_norms
        return _Layer(
            input_norm=self._norm(read, prefix + "input_layernorm.weight"),
            qkv=self._pack(qkv, bias=qkv_bias),
            q_norm=self._norm(read, attention + "q_norm.weight", width) if config.qk_norm else None,
            k_norm=self._norm(read, attention + "k_norm.weight", width) if config.qk_norm else None,
            out=self._pack(out, bias=out_bias),
            post_norm=self._norm(read, prefix + "post_attention_layernorm.weight"),
            feed_forward=self._read_feed_forward(read, prefix + "mlp.", index),
            pre_ff_norm=self._norm(read, prefix + "pre_feedforward_layernorm.weight") if sandwich else None,
            post_ff_norm=self._norm(read, prefix + "post_feedforward_layernorm.weight") if sandwich else None,
            window=config.window(index),
            local=config.uses_local_rotary(index),
        )

    def _read_dense(self, read: Read, prefix: str, inner: int) -> _Dense:
        hidden = self.config.hidden_size
        gate_up = joined([read(f"{prefix}{n}_proj.weight", (inner, hidden)) for n in ("gate", "up")])
        return _Dense(self._pack(gate_up), self._pack(read(f"{prefix}down_proj.weight", (hidden, inner))))

    def _read_feed_forward(self, read: Read, prefix: str, index: int) -> _Dense | _Mixture:
        config = self.config
        if not config.is_expert_layer(index):
            return self._read_dense(read, prefix, config.intermediate_size)
        # The router decides between experts: a small matrix, kept at the type of the activations.
        plain = "fp32" if self.precision == "fp32" else "bf16"
        shared = shared_gate = None
        if config.shared_expert_size:
            shared = self._read_dense(read, prefix + "shared_expert.", config.shared_expert_size)
            shared_gate = self._pack(read(prefix + "shared_expert_gate.weight", (1, config.hidden_size)), plain)
        return _Mixture(
            router=self._pack(read(prefix + "gate.weight", (config.num_experts, config.hidden_size)), plain),
            experts=[
                self._read_dense(read, f"{prefix}experts.{number}.", config.moe_intermediate_size)
                for number in range(config.num_experts)
            ],
            shared=shared,
            shared_gate=shared_gate,
        )

    def new_cache(self, num_blocks: int, block_size: int = 16) -> KVCache:
        """Zeroed cache blocks for this model. Raises :class:`ConfigurationError` where memory does not suffice."""
        config = self.config
        shape = (config.num_layers, num_blocks, config.num_kv_heads, block_size, config.head_dim)
        try:
            keys, values = (self._zeros(shape) for _ in range(2))
        except (RuntimeError, MemoryError) as error:
            size = num_blocks * block_size * self.bytes_per_token / 2**30
            raise ConfigurationError(f"a KV cache of {size:.1f} GiB does not fit into memory; ask for less") from error
        return KVCache(keys, values)

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        return rows_of(shape, self.dtype, self.kv_precision, self.device)

    def keep_cache_in(self, precision: str) -> None:
        """How later caches hold keys and values: ``auto`` (as the activations) or ``int8``, on the CPU.

        Raises :class:`~hasten.errors.ConfigurationError` where this executor cannot.
        """
        self.kv_precision = checked(precision, self.device)
        config = self.config
        row = row_bytes(config.head_dim, self.dtype, precision)
        self.bytes_per_token = 2 * config.num_layers * config.num_kv_heads * row

    @torch.inference_mode()
    def step(self, batch: RaggedBatch, cache: KVCache) -> Tensor:
        """Compute all tokens of ``batch``; returns the wanted rows' logits (rows, vocabulary), float32 on the CPU."""
        if batch.block_tables.numel() and (last := int(batch.block_tables.numpy().max())) >= cache.num_blocks:
            raise CacheError(
                f"the batch names block {last}, the cache has {cache.num_blocks}; give every chunk blocks of this cache"
            )
        if self._gpu is not None:
            return self._gpu.step(batch, cache)  # type: ignore[no-any-return]
        if self.device.type != "cpu":
            batch = _moved(batch, self.device)
        residual = self.embed(batch.tokens)
        step = self._ops.prepare(batch)
        if batch.placement is None and self._stack is not None and self._stack.takes(cache):
            return self._stack.step(residual, step, cache, batch.logit_rows)  # type: ignore[no-any-return]
        placed = self._placed(batch)
        if placed is not None:
            return self.layers(residual, cache, batch.logit_rows, *self._placed_operations(placed))
        place, attend = self.operations(step)
        short, long = self._split(batch)
        if long:

            def attend(layer: _Layer, index: int, query: Tensor, keys: Any, values: Any) -> Tensor:
                return self._attend_apart(query, short, long, cache, index, layer.window)

        return self.layers(residual, cache, batch.logit_rows, place, attend).cpu()

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (rows,) -> the residual stream (rows, hidden), float32."""
        residual = self._embed(tokens)
        if self.config.embedding_scale != 1.0:
            # Checkpoints were trained with this factor rounded to the type of the activations.
            residual *= float(torch.tensor(self.config.embedding_scale, dtype=self.dtype))
        return residual

    def operations(self, step: Any) -> tuple[_Place, _Attend]:
        """Rotation with the cache write, and attention, for a step that this device's operations prepared."""
        config, ops = self.config, self._ops

        def place(layer: _Layer, qkv: Tensor, cos: Any, sin: Any, keys: Any, values: Any) -> Tensor:
            norms = (layer.q_norm, layer.k_norm, config.norm_eps)
            return ops.place(qkv, step, cos, sin, keys, values, config.num_heads, *norms)  # type: ignore[no-any-return]

        def attend(layer: _Layer, index: int, query: Tensor, keys: Any, values: Any) -> Tensor:
            scale, cap = config.attention_scale, config.attention_softcap
            return ops.attend(query, step, keys, values, scale, layer.window, cap)  # type: ignore[no-any-return]

        return place, attend

    def _placed_operations(self, placed: PlacedStep) -> tuple[_Place, _Attend]:
        config = self.config

        def place(layer: _Layer, qkv: Tensor, cos: Any, sin: Any, keys: Any, values: Any) -> Tensor:
            norms = (layer.q_norm, layer.k_norm, config.norm_eps)
            return placed.place(qkv, cos, sin, keys, values, config.num_heads, *norms)

        def attend(layer: _Layer, index: int, query: Tensor, keys: Any, values: Any) -> Tensor:
            return placed.attend(query, keys, values, config.attention_scale, layer.window, config.attention_softcap)

        return place, attend

    def layers(self, residual: Tensor, cache: KVCache, wanted: Tensor, place: _Place, attend: _Attend) -> Tensor:
        """residual (rows, hidden) float32, overwritten; wanted (n,) rows -> logits (n, vocabulary) float32.

        Nothing here waits for the device, so that it can be captured.
        """
        config, ops, dtype = self.config, self._ops, self.dtype
        pages = cache.layers(ops.constant)
        h = ops.norm(residual, self._layers[0].input_norm, config.norm_eps, dtype)
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            keys, values = pages[index]
            cos, sin = self._local_tables if layer.local else self._tables
            query = place(layer, layer.qkv(h), cos, sin, keys, values)
            h = attend(layer, index, query, keys, values)
            if index == last:  # what follows concerns the wanted rows only
                if wanted.shape[0] == 0:
                    return torch.empty(0, config.vocab_size)
                h, residual = h[wanted], residual[wanted]
            h = layer.out(h)
            if layer.pre_ff_norm is not None and layer.post_ff_norm is not None:
                h = ops.norm(h, layer.post_norm, config.norm_eps, dtype)
                h = ops.add_norm(residual, h, layer.pre_ff_norm, config.norm_eps, dtype)
                h = ops.norm(self._feed(layer.feed_forward, h), layer.post_ff_norm, config.norm_eps, dtype)
            else:
                h = ops.add_norm(residual, h, layer.post_norm, config.norm_eps, dtype)
                h = self._feed(layer.feed_forward, h)
            following = self._last_norm if index == last else self._layers[index + 1].input_norm
            h = ops.add_norm(residual, h, following, config.norm_eps, dtype)
        logits = self._head(h).float()
        cap = config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _feed(self, block: _Dense | _Mixture, x: Tensor) -> Tensor:
        gelu = self.config.activation != "silu"
        if isinstance(block, _Dense):
            return block.down(self._ops.gate(block.gate_up(x), gelu))
        weights, chosen = route(block.router(x), self.config.experts_per_token, self.config.norm_topk_prob)
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for number in chosen.unique().tolist():
            token, place = torch.where(chosen == number)
            expert = self._feed(block.experts[number], x[token].contiguous())
            out.index_add_(0, token, expert.float() * weights[token, place, None])
        if block.shared is not None and block.shared_gate is not None:
            out += torch.sigmoid(block.shared_gate(x).float()) * self._feed(block.shared, x).float()
        return out.to(x.dtype)

    def _placed(self, batch: RaggedBatch) -> PlacedStep | None:
        """The form of a batch whose rows are placed one by one; None where they stand one behind the other.

        Plain batches take it too where few sequences have long contexts: shares of equal length then end inside a head.
        """
        if self.device.type != "cpu":
            if batch.special:
                raise ConfigurationError("trees of guesses run on the CPU; on another device use a chain")
            return None
        from hasten.language.placement import PlacedStep, chain_placement

        if batch.placement is not None:
            return PlacedStep(batch)
        if batch.places is not None:
            return None
        if self.deterministic or batch.num_tokens >= _LONG or batch.num_chunks == 0:
            return None
        contexts = batch.contexts.tolist()
        rows = batch.num_tokens
        if max(contexts) < _FAR or (rows == batch.num_chunks and rows * self.config.num_kv_heads >= 8):
            return None
        lengths = (batch.starts[1:] - batch.starts[:-1]).tolist()
        return PlacedStep(replace(batch, placement=chain_placement(contexts, lengths)))

    def keep(self, cache: KVCache, table: Sequence[int], context: int, nodes: Sequence[int]) -> None:
        """Move the keys and values of accepted tree nodes behind the context, in their order; the rest is garbage.

        Node i of the tree sits in slot ``context + i`` of the block table; ``nodes`` grow, so no move overwrites what a
        later one reads.
        """
        size = cache.block_size
        shared = cache.keys.data_ptr() == cache.values.data_ptr()
        for place, node in enumerate(nodes):
            if place != node:
                to, source = context + place, context + node
                for half in (cache.keys,) if shared else (cache.keys, cache.values):
                    half[:, table[to // size], :, to % size] = half[:, table[source // size], :, source % size]

    def move(self, cache: KVCache, copies: Any) -> None:
        """Copy keys and values of all layers: (n, 4) of (block, slot) -> (block, slot); nothing is copied twice."""
        shared = cache.keys.data_ptr() == cache.values.data_ptr()
        block, slot, to, place = torch.as_tensor(copies).long().T
        for half in (cache.keys,) if shared else (cache.keys, cache.values):
            half[:, to, :, place] = half[:, block, :, slot]

    def _split(self, batch: RaggedBatch) -> tuple[tuple[Any, Tensor] | None, list[_Long]]:
        """Chunks for the row-wise kernel, with their rows, and chunks for the flash kernel.

        (None, []) means that the row-wise kernel takes the batch as it is.
        """
        if self.deterministic or self.config.attention_softcap is not None or self.device.type != "cpu":
            return None, []
        if batch.num_tokens < _LONG or batch.places is not None:
            return None, []
        starts = batch.starts.tolist()
        lengths = [b - a for a, b in zip(starts, starts[1:], strict=False)]
        if max(lengths, default=0) < _LONG:
            return None, []
        contexts = batch.contexts.tolist()
        long, keep = [], []
        for chunk, length in enumerate(lengths):
            if length < _LONG:
                keep.append(chunk)
                continue
            span = slice(starts[chunk], starts[chunk + 1])
            long.append(_Long(span, batch.block_tables[chunk].long(), contexts[chunk], length))
        if not keep:
            return None, long
        rows = torch.cat([torch.arange(starts[c], starts[c + 1]) for c in keep])
        short = RaggedBatch(
            tokens=batch.tokens[rows],
            positions=batch.positions[rows],
            starts=torch.tensor([0, *torch.tensor([lengths[c] for c in keep]).cumsum(0).tolist()], dtype=torch.int32),
            contexts=batch.contexts[keep],
            block_tables=batch.block_tables[keep].contiguous(),
            logit_rows=batch.logit_rows,
        )
        return (self._ops.prepare(short), rows), long

    def _attend_apart(
        self,
        query: Tensor,
        short: tuple[Any, Tensor] | None,
        long: list[_Long],
        cache: KVCache,
        index: int,
        window: int | None,
    ) -> Tensor:
        config = self.config
        out = torch.empty(query.shape[0], config.num_heads * config.head_dim, dtype=query.dtype)
        if short is not None:
            part, rows = short
            keys, values = cache.layers(self._ops.constant)[index]
            some = query[rows].contiguous()
            out[rows] = self._ops.attend(some, part, keys, values, config.attention_scale, window, None)
        for chunk in long:
            where, scale = chunk.rows, config.attention_scale
            out[where] = _flash(query[where], chunk, cache.keys[index], cache.values[index], scale, window)
        return out


def _flash(query: Tensor, chunk: _Long, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
    """query (length, heads, width) -> (length, heads * width), through torch's flash kernel on gathered pages."""
    _, kv_heads, size, _ = keys.shape
    length, heads, width = query.shape
    total = chunk.context + length
    table = chunk.table[: -(-total // size)]

    def gathered(cache: Tensor) -> Tensor:
        rows = cache[table].transpose(0, 1)
        rows = widened(rows).to(query.dtype) if cache.dtype is torch.int8 else rows
        pages = rows.reshape(1, kv_heads, -1, width)[:, :, :total]
        return pages.repeat_interleave(heads // kv_heads, 1) if heads != kv_heads else pages

    plain = chunk.context == 0 and (window is None or window >= total)
    mask = None if plain else chunk.mask(window)
    q = query.transpose(0, 1)[None]
    out = functional.scaled_dot_product_attention(
        q, gathered(keys), gathered(values), attn_mask=mask, is_causal=plain, scale=scale
    )
    return out[0].transpose(0, 1).reshape(length, heads * width)


def _operations_of(device: torch.device) -> ModuleType:
    """The fused operations of the device, or the plain ones where it has none."""
    if device.type == "cpu":
        from hasten.language import kernels_cpu

        return kernels_cpu
    from hasten.language import kernels_torch, kernels_triton

    return kernels_triton if device.type == "cuda" and kernels_triton.available() else kernels_torch


def _moved(batch: RaggedBatch, device: torch.device) -> RaggedBatch:
    held = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    moved: Any = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in held.items()}
    return RaggedBatch(**moved)
