"""Codes of keys and values against the same sums written out in numpy."""

import numpy as np
import pytest

from hasten.errors import DataError
from hasten.language import DecoderConfig
from hasten.language.kvquantise import EDGE, LEVELS, Form, dequantise, quantise, turns

CONFIG = DecoderConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=12, intermediate_size=16,
    max_position_embeddings=64, partial_rotary_factor=0.5,
)  # fmt: skip


def form(group=5, width=0.06):
    rng = np.random.default_rng(0)
    delta = rng.random((4, 24)) < 0.5
    delta[3] = False
    mean = rng.standard_normal((4, 24)).astype(np.float32) * 0.1
    pairs = CONFIG.rotary_dim // 2
    return Form(group, delta, mean, np.full(4, width, np.float32), 2, pairs, np.zeros(2, bool))


def numbers(tokens=23):
    rng = np.random.default_rng(1)
    return [rng.standard_normal((2, tokens, 24)).astype(np.float32) for _ in range(2)]


def test_every_number_comes_back_within_half_a_bin():
    one, (keys, values) = form(), numbers()
    plane, scales = np.zeros((4, 23, 32), np.uint8), np.zeros((4, 5), np.uint16)
    assert quantise(one, keys, values, turns(CONFIG, 3, 23, back=True), 0, 4, plane, scales)
    assert (plane[..., 24:] == 0).all()
    back = [np.empty_like(keys), np.empty_like(values)]
    dequantise(one, plane, scales, turns(CONFIG, 3, 23, back=False), 0, 4, *back)
    anchors = np.zeros((1, 23, 1), bool)
    anchors[:, ::5] = True
    for half, given in enumerate((keys, values)):
        off = np.abs(back[half] - given)
        turned = 1.5 if half == 0 else 1.0  # two numbers turn together
        assert off[np.broadcast_to(~anchors, off.shape)].max() < 0.5 * 0.06 * turned + 1e-5
        assert off[:, ::5].max() < max(0.5 * 0.06, 0.51 * np.abs(given).max() * 1.5 / EDGE) * turned
    assert (scales[3] == 0).all()


def test_what_is_not_finite_is_told():
    one, (keys, values) = form(), numbers()
    values[1, 4, 3] = np.nan
    plane, scales = np.zeros((4, 23, 32), np.uint8), np.zeros((4, 5), np.uint16)
    back = turns(CONFIG, 0, 23, back=True)
    assert quantise(one, keys, values, back, 0, 3, plane, scales)
    assert not quantise(one, keys, values, back, 3, 4, plane, scales)


def test_turning_back_and_forth_is_nothing():
    back, forth = (turns(CONFIG, 5, 9, back=b)[0] for b in (True, False))
    assert np.allclose(back[0] * forth[0] - back[1] * forth[1], 1, atol=1e-6)
    assert np.allclose(back[0] * forth[1] + back[1] * forth[0], 0, atol=1e-6)
    with pytest.raises(DataError, match="60 to 70"):
        turns(CONFIG, 60, 10, back=True)


def test_levels_become_finer_and_layers_coarser():
    for which in range(2):
        widths = [[level.width(which, n, 9) for n in range(9)] for level in LEVELS.values()]
        assert (np.diff(widths, axis=0) < 0).all()
        assert (np.diff(widths, axis=1) >= 0).all()
