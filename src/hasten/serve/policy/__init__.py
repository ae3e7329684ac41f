"""Scheduling policies: what the next step computes."""

from hasten.serve.policy.base import Policy
from hasten.serve.policy.orca import Orca
from hasten.serve.policy.pace import Pace
from hasten.serve.policy.prefill_first import PrefillFirst
from hasten.serve.policy.registry import POLICIES, make
from hasten.serve.policy.request_level import RequestLevel
from hasten.serve.policy.sarathi import StallFree
from hasten.serve.policy.speculation import (
    DraftCost,
    FixedSpeculation,
    GoodputSpeculation,
    SpeculationObservation,
    SpeculationPolicy,
)
from hasten.serve.policy.splitfuse import SplitFuse
from hasten.serve.policy.token_budget import DynamicChunk, TokenBudget

__all__ = [
    "POLICIES",
    "DraftCost",
    "DynamicChunk",
    "FixedSpeculation",
    "GoodputSpeculation",
    "Orca",
    "Pace",
    "Policy",
    "PrefillFirst",
    "RequestLevel",
    "SpeculationObservation",
    "SpeculationPolicy",
    "SplitFuse",
    "StallFree",
    "TokenBudget",
    "make",
]
