"""A network with delays: layers of delayed synapses and leaky neurons, an output that integrates, and its stream.

"Learning Delays in Spiking Neural Networks using Dilated Convolutions with Learnable Spacings", Hammouamri, Khalfaoui-
Hassani, Masquelier, ICLR 2024, arXiv:2306.17670. Each hidden layer is delayed synapses, batch norm, leaky neurons and
dropout; the class scores are the softmax of the output potential, summed over time. While it learns, the taps narrow
from half the kernel to 0.5 steps in the first quarter of the epochs.
Differs from the paper in: the output leaks more slowly than the hidden neurons, except in the published
configurations; one schedule of the learning rate for weights and delays; in the last quarter the network runs with
the whole delays of inference, so that rounding costs nothing, and delays go on by the gradient of their Gaussian.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hasten.errors import ConfigurationError, ModelLoadError
from hasten.files import write_text
from hasten.spiking.delay import SHARPEST, DelayLinear, DiscreteDelayLinear, slots_of
from hasten.spiking.fit import Fitting, Loss, accuracy, cross_entropy, fit
from hasten.spiking.layers import LIF, Leak
from hasten.spiking.network import over_time
from hasten.spiking.surrogate import Surrogate

__all__ = ["DelayConfig", "DelayNet", "DelayStream", "TapSchedule"]


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
    fan_in: int | None = None
    """synapses of each hidden neuron, drawn at random; None connects all. The output hears every neuron"""
    delays: str = "learned"
    """learned, fixed (random, never trained) or none"""
    constant_sigma: bool = False
    """start with the sharpest tap instead of narrowing it: the ablation"""

    def __post_init__(self) -> None:
        if self.delays not in ("learned", "fixed", "none"):
            raise ConfigurationError(f"delays {self.delays!r} is not known; give learned, fixed or none")
        if not self.hidden or min(self.hidden) < 1:
            raise ConfigurationError(f"hidden {self.hidden} names no layer; give at least one width")
        if self.fan_in is not None and self.fan_in < 1:
            raise ConfigurationError(f"fan_in {self.fan_in} connects nothing; give at least 1, or None for all")
        slots_of(self.max_delay, self.step)

    @classmethod
    def shd(cls) -> DelayConfig:
        """Spiking Heidelberg Digits, as published: the output leaks as fast as the hidden neurons."""
        return cls(readout_tau=10.05e-3)

    @classmethod
    def ssc(cls) -> DelayConfig:
        """Spiking Speech Commands, as published."""
        return cls(hidden=(512, 512, 512), classes=35, max_delay=0.3, tau=15e-3, readout_tau=15e-3)


class TapSchedule:
    """Which width the taps have in an epoch: from half the kernel to 0.5 in the first quarter, then constant."""

    @staticmethod
    def sigma(epoch: int, epochs: int, slots: int) -> float:
        """Width in steps before ``epoch``.

        >>> TapSchedule.sigma(0, 40, 25), TapSchedule.sigma(10, 40, 25)
        (12.0, 0.5)
        """
        start, last = max(SHARPEST, slots // 2), max(1, epochs // 4)
        if epoch >= last:
            return SHARPEST
        return float(start * (SHARPEST / start) ** (epoch / last))

    @staticmethod
    def whole(epoch: int, epochs: int) -> bool:
        """Whether ``epoch`` runs with whole delays: the last quarter does."""
        return epoch >= epochs - epochs // 4


def _binary(spikes: Tensor, lines: int) -> None:
    if spikes.shape[-1:] != (lines,):
        raise ConfigurationError(
            f"spikes of shape {tuple(spikes.shape)} do not end in the {lines} input lines of this network"
        )
    if not bool(((spikes == 0) | (spikes == 1)).all()):
        raise ConfigurationError(
            f"delays carry spikes of 0 or 1, got values from {float(spikes.min()):g} to "
            f"{float(spikes.max()):g}; encode first"
        )


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
        self.synapses = nn.ModuleList(
            DelayLinear(a, b, c.max_delay, c.step, fan_in=c.fan_in, **options) for a, b in pairs
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(w) if c.norm else nn.Identity() for w in c.hidden)
        decay = max(0.0, 1.0 - c.step / c.tau)
        bump = Surrogate(c.surrogate, c.surrogate_width)
        self.neurons = nn.ModuleList(LIF(decay, c.threshold, "zero", bump) for _ in c.hidden)
        self.dropout = nn.Dropout(c.dropout)
        self.readout: nn.Module = DelayLinear(widths[-1], c.classes, c.max_delay, c.step, **options)
        self.output = Leak(tau=c.readout_tau, dt=c.step)
        self.set_sigma(SHARPEST if c.constant_sigma else None)

    def set_sigma(self, sigma: float | None) -> None:
        """Width of every tap in steps; None: the widest."""
        for layer in (*self.synapses, self.readout):
            layer.sigma = max(SHARPEST, layer.slots // 2) if sigma is None else sigma  # type: ignore[assignment, operator, union-attr]

    @property
    def delays(self) -> list[Tensor]:
        """Per layer, (out, in), seconds."""
        return [layer.delay.detach() * self.config.step for layer in (*self.synapses, self.readout)]  # type: ignore[union-attr, operator]

    def potentials(self, spikes: Tensor) -> Tensor:
        """Output potential at every step: spikes (time, batch, in) -> (time, batch, classes)."""
        _binary(spikes, self.config.inputs)
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
        loss: Loss = cross_entropy,
    ) -> dict[str, Any]:
        """Train in place on spikes (time, samples, in) and labels; returns losses and, with ``valid``, its accuracy.

        The taps narrow during the first quarter; the validation accuracy is that of the discretised network. ``loss``
        takes the network, spikes and labels of a batch; the default is the cross-entropy of the class scores.
        """

        def anneal(epoch: int) -> None:
            sharp = self.config.constant_sigma
            for layer in (*self.synapses, self.readout):
                width = SHARPEST if sharp else TapSchedule.sigma(epoch, epochs, layer.slots)  # type: ignore[arg-type, union-attr]
                layer.sigma = width  # type: ignore[assignment]
                layer.whole = not layer.delay.requires_grad or TapSchedule.whole(epoch, epochs)  # type: ignore[assignment, union-attr]

        fitting = Fitting(epochs, rate, batch=batch, seed=seed, bf16=bf16)
        losses = fit(
            self, *train, fitting, groups=self.groups(rate, delay_rate), dim=1, on_epoch=anneal, checkpoint=checkpoint,
            progress=progress, augment=augment, loss=loss,
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
        layers = [m for m in self.modules() if isinstance(m, DelayLinear)]
        delays = sum(m.synapses for m in layers if m.delay.requires_grad)
        weights = sum(p.numel() for n, p in self.named_parameters() if not n.endswith(".delay"))
        weights -= sum(m.weight.numel() - m.synapses for m in layers)
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
        _binary(chunk, self.net.config.inputs)
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
