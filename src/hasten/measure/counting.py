"""What one forward costs, counted and not timed: multiply-adds, bytes and operations, module by module.

Every operation that torch executes passes a dispatch mode, so functional calls count as well as modules; each is
charged to the innermost module that runs it. Matrix products, convolutions and attention count multiply-adds by
their exact formula; everything else counts result elements by kind. The compulsory traffic of a module is

    traffic = bytes of its weights + bytes of its inputs + bytes of its outputs,

each once: a lower bound, which is what a roofline wants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from hasten.measure.memory import model_bytes, tensor_bytes

__all__ = ["Cost", "ModuleCost", "cost", "register"]

Formula = Callable[[Sequence[Any], Any], int]

_FORMULAS: dict[Any, Formula] = {}


def register(operator: Any, formula: Formula) -> None:
    """Teach the counter an operator: ``formula(arguments, result)`` gives its multiply-adds."""
    _FORMULAS[operator] = formula


def _attention(arguments: Sequence[Any], result: Any) -> int:
    """Two products: (batch, heads, queries, width) x keys, and weights x values; a causal mask is not subtracted."""
    query, key, value = arguments[0], arguments[1], arguments[2]
    batch, heads, queries, width = query.shape
    return int(batch * heads * queries * key.shape[-2] * (width + value.shape[-1]))


def _linear(arguments: Sequence[Any], result: Any) -> int:
    return int(prod(arguments[0].shape) * result.shape[-1])


register(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, _attention)
for _name in (
    "_weight_int8pack_mm",
    "_weight_int4pack_mm_for_cpu",
    "_int_mm",
    "linear",
    "mv",
    "_dyn_quant_matmul_4bit",
):
    if hasattr(torch.ops.aten, _name):
        register(
            getattr(torch.ops.aten, _name),
            _linear if _name != "mv" else (lambda arguments, result: int(arguments[0].numel())),
        )
register(torch.ops.aten.addmv, lambda arguments, result: int(arguments[1].numel()))
register(torch.ops.aten.dot, lambda arguments, result: int(arguments[0].numel()))
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    register(torch.ops.mkldnn._linear_pointwise, _linear)
if hasattr(torch.ops.onednn, "qlinear_pointwise"):
    register(torch.ops.onednn.qlinear_pointwise, _linear)

# Operators that move or make no arithmetic result.
_FREE = {
    "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "slice", "select", "unbind", "unsqueeze",
    "squeeze", "split", "split_with_sizes", "unsafe_split", "unsafe_chunk", "chunk", "detach", "alias", "as_strided",
    "empty", "empty_like", "empty_strided", "new_empty", "lift_fresh", "narrow", "diagonal", "unfold", "is_same_size",
    "_local_scalar_dense", "resize_", "set_", "_to_dense", "sym_size", "_reshape_alias", "real", "imag",
}  # fmt: skip


@dataclass(frozen=True)
class ModuleCost:
    """One module of the tree, with what it executed itself (its children are counted on their own lines)."""

    name: str
    """path in the model; empty for the model itself"""
    kind: str
    """class of the module"""
    parameters: int
    """parameters that this module owns"""
    weight_bytes: int
    """bytes of those parameters, its buffers and packed weights"""
    macs: int
    """multiply-adds executed here"""
    activation_bytes: int
    """bytes of the results that its operations wrote"""
    traffic: int
    """compulsory bytes where it computed: weights, inputs and outputs, each once"""
    calls: int
    """how often it ran in one forward"""


@dataclass(frozen=True)
class Cost:
    """One forward of a model.

    >>> layer = nn.Linear(64, 128)
    >>> total = cost(layer, torch.zeros(10, 64))
    >>> total.macs, total.parameters, total.weight_bytes
    (81920, 8320, 33280)
    """

    modules: tuple[ModuleCost, ...]
    """every module that ran or owns weights, in the order of the tree"""
    operations: Mapping[str, int]
    """result elements of the operations that are not multiply-adds, by kind"""
    uncounted: tuple[str, ...]
    """operators of other libraries that have no formula; their multiply-adds are missing"""
    parameters: int
    """parameters, shared ones once"""
    weight_bytes: int
    """bytes of parameters and buffers, shared ones once"""
    input_bytes: int
    """bytes of the example"""
    output_bytes: int
    """bytes of the result"""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """room for what a domain adds"""

    @property
    def macs(self) -> int:
        """Multiply-adds in all."""
        return sum(m.macs for m in self.modules)

    @property
    def flops(self) -> int:
        """Arithmetic operations of the multiply-adds: two each."""
        return 2 * self.macs

    @property
    def activation_bytes(self) -> int:
        """Bytes of every intermediate result."""
        return sum(m.activation_bytes for m in self.modules)

    @property
    def traffic(self) -> int:
        """Bytes that must move at least: every weight, the input and the output once."""
        return self.weight_bytes + self.input_bytes + self.output_bytes

    def to_json(self) -> dict[str, Any]:
        """Totals and the table of modules."""
        return {
            "macs": self.macs,
            "flops": self.flops,
            "parameters": self.parameters,
            "weight_bytes": self.weight_bytes,
            "activation_bytes": self.activation_bytes,
            "traffic": self.traffic,
            "operations": dict(self.operations),
            "uncounted": list(self.uncounted),
            "modules": [vars(m) for m in self.modules],
            **self.extra,
        }


class _Tally:
    """What one module did so far."""

    def __init__(self) -> None:
        self.macs = 0
        self.written = 0
        self.moved = 0
        self.calls = 0


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack: list[str] = [""]
        self.tallies: dict[str, _Tally] = {}
        self.operations: dict[str, int] = {}
        self.uncounted: set[str] = set()

    def tally(self, name: str) -> _Tally:
        return self.tallies.setdefault(name, _Tally())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet, tally = func._overloadpacket, self.tally(self.stack[-1])
        kind = packet.__name__
        if kind in _FREE:
            return result
        macs = _multiply_adds(packet, args, kwargs or {}, result)
        if macs is not None:
            tally.macs += macs
        else:
            written = sum(t.numel() for t in _tensors(result))
            self.operations[kind.rstrip("_")] = self.operations.get(kind.rstrip("_"), 0) + written
            if func.namespace not in ("aten", "prims", "prim"):
                self.uncounted.add(f"{func.namespace}::{kind}")
        tally.written += sum(t.numel() * t.element_size() for t in _tensors(result))
        return result


def _multiply_adds(packet: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int | None:
    formula = _FORMULAS.get(packet)
    if formula is not None:
        return int(formula(args, result))
    from torch.utils.flop_counter import flop_registry  # imports Triton where it is installed: 80 MiB

    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=result)) // 2
    return None


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tree: Any) -> int:
    return sum(t.numel() * t.element_size() for t in _tensors(tree))


def _own_bytes(module: nn.Module) -> int:
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    packed = getattr(module, "packed_bytes", 0)
    return tensor_bytes(own) + (packed if isinstance(packed, int) else 0)


@contextmanager
def _watch(model: nn.Module, counter: _Counter) -> Iterator[None]:
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        name = names[module]
        counter.stack.append(name)
        counter.tally(name).calls += 1
        counter.tally(name).moved += _bytes((args, kwargs))

    def leave(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        counter.tally(names[module]).moved += _bytes(result)
        counter.stack.pop()

    with ExitStack() as stack:
        for module in names:
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
        yield


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Fused kernels that hide their parts are off while counting (recurrent cells, the transformer fast path)."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    mkldnn = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(mkldnn)
        torch.backends.mha.set_fastpath_enabled(fast)


def call(model: Callable[..., Any], example: Any) -> Any:
    """Run ``model`` on ``example``: a tuple is the positional arguments, a dict the named ones, else the only one."""
    if isinstance(example, tuple):
        return model(*example)
    if isinstance(example, Mapping):
        return model(**example)
    return model(example)


def cost(model: Callable[..., Any], example: Any) -> Cost:
    """Count one forward of ``model`` on ``example`` (a tensor, a tuple of arguments or a dict of named ones).

    The model runs once without gradients, as it is (its training flag is left alone). A plain callable counts too; all
    it does is charged to one line.
    """
    counter = _Counter()
    module = model if isinstance(model, nn.Module) else None
    with torch.no_grad(), _plain_kernels(), ExitStack() as stack:
        if module is not None:
            stack.enter_context(_watch(module, counter))
        stack.enter_context(counter)
        result = call(model, example)
    named = dict(module.named_modules()) if module is not None else {}
    rows = []
    for name in [*named] or [""]:
        tally, owner = counter.tallies.get(name, _Tally()), named.get(name)
        parameters = sum(p.numel() for p in owner.parameters(recurse=False)) if owner is not None else 0
        weights = _own_bytes(owner) if owner is not None else 0
        if not (tally.calls or tally.macs or tally.written or parameters or weights):
            continue
        kind = type(owner).__name__ if owner is not None else "callable"
        traffic = weights + tally.moved if tally.written else 0
        rows.append(ModuleCost(name, kind, parameters, weights, tally.macs, tally.written, traffic, tally.calls))
    return Cost(
        modules=tuple(rows),
        operations=dict(sorted(counter.operations.items(), key=lambda item: -item[1])),
        uncounted=tuple(sorted(counter.uncounted)),
        parameters=sum(p.numel() for p in module.parameters()) if module is not None else 0,
        weight_bytes=model_bytes(module) if module is not None else 0,
        input_bytes=_bytes(example),
        output_bytes=_bytes(result),
    )
