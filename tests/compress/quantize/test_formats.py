from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.compress.quantize import (
    FP8_E4M3,
    FP8_E5M2,
    MXFP4,
    NF4,
    NVFP4,
    Binary,
    BinaryCode,
    Codebook,
    Format,
    Int,
    KMeans,
    MiniFloat,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Ternary,
    power_of_two_format,
)
from hasten.compress.quantize.compact import expand, shrink
from hasten.errors import ConfigurationError, DataError

ONE = torch.ones(1)
EVERY: list[Format] = [
    Int(2),
    Int(3, PerGroup(1, 20)),
    Int(4, PerChannel(0)),
    Int(8),
    Int(12),
    Int(4, PerGroup(1, 32), symmetric=False),
    Int(4, full_range=True),
    MiniFloat(2, 1),
    MiniFloat(3, 2, granularity=PerChannel(0)),
    MiniFloat(4, 0),
    MiniFloat(5, 6),
    MiniFloat(7, 3),
    MiniFloat(0, 3),
    FP8_E4M3,
    FP8_E5M2,
    MXFP4,
    NVFP4,
    NF4,
    KMeans(3),
    KMeans(2, PerTensor()),
    BinaryCode(2),
    Binary(),
    Ternary(),
    Codebook((-1.0, 0.0, 0.5)),
]


def weights() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(16, 64) * torch.exp(torch.randn(16, 1))


@pytest.mark.parametrize("fmt", EVERY, ids=lambda f: f.label)
class TestEveryFormat:
    def test_codes_stand_for_the_rounded_values(self, fmt: Format) -> None:
        x = weights()
        quantized = fmt.quantize(x)
        assert torch.equal(quantized.dequantize(), fmt.fake(x))
        assert quantized.codes.dtype in (torch.int8, torch.uint8, torch.int16)
        assert int(quantized.codes.int().max() - quantized.codes.int().min()) < 2**fmt.bits

    def test_rounding_twice_is_rounding_once(self, fmt: Format) -> None:
        x = weights()
        scale, zero = fmt.find(x)
        once = fmt.fake(x, scale, zero)
        assert torch.equal(fmt.fake(once, scale, zero), once)

    def test_values_lie_between_their_neighbours_and_are_one_of_them(self, fmt: Format) -> None:
        x = weights()
        scale, zero = fmt.find(x)
        s, z = fmt.spread(scale, tuple(x.shape)), fmt.spread(zero, tuple(x.shape))
        down, up = fmt.neighbours(x, s, z)
        rounded = fmt.round_to(x, s, z)
        assert bool((down <= up).all())
        assert bool(((rounded == down) | (rounded == up)).all())
        inside = (x >= down) & (x <= up)
        if not isinstance(fmt, Ternary):  # its threshold is not the middle
            nearest = torch.minimum((x - down).abs(), (x - up).abs())
            assert torch.allclose((rounded - x).abs()[inside], nearest[inside], rtol=1e-5, atol=1e-7)

    def test_bytes_are_those_that_are_stored(self, fmt: Format) -> None:
        quantized = fmt.quantize(weights())
        parts = shrink(quantized)
        assert torch.equal(expand(parts, fmt, quantized.shape).dequantize(), quantized.dequantize())
        size = sum(t.numel() * t.element_size() for t in parts.values())
        assert size <= fmt.stored_bits(quantized.shape) / 8 + 8

    def test_zero_stays_and_nothing_becomes_nan(self, fmt: Format) -> None:
        zeros = fmt.fake(torch.zeros(4, 64))
        assert bool(torch.isfinite(zeros).all())
        if not isinstance(fmt, (BinaryCode, KMeans)):
            x = weights()
            x[:, 0] = 0
            assert not bool(fmt.fake(x)[:, 0].any())
            assert not bool(zeros.any())
        assert bool(torch.isfinite(fmt.fake(torch.full((4, 64), 3.0))).all())
        assert bool(torch.isfinite(fmt.fake(torch.full((4, 64), 1e-42))).all())

    def test_not_a_number_is_refused(self, fmt: Format) -> None:
        x = weights()
        x[3, 5] = float("nan")
        with pytest.raises(DataError, match="NaN"):
            fmt.quantize(x)

    def test_half_formats_keep_their_type(self, fmt: Format) -> None:
        assert fmt.fake(weights().bfloat16()).dtype is torch.bfloat16


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(2, 8), symmetric=st.booleans(), seed=st.integers(0, 99), spread=st.floats(1e-3, 1e3))
def test_the_error_of_an_integer_is_half_a_step_inside_the_range(
    bits: int, symmetric: bool, seed: int, spread: float
) -> None:
    x = torch.randn(256, generator=torch.Generator().manual_seed(seed)) * spread
    fmt = Int(bits, symmetric=symmetric)
    scale, zero = fmt.find(x)
    offset = 0.0 if zero is None else float(zero)
    inside = (x >= (fmt.lowest - offset) * scale) & (x <= (fmt.highest - offset) * scale)
    assert float((fmt.fake(x) - x).abs()[inside].max()) <= float(scale) / 2 * (1 + 1e-5)
    if symmetric:  # the range found again is the same range
        assert torch.equal(fmt.fake(fmt.fake(x)), fmt.fake(x))


