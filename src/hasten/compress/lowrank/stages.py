"""What each stage of SVDQuant does for each layer: relative error of its output, on the calibration's own inputs.

``naive`` rounds to nearest, ``smoothing`` moves outliers into the weight, ``branch`` adds the low rank, ``rounds``
folds the rounding error back into it, ``gptq`` rounds the residual by GPTQ (where there are rows enough). Layers that
read the same tensor are one row, as the technique treats them. "SVDQuant: Absorbing Outliers by Low-Rank Components
for 4-Bit Diffusion Models", Li et al. 2024, arXiv:2411.05007.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from hasten.compress.lowrank.absorb import absorb
from hasten.compress.lowrank.svdquant import SvdQuant
from hasten.errors import ConfigurationError

__all__ = ["Stages", "stages"]


@dataclass(frozen=True)
class Stages:
    """Layers and their errors, stage by stage; ``print`` shows a table."""

    layers: Mapping[str, Mapping[str, float]]
    """names of the layers that share an input, joined by ``+`` -> stage -> relative error of their output"""

    def median(self, stage: str) -> float:
        """Of the layers that have this stage; raises where none has."""
        found = [row[stage] for row in self.layers.values() if stage in row]
        if not found:
            raise ConfigurationError(f"no layer has a stage {stage!r}; give naive, smoothing, branch, rounds or gptq")
        return median(found)

    def __str__(self) -> str:
        names = list(dict.fromkeys(stage for row in self.layers.values() for stage in row))
        width = max(map(len, self.layers))
        head = "  ".join([f"{'layer':{width}}", *(f"{n:>9}" for n in names)])
        rows = [
            "  ".join([f"{layer:{width}}", *(f"{row[n]:9.4f}" if n in row else f"{'–':>9}" for n in names)])
            for layer, row in self.layers.items()
        ]
        return "\n".join([head, *rows])


def stages(
    model: nn.Module,
    calibration: Sequence[Any],
    technique: SvdQuant | None = None,
    *,
    progress: Callable[[str, float], None] | None = None,
) -> Stages:
    """The stages of ``technique`` on every layer that it would round; nothing is built, ``model`` stays as it is.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    >>> found = stages(model, [torch.randn(100, 64)], SvdQuant(rank=8, group=32, grid=5, iterations=2))
    >>> list(found.layers), list(found.layers["0"])
    (['0', '2'], ['naive', 'smoothing', 'branch', 'rounds', 'gptq'])
    """
    used = technique or SvdQuant()
    if not calibration:
        raise ConfigurationError("outliers are seen in data; give calibration, such as inputs along a sampling run")
    found, _ = used._choose(model)
    inputs, groups = used._inputs(model, found, calibration, progress)
    steps: list[tuple[str, dict[str, Any]]] = [
        ("naive", {"rank": 0, "grid": 0}),
        ("smoothing", {"rank": 0, "grid": used.grid}),
        ("branch", {"rank": used.rank, "grid": used.grid}),
        ("rounds", {"rank": used.rank, "grid": used.grid, "iterations": used.iterations}),
        ("gptq", {"rank": used.rank, "grid": used.grid, "iterations": used.iterations, "use_gptq": True}),
    ]
    layers: dict[str, dict[str, float]] = {}
    for index, names in enumerate(groups):
        x = inputs.pop(names[0])
        members = [found[n] for n in names]
        used._check(names, members, len(x))
        weight = torch.cat([m.weight.detach() for m in members])
        row = layers["+".join(names)] = {}
        for stage, knobs in steps:
            if stage == "gptq" and len(x) < weight.shape[1]:
                continue
            made = absorb(
                weight, x, form=used.format, bits=used.bits, group=used.group, shift=used.shift and stage != "naive",
                dtype=getattr(torch, used.branch), **knobs,
            )  # fmt: skip
            row[stage] = made.error
        if progress is not None:
            progress("stages", 0.2 + 0.8 * (index + 1) / len(groups))
    return Stages(layers)
