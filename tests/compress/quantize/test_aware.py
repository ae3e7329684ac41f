from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hasten.compress import Recipe
from hasten.compress.quantize import (
    Int,
    KMeans,
    MiniFloat,
    PerChannel,
    PerGroup,
    PerToken,
    Quantize,
    QuantizeAware,
    Ternary,
)
from hasten.compress.quantize.aware import TrainedLayer
from hasten.compress.quantize.quantizers import largest, learned_step, pact, straight_through
from hasten.errors import ConfigurationError
from hasten.testing import TechniqueKit

pytestmark = pytest.mark.usefixtures("one_thread")


class TestAware(TechniqueKit):
    technique = QuantizeAware(Int(8, PerChannel(0)), Int(8, PerToken(), dynamic=True), epochs=2, real="never")
    keeps = {"sqnr": 25.0}

    def test_same_input_same_result(self, parts: Any) -> None:
        model, example, new = parts
        again = self.technique(model, [example])  # training needs its data
        with torch.inference_mode():
            assert torch.equal(new(example), again(example))


def blobs(count: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight classes at the corners of a cube, in 16 dimensions."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 8, (count,), generator=generator)
    centres = torch.randn(8, 16, generator=generator)
    return centres[y] + 0.5 * torch.randn(count, 16, generator=generator), y


def trained() -> nn.Sequential:
    from hasten.train.fit import fit

    x, y = blobs()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8))
    fit(model, [(x, y)], lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), epochs=100, rate=1e-2)
    return model.eval()


@pytest.mark.parametrize(
    ("weight", "activation", "method"),
    [
        (Int(2, PerChannel(0)), None, "lsq"),
        (Int(2, PerChannel(0)), Int(4, symmetric=False), "lsq"),
        (Int(2, PerChannel(0)), Int(4, symmetric=False), "pact"),
        (Int(2, PerGroup(1, 8), symmetric=False), None, "ste"),
        (Ternary(), None, "lsq"),
        (MiniFloat(2, 0).per_channel(), None, "lsq"),
        (KMeans(1), None, "ste"),
    ],
    ids=lambda v: getattr(v, "label", str(v)),
)
def test_training_recovers_what_rounding_lost(weight: Any, activation: Any, method: str) -> None:
    model, (x, y) = trained(), blobs()
    if method == "pact":
        model[0] = nn.Sequential(nn.ReLU(), model[0])  # inputs of one sign
    before = Quantize(weight, activation, real="never")(model, [x])
    technique = QuantizeAware(
        weight, activation, epochs=60, rate=5e-3, method=method, loss="cross-entropy", real="never"
    )
    after = technique(model, [(x, y)])
    with torch.inference_mode():
        losses = [float(nn.functional.cross_entropy(m(x), y)) for m in (before, after)]
    assert losses[1] < 0.6 * losses[0]
    assert any("batch normalisations were folded" in n for n in after.report.notes)  # type: ignore[union-attr]
    assert Recipe.from_yaml(Recipe((technique,)).to_yaml()).techniques == (technique,)


def test_the_gradients_of_learned_steps_are_those_of_the_paper() -> None:
    fmt = Int(4)
    x = torch.tensor([0.3, -1.7, 100.0, -100.0], requires_grad=True)
    step = torch.tensor([[0.5]], requires_grad=True)
    learned_step(x[None], fmt, step).sum().backward()
    assert step.grad is not None
    r = torch.tensor([0.6, -3.4])
    expected = float((r.round() - r).sum()) + 7 - 7
    assert float(step.grad) == pytest.approx(expected / (4 * 7) ** 0.5, abs=1e-5)
    assert torch.equal(x.grad, torch.tensor([1.0, 1.0, 0.0, 0.0]))  # type: ignore[arg-type]
    assert largest(MiniFloat(2, 1)) == pytest.approx(6, rel=1e-4)


def test_straight_through_and_pact() -> None:
    x = torch.tensor([[0.4, 3.0, -2.0]], requires_grad=True)
    rounded = straight_through(x, Int(2), torch.ones(1, 1))
    assert torch.equal(rounded.detach(), torch.tensor([[0.0, 1.0, -1.0]]))
    rounded.sum().backward()
    assert torch.equal(x.grad, torch.tensor([[1.0, 0.0, 0.0]]))  # type: ignore[arg-type]
    clip = torch.tensor(2.0, requires_grad=True)
    y = torch.tensor([1.1, 5.0, -1.0], requires_grad=True)
    out = pact(y, clip, 2)
    assert torch.allclose(out, torch.tensor([4 / 3, 2.0, 0.0]))
    out.sum().backward()
    assert torch.equal(y.grad, torch.tensor([1.0, 0.0, 0.0]))  # type: ignore[arg-type]
    assert float(clip.grad) == 1.0  # type: ignore[arg-type]


def test_what_is_trained_is_what_is_stored() -> None:
    torch.manual_seed(0)
    for weight, activation in ((Int(4, PerChannel(0)), Int(8)), (Ternary(), None), (MiniFloat(3, 0), None)):
        layer = TrainedLayer(nn.Conv2d(2, 4, 3, padding=1), weight, activation, limits=Int(8).find(torch.randn(9)))
        x = torch.randn(1, 2, 5, 5)
        with torch.no_grad():
            assert torch.allclose(layer(x), layer.finished()(x), atol=1e-5)


def test_bad_requests() -> None:
    for bad in (
        lambda: QuantizeAware(Int(4), method="magic"),
        lambda: QuantizeAware(Int(4), loss="hinge"),
        lambda: QuantizeAware(Int(4), epochs=0),
        lambda: QuantizeAware(Int(4), Int(8), method="pact"),
        lambda: QuantizeAware(Int(4))(nn.Linear(2, 2)),
        lambda: QuantizeAware(Int(4), loss="mse")(nn.Linear(2, 2), [torch.ones(4, 2)]),
    ):
        with pytest.raises(ConfigurationError):
            bad()
