"""From a traced model to operations over bytes.

The model (batch normalisations folded) is traced with :mod:`torch.fx` and run once on an example, so that shapes and
numbers that are computed from them are known. Nodes are then walked in order: a convolution or linear layer takes in
the addition and the clamp behind it when nobody else reads what lies between. An operator that is not known here is
named in :class:`Unsupported`; the technique then leaves the model as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from hasten.compress.int8.operations import Convolution, Joined, Mean, Operation, Pool, Shortcut, Value

__all__ = ["Lowered", "Ranges", "Unsupported", "lower", "trace"]

_SKIPPED = (nn.Identity, nn.Dropout, nn.Dropout2d)
_ADDITIONS = (operator.add, operator.iadd, torch.add)
_RELUS = (functional.relu, torch.relu, torch.relu_, functional.relu_)
Ranges = Callable[[str], tuple[float, float]]
"""node -> least and largest value that calibration saw"""


class Unsupported(Exception):
    """A node that has no operation over bytes; the text names it and says why."""


class Lowered:
    """Operations in order, the value that takes the input, and the one that leaves (None: float32 numbers)."""

    def __init__(self, operations: list[Operation], entry: Value, output: Value | None, shape: tuple[int, ...]) -> None:
        self.operations = operations
        self.entry = entry
        self.output = output
        self.shape = shape
        """of one output, without the batch"""


def trace(model: nn.Module) -> fx.GraphModule:
    """The model as a graph; raises :class:`Unsupported` where Python decides by data."""
    try:
        return fx.symbolic_trace(model)
    except Exception as error:  # whatever a model's own code raises when it meets a symbol
        reason = str(error).splitlines()[0].partition(". ")[0][:100]
        raise Unsupported(f"the model cannot be traced ({reason})") from error


class _Recorder(fx.Interpreter):
    """Runs the graph and keeps what every node gave."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.seen[n] = result = super().run_node(n)
        return result


def lower(graph: fx.GraphModule, example: Tensor, ranges: Ranges) -> Lowered:
    """Operations of ``graph`` for inputs shaped as ``example`` (batch, channels, height, width)."""
    recorder = _Recorder(graph)
    with torch.inference_mode():
        recorder.run(example)
    return _Lowering(graph, recorder.seen, ranges).run()


