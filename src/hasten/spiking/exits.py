"""Exit on confidence as a technique: a spiking network that answers each sample as soon as it is sure enough.

:class:`DynamicConfidence` chooses the threshold of :class:`~hasten.spiking.confidence.ConfidenceExit` on calibration
data and gives a :class:`Confident` network; nothing is trained. Without labels a sample counts as right where the
answer is the one that the network itself gives after all its steps.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hasten.compress.technique import LayerReport, TechniqueReport, register
from hasten.errors import ConfigurationError
from hasten.measure.synaptic import HOROWITZ_45NM, OperationEnergy, synaptic_cost
from hasten.spiking.confidence import ConfidenceExit, record, run_until, smoothing
from hasten.spiking.cost import spiking_cost
from hasten.spiking.network import SpikingNetwork

__all__ = ["Confident", "DynamicConfidence", "synaptic_energy"]

_ACTION = re.compile(r"exit at (\S+) of (confidence|entropy|margin), alpha (\S+)")


class Confident(nn.Module):
    """A spiking network with a policy: ``model(x)`` gives logits (batch, classes), the mean output over the steps that
    each sample ran. Samples that stopped leave the batch.

    >>> from hasten.spiking.layers import IF
    >>> net = SpikingNetwork([nn.Linear(4, 8, bias=False), IF(), nn.Linear(8, 3, bias=False)], timesteps=8)
    >>> Confident(net, ConfidenceExit(theta=2.0))(torch.rand(5, 4)).shape
    torch.Size([5, 3])
    """

    def __init__(self, network: SpikingNetwork, policy: ConfidenceExit) -> None:
        super().__init__()
        self.network = network
        self.policy = policy
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, …) where the network codes directly, else (time, batch, …)."""
        if torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.is_grad_enabled():
            return whole(self.network, self.policy, x)
        done = run_until(self.network, x, self.policy)
        return done.logits / done.timesteps.unsqueeze(-1)

    def plain(self) -> nn.Module:
        """The same answers from all steps, for programs that cannot let samples go."""
        return _Whole(self.network, self.policy)

    def mean_timesteps(self, x: Tensor) -> float:
        """Steps that the samples of x run, on average."""
        return float(run_until(self.network, x, self.policy).timesteps.float().mean())


class _Whole(nn.Module):
    """What :meth:`Confident.plain` gives."""

    def __init__(self, network: SpikingNetwork, policy: ConfidenceExit) -> None:
        super().__init__()
        self.network, self.policy = network, policy

    def forward(self, x: Tensor) -> Tensor:
        """As :meth:`Confident.forward`."""
        return whole(self.network, self.policy, x)


def whole(network: SpikingNetwork, policy: ConfidenceExit, x: Tensor) -> Tensor:
    """Run all steps, and take of each sample what it had when the policy would have stopped it."""
    totals = network.outputs(x).cumsum(0)
    sure = torch.stack([policy.score(o, t + 1) for t, o in enumerate(totals.unbind(0))]) > policy.theta
    at = torch.cat([sure[:-1], torch.ones_like(sure[:1])]).to(torch.int64).argmax(0)
    picked = totals.gather(0, at[None, :, None].expand(1, *totals.shape[1:]))[0]
    return picked / (at + 1).unsqueeze(-1)


