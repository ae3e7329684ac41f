"""Blocks of weights by name, groups by head, and portions of the data."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hasten.compress.quantize.integer import Int
from hasten.compress.quantize.portions import portions, rows_of
from hasten.compress.quantize.selection import RowGroups, head_groups, heads_of, weight_blocks
from hasten.errors import ConfigurationError, DataError


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 12)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(nn.TransformerEncoderLayer(12, 3, 24) for _ in range(2))
        self.out = nn.Linear(12, 10, bias=False)
        self.out.weight = self.embed.weight


def test_blocks_by_the_last_parts_of_their_path() -> None:
    outer = nn.Module()
    outer.bert = Encoder()
    found = weight_blocks(outer, "encoder.layer.*")
    assert list(found) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    assert "bert.encoder.layer.0.self_attn.in_proj_weight" in found["bert.encoder.layer.0"]
    assert all(p.dim() >= 2 for block in found.values() for p in block.values())
    every = weight_blocks(outer)
    assert sum("embed.weight" in n or "out.weight" in n for b in every.values() for n in b) == 1, "tied counts once"
    outer.bert.encoder.layer[0].requires_grad_(False)
    assert list(weight_blocks(outer, "encoder.layer.*")) == ["bert.encoder.layer.1"]
    with pytest.raises(ConfigurationError, match="no parameter of the model matches blocks"):
        weight_blocks(outer, "blocks.*")


def test_runs_of_outputs_share_a_scale_and_stay_within_a_head() -> None:
    x = torch.randn(12, 5)
    groups = RowGroups(3, heads=3)
    assert groups.compact((12, 5)) == (6, 1)
    rows = groups.rows(x)
    assert torch.equal(rows[0].view(3, 5), x[0:3])
    assert torch.equal(rows[1].view(3, 5), torch.cat([x[3:4], torch.zeros(2, 5)]))
    scale = torch.arange(6.0).view(6, 1)
    assert groups.spread(scale, (12, 5))[:, 0].tolist() == [0, 0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5]
    fake = Int(8, groups).fake(x)
    for a, b in ((0, 3), (3, 4), (4, 7), (7, 8), (8, 11), (11, 12)):
        assert torch.allclose(fake[a:b], Int(8).fake(x[a:b]), atol=1e-6)
    per_channel = Int(2, RowGroups(1, 3))
    assert per_channel.granularity.compact((12, 5)) == (12, 1)
    assert RowGroups(3, heads=5).compact((12, 5)) == (4, 1), "heads that do not divide are ignored"


def test_heads_are_found_or_told() -> None:
    model = Encoder()
    assert heads_of(model) == 3
    groups = head_groups(model, groups=6)
    assert groups["encoder.layer.0.linear1"] == RowGroups(2, 3)
    plain = nn.Sequential(nn.Linear(8, 8))
    assert heads_of(plain) is None
    with pytest.raises(ConfigurationError, match="how many heads"):
        head_groups(plain, 8)
    assert head_groups(plain, 8, heads=2) == {"0": RowGroups(1, 2)}
    with pytest.raises(ConfigurationError, match="cannot hold 3 heads"):
        head_groups(model, groups=2)


def test_portions_are_disjoint() -> None:
    batches = [(torch.arange(k, k + 10), {"y": torch.arange(k, k + 10).view(10, 1)}) for k in (0, 10, 20)]
    parts = portions(batches, 3, 0.3, seed=0)
    seen = [int(v) for part in parts for x, _ in part for v in x]
    assert len(seen) == len(set(seen)) == 27
    assert all(len(part) == 1 for part in parts), "pieces are joined"
    assert all(torch.equal(x, y["y"][:, 0]) for part in parts for x, y in part)
    assert rows_of((torch.zeros(3, 2), torch.zeros(4))) == 0
    whole = portions([(torch.zeros(3), torch.zeros(4))] * 4, 2, 0.5, seed=0)
    assert [len(p) for p in whole] == [2, 2]
    with pytest.raises(DataError, match="cannot be cut into 4"):
        portions([torch.zeros(3)], 4, 0.25, 0)
    with pytest.raises(DataError, match="no batch"):
        portions([], 1, 1.0, 0)
