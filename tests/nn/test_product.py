"""Our own products: the mathematics, and that a row's bits depend on nothing but the row."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.compress import panels
from hasten.language import linear
from hasten.nn.product import FORMATS, bfloat16, instructions, past_caches, supported, tiles

NONE = np.empty(0, np.float32)
PRECISIONS = [p for p in FORMATS if supported(p)]
pytestmark = pytest.mark.skipif(not PRECISIONS, reason="this processor lacks the instructions")


def module(precision):
    from hasten.nn.product import bfloat16, int4, int8

    return {"bf16": bfloat16, "int8": int8, "int4": int4}[precision]


def draw(outs, ins, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outs, ins, generator=generator).bfloat16()
    return weight, torch.randn(rows, ins, generator=generator).bfloat16()


def words(x):
    return x.view(torch.uint16).numpy()


def packed(precision, weight):
    return module(precision).pack(words(weight) if precision == "bf16" else weight.float().numpy())


def used(precision, weight):
    """The weight that the product uses, (out, in) float64."""
    arrays = packed(precision, weight)
    arrays = arrays if isinstance(arrays, tuple) else (arrays,)
    return module(precision).unpack(*arrays, *weight.shape).astype(np.float64)


def rounded(precision, x):
    """The activations that the product uses: bytes with a scale for each group, by the obvious way."""
    plain = x.double().numpy()
    if precision == "bf16":
        return plain
    size = module(precision).INPUTS
    for row in plain:
        for at in range(0, len(row), size):
            part = row[at : at + size]
            step = np.float32(np.abs(part).max() / 127)
            if step > 0:
                part[:] = np.rint(part / step) * step
    return plain


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(PRECISIONS), st.integers(1, 150), st.integers(1, 90), st.integers(1, 20), st.integers(0, 99))
def test_product_is_that_of_the_rounded_factors(precision, outs, half, rows, seed):
    weight, x = draw(outs, 2 * half, rows, seed)
    out = np.empty((rows, outs), np.float32)
    bias = np.arange(outs, dtype=np.float32)
    module(precision).multiply(words(x), packed(precision, weight), bias, out)
    wanted = rounded(precision, x) @ used(precision, weight).T + bias
    # a half-way case may round the other way in float32: one step of one input
    scale = np.abs(x.float().numpy()).max() * np.abs(weight.float().numpy()).max()
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5 * outs + (0 if precision == "bf16" else scale / 100))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_has_the_same_bits_in_any_company(precision):
    weight, x = draw(130, 1100, 210, 0)
    arrays = packed(precision, weight)
    together = np.empty((210, 130), np.float32)
    module(precision).multiply(words(x), arrays, NONE, together)
    for first, count in ((0, 1), (7, 2), (100, 3), (95, 4), (201, 5), (0, 6), (3, 97)):
        some = np.empty((count, 130), np.float32)
        module(precision).multiply(words(x[first : first + count].contiguous()), arrays, NONE, some)
        assert (some == together[first : first + count]).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 150), st.integers(1, 600), st.integers(1, 110), st.integers(0, 99))
def test_many_rows_through_float32_are_the_same_product(outs, half, rows, seed):
    weight, x = draw(outs, 2 * half, rows, seed)
    out, some = np.empty((rows, outs), np.float32), np.empty((1, outs), np.float32)
    bias = np.arange(outs, dtype=np.float32)
    arrays = packed("bf16", weight)
    bfloat16.multiply_floats(words(x), arrays, bias, out)
    np.testing.assert_allclose(out, x.double().numpy() @ weight.double().numpy().T + bias, rtol=1e-4, atol=1e-3)
    for row in {0, rows // 2, rows - 1}:
        bfloat16.multiply_floats(words(x[row : row + 1].contiguous()), arrays, bias, some)
        assert (some[0] == out[row]).all()


def test_only_many_rows_go_through_float32_and_only_where_bits_may_differ(monkeypatch):
    monkeypatch.setattr(linear.tiles, "granted", lambda: False)
    monkeypatch.setattr(panels, "pairs_as_floats", lambda: True)
    monkeypatch.setattr(linear, "pairs_as_floats", lambda: True)
    weight, x = draw(64, 96, 16, 0)
    plain, floats = np.empty((16, 64), np.uint16), np.empty((16, 64), np.uint16)
    bfloat16.multiply(words(x), packed("bf16", weight), NONE, plain)
    bfloat16.multiply_floats(words(x), packed("bf16", weight), NONE, floats)
    exact, free = (linear.pack(weight, "bf16", deterministic=fixed) for fixed in (True, False))
    assert (exact.packed[0], free.packed[0]) == ("bf16", "bf16-floats")
    assert (words(exact(x)) == plain).all()
    assert (words(free(x)) == floats).all()
    assert (words(free(x[:15])) == plain[:15]).all()
    assert linear.pack(weight, "int8", deterministic=False).packed[0] == "int8"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_stored_weights_are_close(precision):
    weight, _ = draw(70, 200, 1, 1)
    error = np.linalg.norm(used(precision, weight) - weight.double().numpy()) / weight.double().norm().item()
    assert error <= {"bf16": 0, "int8": 0.01, "int4": 0.1}[precision]
    if precision == "bf16":
        assert (used(precision, weight) == weight.double().numpy()).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_zeros_and_extremes(precision):
    weight, x = draw(64, 64, 3, 2)
    weight[5], x[1] = 0, 0
    x[2] *= 1e30
    out = np.empty((3, 64), np.float32)
    module(precision).multiply(words(x), packed(precision, weight), NONE, out)
    assert (out[:, 5] == 0).all()
    assert (out[1] == 0).all()
    assert np.isfinite(out).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_output_in_bfloat16_is_the_rounded_float32(precision):
    weight, x = draw(96, 128, 5, 3)
    exact, short = np.empty((5, 96), np.float32), torch.empty(5, 96, dtype=torch.bfloat16)
    module(precision).multiply(words(x), packed(precision, weight), NONE, exact)
    module(precision).multiply(words(x), packed(precision, weight), NONE, words(short))
    assert torch.equal(torch.from_numpy(exact).bfloat16(), short)


@pytest.mark.skipif(not tiles.granted(), reason="this processor has no matrix tiles")
@pytest.mark.parametrize(
    ("rows", "out", "inner"), [(16, 64, 64), (17, 70, 34), (47, 130, 1100), (113, 16, 96), (81, 64, 160)]
)
def test_tiles_give_the_product(rows, out, inner):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inner, generator=generator).bfloat16()
    weight = torch.randn(out, inner, generator=generator).bfloat16()
    bias = torch.randn(out, generator=generator)
    result = np.empty((rows, out), np.float32)
    packed = bfloat16.pack(weight.view(torch.uint16).numpy())
    tiles.multiply(x.view(torch.uint16).numpy(), packed, bias.numpy(), result)
    expected = x.float() @ weight.float().t() + bias
    torch.testing.assert_close(torch.from_numpy(result), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not tiles.granted(), reason="this processor has no matrix tiles")
@pytest.mark.parametrize(("rows", "out", "inner"), [(16, 64, 128), (45, 130, 384), (130, 70, 256), (81, 64, 704)])
def test_tiles_of_bytes_give_the_same_bits(rows, out, inner):
    from hasten.nn.product import int8

    weight, x = draw(out, inner, rows, 3)
    packed = int8.pack(weight.float().numpy())
    one, other = np.empty((rows, out), np.float32), np.empty((rows, out), np.float32)
    bias = np.random.default_rng(0).standard_normal(out).astype(np.float32)
    int8.multiply(words(x), packed, bias, one)
    tiles.multiply_bytes(words(x), packed, bias, other)
    np.testing.assert_array_equal(one, other)


def test_a_processor_without_the_instructions_compiles_kernels_that_hold_them(monkeypatch):
    monkeypatch.setattr(instructions, "_features", dict)
    total = object()
    assert instructions.dot_bfloat16(None, total, None, None) is total  # the builder is not even asked
    assert instructions.dot_bytes(None, total, None, None) is total
    assert tiles.run_assembly(None, "tilerelease") is None


@pytest.mark.skipif(not tiles.granted(), reason="this processor has no matrix tiles")
@pytest.mark.parametrize("rows", [16, 33, 100])
def test_a_large_matrix_writes_past_the_caches_what_a_small_one_writes(rows):
    weight, x = draw(192, 64, rows, seed=rows)
    small = bfloat16.pack(words(weight))
    out = np.empty((rows, 192), np.float32)
    times = -(-past_caches.LEAST_BYTES // small.nbytes)
    large = np.tile(small, (times, 1, 1, 1))  # the same three panels again and again
    wide = tiles.room_for(rows * times * 192 * 4).view(np.float32).reshape((rows, times * 192))
    assert past_caches.goes_past(large.nbytes, NONE, wide)
    assert not past_caches.goes_past(small.nbytes, NONE, out)
    tiles.multiply(words(x), small, NONE, out)
    tiles.multiply(words(x), large, NONE, wide)
    assert np.array_equal(wide.reshape(rows, times, 192), np.repeat(out[:, None], times, 1))
