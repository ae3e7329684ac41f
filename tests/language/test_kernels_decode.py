"""Attention of single tokens: against the kernel that goes page by page, for every number of heads and window."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.language import kernels_cpu, kernels_decode, kernels_tiles
from hasten.language.kernels_phases import in_parts

pytestmark = pytest.mark.skipif(not kernels_tiles.takes(16, 64), reason="this processor has no matrix tiles")


def words(*shape: int, seed: int = 0) -> Any:
    """Normal numbers as bfloat16, in the form that the kernels take."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).bfloat16().view(torch.uint16).numpy()


def floats(x: Any) -> torch.Tensor:
    return torch.from_numpy(x).view(torch.bfloat16).float()


class Case:
    """Rows with a context each, in pages that lie anywhere."""

    def __init__(self, contexts: list[int], kv_heads: int, group: int, width: int) -> None:
        self.rows, self.kv_heads, self.heads, self.width = len(contexts), kv_heads, kv_heads * group, width
        pages = max(contexts) // 16 + 1
        self.tables = np.random.default_rng(0).permutation(pages * self.rows).astype(np.int32).reshape(self.rows, pages)
        self.keys = words(pages * self.rows, kv_heads, 16, width, seed=1)
        self.values = words(pages * self.rows, kv_heads, 16, width, seed=2)
        self.query = words(self.rows, self.heads, width, seed=3)
        self.places = np.array(contexts, np.int32)
        self.chunk_of = np.arange(self.rows, dtype=np.int32)
        self.lanes = kernels_decode.lanes_of(group)

    def expected(self, window: int) -> torch.Tensor:
        out = np.zeros((self.rows, self.heads * self.width), np.uint16)
        kernels_cpu.attend_pages(
            self.query, self.chunk_of, self.places, self.tables, self.keys, self.values, self.width**-0.5, window, out,
            0, self.rows * self.kv_heads,
        )  # fmt: skip
        return floats(out)

    def answer(self, window: int, cuts: list[int]) -> torch.Tensor:
        out = np.zeros((self.rows, self.heads * self.width), np.uint16)
        job = np.zeros(kernels_tiles.FIELDS, np.int64)
        arrays = (self.query, self.places, self.tables)
        job[:5] = self.rows, self.heads, self.width, self.kv_heads, self.tables.shape[1]
        job[5:8], job[8] = [a.ctypes.data for a in arrays], self.rows
        job[9:14] = self.keys.ctypes.data, self.values.ctypes.data, window, out.ctypes.data, self.chunk_of.ctypes.data
        job[17] = np.float32(self.width**-0.5).view(np.uint32)
        in_parts(kernels_decode.code_for(self.lanes).address, job, np.array(cuts, np.int64), 0, 1)
        return floats(out)


@pytest.mark.parametrize(("kv_heads", "group", "width"), [(2, 1, 64), (1, 2, 64), (2, 3, 64), (2, 4, 128), (1, 7, 64)])
@pytest.mark.parametrize("window", [0, 40, 300])
def test_equals_the_kernel_that_goes_page_by_page(kv_heads: int, group: int, width: int, window: int) -> None:
    case = Case([0, 5, 15, 16, 64, 255, 256, 700], kv_heads, group, width)
    torch.testing.assert_close(case.answer(window, [0, 8 * kv_heads]), case.expected(window), atol=0.01, rtol=0.01)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 400), min_size=2, max_size=6), st.integers(1, 11))
def test_a_row_does_not_depend_on_its_neighbours_or_the_cut(contexts: list[int], cut: int) -> None:
    case = Case(contexts, 2, 4, 64)
    items = 2 * len(contexts)
    whole = case.answer(0, [0, items])
    assert torch.equal(case.answer(0, [0, min(cut, items - 1), items]), whole)
    rest = np.arange(items // 2) != 0
    case.places = np.where(rest, -1, case.places).astype(np.int32)  # the others are left out
    assert torch.equal(case.answer(0, [0, items])[0], whole[0])


def test_what_a_page_holds_behind_the_last_key_does_not_matter() -> None:
    case = Case([20, 35], 2, 4, 64)
    before = case.answer(0, [0, 4])
    for row, place in enumerate(case.places):
        page = case.tables[row, place // 16]
        for half in (case.keys, case.values):
            half[page, :, place % 16 + 1 :] = 0x7FC0  # not a number
    assert torch.equal(case.answer(0, [0, 4]), before)


def test_lanes_are_heads_filled_up_to_a_power_of_two() -> None:
    assert [kernels_decode.lanes_of(n) for n in (1, 2, 3, 4, 5, 8, 9, 16, 17)] == [1, 2, 4, 4, 8, 8, 16, 16, 0]
