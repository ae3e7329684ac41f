"""Maestro: ordered low-rank training recovers SVD and PCA, and gives a family of sizes from one run.

"Maestro: Uncovering Low-Rank Structures via Trainable Decomposition", Horváth et al. 2023, arXiv:2308.14929. Linear
maps from random factors, digits, and small networks on Fashion-MNIST (scikit-learn's digits in a quick run). The
baseline is the SVD of the trained network, tuned for each size. Maestro trains towards each size with as many epochs,
and once for all sizes of a family, cutting one layer at a time as published or all at once too; its two knobs are
searched on training images held out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from hasten.studies.study import Check, Scale, Study

__all__ = ["study"]


def run(scale: Scale) -> Iterator[Check]:
    """The checks of the card."""
    yield from recovery(scale)
    scale.progress("principal components", 0.2)
    yield from principal(scale)
    scale.progress("networks", 0.3)
    yield from networks(scale)
    scale.progress("latency", 0.95)
    yield from latency(scale)
    scale.progress("done", 1.0)


def _fit(matrix: Any, sample: Any, steps: int, seed: int, ordered: bool = True, rate: float = 0.02) -> tuple[Any, Any]:
    """Factors U, V (d, r) from random ones, trained so that every prefix maps x to A x."""
    import torch

    from hasten.compress.lowrank.ordered import OrderedLinear, RankSampler

    generator = torch.Generator().manual_seed(seed)
    out, inner = matrix.shape
    rank = min(out, inner)
    layer = OrderedLinear(
        torch.randn(out, rank, generator=generator) * 0.3, torch.randn(inner, rank, generator=generator) * 0.3, None
    )
    optimiser = torch.optim.Adam(layer.parameters(), lr=rate)
    sampler = RankSampler(seed)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        x = sample(generator)
        if ordered:
            with sampler.drawn({"": layer}):
                made = layer(x)
        else:
            made = layer(x)
        loss = (made - x @ matrix.T).square().sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return layer.left.detach(), layer.right.detach()


def _prefix_errors(left: Any, right: Any, matrix: Any, root: Any = None) -> list[float]:
    """``|(U_k V_kᵀ - A_k) Σ^½| / |A Σ^½|`` of every prefix, A_k the best one in that norm."""
    import torch

    norm = matrix if root is None else matrix @ root
    u, s, v = torch.linalg.svd(norm, full_matrices=False)
    errors = []
    for k in range(1, len(s) + 1):
        made = left[:, :k] @ right[:, :k].T
        made = made if root is None else made @ root
        errors.append(float((made - (u[:, :k] * s[:k]) @ v[:k]).norm() / norm.norm()))
    return errors


def recovery(scale: Scale) -> Iterator[Check]:
    """Linear maps of 16 numbers, from random factors."""
    import torch

    generator = torch.Generator().manual_seed(scale.seed)
    size, steps = 16, scale.choose(quick=1500, full=6000)
    left, right = (torch.linalg.qr(torch.randn(size, size, generator=generator))[0] for _ in range(2))

    def sphere(g: Any) -> Any:
        x = torch.randn(128, size, generator=g)
        return x / x.norm(dim=1, keepdim=True) * size**0.5

    spread = torch.linspace(4, 0.25, size)
    even = left @ torch.diag(spread) @ right
    found = _fit(even, sphere, steps, scale.seed)
    errors = _prefix_errors(*found, even)
    shown = ", ".join(f"k = {k} {errors[k - 1]:.3f}" for k in (1, 2, 4, 8, 16))
    products = (found[0].norm(dim=0) * found[1].norm(dim=0))[:4].tolist()
    yield Check.at_most(
        "worst prefix against the SVD, singular values 4 to 0.25 evenly", max(errors), 0.15, "",
        f"{shown}; norms of the first {', '.join(f'{p:.2f}' for p in products)}; {steps} steps, random start",
    )  # fmt: skip
    plain = _prefix_errors(*_fit(even, sphere, steps, scale.seed, ordered=False), even)
    yield Check.at_least(
        "mean prefix error without ordering over with", float(np.mean(plain[:-1]) / np.mean(errors[:-1])), 5.0, "×",
        f"without {np.mean(plain[:-1]):.3f}",
    )  # fmt: skip
    falling = left @ torch.diag(4 * 0.6 ** torch.arange(size).float()) @ right
    errors = _prefix_errors(*_fit(falling, sphere, steps, scale.seed), falling)
    yield Check.at_most("worst prefix against the SVD, singular values falling by 0.6", max(errors), 0.03)
    scale.progress("anisotropic data", 0.15)
    turn = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    root = turn @ torch.diag(0.75 ** torch.arange(size).float() * 2) @ turn.T
    found = _fit(even, lambda g: torch.randn(256, size, generator=g) @ root, steps, scale.seed)
    mine = float(np.mean(_prefix_errors(*found, even, root)[: size // 2]))
    u, s, v = torch.linalg.svd(even)
    other = float(np.mean(_prefix_errors(u * s, v.T, even, root)[: size // 2]))
    yield Check.at_least(
        "data-aware: distance of the SVD of A to that of A Σ^½, over ours", other / mine, 2.0, "×",
        f"{other:.3f} over {mine:.3f}, in the norm of the data, first half of the prefixes",
    )  # fmt: skip


def principal(scale: Scale) -> Iterator[Check]:
    """A linear autoencoder on digits: the ordered factors are principal components."""
    import torch

    names = (
        "worst prefix error over that of PCA, k ≤ 16",
        "angle to the principal directions, up to 8, where the eigengap allows",
    )
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        for name in names:
            yield Check.unavailable(name, "scikit-learn is not installed; pip install hasten[digits]")
        return
    x = torch.from_numpy(load_digits().data).float()
    x = (x - x.mean(0)) / 16
    steps = scale.choose(quick=1500, full=12000)

    def sample(g: Any) -> Any:
        return x[torch.randint(0, len(x), (256,), generator=g)]

    left, right = _fit(torch.eye(64), sample, steps, scale.seed, rate=0.01)
    _, values, vectors = torch.linalg.svd(x, full_matrices=False)
    total = float(values.square().sum())
    worst = 0.0
    for k in range(1, 17):
        made = float((x - x @ right[:, :k] @ left[:, :k].T).square().sum())
        worst = max(worst, made / float(total - values[:k].square().sum()))
    yield Check.at_most(names[0], worst, 1.03, "×", f"{steps} steps of 256 digits, from random factors")

    def angle(k: int) -> float:
        cosines = torch.linalg.svdvals(torch.linalg.qr(left[:, :k])[0].T @ vectors[:k].T)
        return float(torch.rad2deg(torch.acos(cosines.min().clamp(max=1))))

    # A subspace is only defined where the next singular value is another one.
    gaps = (values[:8] / values[1:9]).tolist()
    apart = max(k for k in range(1, 9) if gaps[k - 1] >= 1.1)
    yield Check.at_most(
        names[1], angle(apart), 10.0, "degree",
        f"first {apart} directions, then values differ by {gaps[apart - 1]:.2f}×; of the first 8 {angle(8):.0f} "
        f"degrees, values 8 and 9 differ by {gaps[7]:.2f}× only",
    )  # fmt: skip


def _data(scale: Scale) -> tuple[Any, Any, Any, Any, str] | None:
    """Images (n, 1, h, w) and labels for training, the last fifth of them for the search, and for tests."""

    if not scale.quick:
        from hasten.studies import _spiking

        found = _spiking.fashion(scale)
        if found is not None:
            x, y, tx, ty = found
            return x[:5000], y[:5000], tx, ty, "Fashion-MNIST, 4,000 images"
    from hasten.studies._vision_models import digits

    some = digits(scale.seed)
    return None if some is None else (*some, "digits")


def _mlp(size: int, seed: int) -> Any:
    import torch
    from torch import nn

    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(size, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def _cnn(seed: int) -> Any:
    import torch
    from torch import nn

    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def _at_share(model: Any, share: float, example: Any) -> tuple[Any, dict[str, int]]:
    """The model with the layers that Maestro decomposes (all but the last) factored by SVD to this share of their
    weights."""
    from hasten.compress.lowrank.layers import FactorConv2d, LowRankLinear

    small = copy.deepcopy(model)
    from torch import nn

    names = [n for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv2d)][:-1]
    ranks = {}
    for name in names:
        layer: Any = model.get_submodule(name)
        out, inner = layer.weight.flatten(1).shape
        rank = max(1, int(share * out * inner / (out + inner)))
        ranks[name] = rank
        if rank * (out + inner) < out * inner:
            kind: Any = LowRankLinear if isinstance(layer, nn.Linear) else FactorConv2d
            small.set_submodule(name, kind.of(layer, rank))
    return small, ranks


def networks(scale: Scale) -> Iterator[Check]:
    """One training for all sizes against the SVD of the trained network, tuned for each size."""
    from dataclasses import replace

    import torch

    from hasten.compress.lowrank.maestro import Maestro, recalibrate
    from hasten.compress.lowrank.search import search_maestro
    from hasten.studies._vision_models import accuracy, train

    names = (
        "family against tuned SVD",
        "tuned SVD against SVD",
        "full model against dense training",
        "family is monotone",
    )
    data = _data(scale)
    if data is None:
        for name in names:
            yield Check.unavailable(name, "neither Fashion-MNIST nor scikit-learn is here")
        return
    x, y, tx, ty, source = data
    held = len(x) // 5
    judged = list(zip(x[-held:].split(500), y[-held:].split(500), strict=True))
    x, y = x[:-held], y[:-held]
    epochs = scale.choose(quick=3, full=6)
    seeds = scale.choose(quick=1, full=3)
    shares = (0.5, 0.25, 0.1)
    kinds = {"MLP": lambda s: _mlp(x[0].numel(), s), "CNN": _cnn}
    found: dict[tuple[str, str, float], list[float]] = {}
    stale: list[float] = []
    chosen: dict[str, Maestro] = {}
    spread: dict[str, str] = {}
    tries: dict[str, Any] = scale.choose(quick={"group_lassos": (1e-6, 1e-4), "shrinks": (1e-2,)}, full={})
    for seed in range(seeds):
        for index, (kind, make) in enumerate(kinds.items()):
            base = train(make(seed), x, y, epochs=epochs, seed=seed)
            found.setdefault((kind, "dense", 1.0), []).append(accuracy(base, tx, ty))
            longer = train(copy.deepcopy(base), x, y, epochs=epochs, rate=1e-3, seed=seed + 50)
            found.setdefault((kind, "dense, longer", 1.0), []).append(accuracy(longer, tx, ty))
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
            batches = [(x[i], y[i]) for i in order.split(128)]
            seen = batches[: scale.choose(quick=2, full=8)]
            if kind not in chosen:  # with the first seed's network, for all seeds
                plain = Maestro(epochs=epochs, rate=1e-3, seed=seed)
                chosen[kind], trials = search_maestro(
                    plain, base, batches, judged, shares, calibrate=len(seen), **tries
                )  # fmt: skip
                spread[kind] = (
                    f"group lasso {trials[0].group_lasso:g} and shrink {trials[0].shrink:g} of {len(trials)} pairs, "
                    f"loss {trials[0].mean:.3f} on images held out, the worst {trials[-1].mean:.3f}"
                )
            technique = replace(chosen[kind], seed=seed)
            small: Any = technique(base, batches)
            found.setdefault((kind, "maestro", 1.0), []).append(accuracy(small.eval(), tx, ty))
            joint: Any = replace(technique, down_to=min(shares))(base, batches)
            found.setdefault((kind, "joint", 1.0), []).append(accuracy(joint.eval(), tx, ty))
            for member, share in zip(joint.fit.family(shares, seen), shares, strict=True):
                found.setdefault((kind, "joint", share), []).append(accuracy(member.model, tx, ty))
            for member, share in zip(small.fit.family(shares, seen), shares, strict=True):
                found.setdefault((kind, "maestro", share), []).append(accuracy(member.model, tx, ty))
                cut, _ = _at_share(base, member.share, x[:1])
                found.setdefault((kind, "svd", share), []).append(
                    accuracy(recalibrate(cut, [b[0] for b in seen]), tx, ty)
                )
                tuned = train(copy.deepcopy(cut), x, y, epochs=epochs, rate=1e-3, seed=seed + 50)
                found.setdefault((kind, "tuned svd", share), []).append(accuracy(tuned, tx, ty))
                sized = replace(technique, share=share)(base, batches)
                found.setdefault((kind, "sized", share), []).append(accuracy(sized.eval(), tx, ty))
                if kind == "CNN" and share == 0.25:
                    old = small.fit.deploy(member.ranks)
                    stale.append(accuracy(member.model, tx, ty) - accuracy(old, tx, ty))
            scale.progress(f"{kind}, seed {seed}", 0.3 + 0.65 * (2 * seed + index + 1) / (2 * seeds))
    mean = {k: float(np.mean(v)) for k, v in found.items()}
    for kind in kinds:
        for share in shares:
            a, b, c, d = (mean[kind, n, share] for n in ("maestro", "tuned svd", "svd", "sized"))
            each = ", ".join(
                f"{one - two:+.3f}"
                for one, two in zip(found[kind, "sized", share], found[kind, "tuned svd", share], strict=True)
            )
            yield Check.at_least(
                f"{kind} at {share:.0%}: accuracy trained towards this size less that of tuned SVD", d - b, 0.0, "",
                f"{d:.3f} against {b:.3f}, as many epochs after the same network; seed by seed {each}; {spread[kind]}",
            )  # fmt: skip
            yield Check.at_least(
                f"{kind} at {share:.0%}: accuracy of the family less that of tuned SVD", a - b, 0.0, "",
                f"family {a:.3f} without tuning at this size, tuned SVD {b:.3f}, SVD {c:.3f}; {source}, {seeds} seeds",
            )  # fmt: skip
            e = mean[kind, "joint", share]
            yield Check.at_least(
                f"{kind} at {share:.0%}: accuracy of the family whose small sizes were trained less that of tuned SVD",
                e - b, 0.0, "", f"family {e:.3f} without tuning at this size (not published: every second cut pass is "
                f"of all layers at once), cut one layer at a time {a:.3f}",
            )  # fmt: skip
            yield Check.at_least(f"{kind} at {share:.0%}: accuracy of tuned SVD less that of SVD", b - c, 0.0)
            yield Check.at_least(f"{kind} at {share:.0%}: accuracy of the family less that of SVD", a - c, 0.0)
        whole = mean[kind, "maestro", 1.0] - mean[kind, "dense, longer", 1.0]
        yield Check.at_least(
            f"{kind}: full model less dense training of as many epochs", whole, -0.01, "",
            f"dense {mean[kind, 'dense, longer', 1.0]:.3f}; with small sizes trained {mean[kind, 'joint', 1.0]:.3f}",
        )  # fmt: skip
        curve = [mean[kind, "maestro", s] for s in (1.0, *shares)]
        rise = max(b - a for a, b in zip(curve, curve[1:], strict=False))
        yield Check.at_most(
            f"{kind}: rise of accuracy along the falling family", rise, 0.005, "", ", ".join(f"{c:.3f}" for c in curve)
        )
    yield Check.at_least(
        "CNN at 25 %: accuracy gained by normalisation statistics computed anew", float(np.mean(stale)), 0.02
    )


def latency(scale: Scale) -> Iterator[Check]:
    """Wall time of pruned layers of 1,024 numbers at batch 64."""
    import torch

    from hasten.compress.lowrank.ordered import OrderedLinear
    from hasten.measure import Protocol, compare

    size = scale.choose(quick=512, full=1024)
    torch.manual_seed(scale.seed)
    layer = OrderedLinear.of(torch.nn.Linear(size, size))
    x = torch.randn(64, size)
    ranks = [size // 2, size // 4, size // 8, size // 16]
    made: dict[str, Any] = {"dense": layer.deployed(size, True)}
    made |= {f"rank {r}": layer.deployed(r, False) for r in ranks}
    rounds = scale.choose(quick=9, full=101)
    with torch.inference_mode():
        found = compare(
            {n: partial(m, x) for n, m in made.items()},
            Protocol(warmup=3, warmup_time=0.0, min_samples=rounds, max_samples=rounds, min_time=0.0),
        )
    times = {n: s.median for n, s in found.samples.items()}
    shown = ", ".join(f"{n} {t * 1e6:.0f} µs" for n, t in times.items())
    falling = [times[f"rank {r}"] for r in ranks[1:]]
    yield Check(
        "time falls with rank", times[f"rank {ranks[-1]}"] * 1e6, "µs", "falling",
        all(a > b for a, b in zip(falling, falling[1:], strict=False)), f"{shown}; {size} numbers, batch 64",
    )  # fmt: skip
    from hasten.compress.lowrank.maestro import MaestroFit

    model = torch.nn.Sequential(layer)
    fit = MaestroFit(model, {"0": ranks[0] - 1}, (), (), torch.nn.functional.mse_loss)
    slow: Any = fit.deploy({"0": size // 2 + size // 4})
    yield Check.equal("one matrix where two would read more", type(slow[0]).__name__, "Linear")


study = Study(
    system="maestro",
    claim="Ordered dropout on ranks recovers SVD and PCA where these are optimal, and trains networks whose ranks "
    "can be cut afterwards without retraining.",
    published={
        "linear map, uniform data": "recovers SVD (abstract)",
        "linear autoencoder": "recovers PCA (abstract)",
        "networks": "lower footprint at preserved quality, graceful trade-off (abstract, no number)",
    },
    run=run,
)
