"""The loop that fits spiking networks: batches, a loss, one schedule, bounds kept, resumable.

The spiking room has few needs: any model, any number of parameter groups, a hook per epoch (delays anneal their kernel
there) and a checkpoint after each epoch. The learning rate falls to zero along a cosine after a short warm-up.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hasten.errors import ConfigurationError
from hasten.spiking.layers import constrain

__all__ = ["Fitting", "Loss", "accuracy", "cross_entropy", "fit"]

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Of a model on a batch of inputs and labels."""


@dataclass(frozen=True)
class Fitting:
    """Knobs of one run."""

    epochs: int = 10
    """passes over the data"""
    rate: float = 1e-3
    """peak learning rate of Adam"""
    weight_decay: float = 0.0
    batch: int = 64
    """samples per step"""
    warm_up: float = 0.05
    """share of the run in which the rate rises"""
    clip: float = 5.0
    """largest norm of the gradient"""
    bf16: bool = False
    """products and convolutions in bfloat16; weights stay float32"""
    seed: int = 0
    """draws the order of the samples"""

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch < 1 or not self.rate > 0:
            raise ConfigurationError(f"{self.epochs} epochs of batches of {self.batch} at rate {self.rate} is no run")

    def factor(self, progress: float) -> float:
        """Share of the peak rate at ``progress`` (0 to 1)."""
        if progress < self.warm_up:
            return (progress + 1e-3) / (self.warm_up + 1e-3)
        return 0.5 * (1 + math.cos(math.pi * (progress - self.warm_up) / (1 - self.warm_up)))


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Of the model's logits."""
    return functional.cross_entropy(model(x).float(), y)


def fit(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    fitting: Fitting,
    *,
    loss: Loss = cross_entropy,
    groups: Sequence[dict[str, Any]] | None = None,
    dim: int = 0,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    on_epoch: Callable[[int], None] | None = None,
    progress: Callable[[float], None] | None = None,
    checkpoint: Path | None = None,
) -> list[float]:
    """Train ``model`` in place; returns the mean loss of each epoch.

    Samples lie along ``dim`` of ``inputs`` (1 for time-first data) and along 0 of ``labels``. ``groups`` are parameter
    groups of Adam with their own ``lr``; all follow the schedule. ``on_epoch(n)`` is called before epoch n. With
    ``checkpoint`` the run is saved there after each epoch and goes on from it. A loss that is not finite is an error.
    """
    generator = torch.Generator().manual_seed(fitting.seed)
    torch.manual_seed(fitting.seed)  # dropout
    optimiser = torch.optim.Adam(
        list(groups) if groups is not None else [p for p in model.parameters() if p.requires_grad],
        lr=fitting.rate,
        weight_decay=fitting.weight_decay,
    )
    peaks = [group["lr"] for group in optimiser.param_groups]
    losses: list[float] = []
    if checkpoint is not None and checkpoint.exists():
        losses = _resume(checkpoint, model, optimiser, generator)
    count = len(labels)
    batches = math.ceil(count / fitting.batch)
    model.train()
    for epoch in range(len(losses), fitting.epochs):
        if on_epoch is not None:
            on_epoch(epoch)
        total = 0.0
        for index, chosen in enumerate(torch.randperm(count, generator=generator).split(fitting.batch)):
            done = (epoch + index / batches) / fitting.epochs
            for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                group["lr"] = peak * fitting.factor(done)
            x, y = inputs.index_select(dim, chosen), labels[chosen]
            if augment is not None:
                x = augment(x, generator)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fitting.bf16):
                value = loss(model, x, y)
            optimiser.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), fitting.clip)
            optimiser.step()
            constrain(model)
            total += value.item() * len(chosen)
            if not math.isfinite(total):
                raise ConfigurationError(f"the loss is {value.item()} in epoch {epoch}; lower the learning rate")
            if progress is not None:
                progress(done)
        losses.append(total / count)
        if checkpoint is not None:
            _save(checkpoint, model, optimiser, generator, losses)
    model.eval()
    return losses


def _save(path: Path, model: nn.Module, optimiser: Any, generator: torch.Generator, losses: list[float]) -> None:
    content = {
        "model": model.state_dict(), "optimiser": optimiser.state_dict(), "losses": losses,
        "random": generator.get_state(), "global": torch.get_rng_state(),
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.part")
    torch.save(content, temporary)
    os.replace(temporary, path)


def _resume(path: Path, model: nn.Module, optimiser: Any, generator: torch.Generator) -> list[float]:
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimiser.load_state_dict(saved["optimiser"])
    generator.set_state(saved["random"])
    torch.set_rng_state(saved["global"])
    return list(saved["losses"])


@torch.inference_mode()
def accuracy(
    model: Callable[[Tensor], Tensor], inputs: Tensor, labels: Tensor, *, batch: int = 256, dim: int = 0
) -> float:
    """Share of the samples whose largest logit is the label; the model is in eval mode if it has one."""
    if isinstance(model, nn.Module):
        model.eval()
    right = 0
    parts: Iterable[tuple[Tensor, Tensor]] = zip(inputs.split(batch, dim), labels.split(batch), strict=True)
    for x, y in parts:
        right += int((model(x).argmax(-1) == y).sum())
    return right / len(labels)
