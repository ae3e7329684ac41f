"""Q-BERT: Hessian spectra decide the bits, small groups keep them usable.

"Q-BERT: Hessian Based Ultra Low Precision Quantization of BERT", Shen et al. 2020, arXiv:1909.05840. The claims are
rerun on a BERT of two to four layers that is trained here, on digits as eight tokens of eight pixels and on made-up
sentences; a pretrained BERT and its tasks are not within reach. Exactness is checked against dense Hessians.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hasten.compress.container import save
from hasten.compress.quantize.allocate import BitPlan, MixedPrecision
from hasten.compress.quantize.granularity import PerTensor
from hasten.compress.quantize.hessian import Hessian, lanczos, power_iteration, trace
from hasten.compress.quantize.integer import Int
from hasten.compress.quantize.mixed import MixedQuantize
from hasten.compress.quantize.observers import MovingAverage, Observer, Points
from hasten.compress.quantize.selection import RowGroups
from hasten.compress.quantize.sensitivity import HessianSpectrum, Spectrum
from hasten.compress.values import named_value
from hasten.frozen.runner import MODEL_FILE
from hasten.spiking.checkpoint import trained
from hasten.studies._bert import DigitBert, agreement, batches, classify, rows, score, train_bert
from hasten.studies._quantization import by_seed, fashion
from hasten.studies._vision_models import digits
from hasten.studies.study import Check, Scale, Study

__all__ = ["study"]

ENCODER = "encoder.layer.*"
ACTIVATION = Int(8, symmetric=False, observer=MovingAverage(0.05))
HEADS = Int(2, RowGroups(32, 4), full_range=True)
"""The published width of encoders, a range per head"""
TABLES = Int(4, full_range=True)
"""The width below the published 8 at which embedding tables lose accuracy"""
Data = tuple[Tensor, Tensor, Tensor, Tensor]


def run(scale: Scale) -> Iterator[Check]:
    """The checks of the card."""
    scale.progress("exactness", 0.0)
    yield from exactness(scale)
    images = digits(0)
    if images is None:
        yield Check.unavailable("everything on digits", "scikit-learn is not installed")
        return
    data: Data = (rows(images[0]), images[1], rows(images[2]), images[3])
    seeds = range(scale.seed, scale.seed + scale.choose(quick=1, full=3))
    shape = {"layers": scale.choose(quick=2, full=3)}
    nets = []
    for k, seed in enumerate(seeds):
        scale.progress(f"training BERT, seed {seed}", 0.05 + 0.25 * k / len(seeds))
        nets.append(prepare(scale, data, shape, seed, scale.choose(quick=18, full=26)))
    scores = [score(net, data[2], data[3])[0] for net, _ in nets]
    yield Check.at_least("accuracy of the float model on held-out digits", float(np.mean(scores)), 0.93)
    scale.progress("groups", 0.3)
    yield from groups(scale, nets, data, seeds)
    scale.progress("orders of layers", 0.6)
    spectra = [spectrum(scale, net, data) for net, _ in nets]
    yield from orders(scale, nets, spectra, data)
    yield modules(nets, data, ("feed-forward", "attention"), HEADS, "digits")
    scale.progress("size", 0.75)
    yield from size(scale, nets, spectra, data, seeds)
    scale.progress("convergence", 0.85)
    yield from probe(scale, nets, spectra, data)
    if not scale.quick:
        scale.progress("sentences", 0.88)
        yield from text(scale)
        scale.progress("Fashion-MNIST", 0.92)
        yield from clothes(scale)
    scale.progress("done", 1.0)


def exactness(scale: Scale) -> Iterator[Check]:
    """Spectra of small models against dense Hessians, and against ARPACK."""
    torch.manual_seed(scale.seed)
    model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 5)).double()
    x, y = torch.randn(200, 12).double(), torch.randint(0, 5, (200,))
    parameters = dict(model.named_parameters())
    count = sum(p.numel() for p in parameters.values())
    flat = torch.cat([p.detach().reshape(-1) for p in parameters.values()])

    def at(vector: Tensor) -> Tensor:
        pieces = vector.split([p.numel() for p in parameters.values()])
        values = {n: v.view_as(p) for (n, p), v in zip(parameters.items(), pieces, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, values, (x,)), y)

    dense: Tensor = torch.func.hessian(at)(flat).detach()
    values = torch.linalg.eigvalsh(dense)
    h = Hessian(model, classify, [(x[:120], y[:120]), (x[120:], y[120:])], {"all": list(parameters.values())})
    vector = torch.randn(count, generator=torch.Generator().manual_seed(1)).double()
    gap = float((h.product("all", vector) - dense @ vector).norm() / (dense @ vector).norm())
    yield Check.at_most("relative error of a Hessian-vector product", gap, 1e-10, note=f"{count} parameters, float64")
    ends = lanczos(h, "all", tolerance=1e-5, steps=200, seed=scale.seed)
    top, bottom = float(values[-1]), float(values[0])
    yield Check.at_most("top eigenvalue, Lanczos against dense", abs(ends.top / top - 1), 0.01)
    yield Check.at_most(
        "bottom eigenvalue, Lanczos against dense", abs(ends.bottom - bottom) / abs(bottom), 0.01,
        note=f"{bottom:.4g} beside {top:.4g}; {ends.steps} products",
    )  # fmt: skip
    largest = float(values[values.abs().argmax()])
    power, taken = power_iteration(h, "all", tolerance=1e-6, iterations=1000, seed=scale.seed)
    yield Check.at_most(
        "top eigenvalue, power iteration against dense", abs(power / largest - 1), 0.01, note=f"{taken} products"
    )
    estimate = trace(h, "all", probes=500, seed=scale.seed)
    true = float(dense.trace())
    yield Check.at_most(
        "trace, 500 Hutchinson probes against dense", abs(estimate.value / true - 1), 0.05,
        note=f"{estimate.value:.4g} ± {estimate.standard_error:.2g}, true {true:.4g}",
    )  # fmt: skip
    yield from pyhessian_beside(model, x, y, ends.top, true)
    try:
        from scipy.sparse.linalg import LinearOperator, eigsh
    except ImportError:
        yield Check.unavailable("ARPACK on the same products", "scipy is not installed")
        return
    operator = LinearOperator((count, count), lambda v: h.product("all", torch.from_numpy(np.array(v).ravel())).numpy())
    found = eigsh(operator, k=1, which="LA", return_eigenvectors=False, v0=np.ones(count))[0]
    yield Check.at_most("top eigenvalue against ARPACK", abs(ends.top / found - 1), 0.01)


def pyhessian_beside(model: nn.Module, x: Tensor, y: Tensor, top: float, true: float) -> Iterator[Check]:
    """The published library for these figures, on the same model."""
    try:
        from pyhessian import hessian  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        yield Check.unavailable("PyHessian beside", "it is not installed: pip install pyhessian")
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it keeps graphs in .grad, which torch does not like; they are cleared below
        peer = hessian(model.eval(), nn.CrossEntropyLoss(), data=(x, y), cuda=False)
        found = peer.eigenvalues(maxIter=300, tol=1e-6)[0][0]
        estimate = float(np.mean(peer.trace(maxIter=300, tol=1e-6)))
    model.zero_grad(set_to_none=True)
    yield Check.at_most("top eigenvalue against PyHessian", abs(found / top - 1), 0.01)
    yield Check.at_most(
        "trace against PyHessian, 300 probes", abs(estimate / true - 1), 0.1, note=f"its estimate {estimate:.4g}"
    )


def prepare(scale: Scale, data: Data, shape: dict[str, int], seed: int, epochs: int) -> tuple[nn.Module, nn.Module]:
    """The trained model and the same after a tenth of its training, from the cache where they are there."""
    made = trained(
        "q-bert", train_bert, {"shape": shape, "epochs": epochs, "rate": 1e-3, "seed": seed},
        {"x": data[0], "y": data[1]}, told=lambda stage: None,
    )  # fmt: skip
    nets = []
    for key in ("net", "early"):
        net = DigitBert(**shape)
        net.load_state_dict(made[key])
        nets.append(net.eval())
    return nets[0], nets[1]


def spectrum(scale: Scale, net: nn.Module, data: Data) -> Spectrum:
    """Of every matrix of the encoder, over portions of the training data."""
    portions = scale.choose(quick=2, full=10)
    method = HessianSpectrum(
        ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
         "intermediate.dense", "layer.*.output.dense"),
        portions, 0.1, tolerance=2e-2, iterations=scale.choose(quick=8, full=16), seed=scale.seed,
    )  # fmt: skip
    return method(net, classify, [(data[0], data[1])])


def matrices(net: nn.Module) -> list[str]:
    """Paths of the encoder's weight matrices."""
    return [n for n, p in net.named_parameters() if ".encoder.layer." in n and p.dim() == 2]


