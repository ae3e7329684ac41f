"""How hard Maestro presses components to zero, and below what they go: tried, and chosen on data held out.

The publication gives neither per model. Each pair is one training; its family at the shares that are wanted is judged
by the loss on batches that nothing was trained or cut on, and the pair with the least mean is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hasten.compress.lowrank.maestro import Maestro, MaestroFit
from hasten.errors import ConfigurationError

__all__ = ["Trial", "search_maestro"]


@dataclass(frozen=True)
class Trial:
    """One training of the search."""

    group_lasso: float
    """its weight"""
    shrink: float
    """below this share of a layer's importance components went"""
    losses: tuple[float, ...]
    """on the batches held out, of each size of the family"""

    @property
    def mean(self) -> float:
        """Of the losses."""
        return sum(self.losses) / len(self.losses)


def search_maestro(
    technique: Maestro,
    model: nn.Module,
    train: Sequence[Any],
    held: Sequence[Any],
    shares: Sequence[float],
    *,
    group_lassos: Sequence[float] = (1e-6, 1e-5, 1e-4, 1e-3),
    shrinks: Sequence[float] = (1e-3, 1e-2),
    calibrate: int = 8,
    loss: Callable[[Any, Any], Tensor] | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> tuple[Maestro, tuple[Trial, ...]]:
    """``technique`` with the pair that does best, and all trials, best first.

    ``train`` and ``held``: batches (inputs, labels). Families are cut on the first ``calibrate`` batches of ``train``.

    >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> batch = (torch.randn(64, 16), torch.randint(0, 4, (64,)))
    >>> one = Maestro(epochs=1, ignore_last=False)
    >>> best, trials = search_maestro(one, model, [batch], [batch], (0.5,), group_lassos=(1e-6, 1e-4), shrinks=(1e-2,))
    >>> best.group_lasso == trials[0].group_lasso, len(trials)
    (True, 2)
    """
    if not held or not shares or not group_lassos or not shrinks:
        raise ConfigurationError("a search needs batches held out, shares, and at least one pair to try; give them")
    judge = loss or functional.cross_entropy
    pairs = [(g, s) for g in group_lassos for s in shrinks]
    trials = []
    for index, (lasso, shrink) in enumerate(pairs):
        tried = replace(technique, group_lasso=lasso, shrink=shrink, share=None)
        small = tried(model, train, loss=loss)
        fit: MaestroFit = small.fit  # type: ignore[assignment]
        losses = []
        for member in fit.family(shares, train[:calibrate]):
            member.model.eval()
            with torch.no_grad():
                losses.append(float(sum(float(judge(member.model(x), y)) for x, y in held) / len(held)))
        trials.append(Trial(lasso, shrink, tuple(losses)))
        if progress is not None:
            progress(f"group lasso {lasso:g}, shrink {shrink:g}", (index + 1) / len(pairs))
    trials.sort(key=lambda t: t.mean)
    return replace(technique, group_lasso=trials[0].group_lasso, shrink=trials[0].shrink), tuple(trials)
