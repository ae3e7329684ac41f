"""SVDQuant: with a low-rank branch for the outliers, four-bit weights and activations keep a diffusion model's images.

"SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models", Li et al. 2024, arXiv:2411.05007. One
layer with outliers, and a small diffusion transformer on scikit-learn's digits (groups of 32, for its width is 96) with
paired images at equal seeds. Sizes by files on disk.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hasten.studies.study import Check, Scale, Study

__all__ = ["study"]


def run(scale: Scale) -> Iterator[Check]:
    """The checks of the card."""
    yield from exact(scale)
    scale.progress("a layer with outliers", 0.1)
    yield from outliers(scale)
    scale.progress("bytes", 0.2)
    yield from sizes(scale)
    scale.progress("time of a branch", 0.25)
    yield from fusing(scale)
    scale.progress("diffusion", 0.3)
    yield from diffusion(scale)
    yield Check.unavailable("fused against naive branch on a GPU", "the fused kernel is made for the CPU here", "×")
    scale.progress("done", 1.0)


def _layer(seed: int, size: int, rows: int) -> tuple[Any, Any]:
    """A weight (size, size) with 4 columns x 4, and inputs (rows, size) with 8 channels x 30."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, size, generator=generator)
    weight = torch.randn(size, size, generator=generator) / size**0.5
    x[:, torch.randperm(size, generator=generator)[:8]] *= 30
    weight[:, torch.randperm(size, generator=generator)[:4]] *= 4
    return weight, x


def exact(scale: Scale) -> Iterator[Check]:
    """What loses nothing."""
    import torch
    from torch import nn

    from hasten.compress.lowrank.absorb import absorb, smoothing
    from hasten.compress.lowrank.fourbit import pack_codes, unpack_codes
    from hasten.compress.lowrank.svdquant import SvdQuant, add_lora

    weight, x = _layer(scale.seed, 128, 256)
    full = absorb(weight, x, rank=128, dtype=torch.float32, grid=5)
    yield Check.at_most("relative output error at full rank", full.error, 1e-5)
    made = absorb(weight, x, rank=16, grid=0, dtype=torch.float32)
    tail = torch.linalg.svdvals(weight.double())[16:].square().sum().sqrt()
    gap = (weight.double() - made.up.double() @ made.down.double()).norm()
    yield Check.at_most("truncation error less the tail of singular values, relative", abs(float(gap / tail) - 1), 1e-6)
    vector, expected = smoothing(x, weight, 0.5), x @ weight.T
    smoothed = float(((x / vector) @ (weight * vector).T - expected).norm() / expected.norm())
    yield Check.at_most("output changed by smoothing alone, float32", smoothed, 1e-6)
    model = nn.Sequential(nn.Linear(128, 128))
    model[0].weight.data = weight
    small = SvdQuant(rank=8, branch="float32", grid=5, iterations=2)(model, [x])
    generator = torch.Generator().manual_seed(scale.seed)
    a, b = (0.1 * torch.randn(*s, generator=generator) for s in ((4, 128), (128, 4)))
    wide: Any = add_lora(small, {"0.lora_A.weight": a, "0.lora_B.weight": b}, scale=0.8)
    before: Any = small
    lost = wide[0].effective_weight() - before[0].effective_weight() - 0.8 * b.double() @ a.double()
    yield Check.at_most("weight after an adapter, less W + BA", float(lost.abs().max()), 1e-6, note="codes untouched")
    codes = torch.randint(-8, 8, (300, 400), generator=generator).to(torch.int8)
    yield Check.equal("codes changed by packing", int((unpack_codes(pack_codes(codes)) != codes).sum()), 0)


