"""A fitting loop for any model and any loss: AdamW, a warm-up and a cosine, clipped gradients, resumable.

The rate after a share ``s`` of the run is ``rate · min(s / warm_up, 1) · (1 + cos(π s)) / 2``. A checkpoint holds the
model, the optimiser, the step and the random state, and is replaced in one move, so that a kill leaves the old one;
a run that goes on from it ends with the same weights as one that was never stopped.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hasten.errors import ConfigurationError, DataError

__all__ = ["fit"]

Batches = Callable[[int], Iterable[Any]] | Iterable[Any]


def fit(
    model: nn.Module,
    batches: Batches,
    loss: Callable[[nn.Module, Any], Tensor],
    epochs: int = 1,
    rate: float = 1e-3,
    *,
    weight_decay: float = 0.0,
    warm_up: float = 0.05,
    clip: float = 1.0,
    seed: int = 0,
    parameters: Iterable[Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1,
    progress: Callable[[str, float], None] | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train ``model`` in place; the mean loss of each epoch.

    ``batches`` gives the batches of an epoch: a sequence, or a function of the epoch's number. ``loss(model, batch)``
    is a scalar. ``parameters`` narrows what moves (tensors, or AdamW's groups). With ``checkpoint`` the run is saved
    every ``checkpoint_every`` epochs and goes on from there if the file exists. The model is left in training mode.
    Raises :class:`~hasten.errors.DataError` when the loss is not a number.

    >>> model = nn.Linear(1, 1)
    >>> x = torch.linspace(-1, 1, 64)[:, None]
    >>> losses = fit(model, [(x, 3 * x)], lambda m, b: (m(b[0]) - b[1]).square().mean(), epochs=200, rate=0.1)
    >>> losses[-1] < 1e-3
    True
    """
    if epochs < 1 or rate <= 0:
        raise ConfigurationError(f"{epochs} epochs at rate {rate} train nothing; give at least one and a rate above 0")
    if not callable(batches) and not hasattr(batches, "__len__"):
        batches = list(batches)
    torch.manual_seed(seed)
    moved = list(parameters) if parameters is not None else [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(moved, lr=rate, weight_decay=weight_decay)
    peaks = [group["lr"] for group in optimiser.param_groups]
    tensors = [p for group in optimiser.param_groups for p in group["params"]]
    losses: list[float] = []
    path = Path(checkpoint) if checkpoint is not None else None
    if path is not None and path.exists():
        losses = _restore(path, model, optimiser)
    model.train()
    for epoch in range(len(losses), epochs):
        given = batches(epoch) if callable(batches) else batches
        listed: Sequence[Any] = given if isinstance(given, Sequence) else list(given)
        total = torch.zeros(())
        for index, batch in enumerate(listed):
            share = (epoch + index / len(listed)) / epochs
            factor = min(share / warm_up, 1.0) if warm_up > 0 else 1.0
            factor = max(factor, 1e-2) * (1 + math.cos(math.pi * share)) / 2
            for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            value = loss(model, batch)
            if not bool(torch.isfinite(value)):
                raise DataError(
                    f"the loss is {float(value.detach())} in epoch {epoch}; lower the rate ({rate:g}) or look at the "
                    "data"
                )
            optimiser.zero_grad(set_to_none=True)
            value.backward()
            if clip > 0:
                torch.nn.utils.clip_grad_norm_(tensors, clip)
            optimiser.step()
            total += value.detach().float()
        if not len(listed):
            raise DataError(f"epoch {epoch} holds no batch; give at least one")
        losses.append(float(total) / len(listed))
        if on_epoch is not None:
            on_epoch(epoch, losses[-1])
        if progress is not None:
            progress("fit", (epoch + 1) / epochs)
        if path is not None and ((epoch + 1) % checkpoint_every == 0 or epoch + 1 == epochs):
            _save(path, model, optimiser, losses)
    return losses


def _save(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, losses: list[float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    torch.save(
        {
            "model": model.state_dict(),
            "optimiser": optimiser.state_dict(),
            "losses": losses,
            "random": torch.get_rng_state(),
        },
        part,
    )
    os.replace(part, path)


def _restore(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> list[float]:
    try:
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        torch.set_rng_state(saved["random"])
        return [float(v) for v in saved["losses"]]
    except (KeyError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise DataError(f"checkpoint {str(path)!r} does not belong to this model; remove it to start anew") from error
