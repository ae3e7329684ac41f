"""From a model to operations over float32, by the graph of ``torch.export`` for one sample.

Whatever does not depend on the input is computed here, once. Views cost nothing; an array is put in order only where an
operation needs its rows so. An operator without an operation is named in
:class:`~hasten.compress.fused.values.Unsupported`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hasten.compress.fused import lines, run
from hasten.compress.fused.values import Buffer, Operation, Unsupported, Value, contiguous, merged, viewed
from hasten.compress.technique import exportable

__all__ = ["Lowered", "lower"]

_NOTHING = ("dropout", "contiguous", "clone", "detach", "alias", "lift_fresh_copy", "expand_as")
_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size", "ge", "le")
_MOST = 5
"""Dimensions of a loop."""


@dataclass
class Lowered:
    """Operations in order, and where the inputs arrive and the result leaves."""

    operations: list[Operation] = field(default_factory=list)
    inputs: list[Value] = field(default_factory=list)
    result: Value | None = None
    shape: tuple[int, ...] = ()
    """of the result of one sample, without the batch"""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """matrices (out, in) of the products, by name"""


def lower(model: nn.Module, example: tuple[Tensor, ...]) -> Lowered:
    """Operations of ``model`` for one sample shaped as ``example`` (each with a batch of 1).

    Raises :class:`~hasten.compress.fused.values.Unsupported`.
    """
    for given in example:
        if not given.is_floating_point():
            raise Unsupported(f"an input is {given.dtype}; only numbers that are float32 go in")
    try:
        exported = torch.export.export(exportable(model).eval(), example)
    except Exception as error:  # torch raises many kinds here
        first = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise Unsupported(f"the model cannot be exported ({first})") from error
    with torch.inference_mode():
        return _Lowering(exported).run()


class _Lowering:
    def __init__(self, exported: Any) -> None:
        self.nodes = list(exported.graph.nodes)
        signature = exported.graph_signature
        stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        lifted = signature.inputs_to_lifted_tensor_constants
        self.names: dict[Any, str] = {}
        self.known: dict[Any, Any] = {}  # node -> its value where the input does not matter
        self.values: dict[Any, Any] = {}  # node -> Value or list of them
        self.constants: dict[int, Value] = {}
        self.made = Lowered()
        self._alive: list[Tensor] = []  # so that identities stay those of one tensor
        for node in self.nodes:
            name = stored.get(node.name) or lifted.get(node.name) if node.op == "placeholder" else None
            if name is not None:
                held = exported.state_dict.get(name)
                self.names[node] = name
                self.known[node] = (exported.constants[name] if held is None else held).detach()

    def run(self) -> Lowered:
        for node in self.nodes:
            if node in self.known:
                continue
            if node.op == "placeholder":
                shape = tuple(node.meta["val"].shape)
                self.values[node] = value = self._new(shape)
                self.made.inputs.append(value)
            elif node.op == "output":
                self._output(node.args[0])
            elif node.op == "call_function":
                self._call(node)
        return self.made

    def _output(self, leaves: Any) -> None:
        found = [self.values[n] if n in self.values else self.known.get(n) for n in leaves]
        if len(found) != 1 or not isinstance(found[0], Value):
            raise Unsupported("the model returns more than one tensor")
        shape = tuple(leaves[0].meta["val"].shape)
        if not shape or shape[0] != 1:
            raise Unsupported(f"the result of one sample has shape {shape}, which does not begin with its batch")
        self.made.result, self.made.shape = self._in_order(found[0]), shape[1:]

    def _call(self, node: Any) -> None:
        name = _name(node.target)
        if name in _CHECKS:
            return
        if all(a in self.known for a in node.all_input_nodes):
            given = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: self.known[n])
            self.known[node] = node.target(*given[0], **given[1])
            return
        if name in _NOTHING:
            self.values[node] = self.values[node.args[0]]
            return
        if name not in _OPERATIONS:
            raise Unsupported(f"{node.name}: {name} has no operation in a fused network")
        made = node.meta.get("val")
        if isinstance(made, Tensor) and made.dtype is not torch.float32:
            raise Unsupported(f"{node.name}: {name} gives {made.dtype}; a fused network computes in float32")
        self.values[node] = _OPERATIONS[name](self, node, _Arguments(self, node))

    # --- values ------------------------------------------------------------------------------------------------------

    def _new(self, shape: tuple[int, ...]) -> Value:
        return Value(Buffer(math.prod(shape)), shape, contiguous(shape))

    def _like(self, value: Value) -> Value:
        """Room for an array that lies as this one does, where it fills its room: then lines stay lines."""
        order = sorted(range(len(value.shape)), key=lambda d: (-value.strides[d], d))
        strides, step = [0] * len(order), 1
        for d in reversed(order):
            if value.shape[d] == 1:
                continue
            if value.strides[d] != step:
                return self._new(value.shape)
            strides[d], step = step, step * value.shape[d]
        return Value(Buffer(value.size), value.shape, tuple(strides))

    def constant(self, tensor: Tensor) -> Value:
        """A tensor that is there from the beginning."""
        if id(tensor) not in self.constants:
            self._alive.append(tensor)
            content = tensor.to(torch.float32).contiguous().flatten().clone()
            shape = tuple(tensor.shape)
            self.constants[id(tensor)] = Value(Buffer(content.numel(), content), shape, contiguous(shape))
        return self.constants[id(tensor)]

    def value(self, argument: Any) -> Value:
        """What an argument of a node is; numbers become constants."""
        if isinstance(argument, torch.fx.Node):
            found = self.known.get(argument)
            if found is None:
                found = self.values[argument]
            argument = found
        if isinstance(argument, Value):
            return argument
        return self.constant(argument if isinstance(argument, Tensor) else torch.tensor(float(argument)))

    # --- operations --------------------------------------------------------------------------------------------------

    def elements(self, kind: int, code: int, sources: list[Value], result: Value) -> Value:
        """A function of arrays, each repeated to the shape of the result."""
        wide = [_repeated(s, result.shape) for s in sources]
        sizes, strides = merged(result.shape, [result.strides, *(w.strides for w in wide)])
        if len(sizes) > _MOST:
            raise Unsupported(f"an array of shape {result.shape} does not lie in {_MOST} even dimensions")
        pad = _MOST - len(sizes)
        self.made.operations.append(
            Operation(kind, result, tuple(wide), (1,) * pad + sizes, tuple((0,) * pad + s for s in strides), code)
        )
        return result

    def copy(self, source: Value, result: Value) -> Value:
        """``source`` written where ``result`` lies."""
        return self.elements(run.UNARY, lines.UNARY.index("copy"), [source], result)

    def unary(self, name: str, source: Value) -> Value:
        """One of :data:`lines.UNARY`."""
        return self.elements(run.UNARY, lines.UNARY.index(name), [source], self._like(source))

    def binary(self, name: str, a: Value, b: Value) -> Value:
        """One of :data:`lines.BINARY`, with the shapes of torch's rule."""
        shape = tuple(torch.broadcast_shapes(a.shape, b.shape))
        whole = [v for v in (a, b) if v.shape == shape]
        result = self._like(whole[0]) if whole else self._new(shape)
        return self.elements(run.BINARY, lines.BINARY.index(name), [a, b], result)

    def _in_order(self, value: Value) -> Value:
        flat = viewed(value, (value.size,))
        if flat is not None and (flat.strides == (1,) or value.size == 1):
            return value
        return self.copy(value, self._new(value.shape))

    def reshaped(self, value: Value, shape: tuple[int, ...]) -> Value:
        """As torch's reshape: a view where it can be one."""
        found = viewed(value, shape)
        if found is None:
            found = viewed(self._in_order(value), shape)
        assert found is not None
        return found

    def product(self, x: Value, weight: Tensor, name: str, bias: Value | None) -> Value:
        """(…, in) times (out, in)."""
        outs, ins = weight.shape
        rows = viewed(x, (x.size // ins, ins))
        if rows is None or (rows.strides[1] != 1 and ins > 1):
            rows = viewed(self._in_order(x), (x.size // ins, ins))
        assert rows is not None
        self.made.weights[name] = weight
        result = self._new((rows.shape[0], outs))
        self.made.operations.append(
            Operation(
                run.PRODUCT, result, (rows,), (rows.shape[0], ins, outs), ((), rows.strides), matrix=name, bias=bias
            )
        )
        return result

    def lined(
        self, kind: int, x: Value, extra: tuple[Value | None, ...] = (), number: float = 0.0, flag: int = 0
    ) -> Value:
        """What takes the last dimension row by row and gives as many."""
        x = self._in_order(x)
        result, count = self._new(x.shape), x.shape[-1]
        self.made.operations.append(
            Operation(
                kind, result, (x,), (x.size // count, count), ((), ()), number=number, flag=flag,
                extra=tuple(e for e in extra if e is not None),
                code=sum((e is not None) << i for i, e in enumerate(extra)),
            )
        )  # fmt: skip
        return result

    def reduced(self, name: str, x: Value, axes: tuple[int, ...], keep: bool, number: float) -> Value:
        """A sum over some dimensions, times ``number``; or the largest."""
        kept = [a for a in range(len(x.shape)) if a not in axes]
        shape = tuple(x.shape[a] for a in kept)
        result = self._new(shape)
        inner, istrides = merged(tuple(x.shape[a] for a in axes), [tuple(x.strides[a] for a in axes)])
        outer, ostrides = merged(shape, [result.strides, tuple(x.strides[a] for a in kept)])
        if len(inner) > 2 or len(outer) > 3:
            raise Unsupported(f"a sum over dimensions {axes} of {x.shape} does not lie in even lines")
        o, n = 3 - len(outer), 2 - len(inner)
        self.made.operations.append(
            Operation(
                run.REDUCE, result, (x,), (1,) * o + outer + (1,) * n + inner,
                ((0,) * o + ostrides[0] + (0, 0), (0,) * o + ostrides[1] + (0,) * n + istrides[0]),
                code=lines.REDUCE.index(name), number=number,
            )
        )  # fmt: skip
        whole = tuple(1 if a in axes else n for a, n in enumerate(x.shape)) if keep else shape
        found = viewed(result, whole)
        assert found is not None
        return found


def _repeated(value: Value, shape: tuple[int, ...]) -> Value:
    missing = len(shape) - len(value.shape)
    own, strides = (1,) * missing + value.shape, (0,) * missing + value.strides
    return Value(value.buffer, shape, tuple(0 if n == 1 else s for n, s in zip(own, strides, strict=True)), value.start)


class _Arguments:
    """The arguments of a node by their names in torch's schema."""

    def __init__(self, lowering: _Lowering, node: Any) -> None:
        self.lowering, self.named = lowering, dict(node.kwargs)
        schema = getattr(node.target, "_schema", None)
        if schema is not None:
            for argument, given in zip(schema.arguments, node.args, strict=False):
                self.named[argument.name] = given
            for argument in schema.arguments:
                self.named.setdefault(argument.name, argument.default_value)
        self.plain = node.args
        self.shape = tuple(node.meta["val"].shape) if isinstance(node.meta.get("val"), Tensor) else ()

    def __getitem__(self, name: str) -> Any:
        return self.named[name]

    def value(self, name: str) -> Value:
        return self.lowering.value(self.named[name])

    def optional(self, name: str) -> Value | None:
        return None if self.named.get(name) is None else self.value(name)

    def tensor(self, name: str) -> tuple[Tensor, str]:
        """A constant and its name; refuses what is computed."""
        node = self.named[name]
        if node not in self.lowering.known:
            raise Unsupported(f"{name} is computed from the input; only stored weights are packed")
        return self.lowering.known[node], self.lowering.names.get(node, node.name)


def _name(target: Any) -> str:
    text: str = target.name() if hasattr(target, "name") and callable(target.name) else getattr(target, "__name__", "")
    text = text.split("::")[-1].split(".")[0]
    return text[:-1] if text.endswith("_") and not text.endswith("__") else text


_Rule = Callable[[_Lowering, Any, _Arguments], Any]
_OPERATIONS: dict[str, _Rule] = {}


def _rule(*names: str) -> Callable[[_Rule], _Rule]:
    def register(rule: _Rule) -> _Rule:
        for name in names:
            _OPERATIONS[name] = rule
        return rule

    return register


# --- views ------------------------------------------------------------------------------------------------------------


@_rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze")
def _view(to: _Lowering, node: Any, given: _Arguments) -> Any:
    return to.reshaped(given.value("self"), given.shape)


@_rule("permute")
def _permute(to: _Lowering, node: Any, given: _Arguments) -> Any:
    x = given.value("self")
    order = [d % len(x.shape) for d in given["dims"]]
    return Value(x.buffer, tuple(x.shape[d] for d in order), tuple(x.strides[d] for d in order), x.start)


@_rule("transpose", "t", "mT", "numpy_T")
def _transpose(to: _Lowering, node: Any, given: _Arguments) -> Any:
    x = given.value("self")
    order = list(range(len(x.shape)))
    a, b = (given["dim0"], given["dim1"]) if "dim0" in given.named else (-2, -1)
    order[a], order[b] = order[b], order[a]
    return Value(x.buffer, tuple(x.shape[d] for d in order), tuple(x.strides[d] for d in order), x.start)


def _cut(x: Value, axis: int, start: int, count: int, step: int = 1) -> Value:
    shape, strides = list(x.shape), list(x.strides)
    begin = x.start + start * strides[axis]
    shape[axis], strides[axis] = count, strides[axis] * step
    return Value(x.buffer, tuple(shape), tuple(strides), begin)


def _picked(x: Value, axis: int, index: int) -> Value:
    axis %= len(x.shape)
    one = _cut(x, axis, index % x.shape[axis], 1)
    without = [i for i in range(len(x.shape)) if i != axis]
    return Value(one.buffer, tuple(one.shape[i] for i in without), tuple(one.strides[i] for i in without), one.start)


@_rule("select")
def _select(to: _Lowering, node: Any, given: _Arguments) -> Any:
    return _picked(given.value("self"), given["dim"], given["index"])


@_rule("slice")
def _slice(to: _Lowering, node: Any, given: _Arguments) -> Any:
    x = given.value("self")
    axis = given["dim"] % len(x.shape)
    start, _, step = slice(given["start"], given["end"], given["step"]).indices(x.shape[axis])
    return _cut(x, axis, start, given.shape[axis], step)


@_rule("unbind")
def _unbind(to: _Lowering, node: Any, given: _Arguments) -> Any:
    x = given.value("self")
    return [_picked(x, given["dim"], i) for i in range(x.shape[given["dim"]])]


@_rule("split", "split_with_sizes", "chunk")
def _split(to: _Lowering, node: Any, given: _Arguments) -> Any:
    x, parts, at = given.value("self"), [], 0
    axis = given["dim"] % len(x.shape)
    for made in node.meta["val"]:
        parts.append(_cut(x, axis, at, made.shape[axis]))
        at += made.shape[axis]
    return parts


@_rule("getitem")
def _getitem(to: _Lowering, node: Any, given: _Arguments) -> Any:
    return to.values[given.plain[0]][given.plain[1]]


@_rule("expand")
def _expand(to: _Lowering, node: Any, given: _Arguments) -> Any:
    return _repeated(given.value("self"), given.shape)


@_rule("cat")
def _cat(to: _Lowering, node: Any, given: _Arguments) -> Any:
    result, at = to._new(given.shape), 0
    axis = given["dim"] % len(given.shape)
    for part in given["tensors"]:
        x = to.value(part)
        to.copy(x, _cut(result, axis, at, x.shape[axis]))
        at += x.shape[axis]
    return result


@_rule("stack")
def _stack(to: _Lowering, node: Any, given: _Arguments) -> Any:
    result = to._new(given.shape)
    axis = given["dim"] % len(given.shape)
    for index, part in enumerate(given["tensors"]):
        to.copy(to.value(part), _picked(result, axis, index))
    return result


@_rule("to", "_to_copy", "type_as")
def _to(to: _Lowering, node: Any, given: _Arguments) -> Any:
    return given.value("self")  # what is not float32 was refused before


# --- elements ---------------------------------------------------------------------------------------------------------


def _one_of(name: str) -> _Rule:
    return lambda to, node, given: to.unary(name, to.value(given.plain[0]))


for _function in lines.UNARY[1:]:
    if _function not in ("gelu", "gelu_tanh"):
        _OPERATIONS[_function] = _one_of(_function)


@_rule("gelu")
def _gelu(to: _Lowering, node: Any, given: _Arguments) -> Any:
    return to.unary("gelu_tanh" if given["approximate"] == "tanh" else "gelu", given.value("self"))


def _two_of(name: str) -> _Rule:
    def rule(to: _Lowering, node: Any, given: _Arguments) -> Any:
        if given.named.get("rounding_mode") is not None:
            raise Unsupported(f"{node.name}: a division that rounds has no operation in a fused network")
        b = to.value(given.plain[1])
        alpha = given.named.get("alpha", 1)
        if alpha not in (None, 1):
            b = to.binary("mul", b, to.value(alpha))
        return to.binary(name, to.value(given.plain[0]), b)

    return rule


for _function in lines.BINARY:
    _OPERATIONS[_function] = _two_of(_function)


@_rule("pow")
def _pow(to: _Lowering, node: Any, given: _Arguments) -> Any:
    power = given.plain[1]
    if power not in (2, 2.0, 0.5, -0.5):
        raise Unsupported(f"{node.name}: a power of {power} has no operation in a fused network")
    return to.unary({2: "square", 0.5: "sqrt", -0.5: "rsqrt"}[power], to.value(given.plain[0]))


@_rule("clamp", "hardtanh", "clamp_min", "relu6")
def _clamp(to: _Lowering, node: Any, given: _Arguments) -> Any:
    x = given.value("self")
    low = given.named.get("min", given.named.get("min_val", 0.0 if _name(node.target) == "relu6" else None))
    high = given.named.get("max", given.named.get("max_val", 6.0 if _name(node.target) == "relu6" else None))
    x = x if low is None else to.binary("maximum", x, to.value(low))
    return x if high is None else to.binary("minimum", x, to.value(high))


# --- lines and sums ---------------------------------------------------------------------------------------------------


def _flat(to: _Lowering, value: Value | None) -> Value | None:
    return None if value is None else to._in_order(value)


@_rule("layer_norm")
def _layer_norm(to: _Lowering, node: Any, given: _Arguments) -> Any:
    x, shape = given.value("input"), given["normalized_shape"]
    flat = to.reshaped(x, (*x.shape[: len(x.shape) - len(shape)], math.prod(shape)))
    weight, bias = (_flat(to, given.optional(n)) for n in ("weight", "bias"))
    made = to.lined(run.NORM, flat, (weight, bias), float(given["eps"]))
    return to.reshaped(made, x.shape)


@_rule("rms_norm")
def _rms_norm(to: _Lowering, node: Any, given: _Arguments) -> Any:
    x, shape = given.value("input"), given["normalized_shape"]
    if len(shape) != 1:
        raise Unsupported(f"{node.name}: a norm over {len(shape)} dimensions has no operation in a fused network")
    eps = torch.finfo(torch.float32).eps if given["eps"] is None else given["eps"]
    return to.lined(run.NORM, x, (_flat(to, given.optional("weight")), None), float(eps), 1)


@_rule("softmax", "_softmax")
def _softmax(to: _Lowering, node: Any, given: _Arguments) -> Any:
    x = given.value("self")
    axis = given["dim"] % len(x.shape)
    order = [i for i in range(len(x.shape)) if i != axis] + [axis]
    turned = Value(x.buffer, tuple(x.shape[d] for d in order), tuple(x.strides[d] for d in order), x.start)
    made = to.lined(run.SOFTMAX, turned)
    back = [order.index(d) for d in range(len(order))]
    return Value(made.buffer, tuple(made.shape[d] for d in back), tuple(made.strides[d] for d in back), made.start)


def _axes(given: _Arguments, x: Value) -> tuple[int, ...]:
    dims = given.named.get("dim")
    if dims is None or dims == []:
        return tuple(range(len(x.shape)))
    return tuple(sorted(d % len(x.shape) for d in ([dims] if isinstance(dims, int) else dims)))


@_rule("mean", "sum", "amax")
def _reduce(to: _Lowering, node: Any, given: _Arguments) -> Any:
    x, name = given.value("self"), _name(node.target)
    axes = _axes(given, x)
    share = 1 / math.prod(x.shape[a] for a in axes) if name == "mean" else 1.0
    keep = bool(given.named.get("keepdim", False))
    return to.reduced("amax" if name == "amax" else "sum", x, axes, keep, share)


@_rule("adaptive_avg_pool2d", "adaptive_avg_pool1d")
def _pool(to: _Lowering, node: Any, given: _Arguments) -> Any:
    size = given["output_size"]
    if any(n != 1 for n in ([size] if isinstance(size, int) else size)):
        raise Unsupported(f"{node.name}: means of parts of an image have no operation in a fused network")
    x, count = given.value("self"), 2 if _name(node.target).endswith("2d") else 1
    axes = tuple(range(len(x.shape) - count, len(x.shape)))
    return to.reduced("sum", x, axes, True, 1 / math.prod(x.shape[a] for a in axes))


@_rule("batch_norm")
def _batch_norm(to: _Lowering, node: Any, given: _Arguments) -> Any:
    if given["training"]:
        raise Unsupported(f"{node.name}: a batch normalisation in training has no operation in a fused network")
    mean, spread = given.tensor("running_mean")[0].double(), given.tensor("running_var")[0].double()
    scale = (spread + given["eps"]).rsqrt()
    if given["weight"] is not None:
        scale = scale * given.tensor("weight")[0].double()
    shift = -mean * scale
    if given["bias"] is not None:
        shift = shift + given.tensor("bias")[0].double()
    x = given.value("input")
    shape = (1, -1, *(1 for _ in x.shape[2:]))
    return to.binary(
        "add", to.binary("mul", x, to.constant(scale.reshape(shape))), to.constant(shift.reshape(shape))
    )  # fmt: skip


# --- products ---------------------------------------------------------------------------------------------------------


@_rule("linear")
def _linear(to: _Lowering, node: Any, given: _Arguments) -> Any:
    weight, name = given.tensor("weight")
    bias = given.optional("bias")
    return to.reshaped(to.product(given.value("input"), weight, name, bias), given.shape)


@_rule("addmm")
def _addmm(to: _Lowering, node: Any, given: _Arguments) -> Any:
    weight, name = given.tensor("mat2")
    return to.product(given.value("mat1"), weight.T, name, given.value("self"))


@_rule("matmul", "bmm", "mm")
def _matmul(to: _Lowering, node: Any, given: _Arguments) -> Any:
    left, right = given.plain[:2]
    if right in to.known and to.known[right].dim() == 2:
        weight = to.known[right].T
        return to.reshaped(to.product(to.value(left), weight, to.names.get(right, right.name), None), given.shape)
    a, b = to.value(left), to.value(right)
    if len(a.shape) < 2 or len(b.shape) < 2 or len(given.shape) > 4:
        raise Unsupported(f"{node.name}: a product of {a.shape} and {b.shape} has no operation in a fused network")
    shape = (1,) * (4 - len(given.shape)) + given.shape
    result = to._new(shape)
    a, b = _repeated(a, (*shape[:3], a.shape[-1])), _repeated(b, (*shape[:2], *b.shape[-2:]))
    to.made.operations.append(
        Operation(
            run.MATMUL, result, (a, b), (*shape[:3], a.shape[3], shape[3]),
            ((*result.strides, 0), (*a.strides, 0), (*b.strides, 0)),
        )
    )  # fmt: skip
    return to.reshaped(result, given.shape)


@_rule("conv1d", "conv2d")
def _convolution(to: _Lowering, node: Any, given: _Arguments) -> Any:
    """Windows of the image as rows (a view, where nothing is added around it), then a product."""
    weight, name = given.tensor("weight")
    axes = weight.dim() - 2
    if given["groups"] != 1:
        raise Unsupported(f"{node.name}: a convolution in {given['groups']} groups has no operation in a fused network")
    x = given.value("input")
    stride, padding, dilation = (_each(given[n], axes) for n in ("stride", "padding", "dilation"))
    if any(padding):
        raise Unsupported(f"{node.name}: a convolution with a border has no operation in a fused network")
    sizes, sides = given.shape[2:], weight.shape[2:]
    places = tuple(s * n for s, n in zip(x.strides[2:], stride, strict=True))
    inside = tuple(s * n for s, n in zip(x.strides[2:], dilation, strict=True))
    windows = Value(x.buffer, (*sizes, x.shape[1], *sides), (*places, x.strides[1], *inside), x.start)
    ins = weight[0].numel()
    rows = to.reshaped(windows, (math.prod(sizes), ins))
    made = to.product(rows, weight.reshape(len(weight), ins), name, given.optional("bias"))
    steps = contiguous((*sizes, len(weight)))
    return Value(made.buffer, (1, len(weight), *sizes), (0, 1, *steps[:-1]), made.start)


def _each(value: Any, count: int) -> list[int]:
    if isinstance(value, str):
        raise Unsupported(f"padding {value!r} of a convolution has no operation in a fused network")
    listed = [value] if isinstance(value, int) else list(value)
    return listed * count if len(listed) == 1 else listed


@_rule("scaled_dot_product_attention")
def _attention(to: _Lowering, node: Any, given: _Arguments) -> Any:
    q, k, v = (given.value(n) for n in ("query", "key", "value"))
    mask = given.optional("attn_mask")
    held = to.known.get(given["attn_mask"]) if mask is not None else None
    if held is not None and held.dtype is torch.bool:
        mask = to.constant(torch.zeros(held.shape).masked_fill(~held, -1e30))
    heads = math.prod(q.shape[:-2])
    groups = heads // math.prod(k.shape[:-2])
    flat = []
    for x in (q, k, v):
        one = viewed(x, (math.prod(x.shape[:-2]), *x.shape[-2:]))
        flat.append(one if one is not None else viewed(to._in_order(x), (math.prod(x.shape[:-2]), *x.shape[-2:])))
    sizes = (heads, q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1])
    result = to._new((*q.shape[:-1], v.shape[-1]))
    sources = tuple(f for f in flat if f is not None)
    if mask is not None:
        wide = viewed(_repeated(mask, (*q.shape[:-1], k.shape[-2])), (heads, q.shape[-2], k.shape[-2]))
        if wide is None:
            raise Unsupported(f"{node.name}: a mask of shape {mask.shape} does not lie in even dimensions")
        sources = (*sources, wide)
    scale = given["scale"] if given["scale"] is not None else q.shape[-1] ** -0.5
    to.made.operations.append(
        Operation(
            run.ATTENTION, result, sources, sizes, ((), *(s.strides for s in sources)), code=groups,
            number=float(scale), flag=int(bool(given["is_causal"])),
        )
    )  # fmt: skip
    return result
