"""Layers that several rooms share."""

from hasten.nn.attention import causal_mask, grouped_attention
from hasten.nn.norm import RMSNorm
from hasten.nn.rotary import RotaryScaling, rotary_frequencies, rotate

__all__ = ["RMSNorm", "RotaryScaling", "causal_mask", "grouped_attention", "rotary_frequencies", "rotate"]
