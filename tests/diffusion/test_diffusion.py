"""Schedules, samplers and the transformer of the diffusion room."""

import pytest
import torch

from hasten.diffusion import PRESETS, DiT, DiTConfig, Sampler, Schedule, denoising_loss, frechet_distance, trajectories
from hasten.errors import ConfigurationError, DataError

torch.set_num_threads(1)


def tiny():
    torch.manual_seed(0)
    return DiT(PRESETS["dit-tiny"]).eval()


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_signal_falls_and_noise_takes_its_place(kind):
    schedule = Schedule(kind, 200)
    signal = schedule.signal
    assert bool((signal[1:] < signal[:-1]).all())
    assert signal[0] > 0.99
    assert signal[-1] < 0.01
    x, noise = torch.randn(4000, 1), torch.randn(4000, 1)
    mixed = schedule.add_noise(x, torch.full((4000,), 100), noise)
    assert float(mixed.var()) == pytest.approx(1.0, abs=0.1)  # the variance is kept


@pytest.mark.parametrize("method", ["ddim", "dpm"])
def test_a_perfect_predictor_is_sampled_to_its_image(method):
    """Where the model knows the image, every sampler ends there."""
    schedule = Schedule(steps=100)
    image = torch.rand(2, 1, 4, 4) * 2 - 1

    def predict(x, t, labels):
        left = schedule.signal[t].view(-1, 1, 1, 1)
        return (x - left.sqrt() * image) / (1 - left).sqrt()

    for steps in (1, 5, 20):
        made = Sampler(method, steps=steps, schedule=schedule)(predict, image.shape, seed=0)
        torch.testing.assert_close(made, image, atol=1e-3, rtol=1e-3)


def test_gaussian_data_gives_gaussian_samples():
    """Data N(0.3, 0.2²) have a known denoiser; samples must have that mean and spread, and the second order is
    closer."""
    schedule, mean, spread = Schedule(), 0.3, 0.2

    def predict(x, t, labels):
        left = schedule.signal.double()[t].view(-1, 1, 1, 1)
        variance = left * spread**2 + 1 - left
        return ((1 - left).sqrt() * (x - left.sqrt() * mean) / variance).float()

    gaps = {}
    for method in ("ddim", "dpm"):
        made = Sampler(method, steps=30, schedule=schedule)(predict, (3000, 1, 1, 1), seed=1)
        assert float(made.mean()) == pytest.approx(mean, abs=0.03)
        gaps[method] = abs(float(made.std()) - spread)
    assert gaps["dpm"] <= gaps["ddim"] + 0.005
    noisy = Sampler("ddim", steps=50, eta=1.0, schedule=schedule)(predict, (3000, 1, 1, 1), seed=1)
    assert float(noisy.std()) == pytest.approx(spread, abs=0.03)


def test_seeds_decide_the_image_and_guidance_needs_a_null_label():
    model = tiny()
    torch.nn.init.normal_(model.final.weight, std=0.1)
    labels = torch.arange(3)
    sampler = Sampler(steps=3)
    one, two = (sampler(model, (3, 1, 8, 8), seed=4, labels=labels) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, sampler(model, (3, 1, 8, 8), seed=5, labels=labels))
    guided = Sampler(steps=3, guidance=2.0)(model, (3, 1, 8, 8), seed=4, labels=labels, null_label=model.null_label)
    assert guided.shape == one.shape
    with pytest.raises(ConfigurationError, match="null_label"):
        Sampler(steps=3, guidance=2.0)(model, (3, 1, 8, 8), seed=4, labels=labels)


def test_blocks_begin_as_the_identity_and_labels_matter_after_training():
    model = tiny()
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([0, 10, 500, 999])
    assert torch.equal(model(x, t), torch.zeros_like(x))
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(64, 1, 8, 8) * 2 - 1, torch.arange(64) % 10
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = denoising_loss(model, Schedule(), images, labels, generator, null_label=model.null_label)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < sum(losses[:5])
    with torch.no_grad():
        assert not torch.equal(
            model(x, t, torch.zeros(4, dtype=torch.long)), model(x, t, torch.ones(4, dtype=torch.long))
        )


def test_patches_go_back_where_they_came_from():
    """With weights that copy patches through, the image comes back."""
    config = DiTConfig(size=4, channels=2, patch=2, width=8, layers=0, heads=1)
    model = DiT(config)
    model.final_norm = torch.nn.Identity()
    model.position.data.zero_()
    model.x_embed.weight.data.copy_(torch.eye(8))
    model.x_embed.bias.data.zero_()
    model.final.weight.data.copy_(torch.eye(8))
    x = torch.randn(2, 2, 4, 4)
    torch.testing.assert_close(model(x, torch.zeros(2, dtype=torch.long)), x)


def test_trajectories_are_what_the_model_sees():
    model = tiny()
    found = trajectories(model, Sampler(steps=10), (2, 1, 8, 8), labels=torch.tensor([1, 2]), keep=4)
    assert [int(t[0]) for _, t, _ in found] == [999, 666, 333, 0]
    assert all(x.shape == (2, 1, 8, 8) and y.tolist() == [1, 2] for x, _, y in found)


def test_distance_of_gaussians():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 3, generator=generator)
    y = torch.randn(5000, 3, generator=generator) * 2 + torch.tensor([1.0, 0.0, 0.0])
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x, y) == pytest.approx(1 + 3, rel=0.1)  # |μ|² + 3 (2 - 1)²
    with pytest.raises(DataError):
        frechet_distance(x[:1], y)


def test_bad_knobs():
    for make in (
        lambda: Schedule("square"), lambda: Schedule(steps=1), lambda: Schedule().timesteps(2000),
        lambda: Sampler("euler"), lambda: Sampler("dpm", eta=0.5), lambda: Sampler(eta=2), lambda: Sampler(steps=5000),
        lambda: DiTConfig(patch=3), lambda: DiTConfig(width=30, heads=4),
    ):  # fmt: skip
        with pytest.raises(ConfigurationError):
            make()
