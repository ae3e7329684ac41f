"""Adaptive computation: every token gets as much of a layer as it needs."""

from hasten.compress.acm.module import AdaptiveComputation
from hasten.compress.acm.technique import ACM, executed_share, load_map, set_budget, set_fixed

__all__ = ["ACM", "AdaptiveComputation", "executed_share", "load_map", "set_budget", "set_fixed"]
