"""The walk over a graph of ``torch.export``: what is known beforehand is computed, the rest becomes operations.

How one operator becomes operations is a rule, registered by the operator's name (:mod:`views`, :mod:`arithmetic`). A
rule gets the walk, the node and its arguments by name, and gives the value of the node, or a list of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hasten.compress.fused import lines, run
from hasten.compress.fused.values import Buffer, Operation, Unsupported, Value, contiguous, merged, viewed

__all__ = ["RULES", "Arguments", "Lowered", "Lowering", "Rule", "operator_name", "repeated", "rule"]

_NOTHING = ("dropout", "contiguous", "clone", "detach", "alias", "lift_fresh_copy", "expand_as")
_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size", "ge", "le")
_MOST = 5
"""Dimensions of a loop."""
_EXACT = 2**24
"""Whole numbers up to here are float32."""
TURNS = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t",
         "select", "slice", "expand", "to", "_to_copy")  # fmt: skip
"""Operators that whole numbers may pass on their way to a look-up."""


@dataclass
class Lowered:
    """Operations in order, and where the inputs arrive and the result leaves."""

    operations: list[Operation] = field(default_factory=list)
    inputs: list[Value] = field(default_factory=list)
    result: Value | None = None
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    """of the results of one sample, without the batch; they lie one behind the other in ``result``"""
    spec: Any = None
    """how the results are handed back, where that is not a single tensor"""
    limits: list[tuple[int, int] | None] = field(default_factory=list)
    """for each input: None for float32, or the least and largest whole number that may be in it"""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """matrices (out, in) of the products, by name"""


class Lowering:
    """Operations in the making, and what every node is so far."""

    def __init__(self, exported: Any) -> None:
        self.exported = exported
        self.nodes = list(exported.graph.nodes)
        signature = exported.graph_signature
        stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        lifted = signature.inputs_to_lifted_tensor_constants
        self.names: dict[Any, str] = {}
        self.known: dict[Any, Any] = {}  # node -> its value where the input does not matter
        self.values: dict[Any, Any] = {}  # node -> Value or list of them
        self.constants: dict[int, Value] = {}
        self.whole: dict[Buffer, int] = {}  # buffers of whole numbers -> the input that they come from
        self.made = Lowered()
        self._alive: list[Tensor] = []  # so that identities stay those of one tensor
        for node in self.nodes:
            name = stored.get(node.name) or lifted.get(node.name) if node.op == "placeholder" else None
            if name is not None:
                held = exported.state_dict.get(name)
                self.names[node] = name
                self.known[node] = (exported.constants[name] if held is None else held).detach()

    def run(self) -> Lowered:
        """All nodes in their order."""
        for node in self.nodes:
            if node in self.known:
                continue
            if node.op == "placeholder":
                shape = tuple(node.meta["val"].shape)
                self.values[node] = value = self.new(shape)
                if node.meta["val"].is_floating_point():
                    self.made.limits.append(None)
                else:
                    self.whole[value.buffer] = len(self.made.inputs)
                    self.made.limits.append((-_EXACT, _EXACT))
                self.made.inputs.append(value)
            elif node.op == "output":
                self._output(node.args[0])
            elif node.op == "call_function":
                self._call(node)
        return self.made

    def _output(self, leaves: Any) -> None:
        kinds = [str(o.kind).rpartition(".")[2] for o in self.exported.graph_signature.output_specs]
        if any(kind != "USER_OUTPUT" for kind in kinds):
            raise Unsupported("the model changes its own buffers while it runs")
        found = [self.values.get(n) if isinstance(n, torch.fx.Node) else None for n in leaves]
        results: list[Value] = []
        for node, value in zip(leaves, found, strict=True):
            if not isinstance(value, Value) or value.buffer in self.whole:
                what = "depends on no input" if node in self.known else "is no tensor of float32 made of the input"
                raise Unsupported(f"a result ({node}) {what}")
            shape = tuple(node.meta["val"].shape)
            if not shape or shape[0] != 1:
                raise Unsupported(f"the result of one sample has shape {shape}, which does not begin with its batch")
            results.append(value)
            self.made.shapes.append(shape[1:])
        if not results:
            raise Unsupported("the model returns nothing")
        spec = self.exported.call_spec.out_spec
        self.made.spec = None if spec.is_leaf() else spec
        self.made.result = self.in_order(results[0]) if len(results) == 1 else self._joined(results)

    def _joined(self, results: list[Value]) -> Value:
        """All results one behind the other."""
        whole, at = self.new((sum(r.size for r in results),)), 0
        for value in results:
            self.copy(value, Value(whole.buffer, value.shape, contiguous(value.shape), at))
            at += value.size
        return whole

    def _call(self, node: Any) -> None:
        name = operator_name(node.target)
        if name in _CHECKS:
            return
        if all(a in self.known for a in node.all_input_nodes):
            given = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: self.known[n])
            self.known[node] = node.target(*given[0], **given[1])
            return
        if name in _NOTHING:
            self.values[node] = self.values[node.args[0]]
            return
        if name not in RULES:
            raise Unsupported(f"{node.name}: {name} has no operation in a fused network")
        made = node.meta.get("val")
        first = self.values.get(node.args[0]) if node.args and isinstance(node.args[0], torch.fx.Node) else None
        source = first.buffer if isinstance(first, Value) else None
        float32 = not isinstance(made, Tensor) or made.dtype is torch.float32
        if not float32 and not (name in TURNS and source in self.whole and made.dtype in (torch.int64, torch.int32)):
            raise Unsupported(f"{node.name}: {name} gives {made.dtype}; a fused network computes in float32")
        self.values[node] = found = RULES[name](self, node, Arguments(self, node))
        if not float32 and isinstance(found, Value) and source is not None:
            self.whole.setdefault(found.buffer, self.whole[source])  # of a copy, too, it is known where it comes from

    # --- values ------------------------------------------------------------------------------------------------------

    def new(self, shape: tuple[int, ...]) -> Value:
        """Room for an array."""
        return Value(Buffer(math.prod(shape)), shape, contiguous(shape))

    def _like(self, value: Value) -> Value:
        """Room for an array that lies as this one does, where it fills its room: then lines stay lines."""
        order = sorted(range(len(value.shape)), key=lambda d: (-value.strides[d], d))
        strides, step = [0] * len(order), 1
        for d in reversed(order):
            if value.shape[d] == 1:
                continue
            if value.strides[d] != step:
                return self.new(value.shape)
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
        wide = [repeated(s, result.shape) for s in sources]
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
        result = self._like(whole[0]) if whole else self.new(shape)
        return self.elements(run.BINARY, lines.BINARY.index(name), [a, b], result)

    def in_order(self, value: Value) -> Value:
        """The array itself where its numbers lie one behind the other, else a copy that does."""
        flat = viewed(value, (value.size,))
        if flat is not None and (flat.strides == (1,) or value.size == 1):
            return value
        return self.copy(value, self.new(value.shape))

    def reshaped(self, value: Value, shape: tuple[int, ...]) -> Value:
        """As torch's reshape: a view where it can be one."""
        found = viewed(value, shape)
        if found is None:
            found = viewed(self.in_order(value), shape)
        assert found is not None
        return found

    def product(self, x: Value, weight: Tensor, name: str, bias: Value | None) -> Value:
        """(…, in) times (out, in)."""
        outs, ins = weight.shape
        rows = viewed(x, (x.size // ins, ins))
        if rows is None or (rows.strides[1] != 1 and ins > 1):
            rows = viewed(self.in_order(x), (x.size // ins, ins))
        assert rows is not None
        self.made.weights[name] = weight
        result = self.new((rows.shape[0], outs))
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
        x = self.in_order(x)
        result, count = self.new(x.shape), x.shape[-1]
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
        result = self.new(shape)
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


def repeated(value: Value, shape: tuple[int, ...]) -> Value:
    """An array as one of ``shape``, by the rule of torch."""
    missing = len(shape) - len(value.shape)
    own, strides = (1,) * missing + value.shape, (0,) * missing + value.strides
    return Value(value.buffer, shape, tuple(0 if n == 1 else s for n, s in zip(own, strides, strict=True)), value.start)


class Arguments:
    """The arguments of a node by their names in torch's schema."""

    def __init__(self, lowering: Lowering, node: Any) -> None:
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
        """An argument that is an array or a number."""
        return self.lowering.value(self.named[name])

    def optional(self, name: str) -> Value | None:
        """The same, or None."""
        return None if self.named.get(name) is None else self.value(name)

    def tensor(self, name: str) -> tuple[Tensor, str]:
        """A constant and its name; refuses what is computed."""
        node = self.named[name]
        if node not in self.lowering.known:
            raise Unsupported(f"{name} is computed from the input; only stored weights are packed")
        return self.lowering.known[node], self.lowering.names.get(node, node.name)


def operator_name(target: Any) -> str:
    """``aten::add_.Tensor`` as ``add``."""
    text: str = target.name() if hasattr(target, "name") and callable(target.name) else getattr(target, "__name__", "")
    text = text.split("::")[-1].split(".")[0]
    return text[:-1] if text.endswith("_") and not text.endswith("__") else text


Rule = Callable[[Lowering, Any, Arguments], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Decorator: how the operators of these names become operations."""

    def register(rule: Rule) -> Rule:
        for name in names:
            RULES[name] = rule
        return rule

    return register