def embeddings(net: nn.Module) -> list[str]:
    """Paths of the embedding tables and of what stands in for one."""
    return [n for n, p in net.named_parameters() if p.dim() == 2 and ("embeddings" in n or n == "rows.weight")]


def uniform(net: nn.Module, bits: int, granularity: Any, epochs: int, rate: float, seed: int) -> MixedQuantize:
    """All encoder matrices at one width, embeddings and activations at 8 bits."""
    weight = Int(bits, granularity, full_range=True)
    layers = [p.rpartition(".")[0] for p in matrices(net)]
    formats = [(p, weight) for p in matrices(net)] + [(p, Int(8)) for p in embeddings(net)]
    return MixedQuantize(tuple(formats), tuple((p, ACTIVATION) for p in layers), epochs, rate, seed)


@named_value
@dataclass(frozen=True)
class Shared(Observer):
    """One range that several matrices share; fixed."""

    top: float = 1.0
    """the largest magnitude among them"""

    def choose(self, points: Points, grid: Any) -> tuple[Tensor, Tensor]:
        """The same for everyone."""
        return torch.full_like(points.low, -self.top), torch.full_like(points.high, self.top)


def layerwise(net: nn.Module, bits: int, epochs: int, rate: float, seed: int) -> MixedQuantize:
    """The paper's baseline: one range for all matrices of an encoder layer, as it is when fine-tuning begins."""
    tops: dict[str, float] = {}
    for path in matrices(net):
        layer = path.split("encoder.layer.")[1].split(".")[0]
        tops[layer] = max(tops.get(layer, 0.0), float(net.get_parameter(path).detach().abs().max()))
    formats = [
        (p, Int(bits, PerTensor(), observer=Shared(tops[p.split("encoder.layer.")[1].split(".")[0]]), full_range=True))
        for p in matrices(net)
    ]
    formats += [(p, Int(8)) for p in embeddings(net)]
    return MixedQuantize(
        tuple(formats), tuple((p.rpartition(".")[0], ACTIVATION) for p in matrices(net)), epochs, rate, seed
    )