def outliers(scale: Scale) -> Iterator[Check]:
    """The layer of the card: 512 x 512, 1,024 rows, groups of 64."""
    from hasten.compress.lowrank.absorb import absorb, error_bound
    from hasten.compress.quantize import Int, PerGroup

    size = scale.choose(quick=256, full=512)
    grid = scale.choose(quick=8, full=20)
    weight, x = _layer(scale.seed, size, 2 * size)
    naive = absorb(weight, x, rank=0, grid=0).error
    smooth = absorb(weight, x, rank=0, grid=grid).error
    unsmoothed = absorb(weight, x, rank=32, grid=0).error
    ranks = {r: absorb(weight, x, rank=r, grid=grid).error for r in (8, 16, 32)}
    again = absorb(weight, x, rank=32, grid=grid, iterations=10).error
    rounded = absorb(weight, x, rank=32, grid=grid, iterations=10, use_gptq=True).error
    shown = (
        f"naive {naive:.3f}, smoothing {smooth:.3f}, rank 32 without smoothing {unsmoothed:.3f}, "
        + ", ".join(f"r = {r} {e:.3f}" for r, e in ranks.items())
        + f", 10 rounds {again:.4f}, with GPTQ {rounded:.4f}"
    )
    yield Check.at_most("output error, best smoothing over naive", smooth / naive, 0.5, "×", shown)
    yield Check.at_most("output error, rank 32 over best smoothing", ranks[32] / smooth, 0.5, "×")
    yield Check(
        "output error falls with rank", ranks[32], "", f"< {ranks[16]:.4f} < {ranks[8]:.4f}",
        ranks[32] < ranks[16] < ranks[8],
    )  # fmt: skip
    yield Check.at_most("output error, iterated over round 0", again / ranks[32], 1.0, "×")
    fmt = Int(4, PerGroup(1, 64))
    wq, xq = fmt.fake(weight), fmt.fake(x)
    share = float((x @ weight.T - xq @ wq.T).norm()) / error_bound(x, weight, xq, wq)
    yield Check.at_most("error of naive rounding over the published bound", share, 1.0, "×")


def sizes(scale: Scale) -> Iterator[Check]:
    """A layer of 3072 x 3072 on disk, and what the branch adds."""
    from torch import nn

    from hasten.compress.lowrank.absorb import activation_traffic
    from hasten.compress.lowrank.fourbit import SvdQuantLinear
    from hasten.compress.lowrank.svdquant import save_svdquant
    from hasten.measure.counting import cost

    layer = SvdQuantLinear(in_features=3072, out_features=3072, rank=32)
    with tempfile.TemporaryDirectory() as folder:
        save_svdquant(nn.Sequential(layer), folder)
        stored = (Path(folder) / "model.safetensors").stat().st_size
    parts = ", ".join(f"{n} {v:,}" for n, v in layer.sizes.items())
    yield Check.at_least(
        "bfloat16 file over file with branch, 3072 x 3072", 2 * 3072**2 / stored, 3.4, "×", parts + " B"
    )
    import torch

    branch = SvdQuantLinear(in_features=256, out_features=128, rank=16)
    with torch.no_grad():
        counted = cost(branch, torch.zeros(1, 256)).macs / (256 * 128) - 1
    yield Check.at_most(
        "counted multiply-adds of the branch less r (K + N) / (K N)", abs(counted - branch.overhead), 1e-12,
        note=f"{layer.overhead:.2%} at 3072 x 3072, rank 32",
    )  # fmt: skip
    ratio = activation_traffic(3072, 3072, fused=False) / activation_traffic(3072, 3072, fused=True)
    yield Check.at_least(
        "activation bytes, naive branch over fused (model)", ratio, 2.0, "×", "published: 57 % more latency at rank 32"
    )


