"""From a model to operations over float32, by the graph of ``torch.export`` for one sample.

Whatever does not depend on the input is computed here, once. Views cost nothing; an array is put in order only where an
operation needs its rows so. An operator without an operation is named in
:class:`~hasten.compress.fused.values.Unsupported`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hasten.compress.export.reasons import first_line, trace
from hasten.compress.fused import arithmetic, images, views  # noqa: F401 (they register their rules)
from hasten.compress.fused.graph import Lowered, Lowering
from hasten.compress.fused.values import Unsupported
from hasten.compress.technique import exportable

__all__ = ["Lowered", "lower"]


def lower(model: nn.Module, example: tuple[Tensor, ...]) -> Lowered:
    """Operations of ``model`` for one sample shaped as ``example`` (each with a batch of 1).

    Raises :class:`~hasten.compress.fused.values.Unsupported`.
    """
    for given in example:
        if not given.is_floating_point() and given.dtype not in (torch.int64, torch.int32):
            raise Unsupported(f"an input is {given.dtype}; float32 and whole numbers (int64, int32) go in")
    try:
        exported = trace(exportable(model, "in_one_call").eval(), example)
    except Exception as error:  # torch raises many kinds here
        raise Unsupported(f"the model cannot be exported ({first_line(error)[:120]})") from error
    with torch.inference_mode():
        return Lowering(exported).run()
