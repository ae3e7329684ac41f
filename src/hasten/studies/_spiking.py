"""What the spiking studies share: their data, their networks, and the trainings that are made once and cached."""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hasten.clock import ProcessorClock
from hasten.spiking.astrocyte import AstroConfig, AstroLM
from hasten.spiking.checkpoint import trained
from hasten.spiking.cochlea import Cochlea, cochleagram
from hasten.spiking.convert import quantised, to_spiking
from hasten.spiking.delay import DelayLinear
from hasten.spiking.delay_net import DelayConfig, DelayNet, TapSchedule
from hasten.spiking.encode import event_frames
from hasten.spiking.fit import Fitting, fit
from hasten.spiking.layers import LIF
from hasten.spiking.network import SpikingNetwork, over_time
from hasten.spiking.neuron import LIFParameters, lif_step
from hasten.spiking.scan import leak_scan
from hasten.spiking.surrogate import Surrogate
from hasten.spiking.tasks import Coincidence, recall
from hasten.spiking.timesteps import TimestepReduction
from hasten.studies.study import Scale

Images = tuple[Tensor, Tensor, Tensor, Tensor]
Told = Callable[[str], None]
PERCENTILE = 85.0
"""of the current that becomes the threshold: at the usual 99.7 too few spikes are left in so short a run"""


def fashion(scale: Scale) -> Images | None:
    """Fashion-MNIST of the data folder: training images (n, 1, 28, 28) in [0, 1], labels, test images, labels."""
    path = scale.find("vision/fashion_mnist.npz")
    if path is None:
        return None
    z = np.load(path)
    x, y, xt, yt = (torch.from_numpy(z[k]) for k in ("x_train", "y_train", "x_test", "y_test"))
    return x[:, None].float() / 255, y.long(), xt[:, None].float() / 255, yt.long()


