"""A Survey of Quantization Methods for Efficient Neural Network Inference: what each axis of the taxonomy costs here.

https://arxiv.org/abs/2103.13630. The survey claims 4 to 8 times in practice and up to 16 times in theory for integers
of 4 bits or fewer. Checked: the identities of the arithmetic, bytes on disk, accuracy over bits and granularities,
training against rounding at 2 bits, observers on heavy tails, and the time of int8 products on this machine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hasten.compress import kernels
from hasten.compress.quantize import (
    Equalise,
    Int,
    MiniFloat,
    Mse,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Quantize,
    QuantizeAware,
    fold_batch_norm,
    save,
)
from hasten.compress.quantize.arithmetic import accumulate
from hasten.compress.quantize.layers import convolve, describe
from hasten.compress.quantize.passes import Calibration
from hasten.compress.quantize.steps import Work
from hasten.compress.quantize.zero_shot import zero_shot_inputs
from hasten.compress.technique import sqnr
from hasten.measure.latency import Protocol, compare
from hasten.studies import _quantization as part
from hasten.studies._vision_models import accuracy
from hasten.studies.study import Check, Scale, Study

SEEDS = 5
_TOKEN = Int(8, PerToken(), dynamic=True)


def run(scale: Scale) -> Iterator[Check]:
    """See the module."""
    scale.progress("identities", 0.0)
    yield from identities(scale)
    scale.progress("bytes", 0.15)
    yield from bytes_on_disk()
    scale.progress("observers", 0.2)
    yield from observers(scale)
    scale.progress("accuracy", 0.3)
    yield from ladder(scale)
    scale.progress("time", 0.85)
    yield from cpu_time(scale)
    scale.progress("GPU", 0.98)
    yield from gpu_time()


def identities(scale: Scale) -> Iterator[Check]:
    """What holds exactly, or within float32."""
    generator = torch.Generator().manual_seed(scale.seed)
    x = torch.randn(64, 256, generator=generator) * torch.exp(torch.randn(64, 1, generator=generator))
    formats = [
        Int(b, g, symmetric=s)
        for b in (2, 3, 4, 8)
        for g in (PerTensor(), PerChannel(0), PerGroup(1, 48))
        for s in (True, False)
    ]
    formats_all = [*formats, *(MiniFloat(e, m, granularity=PerChannel(0)) for e in range(5) for m in range(4) if e + m)]
    twice, zeros, worst = 0, 0, 0.0
    for fmt in formats_all:
        padded = torch.cat([x, torch.zeros(64, 1)], 1)
        scales, zero = fmt.find(padded)
        once = fmt.fake(padded, scales, zero)
        twice += int((fmt.fake(once, scales, zero) != once).sum())
        zeros += int((once[:, -1] != 0).sum())
        if isinstance(fmt, Int):
            step = fmt.spread(scales, tuple(padded.shape))
            offset = 0.0 if zero is None else fmt.spread(zero, tuple(padded.shape))
            inside = (padded >= (fmt.lowest - offset) * step) & (padded <= (fmt.highest - offset) * step)
            worst = max(worst, float(((once - padded).abs() / step)[inside].max()))
    yield Check.equal("values that change when rounded twice", twice, 0, "", f"{len(formats_all)} formats")
    yield Check.equal("zeros that are not zero afterwards", zeros, 0)
    yield Check.at_most(
        "largest error inside the range, in steps", worst, 0.5 * (1 + 1e-5), "", "integers of 2 to 8 bits"
    )
    for symmetric in (True, False):
        worst = 0.0
        for seed in range(200):
            worst = max(worst, _integer_error(seed, symmetric))
        which = "without" if symmetric else "with"
        yield Check.at_most(
            f"int8 path against its simulation, {which} zero point", worst, 1e-5, "", "200 random layers"
        )
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=16), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10),
    )  # fmt: skip
    for norm in (net[1], net[4]):
        nn.init.uniform_(norm.running_var, 0.2, 4.0)  # type: ignore[arg-type]
        nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
        nn.init.uniform_(norm.weight, 0.2, 4.0)  # type: ignore[arg-type]
    net.eval()
    images = torch.randn(8, 3, 12, 12, generator=generator)
    with torch.no_grad():
        before = net(images)
        fold_batch_norm(net)
        yield Check.at_most("folding of normalisations, relative change", part.relative(net(images), before), 1e-5)
        layers = [n for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        Equalise().rewrite(Work(net, layers, None, None, Calibration([images])))
        yield Check.at_most("equalisation, relative change", part.relative(net(images), before), 1e-5)


def _integer_error(seed: int, symmetric: bool) -> float:
    """Largest difference of one random layer's integer and simulated results over the largest result."""
    layer, x = part.random_layer(seed)
    told = describe(layer)
    weight = Int(8, PerChannel(0)).quantize(layer.weight.detach().flatten(1))  # type: ignore[operator]
    fmt = Int(8, symmetric=symmetric)
    step, zero = fmt.find(x)
    code = 0 if zero is None else int(zero)
    total = accumulate(fmt.quantize(x, step, zero).codes, weight.codes, told, code)
    channel = -1 if told["kind"] == "Linear" else 1
    own = total.movedim(channel, -1).double() - code * weight.codes.sum(1).double()
    real = (own * weight.scales.double().reshape(-1) * float(step)).movedim(-1, channel)
    bias = None if layer.bias is None else layer.bias.detach()  # type: ignore[operator]
    if bias is not None:
        shape = [1] * real.dim()
        shape[channel] = -1
        real = real + bias.double().view(shape)
    simulated = convolve(fmt.fake(x, step, zero), weight.dequantize().view(told["shape"]), bias, told)
    return float((real - simulated).abs().max() / simulated.abs().max())


