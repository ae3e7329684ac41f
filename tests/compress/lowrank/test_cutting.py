"""Components go where the loss minds least, and ranks fall to a share while training goes on."""

import pytest
import torch
from torch import nn

from hasten.compress.lowrank.cutting import batch_loss, cut_to, recalibrate, share_of, uses_of
from hasten.compress.lowrank.maestro import Maestro
from hasten.compress.lowrank.ordered import OrderedConv2d, OrderedLinear, RankSampler, ordered_layers, prefixes_of
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


def test_prefixes_hold_most_of_the_energy_for_their_price():
    """By trying every pair of prefixes of two layers, one of which is used four times as often."""
    torch.manual_seed(0)
    layers = {"a": OrderedLinear.of(nn.Linear(12, 8)), "b": OrderedLinear.of(nn.Linear(6, 8))}
    uses, share = {"a": 1, "b": 4}, 0.6
    energies = {n: (m.left.square().sum(0) * m.right.square().sum(0)).detach() for n, m in layers.items()}
    full = sum(uses[n] * m.dense_size for n, m in layers.items())

    def held(prefixes):
        spent = sum(uses[n] * prefixes[n] * m.macs_of_rank for n, m in layers.items())
        kept = sum(float(e[: prefixes[n]].sum() / e.sum()) for n, e in energies.items())
        return kept if spent <= share * full else -1.0

    found = prefixes_of(layers, uses, share)
    best = max(held({"a": a, "b": b}) for a in range(1, 9) for b in range(1, 7))
    assert 0 <= held(found) >= best - max(float(e.max() / e.sum()) for e in energies.values())
    layers["a"].rank = 2
    assert prefixes_of(layers, uses, 1.0)["a"] == 2


def test_a_drawn_size_cuts_all_layers_and_is_taken_back():
    torch.manual_seed(0)
    layers = {n: OrderedLinear.of(nn.Linear(16, 16)) for n in "abc"}
    uses, sampler, seen = dict.fromkeys(layers, 1), RankSampler(0), []
    for _ in range(200):
        with sampler.sized(layers, uses, 0.1) as share:
            assert all(m.prefix is not None for m in layers.values())
            spent = sum(m.used * m.macs_of_rank for m in layers.values()) / sum(m.dense_size for m in layers.values())
            assert spent <= share or all(m.used == 1 for m in layers.values())
            seen.append(share)
    assert all(m.prefix is None for m in layers.values())
    assert 0.1 <= min(seen) < 0.12
    assert 0.9 < max(seen) <= 1
    assert sum(s < 0.1**0.5 for s in seen) == pytest.approx(100, abs=25)  # even in the logarithm


def test_small_sizes_that_were_trained_are_better():
    """Against a family whose passes cut a single layer at a time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    losses = []
    for least in (None, 0.1):
        small = Maestro(epochs=30, rate=5e-3, shrink=0.0, down_to=least)(model, batches())
        losses.append([member.loss for member in small.fit.family((0.5, 0.3), batches())])
    assert all(one < 0.95 * other for one, other in zip(losses[1], losses[0], strict=True))
    for bad in (0, 1):
        with pytest.raises(ConfigurationError, match=f"down_to is {bad}"):
            Maestro(down_to=bad)
    with pytest.raises(ConfigurationError, match="ordered=True"):
        Maestro(down_to=0.1, ordered=False)