def fusing(scale: Scale) -> Iterator[Check]:
    """Time of the branch on this processor: its own passes against passes shared with the product."""
    import torch

    from hasten.compress.lowrank.fourbit import SvdQuantLinear
    from hasten.measure import Protocol, compare

    size = scale.choose(quick=512, full=1536)
    layer = SvdQuantLinear(in_features=size, out_features=size, rank=32, execution="fast")
    alone = SvdQuantLinear(in_features=size, out_features=size, rank=0, execution="fast")
    plain = torch.nn.Linear(size, size, bias=False).bfloat16()
    x = torch.randn(256, size, generator=torch.Generator().manual_seed(scale.seed)).bfloat16()
    rounds = scale.choose(quick=7, full=41)
    rules = Protocol(warmup=2, warmup_time=0.0, min_samples=rounds, max_samples=rounds, min_time=0.0)
    with torch.inference_mode():
        found = compare(
            {
                "naive": lambda: layer.unfused(x), "fused": lambda: layer(x), "no branch": lambda: alone(x),
                "bfloat16": lambda: plain(x),
            },
            rules,
        )  # fmt: skip
    times = {n: s.median for n, s in found.samples.items()}
    shown = ", ".join(f"{n} {t * 1e3:.2f} ms" for n, t in times.items())
    yield Check.at_least(
        "time, naive branch over fused", found.speedup("fused").value, 1.0, "×",
        f"{shown}; 256 rows of {size}; products of 8 or 16 bits, the faster one, stand for those of 4",
    )  # fmt: skip


def _with_outliers(model: Any, factor: float = 30.0) -> Any:
    """The same function with outliers inside: channels grow before a layer and its columns shrink."""
    import torch

    new = copy.deepcopy(model)
    width = model.config.width
    with torch.no_grad():
        for index, block in enumerate(new.blocks):
            channel = (7 * index + 3) % width
            block.attn.qkv.weight[2 * width + channel] *= factor  # a value channel, linear up to the output matrix
            block.attn.qkv.bias[2 * width + channel] *= factor
            block.attn.proj.weight[:, channel] /= factor
            for start, layer in ((0, block.attn.qkv), (3 * width, block.mlp.fc1)):  # what modulates the norms
                place = (11 * index + 5 + start) % width
                shift, stretch = start + place, start + width + place
                block.adaLN.weight[[shift, stretch]] *= factor
                block.adaLN.bias[shift] *= factor
                block.adaLN.bias[stretch] = factor * (block.adaLN.bias[stretch] + 1) - 1
                layer.weight[:, place] /= factor
    return new