def shift_and_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Move a batch of images by up to two pixels and mirror half of it."""
    dy, dx = (int(v) for v in torch.randint(-2, 3, (2,), generator=generator))
    x = torch.roll(x, (dy, dx), (-2, -1))
    mirrored = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], x.flip(-1), x)


def vgg(
    channels: tuple[int, ...], pools: tuple[int, ...], size: int, classes: int = 10, average: bool = False
) -> nn.Sequential:
    """Convolutions of 3 × 3 without bias, pooling (conversion keeps the mean, not the maximum) after
    those at ``pools``, ReLU, one linear layer."""
    layers: list[nn.Module] = []
    before = 1
    for index, width in enumerate(channels):
        layers.append(nn.Conv2d(before, width, 3, padding=1, bias=False))
        nn.init.kaiming_normal_(layers[-1].weight, nonlinearity="relu")  # type: ignore[arg-type]
        if index in pools:
            layers.append(nn.AvgPool2d(2) if average else nn.MaxPool2d(2))
            size //= 2
        layers.append(nn.ReLU())
        before = width
    layers += [nn.Flatten(), nn.Dropout(0.3), nn.Linear(before * size * size, classes, bias=False)]
    return nn.Sequential(*layers)


def _network(shape: dict[str, Any], seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return vgg(tuple(shape["channels"]), tuple(shape["pools"]), shape["size"], average=shape.get("average", False))


def train_stages(
    x: Tensor, y: Tensor, *, shape: dict[str, Any], epochs: int, first: int, later: list[int], seed: int,
    checkpoint: Path, told: Told = lambda stage: None,
) -> dict[str, Any]:  # fmt: skip
    """ReLU network, its conversion trained at five steps, then the stages down to one; all weights."""
    told(f"seed {seed}: ReLU network")
    ann = _network(shape, seed)
    fit(
        ann, x, y, Fitting(epochs, 2e-3, bf16=True, seed=seed), augment=shift_and_flip, checkpoint=checkpoint / "ann.pt"
    )
    converted = to_spiking(ann, x[:512], 5, PERCENTILE)
    told(f"seed {seed}: five steps")
    parent = to_spiking(ann, x[:512], 5, PERCENTILE)
    fit(
        parent, x, y, Fitting(first, 1e-3, bf16=True, seed=seed), augment=shift_and_flip,
        checkpoint=checkpoint / "five.pt",
    )  # fmt: skip
    told(f"seed {seed}: fewer steps")
    technique = TimestepReduction((5, 4, 3, 2, 1), tuple(later), 1e-3, bf16=True, seed=seed)
    one: Any = technique(parent, [(x, y)], checkpoint=checkpoint, augment=shift_and_flip)
    return {
        "ann": ann.state_dict(), "converted": converted.state_dict(), "parent": parent.state_dict(),
        "one": one.state_dict(),
        "stages": [
            {
                "timesteps": s.timesteps, "accuracy": s.accuracy, "spikes": dict(s.spikes_per_neuron),
                "energy": s.cost.energy(), "first_layer_macs": s.cost.first_layer_macs, "macs": s.cost.macs,
                "accumulates": s.cost.accumulates, "state_bytes": s.cost.state_bytes,
            }
            for s in one.history
        ],
    }  # fmt: skip


def train_one_step(
    x: Tensor, y: Tensor, *, converted: dict[str, Tensor], shape: dict[str, Any], epochs: int, rate: float, seed: int,
    checkpoint: Path, told: Told = lambda stage: None,
) -> dict[str, Any]:  # fmt: skip
    """The baseline: the converted network trained at one step from the beginning, for as many epochs in all."""
    told(f"seed {seed}: one step directly")
    network = to_spiking(_network(shape, seed), x[:8], timesteps=1)
    network.load_state_dict(converted)
    network = network.with_timesteps(1)
    before = network.state_dict()
    before = {k: v.clone() for k, v in before.items()}
    fit(
        network, x, y, Fitting(epochs, rate, bf16=True, seed=seed), augment=shift_and_flip,
        checkpoint=checkpoint / "direct.pt",
    )  # fmt: skip
    return {"direct": network.state_dict(), "untrained": before}


def spoken_digits(scale: Scale, steps: int = 80) -> dict[str, tuple[Tensor, Tensor]] | None:
    """Spoken digits as spikes (steps, samples, lines) and labels: takes 0-4 test, 5-8 validation, the rest training.

    A recording longer than ``steps`` is cut, a shorter one ends in silence.
    """
    path = scale.find("speech/fsdd_8k.npz")
    if path is None:
        return None
    z = np.load(path)
    audio, offsets, take = z["audio"], z["offsets"], z["take"]
    ear = Cochlea()
    recordings = []
    for begin, end in zip(offsets, offsets[1:], strict=False):
        samples = torch.zeros(steps * ear.hop)
        sound = torch.from_numpy(audio[begin:end].astype(np.float32) / 32768)[: len(samples)]
        samples[: len(sound)] = sound
        recordings.append(cochleagram(samples, ear))
    spikes, labels = torch.stack(recordings, 1), torch.from_numpy(z["label"].astype(np.int64))
    parts = {"test": take < 5, "valid": (take >= 5) & (take < 9), "train": take >= 9}
    return {k: (spikes[:, torch.from_numpy(m)], labels[torch.from_numpy(m)]) for k, m in parts.items()}


def shift_and_drop(x: Tensor, generator: torch.Generator) -> Tensor:
    """Move spikes (time, samples, lines) later by up to 10 steps, and lose a twentieth of them."""
    later = int(torch.randint(0, 11, (1,), generator=generator))
    moved = torch.cat([torch.zeros_like(x[:later]), x[: len(x) - later]])
    return moved * (torch.rand(x.shape, generator=generator) > 0.05)


def train_delays(
    x: Tensor, y: Tensor, *, config: dict[str, Any], epochs: int, batch: int, seed: int, checkpoint: Path,
    told: Told = lambda stage: None,
) -> dict[str, Any]:  # fmt: skip
    """One network with delays."""
    told(f"seed {seed}: delays {config['delays']}")
    torch.manual_seed(seed)
    net = DelayNet(DelayConfig(**{**config, "hidden": tuple(config["hidden"])}))
    fitted = net.fit(
        (x, y), None, epochs, rate=5e-3, delay_rate=0.2, batch=batch, seed=seed, checkpoint=checkpoint / "net.pt",
        bf16=True, augment=shift_and_drop,
    )  # fmt: skip
    return {"net": net.state_dict(), "losses": fitted["losses"]}


class RecurrentNet(nn.Module):
    """The rival of delays: leaky neurons that also hear themselves, one step after the other."""

    def __init__(self, inputs: int, hidden: int, classes: int, decay: float, readout_decay: float) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden, bias=False)
        self.norm = nn.BatchNorm1d(hidden)
        self.again = nn.Linear(hidden, hidden, bias=False)
        nn.init.orthogonal_(self.again.weight, 0.5)
        self.last = nn.Linear(hidden, classes, bias=False)
        self.dropout = nn.Dropout(0.3)
        self.neuron = LIFParameters(decay, 1.0, "zero", Surrogate("arctan", 5.0))
        self.readout_decay = readout_decay

    def forward(self, spikes: Tensor) -> Tensor:
        """(time, batch, inputs) -> class scores (batch, classes)."""
        drive = over_time(self.norm, self.first(spikes))
        state, fired, out = torch.zeros_like(drive[0]), torch.zeros_like(drive[0]), []
        for now in drive.unbind(0):
            fired, state = lif_step(now + self.again(fired), state, self.neuron)
            out.append(fired)
        potential, _ = leak_scan(self.last(self.dropout(torch.stack(out))), None, self.readout_decay)
        return potential.softmax(-1).sum(0)


def train_recurrent(
    x: Tensor, y: Tensor, *, hidden: int, epochs: int, batch: int, seed: int, checkpoint: Path,
    told: Told = lambda stage: None,
) -> dict[str, Any]:  # fmt: skip
    """The recurrent rival, with the data, the loss and the number of epochs of the delays."""
    told(f"seed {seed}: recurrent")
    torch.manual_seed(seed)
    net = RecurrentNet(x.shape[-1], hidden, 10, 1 - 0.01 / 15e-3, math.exp(-0.01 / 0.1))
    losses = fit(
        net, x, y, Fitting(epochs, 5e-3, 1e-5, batch=batch, seed=seed), dim=1, augment=shift_and_drop,
        checkpoint=checkpoint / "net.pt",
    )  # fmt: skip
    return {"net": net.state_dict(), "losses": losses}


def train_quantised(
    x: Tensor, y: Tensor, *, shape: dict[str, Any], levels: int, epochs: int, seed: int, checkpoint: Path,
    told: Told = lambda stage: None,
) -> dict[str, Any]:  # fmt: skip
    """A ReLU network, then the same with quantised activations, to be converted."""
    told(f"seed {seed}: quantised activations")
    ann = _network(shape, seed)
    fit(ann, x, y, Fitting(epochs, 2e-3, seed=seed), augment=shift_and_flip, checkpoint=checkpoint / "ann.pt")
    net = quantised(ann, x[:512], levels)
    fit(net, x, y, Fitting(epochs, 1e-3, seed=seed), augment=shift_and_flip, checkpoint=checkpoint / "levels.pt")
    return {"net": net.state_dict()}


def train_surrogate(
    x: Tensor, y: Tensor, *, shape: dict[str, Any], timesteps: int, epochs: int, seed: int, checkpoint: Path,
    told: Told = lambda stage: None,
) -> dict[str, Any]:  # fmt: skip
    """A ReLU network, converted and trained as a spiking one; every step's answer counts in the loss."""
    told(f"seed {seed}: surrogate gradients")
    ann = _network(shape, seed)
    fit(ann, x, y, Fitting(epochs, 2e-3, seed=seed), augment=shift_and_flip, checkpoint=checkpoint / "ann.pt")
    net = to_spiking(ann, x[:512], timesteps, PERCENTILE)
    fit(net, x, y, Fitting(epochs, 1e-3, seed=seed), augment=shift_and_flip, checkpoint=checkpoint / "net.pt")
    return {"net": net.state_dict()}


