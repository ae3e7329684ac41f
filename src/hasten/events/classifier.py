"""A t2 that was trained on simulated light curves, compressed and packed: what an alert stream runs.

Made once per survey and settings, kept in the user's cache or in a folder of the user's; loading it needs no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hasten.errors import ModelLoadError
from hasten.events.alerts import AlertClassifier
from hasten.events.gaussian_process import Kernel
from hasten.frozen.runner import Frozen, load

__all__ = ["classifier_of", "make_classifier"]

Progress = Callable[[str, float], None]


def classifier_of(folder: str | os.PathLike[str] | Frozen, **knobs: Any) -> AlertClassifier:
    """The stream of a packed model; bands, classes and grid are those that it was saved with."""
    model = folder if isinstance(folder, Frozen) else load(folder)
    missing = {"bands", "classes", "kernel"} - set(model.meta)
    if missing:
        raise ModelLoadError(
            f"the model does not say its {', '.join(sorted(missing))}; save it with extra={{'bands': …, 'classes': …, "
            "'kernel': …}"
        )
    return AlertClassifier(
        model, bands=model.meta["bands"], classes=model.meta["classes"], kernel=Kernel(**model.meta["kernel"]), **knobs
    )


def make_classifier(
    folder: str | os.PathLike[str],
    bands: tuple[str, ...],
    *,
    objects: int = 1500,
    epochs: int = 12,
    seed: int = 0,
    compress: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Simulate, train, compress and pack into ``folder``; accuracy on simulated objects kept apart, and sizes."""
    import torch

    from hasten.compress.container import save
    from hasten.compress.deep import DeepCompression
    from hasten.events.gaussian_process import grid
    from hasten.events.lightcurves import CLASSES, Survey, simulate, windows
    from hasten.events.t2 import T2, T2Config, balanced_cross_entropy, class_weights, weighted_log_loss
    from hasten.train.fit import fit

    told = progress or (lambda stage, share: None)
    told("simulating light curves", 0.0)
    seen, kinds = simulate(objects, Survey(bands=bands), seed)
    kernel = {"steps": 20}
    curves, labels = torch.from_numpy(grid(seen, Kernel(**kernel))).float(), torch.from_numpy(kinds)
    held = objects // 4
    shorter = torch.from_numpy(grid(windows(seen[held:], seed), Kernel(**kernel))).float()
    x, y = shorter, labels[held:]

    def batches(epoch: int) -> Any:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1009 * seed + epoch))
        return [(x[i], y[i]) for i in order.split(64)]

    torch.manual_seed(seed)
    model = T2(T2Config(bands=len(bands), classes=len(CLASSES)))
    model.scale_by(x)
    loss = balanced_cross_entropy(class_weights(y, len(CLASSES)))
    fit(
        model,
        batches,
        loss,
        epochs=epochs,
        rate=1e-2,
        seed=seed,
        progress=lambda _, s: told("training t2", 0.2 + 0.4 * s),
    )
    model.eval()
    if compress:
        technique = DeepCompression(epochs=max(1, epochs // 4), rate=3e-3, seed=seed)
        model = technique(model, batches, loss=loss, progress=lambda s, x: told(s, 0.6 + 0.35 * x))  # type: ignore[assignment]
    with torch.no_grad():
        logits = model(curves[:held])
    figures = {
        "accuracy": float((logits.argmax(1) == labels[:held]).float().mean()),
        "log_loss": float(weighted_log_loss(logits, labels[:held])),
    }
    extra = {"bands": list(bands), "classes": list(CLASSES), "kernel": kernel, "figures": figures}
    sizes = save(model, folder, curves[:2], extra=extra)
    told("packed", 1.0)
    return {**figures, **sizes, "meta": json.loads(json.dumps(extra))}


def cached_classifier(bands: tuple[str, ...], progress: Progress | None = None) -> Path:
    """The folder of the default classifier for these bands in the user's cache, made where it is not there."""
    from hasten.measure.cache import cache_folder

    folder = cache_folder() / "alerts" / f"t2-{''.join(bands)}-4"
    if not (folder / "model.hasten").exists():
        make_classifier(folder, bands, progress=progress)
    return folder
