"""What gates are taught: by definition, by gradients that reach a token, at a price that meets a budget."""

import pytest
import torch
from torch import nn

from hasten.compress.acm import ACM, labels, load_map
from hasten.compress.acm.targets import find_targets
from hasten.errors import ConfigurationError

torch.set_num_threads(1)


def test_the_publications_rule_by_definition():
    """Errors 8, 4, 3.9, 1: the second learner helps by less than a fifth, so one is enough; then never, so the last."""
    y = torch.zeros(2, 1)
    errors = torch.tensor([[8.0, 4.0, 3.9, 1.0], [8.0, 4.0, 2.0, 1.0]])
    assert labels.first_that_helps_little(errors.T[:, :, None], y, 1.2, 1).tolist() == [2, 3]


class First(nn.Module):
    """Only the first token of an example is read."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head((x + self.mlp(x))[:, 0])


def model():
    torch.manual_seed(0)
    return First().eval()


def inputs():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(16, 5, 8, generator=g) for _ in range(4)]


@pytest.mark.parametrize("scalar", [labels.of_outputs, labels.of_classes])
def test_tokens_that_the_output_does_not_hear_weigh_nothing(scalar):
    one = model().requires_grad_(False)
    targets = find_targets(one, ("mlp",), inputs())
    ((z, y, weight),) = labels.weighted_pairs(one, targets, inputs()[0], scalar)
    assert z.shape == y.shape == (80, 8)
    weight = weight.view(16, 5)
    assert float(weight[:, 0].min()) > 0
    assert float(weight[:, 1:].abs().max()) == 0
    (plain,) = labels.pairs(one, targets, inputs()[0])
    assert torch.equal(plain[0], z)
    assert torch.equal(plain[1], y)
    assert not one.mlp[0]._forward_pre_hooks


def test_the_gradient_is_that_of_the_loss():
    one = model()
    targets = find_targets(one, ("mlp",), inputs())
    ((_, y, weight),) = labels.weighted_pairs(one, targets, inputs()[0], lambda m, x: m(x).square().sum())
    x = inputs()[0]
    made = y.view(16, 5, 8).clone().requires_grad_()
    one.head((x + made)[:, 0]).square().sum().backward()
    torch.testing.assert_close(weight.view(16, 5), made.grad.square().sum(-1))


def test_gates_spend_where_the_loss_is():
    small = ACM(targets=("mlp",), learners=2, budget=0.65, epochs=1, gate_epochs=30, tune_epochs=0)(model(), inputs())
    loads = load_map(small, inputs()[0])["mlp"].double()
    weighed = labels.cheapest(torch.tensor([[9.0, 0.0], [3.0, 0.0], [1.0, 0.0]]), 1.5, 0)
    assert weighed.tolist() == [2, 0]
    assert loads.shape == (16, 5)


def test_a_price_meets_the_aim():
    g = torch.Generator().manual_seed(0)
    wrong = [torch.rand(5, 400, generator=g).sort(0, descending=True).values * s for s in (1.0, 100.0)]
    price = labels.find_price(wrong, (10, 20), (0, 1), 40.0)
    spent = [10 * labels.cheapest(wrong[0], 10 * price, 0).double().mean(),
             20 * labels.cheapest(wrong[1], 20 * price, 1).double().mean()]  # fmt: skip
    assert float(sum(spent)) == pytest.approx(40.0, abs=0.5)
    assert spent[1] > spent[0]
    cheap = labels.find_price(wrong, (10, 20), (0, 1), 0.0)  # no less than what always runs
    assert int(labels.cheapest(wrong[1], 20 * cheap, 1).max()) == 1
    assert labels.find_price([torch.zeros(3, 4)], (1,), (0,), 1.0) == 0.0


def test_outputs_of_other_shapes_and_none_at_all():
    tensor = torch.ones(2, 3)
    for made in (tensor, (tensor, 1), {"a": tensor}, type("Made", (), {"logits": tensor})()):
        assert labels.output_of(lambda x, made=made: made, tensor) is tensor
    with pytest.raises(ConfigurationError, match="labels='improvement'"):
        labels.output_of(lambda x: 3, tensor)


class Deaf(First):
    def forward(self, x):
        return self.head((x + self.mlp(x).detach())[:, 0])


def test_an_output_that_hears_no_part_is_named():
    torch.manual_seed(0)
    acm = ACM(targets=("mlp",), learners=2, epochs=1, gate_epochs=1, tune_epochs=0)
    with pytest.raises(ConfigurationError, match="no gradient of the output reaches mlp"):
        acm(Deaf().eval(), inputs())
