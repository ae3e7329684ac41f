"""Prefill-first scheduling: new prompts go before running decodes.

Continuous batching with a paged cache as in the first vLLM ("Efficient Memory Management for Large Language Model
Serving with PagedAttention", Kwon et al., SOSP 2023, arXiv:2309.06180): a step holds either whole prompts or decodes,
and prompts win. The time to first token is short and the batch is large, but every prompt stalls all running decodes.
Differs from the paper in: recomputation only, no swapping to host memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from hasten.serve.batch import Observation, StepPlan
from hasten.serve.policy.base import require
from hasten.serve.policy.whole import admit_whole, advance_running

__all__ = ["PrefillFirst"]


@dataclass(frozen=True)
class PrefillFirst:
    """Whole prompts first, in steps of their own; decodes when no prompt can be admitted.

    >>> from hasten.serve.batch import Observation
    >>> from hasten.serve.request import Sequence
    >>> new = Sequence(seq=1, arrival=0.0, prompt_len=20, max_tokens=4)
    >>> busy = Sequence(seq=0, arrival=0.0, prompt_len=8, max_tokens=4, known=9, computed=8, blocks=1)
    >>> plan = PrefillFirst().decide(Observation(0.0, [new], [busy], 100, 101, 16))
    >>> [(c.seq, c.length) for c in plan.chunks]        # the decode stalls
    [(1, 20)]
    """

    max_num_seqs: int = 128
    """sequences that may run at once"""
    max_batched_tokens: int = 4096
    """tokens in one step of prompts; a longer prompt goes alone"""
    watermark: float = 0.01
    """share of the cache that admission leaves free while others run, so that they are not preempted at once"""

    def __post_init__(self) -> None:
        require(self.max_num_seqs >= 1, f"max_num_seqs is {self.max_num_seqs}; at least 1 sequence must run")
        require(self.max_batched_tokens >= 1, f"max_batched_tokens is {self.max_batched_tokens}; it must be positive")
        require(0 <= self.watermark < 1, f"watermark is {self.watermark}; it is a share of the cache from 0 to below 1")

    @property
    def name(self) -> str:
        return "prefill-first"

    def decide(self, observation: Observation) -> StepPlan:
        """A step of prompts when one can be admitted, else a step of decodes."""
        running = observation.running
        seats = self.max_num_seqs - len(running)
        if observation.waiting and seats > 0:
            chunks = admit_whole(
                observation.waiting,
                observation,
                free=observation.free_blocks,
                seats=seats,
                max_tokens=self.max_batched_tokens,
                keep=int(self.watermark * observation.total_blocks) if running else 0,
                reserve=False,
            )
            if chunks:
                return StepPlan(tuple(chunks))
        chunks, preempted, _ = advance_running(observation)
        return StepPlan(tuple(chunks), tuple(preempted))
