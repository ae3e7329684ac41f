"""Sensitivity of layers with what they do to each other: a Hessian term per layer plus measured pairs.

    s_i(b) = max(m_i(b), ε) + Σ_j w_ij Ω_ij(b),   Ω_ij = L({i, j}) − L({i}) − L({j}) + L(∅)

with L(S) the loss when the units S are in b bits and m_i = L({i}) − L(∅), or h_i = ½ (tr H_i / n_i) ‖ΔW_i(b)‖². On a
quadratic loss Ω_ij is ΔW_iᵀ H_ij ΔW_j exactly. With w_ij = ½ over all pairs, Σ s_i estimates the loss added by
quantising everything; negative pairs (errors that cancel) stay.

"Augmenting Hessians with Inter-Layer Dependencies for Mixed-Precision Post-Training Quantization", Schaefer et al.
2023, arXiv:2306.04879. Differs from the paper, whose formula we could not read, in how pairs are measured and weighted.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from hasten.compress.quantize.base import Format
from hasten.compress.quantize.granularity import PerChannel
from hasten.compress.quantize.hessian import Hessian, Loss, Trace, block_traces
from hasten.compress.quantize.integer import Int
from hasten.compress.quantize.portions import rows_of
from hasten.compress.quantize.sensitivity import require_exact
from hasten.compress.quantize.simulate import Simulated, layers_of, units_of
from hasten.errors import ConfigurationError

__all__ = ["AugmentedHessian", "UnitScores"]

Pairs = Literal["all", "adjacent", "sampled", "none"]
Own = Literal["trace", "quadratic", "measured"]


@dataclass(frozen=True)
class UnitScores:
    """Scores of units (layers that change together) at each width, and the parts that they are made of."""

    units: tuple[tuple[str, ...], ...]
    """paths of the layers of each unit, in the order in which they run"""
    bits: tuple[int, ...]
    """widths, high to low"""
    own: Mapping[int, tuple[float, ...]]
    """width -> each unit's own term, before ε"""
    pairs: Mapping[int, Mapping[tuple[int, int], float]]
    """width -> (i, j) -> Ω_ij, i < j; only the pairs that were measured"""
    scores: Mapping[int, tuple[float, ...]]
    """width -> each unit's s"""
    single: Mapping[int, tuple[float, ...]]
    """width -> L({i}) − L(∅), where pairs or ``own='measured'`` needed it; empty otherwise"""
    hessian: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    """width -> each unit's Hessian term h, of its weights alone; empty with ``probes=0``"""
    traces: Mapping[str, Trace] = field(default_factory=dict)
    """layer -> its trace with standard error; empty where none was needed"""
    loss: float = math.nan
    """L(∅) on the calibration data"""
    evaluations: int = 0
    """passes over the calibration data"""
    simulated: Simulated | None = field(default=None, repr=False, compare=False)
    """the model whose layers switch width, for a search that goes on from here"""

    def order(self, bits: int, kind: str = "augmented", seed: int = 0) -> tuple[int, ...]:
        """Units, least sensitive first: by ``augmented``, ``hessian`` (h alone), ``reversed`` or ``random``."""
        count = len(self.units)
        if kind == "random":
            generator = torch.Generator().manual_seed(seed)
            return tuple(torch.randperm(count, generator=generator).tolist())
        if kind not in ("augmented", "hessian", "reversed"):
            raise ConfigurationError(f"no order {kind!r} is known; give augmented, hessian, reversed or random")
        if kind == "hessian" and bits not in self.hessian:
            raise ConfigurationError("no Hessian terms were measured; give probes above 0")
        values = self.hessian[bits] if kind == "hessian" else self.scores[bits]
        found = sorted(range(count), key=lambda i: (values[i], i))
        return tuple(reversed(found) if kind == "reversed" else found)

    def predict(
        self, widths: Sequence[int], *, augmented: bool = True, base: Literal["own", "hessian"] = "own"
    ) -> float:
        """Loss added by a configuration (a width per unit, 0 for float), from terms per unit and measured pairs.

        ``augmented=False`` leaves the pairs out; ``base`` says which terms per unit count. A pair of different widths
        is interpolated by the geometric mean of its two values where their signs agree, else by their mean.
        """
        terms = self.own if base == "own" else self.hessian
        chosen = [i for i, w in enumerate(widths) if w]
        total = sum(terms[widths[i]][i] for i in chosen)
        if not augmented:
            return total
        for i, j in itertools.combinations(chosen, 2):
            a = self.pairs[widths[i]].get((i, j), 0.0)
            b = self.pairs[widths[j]].get((i, j), 0.0)
            total += math.copysign(math.sqrt(a * b), a) if a * b > 0 else (a + b) / 2
        return total

    def layer_scores(self, bits: int) -> dict[str, float]:
        """Layer -> its unit's score, shared out evenly among the unit's layers."""
        return {p: s / len(u) for u, s in zip(self.units, self.scores[bits], strict=True) for p in u}


