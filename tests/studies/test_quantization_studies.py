"""The parts of the quantisation studies; the studies themselves take longer and run from ``hasten study``."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from hasten.compress.quantize import Int, MiniFloat, PerChannel, PerGroup, PerTensor, Quantize
from hasten.studies import Scale, load, minifloats, quantization_survey
from hasten.studies import _quantization as part
from hasten.studies._vision_models import ResidualNet, VisionTransformer, accuracy, digits_cnn, digits_mlp

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["quantization-survey", "minifloats"])
def test_studies_are_found_and_claim_something(name: str) -> None:
    study = load(name)
    assert len(study.claim.split()) > 8
    assert study.published


def test_the_identities_hold() -> None:
    checks = list(quantization_survey.identities(Scale(quick=True)))
    assert all(c.holds for c in checks), [c for c in checks if not c.holds]
    assert quantization_survey._integer_error(3, False) <= 1e-5


def test_bytes_and_observers() -> None:
    assert all(c.holds for c in quantization_survey.bytes_on_disk())


def test_noise_falls_with_finer_scales() -> None:
    net = digits_mlp()
    noise = [quantization_survey._noise(net, g) for g in (PerTensor(), PerChannel(0), PerGroup(1, 16))]
    assert noise == sorted(noise)


def test_the_grid_check_can_fail() -> None:
    assert minifloats._grid_errors(MiniFloat(2, 1), 0) == 0

    class Wrong(MiniFloat):
        def round_to(self, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None) -> torch.Tensor:
            return super().round_to(x, scale).where(x.abs() > 0.5, 0.0)  # no subnormals

    assert minifloats._grid_errors(Wrong(2, 1), 0) > 100


def test_rewriting_keeps_the_function() -> None:
    assert all(c.holds for c in minifloats.invariance(Scale(quick=True)))


def test_draws_have_their_laws() -> None:
    drawn = part.distributions(50_000, 0)
    assert float(drawn["uniform"].abs().max()) <= 1
    kurtosis = {k: float((v - v.mean()).pow(4).mean() / v.var() ** 2) for k, v in drawn.items()}
    assert (
        kurtosis["uniform"]
        < 2
        < kurtosis["Gaussian"]
        < 4
        < kurtosis["Laplace"]
        < 7.5
        < kurtosis["Student t, 4 degrees"]
    )


def test_networks_take_their_images() -> None:
    x = torch.randn(2, 1, 14, 14)
    for model in (ResidualNet(), VisionTransformer(14, 2, 16, 1, 2), digits_cnn()):
        assert model(x).shape == (2, 10)
    assert digits_mlp()(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    labels = torch.tensor([1, 0])
    assert accuracy(nn.Sequential(nn.Flatten(), nn.Linear(2, 2)), torch.eye(2)[:, None], labels) in (0.0, 0.5, 1.0)


def test_data_that_are_not_there_are_none() -> None:
    assert part.fashion(Scale()) is None
    (check,) = quantization_survey._fashion(Scale())
    assert check.holds is None


def halves_of(*seen: tuple[float, float]) -> minifloats.Halves:
    halves = minifloats.Halves((torch.zeros(1),) * 4)
    halves.seen += [(1.0, 1.0), *seen]
    return halves


def front_of(*formats: Int | MiniFloat) -> SimpleNamespace:
    return SimpleNamespace(candidates=[SimpleNamespace(weight=w, integer=isinstance(w, Int)) for w in formats])


def test_a_format_is_chosen_on_one_half_and_judged_on_the_other() -> None:
    front = front_of(Int(4), MiniFloat(2, 1), MiniFloat(3, 0), Int(8))
    halves = halves_of((0.9, 0.8), (0.7, 0.95), (0.8, 0.6), (1.0, 1.0))
    assert halves.best(front, 4, True) == pytest.approx(0.85)
    assert halves.best(front, 4, False) == pytest.approx((0.6 + 0.7) / 2)  # 0.95 and 0.8 were what chose them
    assert minifloats._gap(front, halves) == pytest.approx(-20)


def test_halves_add_up_to_all_images() -> None:
    x = torch.eye(3)[:, None]
    halves = minifloats.Halves((x, torch.arange(3), x, torch.tensor([0, 1, 0])))
    assert halves(nn.Flatten()) == pytest.approx(2 / 3)
    assert halves.seen == [(0.5, 1.0)]


def test_digits_are_judged_by_several_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    front = front_of(Int(4), MiniFloat(2, 1), Int(8), MiniFloat(4, 3))
    answers = iter([0.92, 0.91])

    def formats(model: object, given: object, halves: minifloats.Halves, **named: object) -> SimpleNamespace:
        small = next(answers)
        halves.seen += [(0.9, 0.9), (small, small), (1.0, 1.0), (0.98, 0.98)]
        return front

    monkeypatch.setattr(minifloats, "_NETWORKS", 3)
    monkeypatch.setattr(minifloats, "digits", lambda seed: (torch.zeros(2, 1), torch.zeros(2)) * 2)
    monkeypatch.setattr(minifloats.part, "network", lambda *given: nn.Identity())
    monkeypatch.setattr(minifloats, "formats", formats)
    first = halves_of((0.90, 0.90), (0.84, 0.84), (1.0, 1.0), (1.0, 1.0))
    four, eight = minifloats._several(Scale(quick=False), "digits", 1, front, first)
    assert four.value == pytest.approx(-1)
    assert four.holds is False
    assert "-6.0000, +2.0000, +1.0000" in four.note
    assert eight.value == pytest.approx((0 + 2 + 2) / 3)
    assert "by seed +0.0000, +2.0000" in eight.note


def test_output_errors_are_those_of_each_layer_alone() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    small = Quantize(Int(3, PerChannel(0)), real="never")(net)
    x = torch.randn(7, 6)
    found = minifloats._output_errors(net, small, x)
    assert set(found) == {"0", "2"}
    inside = net[1](net[0](x))
    wanted = (inside @ (Int(3, PerChannel(0)).fake(net[2].weight) - net[2].weight).T).square().sum().detach()
    assert found["2"] == pytest.approx(float(wanted), rel=1e-4)


def test_differences_of_seeds_carry_their_error() -> None:
    assert part.by_seed([0.1]) == "by seed +0.1000"
    assert part.by_seed(np.array([0.1, -0.1])) == "by seed +0.1000, -0.1000 (standard error 0.1000)"


def test_calibration_that_is_made_up_is_judged_beside_images_and_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x = 3 + torch.rand(100, 1, 8, 8, generator=generator)
    model = digits_cnn()
    for _ in range(30):
        model(x)  # the normalisations learn the range of x
    data = (x, torch.zeros(100).long(), x, model.eval()(x).argmax(1))
    monkeypatch.setattr(quantization_survey.part, "network", lambda *given: model)
    images, noise = quantization_survey.without_data(Scale(quick=True), data, 1, 2)
    assert (images.threshold, noise.threshold) == ("≥ -0.5", "≥ 0")
    assert noise.value > 1  # dB: noise about zero clips inputs about 3.5
    assert "by seed" in images.note
