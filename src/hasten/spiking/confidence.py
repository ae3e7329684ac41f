"""Exit on confidence: each input stops on its own as soon as the network is sure enough.

"Unleashing the Potential of Spiking Neural Networks by Dynamic Confidence", Li, Jones, Furber, ICCV 2023,
arXiv:2303.10276.
The output layer accumulates ``o[t] = o[t-1] + W s[t]``; the confidence is ``c[t] = max softmax(o[t] / alpha)``; a
sample stops at the first t with ``c[t] > theta``. No parameter is added and nothing is retrained.
Differs from the paper in: alpha follows from calibration (mean confidence equals accuracy at the last step) unless it
is given, and theta is chosen on data held back from training and test.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from hasten.adapt import threshold as thresholds
from hasten.errors import ConfigurationError
from hasten.spiking.network import SpikingNetwork, stateless

__all__ = ["ConfidenceExit", "ConfidenceFrontier", "Decision", "Exit", "Observation", "Run", "record", "run_until"]

_FEW = 200


class Decision(Enum):
    """What to do with one sample."""

    STOP = "stop"
    GO_ON = "go on"


@dataclass(frozen=True)
class Observation:
    """What a policy sees of one sample."""

    logits: tuple[float, ...]
    """accumulated output o[t], one number per class"""
    timestep: int
    """t, from 1"""
    last: int
    """T: it must stop there"""


class Exit(ABC):
    """A rule that scores accumulated logits (…, classes) at a timestep; larger is surer."""

    theta: float

    @abstractmethod
    def score(self, logits: Tensor, timestep: int) -> Tensor:
        """(…,)"""

    def scores(self, logits: Tensor, first: int) -> Tensor:
        """Of some timesteps in a row, the first of them ``first``: (steps, …, classes) -> (steps, …)."""
        return torch.stack([self.score(o, first + t) for t, o in enumerate(logits)])

    def decide(self, observation: Observation) -> Decision:
        """Pure: no clock, no memory. Raises ``ValueError`` for logits that are not numbers."""
        logits = torch.tensor(observation.logits, dtype=torch.float32)
        _numbers(logits, observation.timestep)
        if observation.timestep >= observation.last:
            return Decision.STOP
        sure = float(self.score(logits, observation.timestep)) > self.theta
        return Decision.STOP if sure else Decision.GO_ON


def _given(inputs: Tensor) -> None:
    """A potential that is not a number never fires, so an input that is none would go unnoticed."""
    if not (bool(inputs.sum().isfinite()) or bool(torch.isfinite(inputs).all())):  # the sum is the quick look
        raise ConfigurationError("an input is not a finite number; clean the samples before they are run")


def _numbers(logits: Tensor, timestep: int) -> None:
    if torch.isnan(logits).any():
        raise ConfigurationError(f"a logit at timestep {timestep} is not a number; look at the weights or the input")
    if logits.shape[-1] < 2:
        raise ConfigurationError("one class leaves nothing to be unsure about; give logits of at least two classes")


@dataclass(frozen=True)
class ConfidenceExit(Exit):
    """Stop when the score of the accumulated logits exceeds ``theta``.

    >>> policy = ConfidenceExit(theta=0.6, alpha=1.0)
    >>> policy.decide(Observation((3.0, 0.0, 0.0), timestep=1, last=8)), policy.decide(Observation((0.1, 0.0), 1, 8))
    (<Decision.STOP: 'stop'>, <Decision.GO_ON: 'go on'>)
    """

    theta: float = 0.6
    """the confidence above which it stops; 1 or more never stops early"""
    alpha: float = 1.0
    """divides the logits before the softmax"""
    rule: Literal["confidence", "entropy", "margin"] = "confidence"
    """largest probability, 1 - normalised entropy, or the gap of the two largest probabilities"""

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ConfigurationError(f"alpha {self.alpha} must be positive; it divides the logits")
        if self.rule not in ("confidence", "entropy", "margin"):
            raise ConfigurationError(f"rule {self.rule!r} is not known; give confidence, entropy or margin")

    def score(self, logits: Tensor, timestep: int) -> Tensor:
        """(…, classes) -> (…,), between 0 and 1."""
        p = (logits / self.alpha).softmax(-1)
        if self.rule == "entropy":
            classes = torch.tensor(float(logits.shape[-1]))
            return 1 + (p * p.clamp_min(1e-12).log()).sum(-1) / classes.log()
        if self.rule == "margin":
            two = p.topk(2, -1).values
            return two[..., 0] - two[..., 1]
        return p.amax(-1)

    def scores(self, logits: Tensor, first: int) -> Tensor:
        """See :meth:`Exit.scores`; the timestep does not matter to this one."""
        return self.score(logits, first)

    @staticmethod
    def calibrate(
        network: SpikingNetwork,
        calibration: tuple[Tensor, Tensor],
        max_timesteps: int | None = None,
        *,
        tolerance: float = 0.0,
        alpha: float | None = None,
        rule: Literal["confidence", "entropy", "margin"] = "confidence",
        batch: int = 256,
    ) -> ConfidenceFrontier:
        """Run the network to the end on held-back (inputs, labels) and try all thresholds."""
        inputs, labels = calibration
        if len(labels) < _FEW:
            low, high = thresholds.interval(0.9, max(1, len(labels)))
            warnings.warn(
                f"{len(labels)} calibration samples leave an accuracy of 90 % between {low:.1%} and "
                f"{high:.1%}; give more",
                stacklevel=2,
            )
        logits, spikes = record(network, inputs, max_timesteps or network.timesteps, batch=batch)
        correct = (logits.argmax(-1) == labels).numpy()
        right = float(correct[-1].mean())
        chosen = smoothing(logits[-1], right) if alpha is None else alpha
        policy = ConfidenceExit(1.0, chosen, rule)
        score = torch.stack([policy.score(o, t + 1) for t, o in enumerate(logits)]).numpy()
        return ConfidenceFrontier(
            thresholds.calibrate(score, correct), policy, tolerance, score, correct, spikes.numpy()
        )

    @staticmethod
    def oracle(
        network: SpikingNetwork, calibration: tuple[Tensor, Tensor], max_timesteps: int | None = None
    ) -> thresholds.Operating:
        """A bound, not a method: every sample stops at its first right step, which needs the labels."""
        logits, _ = record(network, calibration[0], max_timesteps or network.timesteps)
        return _oracle((logits.argmax(-1) == calibration[1]).numpy())


def _oracle(correct: Any) -> thresholds.Operating:
    at = thresholds.best_stage(correct)
    return thresholds.Operating(float("nan"), float(at.mean() + 1), float(correct.any(0).mean()))


def smoothing(logits: Tensor, wanted: float) -> float:
    """The alpha for which the mean confidence is ``wanted``, by bisection on a logarithmic scale; logits (samples,
    classes)."""
    low, high = 1e-3, 1e4
    for _ in range(60):
        middle = (low * high) ** 0.5
        confident = float((logits / middle).softmax(-1).amax(-1).mean())
        low, high = (middle, high) if confident > wanted else (low, middle)
    return (low * high) ** 0.5


@dataclass(frozen=True)
class ConfidenceFrontier:
    """What calibration recorded."""

    points: thresholds.ThresholdFrontier
    """thresholds with mean timesteps and accuracy"""
    policy: ConfidenceExit
    """rule and alpha; its theta never stops"""
    tolerance: float
    """accuracy that may be lost"""
    score: Any
    """(timesteps, samples)"""
    correct: Any
    """(timesteps, samples)"""
    spikes: Any
    """(timesteps, samples): hidden spikes sent up to and including each step"""

    def best(self, tolerance: float | None = None, caution: float = 0.0) -> ConfidenceExit:
        """The policy that saves most within the tolerance.

        With ``caution`` what it loses, plus so many standard errors of that loss, must stay within the tolerance: the
        threshold is chosen among many on few samples, and the luckiest of them loses more on others.
        """
        allowed = self.tolerance if tolerance is None else tolerance
        found = self.points.best(allowed)
        if caution:
            kept = [p for p in self.points.points if self._loss(p.threshold, caution) <= allowed]
            found = min(kept, key=lambda p: p.mean_stages, default=self.points.full)
        return replace(self.policy, theta=found.threshold)

    def _loss(self, theta: float, errors: float) -> float:
        """Accuracy that stopping costs, sample by sample against all steps, plus some of its standard errors."""
        at = thresholds.stops(self.score, theta)
        lost = self.correct[-1].astype(np.float64) - self.correct[at, np.arange(len(at))]
        return float(lost.mean() + errors * lost.std() / len(lost) ** 0.5)

    def oracle(self) -> thresholds.Operating:
        """The bound on this data."""
        return _oracle(self.correct)

    def spikes_at(self, theta: float) -> float:
        """Mean spikes per sample at a threshold."""
        at = thresholds.stops(self.score, theta)
        return float(self.spikes[at, np.arange(len(at))].mean())

    def table(self) -> str:
        """theta, mean timesteps, accuracy, spikes."""
        rows = [f"{'theta':>8}  {'timesteps':>9}  {'accuracy':>8}  {'spikes':>10}"]
        rows += [
            f"{p.threshold:8.3f}  {p.mean_stages:9.3f}  {p.accuracy:8.4f}  {self.spikes_at(p.threshold):10.1f}"
            for p in self.points.frontier()
        ]
        return "\n".join(rows)


@torch.inference_mode()
def record(network: SpikingNetwork, inputs: Tensor, timesteps: int, *, batch: int = 256) -> tuple[Tensor, Tensor]:
    """Run to the end: accumulated logits (timesteps, samples, classes) and hidden spikes so far (timesteps,
    samples)."""
    network.eval()
    _given(inputs)
    logits, spikes = [], []
    counted: list[Tensor] = []
    hooks = []

    def listen(neuron: nn.Module) -> Any:
        original: Any = neuron.scan

        def scan(x: Tensor, state: Any = None) -> Any:
            result = original(x, state)
            counted.append(result[0].flatten(2).sum(2))
            return result

        neuron.scan = scan  # type: ignore[assignment, method-assign]
        return lambda: delattr(neuron, "scan")

    try:
        hooks = [listen(neuron) for _, neuron in network.neurons()]
        for part in inputs.split(batch, 0 if network.direct else 1):
            counted.clear()
            logits.append(network.outputs(part, timesteps).cumsum(0))
            spikes.append(torch.stack(counted).sum(0).cumsum(0))
    finally:
        for undo in hooks:
            undo()
    result = torch.cat(logits, 1)
    for t, o in enumerate(result):
        _numbers(o, t + 1)
    return result, torch.cat(spikes, 1)


@dataclass(frozen=True)
class Run:
    """What :func:`run_until` did."""

    logits: Tensor
    """(batch, classes), accumulated until each sample stopped"""
    timesteps: Tensor
    """(batch,), steps that each sample ran"""
    spikes: Tensor
    """(batch,), hidden spikes that each sample caused"""


@torch.inference_mode()
def run_until(
    network: SpikingNetwork, inputs: Tensor, policy: Exit, max_timesteps: int | None = None, stride: int = 0
) -> Run:
    """Run a batch a few steps at a time; samples that stopped leave it, and the state of the others moves together.

    inputs (batch, …) where the network codes directly, else (time, batch, …). ``stride`` steps run together before
    samples may leave (0: a quarter of all, then as many as have run: :func:`pieces`); what a sample answers, and when
    it stopped, is that of its own step.
    A policy that never stops gives the logits of the whole run. Raises ``ValueError`` for inputs or logits that are
    not numbers and for a network in training mode.
    """
    if network.training:
        raise ConfigurationError("samples that leave a batch would change its batch norm; call network.eval() first")
    _given(inputs)
    steps = max_timesteps or network.timesteps
    size = inputs.shape[0 if network.direct else 1]
    prefix = network.constant_prefix() if network.direct else 0
    shown = inputs
    for layer in list(network.layers)[:prefix]:
        shown = stateless(layer, shown)
    alive = torch.arange(size)
    state = network.init_state()
    total: Tensor | None = None
    result: Tensor | None = None
    stopped, spikes = torch.zeros(size, dtype=torch.int64), torch.zeros(size)
    for begin, count in pieces(steps, stride):
        x = shown.unsqueeze(0) if network.direct else inputs[begin : begin + count, alive]
        out, state, sent = network.steps_from(prefix, x, state, count)
        totals = [out[0] if total is None else total + out[0]]
        for now in out[1:]:
            totals.append(totals[-1] + now)
        reached = torch.stack(totals)
        if bool(reached.isnan().any()) or reached.shape[-1] < 2:
            for t, o in enumerate(totals):
                _numbers(o, begin + t + 1)
        done = policy.scores(reached, begin + 1) > policy.theta
        if begin + count == steps:
            done[-1] = True
        any_done = done.any(0)
        at = torch.where(any_done, done.to(torch.int64).argmax(0), count - 1)
        spikes[alive] += sent.cumsum(0).gather(0, at[None])[0]
        total = totals[-1]
        if result is None:
            result = torch.empty(size, total.shape[-1], dtype=total.dtype)
        if bool(any_done.any()):
            leaving = any_done.nonzero().flatten()
            result[alive[leaving]] = reached[at[leaving], leaving]
            stopped[alive[leaving]] = begin + 1 + at[leaving]
            keep = (~any_done).nonzero().flatten()
            alive, total = alive[keep], total[keep]
            state = _chosen(state, keep)
            shown = shown[keep] if network.direct else shown
        if not len(alive):
            break
    assert result is not None
    return Run(result, stopped, spikes)


def pieces(steps: int, stride: int = 0) -> list[tuple[int, int]]:
    """Begin and length of what runs together, ``stride`` steps each.

    With 0 a piece takes a quarter of all steps or as many as have run, whichever is more, and the last one what would
    be a short rest: a piece costs something however few samples are left in it, and fewer are with time.

    >>> pieces(16), pieces(5), pieces(6, 4)
    ([(0, 4), (4, 4), (8, 8)], [(0, 2), (2, 3)], [(0, 4), (4, 2)])
    """
    least, begin, found = stride or -(-steps // 4), 0, []
    while begin < steps:
        count = min(least if stride else max(least, begin), steps - begin)
        if not stride and steps - begin - count < least:
            count = steps - begin
        found.append((begin, count))
        begin += count
    return found


def _chosen(state: Any, keep: Tensor) -> Any:
    """The states of some samples; a state is None, a tensor (batch, …) or a named tuple of them."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        return state[keep]
    if isinstance(state, list):
        return [_chosen(s, keep) for s in state]
    return type(state)(*(_chosen(s, keep) for s in state))
