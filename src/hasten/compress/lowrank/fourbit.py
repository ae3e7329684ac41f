"""A linear layer in four bits with a low-rank branch in sixteen: ``y = Q(x̂) Q(R)ᵀ + (x̂ L2ᵀ) L1ᵀ + b``, ``x̂ = x / λ``.

Two codes share a byte, in memory as on disk. Two ways of running: ``exact`` has the numbers of the format (codes of
both sides times their scales, summed in float32); ``fast`` expands the weight's codes once for the kernel of eight or
sixteen bits that was measured to be the fastest for the number of rows, and leaves activations eight or sixteen bits
too, so its result differs, for the better, in the rounding of activations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from hasten.compress.float8 import Float8Buffers
from hasten.compress.lowrank.absorb import activation_format, weight_format
from hasten.compress.packed import rows_for
from hasten.compress.quantize.base import Format
from hasten.errors import ConfigurationError

__all__ = ["SvdQuantLinear", "pack_codes", "set_execution", "unpack_codes"]

Execution = Literal["exact", "fast"]
Form = Literal["int4", "nvfp4"]


def pack_codes(codes: Tensor) -> Tensor:
    """int8 codes -8 … 7 (out, in) -> uint8 (out, in / 2), the even input in the low half.

    >>> pack_codes(torch.tensor([[-7, 3]], dtype=torch.int8)).tolist()
    [[57]]
    """
    if codes.shape[-1] % 2:
        raise ConfigurationError(f"{codes.shape[-1]} codes do not fill bytes of two; give an even number of inputs")
    halves = (codes & 0xF).to(torch.uint8)
    return halves[..., ::2] | (halves[..., 1::2] << 4)


def unpack_codes(packed: Tensor, *, signed: bool = True) -> Tensor:
    """The inverse of :func:`pack_codes`; codes 0 … 15 where not ``signed``."""
    halves = torch.stack([packed & 0xF, packed >> 4], -1).flatten(-2)
    if not signed:
        return halves
    halves = halves.to(torch.int8)
    return torch.where(halves > 7, halves - 16, halves)


class SvdQuantLinear(Float8Buffers):
    """The layer; made by :class:`~hasten.compress.lowrank.svdquant.SvdQuant`.

    >>> layer = SvdQuantLinear(in_features=64, out_features=32, rank=4, group=32)
    >>> layer(torch.zeros(3, 64)).shape, layer.sizes["codes"]
    (torch.Size([3, 32]), 1024)
    """

    codes: Tensor
    scales: Tensor
    outer: Tensor | None
    smooth: Tensor
    down: Tensor
    up: Tensor
    bias: Tensor | None

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        rank: int,
        group: int = 64,
        bits: int = 4,
        form: Form = "int4",
        shifted: bool = False,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        execution: Execution = "exact",
    ) -> None:
        """``form``: int4 with bfloat16 scales, or nvfp4 (E2M1, an E4M3 scale for 16 inputs, one float for all).

        ``shifted``: activations have a zero point, for inputs that are bounded below. ``dtype``: of the branch.
        """
        super().__init__()
        if bits > 4:
            raise ConfigurationError(f"codes of {bits} bits do not share a byte; give 2 to 4")
        self.in_features, self.out_features = in_features, out_features
        if form == "nvfp4" and (group != 16 or bits != 4):
            raise ConfigurationError(f"nvfp4 has groups of 16 and 4 bits, not {group} and {bits}; give those")
        self.group, self.bits, self.shifted = group, bits, shifted
        self.form: Form = form
        self.execution: Execution = execution
        groups = -(-in_features // group)
        self.register_buffer("codes", torch.zeros(out_features, in_features // 2, dtype=torch.uint8))
        kind = torch.float8_e4m3fn if form == "nvfp4" else torch.bfloat16
        self.register_buffer("scales", torch.ones(out_features, groups).to(kind))
        self.register_buffer("outer", torch.ones(1) if form == "nvfp4" else None)
        self.register_buffer("smooth", torch.ones(in_features, dtype=torch.bfloat16))
        self.register_buffer("down", torch.zeros(rank, in_features, dtype=dtype))
        self.register_buffer("up", torch.zeros(out_features, rank, dtype=dtype))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self._residual: Tensor | None = None
        self._products: dict[int, Callable[[Tensor], Tensor]] = {}
        self._packed: dict[str, Any] = {}

    @property
    def rank(self) -> int:
        """Width of the branch."""
        return self.down.shape[0]

    @property
    def activation_format(self) -> Format:
        """What activations are rounded to, anew in every call."""
        return activation_format(self.form, self.bits, self.group, self.shifted)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of codes, scales, branch and smoothing vector; shared parts are counted in every layer."""
        parts = {
            "codes": (self.codes,),
            "scales": (self.scales,),
            "branch": (self.down, self.up),
            "smooth": (self.smooth,),
        }
        return {n: sum(t.numel() * t.element_size() for t in ts) for n, ts in parts.items()}

    @property
    def overhead(self) -> float:
        """Multiply-adds of the branch over those of the layer: ``r (K + N) / (K N)``."""
        k, n = self.in_features, self.out_features
        return self.rank * (k + n) / (k * n)

    def residual(self) -> Tensor:
        """The four-bit weight as float32 (out, in); kept once made."""
        if self._residual is None or self._residual.device != self.codes.device:
            fmt = weight_format(self.form, self.bits, self.group)
            with torch.inference_mode(False), torch.no_grad():  # kept for calls of any mode
                scales = self.scales.float() if self.outer is None else self.scales.float() * self.outer
                self._residual = fmt.decode(unpack_codes(self.codes, signed=self.form == "int4"), scales)
        return self._residual

    def effective_weight(self) -> Tensor:
        """The weight (out, in) in float64 that acts on unsmoothed inputs, activations unrounded."""
        both = self.residual().double() + self.up.double() @ self.down.double()
        return both / self.smooth.double()

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out) in the type of x."""
        rows = rows_for(x, self.in_features)
        made = self._fast(rows) if self.execution == "fast" else self._exact(rows)
        return made.view(*x.shape[:-1], self.out_features)

    def _exact(self, rows: Tensor) -> Tensor:
        dtype = rows.dtype if rows.dtype == torch.float64 else torch.float32
        smoothed = rows.to(dtype) / self.smooth.to(dtype)
        rounded = self.activation_format.fake(smoothed)
        made = functional.linear(rounded, self.residual().to(dtype), None if self.bias is None else self.bias.to(dtype))
        if self.rank:
            made = torch.addmm(made, functional.linear(smoothed, self.down.to(dtype)), self.up.to(dtype).T)
        return made.to(rows.dtype)

    def _product(self, count: int) -> Callable[[Tensor], Tensor]:
        """The residual's product for about so many rows: the fastest measured kernel that keeps eight or sixteen
        bits."""
        from hasten.compress import kernels

        bucket = 1 if count <= 4 else 16 if count <= 48 else 128
        if bucket not in self._products:
            name = kernels.fastest((self.out_features, self.in_features), bucket, ("int8", "bf16"))
            if name not in self._packed:
                self._packed[name] = kernels.kernel(name).pack(self.residual())
            self._products[bucket] = partial(_run, kernels.kernel(name).run, self._packed[name])
        return self._products[bucket]

    def _fast(self, rows: Tensor) -> Tensor:
        """One division, one product with the expanded codes, and the branch added where that product lies."""
        smoothed = rows.to(torch.bfloat16) / self.smooth
        made = self._product(len(rows))(smoothed)
        if self.rank:
            between = functional.linear(smoothed, self.down.to(torch.bfloat16))
            made = made.addmm_(between, self.up.to(torch.bfloat16).T)
        return (made if self.bias is None else made.add_(self.bias.to(made.dtype))).to(rows.dtype)

    def unfused(self, rows: Tensor) -> Tensor:
        """As fast execution, but the branch reads x for itself, writes its own output, and is added: for comparison."""
        made = self._product(len(rows))(rows.to(torch.bfloat16) / self.smooth)
        own = rows.to(torch.bfloat16) / self.smooth
        branch = functional.linear(functional.linear(own, self.down.to(torch.bfloat16)), self.up.to(torch.bfloat16))
        made = made + branch
        return (made if self.bias is None else made + self.bias.to(made.dtype)).to(rows.dtype)

    def plain(self) -> nn.Module:
        """The exact form, which ``torch.export`` takes."""
        return _Plain(self)

    def widened(self, down: Tensor, up: Tensor) -> SvdQuantLinear:
        """With an adapter ``up down`` on the original weight, (out, r) and (r, in): exact, nothing is rounded anew."""
        new = SvdQuantLinear(
            in_features=self.in_features, out_features=self.out_features, rank=self.rank + down.shape[0],
            group=self.group, bits=self.bits, form=self.form, shifted=self.shifted, bias=self.bias is not None,
            dtype=self.down.dtype, execution=self.execution,
        )  # fmt: skip
        kind = self.down.dtype
        new.codes, new.scales, new.outer = self.codes, self.scales, self.outer
        new.smooth, new.bias = self.smooth, self.bias
        new.down = torch.cat([self.down, (down.double() * self.smooth.double()).to(kind)])
        new.up = torch.cat([self.up, up.to(kind)], 1)
        return new.train(self.training)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_residual": None, "_products": {}, "_packed": {}}

    def _load_from_state_dict(self, *arguments: Any, **named: Any) -> None:
        super()._load_from_state_dict(*arguments, **named)
        self._residual, self._products, self._packed = None, {}, {}  # they were made of the codes before

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, bits={self.bits}, "
            f"group={self.group}, execution={self.execution}"
        )


def _run(run: Callable[[Tensor, Any], Tensor], packed: Any, x: Tensor) -> Tensor:
    return run(x, packed)


class _Plain(nn.Module):
    """The exact arithmetic in plain operations: scales of activations found, rounded to eight significant bits,
    used."""

    weight: Tensor
    smooth: Tensor
    down: Tensor
    up: Tensor
    bias: Tensor | None

    def __init__(self, layer: SvdQuantLinear) -> None:
        super().__init__()
        self.group, self.shifted, self.bits = layer.group, layer.shifted, layer.bits
        self.format = layer.activation_format if layer.form == "nvfp4" else None
        self.register_buffer("weight", layer.residual().clone())
        self.register_buffer("smooth", layer.smooth.float())
        self.register_buffer("down", layer.down.float())
        self.register_buffer("up", layer.up.float())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.float())

    def forward(self, x: Tensor) -> Tensor:
        smoothed = x.float() / self.smooth
        if self.format is not None:
            made = functional.linear(
                self.format.fake(smoothed.flatten(0, -2)).view_as(smoothed), self.weight, self.bias
            )
            return (made + functional.linear(functional.linear(smoothed, self.down), self.up)).to(x.dtype)
        groups = smoothed.unflatten(-1, (-1, self.group))
        top = 2 ** (self.bits - 1) - 1
        if self.shifted:
            low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
            scale = _eight_bits((high - low) / (2**self.bits - 1))
            zero = (torch.round(-low / scale) - top - 1).clamp(-top - 1, top)
            rounded = (torch.round(groups / scale).clamp(min=-top - 1 - zero)).clamp(max=top - zero) * scale
        else:
            scale = _eight_bits(groups.abs().amax(-1, keepdim=True) / top)
            rounded = torch.round(groups / scale).clamp(-top, top) * scale
        made = functional.linear(rounded.flatten(-2), self.weight, self.bias)
        return (made + functional.linear(functional.linear(smoothed, self.down), self.up)).to(x.dtype)


def _eight_bits(scale: Tensor) -> Tensor:
    """As the scales of :mod:`hasten.compress.quantize.base`: what bfloat16 holds, ties away from zero; nothing is 1."""
    mantissa, exponent = torch.frexp(scale)
    kept = torch.ldexp(torch.floor(mantissa * 256 + 0.5) / 256, exponent)
    return torch.where(scale > 2.0**-110, kept, torch.ones_like(scale))


def set_execution(model: nn.Module, execution: Execution) -> nn.Module:
    """Every such layer of ``model``, in place, runs ``exact`` or ``fast``; returns the model."""
    if execution not in ("exact", "fast"):
        raise ConfigurationError(f"execution {execution!r} is not known; give exact or fast")
    for module in model.modules():
        if isinstance(module, SvdQuantLinear):
            module.execution = execution
    return model
