"""The tiny time-series transformer: a light-curve classifier pruned, clustered, rounded, packed, and ready at once.

"The Tiny Time-series Transformer: Low-latency High-throughput Classification of Astronomical Transients using Deep
Model Compression", Allam, Peloton and McEwen 2023, arXiv:2303.08951. Trained on light curves that are simulated here
(PLAsTiCC is not within reach); real ZTF alerts and simulated ELAsTiCC alerts are streamed where they are present.
Fine-tuning follows the float model's outputs. A pickled module, torch.export and ONNX stand for TensorFlow's files.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hasten.clock import MonotonicClock
from hasten.compress.container import load_weights, save
from hasten.compress.deep import DeepCompression
from hasten.compress.prune import sparsity_of
from hasten.events.alerts import Alert, read_alerts
from hasten.events.classifier import classifier_of
from hasten.events.gaussian_process import Kernel, fit_kernels, grid
from hasten.events.lightcurves import CLASSES, simulate, windows
from hasten.events.observations import LSST, WAVELENGTHS, ZTF, Observations
from hasten.events.t2 import T2, T2Config, balanced_cross_entropy, class_weights, weighted_log_loss
from hasten.frozen import load
from hasten.frozen.cold import cold_starts
from hasten.measure.stats import percentile
from hasten.spiking.checkpoint import trained
from hasten.studies.study import Check, Scale, Study
from hasten.train.fit import fit

__all__ = ["study"]

KERNEL = {"steps": 20}
NIGHT = 10_000_000
"""Alerts, in ten hours"""
Curves = tuple[Tensor, Tensor, Tensor, Tensor]


def run(scale: Scale) -> Iterator[Check]:
    """The checks of the card."""
    scale.progress("exactness", 0.0)
    yield from exactness(scale)
    scale.progress("simulating light curves", 0.05)
    seen, kinds = simulate(scale.choose(quick=700, full=2000), seed=scale.seed)
    made = trained("tiny-transient-curves", make_curves, {"count": len(seen), "seed": scale.seed, "sky": 4}, {})
    held = len(seen) // 4
    x, y, xt, yt = made["short"][held:], made["kind"][held:], made["grid"][:held], made["kind"][:held]
    whole = made["grid"][held:]
    simple = brightness(seen, kinds, held)
    settings = scale.choose(
        quick={"epochs": 6, "tuning": 3}, full={"epochs": 14, "tuning": 8},
    )  # fmt: skip
    nets = []
    seeds = range(scale.seed, scale.seed + scale.choose(quick=1, full=3))
    for k, seed in enumerate(seeds):
        scale.progress(f"training t2, seed {seed}", 0.15 + 0.5 * k / len(seeds))
        data = {"x": x, "y": y}
        made = trained("tiny-transient-t2", train_t2, {"epochs": settings["epochs"], "seed": seed}, data)
        data |= {name.replace(".", "/"): value for name, value in made["float"].items()}
        # The float model is followed on the objects that it learned from, on their cut curves and on whole ones.
        data |= {"x": torch.cat([x, whole]), "y": torch.cat([y, y])}
        made |= trained("tiny-transient-deep", compress_t2, {"epochs": settings["tuning"], "seed": seed}, data)
        nets.append(made)
    yield from size(scale, nets, xt)
    yield from quality(nets, xt, yt, simple)
    scale.progress("loading", 0.7)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        yield from loading(scale, nets[0], xt, folder)
        scale.progress("streams", 0.85)
        yield from streams(scale, seen[:held], folder)
        yield from real_alerts(scale, folder)
    scale.progress("done", 1.0)


def exactness(scale: Scale) -> Iterator[Check]:
    """The loss, and the grid against dense algebra."""
    for classes in (7, 14):
        labels = torch.arange(classes).repeat_interleave(torch.arange(1, classes + 1))
        gap = abs(float(weighted_log_loss(torch.zeros(len(labels), classes).double(), labels)) - math.log(classes))
        yield Check.at_most(f"weighted log-loss of a uniform guess minus ln {classes}", gap, 1e-9)
    seen, _ = simulate(4, seed=scale.seed)
    o = Observations(
        seen.time[:, :30], seen.band[:, :30], seen.flux[:, :30], seen.error[:, :30], seen.valid[:, :30], LSST
    )
    o = o[np.flatnonzero(o.valid.all(1))]
    kernel = Kernel(points=12)
    found, worst = grid(o, kernel), 0.0
    for k in range(len(o)):
        one = o[k : k + 1]
        amplitude, length = fit_kernels(one, kernel)
        times = np.linspace(one.time.min(), one.time.max(), 12)
        dense = np.zeros((30, 30))
        wave = one.wavelength[0]
        cross = np.zeros((12, len(LSST), 30))
        for i in range(30):
            for j in range(30):
                dense[i, j] = _matern(one.time[0, i] - one.time[0, j], wave[i] - wave[j], math.exp(length[0]))
            for t in range(12):
                for b, band in enumerate(LSST):
                    cross[t, b, i] = _matern(
                        times[t] - one.time[0, i], WAVELENGTHS[band] - wave[i], math.exp(length[0])
                    )
        power = math.exp(2 * amplitude[0])
        wanted = (
            power * cross @ np.linalg.solve(power * dense + np.diag(one.error[0] ** 2 + 1e-10 * power), one.flux[0])
        )
        worst = max(worst, float(np.abs(found[k] - wanted).max() / np.abs(wanted).max()))
    yield Check.at_most(
        "grid against dense algebra, 30 points, largest relative difference", worst, 1e-6, note=f"{len(o)} curves"
    )


def _matern(days: float, wavelength: float, scale: float) -> float:
    r = math.sqrt(3) * math.sqrt((days / scale) ** 2 + (wavelength / 6000.0) ** 2)
    return (1 + r) * math.exp(-r)


def make_curves(*, count: int, seed: int, sky: int, checkpoint: Path) -> dict[str, Any]:
    """Grids of simulated objects, whole and half of them through shorter windows, and their classes."""
    seen, kinds = simulate(count, seed=seed)
    short = grid(windows(seen, seed), Kernel(**KERNEL))
    whole = grid(seen, Kernel(**KERNEL))
    return {
        "grid": torch.from_numpy(whole).float(),
        "short": torch.from_numpy(short).float(),
        "kind": torch.from_numpy(kinds),
    }


def brightness(seen: Observations, kinds: Any, held: int) -> dict[str, float]:
    """Accuracy on the first ``held`` objects from what needs no light curve: the mean flux, or that of each band."""
    flux = np.where(seen.valid, seen.flux, 0)
    mean = flux.sum(1) / seen.valid.sum(1)
    inside = seen.valid[:, :, None] & (seen.band[:, :, None] == np.arange(len(LSST)))
    bands = (flux[:, :, None] * inside).sum(1) / np.maximum(inside.sum(1), 1)
    bands = np.arcsinh(bands / np.median(np.abs(bands[held:]), 0))  # logarithmic where bright, whatever the sign
    found = {"mean flux": mean[:, None], "mean flux of each band": bands}
    return {name: _nearest(values, kinds, held) for name, values in found.items()}


def _nearest(values: Any, kinds: Any, held: int, count: int = 25) -> float:
    """Accuracy of the majority of the nearest neighbours among the objects behind the first ``held``."""
    train, test = values[held:], values[:held]
    near = np.argsort(((test[:, None] - train[None]) ** 2).sum(-1), 1)[:, :count]
    votes = np.stack([(kinds[held:][near] == c).sum(1) for c in range(len(CLASSES))], 1)
    return float((votes.argmax(1) == kinds[:held]).mean())


def batches_of(x: Tensor, y: Tensor, seed: int) -> Any:
    """Batches of an epoch."""

    def of(epoch: int) -> Any:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1009 * seed + epoch))
        return [(x[i], y[i]) for i in order.split(64)]

    return of


def train_t2(x: Tensor, y: Tensor, *, epochs: int, seed: int, checkpoint: Path) -> dict[str, Any]:
    """The float model."""
    torch.manual_seed(seed)
    model = T2(T2Config(classes=len(CLASSES)))
    model.scale_by(x)
    loss = balanced_cross_entropy(class_weights(y, len(CLASSES)))
    fit(model, batches_of(x, y, seed), loss, epochs=epochs, rate=1e-2, seed=seed)
    return {"float": model.state_dict()}


def compress_t2(x: Tensor, y: Tensor, *, epochs: int, seed: int, checkpoint: Path, **weights: Tensor) -> dict[str, Any]:
    """The compressed model, and what one shot without fine-tuning gives."""
    model = t2_of({name.replace("/", "."): value for name, value in weights.items()})
    weights_of_classes = class_weights(y, len(CLASSES))

    def loss(student: nn.Module, batch: Any) -> Tensor:
        """Cross-entropy to what the float model says, which keeps its doubts as labels would not."""
        with torch.no_grad():
            wanted = torch.softmax(model(batch[0]), -1)
        each = -(wanted * torch.log_softmax(student(batch[0]), -1)).sum(-1)
        return (weights_of_classes[batch[1]] * each).mean()

    shot: Any = DeepCompression(epochs=0)(model)
    technique = DeepCompression(epochs=epochs, rate=5e-3, seed=seed)
    tiny: Any = technique(model, batches_of(x, y, seed), loss=loss)
    return {
        "tiny": tiny.state_dict(), "shot": shot.state_dict(), "sizes": dict(tiny.report.measured),
        "notes": list(tiny.report.notes),
    }  # fmt: skip


def t2_of(state: dict[str, Tensor]) -> T2:
    """A model with these weights."""
    model = T2(T2Config(classes=len(CLASSES)))
    model.load_state_dict(state)
    return model.eval()


def packed(state: dict[str, Tensor], folder: Path, xt: Tensor) -> dict[str, float]:
    """Write the packed model."""
    extra = {"bands": list(LSST), "classes": list(CLASSES), "kernel": KERNEL}
    return save(t2_of(state), folder, xt[:2], extra=extra)


def size(scale: Scale, nets: list[dict[str, Any]], xt: Tensor) -> Iterator[Check]:
    """Bytes, and what survives to the file."""
    factors, exact, distinct, sparse = [], True, 0, 1.0
    for made in nets:
        with tempfile.TemporaryDirectory() as place:
            written = packed(made["tiny"], Path(place), xt)
            factors.append(written["torch.save"] / written["file"])
            again = load_weights(T2(T2Config(classes=len(CLASSES))), place).state_dict() if _whole(place) else {}
        for name, value in again.items():
            exact = exact and bool(torch.equal(value, made["tiny"][name]))
            if value.dim() >= 2:
                distinct = max(distinct, len(value.unique()))
                sparse = min(sparse, sparsity_of(value))
    yield Check.equal("tensors of the file equal those of the model, bit for bit", int(exact and bool(distinct)), 1)
    yield Check.at_most("distinct values of a clustered weight after fine-tuning, save and load", distinct, 16)
    yield Check.at_least("share of zeros of a weight after the whole chain, least", sparse, 0.49)
    yield Check.at_least(
        "pickled float module over the packed file", float(np.mean(factors)), 10.0, "×",
        f"the file holds program and directory too; {nets[0]['notes'][0]}; the published 18× compares a graph folder "
        "with a quantised flat file",
    )  # fmt: skip


def _whole(place: str) -> bool:
    return (Path(place) / "model.hasten").exists()


def judged(model: nn.Module, xt: Tensor, yt: Tensor) -> tuple[float, float, float]:
    """(log-loss, macro F1, accuracy)."""
    with torch.no_grad():
        logits = model(xt)
    guess = logits.argmax(1)
    scores = []
    for c in range(len(CLASSES)):
        hit = float(((guess == c) & (yt == c)).sum())
        total = float((guess == c).sum() + (yt == c).sum())
        scores.append(2 * hit / total if total else 1.0)
    return float(weighted_log_loss(logits, yt)), float(np.mean(scores)), float((guess == yt).float().mean())


def quality(nets: list[dict[str, Any]], xt: Tensor, yt: Tensor, simple: dict[str, float]) -> Iterator[Check]:
    """Log-loss and F1 of the float, the compressed and the one-shot model on held-out objects; ``simple``: accuracy
    from brightness alone."""
    every = {k: np.array([judged(t2_of(made[k]), xt, yt) for made in nets]) for k in ("float", "tiny", "shot")}
    found = {k: v.mean(0) for k, v in every.items()}
    note = "; ".join(f"{k}: log-loss {v[0]:.3f}, macro F1 {v[1]:.3f}, accuracy {v[2]:.3f}" for k, v in found.items())
    ratios = ", ".join(f"{v:.3f}" for v in every["tiny"][:, 0] / every["float"][:, 0])
    note += f"; {len(nets)} seeds, log-loss of compressed over float each {ratios}; {len(xt)} held-out objects"
    yield Check.at_least(
        "accuracy of the float model minus that of mean flux alone", float(found["float"][2]) - simple["mean flux"],
        0.2, note=f"25 nearest neighbours in {', '.join(f'{name} {v:.3f}' for name, v in simple.items())}; {note}",
    )  # fmt: skip
    yield Check.at_most(
        "log-loss of the compressed over the float model", float(found["tiny"][0] / found["float"][0]), 1.05, "×", note
    )
    yield Check.at_most("macro F1 lost by compression", float(found["float"][1] - found["tiny"][1]), 0.01, note=note)
    yield Check.at_least(
        "log-loss of one shot over fine-tuned compression", float(found["shot"][0] / found["tiny"][0]), 1.2, "×", note
    )


def loading(scale: Scale, made: dict[str, Any], xt: Tensor, folder: Path) -> Iterator[Check]:
    """Fresh processes: imports, load, first call, warm call."""
    model, example = t2_of(made["float"]), xt[:1].contiguous()
    packed(made["tiny"], folder / "tiny", xt)
    torch.save(model, folder / "t2.pt")
    torch.export.save(torch.export.export(model, (example,)), folder / "t2.pt2")
    paths = [folder / "tiny", folder / "t2.pt", folder / "t2.pt2"]
    try:
        import onnx  # noqa: F401
        from onnxruntime.quantization import quantize_dynamic  # type: ignore[import-untyped,unused-ignore]

        torch.onnx.export(model, (example,), str(folder / "t2.onnx"), dynamo=False, input_names=["x"], opset_version=17)
        quantize_dynamic(str(folder / "t2.onnx"), str(folder / "t2_int8.onnx"))
        paths += [folder / "t2.onnx", folder / "t2_int8.onnx"]
    except Exception as error:  # the peer is optional, and its exporter fails in many ways
        yield Check.unavailable("ONNX beside", f"{type(error).__name__}: {str(error).splitlines()[0][:100]}")
    found = {
        Path(p).name: c for p, c in cold_starts(paths, example.numpy(), processes=scale.choose(quick=1, full=3)).items()
    }
    tiny = found["tiny"]
    note = "; ".join(
        f"{n}: {c.bytes} B, imports {c.imports:.2f} s, load {c.load * 1e3:.1f} ms, first {c.first * 1e3:.1f} ms, warm "
        f"{c.warm * 1e3:.2f} ms"
        for n, c in found.items()
    )
    yield Check.at_least(
        "load of the torch.export archive over the packed file", found["t2.pt2"].load / tiny.load, 8.0, "×", note
    )
    yield Check.at_least(
        "load of the pickled module over the packed file", found["t2.pt"].load / tiny.load, 8.0, "×", "without imports"
    )
    yield Check.at_least(
        "first answer of the pickled module over the packed file",
        found["t2.pt"].ready / tiny.ready,
        8.0,
        "×",
        "imports, load and first call of a running interpreter",
    )
    yield Check.at_least(
        "first answer of the torch.export archive over the packed file",
        found["t2.pt2"].ready / tiny.ready,
        8.0,
        "×",
        "imports, load and first call",
    )
    yield Check.at_least(
        "warm call, pickled module over the packed file",
        found["t2.pt"].warm / tiny.warm,
        1.0,
        "×",
        "one light curve, one thread; the published 8× compares with a served TensorFlow graph",
    )
    if "t2_int8.onnx" in found:
        yield Check.at_least(
            "first answer of int8 ONNX over the packed file",
            found["t2_int8.onnx"].ready / tiny.ready,
            1.0,
            "×",
            "imports, load and first call",
        )


def alerts_of(seen: Observations, most: int) -> list[Alert]:
    """Observations of simulated objects in order of time."""
    found = [
        Alert(f"{k}", float(seen.time[k, n]), LSST[seen.band[k, n]], float(seen.flux[k, n]), float(seen.error[k, n]))
        for k in range(most)
        for n in range(int(seen.valid[k].sum()))
    ]
    return sorted(found, key=lambda a: a.time)


def streams(scale: Scale, seen: Observations, folder: Path) -> Iterator[Check]:
    """One by one against whole curves; latency and throughput."""
    objects = scale.choose(quick=8, full=40)
    given = alerts_of(seen, objects)
    stream = classifier_of(folder / "tiny", clock=MonotonicClock())
    last = {}
    for alert in given:
        for answer in stream.push([alert]):
            last[answer.object_id] = answer
    whole = stream.probabilities(seen[:objects])
    gap = max(float(np.abs(whole[int(n)] - np.array(c.probabilities)).max()) for n, c in last.items())
    yield Check.at_most(
        "stream against the whole curve, largest difference of a probability", gap, 1e-6, note=f"{len(given)} alerts"
    )
    at = {q: percentile(list(stream.delays), q).value for q in (50, 99)}
    yield Check(
        "latency of one alert, p99", at[99], "s", "", None,
        f"told only: p50 {at[50] * 1e3:.1f} ms, p99 {at[99] * 1e3:.1f} ms, Gaussian process and classifier, one alert "
        f"at a time; alerts of a night come every {36e6 / NIGHT:.1f} ms",
    )  # fmt: skip
    batch = classifier_of(folder / "tiny", batch=64, clock=MonotonicClock())
    clock = MonotonicClock()
    began = clock.now()
    for k in range(0, len(given), 64):
        batch.push(given[k : k + 64])
    batch.flush()
    rate = batch.answered / (clock.now() - began)
    model = load(folder / "tiny")
    curves = np.zeros((8, 100, 6), np.float32)
    model(curves)
    began = clock.now()
    for _ in range(30):
        model(curves)
    alone = 240 / (clock.now() - began)
    yield Check.at_most(
        "machines like this for ten million alerts in a night of ten hours", NIGHT / 36000 / rate, 1.0, "",
        f"{rate:.0f} alerts/s in batches of 64 with the Gaussian process ({rate / NIGHT:.2e} nights per second), "
        f"{alone:.0f} light curves/s by the classifier alone ({alone / NIGHT:.2e})",
    )  # fmt: skip


def real_alerts(scale: Scale, folder: Path) -> Iterator[Check]:
    """Alerts of the data folder: real ZTF light curves and simulated ELAsTiCC ones."""
    path = scale.find("astronomy/elasticc_sim_lightcurves.csv.gz")
    if path is None:
        yield Check.unavailable("ELAsTiCC supernovae", "astronomy/elasticc_sim_lightcurves.csv.gz is not here")
    else:
        stream = classifier_of(folder / "tiny", on_error="skip")
        curves: dict[str, list[tuple[float, int, float, float]]] = {}
        for alert in read_alerts(path):
            if alert.band in LSST:
                curves.setdefault(alert.object_id, []).append(
                    (alert.time, LSST.index(alert.band), alert.flux, alert.error)
                )
        long = [c for c in curves.values() if len(c) >= 10][: scale.choose(quick=60, full=400)]
        found = stream.probabilities(Observations.of(long, LSST)).argmax(1)
        names = [CLASSES[k] for k in found]
        share = sum(n == "SN Ia" for n in names) / len(names)
        counts = ", ".join(f"{names.count(c)} {c}" for c in CLASSES if c in names)
        yield Check.at_least(
            "ELAsTiCC type Ia supernovae that are called so", share, 0.5,
            note=f"{len(names)} objects of another simulation with ten points or more; never trained on: {counts}",
        )  # fmt: skip
    path = scale.find("astronomy/ztf_sample_lightcurves.csv.gz")
    if path is None:
        yield Check.unavailable("real ZTF alerts", "astronomy/ztf_sample_lightcurves.csv.gz is not here")
        return
    stream = classifier_of(folder / "tiny", batch=64, on_error="skip")
    given = list(read_alerts(path))[: scale.choose(quick=400, full=5000)]
    clock = MonotonicClock()
    began = clock.now()
    answers = [a for k in range(0, len(given), 64) for a in stream.push(given[k : k + 64])] + stream.flush()
    rate = len(answers) / (clock.now() - began)
    good = all(abs(sum(a.probabilities) - 1) < 1e-6 for a in answers)
    yield Check.equal(
        "real ZTF alerts that are answered or counted as skipped",
        int(good and stream.seen + stream.skipped == len(given)), 1,
        note=f"{len(given)} observations of {stream.objects} objects in {', '.join(ZTF)}: {len(answers)} answers, "
        f"{stream.skipped} skipped, {rate:.0f} alerts/s",
    )  # fmt: skip


study = Study(
    system="tiny-transient-transformer",
    claim="Pruned, clustered, rounded and in a flat file, a light-curve transformer is 18 times smaller and as good.",
    published={
        "model size": "18x smaller, performance kept (abstract)",
        "latency and throughput, local": "about 8x (abstract)",
        "live in FINK on ZTF alerts": "about 5x (abstract)",
        "load": "10 million alerts per night (abstract)",
    },
    run=run,
)