def test_the_formulas_of_integers() -> None:
    x = torch.tensor([-1.0, 3.0])
    assert float(Int(4).find(x)[0]) == pytest.approx(3 / 7, rel=1e-4)
    assert float(Int(4, full_range=True).find(x)[0]) == pytest.approx(3 / 7.5, rel=1e-4)
    scale, zero = Int(4, symmetric=False).find(x)
    assert zero is not None
    assert float(scale) == pytest.approx(4 / 15, rel=1e-4)
    assert float(zero) == round(15 / 4) - 8


def splits() -> list[MiniFloat]:
    return [
        MiniFloat(e, m)
        for e, m in itertools.product(range(9), range(8))
        if 2 <= 1 + e + m <= 8 and e + m and (e or m > 0)
    ]


@pytest.mark.parametrize("fmt", splits(), ids=lambda f: f.label)
def test_minifloats_are_the_nearest_of_their_enumerated_grid(fmt: MiniFloat) -> None:
    """The grid is written out from the definition; ties go to the even significand of the lower binade."""
    steps = 2**fmt.m
    bias = 2 ** (fmt.e - 1) - 1 if fmt.e else 0
    positive: list[float] = []
    for exponent, mantissa in itertools.product(range(2**fmt.e), range(steps)):
        if exponent == 0:
            positive.append(2.0 ** (1 - bias) * mantissa / steps)
        else:
            positive.append(2.0 ** (exponent - bias) * (1 + mantissa / steps))
    grid = np.unique(np.array(positive + [-v for v in positive]))
    assert fmt.grid().double().numpy().tolist() == pytest.approx(grid.tolist(), abs=0)
    assert fmt.max == grid[-1]
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=100_000) * grid[-1] / 2, (grid[1:] + grid[:-1]) / 2, grid, [1e30, -1e30]])
    x = x.astype(np.float32).astype(np.float64) if fmt.e <= 6 else x
    clipped = np.clip(x, grid[0], grid[-1])
    above = np.searchsorted(grid, clipped).clip(1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    inner = np.minimum(np.abs(low), np.abs(high))  # the lower binade decides which of both is even
    quantum = 2.0 ** (np.maximum(np.floor(np.log2(np.maximum(inner, 1e-300))), 1 - bias) - fmt.m)
    low_even = np.mod(np.round(low / quantum), 2) == 0
    nearer_low = (clipped - low < high - clipped) | ((clipped - low == high - clipped) & low_even)
    expected = np.where(nearer_low, low, high)
    kind = torch.float32 if fmt.e <= 6 else torch.float64
    got = fmt.round_to(torch.tensor(x, dtype=kind), ONE.to(kind)).double().numpy()
    assert np.array_equal(got, expected)


@pytest.mark.parametrize(
    ("fmt", "kind"),
    [(MiniFloat(2, 1), "float4_e2m1fn"), (MiniFloat(2, 3), "float6_e2m3fn"), (MiniFloat(3, 2), "float6_e3m2fn")],
)
def test_small_floats_are_those_of_ml_dtypes(fmt: MiniFloat, kind: str) -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(100_000) * 4, fmt.grid(), (fmt.grid()[1:] + fmt.grid()[:-1]) / 2])
    expected = x.numpy().astype(getattr(ml_dtypes, kind)).astype(np.float32)
    assert np.array_equal(fmt.quantize(x, ONE).dequantize().numpy(), expected)