def grouped(net: nn.Module, bits: int, granularity: Any, epochs: int, seed: int) -> MixedQuantize:
    """One width everywhere; without a granularity one range per encoder layer."""
    if granularity is None:
        return layerwise(net, bits, epochs, 5e-4, seed)
    return uniform(net, bits, granularity, epochs, 5e-4, seed)


def groups(scale: Scale, nets: Any, data: Data, seeds: Any, where: str = "") -> Iterator[Check]:
    """One range per encoder layer, per head and for small groups, before and after fine-tuning."""
    x, y, xt, yt = data
    kinds = {"layer": None, "head": RowGroups(32, 4), "groups": RowGroups(4, 4)}
    epochs = scale.choose(quick=2, full=3)
    for bits in (2,):
        before: dict[str, list[float]] = {k: [] for k in kinds}
        after: dict[str, list[float]] = {k: [] for k in kinds}
        for (net, _), seed in zip(nets, seeds, strict=True):
            for kind, granularity in kinds.items():
                shot = grouped(net, bits, granularity, 0, seed)(net, [(x[:256], y[:256])], loss=classify)
                before[kind].append(score(shot, xt, yt)[0])
                tuned = grouped(net, bits, granularity, epochs, seed)(net, batches(x, y, seed), loss=classify)
                after[kind].append(score(tuned, xt, yt)[0])
        for name, values in (("before", before), ("after", after)):
            told = ", ".join(f"{k} {np.mean(v):.3f}" for k, v in values.items())
            for finer, coarser, words in (
                ("groups", "head", "of 4-row groups minus per head"), ("head", "layer", "per head minus per layer"),
            ):  # fmt: skip
                apart = np.array(values[finer]) - np.array(values[coarser])
                yield Check.at_least(
                    f"accuracy {words}, {bits} bits, {name} fine-tuning{where}", float(apart.mean()), 0.0,
                    note=f"{told}; {by_seed(apart)}",
                )  # fmt: skip
        apart = np.array(after["groups"]) - np.array(after["layer"])
        yield Check.at_least(
            f"small groups over one range per layer, {bits} bits, fine-tuned{where}", float(apart.mean()), 0.03,
            note=f"{epochs} epochs; {by_seed(apart)}; an image is {1 / len(yt):.4f}",
        )  # fmt: skip


