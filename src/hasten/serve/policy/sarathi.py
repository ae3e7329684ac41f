"""Stall-free batching: the token budget of Sarathi-Serve.

"Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", Agrawal et al., OSDI 2024, arXiv:2403.02310.
All running decodes are in every step; prompts fill what the budget leaves, in pieces. Memory for a whole prompt is set
aside at admission; when a decode finds no block, the last arrival is preempted and recomputed.
Differs from the paper in: the budget also bounds the decodes, so that a step is never longer than promised.
"""

from __future__ import annotations

from dataclasses import dataclass

from hasten.serve.policy.token_budget import TokenBudget

__all__ = ["StallFree"]


@dataclass(frozen=True)
class StallFree(TokenBudget):
    """The preset of Sarathi-Serve; see :class:`TokenBudget` for the knobs.

    >>> StallFree(token_budget=512).reserve
    'prompt'
    """

    @property
    def name(self) -> str:
        return "stall-free"