class _Lowering:
    def __init__(self, graph: fx.GraphModule, seen: dict[fx.Node, Any], ranges: Ranges) -> None:
        self.modules = dict(graph.named_modules())
        self.nodes = list(graph.graph.nodes)
        self.seen, self.ranges = seen, ranges
        self.values: dict[fx.Node, Value] = {}
        self.shortcuts: dict[fx.Node, Shortcut] = {}
        self.done: set[fx.Node] = set()
        self.operations: list[Operation] = []
        self.leaves: Any = None

    def run(self) -> Lowered:
        output = next(n for n in self.nodes if n.op == "output").args[0]
        if not isinstance(output, fx.Node) or not isinstance(self.seen[output], Tensor):
            raise Unsupported("the model returns more than one tensor")
        inputs = [n for n in self.nodes if n.op == "placeholder"]
        if len(inputs) != 1 or self.seen[inputs[0]].dim() != 4:
            raise Unsupported("the model takes more than one image tensor (batch, channels, height, width)")
        self.output = output
        entry = self._value(inputs[0])
        for node in self.nodes:
            if node in self.done or node.op in ("placeholder", "output", "get_attr"):
                continue
            if isinstance(self.seen[node], Tensor):
                self._operation(node)
        if output not in self.values and self.leaves is not output:
            raise Unsupported(f"the output {output.name} is no result of an operation over bytes")
        if not any(isinstance(o, Convolution) for o in self.operations):
            raise Unsupported("the model holds no convolution and no linear layer")
        shape = tuple(self.seen[output].shape[1:])
        return Lowered(self.operations, entry, self.values.get(output), shape)

    # --- what nodes are --------------------------------------------------------------------------------------------

    def _module(self, node: Any) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def _is_relu(self, node: fx.Node) -> float | None:
        """The upper bound of a clamp at 0, or None for another node."""
        module = self._module(node)
        if isinstance(module, nn.ReLU) or (node.op == "call_function" and node.target in _RELUS):
            return float(np.inf)
        if isinstance(module, nn.ReLU6) or (node.op == "call_function" and node.target is functional.relu6):
            return 6.0
        if isinstance(module, nn.Hardtanh) and module.min_val == 0:
            return float(module.max_val)
        return float(np.inf) if node.op == "call_method" and node.target in ("relu", "relu_") else None

    def _is_addition(self, node: fx.Node) -> bool:
        two = len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args) and not node.kwargs
        named = node.op == "call_function" and node.target in _ADDITIONS
        return two and (named or (node.op == "call_method" and node.target in ("add", "add_")))

    def _is_skipped(self, node: fx.Node) -> bool:
        if isinstance(self._module(node), _SKIPPED):
            return True
        return node.op == "call_function" and node.target is functional.dropout

    def _constant(self, argument: Any) -> Any:
        """What an argument was when the example ran."""
        return self.seen[argument] if isinstance(argument, fx.Node) else argument

    # --- values ----------------------------------------------------------------------------------------------------

    def _shape(self, node: fx.Node) -> tuple[int, int, int]:
        """(height, width, channels)."""
        shape = self.seen[node].shape
        if len(shape) == 2:
            return 1, 1, int(shape[1])
        if len(shape) != 4:
            raise Unsupported(f"{node.name} has {len(shape)} dimensions; bytes are run for feature maps and vectors")
        return int(shape[2]), int(shape[3]), int(shape[1])

    def _value(self, node: fx.Node, *, as_other: Value | None = None) -> Value:
        height, width, channels = self._shape(node)
        value = Value(node.name, channels, height, width)
        if as_other is not None:
            value.scale, value.zero = as_other.scale, as_other.zero
        else:
            low, high = self.ranges(node.name)
            low, high = min(low, 0.0), max(high, 0.0)
            value.scale = (high - low) / 255 if high > low else 1.0
            value.zero = int(np.clip(np.rint(-low / value.scale), 0, 255))
        self.values[node] = value
        return value

    def _read(self, node: Any, reader: fx.Node) -> Value:
        if node not in self.values:
            raise Unsupported(f"{reader.name} reads {getattr(node, 'name', node)}, which is not kept as bytes")
        return self.values[node]

    # --- operations ------------------------------------------------------------------------------------------------

    def _operation(self, node: fx.Node) -> None:
        module, target = self._module(node), node.target if node.op == "call_function" else None
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            self._convolution(node, module)
        elif self._is_addition(node):
            self._joined(node)
        elif self._is_skipped(node):
            self.values[node] = self._read(node.args[0], node)
        elif isinstance(module, nn.MaxPool2d) or target in (functional.max_pool2d, torch.max_pool2d):
            self._pool(node, module)
        elif self._is_mean(node, module):
            source = self._read(node.args[0], node)
            height, width, channels = self._shape(node)
            result = Value(node.name, channels, height, width, source.scale, source.zero)
            self.values[node] = result
            self.operations.append(Mean(node.name, source, result, (1, 1, channels)))
        elif self._is_view(node, module):
            self.values[node] = self._read(node.args[0], node)
        elif self._is_relu(node) is not None:
            raise Unsupported(f"{node.name} clamps what more than one operation reads")
        elif not self._shortcut_view(node):
            what = type(module).__name__ if module is not None else getattr(node.target, "__name__", node.target)
            raise Unsupported(f"{node.name}: {what} has no operation over bytes")

    def _follow(self, node: fx.Node) -> tuple[fx.Node, Shortcut | None, float, float]:
        """The last node that a convolution or addition takes in, its shortcut, and its clamp."""
        out, shortcut = node, None
        low, high = -np.inf, np.inf
        while len(out.users) == 1:
            reader = next(iter(out.users))
            bound = self._is_relu(reader)
            if bound is not None:
                low, high, out = 0.0, bound, reader
                self.done.add(reader)
                break
            if self._is_skipped(reader):
                out = reader
                self.done.add(reader)
                continue
            if self._is_addition(reader) and shortcut is None and not isinstance(self._module(node), nn.Linear):
                other = next(a for a in reader.args if a is not out) if reader.args[0] is not reader.args[1] else None
                found = self._as_shortcut(other)
                if found is not None and self.seen[reader].shape == self.seen[out].shape:
                    shortcut, out = found, reader
                    self.done.add(reader)
                    continue
            break
        return out, shortcut, low, high

    def _as_shortcut(self, node: Any) -> Shortcut | None:
        if node in self.values:
            return Shortcut(self.values[node])
        if isinstance(node, fx.Node) and node.op == "call_function" and node not in self.shortcuts:
            # A view of what is there already, met before its turn.
            met = self._shortcut_view(node)
            self.done |= {node} if met else set()
        return self.shortcuts.get(node)

    def _convolution(self, node: fx.Node, module: Any) -> None:
        source = self._read(node.args[0], node)
        weight = module.weight.detach().double().numpy()
        stride = padding = 0
        if isinstance(module, nn.Linear):
            height, width = source.height, source.width
            weight = weight.reshape(weight.shape[0], source.channels, height, width)
            stride, depthwise = 1, False
        else:
            stride, padding, depthwise = self._geometry(node, module)
        source.border = max(source.border, padding)
        scale = np.abs(weight).reshape(weight.shape[0], -1).max(1) / 127
        scale[scale == 0] = 1.0
        codes = np.rint(weight / scale[:, None, None, None]).astype(np.int8)
        bias = np.zeros(len(weight)) if module.bias is None else module.bias.detach().double().numpy()
        out, shortcut, low, high = self._follow(node)
        result = None
        if out is self.output and not depthwise:
            self.leaves = out
        else:
            result = self._value(out)
        self.operations.append(
            Convolution(
                str(node.target), source, result, self._shape(out), codes, scale, bias, stride, padding, depthwise,
                shortcut, low, high,
            )
        )  # fmt: skip

    def _geometry(self, node: fx.Node, module: nn.Conv2d) -> tuple[int, int, bool]:
        name = str(node.target)
        if module.padding_mode != "zeros" or module.dilation != (1, 1):
            raise Unsupported(f"{name} is dilated, or padded by {module.padding_mode}")
        if isinstance(module.padding, str):
            if module.padding == "same" and any(k % 2 == 0 for k in module.kernel_size):
                raise Unsupported(f"{name} pads an even kernel to the same size")
            sides = tuple(k // 2 for k in module.kernel_size) if module.padding == "same" else (0, 0)
        else:
            sides = tuple(module.padding)
        if len(set(sides)) > 1 or len(set(module.stride)) > 1:
            raise Unsupported(f"{name} has another stride or padding in each direction")
        depthwise = module.groups == module.in_channels == module.out_channels and module.groups > 1
        if module.groups != 1 and not depthwise:
            raise Unsupported(f"{name} has {module.groups} groups")
        return int(module.stride[0]), int(sides[0]), depthwise

    def _joined(self, node: fx.Node) -> None:
        first, second = node.args
        source, other = self.values.get(first), self._as_shortcut(second)  # type: ignore[arg-type]
        if source is None:
            source, other = self.values.get(second), self._as_shortcut(first)  # type: ignore[arg-type]
        if source is None or other is None or self._shape(node) != (source.height, source.width, source.channels):
            raise Unsupported(f"{node.name} adds what is not kept as bytes, or by broadcasting")
        out, more, low, high = self._follow(node)
        if more is not None:
            raise Unsupported(f"{node.name} is one of a chain of additions")
        self.operations.append(Joined(node.name, source, self._value(out), self._shape(out), other, low, high))

    def _pool(self, node: fx.Node, module: Any) -> None:
        source = self._read(node.args[0], node)
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
        if module is not None:
            given = {n: getattr(module, n) for n in names}
        else:
            given = dict(zip(names, (*node.args[1:],), strict=False)) | {k: node.kwargs[k] for k in node.kwargs}
            given = {k: self._constant(v) for k, v in given.items()}

        def one(name: str, default: Any) -> int:
            value = given.get(name, default)
            value = default if value is None else value
            if isinstance(value, (tuple, list)):
                if len(set(value)) > 1:
                    raise Unsupported(f"{node.name} has another {name} in each direction")
                value = value[0]
            return int(value)

        window = one("kernel_size", 2)
        stride, padding = one("stride", window), one("padding", 0)
        if one("dilation", 1) != 1 or given.get("ceil_mode"):
            raise Unsupported(f"{node.name} is dilated or rounds its size up")
        if padding and source.zero:
            raise Unsupported(f"{node.name} pads values that may be negative")
        source.border = max(source.border, padding)
        result = self._value(node, as_other=source)
        self.operations.append(Pool(node.name, source, result, self._shape(node), window, stride, padding))

    def _is_mean(self, node: fx.Node, module: Any) -> bool:
        target = node.target
        if isinstance(module, (nn.AdaptiveAvgPool2d, nn.AvgPool2d)) or target in (
            functional.avg_pool2d, functional.adaptive_avg_pool2d, torch.mean,
        ):  # fmt: skip
            pass
        elif not (node.op == "call_method" and target == "mean"):
            return False
        source, result = self._constant(node.args[0]), self.seen[node]
        whole = (
            source.dim() == 4
            and result.numel() == source.shape[0] * source.shape[1]
            and result.shape[1] == source.shape[1]
        )
        if not whole:
            raise Unsupported(f"{node.name} averages windows; only the average over all places has an operation")
        return True

    def _is_view(self, node: fx.Node, module: Any) -> bool:
        """Flattening a feature map or a vector; the linear layer behind it knows the order."""
        named = isinstance(module, nn.Flatten) or node.target is torch.flatten
        if not named and not (node.op == "call_method" and node.target in ("flatten", "view", "reshape", "squeeze")):
            return False
        source, result = self._constant(node.args[0]), self.seen[node]
        if result.dim() == 2 and result.shape[0] == source.shape[0]:
            return True
        raise Unsupported(f"{node.name} rearranges a tensor into {tuple(result.shape)}")

    def _shortcut_view(self, node: fx.Node) -> bool:
        """Strided slices and zero channels around them: the shortcuts without weights of small residual networks."""
        source = self._as_shortcut(node.args[0]) if node.args else None
        if source is None:
            return False
        if node.target is operator.getitem:
            index: Any = node.args[1]
            if not isinstance(index, tuple) or len(index) != 4 or any(not isinstance(i, slice) for i in index):
                return False
            plain = all(i == slice(None) for i in index[:2])
            steps = {i.step or 1 for i in index[2:] if i.start in (None, 0) and i.stop is None}
            if not plain or len(steps) != 1 or len([i for i in index[2:] if i.stop is None]) != 2 or source.offset:
                return False
            self.shortcuts[node] = Shortcut(source.value, source.stride * int(steps.pop()), source.offset)
            return True
        if node.target in (functional.pad, torch.nn.functional.pad):
            sides = list(self._constant(node.args[1]))
            mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
            value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value", 0)
            if len(sides) != 6 or any(sides[:4]) or mode != "constant" or value not in (0, None) or min(sides) < 0:
                return False
            self.shortcuts[node] = Shortcut(source.value, source.stride, source.offset + int(sides[4]))
            return True
        return False