@register
@dataclass(frozen=True)
class DynamicConfidence:
    """Stop each sample when its confidence passes a threshold chosen on calibration data.

    Calibration: inputs, or ``(inputs, labels)``; never what the result is judged on. ``theta`` needs none.
    """

    tolerance: float = 0.0
    """accuracy that may be lost on the calibration data (0.01 is a point)"""
    theta: float | None = None
    """the threshold, where it is known"""
    alpha: float | None = None
    """divides the logits before the softmax; None: mean confidence equals accuracy, or nine tenths without labels"""
    rule: Literal["confidence", "entropy", "margin"] = "confidence"
    """how sure is measured"""
    caution: float = 1.0
    """standard errors of the loss that must fit into the tolerance too"""

    name: ClassVar[str] = "dynamic-confidence"

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise ConfigurationError(f"tolerance {self.tolerance} is not a share from 0 to 1; 0.01 is one point")
        ConfidenceExit(1.0, self.alpha if self.alpha is not None else 1.0, self.rule)

    def __call__(self, model: nn.Module, calibration: Sequence[Any] | None = None) -> nn.Module:
        """A :class:`Confident` copy, with a ``report``."""
        network = self._network(model)
        if self.theta is not None:
            given = ConfidenceExit(self.theta, self.alpha if self.alpha is not None else 1.0, self.rule)
            return self._made(model, network, given, "given")
        if not calibration:
            raise ConfigurationError("dynamic confidence chooses its threshold on data: give inputs, or a theta")
        x, y = _samples(calibration, 0 if network.direct else 1)
        alpha, source = self.alpha, "labels"
        if y is None:
            totals, _ = record(network, x, network.timesteps)
            y, source = totals[-1].argmax(-1), "the network's own answers after all steps"
            alpha = smoothing(totals[-1], 0.9) if alpha is None else alpha
        frontier = ConfidenceExit.calibrate(network, (x, y), tolerance=self.tolerance, alpha=alpha, rule=self.rule)
        return self._made(
            model, network, frontier.best(caution=self.caution), f"chosen on {len(y)} samples by {source}"
        )

    def apply(self, model: nn.Module, step: Mapping[str, str], calibration: Sequence[Any] | None = None) -> nn.Module:
        """Repeat the choice that a plan holds."""
        found = next((m for m in (_ACTION.fullmatch(a) for a in step.values()) if m), None)
        if found is None:
            return self(model, calibration)
        policy = ConfidenceExit(float(found[1]), float(found[3]), found[2])  # type: ignore[arg-type]
        return self._made(model, self._network(model), policy, "from the plan")

    def _network(self, model: nn.Module) -> SpikingNetwork:
        if not isinstance(model, SpikingNetwork):
            raise ConfigurationError(f"a {type(model).__name__} has no timesteps to stop at; give a SpikingNetwork")
        network = copy.deepcopy(model)
        if hasattr(network, "report"):
            del network.report
        return network.eval()

    def _made(self, model: nn.Module, network: SpikingNetwork, policy: ConfidenceExit, source: str) -> nn.Module:
        new: Any = Confident(network, policy)
        action = f"exit at {policy.theta!r} of {policy.rule}, alpha {policy.alpha!r}"
        reason = f"threshold {source}"
        layers = tuple(LayerReport(f"network.{name}", action, reason) for name, _ in network.neurons())
        note = (
            f"each sample stops at the first of {network.timesteps} steps with {policy.rule} above {policy.theta:.4g}"
        )
        new.report = TechniqueReport(self.name, layers, (note,), {"theta": policy.theta, "alpha": policy.alpha})
        return new.train(model.training)  # type: ignore[no-any-return]


def _samples(calibration: Sequence[Any], dim: int) -> tuple[Tensor, Tensor | None]:
    """All inputs, and their labels where every example has them."""
    pairs = [(c[0], c[1]) if isinstance(c, (tuple, list)) and len(c) == 2 else (c, None) for c in calibration]
    inputs = [x[0] if isinstance(x, (tuple, list)) else x for x, _ in pairs]
    if not all(isinstance(x, Tensor) for x in inputs):
        raise ConfigurationError("calibration of an exit takes tensors of inputs, or (inputs, labels)")
    labels = [y for _, y in pairs if isinstance(y, Tensor)]
    return torch.cat(inputs, dim), torch.cat(labels) if len(labels) == len(pairs) else None


def synaptic_energy(model: nn.Module, x: Tensor, table: OperationEnergy = HOROWITZ_45NM) -> float:
    """Joules per sample of x by counted operations and a named table; samples that stop early count their own steps."""
    if isinstance(model, SpikingNetwork):
        return spiking_cost(model, x).energy(table)
    if not isinstance(model, Confident):
        return synaptic_cost(model, x).energy(table)
    network, steps = model.network, run_until(model.network, x, model.policy).timesteps
    joules = 0.0
    for count in steps.unique().tolist():
        chosen = (steps == count).nonzero().flatten()
        part = x[chosen] if network.direct else x[:count, chosen]
        joules += len(chosen) * spiking_cost(network.with_timesteps(count), part).energy(table)
    return joules / len(steps)
