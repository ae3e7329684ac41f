"""Why a model cannot be lowered, on one line: the layer, and the operator or the line of its code.

A tracer that fails was inside the ``forward`` of some layer: the innermost frame of the traceback whose first argument
is one of the model's modules. An operator without a translation is a node of the traced graph, and every node knows the
modules that it was traced in.
"""

from __future__ import annotations

import contextlib
import io
import linecache
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import nn

__all__ = ["first_line", "fixed_batch", "fresh", "hushed", "stopped_at", "trace", "untranslated"]

_LOGS = ("torch.onnx", "onnxscript", "onnx_ir", "torch.fx", "torch.export", "torch._export", "torch._dynamo",
         "torch._subclasses.fake_tensor")  # fmt: skip
_HANDS_ON = ("torch.nn.modules.module", "torch.fx", "torch.export", "torch._export", "hasten.compress.export")
_TARGET = re.compile(r"target=torch\.ops\.([\w.]+?)(?:\.default)?\]")
_ON_VALUES = re.compile(r"data-dependent|Dynamic control flow|aten\._local_scalar_dense|DataDependent", re.IGNORECASE)


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Without the graphs and warnings that exporters write to standard error while they try."""
    logs = [logging.getLogger(n) for n in _LOGS]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def trace(model: nn.Module, given: tuple[Any, ...], shapes: Any = None) -> Any:
    """``torch.export`` of the model, without its noise."""
    with hushed():
        return torch.export.export(model, fresh(given), dynamic_shapes=shapes)


def fresh(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same examples as new tensors: a tracer leaves marks on those that it is given."""
    return tuple(x.detach() for x in given)


def _called(name: str, module: nn.Module) -> str:
    return f"layer {name!r} ({type(module).__name__})" if name else f"the model itself ({type(module).__name__})"


def stopped_at(model: nn.Module, error: BaseException) -> str:
    """Where a tracer stopped and why, such as ``layer 'halving' (Loop) chooses by a tensor's values in `while …:```."""
    names = {id(m): n for n, m in model.named_modules()}
    found: tuple[str, nn.Module, FrameType, int] | None = None
    step = error.__traceback__
    while step is not None:
        code = step.tb_frame.f_code
        inside = step.tb_frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if id(inside) in names and not _hands_on(step.tb_frame):
            assert isinstance(inside, nn.Module)
            found = (names[id(inside)], inside, step.tb_frame, step.tb_lineno)
        step = step.tb_next
    said = first_line(error)
    if found is None:
        return said
    name, module, frame, line = found
    source = linecache.getline(frame.f_code.co_filename, line).strip()
    where = f"in `{source}`" if source else f"in line {line} of {frame.f_code.co_filename}"
    if _ON_VALUES.search(f"{type(error).__name__} {error}"):
        return (
            f"{_called(name, module)} goes on by the values of a tensor {where}, and a graph has one course for all "
            "values (torch.cond, torch.where or a fixed number of steps can be traced)"
        )
    return f"{_called(name, module)} stops the tracer {where}: {said}"


def _hands_on(frame: FrameType) -> bool:
    """Whether it only hands a module on: torch's ``_call_impl`` and the like, or this folder."""
    return str(frame.f_globals.get("__name__", "")).startswith(_HANDS_ON)


def untranslated(model: nn.Module, program: Any, error: BaseException) -> str | None:
    """The operator that an exporter's error complains of, and the layers that use it; None for another complaint."""
    match = _TARGET.search(str(error))
    if match is None:
        return None
    operator, users = _users(program, match.group(1))
    modules = dict(model.named_modules())
    layers = [_called(n, modules[n]) for n in users if n in modules]
    who = " and ".join(layers[:2]) + (f" and {len(layers) - 2} more" if len(layers) > 2 else "") if layers else "it"
    return f"{who} use{'s' if len(layers) < 2 else ''} {operator}, which no operator of ONNX stands for"


def _users(program: Any, operator: str) -> tuple[str, Sequence[str]]:
    """The operator as the model calls it and the paths of the innermost modules that do, in order."""
    with hushed(), contextlib.suppress(Exception):  # a decomposition may fail: then the undecomposed graph must do
        program = program.run_decompositions()
    name = operator.rpartition(".")[2]
    calls = [(str(n.target).removesuffix(".default"), n) for n in program.graph.nodes if n.op == "call_function"]
    same = [(told, n) for told, n in calls if told.rpartition(".")[2] == name]
    same = same or [(told, n) for told, n in calls if told.endswith(f"_{name}")]  # prims.x was aten.special_x
    found: dict[str, None] = {}
    for _, node in same:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        if stack:
            found[str(stack[-1][0]).removeprefix("L['self']").removeprefix(".")] = None
    return (same[0][0] if same else operator), list(found)


def fixed_batch(error: BaseException) -> bool:
    """Whether a tracer complains that a dimension said to change cannot."""
    return any(said in str(error) for said in ("Constraints violated", "conflicts between user-specified ranges"))
