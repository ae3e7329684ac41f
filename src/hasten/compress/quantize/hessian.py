"""Curvature of a loss in the weights: exact Hessian-vector products, and what can be learned from them.

No Hessian is formed. With ``g = ∇L`` kept as a graph, ``H v = ∇(gᵀ v)``: one more backward pass per product. Attention
runs in its math kernel meanwhile, since the fused ones have no second derivative. Power iteration gives the largest
eigenvalue in magnitude, Lanczos both ends of the spectrum, Hutchinson the trace with its standard error:

    tr H = E[vᵀ H v],  v ∈ {−1, +1}ⁿ.

The method as used for quantisation: "Q-BERT: Hessian Based Ultra Low Precision Quantization of BERT", Shen et al.
2020, arXiv:1909.05840. Differs from the paper in that the ends come from Lanczos, of which power iteration is a check.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hasten.errors import ConfigurationError

__all__ = ["Ends", "Hessian", "Loss", "Trace", "block_traces", "lanczos", "power_iteration", "trace"]

Loss = Callable[[nn.Module, Any], Tensor]
"""``loss(model, batch)``: the mean loss of a batch, a scalar that autograd can differentiate"""


@dataclass(frozen=True)
class Trace:
    """An estimated trace."""

    value: float
    """mean over the probes"""
    standard_error: float
    """standard deviation of that mean; infinite for one probe"""
    probes: int
    """vectors that were used"""

    @classmethod
    def of(cls, samples: Sequence[float]) -> Trace:
        """From the values vᵀ H v of the probes.

        >>> Trace.of([1.0, 3.0])
        Trace(value=2.0, standard_error=1.0, probes=2)
        """
        count = len(samples)
        mean = sum(samples) / count
        spread = sum((s - mean) ** 2 for s in samples) / (count - 1) if count > 1 else math.inf
        return cls(mean, math.sqrt(spread / count), count)


@dataclass(frozen=True)
class Ends:
    """Both ends of a spectrum."""

    top: float
    """largest eigenvalue"""
    bottom: float
    """smallest eigenvalue; negative: the loss is not at a minimum"""
    residuals: tuple[float, float]
    """bounds of the distance of (top, bottom) to a true eigenvalue"""
    steps: int
    """Hessian-vector products that were taken"""
    converged: bool
    """whether both residuals are within the tolerance"""
    ritz: tuple[float, ...] = ()
    """all Ritz values, ascending"""
    weights: tuple[float, ...] = ()
    """squared first components of their vectors: with the Ritz values a quadrature of the spectral density"""


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """Eval mode (no dropout, fixed statistics) and attention that can be differentiated twice; modes are restored."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _rows(batch: Any) -> int:
    """Samples of a batch: length of the first tensor that is found."""
    if isinstance(batch, Tensor):
        return len(batch)
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    return next((n for n in map(_rows, parts) if n), 0)


