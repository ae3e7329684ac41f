"""Post-Training Quantization with Low-precision Minifloats and Integers on FPGAs: which grid for which data and
hardware.

https://arxiv.org/abs/2311.12359. The paper claims that minifloats of 3 to 8 bits hold accuracy against integers of
the same width, and that integers often remain Pareto-optimal once the multiply-accumulate's hardware is counted.
Checked: exact grids, the signal-to-noise law over four distributions, accuracy of a CNN and a vision transformer over
widths, layer errors of GPTQ and learned rounding, and the front over LUTs with the break-even of the floats' own
hardware. The best format of a width is chosen on one half of the held-out images and judged on the other, both ways;
layer errors are those on images that calibration did not see.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hasten.compress.quantize import (
    FP8_E4M3,
    FP8_E5M2,
    BiasCorrection,
    Equalise,
    Format,
    Gptq,
    Int,
    LearnedRounding,
    MiniFloat,
    Mse,
    PerChannel,
    Quantize,
    SmoothQuant,
    fold_batch_norm,
)
from hasten.compress.quantize.explore import FormatFront, formats
from hasten.compress.quantize.passes import Calibration
from hasten.compress.quantize.steps import Layer, Step, Work
from hasten.compress.technique import sqnr
from hasten.measure.fpga import Fpga, Operand
from hasten.studies import _quantization as part
from hasten.studies._vision_models import accuracy, digits
from hasten.studies.study import Check, Scale, Study

LAW = {
    ("uniform", "int4"): 22.9, ("uniform", "e2m1"): 19.2, ("Gaussian", "int4"): 14.6, ("Gaussian", "e2m1"): 17.9,
    ("Laplace", "int4"): 8.8, ("Laplace", "e2m1"): 13.1, ("Student t, 4 degrees", "int4"): 1.8,
    ("Student t, 4 degrees", "e2m1"): 4.2, ("Student t, 4 degrees", "e3m0"): 13.5,
}  # fmt: skip
"""SQNR in dB at 4 bits, scale from the extremes, as measured when the system was described."""
TECHNIQUES: tuple[tuple[Step, ...], ...] = ((), (SmoothQuant(0.5), Gptq(), BiasCorrection()))
"""Sets of steps that every format may use"""
_DRAWS, _COUNT, _NETWORKS = 48, 2**18, 7
_ONE = torch.ones(1)


def run(scale: Scale) -> Iterator[Check]:
    """See the module."""
    scale.progress("grids", 0.0)
    yield from grids(scale)
    scale.progress("law", 0.1)
    yield from law(scale)
    scale.progress("invariance", 0.2)
    yield from invariance(scale)
    scale.progress("accuracy", 0.25)
    yield from accuracy_and_hardware(scale)


def grids(scale: Scale) -> Iterator[Check]:
    """Rounding against the enumerated grid, torch's casts and those of ml_dtypes."""
    wrong, count = 0, 0
    for e, m in itertools.product(range(8), range(8)):
        if 2 <= 1 + e + m <= 8 and e + m:
            wrong += _grid_errors(MiniFloat(e, m), scale.seed)
            count += 1
    yield Check.equal(
        "values that are not the nearest of the grid", wrong, 0, "", f"{count} formats, 1e5 values and midpoints"
    )
    generator = torch.Generator().manual_seed(scale.seed)
    x = torch.randn(100_000, generator=generator) * torch.exp(3 * torch.randn(100_000, generator=generator))
    for fmt, kind in ((FP8_E4M3, torch.float8_e4m3fn), (FP8_E5M2, torch.float8_e5m2)):
        inside = torch.cat([x, fmt.grid()]).clamp(-fmt.max, fmt.max)
        other = int((fmt.encode(inside, _ONE) != inside.to(kind).view(torch.uint8)).sum())
        yield Check.equal(f"codes that differ from torch's {str(kind)[6:]}", other, 0)
    try:
        import ml_dtypes
    except ImportError:
        yield Check.unavailable("values that differ from ml_dtypes", "ml_dtypes is not installed")
        return
    other = 0
    for fmt, name in (
        (MiniFloat(2, 1), "float4_e2m1fn"),
        (MiniFloat(2, 3), "float6_e2m3fn"),
        (MiniFloat(3, 2), "float6_e3m2fn"),
    ):
        values = torch.cat([x, fmt.grid(), (fmt.grid()[1:] + fmt.grid()[:-1]) / 2])
        expected = values.numpy().astype(getattr(ml_dtypes, name)).astype(np.float32)
        other += int((fmt.quantize(values, _ONE).dequantize().numpy() != expected).sum())
    yield Check.equal("values that differ from ml_dtypes' 4- and 6-bit floats", other, 0)