def shakespeare(scale: Scale) -> tuple[Tensor, Tensor] | None:
    """Bytes of the text of the data folder: the first nine tenths to learn from, the rest to be judged on."""
    path = scale.find("text/tinyshakespeare.txt.gz")
    if path is None:
        return None
    data = torch.frombuffer(bytearray(gzip.decompress(path.read_bytes())), dtype=torch.uint8)
    cut = len(data) * 9 // 10
    return data[:cut].clone(), data[cut:].clone()


class LSTMLM(nn.Module):
    """The rival with a fixed state: embedding, LSTM, tied head."""

    def __init__(self, vocab: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (batch, time) -> logits."""
        return nn.functional.linear(self.lstm(self.embedding(tokens))[0], self.embedding.weight)


def language_model(kind: str, sizes: dict[str, int]) -> nn.Module:
    """``astro``, ``neurons`` (no astrocytes, as many parameters) or ``lstm`` (as many parameters)."""
    config = AstroConfig(**sizes)  # type: ignore[arg-type]
    astro = AstroLM(config)
    if kind == "astro":
        return astro
    if kind == "neurons":
        return AstroLM(astro.neurons_only())
    wanted = sum(p.numel() for p in astro.parameters())
    width = min(range(16, 1024, 4), key=lambda w: abs(config.vocab * w + 2 * (8 * w * w + 8 * w) - wanted))
    return LSTMLM(config.vocab, width, 2)


def train_text(
    data: Tensor, *, kind: str, sizes: dict[str, int], seconds: float, context: int, seed: int, checkpoint: Path,
    told: Told = lambda stage: None,
) -> dict[str, Any]:  # fmt: skip
    """Next bytes for ``seconds`` of processor time of one thread, the same for every kind."""
    told(f"text: {kind}")
    torch.manual_seed(seed)
    model = language_model(kind, sizes)
    clock, generator, steps, batch, rate = ProcessorClock(), torch.Generator().manual_seed(seed), 0, 4, 2e-3
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    began = clock.now()
    while (done := (clock.now() - began) / seconds) < 1:
        at = torch.randint(0, len(data) - context - 1, (batch,), generator=generator)
        rows = torch.stack([data[i : i + context + 1] for i in at.tolist()]).long()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(rows[:, :-1]).float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (steps + 1) / 50) * max(0.02, 0.5 * (1 + math.cos(math.pi * done)))
        optimiser.step()
        steps += 1
        told(f"text: {kind}, step {steps}, loss {loss.item():.3f}")
    return {"net": model.state_dict(), "steps": steps, "loss": loss.item()}


def train_recall(
    *, kind: str, sizes: dict[str, int], steps: int, seed: int, checkpoint: Path, told: Told = lambda stage: None
) -> dict[str, Any]:
    """Four pairs, then up to 128 distractors, then a question."""
    told(f"recall: {kind}")
    torch.manual_seed(seed)
    model = language_model(kind, sizes)
    assert isinstance(model, AstroLM)
    rate, generator = 3e-3, torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    for step in range(steps):
        longest = min(128, 16 + step // 3)
        distance = int(torch.randint(4, longest + 1, (1,), generator=generator))
        tokens, answers = recall(64, distance, seed=(seed + 1) * 1_000_000 + step)
        loss = nn.functional.cross_entropy(model.logits(model.hidden(tokens)[0][:, -1]), answers)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * max(0.02, 1 - step / steps)
        optimiser.step()
        told(f"recall: {kind}, step {step}, loss {loss.item():.3f}")
    return {"net": model.state_dict(), "loss": loss.item()}


class Coincidences(nn.Module):
    """One output per class that listens for its spikes to arrive together; all weights are one and stay."""

    def __init__(self, lines: int, classes: int, span: int, delays: str) -> None:
        super().__init__()
        self.layer = DelayLinear(
            lines, classes, span * 1e-3, 1e-3, learn_delay=delays == "learned", delayed=delays != "none"
        )
        nn.init.ones_(self.layer.weight)
        self.layer.weight.requires_grad_(False)

    def forward(self, spikes: Tensor) -> Tensor:
        """The largest sum of arrivals, smoothly: (time, samples, lines) -> (samples, classes)."""
        return torch.logsumexp(3.0 * self.layer(spikes), 0)

    def judge(self, spikes: Tensor) -> Tensor:
        """With whole delays: the largest number of spikes that arrive in one step."""
        return self.layer.discretise()(spikes).amax(0)


def fit_coincidences(task: Coincidence, span: int, delays: str, epochs: int, seed: int) -> Coincidences:
    """Delays by gradient; where they are fixed or absent there is nothing to train."""
    torch.manual_seed(seed)
    net = Coincidences(task.spikes.shape[-1], len(task.times), span, delays)

    def anneal(epoch: int) -> None:
        net.layer.sigma = TapSchedule.sigma(epoch, epochs, net.layer.slots)

    if delays == "learned":
        groups = [{"params": [net.layer.delay], "lr": 0.5}]
        fit(net, task.spikes, task.labels, Fitting(epochs, 0.5, seed=seed), groups=groups, dim=1, on_epoch=anneal)
    return net.eval()


def digits(size: int = 16) -> Images | None:
    """Handwritten digits of scikit-learn, enlarged twice, where that package is installed; every fifth is for tests."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        return None
    raw = load_digits()
    x = torch.from_numpy(raw.images).float()[:, None] / 16
    x, y = nn.functional.interpolate(x, (size, size), mode="bilinear"), torch.from_numpy(raw.target).long()
    held = torch.arange(len(y)) % 5 == 0
    return x[~held], y[~held], x[held], y[held]


def events(scale: Scale, steps: int = 10) -> Images | None:
    """N-MNIST as frames of 0 and 1 (steps, recordings, 2, 34, 34): every fourth recording is for tests."""
    path = scale.find("events/nmnist.npz")
    if path is None:
        return None
    z = np.load(path)
    o = z["offsets"]
    t, px, py, p = (z[k] for k in ("t_us", "x", "y", "p"))
    frames = [
        event_frames(t[a:b] * 1e-6, px[a:b], py[a:b], p[a:b], step=0.3 / steps, steps=steps, shape=(34, 34))
        for a, b in zip(o, o[1:], strict=False)
    ]
    x, y = torch.stack(frames, 1), torch.from_numpy(z["label"].astype(np.int64))
    held = torch.arange(len(y)) % 4 == 0
    return x[:, ~held], y[~held], x[:, held], y[held]


def event_network(steps: int) -> SpikingNetwork:
    """Two layers of spiking convolutions for events."""
    layers: list[nn.Module] = [
        nn.Conv2d(2, 8, 5, stride=2, bias=False), LIF(0.8, 1.0, "subtract", learn=("decay", "threshold")),
        nn.Conv2d(8, 16, 3, stride=2, bias=False), LIF(0.8, 0.5, "subtract", learn=("decay", "threshold")),
        nn.Flatten(), nn.Linear(16 * 7 * 7, 10, bias=False),
    ]  # fmt: skip
    return SpikingNetwork(layers, steps, direct=False)


def train_events(
    x: Tensor, y: Tensor, *, epochs: int, seed: int, checkpoint: Path, told: Told = lambda stage: None
) -> dict[str, Any]:
    """The answer at every step counts in the loss, so that an early one is of use."""
    told(f"seed {seed}: events")
    torch.manual_seed(seed)
    net = event_network(x.shape[0])

    def loss(model: nn.Module, frames: Tensor, labels: Tensor) -> Tensor:
        assert isinstance(model, SpikingNetwork)
        sums = model.outputs(frames).cumsum(0) / math.sqrt(len(frames))
        return nn.functional.cross_entropy(sums.flatten(0, 1), labels.repeat(len(sums)))

    fit(net, x, y, Fitting(epochs, 2e-3, seed=seed), loss=loss, dim=1, checkpoint=checkpoint / "net.pt")
    return {"net": net.state_dict()}


def cached(
    scale: Scale, name: str, script: Callable[..., dict[str, Any]], settings: dict[str, Any], data: dict[str, Tensor],
    span: tuple[float, float], **handed: Any,
) -> dict[str, Any]:  # fmt: skip
    """What a training gave, from the cache where it is there; its stages show between the two shares of the study."""
    scale.progress(name, span[0])
    made = trained(name, script, settings, data, told=lambda stage: scale.progress(stage, span[0]), **handed)
    scale.progress(name, span[1])
    return made


def interval(values: list[float]) -> tuple[float, float]:
    """Mean of a few seeds and half of its 95 % interval (Student's t)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.inf
    spread = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
    table = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)  # 97.5 % of 1, 2, … degrees
    return mean, table[min(len(values) - 2, len(table) - 1)] * spread / len(values) ** 0.5


def points(values: list[float]) -> str:
    """Mean and 95 % interval of a few seeds, in percentage points."""
    mean, half = interval(values)
    return f"{100 * mean:.2f} ± {100 * half:.2f}" if math.isfinite(half) else f"{100 * mean:.2f} (one seed)"