class Hessian:
    """Blocks of the Hessian of the mean loss over ``batches``, as operators on vectors.

    ``blocks`` names lists of the model's parameters; the product within a block leaves the others fixed. The graphs of
    the gradients stay in memory while the object lives (``hold=False`` builds them anew for each product). The model is
    not changed. Batches count by their samples.

    >>> model = nn.Linear(2, 1, bias=False).double()
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.double)
    >>> h = Hessian(model, lambda m, b: m(b).square().sum(), [x], {"all": [model.weight]})
    >>> h.product("all", torch.tensor([1.0, 1.0], dtype=torch.double))     # diag(2, 8)
    tensor([2., 8.], dtype=torch.float64)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        batches: Sequence[Any],
        blocks: Mapping[str, Sequence[Tensor]],
        *,
        hold: bool = True,
    ) -> None:
        if not batches:
            raise ConfigurationError("the curvature of no data was asked for; give at least one batch")
        if not blocks or not any(len(p) for p in blocks.values()):
            raise ConfigurationError("no parameter was named; give blocks of parameters that require a gradient")
        for name, parameters in blocks.items():
            if not all(p.requires_grad for p in parameters):
                raise ConfigurationError(
                    f"a parameter of {name!r} is frozen; leave it out or let it require a gradient"
                )
        self.model, self.loss, self.batches, self.hold = model, loss, list(batches), hold
        self.blocks = {name: list(parameters) for name, parameters in blocks.items()}
        rows = [max(_rows(b), 1) for b in self.batches]
        self.shares = [r / sum(rows) for r in rows]
        self._graphs: list[dict[str, list[Tensor | None]]] | None = None
        self.products = 0
        """Hessian-vector products so far, one per call whatever the number of batches"""

    def size(self, block: str) -> int:
        """Numbers in a block."""
        return sum(p.numel() for p in self.blocks[block])

    def _dtype(self, block: str) -> torch.dtype:
        return self.blocks[block][0].dtype

    def _gradients(self, batch: Any) -> dict[str, list[Tensor | None]]:
        flat = [p for parameters in self.blocks.values() for p in parameters]
        unique = list({id(p): p for p in flat}.values())
        value = self.loss(self.model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ConfigurationError(f"the loss returned {_shape(value)}; return one number, the mean over the batch")
        if not torch.isfinite(value):
            raise ConfigurationError(f"the loss is {value.item()}; look for NaN in the weights or in the batch")
        if not value.requires_grad:
            raise ConfigurationError("the loss carries no gradient; compute it without torch.no_grad() or .item()")
        found = torch.autograd.grad(value, unique, create_graph=True, allow_unused=True)
        by_id = {id(p): g for p, g in zip(unique, found, strict=True)}
        return {name: [by_id[id(p)] for p in parameters] for name, parameters in self.blocks.items()}

    def own_operators(self) -> tuple[str, ...]:
        """Names of operators written in Python that the loss runs through.

        torch's own are differentiated twice or raise; what these hide shows in :meth:`verify` only.
        """
        with _still(self.model):
            value = self.loss(self.model, self.batches[0])
        seen: set[Any] = set()
        names: dict[str, None] = {}
        stack = [value.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if isinstance(node, torch.autograd.function.BackwardCFunction):
                names[type(node).__name__.removesuffix("Backward")] = None
            stack += [n for n, _ in node.next_functions]
        return tuple(names)

    def verify(self, block: str, *, step: float = 1e-2, seed: int = 0) -> float:
        """Relative difference of a product to the change of the gradient along the same vector.

        The weights of a copy are moved by ``step`` of their length both ways, on the first batch. Near 0 for an exact
        product, near 1 where an operator's backward pass hides from autograd; kinks (ReLU) and the curve itself leave
        a few per cent. 0 where the change drowns in rounding.
        """
        parameters = self.blocks[block]
        own = [i for i, p in enumerate(self.model.parameters()) if any(p is q for q in parameters)]
        generator = torch.Generator().manual_seed(seed)
        vectors = [torch.randn(p.shape, generator=generator).to(p) for p in self.model.parameters()]
        vectors = [vectors[i] for i in own]
        length = math.sqrt(sum(float(v.square().sum()) for v in vectors))
        weight = math.sqrt(sum(float(p.detach().square().sum()) for p in parameters)) or 1.0
        far = step * weight / length
        changed: list[list[Tensor]] = []
        clone = copy.deepcopy(self.model)
        moved = [list(clone.parameters())[i] for i in own]
        with _still(clone):
            for way in (far, -2 * far):
                with torch.no_grad():
                    for q, v in zip(moved, vectors, strict=True):
                        q.add_(v, alpha=way)
                found = torch.autograd.grad(self.loss(clone, self.batches[0]), moved, allow_unused=True)
                changed.append(
                    [torch.zeros_like(q) if g is None else g.detach() for q, g in zip(moved, found, strict=True)]
                )
        quotient = torch.cat([((a - b) / (2 * far)).reshape(-1) for a, b in zip(*changed, strict=True)]).double()
        size = float(torch.cat([a.reshape(-1) for a in changed[0]]).double().norm())
        if float(quotient.norm()) * 2 * far <= 1e-4 * size or float(quotient.norm()) == 0.0:
            return 0.0
        ordered = [p for p in self.model.parameters() if any(p is q for q in parameters)]
        first = Hessian(self.model, self.loss, self.batches[:1], {block: ordered}, hold=False)
        image = first.product(block, torch.cat([v.reshape(-1) for v in vectors])).double()
        return float((image - quotient).norm() / quotient.norm())

    def _each(self) -> Iterator[tuple[float, dict[str, list[Tensor | None]]]]:
        if not self.hold:
            for share, batch in zip(self.shares, self.batches, strict=True):
                yield share, self._gradients(batch)
            return
        if self._graphs is None:
            self._graphs = [self._gradients(b) for b in self.batches]
        yield from zip(self.shares, self._graphs, strict=True)

    def gradient(self, block: str) -> Tensor:
        """∇L within a block, (size,)."""
        parts: Tensor | None = None
        with _still(self.model):
            for share, gradients in self._each():
                flat = _flatten(gradients[block], self.blocks[block]).detach() * share
                parts = flat if parts is None else parts + flat
        assert parts is not None
        return parts

    def product(self, block: str, vector: Tensor) -> Tensor:
        """``H v`` within one block: vector (size,) -> (size,) in the format of the parameters."""
        return self.joint({block: vector})[block]

    def joint(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``H v`` for a vector over several blocks at once, cross terms included: name -> (size,)."""
        names = list(vectors)
        targets = [p for n in names for p in self.blocks[n]]
        total: list[Tensor] | None = None
        with _still(self.model):
            for share, gradients in self._each():
                sums = []
                for name in names:
                    pieces = _unflatten(vectors[name].to(self._dtype(name)), self.blocks[name])
                    sums += [
                        (g * v).sum()
                        for g, v in zip(gradients[name], pieces, strict=True)
                        if g is not None and g.requires_grad
                    ]
                if not sums:  # linear in these weights, or they are not used
                    continue
                try:
                    found = torch.autograd.grad(
                        torch.stack(sums).sum(), targets, retain_graph=self.hold, allow_unused=True
                    )
                except RuntimeError as error:
                    raise ConfigurationError(
                        f"the loss cannot be differentiated twice in {', '.join(names)} "
                        f"({str(error).splitlines()[0][:120]}); use plain torch operations there"
                    ) from error
                parts = [torch.zeros_like(p) if h is None else h.detach() for p, h in zip(targets, found, strict=True)]
                total = (
                    [share * h for h in parts]
                    if total is None
                    else [t.add_(h, alpha=share) for t, h in zip(total, parts, strict=True)]
                )
        if total is None:
            total = [torch.zeros_like(p) for p in targets]
        self.products += 1
        result, at = {}, 0
        for name in names:
            count = len(self.blocks[name])
            result[name] = torch.cat([t.reshape(-1) for t in total[at : at + count]])
            at += count
        return result


