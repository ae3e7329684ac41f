from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hasten.measure.memory import model_bytes, peak_rss, resident, rise, tensor_bytes


def test_views_share_their_storage() -> None:
    x = torch.zeros(10, 10)
    assert tensor_bytes([x, x[1:], x.t(), torch.zeros(3, dtype=torch.int8)]) == 403


def test_model_counts_buffers_and_packed_weights() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    expected = 4 * (4 * 4 + 8 + 2) + 8
    assert model_bytes(model) == expected
    model[1].packed_bytes = 100  # type: ignore[assignment]
    assert model_bytes(model) == expected + 100


def test_rise_sees_an_allocation() -> None:
    if not resident():
        pytest.skip("this system does not tell the resident size")
    grown = rise(lambda: np.ones(2**23).sum())
    assert 2**25 < grown < 2**28
    assert peak_rss() >= resident() // 2
