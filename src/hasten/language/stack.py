"""The table of a dense decoder's layers, for :mod:`kernels_stack`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten.language import kernels_decode, kernels_decode_keys, kernels_tiles
from hasten.language.config import DecoderConfig
from hasten.language.kernels_cpu import PARALLEL_WORK, Step, cut_rows
from hasten.language.kernels_paged import PAGE, paged_kernel_takes
from hasten.language.kernels_tiles_plan import FAR, plan, split

__all__ = ["Stack"]

_NO_QUERIES = np.empty((0, 0, 0, 0), np.uint16)
_NO_ITEMS = np.empty((0, 6), np.int64)
_NO_STATES = np.empty((0, 0, 0), np.float32)
_NONE = np.zeros(0, np.int64)
_PIECE = 32
"""Rows of a chunk from which it is a piece of a prompt, whose bits need not be those of rows that come one by one."""


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
        self.deterministic = False
        """whether a row must have the same bits however long its chunk is"""
        self._attend = self._merge = 0  # addresses of compiled code, where this processor has tiles
        if kernels_tiles.takes(PAGE, config.head_dim):
            self._attend, self._merge = (kernels_tiles.code_of(name).address for name in ("attend", "merge"))
        self._singles: dict[bool, int] = {}
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

    def _single(self, coded: bool) -> int:
        """Address of the kernel of one token per row over such a cache, compiled when it is first wanted; 0: the one
        that is called page by page."""
        if coded not in self._singles:
            width, group = self._config.head_dim, self._config.num_heads // self._config.num_kv_heads
            code = None
            if not coded and self._attend and width % 64 == 0 and kernels_decode.lanes_of(group):
                code = kernels_decode.code_for(kernels_decode.lanes_of(group))
            elif kernels_decode_keys.takes(PAGE, width, group, coded):
                code = kernels_decode_keys.code_for(group, coded)
            self._singles[coded] = 0 if code is None else code.address
        return self._singles[coded]

    def step(self, residual: Tensor, step: Step, cache: Any, wanted: Tensor) -> Tensor:
        """residual (rows, hidden) float32, overwritten; wanted (n,) rows -> logits (n, vocabulary) float32."""
        from hasten.language.kernels_stack import run_stack, threads

        config = self._config
        logits = torch.empty((wanted.shape[0], config.vocab_size), dtype=torch.float32)
        heads, kv_heads = config.num_heads, config.num_kv_heads
        kept = _NO_QUERIES
        if step.queries is not None:
            kept = np.empty((config.num_layers, len(step.positions), heads, config.head_dim), np.uint16)
        work = step.work * heads * config.head_dim * 2
        tables = np.ascontiguousarray(step.tables)
        coded = cache.precision == "int8"
        code = np.array([0, 0, self._single(coded)], np.int64)
        items, merges, states, cuts = _NO_ITEMS, _NO_ITEMS, _NO_STATES, _NONE
        near, shares = step.places, _NONE
        rows = len(step.places) * kv_heads
        longest = int(np.diff(step.starts).max(initial=0)) if len(step.places) > len(step.starts) else 1
        pieces = 1 << 30 if self.deterministic else _PIECE
        fits = self._attend and kernels_tiles.takes(PAGE, config.head_dim, coded)
        if fits and (longest > pieces or int(near.max(initial=0)) >= FAR):
            code[:2] = self._attend, self._merge
            begins, near = split(step.starts, step.places, pieces)
            parts = 1 if work < PARALLEL_WORK else threads()
            items, merges, cuts, count, most = plan(
                step.starts, begins, step.places, kv_heads, heads // kv_heads, parts
            )
            cuts = cuts if len(items) > 1 else np.array([0, len(items)], np.int64)
            states = np.empty((count, most * 16, config.head_dim + 2), np.float32)
            if (near >= 0).any():
                few = work < PARALLEL_WORK or rows < 2
                shares = np.array([0, rows], np.int64) if few else cut_rows(near, kv_heads, threads())
        elif work < PARALLEL_WORK or rows < 2:
            shares = np.array([0, rows], np.int64)
        else:
            shares = step.parts(kv_heads)
        rest = self._rest
        run_stack(
            residual.numpy(), self._matrices, self._norms, self._head, rest["last_norm"].ctypes.data, rest["windows"],
            rest["local"], *rest["tables"], *cache.arrays, step.chunk_of, step.positions, step.places, near, tables,
            step.copies, kept, shares, cuts, code, items, merges, states, wanted.numpy(),
            heads, config.qk_norm, float(config.attention_scale), float(config.norm_eps), config.activation != "silu",
            self._widest, threads(), logits.numpy(),
        )  # fmt: skip
        if step.queries is not None:
            step.queries.extend(torch.from_numpy(kept).view(torch.bfloat16))
        return logits