def _grid_errors(fmt: MiniFloat, seed: int) -> int:
    """Values that are not the nearest of the grid written out from the definition; a tie goes to the even
    significand."""
    steps, bias = 2**fmt.m, 2 ** (fmt.e - 1) - 1 if fmt.e else 0
    positive = [
        2.0 ** (1 - bias) * mantissa / steps if exponent == 0 else 2.0 ** (exponent - bias) * (1 + mantissa / steps)
        for exponent, mantissa in itertools.product(range(2**fmt.e), range(steps))
    ]
    grid = np.unique(np.array([*positive, *(-v for v in positive)]))
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.normal(size=100_000) * grid[-1] / 2, (grid[1:] + grid[:-1]) / 2, grid, [1e30, -1e30]])
    x = x.astype(np.float32).astype(np.float64) if fmt.e <= 6 else x
    clipped = np.clip(x, grid[0], grid[-1])
    above = np.searchsorted(grid, clipped).clip(1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    inner = np.minimum(np.abs(low), np.abs(high))
    quantum = 2.0 ** (np.maximum(np.floor(np.log2(np.maximum(inner, 1e-300))), 1 - bias) - fmt.m)
    tie_low = (clipped - low == high - clipped) & (np.mod(np.round(low / quantum), 2) == 0)
    expected = np.where((clipped - low < high - clipped) | tie_low, low, high)
    kind = torch.float32 if fmt.e <= 6 else torch.float64
    got = fmt.round_to(torch.tensor(x, dtype=kind), _ONE.to(kind)).double().numpy()
    return int((got != expected).sum())


def law(scale: Scale) -> Iterator[Check]:
    """Integers win on uniform data, floats on heavy tails; with the best clip the Gaussian gap closes."""
    found: dict[tuple[str, str], list[float]] = {}
    best: dict[str, list[float]] = {}
    four: list[Format] = [Int(4), MiniFloat(2, 1), MiniFloat(3, 0)]
    worst = 0.0
    for draw in range(_DRAWS):
        for name, x in part.distributions(_COUNT, scale.seed * 1000 + draw).items():
            for fmt in four:
                found.setdefault((name, fmt.label), []).append(sqnr(x, fmt.fake(x)))
            if name == "Gaussian" and draw < 3:
                for fmt in (Int(4, observer=Mse()), MiniFloat(2, 1, observer=Mse())):
                    best.setdefault(fmt.label, []).append(sqnr(x, fmt.fake(x)))
            step = float(Int(4).find(x)[0])
            worst = max(
                worst,
                float(
                    (Int(4).fake(x, torch.tensor([step])) - MiniFloat(1, 2).fake(x, torch.tensor([step / 0.5])))
                    .abs()
                    .max()
                ),
            )
    means = {key: float(np.mean(v)) for key, v in found.items()}
    note = f"mean of {_DRAWS} draws of {_COUNT}"
    off = {key: means[key] - figure for key, figure in LAW.items()}
    key = max(off, key=lambda k: abs(off[k]))
    yield Check.at_most(
        "SQNR at 4 bits, largest distance from the recorded figures", abs(off[key]), 0.5, "dB",
        f"{note}; " + ", ".join(f"{n} {f} {means[n, f]:.1f}" for n, f in LAW),
    )  # fmt: skip
    gap = {n: means[n, "e2m1"] - means[n, "int4"] for n in part.distributions(1, 0)}
    yield Check.at_most("E2M1 over INT4, uniform", gap["uniform"], 0.0, "dB", note)
    heavy = min(v for n, v in gap.items() if n != "uniform")
    yield Check.at_least("E2M1 over INT4, least of Gaussian, Laplace, Student t", heavy, 0.0, "dB", note)
    clipped = float(np.mean(best["e2m1"])) - float(np.mean(best["int4"]))
    yield Check.within(
        "E2M1 over INT4, Gaussian, best clip", clipped, -0.5, 0.5, "dB", f"{np.mean(best['int4']):.1f} dB for INT4"
    )
    yield Check.equal("largest difference of E1M2 and INT4", worst, 0.0)


def invariance(scale: Scale) -> Iterator[Check]:
    """Equalisation and SmoothQuant compute the same in float32."""
    torch.manual_seed(scale.seed)
    residual, transformer = (
        part.make("residual", 14, scale.seed).eval(),
        part.make("transformer", 14, scale.seed).eval(),
    )
    for module in transformer.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.2, 4.0)
    x = torch.randn(16, 1, 14, 14, generator=torch.Generator().manual_seed(scale.seed))
    for name, model, step in (("equalisation", residual, Equalise()), ("SmoothQuant", transformer, SmoothQuant(0.5))):
        with torch.no_grad():
            before = model(x)
            fold_batch_norm(model)
            layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
            work = Work(model, layers, None, None, Calibration([x]))
            step.rewrite(work)
            change = part.relative(model(x), before)
        yield Check.at_most(f"{name}, relative change of the output", change, 1e-5, "", work.notes[-1])


