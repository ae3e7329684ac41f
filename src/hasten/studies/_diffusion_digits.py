"""The small diffusion transformer on scikit-learn's digits that the diffusion studies share: trained once, then kept.

Images are (n, 1, 8, 8) in -1 … 1. The checkpoint's name holds a hash of what made it (shape, steps, seed and the text
of the room's files), so that it is trained anew where any of them changes.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["DIGITS", "features", "images", "trained"]

DIGITS = 10


def images(seed: int = 0) -> tuple[Tensor, Tensor] | None:
    """All digits and their labels; None where scikit-learn is absent."""
    from hasten.studies._vision_models import digits

    found = digits(seed)
    if found is None:
        return None
    x, y, held, labels = found
    return torch.cat([x, held]) * 2 - 1, torch.cat([y, labels])


def _folder(name: str, *what: Any) -> Path:
    from hasten.measure.cache import cache_folder

    texts = [
        Path(__file__).read_bytes(),
        *(p.read_bytes() for p in sorted((Path(__file__).parent.parent / "diffusion").glob("*.py"))),
    ]
    digest = hashlib.sha256(b"".join(texts) + repr(what).encode()).hexdigest()[:16]
    return cache_folder() / "checkpoints" / f"{name}-{digest}.pt"


def _kept(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    if path.exists():
        loaded: dict[str, Tensor] = torch.load(path, weights_only=True)
        return loaded
    state = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + f".{os.getpid()}.part")
    torch.save(state, part)
    os.replace(part, path)
    return state


def trained(preset: str, steps: int, seed: int = 0, progress: Callable[[str, float], None] | None = None) -> nn.Module:
    """The preset after ``steps`` batches of 128, with averaged weights; the same again from the cache."""
    from hasten.diffusion import PRESETS, DiT, Schedule, denoising_loss
    from hasten.train.fit import fit

    data = images()
    assert data is not None
    x, y = data

    def make() -> dict[str, Tensor]:
        torch.manual_seed(seed)
        model = DiT(PRESETS[preset])
        average = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(seed)
        schedule = Schedule()
        each = 50
        done = 0

        def batches(epoch: int) -> list[Tensor]:
            return [torch.randint(0, len(x), (128,), generator=generator) for _ in range(each)]

        def loss(model: nn.Module, rows: Tensor) -> Tensor:
            nonlocal done
            done += 1
            if done > 1:
                decay = min(0.999, (1 + done) / (10 + done))
                with torch.no_grad():
                    for kept, new in zip(average.parameters(), model.parameters(), strict=True):
                        kept.lerp_(new, 1 - decay)
            return denoising_loss(model, schedule, x[rows], y[rows], generator, null_label=model.null_label)  # type: ignore[arg-type]

        fit(
            model,
            batches,
            loss,
            epochs=max(1, steps // each),
            rate=2e-3,
            weight_decay=0.0,
            seed=seed,
            progress=progress,
        )
        return average.state_dict()

    model = DiT(PRESETS[preset])
    model.load_state_dict(_kept(_folder(preset, preset, steps, seed), make))
    return model.eval()


def features(seed: int = 0, epochs: int = 30) -> Callable[[Tensor], Tensor]:
    """A classifier's last hidden layer: images (n, 1, 8, 8) in -1 … 1 -> (n, 128)."""
    from hasten.studies._vision_models import digits_cnn
    from hasten.train.fit import fit

    data = images()
    assert data is not None
    x, y = data

    def make() -> dict[str, Tensor]:
        torch.manual_seed(seed)
        model = digits_cnn(seed)

        def batches(epoch: int) -> list[Tensor]:
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed + epoch))
            return list(order.split(128))

        fit(model, batches, lambda m, rows: nn.functional.cross_entropy(m(x[rows]), y[rows]), epochs, 3e-3, seed=seed)
        return model.state_dict()

    model = digits_cnn(seed)
    model.load_state_dict(_kept(_folder("digits-features", seed, epochs), make))
    body = model[:-1].eval()

    def of(images: Tensor) -> Tensor:
        with torch.no_grad():
            made: Tensor = body(images)
        return made

    return of
