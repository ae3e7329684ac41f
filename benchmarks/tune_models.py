"""One call of ``tune`` on a language model, a ResNet, a vision transformer and a time-series transformer.

Each search has the same budget line, its own data and the recipes that suit its kind beside the space's own; printed
are the verdict, the frontier, and how long the search took.

    python benchmarks/tune_models.py --weights FOLDER --time-limit 60
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import hasten.tune
from hasten.clock import MonotonicClock
from hasten.compress import Quantize, Recipe
from hasten.compress.quantize import Gptq, SmoothQuant

BUDGET = "quality>98%"
"""Without a bound on time the fastest that keeps the quality is the best."""
Case = tuple[nn.Module, Sequence[Any], Callable[[nn.Module], float] | None, Sequence[Any], Sequence[Recipe]]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="folder with cifar10_resnet20.npz; random weights without")
    parser.add_argument("--only", action="append", choices=list(CASES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", default=BUDGET)
    parser.add_argument("--reports", type=Path, help="write each search's page into this folder")
    parser.add_argument("--time-limit", type=float, default=60.0, help="of each search, seconds")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    clock = MonotonicClock()
    for name in chosen.only or CASES:
        model, data, quality, calibration, recipes = CASES[name](chosen.weights)
        began = clock.now()
        result = hasten.tune.tune(
            model,
            data,
            chosen.budget,
            quality=quality,
            calibration=calibration,
            recipes=recipes,
            time_limit=chosen.time_limit,
        )
        print(f"{name}: {clock.now() - began:.0f} s; {result.verdict()}")
        if chosen.reports is not None:
            chosen.reports.mkdir(parents=True, exist_ok=True)
            result.report(chosen.reports / f"{name}.html")
        for c in sorted(result.frontier.candidates, key=lambda c: c.values.get("latency@p50", 1.0)):
            if c.measured:
                v = c.values
                print(f"    {c.name:58} {1e3 * v['latency@p50']:8.3f} ms  quality {100 * v['quality']:6.2f} %  "
                      f"{v['size'] / 1e6:7.3f} MB{'' if c.feasible else '  ' + '; '.join(c.violations)}")  # fmt: skip
            else:
                print(f"    {c.name:58} {c.violations[0]}")


def language(weights: Path | None) -> Case:
    """pycode-4m as a module, one piece of 128 tokens; quality is the inverse perplexity on pieces not calibrated on."""
    from hasten.language import load
    from hasten.language.compressing import float_decoder, loss_of

    loaded = load("pycode-4m")
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = "".join((folder / f"{n}.py").read_text() for n in ("heapq", "bisect", "csv", "cmd", "sched"))
    pieces = torch.tensor(loaded.tokenizer.encode(text)).split(128)[:48]
    held = torch.stack(list(pieces[:16]))

    def quality(model: nn.Module) -> float:
        with torch.inference_mode():
            return float(torch.exp(-loss_of(model, held)))

    recipes = (
        Recipe((Quantize.scheme("W4A16", steps=(Gptq(),), skip=("lm_head",), tokens=128),)),
        Recipe((Quantize.scheme("W8A8", steps=(SmoothQuant(),), skip=("lm_head",), tokens=128),)),
    )
    return float_decoder(loaded), [held[:1]], quality, [p[None] for p in pieces[16:]], recipes


def residual(weights: Path | None) -> Case:
    """ResNet-20 with its CIFAR-10 weights, fitted to photographs of hands that show digits; quality is the accuracy on
    a quarter of them. (The images of CIFAR-10 are not in the data. Hands of one pupil may stand on both sides of the
    split.) Without weights and photographs: random weights, noise, and the fidelity of the logits."""
    from compress import ResNet

    torch.manual_seed(0)
    recipes = (Recipe((Quantize.scheme("W8A8"),)), Recipe((Quantize.scheme("W4A16", steps=(Gptq(),)),)))
    photographs = None if weights is None else weights.parent / "vision" / "sign_digits_32.npz"
    if weights is None or photographs is None or not photographs.exists():
        model, noise = ResNet().eval(), [torch.randn(8, 3, 32, 32) for _ in range(8)]
        return model, [torch.randn(1, 3, 32, 32)], None, noise, recipes
    from hasten.spiking.checkpoint import trained
    from hasten.studies._vision_models import accuracy, train

    held = np.load(photographs)
    order = torch.randperm(len(held["y"]), generator=torch.Generator().manual_seed(0))
    x = (torch.from_numpy(held["x"]).permute(0, 3, 1, 2).float() / 255)[order]
    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    y, part = torch.from_numpy(held["y"]).long()[order], len(order) // 4
    stored = np.load(weights / "cifar10_resnet20.npz")
    begin = {k: torch.from_numpy(np.array(stored[k])) for k in stored.files}

    def learn(x: torch.Tensor, y: torch.Tensor, *, epochs: int, checkpoint: Path) -> dict[str, torch.Tensor]:
        model = ResNet()
        model.load_state_dict(begin)
        model.linear.reset_parameters()
        return train(model, x, y, epochs=epochs, size=64).state_dict()

    model = ResNet()
    model.load_state_dict(trained("tune-residual", learn, {"epochs": 8}, {"x": x[part:], "y": y[part:]}))
    model.eval()
    return (
        model,
        [x[:1], x[:64]],
        lambda m: accuracy(m, x[:part], y[:part]),
        list(x[part : part + 256].split(8)),
        recipes,
    )


def vision(weights: Path | None) -> Case:
    """A vision transformer trained for a few epochs on scikit-learn's digits, with conditional computation."""
    from hasten.compress.acm import ACM
    from hasten.spiking.checkpoint import trained
    from hasten.studies._vision_models import VisionTransformer, accuracy, digits, train

    images = digits()
    if images is None:
        raise SystemExit("the vision transformer needs scikit-learn: pip install 'hasten[digits]'")
    x, y, tx, ty = images

    def learn(x: torch.Tensor, y: torch.Tensor, *, epochs: int, checkpoint: Path) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return train(VisionTransformer(size=8, patch=2, width=128), x, y, epochs=epochs).state_dict()

    model = VisionTransformer(size=8, patch=2, width=128)
    model.load_state_dict(trained("tune-transformer", learn, {"epochs": 15}, {"x": x, "y": y}))
    span = ("layers.*.up>down",)
    recipes = (
        Recipe((Quantize.scheme("W8A8", steps=(SmoothQuant(),), tokens=17),)),
        Recipe((ACM(epochs=2, targets=span),)),
        Recipe((ACM(epochs=2, targets=span), Quantize.scheme("W8A16"))),
    )
    calibration = list(x.split(64))
    return model, [tx[:1], tx[:64]], lambda m: accuracy(m, tx, ty), calibration, recipes


