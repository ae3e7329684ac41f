"""Learned delays: one delay per synapse, trained with its weight.

"Learning Delays in Spiking Neural Networks using Dilated Convolutions with Learnable Spacings", Hammouamri, Khalfaoui-
Hassani, Masquelier, ICLR 2024, arXiv:2306.17670. A layer with delays is a causal convolution over time whose kernel
has one tap per synapse; while it learns, the tap is a Gaussian around the delay that narrows:

    y_i[t] = Σ_j Σ_n k_ij[n] s_j[t - (K-1) + n],   k_ij[n] = w_ij g_ij[n] / (1e-7 + Σ_m g_ij[m]),
    g_ij[n] = exp(-½ ((n - (K - 1 - d_ij)) / σ)²),   so that a spike at t acts at t + d_ij.

Differs from the paper in: a spike needs a potential above the threshold, not at it; weights are rounded to an exact
grid when delays become whole steps.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hasten.errors import ConfigurationError, ModelLoadError
from hasten.measure.files import write_text
from hasten.spiking.delay_line import DelayLine, on_grid
from hasten.spiking.fit import Fitting, accuracy, fit
from hasten.spiking.layers import LIF, Leak
from hasten.spiking.network import over_time
from hasten.spiking.surrogate import Surrogate

__all__ = ["DelayConfig", "DelayLinear", "DelayNet", "DelayStream", "DiscreteDelayLinear", "TapSchedule"]

_SHARPEST = 0.5


def _slots(max_delay: float, step: float) -> int:
    if not (step > 0 and max_delay >= step):
        raise ConfigurationError(
            f"a delay range of {max_delay} s is shorter than one step of {step} s; both are in seconds"
        )
    slots = round(max_delay / step) + 1
    return slots + 1 - slots % 2


def _binary(spikes: Tensor) -> None:
    if not bool(((spikes == 0) | (spikes == 1)).all()):
        raise ConfigurationError(
            f"delays carry spikes of 0 or 1, got values from {float(spikes.min()):g} to "
            f"{float(spikes.max()):g}; encode first"
        )


def _taps(spikes: Tensor, kernel: Tensor) -> Tensor:
    """Causal convolution over time: spikes (time, batch, in), kernel (out, in, K) -> (time, batch, out)."""
    x = functional.pad(spikes.permute(1, 2, 0), (kernel.shape[-1] - 1, 0))
    return functional.conv1d(x, kernel).permute(2, 0, 1)


class DelayLinear(nn.Module):
    """A linear layer with a learnable delay per synapse.

    Parameters: ``weight`` and ``delay`` (out, in), the delay in steps from 0 to K - 1. ``sigma`` is the width of the
    tap in steps; eval mode still uses the Gaussian, :meth:`discretise` gives the layer for inference.

    >>> layer = DelayLinear(3, 2, max_delay=0.05, step=0.01)
    >>> layer(torch.zeros(20, 4, 3)).shape, layer.slots
    (torch.Size([20, 4, 2]), 7)
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        max_delay: float,
        step: float,
        *,
        learn_delay: bool = True,
        delayed: bool = True,
    ) -> None:
        super().__init__()
        self.slots = _slots(max_delay, step) if delayed else 1
        self.step_seconds = step
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        delay = torch.rand(outputs, inputs) * (self.slots - 1)
        self.delay = nn.Parameter(delay, requires_grad=learn_delay and delayed)
        self.sigma = max(_SHARPEST, self.slots // 2)

    def constrain(self) -> None:
        """Keep delays between 0 and K - 1."""
        self.delay.data.clamp_(0, self.slots - 1)

    def kernel(self) -> Tensor:
        """(out, in, K): each synapse's Gaussian tap, in the order of the convolution (oldest input first)."""
        n = torch.arange(self.slots, dtype=self.weight.dtype, device=self.weight.device)
        g = torch.exp(-0.5 * ((n - (self.slots - 1 - self.delay.unsqueeze(-1))) / self.sigma).square())
        return self.weight.unsqueeze(-1) * g / (1e-7 + g.sum(-1, keepdim=True))

    def forward(self, spikes: Tensor) -> Tensor:
        """spikes (time, batch, in) -> current (time, batch, out)."""
        if self.slots == 1:
            return over_time_linear(spikes, self.weight)
        return _taps(spikes, self.kernel())

    def discretise(self) -> DiscreteDelayLinear:
        """Whole delays, one tap per synapse, weights on the exact grid."""
        return DiscreteDelayLinear(on_grid(self.weight), self.delay.detach().round().to(torch.int32), self.step_seconds)


class Affine(nn.Module):
    """``scale x + shift`` per channel: batch norm when its statistics are fixed, the same bits for any batch."""

    def __init__(self, norm: nn.BatchNorm1d) -> None:
        super().__init__()
        assert norm.running_var is not None
        assert norm.running_mean is not None
        scale = norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", scale)
        self.register_buffer("shift", norm.bias.detach() - norm.running_mean * scale)

    def forward(self, x: Tensor) -> Tensor:
        """(…, channels)."""
        return x * self.scale + self.shift


def over_time_linear(spikes: Tensor, weight: Tensor) -> Tensor:
    """One product for all steps."""
    return functional.linear(spikes, weight)


class DiscreteDelayLinear(nn.Module):
    """A linear layer with whole delays, for inference: an event-driven delay line, or the same as a convolution.

    >>> layer = DiscreteDelayLinear(torch.ones(1, 1), torch.tensor([[1]], dtype=torch.int32), step=0.01)
    >>> layer(torch.tensor([1.0, 0.0, 0.0]).reshape(3, 1, 1)).flatten().tolist()
    [0.0, 1.0, 0.0]
    """

    def __init__(self, weight: Tensor, delay: Tensor, step: float) -> None:
        super().__init__()
        self.weight: Tensor
        self.delay: Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("delay", delay)
        self.step_seconds = step

    def line(self, batch: int = 1) -> DelayLine:
        """Fresh delay lines for a batch of streams."""
        return DelayLine(self.weight, self.delay, batch)

    def kernel(self) -> Tensor:
        """(out, in, K), one tap per synapse."""
        slots = int(self.delay.max()) + 1
        return self.weight.unsqueeze(-1) * functional.one_hot(slots - 1 - self.delay.long(), slots)

    def convolve(self, spikes: Tensor) -> Tensor:
        """The same result by a convolution, for devices and for tests."""
        return _taps(spikes, self.kernel())

    def forward(self, spikes: Tensor) -> Tensor:
        """spikes (time, batch, in) -> current (time, batch, out)."""
        if spikes.device.type != "cpu" or torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return self.convolve(spikes)
        return self.line(spikes.shape[1]).push(spikes)


@dataclass(frozen=True)
class DelayConfig:
    """A feed-forward network with delays.

    >>> DelayConfig.shd().hidden
    (256, 256)
    """

    inputs: int = 140
    """input lines"""
    hidden: tuple[int, ...] = (256, 256)
    """neurons of the hidden layers"""
    classes: int = 20
    """classes"""
    max_delay: float = 0.25
    """longest delay, seconds"""
    step: float = 0.01
    """length of a timestep, seconds"""
    tau: float = 10.05e-3
    """membrane time constant, seconds; the decay is 1 - step / tau"""
    threshold: float = 1.0
    """of the hidden neurons"""
    readout_tau: float = 0.1
    """time constant of the output, which never fires, seconds"""
    dropout: float = 0.4
    """share of hidden spikes that are dropped while training"""
    norm: bool = True
    """batch norm over channels before each hidden neuron"""
    surrogate: str = "arctan"
    """gradient of the spike"""
    surrogate_width: float = 5.0
    """its width"""
    delays: str = "learned"
    """learned, fixed (random, never trained) or none"""
    constant_sigma: bool = False
    """start with the sharpest tap instead of narrowing it: the ablation"""

    def __post_init__(self) -> None:
        if self.delays not in ("learned", "fixed", "none"):
            raise ConfigurationError(f"delays {self.delays!r} is not known; give learned, fixed or none")
        if not self.hidden or min(self.hidden) < 1:
            raise ConfigurationError(f"hidden {self.hidden} names no layer; give at least one width")
        _slots(self.max_delay, self.step)

    @classmethod
    def shd(cls) -> DelayConfig:
        """Spiking Heidelberg Digits, as published."""
        return cls()

    @classmethod
    def ssc(cls) -> DelayConfig:
        """Spiking Speech Commands, as published."""
        return cls(hidden=(512, 512, 512), classes=35, max_delay=0.3, tau=15e-3)


class TapSchedule:
    """Which width the taps have in an epoch: from half the kernel to 0.5 in the first quarter, then constant."""

    @staticmethod
    def sigma(epoch: int, epochs: int, slots: int) -> float:
        """Width in steps before ``epoch``.

        >>> TapSchedule.sigma(0, 40, 25), TapSchedule.sigma(10, 40, 25)
        (12.0, 0.5)
        """
        start, last = max(_SHARPEST, slots // 2), max(1, epochs // 4)
        if epoch >= last:
            return _SHARPEST
        return float(start * (_SHARPEST / start) ** (epoch / last))


class DelayNet(nn.Module):
    """Layers of delayed synapses and leaky neurons, and an output that integrates.

    >>> net = DelayNet(DelayConfig(inputs=8, hidden=(16,), classes=3))
    >>> net(torch.zeros(30, 2, 8)).shape
    torch.Size([2, 3])
    """

    def __init__(self, config: DelayConfig) -> None:
        super().__init__()
        self.config = c = config
        widths = [c.inputs, *c.hidden]
        options = {"learn_delay": c.delays == "learned", "delayed": c.delays != "none"}
        pairs = zip(widths, widths[1:], strict=False)
        self.synapses = nn.ModuleList(DelayLinear(a, b, c.max_delay, c.step, **options) for a, b in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm1d(w) if c.norm else nn.Identity() for w in c.hidden)
        decay = max(0.0, 1.0 - c.step / c.tau)
        bump = Surrogate(c.surrogate, c.surrogate_width)
        self.neurons = nn.ModuleList(LIF(decay, c.threshold, "zero", bump) for _ in c.hidden)
        self.dropout = nn.Dropout(c.dropout)
        self.readout: nn.Module = DelayLinear(widths[-1], c.classes, c.max_delay, c.step, **options)
        self.output = Leak(tau=c.readout_tau, dt=c.step)
        self.set_sigma(_SHARPEST if c.constant_sigma else None)

    def set_sigma(self, sigma: float | None) -> None:
        """Width of every tap in steps; None: the widest."""
        for layer in (*self.synapses, self.readout):
            layer.sigma = max(_SHARPEST, layer.slots // 2) if sigma is None else sigma  # type: ignore[assignment, operator, union-attr]

    @property
    def delays(self) -> list[Tensor]:
        """Per layer, (out, in), seconds."""
        return [layer.delay.detach() * self.config.step for layer in (*self.synapses, self.readout)]  # type: ignore[union-attr, operator]

    def potentials(self, spikes: Tensor) -> Tensor:
        """Output potential at every step: spikes (time, batch, in) -> (time, batch, classes)."""
        _binary(spikes)
        x = spikes
        for synapse, norm, neuron in zip(self.synapses, self.norms, self.neurons, strict=True):
            x = self.dropout(neuron(over_time(norm, synapse(x)).contiguous()))
        return self.output(self.readout(x).float())  # type: ignore[no-any-return]

    def forward(self, spikes: Tensor) -> Tensor:
        """Class scores (batch, classes): the softmax of the output potential, summed over time."""
        return self.potentials(spikes).softmax(-1).cumsum(0)[-1]

    def groups(self, rate: float, delay_rate: float | None = None, weight_decay: float = 1e-5) -> list[dict[str, Any]]:
        """Parameter groups: delays learn 100 times faster and do not decay."""
        delays = [p for n, p in self.named_parameters() if n.endswith(".delay") and p.requires_grad]
        others = [p for n, p in self.named_parameters() if not n.endswith(".delay") and p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": others, "lr": rate, "weight_decay": weight_decay}]
        if delays:
            groups.append(
                {"params": delays, "lr": 100 * rate if delay_rate is None else delay_rate, "weight_decay": 0.0}
            )
        return groups

    def fit(
        self,
        train: tuple[Tensor, Tensor],
        valid: tuple[Tensor, Tensor] | None = None,
        epochs: int = 40,
        *,
        rate: float = 5e-3,
        delay_rate: float | None = None,
        batch: int = 64,
        seed: int = 0,
        bf16: bool = False,
        checkpoint: Path | None = None,
        progress: Callable[[float], None] | None = None,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    ) -> dict[str, Any]:
        """Train in place on spikes (time, samples, in) and labels; returns losses and, with ``valid``, its accuracy.

        The taps narrow during the first quarter; the validation accuracy is that of the discretised network.
        """

        def anneal(epoch: int) -> None:
            sharp = self.config.constant_sigma
            for layer in (*self.synapses, self.readout):
                width = _SHARPEST if sharp else TapSchedule.sigma(epoch, epochs, layer.slots)  # type: ignore[arg-type, union-attr]
                layer.sigma = width  # type: ignore[assignment]

        fitting = Fitting(epochs, rate, batch=batch, seed=seed, bf16=bf16)
        losses = fit(
            self, *train, fitting, groups=self.groups(rate, delay_rate), dim=1, on_epoch=anneal, checkpoint=checkpoint,
            progress=progress, augment=augment,
        )  # fmt: skip
        anneal(epochs)
        result: dict[str, Any] = {"losses": losses}
        if valid is not None:
            result["accuracy"] = accuracy(self.discretise(), *valid, dim=1)
        return result

    def discretise(self) -> DelayNet:
        """A copy for inference: whole delays, one tap per synapse."""
        new = copy.deepcopy(self)
        new.synapses = nn.ModuleList(s.discretise() if isinstance(s, DelayLinear) else s for s in new.synapses)
        if isinstance(new.readout, DelayLinear):
            new.readout = new.readout.discretise()
        new.norms = nn.ModuleList(Affine(n) if isinstance(n, nn.BatchNorm1d) else n for n in new.norms)
        for p in new.parameters():
            p.requires_grad_(False)
        return new.eval()

    @property
    def discrete(self) -> bool:
        """Whether delays are whole steps."""
        return isinstance(self.readout, DiscreteDelayLinear)

    def parameters_by_kind(self) -> dict[str, int]:
        """How many weights and how many delays (two numbers per synapse where delays are learned)."""
        delays = sum(p.numel() for n, p in self.named_parameters() if n.endswith(".delay") and p.requires_grad)
        weights = sum(p.numel() for n, p in self.named_parameters() if not n.endswith(".delay"))
        return {"weights": weights, "delays": delays}

    def stream(self) -> DelayStream:
        """The network over a stream of spikes, event by event; discretise first."""
        return DelayStream(self)

    def save_pretrained(self, folder: str | Path) -> None:
        """``config.json`` and ``model.safetensors``."""
        from safetensors.torch import save

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        document = {**asdict(self.config), "discrete": self.discrete}
        write_text(path / "config.json", json.dumps(document, indent=2) + "\n")
        state = {k: v.detach().contiguous() for k, v in self.state_dict().items()}
        temporary = path / ".model.safetensors.part"
        temporary.write_bytes(save(state))
        temporary.replace(path / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> DelayNet:
        """The inverse of :meth:`save_pretrained`; raises :class:`~hasten.errors.ModelLoadError`."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(folder)
        try:
            document = json.loads((path / "config.json").read_text(encoding="utf-8"))
            discrete = document.pop("discrete")
            net = cls(DelayConfig(**{**document, "hidden": tuple(document["hidden"])}))
            net = net.discretise() if discrete else net
            state = load_file(path / "model.safetensors")
            net.load_state_dict(state)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ModelLoadError(
                f"{str(path)!r} holds no delay network ({line}); save one with save_pretrained"
            ) from error
        return net.eval()


class DelayStream:
    """A network with delays over a live stream: ``push(spikes)`` gives the class scores after each step.

    spikes (time, in) of 0 and 1; a score is (classes,): the softmax of the output, summed since the stream began,
    equal to ``net(spikes so far)``. Mutable; ``reset`` begins anew. Raises ``ValueError`` for anything but 0 and 1.
    """

    def __init__(self, net: DelayNet) -> None:
        if not net.discrete:
            raise ConfigurationError("a stream needs whole delays; call net.discretise() first")
        self.net = net.eval()
        self.spikes = 0
        """spikes that the hidden layers have sent"""
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._lines = [s.line() for s in (*self.net.synapses, self.net.readout)]  # type: ignore[operator, union-attr]
        self._states: list[Any] = [None] * len(self.net.neurons)
        self._output: Any = None
        self._total = torch.zeros(self.net.config.classes, dtype=torch.float64)
        self.spikes = 0

    @property
    def state_bytes(self) -> int:
        """Bytes of rings, potentials and scores; does not grow."""
        neurons = sum(self.net.config.hidden) + 3 * self.net.config.classes
        return sum(line.state_bytes for line in self._lines) + 4 * neurons

    @torch.inference_mode()
    def push(self, chunk: Tensor) -> list[Tensor]:
        """Scores after each step of the chunk."""
        if not len(chunk):
            return []
        _binary(chunk)
        x = chunk.float().unsqueeze(1)
        for index, (norm, neuron) in enumerate(zip(self.net.norms, self.net.neurons, strict=True)):
            current = over_time(norm, self._lines[index].push(x))
            x, self._states[index] = neuron.scan(current, self._states[index])  # type: ignore[operator]
            self.spikes += int(x.sum())
        potentials, self._output = self.net.output.scan(self._lines[-1].push(x), self._output)
        scores = potentials[:, 0].softmax(-1).double()
        scores[0] += self._total
        scores = scores.cumsum(0)
        self._total = scores[-1]
        return list(scores.float().unbind(0))

    def flush(self) -> list[Tensor]:
        """Nothing is held back: a score comes with its step."""
        return []


def classify(stream: DelayStream, spikes: Tensor) -> Sequence[Tensor]:
    """All scores of one recording, from a fresh start."""
    stream.reset()
    return stream.push(spikes)
