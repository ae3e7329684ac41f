"""Bytes through matrix tiles give the bits of registers, however many rows there are and whoever takes which panels."""

import numpy as np
import pytest

from hasten.nn.product import dispatch, int8, tiles

pytestmark = pytest.mark.skipif(not tiles.granted(), reason="this processor has no matrix tiles")
NONE = np.empty(0, np.float32)


def draw(rows, out, inner, seed):
    numbers = np.random.default_rng(seed)
    x = numbers.standard_normal((rows, inner)).astype(np.float32)
    return int8.pack(numbers.standard_normal((out, inner)).astype(np.float32)), x


# One to six tiles of rows, groups of 512 inputs that are the only, first, middle or last one, whole or not.
@pytest.mark.parametrize("rows", [16, 17, 32, 47, 64, 80, 96, 97, 112, 113, 200])
@pytest.mark.parametrize(("out", "inner"), [(128, 64), (64, 512), (128, 1088), (70, 1536)])
def test_many_rows_have_the_bits_of_registers(rows, out, inner):
    weights, x = draw(rows, out, inner, rows + inner)
    one, other = np.full((rows, out), 7, np.float32), np.full((rows, out), 7, np.float32)
    int8.multiply(x, weights, NONE, one)
    tiles.multiply_bytes(x, weights, NONE, other)
    np.testing.assert_array_equal(one, other)


def test_a_bias_and_outputs_in_bfloat16():
    weights, x = draw(33, 192, 640, 0)
    bias = np.random.default_rng(1).standard_normal(192).astype(np.float32)
    for kind in (np.float32, np.uint16):
        one, other = np.zeros((33, 192), kind), np.zeros((33, 192), kind)
        int8.multiply(x, weights, bias, one)
        tiles.multiply_bytes(x, weights, bias, other)
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("rows", [48, 105, 150])
def test_who_takes_which_items_changes_no_bit(rows):
    inner, outs = 576, 192
    weights, x = draw(rows, outs, inner, rows)
    words = (x.view(np.uint32) >> 16).astype(np.uint16)
    expected = np.empty((rows, outs), np.float32)
    int8.multiply(words, weights, NONE, expected)
    matrix = dispatch.describe("int8-tiles", weights, None, outs, inner)
    forms = dispatch.forms_for(rows, inner)
    for row in range(rows):
        dispatch.prepare_row(matrix, words[row], row, rows, forms)
    inputs = dispatch.inputs_for(words, forms)
    items = int(dispatch.items_of(matrix, rows))
    for cuts in ([0, items], [0, 1, items], list(range(items + 1))):
        out = np.full((rows, outs), 7, np.float32)
        for first, last in zip(cuts, cuts[1:], strict=False):
            dispatch.part(matrix, inputs, out, first, last)
        np.testing.assert_array_equal(out, expected)
