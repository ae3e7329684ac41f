"""Operators that compute: functions of elements, norms and sums, products, attention."""

from __future__ import annotations

import math
from typing import Any

import torch

from hasten.compress.fused import lines, run
from hasten.compress.fused.graph import RULES, Arguments, Lowering, Rule, operator_name, repeated, rule
from hasten.compress.fused.values import Operation, Unsupported, Value, viewed

__all__: list[str] = []

# --- elements ---------------------------------------------------------------------------------------------------------


def _one_of(name: str) -> Rule:
    return lambda to, node, given: to.unary(name, to.value(given.plain[0]))


for _function in lines.UNARY[1:]:
    if _function not in ("gelu", "gelu_tanh"):
        RULES[_function] = _one_of(_function)


@rule("gelu")
def _gelu(to: Lowering, node: Any, given: Arguments) -> Any:
    return to.unary("gelu_tanh" if given["approximate"] == "tanh" else "gelu", given.value("self"))


def _two_of(name: str) -> Rule:
    def rule(to: Lowering, node: Any, given: Arguments) -> Any:
        if given.named.get("rounding_mode") is not None:
            raise Unsupported(f"{node.name}: a division that rounds has no operation in a fused network")
        b = to.value(given.plain[1])
        alpha = given.named.get("alpha", 1)
        if alpha not in (None, 1):
            b = to.binary("mul", b, to.value(alpha))
        return to.binary(name, to.value(given.plain[0]), b)

    return rule


for _function in lines.BINARY:
    RULES[_function] = _two_of(_function)


@rule("pow")
def _pow(to: Lowering, node: Any, given: Arguments) -> Any:
    power = given.plain[1]
    if power not in (2, 2.0, 0.5, -0.5):
        raise Unsupported(f"{node.name}: a power of {power} has no operation in a fused network")
    return to.unary({2: "square", 0.5: "sqrt", -0.5: "rsqrt"}[power], to.value(given.plain[0]))


@rule("clamp", "hardtanh", "clamp_min", "relu6")
def _clamp(to: Lowering, node: Any, given: Arguments) -> Any:
    x = given.value("self")
    low = given.named.get("min", given.named.get("min_val", 0.0 if operator_name(node.target) == "relu6" else None))
    high = given.named.get("max", given.named.get("max_val", 6.0 if operator_name(node.target) == "relu6" else None))
    x = x if low is None else to.binary("maximum", x, to.value(low))
    return x if high is None else to.binary("minimum", x, to.value(high))


# --- lines and sums ---------------------------------------------------------------------------------------------------


def _flat(to: Lowering, value: Value | None) -> Value | None:
    return None if value is None else to.in_order(value)


@rule("layer_norm")
def _layer_norm(to: Lowering, node: Any, given: Arguments) -> Any:
    x, shape = given.value("input"), given["normalized_shape"]
    flat = to.reshaped(x, (*x.shape[: len(x.shape) - len(shape)], math.prod(shape)))
    weight, bias = (_flat(to, given.optional(n)) for n in ("weight", "bias"))
    made = to.lined(run.NORM, flat, (weight, bias), float(given["eps"]))
    return to.reshaped(made, x.shape)


@rule("rms_norm")
def _rms_norm(to: Lowering, node: Any, given: Arguments) -> Any:
    x, shape = given.value("input"), given["normalized_shape"]
    if len(shape) != 1:
        raise Unsupported(f"{node.name}: a norm over {len(shape)} dimensions has no operation in a fused network")
    eps = torch.finfo(torch.float32).eps if given["eps"] is None else given["eps"]
    return to.lined(run.NORM, x, (_flat(to, given.optional("weight")), None), float(eps), 1)


@rule("softmax", "_softmax")
def _softmax(to: Lowering, node: Any, given: Arguments) -> Any:
    x = given.value("self")
    axis = given["dim"] % len(x.shape)
    order = [i for i in range(len(x.shape)) if i != axis] + [axis]
    turned = Value(x.buffer, tuple(x.shape[d] for d in order), tuple(x.strides[d] for d in order), x.start)
    made = to.lined(run.SOFTMAX, turned)
    back = [order.index(d) for d in range(len(order))]
    return Value(made.buffer, tuple(made.shape[d] for d in back), tuple(made.strides[d] for d in back), made.start)


def _axes(given: Arguments, x: Value) -> tuple[int, ...]:
    dims = given.named.get("dim")
    if dims is None or dims == []:
        return tuple(range(len(x.shape)))
    return tuple(sorted(d % len(x.shape) for d in ([dims] if isinstance(dims, int) else dims)))


@rule("mean", "sum", "amax")
def _reduce(to: Lowering, node: Any, given: Arguments) -> Any:
    x, name = given.value("self"), operator_name(node.target)
    axes = _axes(given, x)
    share = 1 / math.prod(x.shape[a] for a in axes) if name == "mean" else 1.0
    keep = bool(given.named.get("keepdim", False))
    return to.reduced("amax" if name == "amax" else "sum", x, axes, keep, share)


