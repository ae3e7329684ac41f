"""Calibration inputs for a model whose data are not there, from what its batch normalisations remember.

Noise is changed until every normalisation sees inputs of the mean and deviation that it kept from training:

    minimise over x   Σ_layers mean over channels of ((m(x) − μ) / σ)² + (s(x) / σ − 1)²

"ZeroQ: A Novel Zero Shot Quantization Framework", Cai et al. 2020, arXiv:2001.00281, step 7 of "A Survey of
Quantization Methods for Efficient Neural Network Inference". Differs from the paper in that differences are counted in
units of the channel's own deviation, so that no layer outweighs the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hasten.errors import ConfigurationError

__all__ = ["statistics_gap", "zero_shot_inputs"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def zero_shot_inputs(
    model: nn.Module,
    shape: Sequence[int],
    *,
    steps: int = 200,
    rate: float = 0.2,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> Tensor:
    """Inputs of ``shape`` (batch, …) that fit the statistics of ``model``'s batch normalisations; it is not changed.

    Give the model as it was trained: folded normalisations remember nothing. Raises
    :class:`~hasten.errors.ConfigurationError` where no normalisation holds statistics.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    >>> x = zero_shot_inputs(model, (8, 1, 8, 8), steps=50)
    >>> statistics_gap(model, x).item() < 0.1 * statistics_gap(model, torch.zeros(8, 1, 8, 8)).item()
    True
    """
    if steps < 1 or not rate > 0:
        raise ConfigurationError(f"{steps} steps at rate {rate} change nothing; give 200 and 0.2")
    if len(shape) < 2 or min(shape) < 1 or shape[0] < 2:
        raise ConfigurationError(f"shape {tuple(shape)} is none of a batch; give (samples, …) with two samples or more")
    used = copy.deepcopy(model).eval().requires_grad_(False)
    place = next((p for p in used.parameters()), torch.zeros(()))
    noise = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
    x = noise.to(place.device, place.dtype).requires_grad_()
    optimiser = torch.optim.Adam([x], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    best, found = float("inf"), x.detach().clone()
    with torch.enable_grad():
        for step in range(steps):
            gap = statistics_gap(used, x)
            if gap.item() < best:
                best, found = gap.item(), x.detach().clone()
            optimiser.zero_grad()
            gap.backward()
            optimiser.step()
            schedule.step()
            if progress is not None:
                progress("fitting inputs to statistics", (step + 1) / steps)
    return found


def statistics_gap(model: nn.Module, x: Tensor) -> Tensor:
    """How far the inputs of the normalisations are from their statistics, a scalar that can be differentiated; 0: the
    mean and the deviation of every channel agree. ``model`` is run in eval mode."""
    gaps: list[Tensor] = []

    def watch(norm: nn.Module, given: Any) -> None:
        values = given[0].transpose(0, 1).flatten(1)  # (channels, the rest)
        mean, variance = norm.running_mean, norm.running_var
        assert isinstance(mean, Tensor)
        assert isinstance(variance, Tensor)
        deviation = (variance + norm.eps).sqrt()  # type: ignore[operator]
        own = (values.var(1, unbiased=False) + norm.eps).sqrt()
        gaps.append((((values.mean(1) - mean) / deviation).square() + (own / deviation - 1).square()).mean())

    norms = [m for m in model.modules() if isinstance(m, _NORMS) and m.running_mean is not None]
    if not norms:
        raise ConfigurationError(
            "no batch normalisation of the model holds statistics, from which inputs could be made; give calibration "
            "inputs, or the model before its normalisations were folded"
        )
    hooks = [norm.register_forward_pre_hook(watch) for norm in norms]
    training = [(m, m.training) for m in model.modules()]
    try:
        model.eval()  # the normalisations are not to learn from what is made up
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training:
            module.training = mode
    if not gaps:
        raise ConfigurationError("no batch normalisation ran; give the model whose forward uses them")
    return torch.stack(gaps).sum()