@pytest.mark.parametrize(("fmt", "kind"), [(FP8_E4M3, torch.float8_e4m3fn), (FP8_E5M2, torch.float8_e5m2)])
def test_fp8_is_that_of_torch_bit_for_bit(fmt: MiniFloat, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(100_000) * torch.exp(3 * torch.randn(100_000))
    x = torch.cat([x, fmt.grid(), (fmt.grid()[1:] + fmt.grid()[:-1]) / 2]).clamp(-fmt.max, fmt.max)
    assert torch.equal(fmt.round_to(x, ONE), x.to(kind).float())
    assert torch.equal(fmt.encode(x, ONE), x.to(kind).view(torch.uint8))


def test_one_exponent_bit_is_an_integer() -> None:
    x = weights()
    assert torch.allclose(MiniFloat(1, 2).fake(x), Int(4).fake(x), rtol=2e-4)
    assert len(MiniFloat(1, 2).grid()) == 15


def test_block_scales_are_what_their_standards_say() -> None:
    x = weights()
    scale, _ = MXFP4.find(x)
    top = x.view(16, 2, 32).abs().amax(2)
    assert torch.equal(scale, torch.exp2(torch.floor(torch.log2(top)) - 2))
    scale, outer = NVFP4.find(x)
    assert outer is not None
    assert float(outer) == pytest.approx(float(x.abs().max()) / (6 * 448), rel=1e-4)
    assert torch.equal((scale / outer).to(torch.float8_e4m3fn).float() * outer, scale)


def test_learned_lists_reduce_the_error_and_heed_importance() -> None:
    torch.manual_seed(0)
    x = torch.distributions.StudentT(4.0).sample((8, 512))
    error = [(f.fake(x) - x).square().mean() for f in (KMeans(3), Int(3, PerChannel(0)))]
    assert error[0] < 0.5 * error[1]
    importance = torch.zeros(8, 512)
    importance[:, :8] = 1.0
    fmt = KMeans(3)
    scale, _ = fmt.find(x, importance)
    heeded, ignored = ((fmt.fake(x, s) - x)[:, :8].square().mean() for s in (scale, None))
    assert float(heeded) < 0.7 * float(ignored)


def test_binary_and_ternary_by_hand() -> None:
    x = torch.tensor([[1.0, -2.0, 3.0]])
    assert torch.equal(Binary().fake(x), torch.tensor([[2.0, -2.0, 2.0]]))
    assert torch.equal(Ternary().fake(torch.tensor([[1.0, -2.0, 3.0, 0.1]])), torch.tensor([[0.0, -2.5, 2.5, 0.0]]))
    exact = torch.tensor([[3.0, 1.0, -1.0, -3.0, 3.0]])  # 2 and 1 with all signs
    assert torch.allclose(BinaryCode(2).fake(exact), exact, atol=1e-3)
    torch.manual_seed(0)
    w = torch.randn(4, 256)
    errors = [float((BinaryCode(b).fake(w) - w).square().mean()) for b in (1, 2, 3)]
    assert errors == sorted(errors, reverse=True)


def test_powers_of_two() -> None:
    values = power_of_two_format(4).fake(weights()).abs()
    logs = torch.log2(values[values > 0] / power_of_two_format(4).find(weights())[0])
    assert torch.equal(logs, logs.round())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Int(1),
        lambda: Int(17),
        lambda: Int(8, PerToken()),
        lambda: MiniFloat(0, 0),
        lambda: MiniFloat(8, 8),
        lambda: MiniFloat(11, 1),
        lambda: MiniFloat.parse("int4"),
        lambda: MiniFloat(2, 1, special="inf"),
        lambda: KMeans(9),
        lambda: BinaryCode(5),
        lambda: Codebook((0.0,)),
        lambda: Codebook((1.0, 0.0)),
        lambda: MXFP4.per_channel(),
        lambda: Binary(2),
    ],
)
def test_formats_that_do_not_exist(make: object) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make()  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_negative_values_without_a_sign_are_refused() -> None:
    with pytest.raises(DataError, match="negative"):
        MiniFloat(2, 2, signed=False).fake(torch.tensor([-1.0, 1.0]))
    assert float(MiniFloat(2, 2, signed=False).fake(torch.tensor([0.0, 1.0])).max()) == pytest.approx(1, rel=1e-4)