def orders(scale: Scale, nets: Any, spectra: list[Spectrum], data: Data, where: str = "") -> Iterator[Check]:
    """Equal bytes, three ways to rank matrices; no fine-tuning, so that the order is all that differs.

    Once with small groups, where 2 bits cost next to nothing and the held-out loss of a model that knows its training
    data by heart says little, and once with a range per head, where they cost something.
    """
    for what, granularity in (("", RowGroups(4, 4)), (", a range per head", RowGroups(32, 4))):
        found = _ranked(scale, nets, spectra, data, granularity)
        means = {k: np.mean(v, 0) for k, v in found.items()}
        note = "; ".join(
            f"{k}: accuracy {m[0]:.3f}, loss {m[1]:.4f}, on training data {m[2]:.4f}" for k, m in means.items()
        )
        for name, other in (("the reversed order", "reversed"), ("five random orders", "random")):
            ratio = float(means[other][1] / means["hessian"][1])
            tries = len(found[other]) // len(nets)
            apart = np.reshape(found[other], (len(nets), tries, 3)).mean(1)[:, 1] - np.array(found["hessian"])[:, 1]
            told = f"{note}; {by_seed(apart)}"
            yield Check.at_least(f"loss of {name} over Hessian order, equal bytes{what}{where}", ratio, 1.0, "×", told)


FEEDFORWARD = ("intermediate.dense.weight", "output.dense.weight")


def parts(net: nn.Module) -> dict[str, list[str]]:
    """Paths of the weights of attention and of the feed-forward part, of the embedding tables, and of all matrices. For
    images the matrix that makes rows of pixels into tokens stands for the table of words."""
    every = matrices(net)
    attention = [p for p in every if ".attention." in p]
    return {
        "attention": attention,
        "feed-forward": [p for p in every if p.endswith(FEEDFORWARD) and p not in attention],
        "words": [p for p in embeddings(net) if p == "rows.weight"]
        or [p for p in embeddings(net) if "word_embeddings" in p],
        "positions": [p for p in embeddings(net) if "position_embeddings" in p],
        "embeddings": embeddings(net),
        "encoder": every,
    }  # fmt: skip


def rise(net: nn.Module, part: str, form: Int, data: Data) -> float:
    """Loss that it adds when only this part's weights are rounded, on held-out data, nothing tuned."""
    small = MixedQuantize(tuple((p, form) for p in parts(net)[part]))(net)
    return score(small, data[2], data[3])[1] - score(net, data[2], data[3])[1]


def modules(nets: Any, data: Data, pair: tuple[str, str], form: Int, where: str) -> Check:
    """Whether the first part of the network is more sensitive than the second, rounded one at a time."""
    rises = np.array([[rise(net, part, form, data) for part in pair] for net, _ in nets])
    count = {p: sum(nets[0][0].get_parameter(n).numel() for n in parts(nets[0][0])[p]) for p in pair}
    note = ", ".join(f"{p} {v:+.4f} ({count[p]} weights)" for p, v in zip(pair, rises.mean(0), strict=True))
    return Check.at_least(
        f"loss added by rounding {pair[0]} minus {pair[1]}, {form.bits} bits, {where}",
        float((rises[:, 0] - rises[:, 1]).mean()), 0.0, note=f"{note}; {by_seed(rises[:, 0] - rises[:, 1])}",
    )  # fmt: skip