@rule("adaptive_avg_pool2d", "adaptive_avg_pool1d")
def _pool(to: Lowering, node: Any, given: Arguments) -> Any:
    size = given["output_size"]
    if any(n != 1 for n in ([size] if isinstance(size, int) else size)):
        raise Unsupported(f"{node.name}: means of parts of an image have no operation in a fused network")
    x, count = given.value("self"), 2 if operator_name(node.target).endswith("2d") else 1
    axes = tuple(range(len(x.shape) - count, len(x.shape)))
    return to.reduced("sum", x, axes, True, 1 / math.prod(x.shape[a] for a in axes))


@rule("batch_norm")
def _batch_norm(to: Lowering, node: Any, given: Arguments) -> Any:
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


@rule("linear")
def _linear(to: Lowering, node: Any, given: Arguments) -> Any:
    weight, name = given.tensor("weight")
    bias = given.optional("bias")
    return to.reshaped(to.product(given.value("input"), weight, name, bias), given.shape)


@rule("addmm")
def _addmm(to: Lowering, node: Any, given: Arguments) -> Any:
    weight, name = given.tensor("mat2")
    return to.product(given.value("mat1"), weight.T, f"{name}.T", given.value("self"))


@rule("matmul", "bmm", "mm")
def _matmul(to: Lowering, node: Any, given: Arguments) -> Any:
    left, right = given.plain[:2]
    if right in to.known and to.known[right].dim() == 2:
        weight = to.known[right].T
        return to.reshaped(
            to.product(to.value(left), weight, f"{to.names.get(right, right.name)}.T", None), given.shape
        )
    a, b = to.value(left), to.value(right)
    if len(a.shape) < 2 or len(b.shape) < 2 or len(given.shape) > 4:
        raise Unsupported(f"{node.name}: a product of {a.shape} and {b.shape} has no operation in a fused network")
    shape = (1,) * (4 - len(given.shape)) + given.shape
    result = to.new(shape)
    a, b = repeated(a, (*shape[:3], a.shape[-1])), repeated(b, (*shape[:2], *b.shape[-2:]))
    to.made.operations.append(
        Operation(
            run.MATMUL, result, (a, b), (*shape[:3], a.shape[3], shape[3]),
            ((*result.strides, 0), (*a.strides, 0), (*b.strides, 0)),
        )
    )  # fmt: skip
    return to.reshaped(result, given.shape)


@rule("adaptive")
def _adaptive(to: Lowering, node: Any, given: Arguments) -> Any:
    """A gate and learners (:class:`hasten.compress.acm.AdaptiveComputation`); the gate stays in float32, since a
    rounded one chooses otherwise."""
    learners = int(given["learners"])
    listed: list[tuple[str, Value | None, bool]] = []
    for layer in "123":
        weight, name = given.tensor(f"weight{layer}")
        to.made.weights[name] = weight
        listed.append((name, given.value(f"bias{layer}"), True))
    (into, into_name), (out, out_name) = given.tensor("into"), given.tensor("out")
    bias, _ = given.tensor("bias")
    size = len(into) // learners
    for n in range(learners):
        mine = slice(n * size, (n + 1) * size)
        names = f"{into_name}[{mine.start}:{mine.stop}]", f"{out_name}[{mine.start}:{mine.stop}].T"
        to.made.weights |= {names[0]: into[mine], names[1]: out[mine].T}
        listed += [(names[0], to.constant(bias[mine]), False), (names[1], None, False)]
    z = to.in_order(given.value("z"))
    width = z.shape[-1]
    rows = viewed(z, (z.size // width, width))
    assert rows is not None
    result = to.new((z.size // width, width))
    activation = given["activation"]
    to.made.operations.append(
        Operation(
            run.ADAPTIVE, result, (rows,), (rows.shape[0], width, len(listed), size, len(given.tensor("weight1")[0])),
            ((), rows.strides), code=lines.UNARY.index("copy" if activation == "identity" else activation),
            flag=int(given["least"]), matrices=tuple(listed),
        )
    )  # fmt: skip
    return to.reshaped(result, given.shape)


@rule("scaled_dot_product_attention")
def _attention(to: Lowering, node: Any, given: Arguments) -> Any:
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
        flat.append(one if one is not None else viewed(to.in_order(x), (math.prod(x.shape[:-2]), *x.shape[-2:])))
    sizes = (heads, q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1])
    result = to.new((*q.shape[:-1], v.shape[-1]))
    sources = tuple(f for f in flat if f is not None)
    if mask is not None:
        wide = viewed(repeated(mask, (*q.shape[:-1], k.shape[-2])), (heads, q.shape[-2], k.shape[-2]))
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
