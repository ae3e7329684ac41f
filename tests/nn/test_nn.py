"""Shared layers against their formulas."""

import pytest
import torch

from hasten.nn import RMSNorm, RotaryScaling, causal_mask, grouped_attention, rotary_frequencies, rotate


def test_norm_is_the_formula():
    x = torch.randn(3, 5)
    norm = RMSNorm(5, eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(5.0))
    wanted = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * torch.arange(5.0)
    torch.testing.assert_close(norm(x), wanted)
    gemma = RMSNorm(5, eps=1e-3, offset=1.0)
    torch.testing.assert_close(gemma(x), x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt())


def test_rotation_depends_on_distance_only():
    frequencies, factor = rotary_frequencies(8, 10_000.0, RotaryScaling())
    angles = torch.outer(torch.arange(50.0), frequencies)
    q, k = torch.randn(8), torch.randn(8)

    def score(i, j):
        return (
            rotate(q[None], angles[i : i + 1].cos(), angles[i : i + 1].sin())
            @ rotate(k[None], angles[j : j + 1].cos(), angles[j : j + 1].sin()).T
        )

    torch.testing.assert_close(score(7, 3), score(40, 36), atol=1e-5, rtol=1e-5)
    assert factor == 1.0


def test_linear_scaling_stretches_positions():
    plain, _ = rotary_frequencies(8, 10_000.0, RotaryScaling())
    stretched, _ = rotary_frequencies(8, 10_000.0, RotaryScaling("linear", factor=4.0))
    torch.testing.assert_close(stretched * 4, plain)


def test_a_part_of_the_head_may_stay():
    x = torch.randn(2, 6)
    out = rotate(x, torch.zeros(2, 2), torch.ones(2, 2))
    assert torch.equal(out[:, 4:], x[:, 4:])
    assert torch.equal(out[:, :2], -x[:, 2:4])


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_attention_is_the_formula(window, softcap):
    q, k, v = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    mask = causal_mask(5, 5, window)
    out = grouped_attention(q, k, v, scale=0.3, mask=mask, softcap=softcap)
    for head in range(4):
        scores = q[0, head] @ k[0, head // 2].T * 0.3
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), -1)
        torch.testing.assert_close(out[0, head], weights @ v[0, head // 2], atol=1e-5, rtol=1e-5)


def test_masks():
    assert causal_mask(2, 4).tolist() == [[True, True, True, False], [True, True, True, True]]
    assert causal_mask(2, 4, 2).tolist() == [[False, True, True, False], [False, False, True, True]]