def diffusion(scale: Scale) -> Iterator[Check]:
    """Images of the rounded models against those of the original at equal seeds."""
    import torch

    from hasten.compress.lowrank.stages import stages
    from hasten.compress.lowrank.svdquant import SvdQuant
    from hasten.diffusion import Sampler, frechet_distance, trajectories
    from hasten.studies import _diffusion_digits as digits

    names = (
        "image error, smoothing over naive", "image error, rank 8 over smoothing", "image error, rank 16 over rank 8",
        "image error with outliers put in, rank 8 over smoothing",
        "share of the diffusion model's layers that the branch brings closer than smoothing alone",
    )  # fmt: skip
    data = digits.images()
    if data is None:
        for name in names:
            yield Check.unavailable(name, "scikit-learn is not installed; pip install hasten[digits]", "×")
        return
    preset, steps = scale.choose(quick=("dit-tiny", 200), full=("dit-digits", 2500))
    model: Any = digits.trained(preset, steps, 0, lambda stage, share: scale.progress("training", 0.3 + 0.3 * share))
    features = digits.features(0, scale.choose(quick=5, full=30))
    count, seeds = scale.choose(quick=(20, 1), full=(200, 3))
    sampler = Sampler(steps=scale.choose(quick=6, full=20))
    labels = torch.arange(count) % 10
    shape = (count, 1, 8, 8)
    common: dict[str, Any] = {"group": 32, "shift": False, "grid": scale.choose(quick=5, full=20)}
    rivals = {
        "naive": SvdQuant(rank=0, **{**common, "grid": 0}),
        "smoothing": SvdQuant(rank=0, **common),
        "rank 8": SvdQuant(rank=8, iterations=10, **common),
        "rank 16": SvdQuant(rank=16, iterations=10, **common),
    }
    errors: dict[str, list[float]] = {}
    distances: dict[str, list[float]] = {}
    branch: dict[str, str] = {}
    layers: dict[str, Any] = {}
    for seed in range(seeds):
        for kind, original in (("", model), ("outliers: ", _with_outliers(model))):
            calibration = trajectories(original, sampler, (64, 1, 8, 8), seed=100 + seed, labels=torch.arange(64) % 10)
            truth = sampler(original, shape, seed=seed, labels=labels)
            if seed == 0:
                layers[kind] = stages(original, calibration, rivals["rank 8"])
            distances.setdefault(kind + "original", []).append(frechet_distance(features(truth), features(data[0])))
            for name, technique in rivals.items():
                small: Any = technique(original, calibration)
                made = sampler(small, shape, seed=seed, labels=labels)
                errors.setdefault(kind + name, []).append(float((made - truth).square().mean()))
                distances.setdefault(kind + name, []).append(frechet_distance(features(made), features(data[0])))
                parts = small.report.measured
                branch[name] = f"{parts['bytes_branch'] / max(parts['bytes_codes'], 1):.0%}"
        scale.progress(f"seed {seed}", 0.6 + 0.4 * (seed + 1) / seeds)
    mean = {n: float(np.mean(v)) for n, v in errors.items()}

    def check(name: str, small: str, large: str, bound: float, note: str) -> Check:
        each = ", ".join(f"{a / b:.2f}" for a, b in zip(errors[small], errors[large], strict=True))
        return Check.at_most(name, mean[small] / mean[large], bound, "×", f"{note}; each seed {each}")

    shown = ", ".join(f"{n} {v:.1e}" for n, v in mean.items() if not n.startswith("outliers"))
    far = ", ".join(f"{n} {np.mean(v):.2f}" for n, v in distances.items() if not n.startswith("outliers"))
    yield check(names[0], "smoothing", "naive", 1.0, f"mean squared error: {shown}")
    yield check(
        names[1], "rank 8", "smoothing", 0.5,
        f"bytes of the branch over the codes': rank 8 {branch['rank 8']}, rank 16 {branch['rank 16']}; distance "
        f"of features to the data: {far}",
    )  # fmt: skip
    yield check(names[2], "rank 16", "rank 8", 1.0, f"{seeds} seeds of {count} images")
    shown = ", ".join(f"{n.removeprefix('outliers: ')} {v:.1e}" for n, v in mean.items() if n.startswith("outliers"))
    yield check(names[3], "outliers: rank 8", "outliers: smoothing", 0.5, shown)
    rows = [row for found in layers.values() for row in found.layers.values()]
    told = "; ".join(
        f"{kind or 'as trained: '}" + ", ".join(f"{s} {found.median(s):.3f}" for s in rows[0])
        for kind, found in layers.items()
    )
    yield Check.at_least(
        names[4], float(np.mean([row["rounds"] < row["smoothing"] for row in rows])), 0.9,
        note=f"{len(rows)} layers, rank 8; median relative error of a layer's output, {told}",
    )  # fmt: skip


study = Study(
    system="svdquant",
    claim="A 16-bit low-rank branch absorbs the outliers that smoothing moves into the weights, so that 4-bit weights "
    "and activations keep image quality, at a few percent of extra work if the branch is fused.",
    published={
        "FLUX.1 12B": "3.5x less memory than 16 bit; 3.0x faster than 4-bit weights alone on a 16 GB laptop (abstract)",
        "naive rank-32 branch": "57 % more latency than fused (repository)",
        "FLUX.1-dev INT4, FID / LPIPS / PSNR": "19.9 / 0.223 / 21.0, naive W4A4 20.2 / 0.322 / 18.5 (repository)",
    },
    run=run,
)
