from __future__ import annotations

import pytest
import torch

from hasten.compress.quantize import MXFP4, NF4, Format, Int, KMeans, MiniFloat, PerChannel, PerGroup, gptq, hessian_of
from hasten.compress.quantize.gptq import upper_factor
from hasten.errors import ConfigurationError, DataError


def correlated(rows: int = 512, inner: int = 48) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, inner // 4) @ torch.randn(inner // 4, inner) + 0.1 * torch.randn(rows, inner)


def slow(weight: torch.Tensor, hessian: torch.Tensor, fmt: Int, damp: float) -> torch.Tensor:
    """Column by column with an explicit inverse, as in optimal brain surgery; no order, no blocks."""
    w = weight.double().clone()
    inner = w.shape[1]
    scale, zero = fmt.find(weight)
    s = fmt.spread(scale, tuple(weight.shape)).expand(weight.shape)
    h = hessian.double() + damp * hessian.double().diagonal().mean() * torch.eye(inner)
    for column in range(inner):
        inverse = torch.linalg.inv(h[column:, column:])
        rounded = fmt.round_to(w[:, column].float(), s[:, column]).double()
        error = (w[:, column] - rounded) / inverse[0, 0]
        w[:, column + 1 :] -= error[:, None] * inverse[0, 1:]
        w[:, column] = rounded
    return w.float()


def test_blocks_and_factor_are_the_slow_method() -> None:
    x = correlated()
    weight, hessian = torch.randn(8, 48), hessian_of(x)
    fmt = Int(4, PerChannel(0))
    fast = gptq(weight, hessian, fmt, damp=0.01, block=7, order=False)
    expected = slow(weight, hessian, fmt, 0.01)
    assert float((fast != expected).float().mean()) < 0.02  # a tie may fall the other way in float32
    assert torch.equal(fast, gptq(weight, hessian, fmt, damp=0.01, block=128, order=False))


@pytest.mark.parametrize(
    "fmt",
    [
        Int(3, PerChannel(0)),
        Int(4, PerGroup(1, 20), symmetric=False),
        MiniFloat(2, 1).per_channel(),
        NF4,
        MXFP4,
        KMeans(3),
    ],
    ids=lambda f: f.label,
)
@pytest.mark.parametrize("order", [True, False])
def test_the_output_is_nearer_than_with_rounding_to_nearest(fmt: Format, order: bool) -> None:
    x = correlated()
    weight, hessian = torch.randn(16, 48), hessian_of(x)
    scale, zero = fmt.find(weight, hessian.diagonal().expand_as(weight))
    values = gptq(weight, hessian, fmt, order=order, scale=scale, zero=zero)
    nearest = fmt.fake(weight, scale, zero)
    assert torch.equal(fmt.fake(values, scale, zero), values), "values lie on the grid"
    lost = [float((x @ (v - weight).t()).square().sum()) for v in (values, nearest)]
    assert lost[0] < 0.7 * lost[1]


def test_streamed_hessian_is_the_sum() -> None:
    x = correlated()
    assert torch.allclose(hessian_of(list(x.split(100))), 2 * x.t() @ x, rtol=1e-4, atol=1e-2)


def test_groups_are_independent_weights() -> None:
    x = [correlated(), correlated().roll(1, 1)]
    hessians = torch.stack([hessian_of(v) for v in x])
    weight = torch.randn(6, 48)
    fmt = Int(4, PerChannel(0))
    both = gptq(weight, hessians, fmt)
    alone = torch.cat([gptq(w, h, fmt) for w, h in zip(weight.split(3), hessians, strict=True)])
    assert torch.allclose(both, alone)


def test_inputs_that_never_came_lose_their_weights() -> None:
    x = correlated()
    x[:, 5] = 0
    values = gptq(torch.randn(4, 48), hessian_of(x), Int(4, PerChannel(0)))
    assert not bool(values[:, 5].any())


def test_bad_hessians() -> None:
    with pytest.raises(ConfigurationError, match="does not belong"):
        gptq(torch.randn(4, 48), torch.eye(47), Int(4))
    with pytest.raises(DataError, match="no input"):
        hessian_of([])
    with pytest.raises(DataError, match="cannot be factorised"):
        upper_factor(torch.full((3, 3), float("nan")), 0.01)
    singular = torch.ones(4, 4)  # damping is raised until it factorises
    assert bool(torch.isfinite(upper_factor(singular, 0.0)).all())
