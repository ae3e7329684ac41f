"""Adaptive computation modules: tokens that need less get less, at hardly any loss, and in less time.

"Adaptive Computation Modules: Granular Conditional Computation For Efficient Inference", Wójcik et al. 2023,
arXiv:2312.10193. A vision transformer on Fashion-MNIST, its feed-forwards adaptive; baselines have as many
multiply-adds and as many epochs. Its size was chosen on training images held out, so that width is worth something.
A quick run takes scikit-learn's digits.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from hasten.studies.study import Check, Scale, Study

__all__ = ["study"]

_IMAGES = 12_000
"""of Fashion-MNIST that are trained on; the 3,000 behind them chose the transformer's size and the rates"""


def run(scale: Scale) -> Iterator[Check]:
    """The checks of the card."""
    yield from exact(scale)
    scale.progress("training", 0.05)
    yield from vision(scale)
    yield from linear(scale)
    yield Check.unavailable("near-linear latency in executed learners on a GPU", "no GPU here", "R²")
    scale.progress("done", 1.0)


def exact(scale: Scale) -> Iterator[Check]:
    """Sorted runs against all learners with masks, values and gradients."""
    import torch

    from hasten.compress.acm import AdaptiveComputation

    torch.manual_seed(scale.seed)
    worst = slope = 0.0
    for learners, least in ((4, 0), (4, 1), (7, 0), (1, 0)):
        layer = AdaptiveComputation(width=16, learners=learners, size=5, least=least)
        for counts in (
            torch.randint(least, learners + 1, (60,)), torch.full((60,), least), torch.full((60,), learners),
            torch.where(torch.arange(60) < 3, learners, least),
        ):  # fmt: skip
            z = torch.randn(60, 16, requires_grad=True)
            choice = torch.nn.functional.one_hot(counts - least, learners + 1 - least).float()
            grads = []
            made = []
            for out in (layer.sparse(z, counts), layer.masked(z, choice)):
                made.append(out.detach())
                wanted = [z, layer.into, layer.bias, layer.out]
                grads.append(torch.autograd.grad(out.sin().sum() + 0 * z.sum(), wanted, allow_unused=True))
            worst = max(worst, float((made[0] - made[1]).abs().max()))
            for one, two in zip(*grads, strict=True):
                a, b = (torch.zeros(1) if g is None else g for g in (one, two))
                slope = max(slope, float((a - b).abs().max()))
    yield Check.at_most("sorted execution less the masked sum", worst, 1e-5, note="random, empty and single groups")
    yield Check.at_most("its gradients less those of the masked sum", slope, 1e-5)


def _data(scale: Scale) -> tuple[Any, Any, Any, Any, str] | None:
    if not scale.quick:
        from hasten.studies import _spiking

        found = _spiking.fashion(scale)
        if found is not None:
            x, y, tx, ty = found
            return x[:_IMAGES], y[:_IMAGES], tx, ty, f"Fashion-MNIST, {_IMAGES:,} images"
    from hasten.studies._vision_models import digits

    some = digits(scale.seed)
    return None if some is None else (*some, "digits")


def _tune(model: Any, batches: list[Any], epochs: int, rate: float, seed: int) -> Any:
    """Plain training of what is there."""
    import torch

    from hasten.studies._vision_models import classify
    from hasten.train.fit import fit

    def order(epoch: int) -> list[Any]:
        generator = torch.Generator().manual_seed(seed * 1009 + epoch)
        return [batches[i] for i in torch.randperm(len(batches), generator=generator)]

    fit(model, order, classify, epochs, rate, seed=seed)
    return model.eval()


def _exits(base: Any, batches: list[Any], epochs: int, rate: float, seed: int) -> Any:
    """Logits of a head behind every layer, (images, layers, classes), after joint training."""
    import torch
    from torch import nn

    from hasten.train.fit import fit

    class Exits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = copy.deepcopy(base)
            width = base.head.in_features
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in base.layers[:-1])
            self.heads = nn.ModuleList(nn.Linear(width, base.head.out_features) for _ in base.layers[:-1])

        def forward(self, x: Any) -> Any:
            net = self.base
            rows = net.patches(x).flatten(2).transpose(1, 2)
            rows = torch.cat([net.token.expand(len(rows), -1, -1), rows], 1) + net.position
            logits = []
            for index, layer in enumerate(net.layers):
                rows = layer(rows)
                norm, head = (
                    (net.norm, net.head) if index == len(net.layers) - 1 else (self.norms[index], self.heads[index])
                )
                logits.append(head(norm(rows)[:, 0]))
            return torch.stack(logits, 1)

    torch.manual_seed(seed)
    model = Exits()

    def loss(one: nn.Module, batch: Any) -> Any:
        x, y = batch
        made = one(x)
        return nn.functional.cross_entropy(made.flatten(0, 1), y.repeat_interleave(made.shape[1]))

    fit(model, list(batches), loss, epochs, rate, seed=seed)
    return model.eval()