def clothes(scale: Scale) -> Iterator[Check]:
    """Orders and groups again on Fashion-MNIST: the model knows few of its training images by heart, so that loss on
    others follows the loss whose curvature was taken, and 3,000 are held out."""
    images = fashion(scale)
    if images is None:
        yield Check.unavailable("orders on Fashion-MNIST", "vision/fashion_mnist.npz is not here", "×")
        return
    data: Data = (rows(images[0]), images[1], rows(images[2]), images[3])
    seeds = range(scale.seed, scale.seed + 3)
    nets = [prepare(scale, data, {"layers": 3, "pixels": 14}, seed, 5) for seed in seeds]
    some: Data = (data[0][:1500], data[1][:1500], data[2], data[3])  # for the curvature, as many as there are digits
    spectra = [spectrum(scale, net, some) for net, _ in nets]
    yield from orders(scale, nets, spectra, some, ", Fashion-MNIST")
    # Not on sentences, which the model tells apart so surely that no rounding of one part to 3 bits changes its loss.
    for pair, form in ((("feed-forward", "attention"), HEADS), (("embeddings", "encoder"), TABLES),
                       (("positions", "words"), TABLES)):  # fmt: skip
        yield modules(nets, some, pair, form, "Fashion-MNIST")
    tuning: Data = (data[0][:4000], data[1][:4000], data[2], data[3])
    yield from groups(scale, nets, tuning, seeds, ", Fashion-MNIST")


def _ranked(
    scale: Scale, nets: Any, spectra: list[Spectrum], data: Data, granularity: Any
) -> dict[str, list[tuple[float, float, float]]]:
    """(accuracy, loss, loss on training data) of every model, by order."""
    x, y, xt, yt = data
    found: dict[str, list[tuple[float, float, float]]] = {"hessian": [], "reversed": [], "random": []}
    for (net, _), sens in zip(nets, spectra, strict=True):
        omega = {r.layer: r.omega for r in sens.layers}
        ranked = sorted(omega.values())
        flipped = dict(zip(sorted(omega, key=omega.__getitem__), reversed(ranked), strict=True))
        rng = np.random.default_rng(scale.seed)
        tries = [("hessian", omega), ("reversed", flipped)]
        for _ in range(5):
            tries.append(("random", dict(zip(omega, rng.permutation(list(omega.values())).tolist(), strict=True))))
        sizes = {
            b: sum(Int(b, granularity).stored_bits(tuple(net.get_parameter(p).shape)) / 8 for p in matrices(net))
            for b in (2, 4)
        }
        method = MixedPrecision(
            (2, 4), Int(4, granularity, full_range=True), budget=(sizes[2] + sizes[4]) / 2, rule="sort"
        )
        for name, order in tries:
            small = MixedQuantize.of(method.solve(net, sens, order=order))(net)
            found[name].append((*score(small, xt, yt), score(small, x, y)[1]))
    return found


def mixed_plan(net: nn.Module, sens: Spectrum) -> BitPlan:
    """Half of the way from 2 to 3 bits."""
    sizes = {
        b: sum(Int(b, RowGroups(4, 4)).stored_bits(tuple(net.get_parameter(p).shape)) / 8 for p in matrices(net))
        for b in (2, 3)
    }
    return MixedPrecision((2, 3), Int(3, RowGroups(4, 4), full_range=True), budget=(sizes[2] + sizes[3]) / 2).solve(
        net, sens
    )


def tuned_mix(net: nn.Module, sens: Spectrum, data: Data, seed: int, epochs: int) -> nn.Module:
    """The 2/3-bit mix with 8-bit embedding and activations, fine-tuned."""
    technique = MixedQuantize.of(
        mixed_plan(net, sens), activation=ACTIVATION, embedding=(dict.fromkeys(embeddings(net)), Int(8)), epochs=epochs,
        rate=5e-4, seed=seed,
    )  # fmt: skip
    return technique(net, batches(data[0], data[1], seed), loss=classify)


