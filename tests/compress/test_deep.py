"""The whole chain: what each stage did survives the next, and sizes are those of written bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.compress.container import load_weights, save
from hasten.compress.deep import DeepCompression, _round_shared
from hasten.compress.prune import sparsity_of
from hasten.errors import ConfigurationError
from hasten.frozen import load
from hasten.testing.technique_kit import TechniqueKit


class TestKit(TechniqueKit):
    technique = DeepCompression(clusters=64, sparsity=0.1, epochs=0)
    keeps = {"sqnr": 10.0}


def problem() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 2))
    x = torch.randn(256, 16)
    from hasten.train.fit import fit

    batches = [(x, (x[:, 0] * x[:, 1] > 0).long())]
    fit(model, batches, loss, epochs=80, rate=1e-2)
    return model.eval(), batches


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_everything_survives_to_the_file_and_back(tmp_path: Path) -> None:
    model, batches = problem()
    shot = DeepCompression(epochs=0, sparsity=0.6)(model)
    tiny = DeepCompression(epochs=40, sparsity=0.6, rate=5e-3)(model, batches, loss=loss)
    with torch.no_grad():
        assert float(loss(tiny, batches[0])) < float(loss(shot, batches[0]))
    for k in (0, 2, 4):
        assert len(tiny[k].weight.unique()) <= 16
        assert sparsity_of(tiny[k].weight) == pytest.approx(0.6, abs=0.02)
    sizes = tiny.report.measured
    names = ("torch.save", "raw", "pruned", "clustered", "rounded", "encoded")
    order = [sizes[f"bytes {n}"] for n in names]
    assert order == sorted(order, reverse=True)
    assert order[0] > 9 * order[-1]
    written = save(tiny, tmp_path / "tiny", batches[0][0])
    assert written["file"] == (tmp_path / "tiny" / "model.hasten").stat().st_size
    again = load_weights(problem()[0], tmp_path / "tiny")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in tiny.state_dict().items())
    run = load(tmp_path / "tiny")
    x = batches[0][0][:5]
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(run(x.numpy())), tiny(x), atol=1e-6)
    assert all(len(again[k].weight.unique()) <= 16 for k in (0, 2, 4))


def test_losing_the_zeros_is_what_the_knob_says() -> None:
    model, batches = problem()
    lost = DeepCompression(epochs=5, preserve_sparsity=False)(model, batches, loss=loss)
    assert sparsity_of(lost[2].weight) < 0.01
    rows = DeepCompression(epochs=0, clusters=0, sparsity=0.0)(model)
    assert set(rows.quantized) == {"0.weight", "2.weight", "4.weight"}
    assert len(rows[2].weight.unique()) > 256


def test_rounding_keeps_zero_and_sign() -> None:
    weight = torch.tensor([1.0, 1e-4, -1e-4, 0.0, -0.5])
    found = _round_shared(weight, 8)
    assert torch.equal(found == 0, weight == 0)
    assert torch.equal(found.sign(), weight.sign())
    assert float((found[[0, 4]] - weight[[0, 4]]).abs().max()) < 0.01


def test_bad_knobs_are_named() -> None:
    model, batches = problem()
    for wrong in (
        {"clusters": 1},
        {"sparsity": 1.0},
        {"bits": 3},
        {"epochs": -1},
        {"encode": "zip"},
        {"vector_bits": 4},
    ):
        with pytest.raises(ConfigurationError):
            DeepCompression(**wrong)
    with pytest.raises(ConfigurationError, match="needs data"):
        DeepCompression()(model, [], loss=loss)


@pytest.mark.parametrize("acts", [False, True])
def test_dropout_acts_where_asked_and_comes_back(acts: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 8)).eval()
    seen = []

    def loss(student: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        hidden = student[:3](batch)  # type: ignore[index]
        seen.append(float((hidden == 0).float().mean()))
        return student[3](hidden).square().mean()  # type: ignore[index, no-any-return]

    tiny = DeepCompression(epochs=2, dropout=acts)(model, [torch.randn(64, 32)], loss=loss)
    assert (min(seen) > 0.65) is acts  # half are below zero anyway
    assert (max(seen) < 0.65) is not acts
    assert tiny[2].p == model[2].p == 0.5
    assert not tiny[2].training
