"""Dynamic SplitFuse: every pass has one and the same number of tokens.

"DeepSpeed-FastGen: High-throughput Text Generation for LLMs via MII and DeepSpeed-Inference", Holmes et al., 2024,
arXiv:2401.08671. Long prompts are split over several passes, short ones are fused, even cut, to hit the budget exactly.
Throughput is concave in the tokens of a pass, so P tokens over F passes go fastest when spread evenly.
Differs from the paper in: the even share is our reading of its third observation (``split="greedy"`` is the other one),
and by default a deadlock releases the youngest sequences only (``on_deadlock="reset_all"`` is the repository's rule).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hasten.errors import ConfigurationError
from hasten.serve.policy.token_budget import TokenBudget

__all__ = ["SplitFuse"]


@dataclass(frozen=True)
class SplitFuse(TokenBudget):
    """The preset of DeepSpeed-FastGen; see :class:`TokenBudget` for the knobs.

    >>> SplitFuse(token_budget=768).split
    'even'
    >>> SplitFuse(token_budget=64)
    Traceback (most recent call last):
        ...
    hasten.errors.ConfigurationError: token_budget 64 is below max_num_seqs 128; ...
    """

    token_budget: int = 768
    """tokens in one pass, hit exactly while prompts wait"""
    split: Literal["greedy", "even"] = "even"
    tile: int = 64
    reserve: Literal["prompt", "chunk"] = "chunk"
    when_full: Literal["preempt", "wait"] = "wait"
    watermark: float = 0.0

    def _small_budget(self) -> None:
        raise ConfigurationError(
            f"token_budget {self.token_budget} is below max_num_seqs {self.max_num_seqs}; a pass must hold one token "
            f"of every running sequence: raise the budget or lower max_num_seqs to {self.token_budget}"
        )

    @property
    def name(self) -> str:
        return "splitfuse"
