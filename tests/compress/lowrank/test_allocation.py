"""Shares of pairs: the solver against brute force, and on a decoder of which some pairs do nothing."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hasten.compress.lowrank import allocation
from hasten.compress.lowrank.allocation import fitted, spread_cut
from hasten.compress.lowrank.blocks import find_blocks
from hasten.compress.lowrank.modular import KINDS, ModularDecomposition
from hasten.compress.lowrank.statistics import gather
from hasten.errors import ConfigurationError
from hasten.language import Decoder, DecoderConfig

TOKENS = torch.randint(0, 60, (4, 40), generator=torch.Generator().manual_seed(1))


def decoder(**options):
    torch.manual_seed(0)
    model = Decoder(
        DecoderConfig(
            vocab_size=60, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=64,
            max_position_embeddings=256, **options,
        )
    ).eval()  # fmt: skip
    for p in model.parameters():
        nn.init.normal_(p, std=0.15) if p.dim() > 1 else p.data.add_(torch.randn_like(p) * 0.1)
    return model


@settings(max_examples=40, deadline=None)
@given(
    curves=st.lists(st.tuples(st.floats(0, 2), st.floats(1e-3, 5)), min_size=1, max_size=6),
    sizes=st.lists(st.floats(1, 50), min_size=6, max_size=6),
    average=st.floats(0.02, 0.75),
)
def test_the_cut_is_spent_and_no_exchange_helps(curves, sizes, average):
    shape, n = torch.tensor(curves, dtype=torch.float64), torch.tensor(sizes[: len(curves)], dtype=torch.float64)
    found = spread_cut(shape, n, average, 0.8)
    assert float((found * n).sum()) == pytest.approx(average * float(n.sum()), rel=1e-6)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 0.8 + 1e-12

    def loss(x):
        return float((shape[:, 0] * x + shape[:, 1] * x * x).sum())

    best = loss(found)
    for i, j in itertools.permutations(range(len(n)), 2):
        moved = found.clone()
        step = min(0.01, float(moved[i]), float((0.8 - moved[j]) * n[j] / n[i]))
        moved[i] -= step
        moved[j] += step * n[i] / n[j]
        assert loss(moved) >= best - 1e-7


def test_a_curve_is_fitted_with_no_part_below_zero():
    assert fitted([0.1, 0.2, 0.4], [0.05, 0.1, 0.2]) == (pytest.approx(0.5), pytest.approx(0, abs=1e-9))
    bend = fitted([0.1, 0.2, 0.4], [0.0, 0.03, 0.17])  # the line alone would go below zero
    assert bend[0] == 0
    assert bend[1] > 0.9
    flat = fitted([0.1, 0.2, 0.4], [0.0, -1e-9, 0.0])
    assert flat == (0.0, 1e-12)
    assert fitted([0.3], [0.09])[0] >= 0
    with pytest.raises(ConfigurationError, match="lower the ratio"):
        spread_cut(torch.tensor([[0.0, 1.0]]), torch.ones(1), 0.9, 0.8)


def test_pairs_that_do_nothing_are_cut_first():
    model = decoder()
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1e-4)  # this feed-forward adds nothing
    small = ModularDecomposition(ratio=0.3, allocation="measured")(model, [TOKENS])
    assert small.report.measured["removed_of_blocks"] == pytest.approx(0.3, abs=0.02)
    left = [layer.mlp.down_proj.in_features for layer in small.model.layers]
    assert left[1] <= 16 < left[0]
    even = ModularDecomposition(ratio=0.3, allocation="uniform")(model, [TOKENS])
    assert small.report.measured["sqnr"] > even.report.measured["sqnr"] + 1
    again = ModularDecomposition(ratio=0.3, allocation="measured")(model, [TOKENS])
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_the_prefix_and_one_kind_can_be_measured_too(monkeypatch):
    monkeypatch.setattr(allocation, "_LEAST", 30)  # a part of one row is left then
    small = ModularDecomposition(ratio=0.2, allocation="measured", sequential=True, modules=("mlp", "vo"))(
        decoder(), [TOKENS]
    )
    assert small.report.measured["removed_of_blocks"] == pytest.approx(0.2, abs=0.02)
    kinds = {r.layer.rpartition(".")[2] for r in small.report.layers}
    assert kinds <= {"mlp", "vo"}


def test_how_much_is_compared_follows_the_calibration():
    rows = torch.zeros(16, 512, dtype=torch.long)
    few = allocation._few([rows[:8], rows[8:]], 72)
    assert sum(x.numel() for x in few) == 228  # 2 passes of 8192 tokens for 72 evaluations, rounded up
    assert sum(x.numel() for x in allocation._few([rows] * 100, 72)) == 2048
    assert allocation._few([rows[:1, :20]], 72)[0].shape == (1, 20)
    assert len(allocation._few([{"input_ids": rows}] * 3, 72)) == 1


def test_what_cannot_be_compared_is_said():
    model = decoder()
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(ConfigurationError, match="NaN"):
        ModularDecomposition(ratio=0.3)(model, [TOKENS])
    with pytest.raises(ConfigurationError, match="no predictions"):
        allocation._logits((torch.zeros(()), torch.zeros(2, 2, dtype=torch.long)))


def test_units_are_chosen_once_and_fewer_are_the_first_of_more():
    model = decoder()
    blocks = find_blocks(model)
    fresh, shared = (gather(model, blocks, [TOKENS], KINDS) for _ in range(2))
    ModularDecomposition(ratio=0.1, allocation="uniform")(model, [TOKENS], statistics=shared)
    known = [s.order for s in shared]
    for ratio in (0.4, 0.1):
        technique = ModularDecomposition(ratio=ratio, allocation="uniform")
        one, two = (technique(model, [TOKENS], statistics=s) for s in (fresh, shared))
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
        fresh = gather(model, blocks, [TOKENS], KINDS)
    assert all(a is s.order for a, s in zip(known, shared, strict=True))
