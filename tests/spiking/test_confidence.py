"""Exit on confidence: exact where nothing stops, exact for each sample where something does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hasten.adapt.threshold import stops
from hasten.errors import ConfigurationError
from hasten.spiking import LIF, ConfidenceExit, Decision, Observation, SpikingNetwork, Synaptic, run_until
from hasten.spiking.confidence import record, smoothing

pytestmark = pytest.mark.usefixtures("one_thread")


def net(timesteps: int = 6, direct: bool = True) -> SpikingNetwork:
    torch.manual_seed(1)
    layers = [
        nn.Linear(12, 24, bias=False), LIF(0.9, 0.3), nn.Linear(24, 20, bias=False), Synaptic(0.5, 0.9, threshold=0.3),
        nn.Linear(20, 4, bias=False),
    ]  # fmt: skip
    return SpikingNetwork(layers, timesteps, direct).eval()


def data(samples: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(samples, 12, generator=torch.Generator().manual_seed(0))
    y = net()(x).argmax(-1)
    y[::10] = (y[::10] + 1) % 4  # some that no network gets right
    return x, y


def test_never_stopping_is_the_whole_run_bit_by_bit() -> None:
    model, (x, _) = net(), data(40)
    run = run_until(model, x, ConfidenceExit(theta=1.0))
    state, total = model.init_state(), None
    with torch.inference_mode():
        shown = model.layers[0](x)
        for _ in range(6):
            out, state, _ = model.step_from(1, shown, state)
            total = out if total is None else total + out
    assert torch.equal(run.logits, total)
    assert set(run.timesteps.tolist()) == {6}
    torch.testing.assert_close(run.logits / 6, model(x))


@pytest.mark.parametrize("rule", ["confidence", "entropy", "margin"])
@pytest.mark.parametrize("direct", [True, False])
def test_leaving_a_batch_changes_no_other_sample(rule: str, direct: bool) -> None:
    model, (x, _) = net(direct=direct), data(64)
    if not direct:
        x = torch.rand(6, 64, 12, generator=torch.Generator().manual_seed(3))
    logits, spikes = record(model, x, 6)
    policy = ConfidenceExit(0.5, 0.7, rule)  # type: ignore[arg-type]
    score = torch.stack([policy.score(o, t + 1) for t, o in enumerate(logits)])
    policy = ConfidenceExit(float(score[2].median()), 0.7, rule)  # type: ignore[arg-type]
    at = torch.from_numpy(stops(score.numpy(), policy.theta))
    run = run_until(model, x, policy)
    assert torch.equal(run.timesteps, at + 1)
    assert len(at.unique()) > 2
    torch.testing.assert_close(run.logits, logits[at, torch.arange(64)], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(run.spikes, spikes[at, torch.arange(64)])


def test_the_policy_decides_what_the_batch_does() -> None:
    model, (x, _) = net(), data(30)
    logits, _ = record(model, x, 6)
    policy = ConfidenceExit(0.5, 0.5)
    run = run_until(model, x, policy)
    for sample in range(30):
        for t in range(1, 7):
            observation = Observation(tuple(logits[t - 1, sample].tolist()), t, 6)
            if policy.decide(observation) is Decision.STOP:
                break
            assert policy.decide(copy.deepcopy(observation)) is Decision.GO_ON
        assert t == run.timesteps[sample]


def test_calibration_saves_steps_and_keeps_accuracy() -> None:
    model, (x, y) = net(), data()
    frontier = ConfidenceExit.calibrate(model, (x[:200], y[:200]), tolerance=0.1)
    policy = frontier.best()
    run = run_until(model, x[200:], policy)
    assert run.timesteps.float().mean() < 6
    assert (run.logits.argmax(-1) == y[200:]).float().mean() > 0.7
    chosen = frontier.points.best(0.1)
    assert frontier.spikes_at(policy.theta) <= frontier.spikes_at(2.0)
    careful = frontier.best(0.1, caution=1.0)
    assert policy.theta < careful.theta < frontier.best(0.1, caution=100.0).theta
    at = stops(frontier.score, careful.theta)
    lost = frontier.correct[-1].astype(float) - frontier.correct[at, range(len(at))]
    assert lost.mean() + lost.std() / len(lost) ** 0.5 <= 0.1
    bound = frontier.oracle()
    assert bound.accuracy >= frontier.points.full.accuracy
    assert bound.mean_stages <= chosen.mean_stages
    again = ConfidenceExit.oracle(model, (x[:200], y[:200]))
    assert (again.accuracy, again.mean_stages) == (bound.accuracy, bound.mean_stages)
    assert frontier.table().splitlines()[0].split() == ["theta", "timesteps", "accuracy", "spikes"]


def test_smoothing_makes_confidence_equal_accuracy() -> None:
    g = torch.Generator().manual_seed(0)
    logits, labels = 5 * torch.randn(500, 4, generator=g), torch.randint(0, 4, (500,), generator=g)
    labels[:300] = logits[:300].argmax(-1)
    accuracy = (logits.argmax(-1) == labels).float().mean().item()
    alpha = smoothing(logits, accuracy)
    assert (logits / alpha).softmax(-1).amax(-1).mean().item() == pytest.approx(accuracy, abs=1e-3)


def test_one_step_is_a_valid_run() -> None:
    run = run_until(net(1), data(5)[0], ConfidenceExit(0.0))
    assert run.timesteps.tolist() == [1] * 5


def test_bad_inputs_are_refused() -> None:
    model, (x, y) = net(), data(100)
    with pytest.raises(ConfigurationError, match="eval"):
        run_until(net().train(), x, ConfidenceExit())
    broken = net()
    broken.layers[-1].weight.data.fill_(float("nan"))
    with pytest.raises(ConfigurationError, match="timestep 1 is not a number"):
        run_until(broken, x, ConfidenceExit())
    with pytest.raises(ConfigurationError, match="not a finite number"):
        run_until(model, x * torch.nan, ConfidenceExit())
    with pytest.raises(ConfigurationError, match="one class"):
        ConfidenceExit().decide(Observation((1.0,), 1, 3))
    with pytest.raises(ConfigurationError, match="positive"):
        ConfidenceExit(alpha=0.0)
    with pytest.warns(UserWarning, match="100 calibration samples"):
        ConfidenceExit.calibrate(model, (x, y))
