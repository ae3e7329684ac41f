"""Running a model on calibration data to learn what reaches its layers, in bounded memory.

One survey tells the order of the layers, which of them read the same tensor, and the means of their outputs. Inputs of
a layer are then streamed batch by batch: the model is run up to it and stopped there. Convolutions see patches: the
input columns of an equal linear layer, so that everything behind is written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hasten.compress.given import run_example
from hasten.compress.quantize.arrivals import arrivals
from hasten.compress.quantize.chain import BlockChain
from hasten.compress.quantize.layers import _reach, describe, is_convolution
from hasten.errors import DataError

__all__ = ["Calibration", "Survey", "evaluating", "output_mean", "patches"]


@dataclass
class Survey:
    """What one pass over the calibration data told; nothing of it changes afterwards."""

    order: list[str] = field(default_factory=list)
    """layers in the order in which they first ran"""
    calls: dict[str, int] = field(default_factory=dict)
    """runs of a layer per pass over one batch, at most"""
    groups: list[list[str]] = field(default_factory=list)
    """layers that read the same tensor, in order"""
    means: dict[str, Tensor] = field(default_factory=dict)
    """mean output of each channel"""
    rows: dict[str, int] = field(default_factory=dict)
    """input rows (tokens, places of an image) that the layer saw"""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; the old modes afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


class Calibration:
    """Example inputs, and the passes over them.

    Raises :class:`~hasten.errors.DataError` for inputs that the model refuses, and names the first layer that did.
    """

    def __init__(self, inputs: Sequence[Any]) -> None:
        self.inputs = list(inputs)
        self._chain: BlockChain | None = None
        if not self.inputs:
            raise DataError("the calibration holds no input; give at least one batch")

    def run(self, model: nn.Module, example: Any, index: int) -> None:
        """One forward, errors on one line."""
        run_example(model, example, index)

    def survey(
        self, model: nn.Module, layers: Sequence[str], watch: Callable[[str, Tensor], None] | None = None
    ) -> Survey:
        """One pass; ``watch(path, input)`` sees every input of every layer."""
        survey, sums, counts = Survey(), dict[str, Tensor](), dict[str, float]()
        readers: dict[str, tuple[int, int]] = {}
        seen: dict[str, int] = {}
        held: list[Tensor] = []

        def before(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, arguments: Any) -> None:
                x = arguments[0]
                if path not in survey.calls:
                    survey.order.append(path)
                    survey.calls[path] = 0
                    held.append(x)  # keeps its identity while the pass lasts
                    readers[path] = (id(x), x._version)
                seen[path] = seen.get(path, 0) + 1
                if watch is not None:
                    watch(path, x)

            return hook

        def after(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, arguments: Any, result: Tensor) -> None:
                total, count = output_sum(result, module)
                sums[path] = sums[path] + total if path in sums else total
                counts[path] = counts.get(path, 0.0) + count

            return hook

        handles: list[Any] = []
        for path in layers:
            module = model.get_submodule(path)
            handles += [module.register_forward_pre_hook(before(path)), module.register_forward_hook(after(path))]
        try:
            with evaluating(model):
                for index, example in enumerate(self.inputs):
                    seen.clear()
                    self.run(model, example, index)
                    for path, count in seen.items():
                        survey.calls[path] = max(survey.calls[path], count)
                    held.clear()
        finally:
            for handle in handles:
                handle.remove()
        survey.means = {path: total / max(counts[path], 1.0) for path, total in sums.items()}
        survey.rows = {path: int(count) for path, count in counts.items()}
        for path in survey.order:
            same = [g for g in survey.groups if readers[g[0]] == readers[path] and survey.calls[path] == 1]
            if same and survey.calls[same[0][0]] == 1:
                same[0].append(path)
            else:
                survey.groups.append([path])
        return survey

    @contextmanager
    def in_order(self, model: nn.Module) -> Iterator[None]:
        """Inside, layers of ``model`` change in the order in which they run; lower blocks then need no second run."""
        self._chain = BlockChain(model, len(self.inputs), lambda m, index: self.run(m, self.inputs[index], index))
        try:
            yield
        finally:
            self._chain = None

    def inputs_of(self, model: nn.Module, path: str, calls: int = 1) -> Iterator[Tensor]:
        """Inputs of the layer, one for each batch and call; the model stops when they are there."""
        if self._chain is not None and calls == 1:
            with evaluating(model):
                inside = self._chain.inputs_of(path)
                if inside is not None:
                    yield from inside
                    return
        for index, example in enumerate(self.inputs):
            with evaluating(model):
                caught = arrivals(model.get_submodule(path), partial(self.run, model, example, index), calls)
            for given, _ in caught:
                yield given[0].detach()


def output_sum(result: Tensor, layer: nn.Module) -> tuple[Tensor, float]:
    """Sum over everything but the output channel, and how many were summed."""
    channel = 1 if is_convolution(layer) or getattr(layer, "layer", {}).get("kind", "Linear") != "Linear" else -1
    moved = result.detach().float().movedim(channel, -1)
    rows = moved.reshape(-1, moved.shape[-1])
    return rows.sum(0), float(len(rows))


def output_mean(layer: nn.Module, inputs: Iterator[Tensor]) -> Tensor:
    """Mean output of each channel over streamed inputs."""
    total, count = torch.zeros(()), 0.0
    with torch.no_grad():
        for x in inputs:
            summed, number = output_sum(layer(x), layer)
            total, count = total + summed, count + number
    return total / max(count, 1.0)


def patches(layer: nn.Module, x: Tensor) -> Tensor:
    """Inputs of the layer as rows (rows, in), for a grouped convolution (groups, rows, inputs of a group)."""
    if not is_convolution(layer):
        return x.reshape(-1, x.shape[-1]).float()
    told = describe(layer)
    x = x.float()
    reach = _reach({**told, "padding": told["padding"]})
    mode = told["padding_mode"]
    x = functional.pad(x, reach, mode="constant" if mode == "zeros" else mode)
    if x.dim() == 3:
        x = x[:, :, None]
        kernel, stride, dilation = (1, *told["shape"][2:]), (1, *told["stride"]), (1, *told["dilation"])
    else:
        kernel, stride, dilation = tuple(told["shape"][2:]), tuple(told["stride"]), tuple(told["dilation"])
    columns = functional.unfold(x, kernel, dilation=dilation, stride=stride)  # (batch, channels * size, places)
    groups = told["groups"]
    columns = columns.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    return columns[0] if groups == 1 else columns  # type: ignore[no-any-return]