def _exit_accuracy(model: Any, fit_on: Any, x: Any, y: Any, share: float) -> float:
    """Accuracy when exits are taken by a confidence that spends ``share`` of the layers, found on training images."""
    import torch

    def run(images: Any) -> Any:
        with torch.inference_mode():
            return torch.cat([model(part) for part in images.split(500)])

    def depth(logits: Any, threshold: float) -> Any:
        sure = logits.softmax(-1).amax(-1) >= threshold
        sure[:, -1] = True
        return sure.float().argmax(1)

    known = run(fit_on)
    levels = known.shape[1]
    grid = torch.linspace(0.1, 1.0, 400)
    spent = torch.tensor([float((depth(known, t) + 1).float().mean()) / levels for t in grid.tolist()])
    threshold = float(grid[(spent - share).abs().argmin()])
    logits = run(x)
    chosen = depth(logits, threshold)
    return float((logits[torch.arange(len(x)), chosen].argmax(-1) == y).float().mean())


def vision(scale: Scale) -> Iterator[Check]:
    """The transformer: distillation, budgets, baselines, what gates look at, time."""
    import torch

    from hasten.compress.acm import ACM, executed_share, load_map, set_budget, set_fixed
    from hasten.compress.acm.technique import adaptive_layers
    from hasten.measure.counting import cost
    from hasten.studies._vision_models import VisionTransformer, accuracy, train

    data = _data(scale)
    if data is None:
        yield Check.unavailable(
            "a vision transformer at half its budget", "neither Fashion-MNIST nor scikit-learn is here"
        )
        return
    x, y, tx, ty, source = data
    size = x.shape[-1]
    # With patches of 7, width 64 and 3,000 images one learner everywhere is as good as four: nothing could be shown.
    patch, width, layers, heads = (4, 32, 2, 4) if size == 28 else (2, 64, 4, 4)
    epochs = scale.choose(quick=(25, 5, 4, 12), full=(10, 2, 2, 3))
    seeds = scale.choose(quick=1, full=3)
    others = (0.75, 0.6, 0.4)
    rate = 1e-3
    technique = ACM(
        learners=4, targets=("layers.*.up>down",), epochs=epochs[1], gate_epochs=epochs[2], tune_epochs=epochs[3],
        tune_rate=rate, seed=scale.seed,
    )  # fmt: skip
    scores: dict[str, list[float]] = {}
    shares: dict[float, float] = {}
    tuned: dict[float, Any] = {}
    falling: list[bool] = []
    first: Any = None
    for seed in range(seeds):
        torch.manual_seed(seed)
        base: Any = VisionTransformer(size, patch, width=width, depth=layers, heads=heads)
        base = train(base, x, y, epochs=epochs[0], seed=seed)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        batches = [(x[i], y[i]) for i in order.split(128)]
        inputs = [b[0] for b in batches]
        scores.setdefault("original", []).append(accuracy(base, tx, ty))
        learners = technique.distil(base, inputs)
        falling += _falling(base, learners, tx[:500])
        every = copy.deepcopy(learners)
        scores.setdefault("all learners", []).append(accuracy(_tune(every, batches, 1, rate / 2, seed), tx, ty))
        gated = technique.gates(learners, base, inputs, train=batches)
        for budget in (0.5, 0.25) if seed == 0 else (0.5,):
            model = technique.finetune(gated, batches, budget=budget).eval()
            scores.setdefault(f"budget {budget}", []).append(accuracy(model, tx, ty))
            if seed == 0:
                with torch.inference_mode():
                    model(tx)
                shares[budget], tuned[budget] = executed_share(model), model
        if seed == 0:
            lone = _tune(set_fixed(copy.deepcopy(learners), 1), batches, epochs[3], rate, seed)
            scores["one learner everywhere"] = [accuracy(lone, tx, ty)]
            for budget in others:  # the same weights, gates leaning elsewhere
                model = set_budget(copy.deepcopy(tuned[0.5]), inputs[:8], budget)
                scores.setdefault(f"budget {budget}, untuned", []).append(accuracy(model, tx, ty))
                with torch.inference_mode():
                    model(tx)
                shares[budget] = executed_share(model)
        example = tx[:16]
        whole = cost(base, example).macs
        inside = sum(m.cost_of(m.learners) - m.gate_cost for m in adaptive_layers(learners).values())
        tokens = (size // patch) ** 2 + 1
        spent = 0.5 * sum(m.cost_of(m.learners) for m in adaptive_layers(learners).values())  # of a token, with gates
        total = 1 - (inside - spent) * tokens * len(example) / whole
        static = set_fixed(copy.deepcopy(learners), 2)
        scores.setdefault("fixed k", []).append(accuracy(_tune(static, batches, epochs[3], rate, seed), tx, ty))
        narrow = ACM(
            learners=1, total_cost=spent / inside, targets=technique.targets, epochs=epochs[1], seed=seed
        ).distil(base, inputs)  # fmt: skip
        scores.setdefault("narrower", []).append(accuracy(_tune(narrow, batches, epochs[3], rate, seed), tx, ty))
        longer = _tune(copy.deepcopy(base), batches, epochs[3], rate, seed)
        scores.setdefault("original, longer", []).append(accuracy(longer, tx, ty))
        exits = _exits(base, batches, epochs[3], rate, seed)
        scores.setdefault("early exit", []).append(_exit_accuracy(exits, x[:2000], tx, ty, total))
        first = first or (base, total)
        told = ", ".join(f"{n} {v[-1]:.3f}" for n, v in scores.items() if len(v) > seed)
        scale.progress(f"seed {seed}: {told}", 0.05 + 0.85 * (seed + 1) / seeds)
    taken = {"fixed k": 0.5, "narrower": spent / inside, "gated": spent / inside}
    mean = {n: float(np.mean(v)) for n, v in scores.items()}
    shown = ", ".join(f"{n} {v:.3f}" for n, v in mean.items())
    yield Check.at_least(
        "share of layers whose error falls with every learner",
        float(np.mean(falling)),
        0.95,
        "",
        "means on unseen images",
    )
    yield Check.at_least(
        "accuracy with all learners over the original", mean["all learners"] / mean["original"], 0.97, "×",
        "after distillation and one epoch of tuning",
    )  # fmt: skip
    for budget, share in sorted(shares.items(), reverse=True):
        yield Check.within(
            f"executed share at budget {budget:.0%}", share, budget - 0.03, budget + 0.03, "", "unseen images"
        )
    base, total = first
    yield _counted(tuned[0.5], tx[:32])
    yield Check.at_least(
        "accuracy at budget 50 % less that of the original", mean["budget 0.5"] - mean["original"], -0.01, "",
        f"{shown}; {source}, {seeds} seeds",
    )  # fmt: skip
    flat = ", ".join(f"{k} {v:.3f}" for k, v in _of_every_width(tuned[0.5], tx, ty).items())
    for name in ("fixed k", "narrower", "early exit"):
        note = f"at {total:.0%} of the model's multiply-adds" if name == "early exit" else "as many epochs"
        if name in taken:
            note += f"; {taken[name]:.3f} of the feed-forwards' multiply-adds against {taken['gated']:.3f} with gates"
        gain = mean["budget 0.5"] - mean[name]
        each = ", ".join(f"{a - b:+.3f}" for a, b in zip(scores["budget 0.5"], scores[name], strict=True))
        note = f"{note}; seed by seed {each}; the tuned model with as many learners for every token: {flat}"
        yield Check(f"accuracy at budget 50 % less that of {name}", gain, "", "> 0", gain > 0, note)
    scale.progress("what gates look at", 0.92)
    yield from _looks(base, tuned[0.5], tx, ty, size, patch, load_map)
    scale.progress("time", 0.95)
    yield from _times(scale, base, tuned[0.25], tx)


def _of_every_width(model: Any, x: Any, y: Any) -> dict[int, float]:
    """Accuracy with the same number of learners for every token: what width is worth here at all."""
    from hasten.compress.acm import set_fixed
    from hasten.studies._vision_models import accuracy

    return {k: accuracy(set_fixed(copy.deepcopy(model), k), x, y) for k in (1, 2, 3, 4)}


def _falling(base: Any, learners: Any, x: Any) -> list[bool]:
    """For each layer: does the mean error fall with every learner?"""
    import torch

    from hasten.compress.acm.labels import pairs

    targets = learners.acm_targets
    found = []
    with torch.no_grad():
        for target, (z, y) in zip(targets, pairs(base, targets, x), strict=True):
            errors = (learners.get_submodule(target.name).prefixes(z) - y).square().mean((1, 2)).tolist()
            found.append(all(b <= a for a, b in zip(errors, errors[1:], strict=False)))
    return found


def _counted(model: Any, x: Any) -> Check:
    """Operators counted one by one against the formula."""
    from hasten.compress.acm import set_fixed
    from hasten.compress.acm.technique import adaptive_layers
    from hasten.measure.counting import cost

    counted = cost(model, x).macs
    spent = 0.0
    for layer in adaptive_layers(model).values():
        spent += float(layer.last.numel() * layer.gate_cost + layer.last.sum() * (layer.cost_of(1) - layer.gate_cost))  # type: ignore[union-attr]
    none = set_fixed(copy.deepcopy(model), 0)
    rest = cost(none, x).macs
    gap = abs(counted - rest - spent) / counted
    return Check.at_most("multiply-adds counted by operator against the formula, relative gap", gap, 1e-6)


def _looks(base: Any, model: Any, x: Any, y: Any, size: int, patch: int, load_map: Any) -> Iterator[Check]:
    import torch

    maps = load_map(model, x)
    loads = torch.stack([m.double() for m in maps.values()])  # (layers, images, tokens)
    with torch.inference_mode():
        losses = torch.nn.functional.cross_entropy(base(x), y, reduction="none").double()
    each = loads.mean((0, 2))
    joined = torch.stack([each, losses.clamp(max=losses.quantile(0.99))])
    yield Check.at_least(
        "correlation of an image's learners with the original's loss", float(torch.corrcoef(joined)[0, 1]), 0.2, "",
        f"{len(x)} unseen images; learners of an image {float(each.min()):.2f} to {float(each.max()):.2f}; where width "
        "hardly changes the loss, its gradient tells gates nothing about which images are hard",
    )  # fmt: skip
    side = size // patch
    blank = x.unflatten(2, (side, patch)).unflatten(4, (side, patch)).amax((1, 3, 5)).flatten(1) < 0.05
    patches = loads[:, :, 1:].mean(0)
    empty, drawn = float(patches[blank].mean()), float(patches[~blank].mean())
    layers = ", ".join(
        f"{float(one[:, 1:][blank].mean()):.2f} and {float(one[:, 1:][~blank].mean()):.2f}" for one in loads
    )
    yield Check(
        "learners of a blank patch", empty, "", f"< {drawn:.2f}", empty < drawn,
        f"against those of patches with strokes; layer by layer {layers}; nothing reads a patch behind the last layer, "
        "so there only the terms for entropy and for differences say how many run",
    )  # fmt: skip


def _times(scale: Scale, base: Any, model: Any, x: Any) -> Iterator[Check]:
    """The trained model, and one of the width that is called tiny, whose gates lean to the same share untrained."""
    import torch

    from hasten.compress.acm import ACM, executed_share, measure_gates, set_budget, set_fixed
    from hasten.measure import Protocol, compare
    from hasten.studies._vision_models import VisionTransformer

    rounds = scale.choose(quick=5, full=21)
    torch.manual_seed(scale.seed)
    size = x.shape[-1]
    wide: Any = VisionTransformer(size, 4 if size == 28 else 2, width=192, depth=4, heads=3).eval()
    lean = ACM(targets=("layers.*.up>down",), epochs=1, gate_epochs=1, tune_epochs=0)(wide, [x[:8]]).eval()
    set_budget(lean, [x[:32]], 0.25)
    for name, one, other in (
        (f"trained, width {base.head.in_features}", base, model),
        ("ViT-tiny's width 192, untrained", wide, lean),
    ):
        notes, gain, share = [], {}, 0.0
        fewest = max(measure_gates(other).values())
        bare = set_fixed(copy.deepcopy(other), 0)
        rules = Protocol(warmup=3, warmup_time=0.0, min_samples=rounds, max_samples=rounds, min_time=0.0)
        with torch.inference_mode():
            for batch in (1, 64):
                rows = x[:batch]
                found = compare(
                    {"original": partial(one, rows), "adaptive": partial(other, rows), "bare": partial(bare, rows)},
                    rules,
                )
                gain[batch] = found.speedup("adaptive").value
                times = [s.median * 1e3 for s in found.samples.values()]
                notes.append(
                    f"batch {batch}: {times[0]:.2f} to {times[1]:.2f} ms ({gain[batch]:.2f}×; without any feed-forward "
                    f"it would be {found.speedup('bare').value:.2f}×)"
                )
            share = executed_share(other)
        notes.append(f"gates are asked from {fewest} tokens on")
        yield Check.at_least(
            f"speed over the original at budget 25 %, batch 64, {name}", gain[64], 1.3, "×",
            f"{'; '.join(notes)}; {share:.0%} of the adaptive layers' multiply-adds",
        )  # fmt: skip
        yield _at_once(name, one, other, x[:1], rules)


def _at_once(name: str, one: Any, other: Any, x: Any, rules: Any) -> Check:
    """One image through the whole network in one call, where nothing is spent between operations."""
    import torch

    from hasten.compress.fused import FusedModule
    from hasten.errors import ConfigurationError
    from hasten.measure import compare
    from hasten.nn.product.instructions import has_bytes

    title = f"speed of one image at budget 25 %, both networks in one call, {name}"
    if not has_bytes():
        return Check.unavailable(title, "this processor has no registers of 512 bits", "×")
    calls = {"original": partial(one, x)}
    for precision in ("fp32", "int8"):
        for kind, model in (("original", one), ("adaptive", other)):
            calls[f"{kind} {precision}"] = partial(FusedModule(copy.deepcopy(model).eval(), precision), x)
    try:
        with torch.inference_mode():
            found = compare(calls, rules)
    except ConfigurationError as reason:
        return Check.unavailable(title, str(reason), "×")
    times = {n: s.median for n, s in found.samples.items()}
    gain = times["original fp32"] / times["adaptive fp32"]
    shown = ", ".join(f"{n} {t * 1e6:.0f} µs" for n, t in times.items())
    return Check.at_least(title, gain, 1.0, "×", f"float32; {shown}; the first as torch runs it")


def linear(scale: Scale) -> Iterator[Check]:
    """Time of one layer against the number of learners that its tokens take, by any gate."""
    import torch

    from hasten.compress.acm import AdaptiveComputation
    from hasten.measure import Protocol, compare

    torch.manual_seed(scale.seed)
    layer = AdaptiveComputation(width=192, learners=4, size=192).eval()
    z = torch.randn(scale.choose(quick=800, full=3200), 192)
    means = [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]
    counts = [torch.full((len(z),), int(m)) + (torch.rand(len(z)) < m % 1) for m in means]
    rounds = scale.choose(quick=7, full=21)
    rules = Protocol(warmup=2, warmup_time=0.0, min_samples=rounds, max_samples=rounds, min_time=0.0)
    with torch.inference_mode():
        calls = {f"{m}": partial(layer.gated, z, c) for m, c in zip(means, counts, strict=True)}
        found = compare({**calls, "no gate": partial(layer.prefix, z, layer.learners)}, rules).samples
    times = [found[f"{m}"].median for m in means]
    taken = [float(c.double().mean()) for c in counts]
    fit = float(np.corrcoef(taken, times)[0, 1]) ** 2
    shown = ", ".join(f"{m:g}: {t * 1e3:.2f}" for m, t in zip(means, times, strict=True))
    yield Check.at_least(
        "time of a layer is linear in the learners that run (R²)", fit, 0.95, "",
        f"width 192, {len(z):,} tokens, {torch.get_num_threads()} threads; milliseconds by mean {shown}; all learners "
        f"without a gate {found['no gate'].median * 1e3:.2f}",
    )  # fmt: skip


study = Study(
    system="acm",
    claim="Learners chosen per token by a gate cut the computation of transformers a lot at no loss, for any budget.",
    published={
        "ImageNet-1k ViT-B, CommonVoice Wav2Vec": "on the Pareto front of computation and quality, against token "
        "dropping, MoEfication and early exit (paper page)",
        "GPU kernel": "latency near linear in executed learners (paper page)",
    },
    run=run,
)
