"""Hessian-vector products against dense Hessians, and the estimates made of them against dense algebra."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.compress.quantize.hessian import Hessian, Trace, block_traces, lanczos, power_iteration, trace
from hasten.compress.quantize.sensitivity import require_exact
from hasten.errors import ConfigurationError


def small() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Dropout(0.5), nn.Linear(10, 4)).double()
    g = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(n, 6, generator=g, dtype=torch.double), torch.randint(0, 4, (n,), generator=g)) for n in (20, 7)
    ]
    return model, batches


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def dense(model: nn.Module, batches: list[Any], names: list[str]) -> Tensor:
    """The Hessian itself, over the samples of all batches, row by row."""
    model.eval()
    x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    parameters = {n: p for n, p in model.named_parameters() if n in names}
    flat = torch.cat([p.reshape(-1) for p in parameters.values()]).detach()

    def at(vector: Tensor) -> Tensor:
        pieces = vector.split([p.numel() for p in parameters.values()])
        values = {n: v.view_as(p) for (n, p), v in zip(parameters.items(), pieces, strict=True)}
        logits = torch.func.functional_call(model, values, (x,))
        return nn.functional.cross_entropy(logits, y)

    found: Tensor = torch.func.hessian(at)(flat).detach()
    return found


def blocks(model: nn.Module) -> dict[str, list[Tensor]]:
    p = dict(model.named_parameters())
    return {"first": [p["0.weight"], p["0.bias"]], "second": [p["3.weight"]]}


@pytest.mark.parametrize("hold", [True, False])
def test_products_are_exact_and_leave_the_model_alone(hold: bool) -> None:
    model, batches = small()
    model.train()
    h = Hessian(model, loss, batches, blocks(model), hold=hold)
    vector = torch.randn(70, dtype=torch.double)
    got = h.product("first", vector)
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    expected = dense(model, batches, ["0.weight", "0.bias"]) @ vector
    assert torch.allclose(got, expected, atol=1e-12)
    other = torch.randn(40, dtype=torch.double)
    both = h.joint({"first": vector, "second": other})
    whole = dense(model, batches, ["0.weight", "0.bias", "3.weight"])
    assert torch.allclose(torch.cat([both["first"], both["second"]]), whole @ torch.cat([vector, other]), atol=1e-12)
    assert h.products == 2


def test_both_ends_and_power_iteration_are_the_dense_eigenvalues() -> None:
    model, batches = small()
    h = Hessian(model, loss, batches, blocks(model))
    for name, parts in (("first", ["0.weight", "0.bias"]), ("second", ["3.weight"])):
        values = torch.linalg.eigvalsh(dense(model, batches, parts))
        ends = lanczos(h, name, tolerance=1e-6, steps=70)
        assert ends.converged
        assert ends.top == pytest.approx(float(values[-1]), rel=1e-6)
        assert ends.bottom == pytest.approx(float(values[0]), rel=1e-3, abs=1e-6 * ends.top)
        assert sum(ends.weights) == pytest.approx(1)
        value, taken = power_iteration(h, name, tolerance=1e-7, iterations=500)
        largest = values[values.abs().argmax()]
        assert value == pytest.approx(float(largest), rel=1e-3)
        assert 2 <= taken <= 500


def test_the_trace_and_its_error() -> None:
    model, batches = small()
    h = Hessian(model, loss, batches, blocks(model))
    truth = float(dense(model, batches, ["3.weight"]).trace())
    one = trace(h, "second", probes=300)
    assert abs(one.value - truth) < 4 * one.standard_error
    together = block_traces(h, probes=300)
    assert abs(together["second"].value - truth) < 4 * together["second"].standard_error
    assert together["first"].probes == 300
    assert Trace.of([2.0]).standard_error == float("inf")


def test_attention_is_differentiated_twice() -> None:
    torch.manual_seed(0)

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
            return nn.functional.scaled_dot_product_attention(q, k, v).mean((1, 2))

    model = Attend()
    x = torch.randn(4, 5, 8)
    h = Hessian(model, lambda m, b: m(b).square().mean(), [x], {"qkv": [model.qkv.weight]})
    assert float(h.product("qkv", torch.ones(192)).abs().max()) > 0


def test_weights_that_enter_linearly_or_not_at_all_have_no_curvature() -> None:
    layer, unused = nn.Linear(3, 1), nn.Parameter(torch.ones(2))
    h = Hessian(layer, lambda m, b: m(b).mean(), [torch.ones(2, 3)], {"w": [layer.weight], "none": [unused]})
    assert h.product("w", torch.ones(3)).tolist() == [0.0] * 3
    assert h.product("none", torch.ones(2)).tolist() == [0.0] * 2
    assert power_iteration(h, "w") == (0.0, 1)
    assert lanczos(h, "w").top == 0.0


def test_a_backward_pass_that_autograd_cannot_see_is_found() -> None:
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        def backward(ctx: Any, *g: Tensor) -> Tensor:
            return g[0] * 2 * ctx.saved_tensors[0].detach()

    model, batches = small()
    seen = Hessian(model, lambda m, b: m(b[0]).square().sum(), batches, blocks(model))
    unseen = Hessian(model, lambda m, b: Hidden.apply(m(b[0])).sum(), batches, blocks(model))
    assert seen.verify("first") < 0.05
    assert unseen.verify("first") > 0.5
    assert unseen.verify("second") > 0.99
    assert seen.own_operators() == ()
    assert unseen.own_operators() == ("Hidden",)
    with pytest.raises(ConfigurationError, match="twice in second.*Hidden"):
        require_exact(unseen, "second")
    require_exact(seen, "second")
    linear = Hessian(model, lambda m, b: m(b[0]).sum(), batches, blocks(model))
    assert linear.verify("second") == 0.0


def test_what_cannot_be_done_is_one_line() -> None:
    model, batches = small()
    x = [torch.ones(2, 6, dtype=torch.double)]
    bad = {
        "twice in first": lambda m, b: torch.pdist(m(b)).sum(),
        "one number": lambda m, b: m(b),
        "no gradient": lambda m, b: m(b).detach().sum(),
        "loss is nan": lambda m, b: m(b).sum() * float("nan"),
    }
    for message, rule in bad.items():
        with pytest.raises(ConfigurationError, match=message) as caught:
            Hessian(model, rule, x, blocks(model)).product("first", torch.ones(70))
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="no data"):
        Hessian(model, loss, [], blocks(model))
    with pytest.raises(ConfigurationError, match="no parameter"):
        Hessian(model, loss, batches, {})
    model.requires_grad_(False)
    with pytest.raises(ConfigurationError, match="frozen"):
        Hessian(model, loss, batches, blocks(model))