def series(weights: Path | None) -> Case:
    """A time-series transformer trained on simulated light curves, with deep compression's parts."""
    from hasten.compress import Clustering, MagnitudePruning
    from hasten.events.gaussian_process import Kernel, grid
    from hasten.events.lightcurves import CLASSES, Survey, simulate
    from hasten.events.t2 import T2, T2Config
    from hasten.train.fit import fit

    seen, kinds = simulate(600, Survey(), 0)
    x, y = torch.from_numpy(grid(seen, Kernel(steps=10))).float(), torch.from_numpy(kinds)
    torch.manual_seed(0)
    model = T2(T2Config(bands=x.shape[-1], classes=len(CLASSES)))
    model.scale_by(x[200:])

    def batches(epoch: int) -> Any:
        order = torch.randperm(400, generator=torch.Generator().manual_seed(epoch)) + 200
        return [(x[i], y[i]) for i in order.split(64)]

    fit(model, batches, lambda m, b: functional.cross_entropy(m(b[0]), b[1]), epochs=10, rate=1e-2)
    model.eval()

    def quality(model: nn.Module) -> float:
        with torch.inference_mode():
            return float((model(x[:200]).argmax(1) == y[:200]).float().mean())

    recipes = (
        Recipe((Quantize.scheme("W8A8", tokens=100),)),
        Recipe((MagnitudePruning(0.5), Clustering(16))),
    )
    return model, [x[:1]], quality, [x[200:400]], recipes


CASES = {"language": language, "residual": residual, "vision": vision, "series": series}


if __name__ == "__main__":
    main()
