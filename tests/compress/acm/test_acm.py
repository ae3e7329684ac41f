"""Adaptive computation: exact where it skips, within its budget, and honest about what it was given."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hasten.clock import ManualClock
from hasten.compress.acm import ACM, AdaptiveComputation, executed_share, load_map, running, set_budget, set_fixed
from hasten.compress.acm.module import ACTIVATIONS
from hasten.compress.acm.targets import find_targets
from hasten.compress.acm.technique import adaptive_layers, measure_gates
from hasten.errors import ConfigurationError
from hasten.measure.counting import cost
from hasten.nn.product.instructions import has_bytes
from hasten.testing.technique_kit import TechniqueKit

torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        x = x + self.mlp(self.norm(x))
        return x + self.proj(x)


def network(width=16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, width), Block(width), Block(width), nn.Linear(width, 4)).eval()


def inputs(count=4, tokens=6):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(16, tokens, 8, generator=g) for _ in range(count)]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(0, 2), st.integers(1, 30), st.integers(0, 10_000))
def test_sorted_execution_is_the_masked_sum(learners, least, tokens, seed):
    least = min(least, learners)
    g = torch.Generator().manual_seed(seed)
    layer = AdaptiveComputation(width=8, learners=learners, size=3, least=least)
    counts = torch.randint(least, learners + 1, (tokens,), generator=g)
    choice = nn.functional.one_hot(counts - least, learners + 1 - least).float()
    made = []
    for run in (lambda z: layer.sparse(z, counts), lambda z: layer.masked(z, choice)):
        z = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed + 1)).requires_grad_()
        out = run(z)
        grads = torch.autograd.grad(out.sin().sum() + 0 * z.sum(), [z, layer.into, layer.out], allow_unused=True)
        made.append((out.detach(), [torch.zeros(1) if x is None else x for x in grads]))
    torch.testing.assert_close(made[0][0], made[1][0], atol=1e-5, rtol=1e-5)
    for one, two in zip(made[0][1], made[1][1], strict=True):
        assert float((one - two).abs().max()) < 1e-5
    expected = torch.stack([layer.prefix(z[i], int(counts[i])) for i in range(tokens)])
    torch.testing.assert_close(made[0][0], expected.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not has_bytes(), reason="needs registers of 512 bits")
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_one_call_is_the_sorted_execution(data):
    learners, width, size = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    tokens, least = data.draw(st.sampled_from([1, 5, 50, 300, 700])), data.draw(st.integers(0, min(2, learners)))
    torch.manual_seed(data.draw(st.integers(0, 10_000)))
    activation = data.draw(st.sampled_from(sorted(ACTIVATIONS)))
    layer = AdaptiveComputation(width=width, learners=learners, size=size, least=least, activation=activation).eval()
    layer.fixed = None
    nn.init.normal_(layer.gate[-1].weight, std=3.0)
    z = torch.randn(2, tokens, width).transpose(0, 1)
    with torch.no_grad():
        made, counts = layer.gated(z)
        rows = z.reshape(-1, width)
        chosen = layer.scores(rows).argmax(-1) + least
        assert torch.equal(counts, chosen.view(tokens, 2))
        torch.testing.assert_close(made, layer.sparse(rows, chosen).view(z.shape), atol=1e-5, rtol=1e-5)
        told = torch.randint(least, learners + 1, (tokens, 2))
        made, counts = layer.gated(z, told)
        torch.testing.assert_close(made, layer.sparse(rows, told.flatten()).view(z.shape), atol=1e-5, rtol=1e-5)
        assert torch.equal(counts, told)


@pytest.mark.skipif(not has_bytes(), reason="needs registers of 512 bits")
def test_weights_that_change_are_packed_again():
    torch.manual_seed(0)
    layer = AdaptiveComputation(width=8, learners=2, size=4).eval()
    layer.fixed, z = None, torch.randn(40, 8)

    def exact() -> bool:
        with torch.inference_mode():
            made = layer(z)
            wanted = layer.sparse(z, layer.scores(z).argmax(-1))
        return bool(layer.packed) and torch.allclose(made, wanted, atol=1e-6)

    assert exact()
    call = layer.packed[1]
    assert exact()
    assert layer.packed[1] is call  # nothing has changed
    with torch.no_grad():
        layer.out.mul_(3)
    assert exact()
    layer.bias.data = torch.randn(8)
    assert exact()
    with torch.inference_mode():
        layer.gate_bias.copy_(torch.tensor([0.0, 9.0, 0.0]))
    assert exact()
    assert int(layer.last.min()) == int(layer.last.max()) == 1
    layer.load_state_dict(AdaptiveComputation(width=8, learners=2, size=4).state_dict())
    assert exact()
    assert copy.deepcopy(layer).packed is None
    with torch.inference_mode():
        unseen = copy.deepcopy(layer)  # torch does not watch what is made here
        assert torch.equal(unseen(z), layer(z))
        unseen.out.mul_(2)
        torch.testing.assert_close(unseen(z), 2 * layer(z))


@pytest.mark.skipif(not has_bytes(), reason="needs registers of 512 bits")
def test_threads_share_many_tokens():
    torch.manual_seed(0)
    layer, z = AdaptiveComputation(width=8, learners=3, size=4).eval(), torch.randn(2, 700, 8)
    layer.fixed = None
    try:
        with torch.inference_mode():
            alone = layer(z)
            torch.set_num_threads(2)
            assert torch.equal(layer(z), alone)
    finally:
        torch.set_num_threads(1)


def test_all_learners_of_neurons_are_the_layer():
    model = network()
    (target,) = find_targets(model, ("1.mlp",), inputs())
    from hasten.compress.acm.targets import replacement

    layer = replacement(model, target, 4, 1.0, by_neurons=True)
    z = torch.randn(5, 16)
    expected = model[1].mlp(z) - model[1].mlp[2].bias
    torch.testing.assert_close(layer(z), expected, atol=1e-5, rtol=1e-5)
    assert layer.size == 16
    torch.testing.assert_close(layer.prefixes(z)[2], layer.prefix(z, 2), atol=1e-5, rtol=1e-5)


def test_budget_is_kept_and_counted_by_operator():
    model, data = network(), inputs(8)
    acm = ACM(targets=("*.mlp",), epochs=2, gate_epochs=2, tune_epochs=6, budget=0.4, tune_rate=3e-3)
    small = acm(model, data).eval()
    x = inputs(1)[0]
    with torch.no_grad():
        small(x)
    share = executed_share(small)
    assert abs(share - 0.4) < 0.03
    assert small.report.measured["share"] == pytest.approx(share, abs=0.05)
    counted = cost(small, x).macs
    layers = adaptive_layers(small).values()
    spent = sum(m.last.numel() * m.gate_cost + float(m.last.sum()) * 2 * m.width * m.size for m in layers)
    rest = cost(set_fixed(copy.deepcopy(small), 0), x).macs
    assert counted - rest == pytest.approx(spent)
    for other in (0.8, 0.3):  # a knob at run time
        set_budget(small, data, other)
        with torch.no_grad():
            small(x)
        assert abs(executed_share(small) - other) < 0.05
    maps = load_map(small, x)
    assert set(maps) == {"1.mlp", "2.mlp"}
    assert maps["1.mlp"].shape == (16, 6)


def test_distillation_orders_learners():
    model, data = network(), inputs(8)
    small = ACM(targets=("*.mlp",), epochs=10, init="random", rate=3e-3).distil(model, data)
    x = torch.randn(200, 16)
    for name in ("1.mlp", "2.mlp"):
        wanted = model.get_submodule(name)(x)
        errors = (small.get_submodule(name).prefixes(x) - wanted).square().mean((1, 2)).tolist()
        assert all(b <= 1.05 * a for a, b in zip(errors, errors[1:], strict=False))
        assert errors[-1] < 0.8 * errors[0]


def test_projections_keep_at_least_one_learner():
    model = network()
    acm = ACM(targets=("*.proj",), epochs=1, gate_epochs=1, tune_epochs=0)
    small = acm(model, inputs()).eval()
    layer = small[1].proj
    assert layer.least == 1
    assert layer.activation == "identity"
    assert int(load_map(small, inputs()[0])["1.proj"].min()) >= 1
    with pytest.raises(ConfigurationError, match="1 to 4 learners, not 0"):
        set_fixed(small, 0)


def test_few_tokens_take_the_typical_number():
    small = ACM(targets=("*.mlp",), epochs=1, gate_epochs=1, tune_epochs=0)(network(), inputs()).eval()
    for layer in adaptive_layers(small).values():
        layer.min_tokens, layer.typical = 10, 2
    maps = load_map(small, inputs()[0][:1])
    assert all(torch.equal(m, torch.full((1, 6), 2)) for m in maps.values())
    with torch.no_grad():
        torch.testing.assert_close(small(inputs()[0][:1]), set_fixed(copy.deepcopy(small), 2)(inputs()[0][:1]))


def test_where_gates_pay_is_measured():
    """By a clock that charges two seconds for all learners, three for gates over 4 tokens and one over 16."""
    small = ACM(targets=("1.mlp",), epochs=1, gate_epochs=1, tune_epochs=0)(network(), inputs()).eval()
    clock = ManualClock()
    layer = small[1].mlp
    layer.prefix = lambda z, count: (clock.advance(2.0), z)[1]
    layer.gated = lambda z, counts: (clock.advance(3.0 if len(z) == 4 else 1.0), z)[1]
    assert measure_gates(small, (4, 16, 64), clock=clock) == {"1.mlp": 16}
    assert layer.min_tokens == 16
    layer.gated = lambda z, counts: (clock.advance(5.0), z)[1]
    assert measure_gates(small, (4, 16, 64), clock=clock) == {"1.mlp": 128}
    told = ACM(targets=("1.mlp",), epochs=1, gate_epochs=1, tune_epochs=0, measure=True)(network(), inputs())
    assert "min_tokens now" in told.report.notes[-1]


def test_a_budget_is_set_through_gates_that_are_not_asked_at_the_time():
    small = ACM(targets=("*.mlp",), epochs=1, gate_epochs=1, tune_epochs=0)(network(), inputs()).eval()
    asked = set_budget(copy.deepcopy(small), inputs(), 0.4)
    layers = adaptive_layers(small)
    for layer in layers.values():
        layer.min_tokens = 10**6
    set_budget(small, inputs(), 0.4)
    for name, layer in layers.items():
        twin = adaptive_layers(asked)[name]
        assert torch.equal(layer.gate_bias, twin.gate_bias)
        assert layer.min_tokens == 10**6
        assert layer.typical == twin.typical
    with torch.no_grad():
        small(inputs()[0])
    run = sum(layer.typical * (layer.cost_of(1) - layer.gate_cost) for layer in layers.values())  # no gate is asked
    full = sum(layer.cost_of(layer.learners) for layer in layers.values())
    assert executed_share(small) == pytest.approx(run / full)


def test_the_first_count_that_pays_has_a_follower_that_pays():
    def first(*faster: int) -> int:
        return running._first_of_two((4, 16, 64, 256), iter(faster))

    assert first(4, 16, 64, 256) == 4
    assert first(4, 64, 256) == 64  # one that is alone was luck
    assert first(256) == 256
    assert first(4, 64) == first() == 512


def test_choices_by_lot_cost_the_budget_before_tuning():
    small = ACM(targets=("*.mlp",), epochs=1, gate_epochs=1, tune_epochs=0)(network(), inputs())
    running.lean_choices(small, inputs(), 0.4)
    layers = adaptive_layers(small).values()
    torch.manual_seed(0)
    small.train()
    with torch.no_grad():
        shares = [(small(x), executed_share(small))[1] for x in inputs() * 5]
    small.eval()
    assert sum(shares) / len(shares) == pytest.approx(0.4, abs=0.03)
    assert not any(layer._forward_pre_hooks for layer in layers)
    with pytest.raises(ConfigurationError, match="budget is 2"):
        running.lean_choices(small, inputs(), 2)


def test_tuning_of_one_step_already_has_the_budget():
    """Gates that were taught to run everything would never get there in so few steps."""
    model, data = network(), inputs(8)
    acm = ACM(targets=("*.mlp",), labels="improvement", improvement=1.0001, epochs=1, gate_epochs=20, tune_epochs=1)
    gated = acm.gates(acm.distil(model, data), model, data).eval()
    with torch.no_grad():
        gated(data[0])
    assert executed_share(gated) > 0.8
    small = acm.finetune(gated, None, budget=0.3, teacher=model, inputs=data).eval()
    with torch.no_grad():
        small(data[0])
    assert executed_share(small) == pytest.approx(0.3, abs=0.05)


def test_targets_that_do_not_fit_are_named():
    with pytest.raises(ConfigurationError, match="no module is called"):
        ACM(targets=("*.ffn",))(network(), inputs())
    with pytest.raises(ConfigurationError, match=r"0 maps \(16, 6, 8\) to \(16, 6, 16\)"):
        ACM(targets=("0",))(network(), inputs())
    with pytest.raises(ConfigurationError, match="holds no linear layer"):
        ACM(targets=("1.norm",))(network(), inputs())
    with pytest.raises(ConfigurationError, match="no labels"):
        ACM(targets=("*.mlp",)).finetune(network(), None)
    with pytest.raises(ConfigurationError, match="no gated call"):
        executed_share(nn.Sequential(AdaptiveComputation(width=4, learners=2, size=2)))
    with pytest.raises(ConfigurationError, match="has no b behind"):
        ACM(targets=("1.mlp>b",))(network(), inputs())


@pytest.mark.parametrize(
    "knobs",
    [
        {"budget": 0},
        {"budget": 1.5},
        {"learners": 0},
        {"improvement": 1.0},
        {"labels": "x"},
        {"init": "x"},
        {"epochs": 0},
    ],
)
def test_bad_knobs(knobs):
    with pytest.raises(ConfigurationError):
        ACM(**knobs)


class TestKit(TechniqueKit):
    technique = ACM(targets=("first>second",), epochs=3, gate_epochs=1, tune_epochs=2, budget=0.8)
    keeps = {"sqnr": 8.0}

    def model(self):
        torch.manual_seed(0)
        return _Residual().eval()

    def test_same_input_same_result(self, parts):
        model, example, new = parts
        again = self.technique(model, [example])
        with torch.inference_mode():
            assert torch.equal(new(example), again(example))


class _Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act, self.second = nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(x + self.second(self.act(self.first(x))))
