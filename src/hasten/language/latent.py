"""Latent attention in the runtime: every head reads one short vector per token, straight from the paged cache.

The per-head factors are folded into the matrices around attention when weights are packed: queries come out of their
product in latent coordinates, and the output matrix takes what heads read of the latent. What is left looks like
multi-query attention whose keys are (rotated part, latent) and whose values are the latent itself, kept once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten.errors import ConfigurationError
from hasten.language import kernels_cpu
from hasten.language.config import DecoderConfig
from hasten.language.decoder import empty_decoder
from hasten.language.decoder_files import fill, write_weights
from hasten.language.executor import Executor, KVCache, _Layer
from hasten.language.kernels_latent_stack import LatentStack
from hasten.language.kernels_paged import paged_kernel_takes
from hasten.language.placement import PlacedStep, chain_placement
from hasten.language.ragged import RaggedBatch
from hasten.nn.latent import LatentAttention

__all__ = ["LatentExecutor", "is_latent", "latent_decoder", "save"]


_FEW_ROWS = 16
"""Rows of a sequence, on average, from which on attention takes shares of the context instead of row by row."""


def is_latent(decoder: Any) -> bool:
    """Whether the layers of a decoder attend through latents."""
    return isinstance(decoder.model.layers[0].self_attn, LatentAttention)


class LatentExecutor(Executor):
    """Runs a decoder whose attention layers are :class:`~hasten.nn.latent.LatentAttention`; CPU."""

    def __init__(self, decoder: Any, **options: Any) -> None:
        first = decoder.model.layers[0].self_attn
        if any(x.self_attn.cache_numbers != first.cache_numbers for x in decoder.model.layers):
            raise ConfigurationError("layers with caches of different width cannot share a paged cache; use one rank")
        if str(options.get("device", "cpu")) != "cpu":
            raise ConfigurationError("latent attention runs on the CPU; use device='cpu'")
        self._decoder, self._rope, self._rank, self._plain = decoder, first.rope, first.rank, first.plain_keys
        state = decoder.state_dict()
        super().__init__(decoder.config, lambda name, shape: state[name].detach(), **options)
        numbers = first.cache_numbers
        self.bytes_per_token = self.config.num_layers * numbers * self.dtype.itemsize
        self._pairs = [x.self_attn.pairs.tolist() for x in decoder.model.layers]
        self._turned: dict[int, Any] = {}
        # What was made of the layers knows keys and values of heads; this one knows latents.
        pairs = np.array(self._pairs, np.int64).reshape(len(self._pairs), -1)
        self._stack = LatentStack.over(self._stack, pairs, self._key_width, self._rank, self._plain)

    @property
    def _key_width(self) -> int:
        return self._rope + (self._rank if self._plain else 0)

    def _read_layer(self, read: Callable[[str, tuple[int, ...]], Tensor], index: int) -> _Layer:
        attention: Any = self._decoder.model.layers[index].self_attn
        config, prefix = self.config, f"model.layers.{index}."
        heads, width = config.num_heads, config.head_dim
        q = attention.q_proj.weight.detach().double().view(heads, width, -1)
        factors = [attention.rope_query.detach().double()]
        if self._plain:
            factors.append(attention.latent_query.detach().double())
        absorb = torch.cat(factors, 1)  # (heads, key width, width)
        rows = [(absorb @ q).flatten(0, 1), attention.rope_proj.weight.double(), attention.latent_proj.weight.double()]
        bias = None
        if config.attention_bias:
            turned = absorb @ attention.q_proj.bias.detach().double().view(heads, width, 1)
            parts = [turned.flatten(), attention.rope_proj.bias.double(), attention.latent_proj.bias.double()]
            bias = torch.cat([p.detach() for p in parts]).float()
        out = attention.o_proj.weight.detach().double().view(-1, heads, width).transpose(0, 1)
        back = (out @ attention.latent_value.detach().double()).transpose(0, 1).flatten(1)
        sandwich = config.sandwich_norms
        return _Layer(
            input_norm=self._norm(read, prefix + "input_layernorm.weight"),
            qkv=self._pack(torch.cat([r.detach() for r in rows]).float(), bias=bias),
            q_norm=None,
            k_norm=None,
            out=self._pack(back.float(), bias=attention.o_proj.bias.detach() if config.attention_out_bias else None),
            post_norm=self._norm(read, prefix + "post_attention_layernorm.weight"),
            feed_forward=self._read_feed_forward(read, prefix + "mlp.", index),
            pre_ff_norm=self._norm(read, prefix + "pre_feedforward_layernorm.weight") if sandwich else None,
            post_ff_norm=self._norm(read, prefix + "post_feedforward_layernorm.weight") if sandwich else None,
            window=config.window(index),
            local=config.uses_local_rotary(index),
        )

    def keep_cache_in(self, precision: str) -> None:
        """Only ``auto``."""
        if precision != "auto":
            raise ConfigurationError(
                f"latent attention keeps its cache as the activations are, not in {precision}; leave --kv-precision out"
            )
        self.kv_precision = precision

    def new_cache(self, num_blocks: int, block_size: int = 16) -> KVCache:
        """Blocks of (rotated part, latent); the values are the latent, in the same place where scores read it too."""
        config = self.config
        shape = (config.num_layers, num_blocks, 1, block_size)
        try:
            keys = self._zeros((*shape, self._key_width))
            if self._plain:
                return LatentCache(keys, keys)
            return LatentCache(keys, self._zeros((*shape, self._rank)))
        except (RuntimeError, MemoryError) as error:
            size = num_blocks * block_size * self.bytes_per_token / 2**30
            raise ConfigurationError(f"a KV cache of {size:.1f} GiB does not fit into memory; ask for less") from error

    def _placed(self, batch: RaggedBatch) -> PlacedStep:
        rows = None
        if batch.placement is None:
            if self.deterministic or batch.num_tokens < _FEW_ROWS * batch.num_chunks:
                rows = kernels_cpu.prepare(batch)
            lengths = (batch.starts[1:] - batch.starts[:-1]).tolist()
            batch = replace(batch, placement=chain_placement(batch.contexts.tolist(), lengths))
        return _LatentStep(batch, self, rows)


class LatentCache(KVCache):
    """A cache whose values may be part of its keys."""

    @property
    def bytes(self) -> int:
        """Memory that the cache takes; what is kept once counts once."""
        size = self.keys.numel() * self.keys.element_size()
        if self.values.data_ptr() == self.keys.data_ptr():
            return size
        return size + self.values.numel() * self.values.element_size()


class _LatentStep(PlacedStep):
    """Places and attends in latent coordinates."""

    def __init__(self, batch: RaggedBatch, executor: LatentExecutor, rows: Any) -> None:
        """``rows``: the batch as the kernel for whole pages reads it, where it is few rows one behind the other."""
        super().__init__(batch)
        self._executor, self._rows = executor, rows
        self._layer = 0

    def place(
        self, qkv: Tensor, cos: Any, sin: Any, keys: Any, values: Any, heads: int, q_norm: Any, k_norm: Any, eps: float
    ) -> Tensor:
        """Rotate the queries and the token's rotated part, and write the token's vector."""
        from hasten.language.placement import place_latent

        executor = self._executor
        pairs = executor._pairs[self._layer]
        key = (id(cos), tuple(pairs))
        tables = executor._turned.get(hash(key))
        if tables is None:
            tables = executor._turned[hash(key)] = (cos[:, pairs].copy(), sin[:, pairs].copy())
        self._layer += 1
        query = place_latent(
            qkv, self.positions, self.placement.slots, self.starts, self.tables, *tables, keys, values, heads,
            executor._key_width, executor._rope, executor._rank, executor._plain,
        )  # fmt: skip
        if len(self.copies):
            kernels_cpu.copy_slots(self.copies, keys)
            if not executor._plain:
                kernels_cpu.copy_slots(self.copies, values)
        if self.queries is not None:
            self.queries.append(query)
        return query

    def attend(
        self, query: Tensor, keys: Any, values: Any, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        executor = self._executor
        width, deep = executor._key_width, executor._rank
        even = executor._plain or width == deep
        if self._rows is None or softcap is not None or not even or not paged_kernel_takes(keys.shape[2], width):
            self.shift = executor._rope if executor._plain else 0
            return super().attend(query, keys, values, scale, window, softcap)
        # Values as wide as keys go through the kernel for whole pages; to sum the rotated part as well costs less.
        full = kernels_cpu.attend(query, self._rows, keys, keys if executor._plain else values, scale, window, softcap)
        if width == deep:
            return full
        return full.view(len(full), -1, width)[:, :, executor._rope :].reshape(len(full), -1)


# ---- folders --------------------------------------------------------------------------------------------------------


def _shape(decoder: Any) -> dict[str, Any]:
    first = decoder.model.layers[0].self_attn
    return {"rope": first.rope, "rank": first.rank, "plain_keys": first.plain_keys}


def latent_decoder(config: DecoderConfig, shape: dict[str, Any]) -> Any:
    """An empty decoder with latent layers of this shape."""
    decoder = empty_decoder(config)
    for index, layer in enumerate(decoder.model.layers):
        attention: Any = layer
        attention.self_attn = LatentAttention(
            hidden=config.hidden_size, heads=config.num_heads, width=config.head_dim, rope=shape["rope"],
            rank=shape["rank"], pairs=torch.zeros(shape["rope"] // 2, dtype=torch.long), scale=config.attention_scale,
            plain_keys=shape["plain_keys"], bias=config.attention_bias, out_bias=config.attention_out_bias,
            softcap=config.attention_softcap, window=config.window(index),
        )  # fmt: skip
        attention.self_attn.local = config.uses_local_rotary(index)
    return decoder


def save(decoder: Any, folder: str | Path, source: str | Path | None = None) -> None:
    """Write a converted decoder as a folder that ``load`` reads: config.json, model.safetensors, the tokeniser's files.

    ``source``: the folder that it came from, for tokeniser and chat template.
    """
    from hasten.files import write_text

    folder = Path(folder)
    config = write_weights(decoder, folder, None if source is None else Path(source))
    write_text(folder / "config.json", json.dumps({**config, "hasten_latent": _shape(decoder)}, indent=1))


def read(folder: Path, config: DecoderConfig) -> Any | None:
    """The latent decoder in ``folder``; None where it holds an ordinary model."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = content.get("hasten_latent")
    if shape is None:
        return None
    return fill(latent_decoder(config, shape), folder, config)