def _shape(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _flatten(parts: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(parts, like, strict=True)])


def _unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    sizes = [p.numel() for p in like]
    return [v.view_as(p) for v, p in zip(vector.split(sizes), like, strict=True)]


def power_iteration(
    hessian: Hessian, block: str, *, tolerance: float = 1e-3, iterations: int = 100, seed: int = 0
) -> tuple[float, int]:
    """Eigenvalue of largest magnitude (its Rayleigh quotient) and the products taken.

    Ends when the relative change is below ``tolerance``.
    """
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(hessian.size(block), generator=generator, dtype=torch.float64)
    vector /= vector.norm()
    value = math.nan
    for step in range(1, iterations + 1):
        image = hessian.product(block, vector).double()
        before, value = value, float(vector @ image)
        norm = float(image.norm())
        if norm == 0.0:
            return 0.0, step
        vector = image / norm
        if abs(value - before) <= tolerance * abs(value):
            return value, step
    return value, iterations


def lanczos(hessian: Hessian, block: str, *, tolerance: float = 1e-3, steps: int = 60, seed: int = 0) -> Ends:
    """Both ends of the spectrum of a block, with full reorthogonalisation in float64.

    Ends when the residuals of both are within ``tolerance`` of the larger end's magnitude, or after ``steps`` products.
    """
    size = hessian.size(block)
    steps = min(steps, size)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(size, generator=generator, dtype=torch.float64)
    kept = torch.float64 if size * steps <= 2**24 else torch.float32  # of large layers, half the memory
    basis = (start / start.norm()).to(kept)[None]
    diagonal: list[float] = []
    beside: list[float] = []
    ends: Ends | None = None
    for step in range(steps):
        image = hessian.product(block, basis[step]).double()
        diagonal.append(float(basis[step].double() @ image))
        for _ in range(2):  # once more, for what rounding left
            image -= (basis.T @ (basis @ image.to(kept))).double()
        norm = float(image.norm())
        matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if beside:
            off = torch.tensor(beside, dtype=torch.float64)
            matrix += torch.diag(off, 1) + torch.diag(off, -1)
        values, vectors = torch.linalg.eigh(matrix)
        scale = float(values.abs().max())
        high, low = norm * float(vectors[-1, -1].abs()), norm * float(vectors[-1, 0].abs())
        exhausted = step + 1 == size or norm <= 1e-12 * max(scale, 1e-300)
        done = exhausted or (step >= 2 and max(high, low) <= tolerance * scale)
        ends = Ends(
            float(values[-1]), float(values[0]), (high, low), step + 1, done, tuple(values.tolist()),
            tuple(vectors[0].square().tolist()),
        )  # fmt: skip
        if done or step + 1 == steps:
            break
        beside.append(norm)
        basis = torch.cat([basis, (image / norm).to(kept)[None]])
    assert ends is not None
    return ends


def _signs(size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1


def trace(hessian: Hessian, block: str, *, probes: int = 64, seed: int = 0) -> Trace:
    """Trace of one block by Hutchinson's probes of ±1."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(probes):
        vector = _signs(hessian.size(block), generator)
        samples.append(float(vector @ hessian.product(block, vector).double()))
    return Trace.of(samples)


def block_traces(
    hessian: Hessian,
    *,
    probes: int = 64,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, Trace]:
    """Traces of all blocks from the same products: ``probes`` of them, whatever the number of blocks.

    The cross terms vᵢᵀ Hᵢⱼ vⱼ have mean zero, so each trace is unbiased; they show in its standard error.
    """
    generator = torch.Generator().manual_seed(seed)
    samples: dict[str, list[float]] = {name: [] for name in hessian.blocks}
    for index in range(probes):
        vectors = {name: _signs(hessian.size(name), generator) for name in hessian.blocks}
        images = hessian.joint(vectors)
        for name, vector in vectors.items():
            samples[name].append(float(vector @ images[name].double()))
        if progress is not None:
            progress("trace of the Hessian", (index + 1) / probes)
    return {name: Trace.of(values) for name, values in samples.items()}
