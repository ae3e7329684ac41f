"""What a multiply-accumulate of two number formats takes on an FPGA, in six-input LUTs: an analytic model of our own.

Integers of b1 and b2 bits: a product of ``b1 b2`` full adders and an accumulator of ``b1 + b2 + log2 K`` bits.
Floats: a product of the significands ``(m1+1)(m2+1)``, an adder of exponents ``max(e1, e2) + 1``, a shifter that
aligns the product with a fixed-point accumulator of ``W = 2^e1 + 2^e2 + m1 + m2 + log2 K`` bits (``W log2(W) / 2``),
and its adder (``W``). A float with one exponent bit has an evenly spaced grid and is built as an integer.
Coefficients are in ``fpga.yaml``.

"Post-Training Quantization with Low-precision Minifloats and Integers on FPGAs" https://arxiv.org/abs/2311.12359
Differs from the paper in: its operators were synthesised; these are counted.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hasten.errors import ConfigurationError

__all__ = ["Fpga", "MacCost", "Operand"]


@dataclass(frozen=True)
class Operand:
    """One side of a product."""

    bits: int
    """of the whole code, sign included"""
    exponent: int = 0
    """bits of the exponent; 0 for an integer"""
    mantissa: int = 0
    """bits of the mantissa of a float"""
    group: int = 0
    """inputs that share a scale; 0 where a whole row does"""

    @classmethod
    def of(cls, fmt: Any) -> Operand:
        """From a number format: what it says about ``bits``, ``e``, ``m`` and its groups.

        >>> class Float: bits, e, m = 4, 2, 1
        >>> Operand.of(Float)
        Operand(bits=4, exponent=2, mantissa=1, group=0)
        """
        element = getattr(fmt, "element", fmt)
        bits = int(fmt.bits)
        size = int(getattr(getattr(fmt, "granularity", None), "size", 0))
        exponent = int(getattr(element, "e", 0))
        if exponent <= 1:
            return cls(bits, 0, 0, size)
        return cls(bits, exponent, int(element.m), size)

    @property
    def significand(self) -> int:
        """Bits that enter the multiplier."""
        return self.mantissa + 1 if self.exponent else self.bits

    @property
    def reach(self) -> int:
        """Bits of the operand as a fixed-point number."""
        return 2**self.exponent + self.mantissa if self.exponent else self.bits


@dataclass(frozen=True)
class MacCost:
    """LUTs of one multiply-accumulate, term by term."""

    terms: dict[str, float]
    """part -> LUTs"""
    width: int
    """bits of the accumulator"""

    @property
    def luts(self) -> float:
        """All terms."""
        return sum(self.terms.values())


@dataclass(frozen=True)
class Fpga:
    """LUTs for each part; the defaults are those of ``fpga.yaml``.

    >>> device = Fpga()
    >>> integer, small = Operand(4), Operand(4, exponent=2, mantissa=1)
    >>> round(device.mac(integer, integer, 256).luts), round(device.mac(small, small, 256).luts)
    (32, 64)
    """

    multiplier: float = 1.0
    """of one full adder of the product"""
    exponent_adder: float = 1.0
    """of one bit"""
    shifter: float = 1.0
    """of one bit of one level"""
    accumulator: float = 1.0
    """of one bit"""
    sign: float = 1.0
    """of the sign of a product of magnitudes"""
    rescale: float = 128.0
    """of the product with a group's scale"""

    def __post_init__(self) -> None:
        for knob in fields(self):
            value = getattr(self, knob.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise ConfigurationError(f"{knob.name} is {value!r}; give a number of LUTs, 0 or more")

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None) -> Fpga:
        """Coefficients of a YAML file; those of this package where none is named.

        >>> Fpga.load() == Fpga()
        True
        """
        import yaml  # type: ignore[import-untyped,unused-ignore]

        file = Path(path) if path is not None else Path(__file__).with_name("fpga.yaml")
        try:
            entries = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigurationError(
                f"coefficients {str(file)!r} cannot be read ({reason}); name a YAML mapping"
            ) from error
        known = {f.name for f in fields(cls)}
        if not isinstance(entries, dict) or set(entries) - known:
            raise ConfigurationError(f"coefficients {str(file)!r} may hold {', '.join(sorted(known))} and nothing else")
        return cls(**entries)

    def mac(self, weight: Operand, activation: Operand, inputs: int) -> MacCost:
        """One unit that adds up ``inputs`` products."""
        if inputs < 1:
            raise ConfigurationError(f"a sum of {inputs} products is none; give at least one")
        carry = math.ceil(math.log2(inputs)) if inputs > 1 else 0
        width = weight.reach + activation.reach + carry
        terms = {"product": self.multiplier * weight.significand * activation.significand}
        if weight.exponent or activation.exponent:
            terms["exponents"] = self.exponent_adder * (max(weight.exponent, activation.exponent) + 1)
            terms["alignment"] = self.shifter * width * math.log2(width) / 2
            terms["sign"] = self.sign
        terms["accumulator"] = self.accumulator * width
        groups = [o.group for o in (weight, activation) if o.group]
        if groups:
            terms["rescale"] = self.rescale / min(groups)
        return MacCost(terms, width)

    def floats_times(self, factor: float) -> Fpga:
        """The same device, what only floats need (exponents, alignment, sign) ``factor`` times as large."""
        return Fpga(
            self.multiplier, self.exponent_adder * factor, self.shifter * factor, self.accumulator, self.sign * factor,
            self.rescale,
        )  # fmt: skip
