"""Spectra per block, and scores with pairs that are exact on a quadratic loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.compress.quantize.augmented import AugmentedHessian
from hasten.compress.quantize.granularity import PerTensor
from hasten.compress.quantize.integer import Int
from hasten.compress.quantize.sensitivity import HessianSpectrum
from hasten.compress.quantize.simulate import Simulated, units_of
from hasten.errors import ConfigurationError


def classifier() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    x = torch.randn(60, 6)
    return model, [(x[:40], x[:40, :3].argmax(1)), (x[40:], x[40:, :3].argmax(1))]


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_spectrum_of_a_quadratic_is_its_eigenvalues(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Identity())
    data = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])).repeat(6, 1)

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return m(x).square().sum() / len(x)

    whole = HessianSpectrum(portions=1, fraction=1.0)(model, loss, [data])
    (row,) = whole.layers
    assert row.mean == pytest.approx(8.0, rel=1e-3)  # 2 · 16 / 4
    assert row.bottom == pytest.approx(0.5, rel=1e-2)
    assert row.std == 0.0
    assert row.converged
    assert whole.notes == ()
    power = HessianSpectrum(portions=1, fraction=1.0, both_ends=False)(model, loss, [data])
    assert power["0"].mean == pytest.approx(8.0, rel=1e-2)
    parts = HessianSpectrum(portions=4, fraction=0.25)(model, loss, [data])
    assert parts["0"].omega == pytest.approx(abs(parts["0"].mean) + parts["0"].std)
    assert parts["0"].std > 0
    parts.plot(tmp_path / "spectrum.html")
    assert "<svg" in (tmp_path / "spectrum.html").read_text()
    assert "omega" in str(parts)


def test_a_saddle_is_called_not_converged() -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False))

    def saddle(m: nn.Module, x: Tensor) -> Tensor:
        w = m[0].weight[0]
        return x.mean() * (w[0] ** 2 - w[1] ** 2)

    found = HessianSpectrum(portions=1, fraction=1.0)(model, saddle, [torch.ones(4)])
    assert found["0"].bottom == pytest.approx(-2.0, rel=1e-3)
    assert not found.converged
    assert "not converged in 0" in found.notes[0]
    with pytest.raises(ConfigurationError, match="no sensitivity of 'x'"):
        found["x"]


def test_knobs_that_contradict_each_other() -> None:
    with pytest.raises(ConfigurationError, match="disjoint portions"):
        HessianSpectrum(portions=10, fraction=0.5)
    with pytest.raises(ConfigurationError, match="iterations"):
        HessianSpectrum(iterations=1)
    for wrong in ({"pairs": "some"}, {"own": "guess"}, {"probes": 1}, {"probes": 0, "own": "trace"}, {"bits": (4, 8)}):
        with pytest.raises(ConfigurationError):
            AugmentedHessian(**wrong)  # type: ignore[arg-type]


class Quadratic(nn.Module):
    """``½ (w − w₀)ᵀ H (w − w₀)`` over blocks that are weights of linear layers, float64."""

    def __init__(self, blocks: int, width: int, seed: int, diagonal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.parts = nn.ModuleList(nn.Linear(width, 1, bias=False).double() for _ in range(blocks))
        size = blocks * width
        root = torch.randn(size, size, dtype=torch.double) / size**0.5
        h = root @ root.T
        if diagonal:
            mask = torch.block_diag(*(torch.ones(width, width, dtype=torch.double) for _ in range(blocks)))
            h = h * mask
        self.register_buffer("h", h)
        self.register_buffer("start", self.vector().detach().clone())

    def vector(self) -> Tensor:
        return torch.cat([p.weight.reshape(-1) for p in self.parts])

    def forward(self, x: Tensor) -> Tensor:
        d = self.vector() - self.start
        return 0.5 * d @ self.h @ d


def quadratic_loss(model: nn.Module, batch: Tensor) -> Tensor:
    value: Tensor = model(batch)
    return value


@pytest.mark.parametrize("own", ["measured", "quadratic"])
def test_pairs_and_sum_are_exact_on_a_quadratic(own: Any) -> None:
    model = Quadratic(6, 5, seed=1)
    method = AugmentedHessian(
        pairs="all", bits=(8, 3), own=own, weight=Int(8, PerTensor()), activation=None, epsilon=0.0, probes=4
    )
    found = method(model, quadratic_loss, [torch.zeros(1)])
    assert [len(u) for u in found.units] == [1] * 6
    for b in (8, 3):
        change = [found.simulated.change(u[0], b).reshape(-1) for u in found.units]  # type: ignore[union-attr]
        for (i, j), value in found.pairs[b].items():
            exact = float(change[i] @ model.h[5 * i : 5 * i + 5, 5 * j : 5 * j + 5] @ change[j])
            assert value == pytest.approx(exact, rel=1e-6, abs=1e-15)
        whole = torch.cat(change)
        truth = float(0.5 * whole @ model.h @ whole)
        assert sum(found.scores[b]) == pytest.approx(truth, rel=1e-6)
        assert found.predict([b] * 6) == pytest.approx(truth, rel=1e-6)
        assert sum(found.own[b]) != pytest.approx(truth, rel=1e-3), "own terms alone miss it"
    assert found.evaluations == 1 + 2 * (6 + 15)


def test_without_cross_terms_own_terms_are_enough() -> None:
    model = Quadratic(4, 5, seed=2, diagonal=True)
    method = AugmentedHessian(pairs="none", bits=(4,), own="quadratic", activation=None)
    found = method(model, quadratic_loss, [torch.zeros(1)])
    change = torch.cat([found.simulated.change(u[0], 4).reshape(-1) for u in found.units])  # type: ignore[union-attr]
    assert sum(found.own[4]) == pytest.approx(float(0.5 * change @ model.h @ change), rel=1e-9)
    assert found.evaluations == 1


def test_traces_carry_their_error_and_orders_are_permutations() -> None:
    model, batches = classifier()
    model[0].weight.requires_grad_(False)
    found = AugmentedHessian(probes=16, bits=(8, 2))(model, cross_entropy, batches)
    assert not model[0].weight.requires_grad
    assert all(t.standard_error > 0 for t in found.traces.values())
    assert found.own == found.single
    traced = AugmentedHessian(probes=16, bits=(8, 2), own="trace")(model, cross_entropy, batches)
    assert traced.own == traced.hessian == found.hessian
    assert found.predict([2, 0], augmented=False, base="hessian") == pytest.approx(found.hessian[2][0])
    with pytest.raises(ConfigurationError, match="probes above 0"):
        AugmentedHessian(probes=0, bits=(2,))(model, cross_entropy, batches).order(2, "hessian")
    for kind in ("augmented", "hessian", "reversed", "random"):
        assert sorted(found.order(2, kind)) == [0, 1]
    assert found.order(2, "reversed") == found.order(2)[::-1]
    with pytest.raises(ConfigurationError, match="no order"):
        found.order(2, "best")
    again = AugmentedHessian(probes=16, bits=(8, 2))(model, cross_entropy, batches)
    assert again.scores == found.scores
    assert set(found.layer_scores(8)) == {"0", "2"}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({n: nn.Linear(8, 8) for n in ("q", "k", "v", "o")}) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for b in self.blocks:
            x = x + b["o"](torch.tanh(b["q"](x) + b["k"](x)) * b["v"](x))
        return x


def test_units_and_partners() -> None:
    model = Attention()
    run = lambda m, x: m(x).square().mean()  # noqa: E731
    units = units_of(model, run, torch.randn(2, 8))
    assert units[0] == ("blocks.0.q", "blocks.0.k", "blocks.0.v")
    assert units[1] == ("blocks.0.o",)
    assert len(units) == 8
    joined = units_of(model, run, torch.randn(2, 8), together=[("blocks.0.o", "blocks.1.o")])
    assert ("blocks.0.o", "blocks.1.o") in joined
    with pytest.raises(ConfigurationError, match="nothing"):
        units_of(model, run, torch.randn(2, 8), together=[("nothing", "blocks.0.o")])
    near = AugmentedHessian()._partners(units)
    assert (0, 1) in near
    assert (0, 3) in near
    assert (0, 4) not in near
    drawn = AugmentedHessian(pairs="sampled", sampled=2)._partners(units)
    assert all(sum(i in p for p in drawn) >= 2 for i in range(8))


def test_the_simulation_switches_and_leaves_the_model_alone() -> None:
    model, batches = classifier()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sim = Simulated(model, cross_entropy, batches, bits=(8, 2), weight=Int(8), activation=Int(8))
    x = batches[0][0]
    with torch.no_grad():
        plain = model(x)
        assert torch.equal(sim.use({})(x), plain)
        two = sim.use({"0": 2})(x)
        assert (two - plain).abs().max() > (sim.use({"0": 8})(x) - plain).abs().max() > 0
        assert torch.equal(sim.use({"0": 2})(x), two)
        assert torch.equal(sim.use({})(x), plain)
        assert torch.equal(sim.layers["0"].weight, model[0].weight)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ConfigurationError, match="not a layer"):
        sim.use({"9": 8})
    with pytest.raises(ConfigurationError, match="no calibration batch"):
        Simulated(model, cross_entropy, [], bits=(8,), weight=Int(8), activation=None)
    with pytest.raises(ConfigurationError, match="skip"):
        Simulated(model, cross_entropy, batches, bits=(8,), weight=Int(8), activation=None, skip=("*",))
