"""Bits for every block of weights: least predicted loss within a budget of bytes or seconds.

    minimise Σ_i Ω_i ‖ΔW_i(b_i)‖²   subject to   Σ_i cost_i(b_i) ≤ budget

Solved exactly as a multiple-choice knapsack; Q-BERT's two-level sort is the case of equal blocks and two widths
(``rule="sort"`` runs it as published). With scores that were measured per width (``UnitScores``) these take the place
of Ω ‖ΔW‖². Bytes include scales; seconds come from a callable, such as a measured table of kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from hasten.budget import format_quantity, parse_quantity
from hasten.compress.quantize.augmented import UnitScores
from hasten.compress.quantize.base import Format
from hasten.compress.quantize.integer import Int
from hasten.compress.quantize.knapsack import allocate, two_levels
from hasten.compress.quantize.selection import RowGroups, head_groups
from hasten.compress.quantize.sensitivity import Spectrum
from hasten.compress.quantize.simulate import with_bits
from hasten.errors import ConfigurationError

__all__ = ["BitPlan", "Latency", "MixedPrecision"]

Latency = Callable[[str, int], float]
"""``latency(layer, bits)`` in seconds for one call of the layer; 16 stands for the float model"""


@dataclass(frozen=True)
class BitPlan:
    """Weight path -> its format, with what that costs and is predicted to do; ``print`` shows it as a table.

    >>> plan = BitPlan((("0.weight", Int(4)),), bytes=12.0, bytes_before=64.0, loss=0.01)
    >>> plan.layers, plan.bits("0")
    ({'0': Int(bits=4, granularity=PerTensor(), symmetric=True, observer=MinMax(), dynamic=False, full_range=False)}, 4)
    """

    formats: tuple[tuple[str, Format | None], ...]
    """(path of the weight, its format or None where it stays as it is)"""
    bytes: float
    """of these weights on disk, scales included"""
    bytes_before: float
    """of the same weights in the model given"""
    loss: float
    """predicted increase, in the unit of the sensitivity"""
    latency: float | None = None
    """predicted seconds, where a latency was handed in"""

    @property
    def layers(self) -> dict[str, Format]:
        """Module path -> format, for those that change."""
        return {p.rpartition(".")[0]: f for p, f in self.formats if f is not None}

    def bits(self, layer: str) -> int:
        """Width of a layer's (first) weight; 16 where it stays as it is."""
        for path, form in self.formats:
            if path == layer or path.startswith(f"{layer}."):
                return form.bits if form is not None else 16
        raise ConfigurationError(f"the plan holds no layer {layer!r}")

    def __str__(self) -> str:
        width = max(len(p) for p, _ in self.formats)
        rows = [f"{p:{width}}  {f.label if f is not None else 'kept'}" for p, f in self.formats]
        total = f"{format_quantity(self.bytes, 'bytes')} of {format_quantity(self.bytes_before, 'bytes')}"
        return "\n".join([*rows, f"{total}, predicted loss {self.loss:.4g} more"])


@dataclass(frozen=True)
class _Table:
    """Options of the blocks, width by width."""

    blocks: list[dict[str, Tensor]]
    formats: list[dict[int, dict[str, Format | None]]]
    bytes: list[list[float]]
    losses: list[list[float]]
    costs: list[list[float]]
    omegas: list[float]


