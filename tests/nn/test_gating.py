"""Gates of a feed-forward block: the mathematics, and gating within the product against gating behind it."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from hasten.nn.gating import gated
from hasten.nn.product import bfloat16, dispatch, int4, int8, supported, tiles

NONE = np.empty(0, np.float32)


@pytest.mark.parametrize("gelu", [False, True])
def test_gates_are_those_of_torch(gelu):
    gate, up = torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
    found = np.empty(300, np.float32)
    gated(gate.numpy(), up.numpy(), gelu, found)
    act = functional.gelu(gate, approximate="tanh") if gelu else functional.silu(gate)
    torch.testing.assert_close(torch.from_numpy(found), act * up, atol=1e-5, rtol=1e-5)


def test_an_element_has_the_same_bits_wherever_it_stands():
    gate, up = np.random.default_rng(1).standard_normal((2, 333)).astype(np.float32)
    whole, pieces = np.empty(333, np.uint16), np.empty(333, np.uint16)
    gated(gate, up, False, whole)
    for begin in range(0, 333, 37):
        part = slice(begin, begin + 37)
        gated(gate[part], up[part], False, pieces[part])
    np.testing.assert_array_equal(whole, pieces)


def matrix_of(kind, weight):
    """The numbers of a matrix (out, in), and what must outlive them."""
    precision = kind.partition("-")[0]
    if precision == "bf16":
        packed = bfloat16.pack(weight.bfloat16().view(torch.uint16).numpy())
    else:
        packed = {"int8": int8, "int4": int4}[precision].pack(weight.numpy())
    return dispatch.describe(kind, packed, None, *weight.shape), packed


@pytest.mark.parametrize("kind", ["bf16", "bf16-floats", "bf16-tiles", "int8", "int8-tiles", "int4"])
@pytest.mark.parametrize(("rows", "gelu"), [(32, False), (37, True), (200, False)])
def test_gating_within_the_product_gives_the_bits_of_gating_behind_it(kind, rows, gelu):
    if not supported(kind.partition("-")[0]) or (kind.endswith("-tiles") and not tiles.granted()):
        pytest.skip("this processor lacks the instructions")
    inner, ins = 192, 576
    generator = torch.Generator().manual_seed(rows)
    matrix, keep = matrix_of(kind, torch.randn(2 * inner, ins, generator=generator) / 24)
    x = torch.randn(rows, ins, generator=generator).bfloat16().view(torch.uint16).numpy()
    forms = dispatch.forms_for(rows, 640)
    for row in range(rows):
        dispatch.prepare_row(matrix, x[row], row, rows, forms)
    inputs = dispatch.inputs_for(x, forms)
    groups = -(-rows // 96)
    both = np.empty((rows, 2 * inner), np.float32)
    dispatch.part(matrix, inputs, both, 0, 6 * groups)
    expected, found = np.empty((rows, inner), np.uint16), np.empty((rows, inner), np.uint16)
    for row in range(rows):
        gated(both[row, :inner], both[row, inner:], gelu, expected[row])
    assert dispatch.gates_in_place(matrix, rows)
    cuts = [0, 1, 3 * groups - 1, 3 * groups]  # also in the middle of a panel, where there are several groups
    for first, last in zip(cuts[:-1], cuts[1:], strict=True):
        dispatch.gated_part(matrix, inputs, gelu, found, first, last)
    np.testing.assert_array_equal(found, expected)
    assert keep is not None


def test_few_rows_and_odd_widths_are_gated_behind_the_product():
    matrix = np.zeros(dispatch.FIELDS, np.int64)
    matrix[1] = 256
    assert dispatch.gates_in_place(matrix, 17)
    assert not dispatch.gates_in_place(matrix, 16)
    matrix[1] = 192
    assert not dispatch.gates_in_place(matrix, 17)
    matrix[1], matrix[5] = 256, 1  # a bias
    assert not dispatch.gates_in_place(matrix, 17)