def bytes_on_disk() -> Iterator[Check]:
    """A million parameters, saved."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512))
    full = 4 * sum(p.numel() for p in model.parameters())
    for name, fmt, bound in (
        ("int8", Int(8, PerChannel(0)), 0.27),
        ("int4, groups of 32", Int(4, PerGroup(1, 32)), 0.16),
    ):
        with tempfile.TemporaryDirectory() as folder:
            size = save(Quantize(fmt, real="never")(model), Path(folder)).stat().st_size
        yield Check.at_most(f"bytes on disk over float32, {name}", size / full, bound, "×", f"{full // 4} parameters")


def observers(scale: Scale) -> Iterator[Check]:
    """Range search against extremes, 4 bits."""
    gains: dict[str, list[float]] = {}
    for seed in range(8):
        for name, x in part.distributions(100_000, scale.seed + seed).items():
            plain, searched = (sqnr(x, f.fake(x)) for f in (Int(4), Int(4, observer=Mse())))
            gains.setdefault(name, []).append(searched - plain)
    heavy, flat = np.mean(gains["Student t, 4 degrees"]), np.mean(gains["uniform"])
    yield Check.at_least(
        "range search over extremes, Student t", float(heavy), 5.0, "dB", "int4, mean of 8 draws of 1e5"
    )
    yield Check.at_most("range search over extremes, uniform", float(flat), 1.0, "dB", "int4, mean of 8 draws of 1e5")


def ladder(scale: Scale) -> Iterator[Check]:
    """Accuracy and noise over bits, on digits and where it is there on Fashion-MNIST."""
    data = part.digits_of(scale)
    if data is None:
        yield Check.unavailable("accuracy on digits", "scikit-learn is not installed", "points")
        return
    seeds = scale.choose(2, SEEDS)
    for kind, epochs in (("mlp", 30), ("cnn", scale.choose(6, 20))):
        lost: dict[str, list[float]] = {"W8A8": [], "W4A8": [], "W2": [], "W2 trained": []}
        noise: list[list[float]] = []
        for seed in range(seeds):
            model = part.network(kind, data, epochs, scale.seed + seed)
            given = part.batches(data, 512)
            whole = accuracy(model, data[2], data[3])
            for name, fmt in (("W8A8", Int(8, PerChannel(0))), ("W4A8", Int(4, PerChannel(0)))):
                lost[name].append(whole - accuracy(Quantize(fmt, _TOKEN)(model, given), data[2], data[3]))
            lost["W2"].append(whole - accuracy(Quantize(Int(2, PerChannel(0)))(model), data[2], data[3]))
            order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(seed))
            pairs = [(data[0][i], data[1][i]) for i in order.split(64)]
            aware = QuantizeAware(Int(2, PerChannel(0)), epochs=8, rate=2e-3, loss="cross-entropy", seed=seed)
            lost["W2 trained"].append(whole - accuracy(aware(model, pairs), data[2], data[3]))
            folded = nn.Sequential(*model) if isinstance(model, nn.Sequential) else model
            noise.append([_noise(folded, fmt) for fmt in (PerTensor(), PerChannel(0), PerGroup(1, 16))])
        points = {k: 100 * float(np.mean(v)) for k, v in lost.items()}
        note = f"{seeds} seeds"
        yield Check.at_most(f"{kind}: accuracy lost by W8A8", points["W8A8"], 0.5, "points", note)
        yield Check.at_most(f"{kind}: accuracy lost by W4A8 per channel", points["W4A8"], 2.0, "points", note)
        yield Check.at_least(
            f"{kind}: W2 rounding below W2 training", points["W2"] - points["W2 trained"], 5.0, "points",
            f"{note}; lost {points['W2']:.1f} by rounding, {points['W2 trained']:.1f} by training",
        )  # fmt: skip
        yield Check.at_least(
            f"{kind}: share of the W2 loss that training recovers",
            1 - points["W2 trained"] / max(points["W2"], 1e-9), 0.5,
        )  # fmt: skip
        if kind == "cnn":
            yield from without_data(scale, data, epochs, seeds)
        means = np.mean(noise, 0)
        gaps = [means[1] - means[0], means[2] - means[1]]
        yield Check.at_least(
            f"{kind}: least gain in SQNR from tensor to channel to groups of 16, 3 bits", float(min(gaps)), 1e-9, "dB",
            f"mean SQNR of weights {means[0]:.1f}, {means[1]:.1f}, {means[2]:.1f} dB",
        )  # fmt: skip
    yield from _fashion(scale)


def without_data(scale: Scale, data: part.Images, epochs: int, seeds: int) -> Iterator[Check]:
    """Static ranges of 4-bit inputs from images, from inputs made up of the normalisations' statistics, and from noise;
    with 6 bits no range matters here."""
    lost: dict[str, list[float]] = {"images": [], "statistics": [], "noise": []}
    ratio: dict[str, list[float]] = {"images": [], "statistics": [], "noise": []}
    for seed in range(seeds):
        model = part.network("cnn", data, epochs, scale.seed + seed)
        made = zero_shot_inputs(model, (64, *data[0].shape[1:]), steps=scale.choose(60, 200), seed=seed)
        noise = torch.randn(made.shape, generator=torch.Generator().manual_seed(seed))
        whole = accuracy(model, data[2], data[3])
        for name, given in (("images", data[0][:64]), ("statistics", made), ("noise", noise)):
            small = Quantize(Int(8, PerChannel(0)), Int(4, symmetric=False), real="never")(model, [given])
            lost[name].append(whole - accuracy(small, data[2], data[3]))
            with torch.no_grad():
                ratio[name].append(sqnr(model(data[2]), small(data[2])))
    points, noises = ({k: np.array(v) for k, v in found.items()} for found in (lost, ratio))
    told = "W8A4 by calibration on " + ", ".join(
        f"{k}: {100 * points[k].mean():.2f} points lost, SQNR {noises[k].mean():.1f} dB" for k in points
    )
    apart = 100 * (points["images"] - points["statistics"])
    yield Check.at_least(
        "cnn: accuracy with made-up calibration minus with images", float(apart.mean()), -0.5, "points",
        f"{told}; {part.by_seed(apart)}",
    )  # fmt: skip
    apart = noises["statistics"] - noises["noise"]
    yield Check.at_least(
        "cnn: SQNR of outputs with made-up calibration minus with noise", float(apart.mean()), 0.0, "dB",
        part.by_seed(apart),
    )  # fmt: skip


def _noise(model: nn.Module, granularity: PerTensor | PerChannel | PerGroup) -> float:
    """Mean SQNR of the weights at 3 bits."""
    weights = [m.weight.detach().flatten(1) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return float(np.mean([sqnr(w, Int(3, granularity).fake(w)) for w in weights]))


def _fashion(scale: Scale) -> Iterator[Check]:
    name = "Fashion-MNIST: accuracy lost by {}"
    data = part.fashion(scale)
    if data is None or scale.quick:
        why = "vision/fashion_mnist.npz is not here" if data is None else "training takes minutes; run without --quick"
        yield Check.unavailable(name.format("W8A8"), why, "points")
        return
    for kind, epochs in (("residual", 4), ("transformer", 6)):
        model = part.network(kind, data, epochs, scale.seed)
        whole, given = accuracy(model, data[2], data[3]), part.batches(data, 512)
        for label, fmt, bound in (
            ("W8A8", Int(8, PerChannel(0)), 0.5),
            ("W4A8 per channel", Int(4, PerChannel(0)), 2.0),
        ):
            lost = 100 * (whole - accuracy(Quantize(fmt, _TOKEN)(model, given), data[2], data[3]))
            note = f"float32 {100 * whole:.1f} %, 14 x 14 images, {kind}"
            yield Check.at_most(name.format(f"{label}, {kind}"), lost, bound, "points", note)


def cpu_time(scale: Scale) -> Iterator[Check]:
    """int8 with inputs rounded in each call against float32, and whether the table's choice is the fastest."""
    present = [k.name for k in kernels.available()]
    if "int8-dynamic" not in present:
        yield Check.unavailable("int8 over float32", "this processor's torch has no int8 product", "×")
        return
    rules = Protocol(warmup=2, warmup_time=0.0, min_samples=scale.choose(9, 41), min_time=0.0, max_time=10.0)
    threads = torch.get_num_threads()
    generator = torch.Generator().manual_seed(scale.seed)
    for rows, size in ((1, 4096), (64, 1024)):
        weight = torch.randn(size, size, generator=generator) * size**-0.5
        x = torch.randn(rows, size, generator=generator)
        calls = {n: _call(n, weight, x) for n in ("fp32", "int8-dynamic")}
        with torch.inference_mode():
            times = {n: s.summary.minimum for n, s in compare(calls, rules).samples.items()}
        yield Check.at_least(
            f"int8 over float32, {rows} x {size} x {size}", times["fp32"] / times["int8-dynamic"], 3.0, "×",
            f"{threads} threads, float32 inputs, least of several, warm weight; float32 {times['fp32'] * 1e6:.0f} us",
        )  # fmt: skip
    measured = kernels.measure_kernels((256, 256), 1, ["fp32", "int8-dynamic"], refresh=True, inputs=torch.float32)
    own = [n for n in ("int8-panels",) if n in present]
    beside = kernels.measure_kernels((256, 256), 1, own, inputs=torch.float32) if own else {}
    told = ", ".join(f"{n} {t * 1e6:.1f} us" for n, t in {**measured, **beside}.items())
    chosen = min(measured, key=lambda n: measured[n])
    yield Check.equal(
        "kernel selected at 1 x 256 x 256, float32 inputs, of float32 and torch's int8", chosen, "fp32",
        note=f"{told}; rounding the input costs more than the product saves",
    )  # fmt: skip
    worst, where = 0.0, ""
    names = [
        n
        for n in ("fp32", "bf16-packed", "int8-weight", "int8-dynamic", "int4-g32", "int8-panels", "int4-panels")
        if n in present
    ]
    for rows, size in ((1, 256), (16, 512), (1, 1024), (64, 1024)):
        chosen = kernels.fastest((size, size), rows, ("fp32", "bf16", "int8", "int4"), names=names)
        turns = [kernels.measure_kernels((size, size), rows, names, refresh=True) for _ in range(3)]
        again = {n: min(t[n] for t in turns) for n in turns[0]}  # a neighbour on the machine only ever adds time
        ratio = again[chosen] / min(again.values())
        if ratio > worst:
            worst, where = ratio, f"{chosen} at {rows} x {size} x {size}"
    yield Check.at_most(
        "time of the selected kernel over the fastest, measured again", worst, 1.1, "×", f"worst: {where}"
    )


