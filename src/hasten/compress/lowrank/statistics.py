"""One pass of a decoder over calibration: what its pairs of matrices need to know, block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hasten.compress.lowrank.blocks import Block, rotary_of
from hasten.compress.lowrank.moments import Moments, observe
from hasten.nn.rotary import rotate

__all__ = ["BlockStatistics", "gather"]

_MEMORY = 2 << 30
"""Bytes of moments that are held at a time; more blocks take another pass."""


@dataclass
class BlockStatistics:
    """Second moments of one block."""

    input: Moments | None = None
    """of what queries, keys and values are made of, (hidden, hidden)"""
    hidden: Moments | None = None
    """of the hidden units of the feed-forward"""
    query: Tensor | None = None
    """(heads, width, width) of queries as they are scored: after norm and rotation"""
    keys: Tensor | None = None
    """(kv_heads, width, width)"""
    query_square: Tensor | None = None
    """(width,) before the rotation, summed over heads"""
    key_square: Tensor | None = None
    pairs: int = 0
    """rotary pairs of a head; 0 where nothing turns"""
    cosine: float = 0.0
    """sum over tokens of the cosine between the block's input and output"""
    tokens: int = 0
    order: Tensor | None = None
    """hidden units in the order of their greedy selection, as far as it was needed"""

    @property
    def influence(self) -> float:
        """``1 - E[cos(input, output)]``."""
        return 1.0 - self.cosine / max(self.tokens, 1)


@dataclass
class _Watch:
    """Hooks of one block."""

    block: Block
    kinds: tuple[str, ...]
    stats: BlockStatistics
    turn: tuple[Tensor, Tensor] | None = None
    inputs: dict[str, Callable[..., None]] = field(default_factory=dict)
    outputs: dict[str, Callable[..., None]] = field(default_factory=dict)

    def install(self, attention: Any, hidden_units: int) -> None:
        block, stats = self.block, self.stats
        self.outputs[block.name] = self.through
        if not self.kinds:
            return
        if "mlp" in self.kinds and block.feed_forward is not None:
            stats.hidden = Moments(hidden_units)
            self.inputs[block.down_path] = lambda given, named: stats.hidden.add(given[0])  # type: ignore[union-attr]
        if "vo" in self.kinds:
            stats.input = Moments(attention.v_proj.in_features)
            self.inputs[f"{block.attention}.v_proj"] = lambda given, named: stats.input.add(given[0])  # type: ignore[union-attr]
        if "qk" in self.kinds:
            self.inputs[block.attention] = self.note_rotation
            normed = isinstance(getattr(attention, "q_norm", None), nn.Module)
            for side, heads in (("query", block.heads), ("keys", block.kv_heads)):
                leaf = side[0] + ("_norm" if normed else "_proj")
                setattr(stats, side, torch.zeros(heads, block.width, block.width, dtype=torch.float64))
                self.outputs[f"{block.attention}.{leaf}"] = self.scored(side, heads)

    def through(self, given: tuple[Any, ...], made: Any) -> None:
        after = made[0] if isinstance(made, tuple) else made
        before = given[0]
        if isinstance(before, Tensor):
            cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
            self.stats.cosine += float(cosine.double().sum())
            self.stats.tokens += cosine.numel()

    def note_rotation(self, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.turn = rotary_of(given, named, self.block.native)
        self.stats.pairs = 0 if self.turn is None else self.turn[0].shape[-1]

    def scored(self, side: str, heads: int) -> Callable[..., None]:
        width, stats = self.block.width, self.stats

        def hear(given: tuple[Any, ...], made: Tensor) -> None:
            # (batch, time, heads * width) from a projection, (batch, time | heads, …, width) from a norm
            rows = made.reshape(made.shape[0], -1, heads, width) if made.shape[-1] != width or made.dim() == 3 else made
            if rows.shape[2] != heads:
                rows = rows.transpose(1, 2)
            rows = rows.double().transpose(1, 2)  # (batch, heads, time, width)
            square = rows.square().sum((0, 1, 2))
            name = "query_square" if side == "query" else "key_square"
            old = getattr(stats, name)
            setattr(stats, name, square if old is None else old + square)
            if self.turn is not None:
                cos, sin = (t.double() for t in self.turn)
                if cos.dim() == 3:  # (batch, time, pairs)
                    cos, sin = cos[:, None], sin[:, None]
                rows = rotate(rows, cos, sin)
            setattr(stats, side, getattr(stats, side) + torch.einsum("bhti,bhtj->hij", rows, rows))

        return hear


def _bytes(model: nn.Module, block: Block, kinds: tuple[str, ...]) -> int:
    units = model.get_submodule(block.down_path).in_features if block.feed_forward is not None else 0
    hidden: Any = model.get_submodule(f"{block.attention}.v_proj").in_features
    numbers: Any = units**2 * ("mlp" in kinds) + hidden**2 * ("vo" in kinds)  # type: ignore[operator]
    return int(8 * (numbers + block.heads * block.width**2 * 2))


def gather(
    model: nn.Module,
    blocks: Sequence[Block],
    calibration: Sequence[Any],
    kinds: tuple[str, ...],
    *,
    until: str | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> list[BlockStatistics]:
    """Statistics of these blocks for the kinds of pair mlp, qk and vo.

    One pass over the calibration, more only where the moments of all blocks would not fit into two gibibytes.
    """
    groups: list[list[Block]] = [[]]
    held = 0
    for block in blocks:
        size = _bytes(model, block, kinds)
        if groups[-1] and held + size > _MEMORY:
            groups.append([])
            held = 0
        groups[-1].append(block)
        held += size
    found: dict[str, BlockStatistics] = {}
    for number, group in enumerate(groups):
        watches = []
        inputs: dict[str, Callable[..., None]] = {}
        outputs: dict[str, Callable[..., None]] = {}
        for block in group:
            watch = _Watch(block, kinds, BlockStatistics())
            units: Any = model.get_submodule(block.down_path).in_features if block.feed_forward is not None else 0
            watch.install(model.get_submodule(block.attention), units)
            inputs |= watch.inputs
            outputs |= watch.outputs
            watches.append(watch)

        def tell(stage: str, share: float, number: int = number) -> None:
            if progress is not None:
                progress(stage, (number + share) / len(groups))

        observe(model, calibration, inputs, outputs, until=until, progress=tell)
        found |= {w.block.name: w.stats for w in watches}
    return [found[b.name] for b in blocks]
