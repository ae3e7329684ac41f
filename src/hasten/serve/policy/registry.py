"""Policies by name, for command lines, recipes and searches."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from hasten.errors import ConfigurationError
from hasten.serve.policy.base import Policy
from hasten.serve.policy.orca import Orca
from hasten.serve.policy.prefill_first import PrefillFirst
from hasten.serve.policy.request_level import RequestLevel
from hasten.serve.policy.sarathi import StallFree
from hasten.serve.policy.splitfuse import SplitFuse
from hasten.serve.policy.token_budget import TokenBudget

__all__ = ["POLICIES", "make"]

POLICIES: dict[str, Callable[..., Policy]] = {
    "request-level": RequestLevel,
    "prefill-first": PrefillFirst,
    "orca": Orca,
    "token-budget": TokenBudget,
    "stall-free": StallFree,
    "splitfuse": SplitFuse,
}
"""Every policy that :func:`make` can build."""

_ALIASES = {"sarathi": "stall-free", "vllm": "prefill-first", "static": "request-level"}


def make(name: str, **knobs: Any) -> Policy:
    """Build a policy by its name; knobs that are ``None`` keep their default.

    >>> make("stall-free", token_budget=256).name
    'stall-free'

    Raises :class:`~hasten.errors.ConfigurationError` for an unknown name or knob.
    """
    key = name.lower().replace("_", "-")
    key = _ALIASES.get(key, key)
    factory = POLICIES.get(key)
    if factory is None:
        raise ConfigurationError(f"policy {name!r} is not known; choose one of {', '.join(POLICIES)}")
    given = {knob: value for knob, value in knobs.items() if value is not None}
    known = [p for p in inspect.signature(factory).parameters if not p.startswith("_")]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigurationError(f"policy {key!r} has no knob {', '.join(unknown)}; its knobs are {', '.join(known)}")
    return factory(**given)
