"""Components go where the loss minds least, and ranks fall to a share while training goes on."""

import pytest
import torch
from torch import nn

from hasten.compress.lowrank.cutting import batch_loss, cut_to, recalibrate, share_of, uses_of
from hasten.compress.lowrank.maestro import Maestro
from hasten.compress.lowrank.ordered import OrderedConv2d, OrderedLinear, ordered_layers
from hasten.errors import ConfigurationError

torch.set_num_threads(1)


def batches(count=4):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 4, generator=g)
    xs = [torch.randn(64, 16, generator=g) for _ in range(count)]
    return [(x, (x @ weight).argmax(1)) for x in xs]


def test_the_layer_goes_that_the_loss_does_not_hear():
    torch.manual_seed(0)
    one, other = OrderedLinear.of(nn.Linear(32, 32)), OrderedLinear.of(nn.Linear(32, 32))
    layers = {"heard": one, "deaf": other}
    uses = {"heard": 1, "deaf": 1}
    told = []
    spent = cut_to(layers, 0.6, uses, lambda: float(32 - one.rank), tell=told.append)
    assert one.rank == 32
    assert spent == share_of(layers, uses) <= 0.6
    assert told[-1] == spent
    assert cut_to(layers, 0.001, uses, lambda: 0.0) > 0.001  # rank 1 is the least
    assert one.rank == other.rank == 1


def test_uses_and_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(OrderedConv2d.of(nn.Conv2d(3, 8, 3, bias=False)), nn.BatchNorm2d(8), nn.Flatten(),
                          OrderedLinear.of(nn.Linear(128, 4)))  # fmt: skip
    x = torch.randn(32, 3, 6, 6) + 2
    assert uses_of(model, x) == {"0": 16, "3": 1}
    stale = batch_loss(model, nn.functional.cross_entropy, [(x, torch.zeros(32, dtype=torch.long))])
    assert torch.equal(model[1].running_mean, torch.zeros(8))  # left as they were
    recalibrate(model, [x])
    assert float(model[1].running_mean.abs().max()) > 0
    again = batch_loss(model, nn.functional.cross_entropy, [(x, torch.zeros(32, dtype=torch.long))])
    assert again == pytest.approx(stale)


def test_ranks_fall_to_a_share_and_train_on():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    small = Maestro(epochs=9, rate=5e-3, share=0.3, settle=0.34, shrink=0.0)(model, batches())
    fit = small.fit
    layers = ordered_layers(fit.whole)
    assert share_of(layers, uses_of(fit.whole, batches()[0][0])) <= 0.3
    sizes = [sum(h.values()) for h in fit.history]
    assert sizes[0] > sizes[1] > sizes[2]
    assert len(set(sizes[2:])) == 1  # settled after a third
    assert fit.losses[-1] < fit.losses[3]
    assert "30.0% were asked for" in " ".join(small.report.notes)
    with pytest.raises(ConfigurationError, match="share 2"):
        Maestro(share=2)
    with pytest.raises(ConfigurationError, match="settle 1"):
        Maestro(share=0.5, settle=1)
