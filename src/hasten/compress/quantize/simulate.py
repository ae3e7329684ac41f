"""A copy of a model whose layers are switched between float and fewer bits without building it anew.

Rounded weights and input scales of every layer are made once; a configuration is then a choice among tensors that are
there. For searches that evaluate hundreds of configurations. Weights and inputs of a layer change together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from hasten.compress.quantize.base import Format
from hasten.compress.quantize.observers import Watch
from hasten.errors import ConfigurationError

__all__ = ["Run", "Simulated", "layers_of", "units_of", "with_bits"]

Run = Callable[[nn.Module, Any], Any]
"""``run(model, batch)`` puts a batch through the model; a loss or a metric is one"""
Params = tuple[Format, Tensor, Tensor | None]


def with_bits(template: Format, bits: int) -> Format:
    """The same format with another number of bits."""
    return replace(template, bits=bits)  # type: ignore[type-var]


def layers_of(model: nn.Module, skip: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Linear layers and convolutions by path, but those whose path matches ``skip``."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found: dict[str, nn.Module] = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, kinds) and not any(fnmatchcase(path, s) for s in skip)
    }
    if not found:
        raise ConfigurationError("the model has no linear layer or convolution that is not skipped; name fewer in skip")
    return found


def units_of(
    model: nn.Module, run: Run, batch: Any, skip: Sequence[str] = (), together: Iterable[Sequence[str]] = ()
) -> list[tuple[str, ...]]:
    """Layers in the order in which they run; those that read the same tensor (query, key, value) are one unit.

    ``together`` names further layers that must agree. Layers that did not run come last, each on its own.
    """
    layers = layers_of(model, skip)
    reads: dict[str, Tensor] = {}
    hooks = [layer.register_forward_pre_hook(_recorder(path, reads)) for path, layer in layers.items()]
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    units: list[list[str]] = []
    by_input: dict[Any, list[str]] = {}
    for path, tensor in reads.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor._version)
        if key not in by_input:
            by_input[key] = []
            units.append(by_input[key])
        by_input[key].append(path)
    units += [[path] for path in layers if path not in reads]
    for group in together:
        unknown = [g for g in group if g not in layers]
        if unknown:
            raise ConfigurationError(f"{', '.join(unknown)} is not a layer that is quantised; correct together=…")
        touched = [u for u in units if set(u) & set(group)]
        touched[0][:] = [p for u in touched for p in u]
        units = [u for u in units if u is touched[0] or u not in touched]
    return [tuple(u) for u in units]


def _recorder(path: str, reads: dict[str, Tensor]) -> Callable[[nn.Module, Any], None]:
    def record(module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor):
            reads.setdefault(path, args[0])  # kept alive, so that no later tensor takes its place in memory

    return record


class Simulated:
    """Layers of a copy of ``model`` in any of some widths; ``use`` chooses, 0 stands for float.

    The given model is not changed. ``weight`` and ``activation`` are templates whose bits are replaced; inputs have
    static ranges, observed over ``calibration`` in float (``activation=None``: inputs stay float).
    """

    def __init__(
        self,
        model: nn.Module,
        run: Run,
        calibration: Sequence[Any],
        *,
        bits: Sequence[int],
        weight: Format,
        activation: Format | None,
        skip: Sequence[str] = (),
    ) -> None:
        if not calibration:
            raise ConfigurationError("there is no calibration batch to find the ranges of; give at least one")
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.layers = layers_of(self.model, skip)
        self.bits = tuple(bits)
        self._weight, self._activation = weight, activation
        self._float: dict[str, Tensor] = {
            path: layer.get_parameter("weight").detach().clone() for path, layer in self.layers.items()
        }
        self._rounded: dict[tuple[str, int], Tensor] = {}
        self._inputs: dict[tuple[str, int], Params] = {}
        self._active: dict[str, int] = dict.fromkeys(self.layers, 0)
        for path, value in self._float.items():
            for width in self.bits:
                self._rounded[path, width] = with_bits(weight, width).fake(value)
        if activation is not None and not activation.at_each_call:
            self._calibrate(run, calibration, activation)
        elif activation is not None:
            raise ConfigurationError("the simulation has static ranges of inputs; give a format without dynamic=True")
        for path, layer in self.layers.items():
            layer.register_forward_pre_hook(self._rounding(path))

    def _calibrate(self, run: Run, calibration: Sequence[Any], activation: Format) -> None:
        watches: dict[tuple[str, int], Watch] = {
            (path, width): with_bits(activation, width).watch() for path in self.layers for width in self.bits
        }

        def watching(path: str) -> Callable[[nn.Module, Any], None]:
            def watch(module: nn.Module, args: Any) -> None:
                for width in self.bits:
                    watches[path, width].update(args[0])

            return watch

        hooks = [layer.register_forward_pre_hook(watching(path)) for path, layer in self.layers.items()]
        with torch.no_grad():
            for batch in calibration:
                run(self.model, batch)
        for hook in hooks:
            hook.remove()
        for (path, width), watch in watches.items():
            if watch.batches:
                form = with_bits(activation, width)
                self._inputs[path, width] = (form, *form.parameters(*watch.range()))

    def _rounding(self, path: str) -> Callable[[nn.Module, Any], Any]:
        def rounded(module: nn.Module, args: Any) -> Any:
            found = self._inputs.get((path, self._active[path]))
            return None if found is None else (found[0].fake(args[0], found[1], found[2]), *args[1:])

        return rounded

    def weight_format(self, bits: int) -> Format:
        """Of the weights at a width."""
        return with_bits(self._weight, bits)

    def input_format(self, path: str, bits: int) -> Format | None:
        """Of a layer's input at a width; None where inputs stay float."""
        found = self._inputs.get((path, bits))
        return None if found is None else found[0]

    def bytes(self, path: str, bits: int) -> float:
        """Of a layer's weight at a width; 0 stands for float, which counts 16 bits."""
        weight = self._float[path]
        return 2.0 * weight.numel() if not bits else self.weight_format(bits).stored_bits(tuple(weight.shape)) / 8

    def freeze(self, model: nn.Module, formats: Sequence[tuple[str, Format]], widths: Mapping[str, int]) -> nn.Module:
        """``model`` with these weight formats and the observed ranges of inputs, as a new module with a report."""
        from hasten.compress.quantize.mixed import MixedQuantize, RoundedInput, wrap_input

        result = MixedQuantize(tuple(formats))(model)
        report = result.report
        for path, bits in widths.items():
            found = self._inputs.get((path, bits))
            if bits and found is not None:
                result = wrap_input(result, path, found[0])
                wrapped = result.get_submodule(path)
                assert isinstance(wrapped, RoundedInput)
                wrapped.fix(found[1], found[2])
        result.report = report
        return result.eval()

    def change(self, path: str, bits: int) -> Tensor:
        """Rounded minus float weight."""
        return self._rounded[path, bits] - self._float[path]

    def use(self, widths: Mapping[str, int]) -> nn.Module:
        """The model with these widths; layers that are not named, or named with 0, are float.

        The same object each time: the next call changes it.
        """
        for path, layer in self.layers.items():
            width = widths.get(path, 0)
            if width != self._active[path]:
                layer.weight.data = self._rounded[path, width] if width else self._float[path]
                self._active[path] = width
        unknown = set(widths) - set(self.layers)
        if unknown:
            raise ConfigurationError(f"{', '.join(sorted(unknown))} is not a layer of the simulation")
        return self.model