@dataclass(frozen=True)
class AugmentedHessian:
    """Measure :class:`UnitScores` of a trained model; the model is not changed.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> loss = lambda m, x: m(x).square().mean()
    >>> found = AugmentedHessian(probes=4, pairs="all", bits=(4,))(model, loss, [torch.randn(16, 4)])
    >>> found.units, len(found.pairs[4]), found.evaluations
    ((('0',), ('2',)), 1, 4)
    """

    probes: int = 64
    """Hutchinson probes; one set serves all layers; 0: no Hessian terms"""
    pairs: Pairs = "adjacent"
    """which pairs are measured: within a block and between consecutive blocks, all, ``sampled`` partners, none"""
    sampled: int = 4
    """random partners of each unit, where ``pairs='sampled'``"""
    bits: tuple[int, ...] = (8, 4)
    """widths of weights and inputs, high to low; above them is the float model"""
    own: Own = "measured"
    """own term of a unit: its measured loss, which its inputs enter too; or the Hessian term of its weights, from the
    trace or exactly quadratic in the change (one product)"""
    weight: Format = Int(8, PerChannel(0))
    """template of the weights' format"""
    activation: Format | None = Int(8, symmetric=False)
    """template of the inputs' format; None: inputs stay as they are"""
    skip: tuple[str, ...] = ()
    """patterns of layers that stay float (first and last, say)"""
    together: tuple[tuple[str, ...], ...] = ()
    """layers that must have the same width; those that read one tensor are found without"""
    epsilon: float = 1e-12
    """least own term"""
    seed: int = 0
    """draws probes and partners"""

    def __post_init__(self) -> None:
        if self.pairs not in ("all", "adjacent", "sampled", "none"):
            raise ConfigurationError(f"pairs {self.pairs!r} is not known; give all, adjacent, sampled or none")
        if self.own not in ("trace", "quadratic", "measured"):
            raise ConfigurationError(f"own {self.own!r} is not known; give trace, quadratic or measured")
        if self.probes == 1 or self.probes < 0 or self.sampled < 1:
            raise ConfigurationError(
                f"probes ({self.probes}) must be 2 or more, or 0 for none, sampled ({self.sampled}) 1 or more"
            )
        if self.probes == 0 and self.own == "trace":
            raise ConfigurationError("own='trace' needs probes; give 64")
        if not self.bits or list(self.bits) != sorted(set(self.bits), reverse=True):
            raise ConfigurationError(f"bits {self.bits} must be different widths from high to low, such as (8, 4)")

    def __call__(
        self,
        model: nn.Module,
        loss: Loss,
        calibration: Sequence[Any],
        *,
        progress: Callable[[str, float], None] | None = None,
    ) -> UnitScores:
        """``loss(model, batch)`` is the mean over a batch of the calibration data."""
        told = progress or (lambda stage, share: None)
        units = units_of(model, loss, calibration[0], self.skip, self.together)
        simulated = Simulated(
            model, loss, calibration, bits=self.bits, weight=self.weight, activation=self.activation, skip=self.skip
        )
        meter = _Meter(simulated, loss, calibration, units)
        wanted = self._partners(units)
        steps = 1 + len(self.bits) * (len(wanted) + len(units))
        empty = meter({})
        single: dict[int, tuple[float, ...]] = {}
        omega: dict[int, dict[tuple[int, int], float]] = {b: {} for b in self.bits}
        if wanted or self.own == "measured":
            for b in self.bits:
                single[b] = tuple(meter({i: b}) - empty for i in range(len(units)))
                for i, j in wanted:
                    omega[b][i, j] = meter({i: b, j: b}) - empty - single[b][i] - single[b][j]
                    told(f"pairs at {b} bits", 0.5 * meter.evaluations / steps)
        traces, hessian = self._hessian(model, loss, calibration, units, simulated, told)
        own = single if self.own == "measured" else hessian
        partners = {i: sum(i in pair for pair in wanted) for i in range(len(units))}
        scores = {}
        for b in self.bits:
            values = [max(h, self.epsilon) for h in own[b]]
            for (i, j), v in omega[b].items():
                values[i] += 0.5 * v * self._weight(partners[i], len(units))
                values[j] += 0.5 * v * self._weight(partners[j], len(units))
            scores[b] = tuple(values)
        told("sensitivity", 1.0)
        return UnitScores(
            tuple(units), self.bits, own, omega, scores, single, hessian, traces, empty, meter.evaluations, simulated
        )

    def _weight(self, partners: int, units: int) -> float:
        """Random partners stand for all: their sum is scaled up. Pairs that are near are all that is meant."""
        return (units - 1) / partners if self.pairs == "sampled" and partners else 1.0

    def _partners(self, units: Sequence[tuple[str, ...]]) -> list[tuple[int, int]]:
        count = len(units)
        everyone = list(itertools.combinations(range(count), 2))
        if self.pairs == "none":
            return []
        if self.pairs == "all":
            return everyone
        if self.pairs == "sampled":
            generator = torch.Generator().manual_seed(self.seed)
            chosen = set()
            for i in range(count):
                others = [j for j in range(count) if j != i]
                for k in torch.randperm(len(others), generator=generator)[: self.sampled].tolist():
                    chosen.add((min(i, others[k]), max(i, others[k])))
            return sorted(chosen)
        blocks = [_block(unit[0]) for unit in units]
        place = {b: k for k, b in enumerate(dict.fromkeys(blocks))}
        return [(i, j) for i, j in everyone if abs(place[blocks[i]] - place[blocks[j]]) <= 1]

    def _hessian(
        self, model: nn.Module, loss: Loss, calibration: Sequence[Any], units: Sequence[tuple[str, ...]],
        simulated: Simulated, told: Callable[[str, float], None],
    ) -> tuple[dict[str, Trace], dict[int, tuple[float, ...]]]:  # fmt: skip
        if not self.probes and self.own != "quadratic":
            return {}, {}
        model = copy.deepcopy(model).requires_grad_(True)
        layers = layers_of(model, self.skip)
        hessian = Hessian(model, loss, calibration, {p: [layer.weight] for p, layer in layers.items()})  # type: ignore[list-item]
        require_exact(hessian, next(iter(layers)))
        traces: dict[str, Trace] = {}
        per_layer: dict[int, dict[str, float]] = {b: {} for b in self.bits}
        if self.own != "quadratic":
            traces = block_traces(
                hessian, probes=self.probes, seed=self.seed, progress=lambda s, x: told(s, 0.5 + 0.5 * x)
            )
        for path in layers:
            for b in self.bits:
                change = simulated.change(path, b)
                if self.own != "quadratic":
                    size = float(change.double().square().sum())
                    per_layer[b][path] = 0.5 * traces[path].value / change.numel() * size
                else:
                    flat = change.reshape(-1)
                    per_layer[b][path] = 0.5 * float(flat.double() @ hessian.product(path, flat).double())
        return traces, {b: tuple(sum(per_layer[b][p] for p in unit) for unit in units) for b in self.bits}


class _Meter:
    """L(S) over the calibration data, counted."""

    def __init__(
        self, simulated: Simulated, loss: Loss, calibration: Sequence[Any], units: Sequence[tuple[str, ...]]
    ) -> None:
        self.simulated, self.loss, self.calibration, self.units = simulated, loss, calibration, units
        rows = [max(rows_of(b), 1) for b in calibration]
        self.shares = [r / sum(rows) for r in rows]
        self.evaluations = 0

    def __call__(self, widths: Mapping[int, int]) -> float:
        model = self.simulated.use({path: b for unit, b in widths.items() for path in self.units[unit]})
        self.evaluations += 1
        with torch.no_grad():
            return sum(s * float(self.loss(model, b)) for s, b in zip(self.shares, self.calibration, strict=True))


def _block(path: str) -> str:
    """Path up to its first number: ``encoder.layer.0`` of ``encoder.layer.0.attention.self.query``."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", path)
    return found.group(0) if found else path.rpartition(".")[0] or path