class Encoder(nn.Module):
    """What is compared on disk: the encoder and its quantised codes."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.encoder = net.net.bert.encoder
        codes = getattr(net, "quantized", {})
        self.quantized = {n.removeprefix("net.bert."): q for n, q in codes.items() if ".encoder." in n}


def size(scale: Scale, nets: Any, spectra: list[Spectrum], data: Data, seeds: Any) -> Iterator[Check]:
    """Bytes of files, scales and biases included."""
    losses, factors, wholes = [], [], []
    for (net, _), sens, seed in zip(nets, spectra, seeds, strict=True):
        small = tuned_mix(net, sens, data, seed, scale.choose(quick=3, full=5))
        losses.append(score(net, data[2], data[3])[0] - score(small, data[2], data[3])[0])
        with tempfile.TemporaryDirectory() as place:
            written = []
            for part in (Encoder(small), small):
                save(part, place, encoding="none")
                written.append((Path(place) / MODEL_FILE).stat().st_size)
        encoder = sum(p.numel() * 4 for n, p in net.named_parameters() if ".encoder." in n)
        factors.append(encoder / written[0])
        wholes.append(sum(p.numel() * 4 for p in net.parameters()) / written[1])
    yield Check.at_least(
        "encoder, float32 over the 2/3-bit file", float(np.mean(factors)), 10.0, "×",
        f"codes, scales, biases and directory, no entropy coding; whole model {np.mean(wholes):.1f}×",
    )  # fmt: skip
    yield Check.at_most(
        "accuracy lost by the 2/3-bit mix after fine-tuning", float(np.mean(losses)), 0.023,
        note=f"8-bit embedding and activations; per seed {', '.join(f'{v:.3f}' for v in losses)}",
    )  # fmt: skip


def probe(scale: Scale, nets: Any, spectra: list[Spectrum], data: Data) -> Iterator[Check]:
    """Signs of the extreme eigenvalues, early and late."""
    method = HessianSpectrum(
        ENCODER, scale.choose(quick=1, full=2), 0.1, tolerance=1e-2, iterations=20, seed=scale.seed
    )
    late = [method(net, classify, [(data[0], data[1])]) for net, _ in nets]
    early = [method(net, classify, [(data[0], data[1])]) for _, net in nets]
    flagged = sum(not s.converged for s in early)
    worst = [max(-r.bottom / r.mean for r in s.layers if r.mean > 0) for s in early]
    yield Check.equal(
        "models after a tenth of their training that are flagged", flagged, len(early),
        note=f"|smallest| / largest up to {max(worst):.3f}",
    )  # fmt: skip
    shares = [max(-r.bottom / max(r.mean, 1e-12) for r in s.layers) for s in late]
    yield Check.at_most(
        "|smallest| / largest eigenvalue of the trained model", max(shares), 0.05,
        note=f"layers of {len(late)} models; flagged: {sum(not s.converged for s in late)}; portions of 10 %",
    )  # fmt: skip


def text(scale: Scale) -> Iterator[Check]:
    """Agreement of verbs, with a real embedding table."""
    x, y = agreement(4000, scale.seed)
    xt, yt = agreement(1000, scale.seed + 1)
    data: Data = (x, y, xt, yt)
    shape = {"layers": 2, "classes": 2, "vocabulary": 30}
    seeds = range(scale.seed, scale.seed + 3)
    nets = [prepare(scale, data, shape, seed, 20) for seed in seeds]
    full = np.array([score(net, xt, yt) for net, _ in nets])
    tuned = [tuned_mix(net, spectrum(scale, net, data), data, s, 5) for (net, _), s in zip(nets, seeds, strict=True)]
    found = np.array([score(small, xt, yt) for small in tuned])
    yield Check.at_most(
        "accuracy lost on sentences, 2/3-bit mix", float((full - found)[:, 0].mean()), 0.023,
        note=f"float {full[:, 0].mean():.3f}, mix {found[:, 0].mean():.3f}; loss {full[:, 1].mean():.5f} and "
        f"{found[:, 1].mean():.5f}; {by_seed(-(full - found)[:, 0])}",
    )  # fmt: skip


study = Study(
    system="q-bert",
    claim="Few bits for flat layers and a range for every small group keep a fine-tuned BERT at 2 to 3 bits.",
    published={
        "SST-2, MNLI, CoNLL-03, SQuAD down to 2 bits": "at most 2.3 % degradation (abstract)",
        "parameters": "up to 13x smaller (abstract)",
        "embedding table and activations": "up to 4x smaller (abstract)",
    },
    run=run,
)