@dataclass(frozen=True)
class _Nearest(Step):
    """Rounding to nearest, with its error measured."""

    def round(self, layer: Layer) -> Tensor | None:
        layer.hessian()
        return None


def accuracy_and_hardware(scale: Scale) -> Iterator[Check]:
    """Widths and formats on trained networks, layer errors of the rounding steps, and the front over LUTs."""
    networks: list[tuple[str, str, part.Images, int]] = []
    data = part.digits_of(scale)
    if data is not None:
        networks = [("digits", "cnn", data, scale.choose(6, 20)), ("digits", "transformer", data, scale.choose(20, 40))]
    clothes = None if scale.quick else part.fashion(scale)
    if clothes is not None:
        networks += [("Fashion-MNIST", "residual", clothes, 4), ("Fashion-MNIST", "transformer", clothes, 6)]
    if not networks:
        yield Check.unavailable(
            "accuracy over widths", "scikit-learn is not installed and there is no data folder", "points"
        )
        return
    majority: list[tuple[str, FormatFront, float]] = []
    for index, (where, kind, images, epochs) in enumerate(networks):
        model = part.network(kind, images, epochs, scale.seed)
        told = f"{where} {kind}"
        halves = Halves(images)
        whole = halves(model)
        given = part.batches(images, 256)

        def report(stage: str, share: float, index: int = index, told: str = told) -> None:
            scale.progress(f"{told}: {stage}", 0.25 + 0.75 * (index + 0.9 * share) / len(networks))

        front = formats(
            model,
            given,
            halves,
            bits=_bits(scale, where, kind),
            steps=TECHNIQUES if kind == "transformer" else ((),),
            observer=Mse(steps=40),
            progress=report,
        )
        majority.append((told, front, whole))
        several = kind == "transformer" and where == "digits" and not scale.quick
        if several:
            yield from _several(scale, told, epochs, front, halves)
        else:
            yield from _widths(told, kind, front, halves)
        if kind == "transformer" or scale.quick or where == "digits":
            yield from _layer_errors(told, model, given, images, scale)
    whole_numbers, count, notes = 0, 0, []
    for told, front, whole in majority:
        least = whole - 0.05
        chosen = front.front(worst=least)
        whole_numbers += sum(c.integer for c in chosen)
        count += len(chosen)
        flip = front.break_even(worst=least)
        edge = "flips at no factor" if flip is None else f"flips below {flip:.2f} times"
        if flip is not None and flip >= 1:
            edge = "floats are half as it is"
        notes.append(f"{told}: {', '.join(c.weight.label.split()[0] for c in chosen)} ({edge})")
    yield Check.at_least(
        "share of integers on the fronts of accuracy over LUTs", whole_numbers / max(count, 1), 0.5 + 1e-9, "",
        "within 5 points of float32; flips: factor on the floats' own hardware at which floats are half of the front; "
        + "; ".join(notes),
    )  # fmt: skip
    cost = Fpga.load().mac(Operand.of(MiniFloat(2, 1)), Operand.of(MiniFloat(2, 1)), 256)
    terms = ", ".join(f"{k} {v:.0f}" for k, v in cost.terms.items())
    yield Check("LUTs of a multiply-accumulate, E2M1, sums of 256", cost.luts, "", "", None, f"told only: {terms}")


