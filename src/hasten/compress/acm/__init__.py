"""Adaptive computation: every token gets as much of a layer as it needs."""

from hasten.compress.acm.module import AdaptiveComputation
from hasten.compress.acm.running import executed_share, load_map, measure_gates, set_budget, set_fixed
from hasten.compress.acm.technique import ACM

__all__ = ["ACM", "AdaptiveComputation", "executed_share", "load_map", "measure_gates", "set_budget", "set_fixed"]
