"""``torch.export``: the model as one graph of torch operations, in a ``.pt2`` file that needs no code of ours."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hasten.compress.export.check import EXACT, Exported, arguments, compare_outputs, outputs_of, placed
from hasten.compress.export.reasons import stopped_at, trace
from hasten.compress.given import finite_parameters
from hasten.compress.technique import exportable
from hasten.errors import ModelError

__all__ = ["export_program"]


def export_program(
    model: nn.Module, example: Any, path: str | os.PathLike[str], *, tolerance: float = EXACT
) -> Exported:
    """Write ``model`` as a program for ``example`` (a tensor or a tuple of tensors) and check it.

    Layers with packed kernels become plain ones with the same weights (:func:`hasten.compress.exportable`); the file is
    loaded again and its outputs are compared with those. Raises :class:`~hasten.errors.ModelError` for what
    ``torch.export`` cannot trace (layer and line are named) and for a difference beyond ``tolerance`` (relative); no
    file is left then.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_program(nn.Linear(4, 2), torch.zeros(3, 4), f"{folder}/model.pt2").difference
    0.0
    """
    finite_parameters(model, "exported")
    plain = exportable(model).eval()
    given = arguments(example)
    reference = outputs_of(plain, given)

    def check(place: Path) -> float:
        again = torch.export.load(place).module()
        return compare_outputs(reference, outputs_of(again, given), tolerance, "the program read back")

    try:
        program = trace(plain, given)
    except Exception as error:  # whatever the tracer or the model's code raises
        reason = stopped_at(plain, error)
        raise ModelError(f"torch.export cannot trace the model: {reason}; nothing was written") from error
    with placed(path, check) as (place, found):
        torch.export.save(program, place)
    target = Path(path)
    return Exported(target, target.stat().st_size, found[0], tolerance)
