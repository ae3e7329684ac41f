"""ONNX with QDQ: weights as codes behind DequantizeLinear, rounded inputs as QuantizeLinear and DequantizeLinear.

The model is exported with its dequantised weights; afterwards each of them that a format of ONNX can hold (integers of
up to 8 bits per tensor, channel or group; FP8) is put back as codes and scales. The file is run in onnxruntime and
compared with the model before it takes its name.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hasten.compress.export.check import EXACT, STEP, Exported, arguments, compare_outputs, outputs_of, placed
from hasten.compress.export.reasons import first_line, fixed_batch, fresh, hushed, stopped_at, trace, untranslated
from hasten.compress.export.rounding import float8_of, marked
from hasten.compress.given import finite_parameters
from hasten.compress.precision import PackedLinear
from hasten.compress.quantize.base import Quantized
from hasten.compress.quantize.granularity import PerChannel, PerGroup, PerTensor
from hasten.compress.quantize.integer import Int
from hasten.compress.quantize.layers import QuantizedLayer
from hasten.compress.quantize.realise import codes_of
from hasten.compress.technique import exportable
from hasten.errors import ConfigurationError, ModelError

__all__ = ["export_onnx"]

OPSET = 21
"""The first with 4-bit codes and groups."""
_Held = tuple[list[Any], dict[str, int], str]


def export_onnx(
    model: nn.Module,
    example: Any,
    path: str | os.PathLike[str],
    *,
    tolerance: float | None = None,
    names: Sequence[str] = (),
    batch: bool = True,
) -> Exported:
    """Write ``model`` as ONNX for ``example`` (a tensor or a tuple of tensors) and check it in onnxruntime.

    ``names``: of the inputs, otherwise those of ``forward``. ``batch``: whether the first dimension of the inputs may
    change (where the model's own code fixes it the file does too, with a note). ``tolerance``: relative difference
    allowed, by default 1e-5, and 2e-2 where inputs are rounded. Needs ``hasten[onnx]``. Raises
    :class:`~hasten.errors.ModelError` where something cannot be lowered (operator and layer are named) or the outputs
    differ; no file is left then.
    """
    finite_parameters(model, "exported")
    onnx = _needed()
    given = arguments(example)
    stored = _stored(model)
    plain, said, unsaid = marked(exportable(model))
    plain.eval()
    codes = _by_weight(plain, stored)
    with torch.no_grad():
        for name, quantized in codes.items():  # a kernel may read its codes through a half format
            weight = plain.get_parameter(name)
            weight.copy_(quantized.dequantize().view_as(weight))
    reference = outputs_of(plain, given)
    bound = tolerance if tolerance is not None else (STEP if said or unsaid else EXACT)
    graph, free = _exported(plain, given, names, batch)
    layers = _put_back(onnx, graph, codes)

    def check(place: Path) -> float:
        return compare_outputs(reference, _run(place, given), bound, "the file in onnxruntime")

    with placed(path, check) as (place, found):
        onnx.save(graph, place)
    target = Path(path)
    notes = _notes(stored, layers, unsaid)
    if batch and not free:
        sizes = " and ".join(dict.fromkeys(str(x.shape[0]) for x in given if x.ndim))
        notes = (*notes, f"the model works for a first dimension of {sizes} only, so the file takes no other")
    return Exported(target, target.stat().st_size, found[0], bound, tuple(layers), notes)


def _needed() -> Any:
    try:
        onnx = importlib.import_module("onnx")
        importlib.import_module("onnxscript")
        importlib.import_module("onnxruntime")
    except ImportError as error:
        raise ConfigurationError(
            f"an ONNX export needs onnx, onnxscript and onnxruntime ({error.name} is missing); pip install hasten[onnx]"
        ) from error
    return onnx


def _stored(model: nn.Module) -> dict[str, Quantized]:
    """Weights that are codes, by the path of the layer or parameter."""
    found = {path: m.quantized() for path, m in model.named_modules() if isinstance(m, QuantizedLayer)}
    for path, m in model.named_modules():  # what tune builds
        held_inside = path.rpartition(".")[0] in found or (path == "inner" and "" in found)
        if isinstance(m, PackedLinear) and m.kernel_name in ("int8-weight", "int8-dynamic") and not held_inside:
            found[path] = codes_of(m.packed, m.kernel_name, Int(8, PerChannel(0)))
    held = getattr(model, "quantized", None)
    if isinstance(held, Mapping):
        found |= {path: q for path, q in held.items() if isinstance(q, Quantized)}
    return found


def _by_weight(plain: nn.Module, stored: Mapping[str, Quantized]) -> dict[str, Quantized]:
    """Parameter of the exported model -> its codes; behind the rounding of its input a layer lies one level deeper."""
    parameters = dict(plain.named_parameters())
    result = {}
    for path, codes in stored.items():
        stem = "" if path == "weight" else path.removesuffix(".weight")
        dot = f"{stem}." if stem else ""
        name = next((n for n in (path, f"{dot}weight", f"{dot}1.weight") if n in parameters), None)
        if name is not None:
            result[name] = codes
    return result


def _exported(plain: nn.Module, given: tuple[Any, ...], names: Sequence[str], batch: bool) -> tuple[Any, bool]:
    """The ONNX model, with initialisers named as parameters; whether the first dimension may change."""
    shapes: Any = tuple({0: torch.export.Dim.DYNAMIC} if batch and x.ndim else None for x in given)
    try:
        with hushed():
            return _translated(plain, given, names, shapes), batch
    except Exception as error:  # the exporter wraps whatever stopped it; tracing by itself tells what it was
        try:
            program = trace(plain, given, shapes)
        except Exception as stopped:
            if batch and fixed_batch(stopped):  # the model itself asks for the size of the example
                return _exported(plain, given, names, False)
            reason = stopped_at(plain, stopped)
        else:
            cause = error.__cause__ or error
            reason = untranslated(plain, program, cause) or first_line(cause)
        raise ModelError(f"the model cannot be written as ONNX: {reason}; nothing was written") from error


def _translated(plain: nn.Module, given: tuple[Any, ...], names: Sequence[str], shapes: Any) -> Any:
    table: dict[Any, Any] = {torch.ops.hasten.round_to_codes.default: _rounding_nodes()}
    program = torch.onnx.export(
        plain, fresh(given), dynamo=True, optimize=False, verbose=False, opset_version=OPSET, dynamic_shapes=shapes,
        custom_translation_table=table, input_names=list(names) or None,
    )  # fmt: skip
    assert program is not None
    return program.model_proto


def _rounding_nodes() -> Any:
    op: Any = importlib.import_module("onnxscript").opset21

    def nodes(x: Any, scale: Any, zero: Any, low: int, high: int) -> Any:
        if (low, high) != (-128, 127):
            shift = op.Cast(zero, to=1)
            least = op.Mul(op.Sub(float(low), shift), scale)
            most = op.Mul(op.Sub(float(high), shift), scale)
            x = op.Clip(x, least, most)
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero), scale, zero)

    return nodes


def _put_back(onnx: Any, graph: Any, codes: Mapping[str, Quantized]) -> list[tuple[str, str]]:
    """Replace initialisers by codes, scales and a node in front of all others; says how each is held."""
    held: list[tuple[str, str]] = []
    initialisers = {t.name: t for t in graph.graph.initializer}
    nodes: list[Any] = []
    for name, quantized in codes.items():
        tensor = initialisers.get(name)
        made = None if tensor is None else _tensors(onnx, name, quantized, tuple(tensor.dims))
        if made is None:
            continue
        parts, settings, label = made
        graph.graph.initializer.remove(tensor)
        graph.graph.initializer.extend(parts)
        nodes.append(
            onnx.helper.make_node(
                "DequantizeLinear", [p.name for p in parts], [name], name=f"dequantize/{name}", **settings
            )
        )
        held.append((name, label))
    for node in reversed(nodes):
        graph.graph.node.insert(0, node)
    return held


def _tensors(
    onnx: Any, name: str, q: Quantized, shape: tuple[int, ...]
) -> tuple[list[Any], dict[str, int], str] | None:
    """Codes, scales and zero points of a weight of ``shape``; None for what DequantizeLinear cannot hold."""
    fmt, grain = q.format, q.format.granularity
    whole = isinstance(fmt, Int) and fmt.bits <= 8
    eight = _eight_bits(onnx, fmt)
    if not whole and eight is None:
        return None
    settings: dict[str, int] = {}
    side: tuple[int, ...]
    if isinstance(grain, PerGroup):
        # groups run along the inputs; a short last group, and a convolution's inputs, have no such layout in ONNX
        if len(shape) != 2 or grain.axis not in (1, -1) or shape[1] % grain.size or not whole:
            return None
        settings, side = {"axis": 1, "block_size": grain.size}, (shape[0], shape[1] // grain.size)
    elif isinstance(grain, PerChannel) and grain.axis == 0:
        settings, side = {"axis": 0}, (shape[0],)
    elif isinstance(grain, PerTensor):
        side = ()
    else:
        return None
    proto = onnx.TensorProto
    few = whole and isinstance(fmt, Int) and fmt.bits <= 4
    kind = eight if eight is not None else proto.INT4 if few else proto.INT8
    values = _values(q, few) if whole else q.codes.reshape(-1).to(torch.uint8).numpy()
    parts = [
        onnx.helper.make_tensor(f"{name}/codes", kind, shape, values.tobytes(), raw=True),
        onnx.numpy_helper.from_array(q.scales.float().reshape(side).numpy(), f"{name}/scales"),
    ]
    if q.zeros is not None:
        zeros = q.zeros.to(torch.int8).reshape(side)
        packed = _nibbles(zeros) if few else zeros.numpy()
        parts.append(onnx.helper.make_tensor(f"{name}/zeros", kind, side, packed.tobytes(), raw=True))
    return parts, settings, f"{fmt.label} as {proto.DataType.Name(kind).lower()}"


def _eight_bits(onnx: Any, fmt: Any) -> int | None:
    """ONNX's name of a float of 8 bits."""
    names = {torch.float8_e4m3fn: onnx.TensorProto.FLOAT8E4M3FN, torch.float8_e5m2: onnx.TensorProto.FLOAT8E5M2}
    kind = float8_of(fmt)
    return None if kind is None else int(names[kind])


def _values(q: Quantized, few: bool) -> Any:
    return _nibbles(q.codes) if few else q.codes.to(torch.int8).reshape(-1).numpy()


def _nibbles(codes: Tensor) -> Any:
    """4-bit codes, two to a byte, the first in the lower half."""
    flat = codes.reshape(-1).to(torch.int16).numpy().astype(np.uint8) & 0xF
    if len(flat) % 2:
        flat = np.append(flat, np.uint8(0))
    return (flat[0::2] | (flat[1::2] << 4)).astype(np.uint8)


def _run(place: Path, given: tuple[Any, ...]) -> list[Tensor]:
    import onnxruntime  # type: ignore[import-untyped,unused-ignore]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(place), options, providers=["CPUExecutionProvider"])
        feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), given, strict=True)}
        results = session.run(None, feed)
    except Exception as error:  # its exceptions have no common class
        raise ModelError(f"onnxruntime does not run the file: {first_line(error)}; nothing was written") from error
    floats = [torch.from_numpy(np.asarray(r)) for r in results]
    return [r.float() for r in floats if r.is_floating_point()]


def _notes(stored: Mapping[str, Quantized], layers: Sequence[Any], unsaid: int) -> tuple[str, ...]:
    notes = []
    if len(layers) < len(stored):
        notes.append(
            f"{len(stored) - len(layers)} of {len(stored)} quantised weights have a format that ONNX cannot hold; "
            "they are float32 there, with the rounded values"
        )
    if unsaid:
        notes.append(
            f"{unsaid} inputs are rounded by arithmetic in the file, not by QDQ nodes: those hold one range, found "
            "before"
        )
    return tuple(notes)
