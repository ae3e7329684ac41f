from __future__ import annotations

import pytest
import torch

from hasten.compress.quantize import (
    Entropy,
    Int,
    LsqInit,
    MinMax,
    MovingAverage,
    Mse,
    Observer,
    Percentile,
    PerChannel,
    PerGroup,
    Watch,
)
from hasten.compress.technique import sqnr
from hasten.errors import ConfigurationError, DataError


def heavy(n: int = 100_000) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.distributions.StudentT(4.0).sample((n,))


def test_extremes_hold_zero() -> None:
    scale, zero = Int(8, symmetric=False).find(torch.tensor([2.0, 5.0]))
    assert zero is not None
    assert float(scale * (Int(8).lowest - 1 - zero)) == 0.0


@pytest.mark.parametrize("observer", [Mse(), Percentile(99.9), Entropy(), LsqInit()])
def test_clipping_beats_the_extremes_on_heavy_tails(observer: Observer) -> None:
    x = heavy()
    plain, clipped = Int(4).fake(x), Int(4, observer=observer).fake(x)
    assert sqnr(x, clipped) > sqnr(x, plain) + 5


def test_mse_is_the_best_of_its_own_grid() -> None:
    x = heavy(20_000)
    low, high = Watch(Mse(), Int(4)), x.abs().max()
    low.update(x)
    best = min(
        ((Int(4).fake(x, *Int(4).parameters(-high * f, high * f)) - x).square().sum(), f)
        for f in torch.arange(1, 81) / 80
    )
    scale, _ = Int(4, observer=Mse()).find(x)
    assert float((Int(4).fake(x, scale) - x).square().sum()) == pytest.approx(float(best[0]), rel=1e-5)


@pytest.mark.parametrize("observer", [MinMax(), Mse(), Percentile(99.0), Entropy(), LsqInit()])
@pytest.mark.parametrize("granularity", [None, PerChannel(1)])
def test_streaming_agrees_with_all_at_once(observer: Observer, granularity: PerChannel | None) -> None:
    torch.manual_seed(1)
    x = torch.randn(4096, 3) * torch.tensor([0.01, 1.0, 30.0])
    fmt = Int(8, granularity, observer=observer) if granularity is not None else Int(8, observer=observer)
    watch = fmt.watch()
    for piece in x.split(512):
        watch.update(piece)
    at_once, _ = fmt.find(x)
    streamed, _ = watch.parameters()
    flat = isinstance(observer, Entropy)  # its minimum is wide
    assert torch.allclose(streamed, at_once, rtol=0.2 if flat else 0.05)


def test_memory_does_not_grow_and_counts_stay_exact() -> None:
    watch = Watch(Percentile(99.0), Int(8))
    for factor in (1e-3, 1.0, 1e4, 2.0):
        watch.update(torch.full((100,), factor))
    points = watch.points()
    assert points.weights is not None
    assert points.values.shape == (1, 4096)
    assert float(points.weights.sum()) == 400
    assert float(points.high) == 1e4


def test_moving_average_follows_batches() -> None:
    watch = Watch(MovingAverage(0.1), Int(8))
    watch.update(torch.tensor([1.0]))
    watch.update(torch.tensor([2.0]))
    assert float(watch.range()[1]) == pytest.approx(1.1)


def test_a_short_group_counts_only_its_own_elements() -> None:
    x = torch.cat([torch.ones(1, 4), torch.full((1, 1), 8.0)], 1)
    low, high = Int(4, PerGroup(1, 4), observer=Percentile(60.0)).find(x)[0][0]
    assert high == pytest.approx(8 / 7, rel=5e-3)
    assert low == pytest.approx(1 / 7, rel=5e-3)


def test_lsq_start() -> None:
    x = torch.tensor([1.0, -3.0])
    assert float(Int(4, observer=LsqInit()).find(x)[0]) == pytest.approx(2 * 2 / 7**0.5, rel=1e-4)


def test_bad_data_and_knobs() -> None:
    watch = Watch(MinMax(), Int(8))
    with pytest.raises(DataError, match="nothing was observed"):
        watch.range()
    with pytest.raises(DataError, match="NaN"):
        watch.update(torch.tensor([float("nan")]))
    per_row = Watch(MinMax(), Int(8, PerChannel(0)))
    per_row.update(torch.ones(2, 3))
    with pytest.raises(DataError, match="has 4 scales"):
        per_row.update(torch.ones(4, 3))
    for bad in (lambda: Percentile(0), lambda: Mse(1), lambda: MovingAverage(0), lambda: Entropy(8)):
        with pytest.raises(ConfigurationError):
            bad()