def _call(name: str, weight: torch.Tensor, x: torch.Tensor):  # type: ignore[no-untyped-def]
    kernel = kernels.kernel(name)
    packed = kernel.pack(weight)
    return lambda: kernel.run(x, packed)


def gpu_time() -> Iterator[Check]:
    """int8 and fp8 products against bfloat16 at 4096³; told, not judged."""
    name = "{} over bfloat16, 4096 x 4096 x 4096, GPU"
    if not torch.cuda.is_available():
        yield Check.unavailable(name.format("int8 and fp8"), "no GPU here", "×")
        return
    size = 4096
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    whole = torch.randint(-127, 127, (size, size), device="cuda", dtype=torch.int8)
    eight = a.to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")
    calls: dict[str, Any] = {
        "bf16": lambda: a @ a,
        "int8": lambda: torch._int_mm(whole, whole.t()),
        "fp8": lambda: torch._scaled_mm(eight, eight.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16),
    }
    times: dict[str, float] = {}
    event: Any = torch.cuda.Event
    for kind, go in calls.items():
        for _ in range(3):
            go()
        marks = [event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        for _ in range(20):
            go()
        marks[1].record()
        torch.cuda.synchronize()
        times[kind] = marks[0].elapsed_time(marks[1]) / 20e3
    for kind in ("int8", "fp8"):
        yield Check(
            name.format(kind), times["bf16"] / times[kind], "×", "", None, f"told only; {torch.cuda.get_device_name()}"
        )


study = Study(
    system="quantization-survey",
    claim="Integers of 8 and 4 bits keep accuracy with the right granularity, at a fourth or an eighth of the size.",
    published={
        "float to 4 bits or fewer": "potential 16x in memory footprint and latency (abstract)",
        "practice": "4x to 8x often realised (abstract)",
    },
    run=run,
)