def _bits(scale: Scale, where: str, kind: str) -> Sequence[int]:
    """Widths that are tried: all on digits, the even ones where an evaluation takes seconds."""
    if scale.quick and kind == "transformer":
        return (4, 8)
    return range(3, 9) if where == "digits" else (4, 6, 8)


class Halves:
    """Accuracy on the held-out images as a metric, which remembers that of either half for every model it sees."""

    def __init__(self, images: part.Images) -> None:
        self.images = images
        self.seen: list[tuple[float, float]] = []
        """(even images, odd images), the unchanged model first"""

    def __call__(self, model: nn.Module) -> float:
        """Of all held-out images."""
        x, y = self.images[2], self.images[3]
        even, odd = (accuracy(model, x[k::2], y[k::2]) for k in (0, 1))
        self.seen.append((even, odd))
        return (even * len(y[::2]) + odd * len(y[1::2])) / len(y)

    def best(self, front: FormatFront, bits: int, integer: bool) -> float:
        """Accuracy of the best format of a width and a kind: chosen on one half, judged on the other, both ways."""
        tried = [
            s for c, s in zip(front.candidates, self.seen[1:], strict=True)
            if c.weight.bits == bits and c.integer is integer
        ]  # fmt: skip
        return (max(tried, key=lambda s: s[0])[1] + max(tried, key=lambda s: s[1])[0]) / 2


def _gap(front: FormatFront, halves: Halves) -> float:
    """Best minifloat over best integer at 4 bits, in points."""
    return 100 * (halves.best(front, 4, False) - halves.best(front, 4, True))


def _lost(front: FormatFront, halves: Halves) -> float:
    """Accuracy that W8A8 costs, the worse of the best integer and the best minifloat, in points."""
    return 100 * (float(np.mean(halves.seen[0])) - min(halves.best(front, 8, kind) for kind in (True, False)))


def _table(front: FormatFront, halves: Halves) -> str:
    """Accuracy of the best integer and the best minifloat of every width."""
    rows = [
        f"W{b}A{b} int {100 * halves.best(front, b, True):.1f} float {100 * halves.best(front, b, False):.1f}"
        for b in sorted({c.weight.bits for c in front.candidates})
    ]
    return f"float32 {100 * np.mean(halves.seen[0]):.1f} %; {'; '.join(rows)}; {len(halves.images[3])} held-out images"


