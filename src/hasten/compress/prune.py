"""Magnitude pruning: the smallest weights of every matrix become zero, gradually, while the rest is trained on.

    s(t) = s_end (1 − (1 − t)³),   t the share of the pruning phase that is done

"To prune, or not to prune", Zhu and Gupta 2017, arXiv:1710.01878. Differs from the paper in nothing but the length of
the run; with ``epochs=0`` all weights go in one shot.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hasten.compress.finetune import Loss, batches_of, match_outputs, weights_of
from hasten.compress.technique import LayerReport, TechniqueReport, register
from hasten.errors import ConfigurationError
from hasten.train.fit import fit

__all__ = ["MagnitudePruning", "cubic_sparsity", "magnitude_mask", "sparsity_of"]


def cubic_sparsity(share: float, end: float) -> float:
    """Sparsity after a share of the pruning phase.

    >>> [round(cubic_sparsity(t, 0.5), 3) for t in (0.0, 0.5, 1.0)]
    [0.0, 0.438, 0.5]
    """
    return end * (1 - (1 - min(max(share, 0.0), 1.0)) ** 3)


def magnitude_mask(weight: Tensor, sparsity: float) -> Tensor:
    """1 where a weight stays: exactly ``round(sparsity · n)`` of the smallest magnitudes go, ties by place.

    >>> magnitude_mask(torch.tensor([3.0, -1.0, 2.0, 0.5]), 0.5)
    tensor([1., 0., 1., 0.])
    """
    gone = round(sparsity * weight.numel())
    order = weight.detach().abs().reshape(-1).sort(stable=True).indices
    mask = torch.ones(weight.numel(), dtype=weight.dtype)
    mask[order[:gone]] = 0
    return mask.view_as(weight)


def sparsity_of(weight: Tensor) -> float:
    """Share of zeros."""
    return float((weight == 0).double().mean()) if weight.numel() else 0.0


class Masked(nn.Module):
    """A weight of which some entries are zero."""

    mask: Tensor

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(like))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with its zeros."""
        return weight * self.mask


def prune_in_place(
    model: nn.Module,
    paths: list[str],
    sparsity: float,
    *,
    given: Any,
    loss: Loss | None,
    epochs: int,
    rate: float,
    every: int,
    phase: float,
    seed: int,
    progress: Callable[[str, float], None] | None,
) -> dict[str, Tensor]:
    """Prune the named weights of ``model``; masks by path. Masks are set anew every ``every`` steps of the phase."""
    masked: dict[str, Masked] = {}
    for path in paths:
        owner, _, leaf = path.rpartition(".")
        module = model.get_submodule(owner)
        masked[path] = Masked(getattr(module, leaf).detach())
        parametrize.register_parametrization(module, leaf, masked[path])

    def update(wanted: float) -> None:
        for path, part in masked.items():
            owner, _, leaf = path.rpartition(".")
            original = getattr(model.get_submodule(owner).parametrizations, leaf).original
            part.mask.copy_(magnitude_mask(original * part.mask, wanted))

    if epochs:
        assert loss is not None
        batches, count = batches_of(given, "pruning with fine-tuning")
        steps, ends = 0, max(1, int(phase * epochs * count))

        def pruning(one: nn.Module, batch: Any) -> Tensor:
            nonlocal steps
            if steps <= ends and (steps % every == 0 or steps == ends):
                update(cubic_sparsity(steps / ends, sparsity))
            steps += 1
            return loss(one, batch)

        fit(model, batches, pruning, epochs=epochs, rate=rate, seed=seed, progress=progress)
    update(sparsity)
    masks = {path: part.mask.clone() for path, part in masked.items()}
    for path in paths:
        owner, _, leaf = path.rpartition(".")
        parametrize.remove_parametrizations(model.get_submodule(owner), leaf)
    return masks


@register
@dataclass(frozen=True)
class MagnitudePruning:
    """Zeros in every weight of two axes or more.

    >>> model = MagnitudePruning(0.75)(nn.Linear(8, 8))
    >>> sparsity_of(model.weight)
    0.75
    """

    sparsity: float = 0.5
    """share of zeros in each weight, below 1"""
    epochs: int = 0
    """of fine-tuning meanwhile; 0: one shot"""
    rate: float = 1e-3
    """peak learning rate of it"""
    every: int = 20
    """steps between new masks"""
    phase: float = 0.6
    """share of the run in which sparsity rises; masks are fixed afterwards"""
    layers: tuple[str, ...] = ("*",)
    """patterns of parameter paths that are pruned"""
    skip: tuple[str, ...] = ()
    """patterns that are not"""
    seed: int = 0
    """of the fine-tuning"""

    name: ClassVar[str] = "magnitude-pruning"

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ConfigurationError(f"a sparsity of {self.sparsity} leaves nothing or is none; give 0 up to below 1")
        if self.epochs < 0 or self.every < 1 or not 0 < self.phase <= 1 or self.rate <= 0:
            raise ConfigurationError(
                f"epochs ({self.epochs}) ≥ 0, every ({self.every}) ≥ 1, phase ({self.phase}) in 0 … 1 and rate "
                f"({self.rate}) > 0 are needed"
            )

    def __call__(
        self,
        model: nn.Module,
        calibration: Any = None,
        *,
        loss: Loss | None = None,
        progress: Callable[[str, float], None] | None = None,
    ) -> nn.Module:
        """The pruned copy; without a ``loss`` fine-tuning matches the outputs of the model given."""
        clone = copy.deepcopy(model)
        modes = [(m, m.training) for m in clone.modules()]
        weights = weights_of(clone, self.layers, self.skip)
        before = {p: sparsity_of(w) for p, w in weights.items()}
        equal = {p for p, w in weights.items() if w.numel() > 1 and bool((w.abs() == w.abs().flatten()[0]).all())}
        prune_in_place(
            clone, list(weights), self.sparsity, given=calibration, loss=loss or match_outputs(model),
            epochs=self.epochs, rate=self.rate, every=self.every, phase=self.phase, seed=self.seed, progress=progress,
        )  # fmt: skip
        for module, training in modes:
            module.training = training
        reports = []
        for path, weight in weights_of(clone, self.layers, self.skip).items():
            size = weight.numel() * weight.element_size()
            kept = int((weight != 0).sum())
            small = kept * (weight.element_size() + 1)  # each value with one byte of distance
            action = f"{sparsity_of(weight):.0%} zeros"
            chance = "; all its weights are equal: which are zero is chance" if path in equal else ""
            reason = f"{before[path]:.0%} before{chance}"
            reports.append(LayerReport(path, action, reason, size, min(small, size)))
        notes = [f"{len(reports)} weights pruned to {self.sparsity:.0%} zeros; they save bytes in a packed file only"]
        clone.report = TechniqueReport(self.name, tuple(reports), tuple(notes))  # type: ignore[assignment]
        return clone
