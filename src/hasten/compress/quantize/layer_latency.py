"""Seconds of each linear layer at each width, from the measured table of kernels of this machine.

A layer is looked up by the shape of its weight and the rows that reach it in one call, counted on an example. At 16
bits it counts as the faster of float32 and bfloat16, at 8 and 4 as the fastest kernel of that width, or as it was
where there is none or none is faster. Convolutions have no kernel of fewer bits here: their time is left out (0).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hasten.clock import Clock
from hasten.compress.kernels import available, measure_kernels
from hasten.compress.quantize.allocate import Latency
from hasten.compress.quantize.simulate import Run, layers_of

__all__ = ["layer_latency"]


def layer_latency(
    model: nn.Module, run: Run, example: Any, *, clock: Clock | None = None, float32: bool = False
) -> Latency:
    """``latency(layer, bits)``; ``run(model, example)`` puts the example through the model once.

    ``float32=True``: the float model is float32 and not the faster of the two. Shapes are measured on first use and
    cached, on the device of the layer (see :func:`hasten.compress.kernels.measure_kernels`).
    """
    rows: dict[str, int] = {}

    def counting(path: str) -> Any:
        def count(module: nn.Module, args: Any) -> None:
            if args and isinstance(args[0], Tensor):
                rows[path] = args[0].numel() // max(args[0].shape[-1], 1)

        return count

    layers = layers_of(model)
    hooks = [layer.register_forward_pre_hook(counting(path)) for path, layer in layers.items()]
    try:
        with torch.no_grad():
            run(model, example)
    finally:
        for hook in hooks:
            hook.remove()

    def latency(path: str, bits: int) -> float:
        layer = layers.get(path)
        if not isinstance(layer, nn.Linear) or path not in rows:
            return 0.0
        shape = (layer.out_features, layer.in_features)
        plain = ["fp32"] if float32 else ["fp32", "bf16", "bf16-packed"]
        wanted = {8: "int8", 4: "int4"}.get(bits, "")
        place = layer.weight.device
        names = [k.name for k in available(place) if k.supports(*shape) and (k.name in plain or k.precision == wanted)]
        times = measure_kernels(shape, rows[path], names, clock=clock, device=place)
        base = min(t for n, t in times.items() if n in plain)
        return min([base, *(t for n, t in times.items() if n not in plain)])

    return latency
