"""Small floats of any split into exponent and mantissa, with a scale.

Sign, ``e`` exponent and ``m`` mantissa bits; ``E = 0`` holds the subnormals ``2^(1-bias) M / 2^m``, else
``2^(E-bias) (1 + M / 2^m)``. Rounding in scaled units: ``p = max(floor(log2|x|), 1 - bias)``, quantum ``2^(p-m)``,
round half to even, saturate. Exponents are read from the bits of the float, so that every value is exact.

"Post-Training Quantization with Low-precision Minifloats and Integers on FPGAs" https://arxiv.org/abs/2311.12359
Differs from the paper in: the scale has 16 significant bits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hasten.compress.quantize.base import Format, significant
from hasten.compress.quantize.granularity import Granularity, PerGroup, PerTensor, PerToken
from hasten.compress.quantize.integer import granule
from hasten.compress.quantize.observers import MinMax, Observer
from hasten.compress.values import named_value
from hasten.errors import ConfigurationError, DataError

_WHOLE, _PLAIN = PerTensor(), MinMax()

__all__ = ["FP8_E4M3", "FP8_E5M2", "MiniFloat", "binade", "power_of_two"]


def power_of_two(exponent: Tensor, like: Tensor) -> Tensor:
    """Exactly ``2 ** exponent`` (integers in the normal range) in the dtype of ``like``."""
    if like.dtype == torch.float64:
        return ((exponent.long() + 1023) << 52).view(torch.float64)
    return ((exponent.int() + 127) << 23).view(torch.float32)


def binade(x: Tensor) -> Tensor:
    """``floor(log2|x|)`` of normal floats; less than any exponent in use for zero."""
    if x.dtype == torch.float64:
        return ((x.view(torch.int64) >> 52) & 0x7FF).int() - 1023
    return ((x.view(torch.int32) >> 23) & 0xFF) - 127


@named_value
@dataclass(frozen=True)
class MiniFloat(Format):
    """``1 + e + m`` bits.

    >>> e2m1 = MiniFloat.parse("e2m1")
    >>> e2m1.max, e2m1.grid().tolist()
    (6.0, [-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    >>> e2m1.quantize(torch.tensor([2.4, -9.0]), torch.ones(1)).dequantize()
    tensor([ 2., -6.])
    """

    e: int
    """exponent bits; 0 and 1 give evenly spaced grids"""
    m: int
    """mantissa bits; 0 gives powers of two"""
    bias: int | None = None
    """of the exponent; None: 2^(e-1) - 1"""
    granularity: Granularity = PerTensor()
    """which elements share a scale"""
    observer: Observer = MinMax()
    """how the range is found"""
    signed: bool = True
    """False: no sign bit, negative values are refused"""
    special: str = ""
    """codes that are no numbers: "" none, "nan" all ones (as in E4M3FN), "ieee" the top exponent (as in E5M2)"""
    dynamic: bool = False
    """find the range in each call; activations only"""

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16 or self.e < 0 or self.m < 0 or self.e + self.m == 0 or self.e > 10:
            raise ConfigurationError(
                f"a float of {self.e} exponent and {self.m} mantissa bits is not known; give 2 … 16 bits in all, at "
                "most 10 of them exponent"
            )
        if self.special not in ("", "nan", "ieee") or (self.special and self.e == 0):
            raise ConfigurationError(f"special codes {self.special!r} are not known; give '', 'nan' or 'ieee'")
        if isinstance(self.granularity, PerToken) and not self.dynamic:
            raise ConfigurationError("PerToken ranges differ in each call; add dynamic=True")

    @classmethod
    def parse(cls, text: str, granularity: Granularity = _WHOLE, observer: Observer = _PLAIN) -> MiniFloat:
        """``e2m1`` and the like."""
        found = re.fullmatch(r"[eE](\d+)[mM](\d+)", text.strip())
        if found is None:
            raise ConfigurationError(f"{text!r} is no float format; write e2m1: exponent and mantissa bits")
        return cls(int(found[1]), int(found[2]), granularity=granularity, observer=observer)

    @property
    def bits(self) -> int:
        """Sign, exponent and mantissa."""
        return int(self.signed) + self.e + self.m

    @property
    def label(self) -> str:
        """``e2m1``."""
        return f"e{self.e}m{self.m}{granule(self.granularity)}"

    @property
    def offset(self) -> int:
        """The bias in use."""
        if self.bias is not None:
            return self.bias
        return int(2 ** (self.e - 1) - 1) if self.e else 0

    @property
    def least(self) -> int:
        """Exponent of the subnormals."""
        return 1 - self.offset

    @property
    def max(self) -> float:
        """Largest value of the unscaled grid."""
        if self.e == 0:
            return 2.0**self.least * (1 - 2.0**-self.m)
        top = 2**self.e - 1 - self.offset - (self.special == "ieee")
        return float(2.0**top * (2 - 2.0**-self.m * (2 if self.special == "nan" else 1)))

    def grid(self) -> Tensor:
        """All values of the unscaled grid in rising order, each once."""
        return _grid(self).clone()

    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """The largest magnitude lies on the largest value."""
        top = torch.maximum(-low, high) if self.signed else high
        return significant(top / self.max, 11 if isinstance(self.granularity, PerGroup) else 16), None

    def _unit(self, x: Tensor, scale: Tensor) -> Tensor:
        """``x / S``; wide exponents need double precision."""
        if not self.signed and not torch.compiler.is_exporting() and bool((x < 0).any()):
            raise DataError(f"{self.label} without a sign cannot hold negative values; give signed=True")
        return (x.double() if self.e > 6 else x) / scale

    def _quantum(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Distance of the grid's values around ``unit``, and its inverse."""
        exponent = binade(unit).clamp(self.least, 2**self.e + 1 - self.offset) - self.m
        return power_of_two(exponent, unit), power_of_two(-exponent, unit)

    def round_to(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """See the module."""
        unit = self._unit(x, scale)
        quantum, inverse = self._quantum(unit)
        rounded = (torch.round(unit * inverse) * quantum).clamp(-self.max, self.max)
        return (rounded * scale).to(x.dtype)

    def neighbours(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One quantum apart; the quantum is that of the value's own binade."""
        unit = self._unit(x, scale)
        quantum, inverse = self._quantum(unit)
        toward = torch.trunc(unit * inverse) * quantum
        away = toward + torch.where(unit < 0, -quantum, quantum)
        low, high = torch.minimum(toward, away), torch.maximum(toward, away)
        if not self.signed:
            low = low.clamp(min=0)
        limit = self.max
        return (low.clamp(-limit, limit) * scale).to(x.dtype), (high.clamp(-limit, limit) * scale).to(x.dtype)

    def encode(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """Sign, exponent and mantissa from the top bit down; uint8, or int16 above 8 bits."""
        unit = self.round_to(self._unit(x, scale).abs(), torch.ones((), dtype=scale.dtype))
        exponent = binade(unit).clamp(self.least, 2**self.e + 1 - self.offset)
        steps = (unit * power_of_two(self.m - exponent, unit)).to(torch.int32)  # 0 … 2^(m+1) - 1
        codes = ((exponent - self.least) << self.m) + steps
        if self.signed:
            codes = codes | (torch.signbit(x).to(torch.int32) << (self.e + self.m))
        return codes.to(torch.uint8 if self.bits <= 8 else torch.int16)

    def value(self, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """The value of each code, from a table."""
        return (_table(self).to(codes.device)[codes.to(torch.int64) & (2**self.bits - 1)] * scale).float()


@lru_cache(maxsize=64)
def _table(fmt: MiniFloat) -> Tensor:
    """Value of each code (2^bits,); NaN where a code is no number."""
    codes = torch.arange(2**fmt.bits)
    exponent = (codes >> fmt.m) & (2**fmt.e - 1)
    mantissa = (codes & (2**fmt.m - 1)).double() / 2**fmt.m
    normal = exponent > 0
    power = torch.pow(2.0, (exponent.clamp(min=1) - fmt.offset).double())
    values = power * torch.where(normal, 1 + mantissa, mantissa)
    top = exponent == 2**fmt.e - 1
    if fmt.special == "ieee":
        values[top] = torch.nan
    if fmt.special == "nan":
        values[top & ((codes & (2**fmt.m - 1)) == 2**fmt.m - 1)] = torch.nan
    if fmt.signed:
        values = torch.where(codes >> (fmt.e + fmt.m) == 1, -values, values)
    return values if fmt.e > 6 else values.float()


@lru_cache(maxsize=64)
def _grid(fmt: MiniFloat) -> Tensor:
    values = _table(fmt)
    return torch.unique(values[~values.isnan()] + 0.0)  # type: ignore[no-any-return]


FP8_E4M3 = MiniFloat(4, 3, special="nan")
"""torch.float8_e4m3fn: largest value 448"""
FP8_E5M2 = MiniFloat(5, 2, special="ieee")
"""torch.float8_e5m2: largest value 57344"""
