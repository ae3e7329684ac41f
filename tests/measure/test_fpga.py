from __future__ import annotations

import math
from pathlib import Path

import pytest

from hasten.errors import ConfigurationError
from hasten.measure.fpga import Fpga, Operand


def test_the_terms_by_hand() -> None:
    device = Fpga.load()
    whole = device.mac(Operand(8), Operand(4), 1024)
    assert whole.terms == {"product": 32.0, "accumulator": 22.0}
    small = device.mac(Operand(6, 3, 2), Operand(5, 2, 2), 512)
    width = 8 + 4 + 2 + 2 + 9
    assert small.width == width
    assert small.terms == {
        "product": 9.0,
        "exponents": 4.0,
        "alignment": width * math.log2(width) / 2,
        "sign": 1.0,
        "accumulator": float(width),
    }
    assert small.luts == sum(small.terms.values())


def test_costs_rise_with_bits_and_one_exponent_bit_is_an_integer() -> None:
    device = Fpga()
    luts = [device.mac(Operand(b), Operand(b), 256).luts for b in range(2, 9)]
    assert luts == sorted(luts)

    class E1M2:
        bits, e, m = 4, 1, 2

    assert Operand.of(E1M2) == Operand(4)


def test_groups_pay_for_their_scales() -> None:
    device = Fpga()
    assert device.mac(Operand(4, group=32), Operand(8), 256).terms["rescale"] == 4.0


def test_own_coefficients(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("multiplier: 0.5\n")
    assert Fpga.load(file) == Fpga(multiplier=0.5)
    assert Fpga().floats_times(0.5).shifter == 0.5
    for text, message in (
        ("lut: 1", "nothing else"),
        ("{", "cannot be read"),
        ("shifter: -1", "0 or more"),
        ("sign: x", "'x'"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigurationError, match=message):
            Fpga.load(file)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Fpga.load(tmp_path / "absent.yaml")
    with pytest.raises(ConfigurationError, match="sum of 0"):
        Fpga().mac(Operand(4), Operand(4), 0)