def _several(scale: Scale, told: str, epochs: int, front: FormatFront, halves: Halves) -> Iterator[Check]:
    """W4A4 and W8A8 over several networks and splits: one of 359 held-out digits is 0.28 points, so a single network
    tells nothing."""
    note = f"first network: {_table(front, halves)}"
    gaps, lost = [_gap(front, halves)], [_lost(front, halves)]
    for seed in range(scale.seed + 1, scale.seed + _NETWORKS):
        images = digits(seed)
        assert images is not None
        model = part.network("transformer", images, epochs, seed)
        halves = Halves(images)
        halves(model)
        front = formats(
            model, part.batches(images, 256), halves, bits=(4, 8), steps=TECHNIQUES, observer=Mse(steps=40)
        )  # fmt: skip
        gaps.append(_gap(front, halves))
        lost.append(_lost(front, halves))
    mean = f"mean of {len(gaps)} networks"
    yield Check.at_least(
        f"{told}: best minifloat over integer, W4A4, {mean}", float(np.mean(gaps)), -0.5, "points", part.by_seed(gaps)
    )
    yield Check.at_most(
        f"{told}: accuracy lost by W8A8, the worse of both, {mean}", float(np.mean(lost)), 0.5, "points",
        f"{part.by_seed(lost)}; {note}",
    )  # fmt: skip


def _widths(told: str, kind: str, front: FormatFront, halves: Halves) -> Iterator[Check]:
    """Best float and integer of a width, by one network."""
    note = _table(front, halves)
    if kind == "transformer":
        yield Check.at_least(f"{told}: best minifloat over integer, W4A4", _gap(front, halves), -0.5, "points", note)
    yield Check.at_most(
        f"{told}: accuracy lost by W8A8, the worse of both", _lost(front, halves), 0.5, "points", note
    )  # fmt: skip


def _layer_errors(
    told: str, model: nn.Module, given: list[Tensor], images: part.Images, scale: Scale
) -> Iterator[Check]:
    """Share of layers whose output error GPTQ and learned rounding reduce, on images that they did not see: on those
    of the calibration learned rounding is no worse by construction."""
    steps: dict[str, Step] = {"GPTQ": Gptq(), "learned rounding": LearnedRounding(scale.choose(100, 400))}
    folded = deepcopy(model)
    fold_batch_norm(folded)
    x = images[2][:256]
    for fmt in (Int(4, PerChannel(0)), MiniFloat(2, 1, granularity=PerChannel(0))):
        plain = Quantize(fmt, None, [_Nearest()], real="never")(folded, given)
        base, own = _output_errors(folded, plain, x), _told_errors(plain)
        for name, step in steps.items():
            better = Quantize(fmt, None, [step], real="never")(folded, given)
            errors, told_errors = _output_errors(folded, better, x), _told_errors(better)
            share = float(np.mean([errors[k] < base[k] for k in base]))
            ratio = float(np.median([errors[k] / base[k] for k in base]))
            fitted = float(np.median([told_errors[k] / own[k] for k in own]))
            note = (
                f"{len(base)} layers, held-out images; median error {ratio:.2f} times that of rounding to nearest "
                f"({fitted:.2f} on the calibration)"
            )
            yield Check.at_least(
                f"{told}: layers that {name} brings closer, {fmt.label.split()[0]}", share, 0.9, "", note
            )


def _told_errors(model: Any) -> dict[str, float]:
    """Layer -> error on the calibration, as its report has it."""
    return {r.layer: r.error for r in model.report.layers if r.touched}


@torch.no_grad()
def _output_errors(model: nn.Module, small: Any, x: Tensor) -> dict[str, float]:
    """Layer -> squared error of its output, for the inputs that it has in the float model."""
    found: dict[str, float] = {}
    rounded = dict(small.named_modules())

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            found[path] = float((rounded[path](*args) - out).double().square().sum())

        return hook

    layers = [r.layer for r in small.report.layers if r.touched]
    hooks = [model.get_submodule(path).register_forward_hook(watch(path)) for path in layers]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


study = Study(
    system="minifloats",
    claim="Small floats hold accuracy against integers of equal width; integers mostly win once hardware is counted.",
    published={
        "3 to 8 bits, five techniques, vision": "minifloats hold up against integers across the spectrum (abstract)",
        "with an FPGA cost model": "integers often remain Pareto-optimal (abstract)",
        "later title": "Shedding the Bits: ResNet-18, MobileNetV2, ViT-B/32; promising for vision transformers",
    },
    run=run,
)
