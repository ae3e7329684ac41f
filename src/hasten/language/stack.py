"""The table of a dense decoder's layers, for :mod:`kernels_stack`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten.language.config import DecoderConfig
from hasten.language.kernels_cpu import PARALLEL_WORK, Step
from hasten.language.kernels_paged import paged_kernel_takes

__all__ = ["Stack"]


class Stack:
    """Runs a step of a dense decoder in one call.

    Made by :meth:`of`, which returns None for what the call does not cover: mixtures of experts, norms after the
    blocks, capped scores, float32, and processors without the instructions.
    """

    def __init__(
        self, config: DecoderConfig, matrices: Any, norms: Any, head: Any, keep: list[Any], **rest: Any
    ) -> None:
        self._config = config
        self._matrices, self._norms, self._head = matrices, norms, head
        self._keep = keep
        self._rest = rest
        self._widest = -(-max(int(matrices[..., 2].max()), int(head[2])) // 32) * 32

    @classmethod
    def of(cls, config: DecoderConfig, layers: list[Any], head: Any, last_norm: Any, tables: Any) -> Stack | None:
        """``layers``: those of the executor; ``head``: its output matrix; ``tables``: cos, sin, local cos and sin."""
        from hasten.nn.product.dispatch import describe

        if config.attention_softcap is not None or config.logit_softcap is not None or config.sandwich_norms:
            return None
        linears = []
        for layer in layers:
            block = layer.feed_forward
            if not hasattr(block, "gate_up"):
                return None
            linears.append([layer.qkv, layer.out, block.gate_up, block.down])
        if any(one.packed is None for row in [*linears, [head]] for one in row):
            return None
        shapes = [[(one.out_features, one.in_features) for one in row] for row in linears]
        if any(row != shapes[0] for row in shapes):
            return None
        matrices = np.stack([np.stack([describe(*one.packed) for one in row]) for row in linears])
        norms, ones = np.zeros((len(layers), 4), np.int64), np.ones(config.head_dim, np.float32)
        for index, layer in enumerate(layers):
            found = (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm)
            norms[index] = [(ones if norm is None else norm).ctypes.data for norm in found]
        return cls(
            config,
            matrices,
            norms,
            describe(*head.packed),
            [linears, layers, head, ones],
            last_norm=last_norm,
            windows=np.array([layer.window or 0 for layer in layers], np.int64),
            local=np.array([layer.local for layer in layers], np.bool_),
            tables=tables,
        )

    def takes(self, cache: Any) -> bool:
        """Whether pages of this cache suit the attention kernel."""
        return paged_kernel_takes(cache.block_size, self._config.head_dim)

    def step(self, residual: Tensor, step: Step, cache: Any, wanted: Tensor) -> Tensor:
        """residual (rows, hidden) float32, overwritten; wanted (n,) rows -> logits (n, vocabulary) float32."""
        from hasten.language.kernels_stack import run_stack, threads

        config = self._config
        logits = torch.empty((wanted.shape[0], config.vocab_size), dtype=torch.float32)
        heads, kv_heads = config.num_heads, config.num_kv_heads
        items = len(step.positions) * kv_heads
        alone = step.work * heads * config.head_dim * 2 < PARALLEL_WORK or items < 2
        cuts = np.array([0, items], np.int64) if alone else step.parts(kv_heads)
        rest = self._rest
        run_stack(
            residual.numpy(), self._matrices, self._norms, self._head, rest["last_norm"].ctypes.data, rest["windows"],
            rest["local"], *rest["tables"], cache.keys.view(torch.uint16).numpy(),
            cache.values.view(torch.uint16).numpy(), step.chunk_of, step.positions, step.tables, cuts, wanted.numpy(),
            heads, config.qk_norm, float(config.attention_scale), float(config.norm_eps), config.activation != "silu",
            self._widest, threads(), logits.numpy(),
        )  # fmt: skip
        return logits
