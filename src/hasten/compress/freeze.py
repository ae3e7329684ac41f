"""From a module to a flat program: the graph of ``torch.export`` written down for the torch-free runner.

The batch stays free: the example's first axis becomes a symbol. An operation that the runner does not know is named and
refused here, when the model is saved, and never met when it is loaded.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hasten.compress.technique import exportable
from hasten.errors import ConfigurationError
from hasten.frozen.ops import OPERATIONS

__all__ = ["Program", "freeze"]

_PLACES = ("device", "pin_memory", "layout")
_NOTHING = ("dropout", "contiguous", "clone", "detach", "alias", "lift_fresh_copy")
"""in eval mode, over arrays that nobody changes"""
_PYTHON = {operator.getitem: "getitem", operator.mul: "mul", operator.add: "add", operator.sub: "sub",
           operator.floordiv: "floordiv"}  # fmt: skip


@dataclass(frozen=True)
class Program:
    """What the runner needs."""

    steps: list[Any]
    """[operation, arguments, named arguments, slot] each"""
    tensors: dict[str, Tensor]
    """weights and constants by name"""
    slots: list[tuple[int, str]]
    """(slot, name of its tensor)"""
    inputs: list[int]
    """slots of the inputs"""
    outputs: list[Any]
    """slots of the outputs, as references"""
    batch: int | None = None
    """None: any; else the model fixed it when it was traced"""
    batch_reason: str = ""
    """why it is fixed"""


def freeze(model: nn.Module, example: Sequence[Any], *, batched: bool = True) -> Program:
    """The program of ``model`` for inputs like ``example`` (a tuple of tensors).

    ``batched``: the first axis of every input is free, where the model allows it. Raises
    :class:`~hasten.errors.ConfigurationError` for an operation that the runner does not have.
    """
    plain = exportable(model).eval()
    given, reason = tuple(example), "the batch was not to be free"
    if batched:
        size = torch.export.Dim("batch", min=1)
        shapes = tuple({0: size} if isinstance(x, Tensor) and x.dim() else None for x in given)
        several = tuple(
            x.repeat(2, *([1] * (x.dim() - 1))) if isinstance(x, Tensor) and x.dim() and len(x) == 1 else x
            for x in given
        )
        try:
            return _translate(torch.export.export(plain, several, dynamic_shapes=shapes))
        except ConfigurationError:
            raise
        except Exception as error:  # torch raises many kinds where a model asks for its batch as a number: fixed, then
            reason = _first_line(error)
    try:
        exported = torch.export.export(plain, given)
    except Exception as error:  # torch raises many kinds here
        raise ConfigurationError(
            f"the model cannot be exported ({_first_line(error)}); pass an example that it takes"
        ) from error
    sizes = [len(x) for x in given if isinstance(x, Tensor) and x.dim()]
    if not sizes:
        return _translate(exported)
    return replace(_translate(exported), batch=sizes[0], batch_reason=reason)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__


def _translate(exported: Any) -> Program:
    signature = exported.graph_signature
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants
    tensors: dict[str, Tensor] = {}
    slot_of: dict[Any, int] = {}
    slots: list[tuple[int, str]] = []
    inputs: list[int] = []
    steps: list[Any] = []
    outputs: list[Any] = []
    count = 0
    for node in exported.graph.nodes:
        slot = slot_of[node] = count
        count += 1
        if node.op == "placeholder":
            name = stored.get(node.name) or lifted.get(node.name)
            if name is None:
                inputs.append(slot)
                continue
            if not node.users:
                continue
            values = exported.state_dict.get(name)
            tensors[name] = (exported.constants[name] if values is None else values).detach()
            slots.append((slot, name))
        elif node.op == "output":
            outputs = [_argument(a, slot_of) for a in node.args[0]]
        elif node.op == "call_function":
            name = _name(node.target)
            if name in ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size", "ge", "le"):
                continue
            if name in _NOTHING:
                slot_of[node] = slot_of[node.args[0]]
                continue
            if name not in OPERATIONS:
                raise ConfigurationError(f"operation {name!r} of the model has no torch-free form; save it with torch")
            named = {
                k: _argument(v, slot_of) for k, v in node.kwargs.items() if k not in ("device", "pin_memory", "layout")
            }
            steps.append([name, [_argument(a, slot_of) for a in node.args], named, slot])
    return Program(steps, tensors, slots, inputs, outputs)


def _name(target: Any) -> str:
    if target in _PYTHON:
        return _PYTHON[target]
    text: str = target.name() if hasattr(target, "name") and callable(target.name) else str(target)
    text = text.split("::")[-1].split(".")[0]
    return text[:-1] if text.endswith("_") and text[:-1] in OPERATIONS else text


def _argument(value: Any, slot_of: dict[Any, int]) -> Any:
    if isinstance(value, torch.fx.Node):
        return {"s": slot_of[value]}
    if isinstance(value, (list, tuple)):
        return [_argument(v, slot_of) for v in value]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return None if isinstance(value, (torch.device, torch.layout, torch.memory_format)) else str(value)
