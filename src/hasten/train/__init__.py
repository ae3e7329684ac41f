"""Fitting models."""

from hasten.train.lm import LMTraining, bits_per_byte, fit_lm

__all__ = ["LMTraining", "bits_per_byte", "fit_lm"]
