from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.compress.quantize import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from hasten.errors import ConfigurationError


def slow_rows(x: torch.Tensor, index: torch.Tensor) -> list[list[float]]:
    """Elements of each scale in the order of the compact shape, from the scale's number at each element."""
    rows: list[list[float]] = [[] for _ in range(int(index.max()) + 1)]
    for value, place in zip(x.flatten().tolist(), index.flatten().tolist(), strict=True):
        rows[place].append(value)
    return rows


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=3),
    kind=st.sampled_from(["tensor", "channel", "group", "token"]),
    axis=st.integers(0, 1),
    size=st.integers(1, 4),
)
def test_every_element_is_in_the_row_of_its_scale(shape: list[int], kind: str, axis: int, size: int) -> None:
    granularity: Granularity = {
        "tensor": PerTensor(), "channel": PerChannel(axis), "group": PerGroup(axis, size), "token": PerToken(),
    }[kind]  # fmt: skip
    x = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(*shape)
    compact = granularity.compact(tuple(shape))
    number = torch.arange(torch.Size(compact).numel()).view(compact)
    index = granularity.spread(number, tuple(shape)).expand(*shape)
    rows = granularity.rows(x)
    assert [[v for v in row if v] for row in rows.tolist()] == slow_rows(x, index)


def test_an_axis_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigurationError, match="no axis 2"):
        PerChannel(2).compact((3, 4))
    with pytest.raises(ConfigurationError, match="group of 0"):
        PerGroup(1, 0)