@dataclass(frozen=True)
class MixedPrecision:
    """How bits are given out.

    >>> import torch
    >>> from hasten.compress.quantize.sensitivity import HessianSpectrum
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    >>> sens = HessianSpectrum(portions=1, fraction=1.0)(model, lambda m, x: m(x).square().mean(), [torch.eye(8)])
    >>> plan = MixedPrecision(bits=(2, 4), budget=60.0).solve(model, sens)
    >>> plan.bytes <= 60, sorted({f.bits for _, f in plan.formats})
    (True, [2, 4])
    """

    bits: tuple[int, ...] = (2, 4)
    """widths that a block may have; 16 among them: it may stay as it is"""
    weight: Format = Int(4, full_range=True)
    """template whose bits are replaced"""
    groups: int | None = None
    """scales of a matrix of the hidden width, cut at heads (Q-BERT); None: the template's own granularity"""
    heads: int | None = None
    """attention heads; None: as the model's config says"""
    budget: str | float = "10MiB"
    """bytes of all these weights (``10MiB`` or a number), or seconds of all these layers (``5ms``)"""
    rule: Literal["exact", "sort"] = "exact"
    """the knapsack, or Q-BERT's sort of two widths"""

    def __post_init__(self) -> None:
        if not self.bits or len(set(self.bits)) != len(self.bits) or min(self.bits) < 1:
            raise ConfigurationError(f"bits {self.bits} must be different widths of at least 1, such as (2, 4)")
        if self.rule not in ("exact", "sort"):
            raise ConfigurationError(f"rule {self.rule!r} is not known; give exact or sort")
        if self.rule == "sort" and len(self.bits) != 2:
            raise ConfigurationError(f"the sort gives out two widths, got {self.bits}; use rule='exact'")
        self.limit()

    def limit(self) -> tuple[float, str]:
        """The budget as a number, and ``bytes`` or ``time``."""
        if not isinstance(self.budget, str):
            value, kind = float(self.budget), "bytes"
        else:
            kind = "time" if self.budget.rstrip().endswith("s") else "bytes"
            value = parse_quantity(self.budget, kind)
        if not value > 0:
            raise ConfigurationError(
                f"a budget of {self.budget} is nothing; give a positive number of bytes or seconds"
            )
        return value, kind

    def solve(
        self,
        model: nn.Module,
        sensitivity: Spectrum | UnitScores,
        *,
        latency: Latency | None = None,
        order: Mapping[str, float] | None = None,
    ) -> BitPlan:
        """The plan. ``order`` replaces Ω of the blocks (for a comparison with other orders).

        Raises :class:`~hasten.errors.ConfigurationError` with the least reachable size where the budget is below it.
        """
        value, kind = self.limit()
        if kind == "time" and latency is None:
            raise ConfigurationError(f"a budget of {self.budget} needs latency=…, seconds of a layer at a width")
        table = self._table(model, sensitivity, latency, order)
        costs = table.costs if kind == "time" else table.bytes
        least = sum(min(row) for row in costs)
        if least > value * (1 + 1e-12):
            raise ConfigurationError(
                f"a budget of {format_quantity(value, kind)} is below the least reachable "
                f"{format_quantity(least, kind)} with {min(self.bits)} bits; raise it or allow fewer bits"
            )
        if self.rule == "sort":
            low, high = sorted(range(2), key=lambda k: self.bits[k])
            picked = two_levels(table.omegas, [(row[low], row[high]) for row in costs], value)
            chosen = tuple((low, high)[p] for p in picked)
        else:
            chosen = allocate(table.losses, costs, value)
        formats = [
            item for options, k in zip(table.formats, chosen, strict=True) for item in options[self.bits[k]].items()
        ]
        before = sum(p.numel() * p.element_size() for block in table.blocks for p in block.values())
        return BitPlan(
            tuple(formats), _picked(table.bytes, chosen), before, _picked(table.losses, chosen),
            _picked(table.costs, chosen) if latency else None,
        )  # fmt: skip

    def _format(self, path: str, bits: int, groups: Mapping[str, RowGroups]) -> Format | None:
        if bits == 16:
            return None
        form = with_bits(self.weight, bits)
        found = groups.get(path.rpartition(".")[0])
        return replace(form, granularity=found) if found is not None else form  # type: ignore[type-var]

    def _table(
        self, model: nn.Module, sensitivity: Spectrum | UnitScores, latency: Latency | None,
        order: Mapping[str, float] | None,
    ) -> _Table:  # fmt: skip
        parameters = dict(model.named_parameters())
        groups = head_groups(model, self.groups, self.heads) if self.groups is not None else {}
        names: list[tuple[str, tuple[str, ...]]]
        if isinstance(sensitivity, Spectrum):
            names = [(row.layer, row.parameters) for row in sensitivity.layers]
        else:
            names = [("+".join(unit), tuple(f"{layer}.weight" for layer in unit)) for unit in sensitivity.units]
        table = _Table([], [], [], [], [], [])
        for index, (name, paths) in enumerate(names):
            missing = [p for p in paths if p not in parameters]
            if missing:
                raise ConfigurationError(f"the model has no parameter {missing[0]!r}; measure its own sensitivity")
            block = {p: parameters[p].detach() for p in paths}
            options = {b: {p: self._format(p, b, groups) for p in paths} for b in self.bits}
            omega = _omega(sensitivity, index) if order is None else order[name]
            table.blocks.append(block)
            table.formats.append(options)
            table.omegas.append(omega)
            table.bytes.append([sum(_bytes(block[p], f) for p, f in options[b].items()) for b in self.bits])
            table.costs.append(
                [sum(latency(p.rpartition(".")[0], b) for p in paths) if latency else 0.0 for b in self.bits]
            )
            measured = isinstance(sensitivity, UnitScores) and order is None
            table.losses.append(
                [_score(sensitivity, index, b) for b in self.bits]
                if measured
                else [omega * sum(_change(block[p], f) for p, f in options[b].items()) for b in self.bits]
            )
        return table


def _picked(rows: list[list[float]], chosen: tuple[int, ...]) -> float:
    return sum(row[k] for row, k in zip(rows, chosen, strict=True))


def _omega(sensitivity: Spectrum | UnitScores, index: int) -> float:
    if isinstance(sensitivity, Spectrum):
        return sensitivity.layers[index].omega
    return sensitivity.scores[min(sensitivity.bits)][index]


def _score(sensitivity: Any, index: int, bits: int) -> float:
    if bits == 16:
        return 0.0
    if bits not in sensitivity.scores:
        raise ConfigurationError(
            f"no scores at {bits} bits were measured; measure at {sensitivity.bits} or add it there"
        )
    return float(sensitivity.scores[bits][index])


def _bytes(weight: Tensor, form: Format | None) -> float:
    if form is None:
        return float(weight.numel() * min(weight.element_size(), 2))  # a float weight counts 16 bits
    return form.stored_bits(tuple(weight.shape)) / 8


def _change(weight: Tensor, form: Format | None) -> float:
    return 0.0 if form is None else float((form.fake(weight) - weight).double().square().sum())
