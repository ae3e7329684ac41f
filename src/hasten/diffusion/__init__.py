"""Diffusion: noise schedules, few-step samplers, a small transformer, and a distance between sets of images."""

from hasten.diffusion.distance import frechet_distance
from hasten.diffusion.dit import PRESETS, DiT, DiTConfig
from hasten.diffusion.sampler import Sampler, denoising_loss, trajectories
from hasten.diffusion.schedule import Schedule

__all__ = [
    "PRESETS",
    "DiT",
    "DiTConfig",
    "Sampler",
    "Schedule",
    "denoising_loss",
    "frechet_distance",
    "trajectories",
]
