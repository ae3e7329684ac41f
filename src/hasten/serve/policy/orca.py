"""Iteration-level scheduling: requests join and leave at every step, whole prompts mixed with decodes.

"Orca: A Distributed Serving System for Transformer-Based Generative Models", Yu et al., OSDI 2022. A decode is never
paused, yet the step that takes in a long prompt is as long as that prompt. Blocks for prompt and longest answer are
reserved at admission, so nothing is preempted.
Differs from the paper in: the cache is paged, and the reservation is the request's own limit, not the model's.
"""

from __future__ import annotations

from dataclasses import dataclass

from hasten.serve.batch import Observation, StepPlan
from hasten.serve.policy.base import require
from hasten.serve.policy.whole import admit_whole, advance_running, reservation

__all__ = ["Orca"]


@dataclass(frozen=True)
class Orca:
    """Everything that can run, in every step.

    >>> from hasten.serve.batch import Observation
    >>> from hasten.serve.request import Sequence
    >>> new = Sequence(seq=1, arrival=0.0, prompt_len=20, max_tokens=4)
    >>> busy = Sequence(seq=0, arrival=0.0, prompt_len=8, max_tokens=4, known=9, computed=8, blocks=1)
    >>> plan = Orca().decide(Observation(0.0, [new], [busy], 100, 101, 16))
    >>> [(c.seq, c.length) for c in plan.chunks]        # the decode shares a step with the whole prompt
    [(0, 1), (1, 20)]
    """

    max_num_seqs: int = 128
    """sequences that may run at once"""
    max_batched_tokens: int | None = None
    """prompt tokens that one step may take in (a longer prompt goes alone); ``None`` for no limit, as in the paper"""
    reserve_answer: bool = True
    """set aside blocks for the longest answer at admission; otherwise only for the prompt, preempting when full"""

    def __post_init__(self) -> None:
        require(self.max_num_seqs >= 1, f"max_num_seqs is {self.max_num_seqs}; at least 1 sequence must run")
        limit = self.max_batched_tokens
        require(limit is None or limit >= 1, f"max_batched_tokens is {limit}; give a positive number or None")

    @property
    def name(self) -> str:
        return "orca"

    def decide(self, observation: Observation) -> StepPlan:
        """Advance all running sequences and admit what fits."""
        chunks, preempted, free = advance_running(observation)
        seats = self.max_num_seqs - len(observation.running)
        if preempted or not observation.waiting or seats <= 0:
            return StepPlan(tuple(chunks), tuple(preempted))
        if self.reserve_answer:
            size = observation.block_size
            for seq in observation.running:  # promised, not yet held
                held = max(seq.blocks, -(-seq.known // size))
                free -= max(0, reservation(seq, observation) - held)
        chunks += admit_whole(
            observation.waiting,
            observation,
            free=free,
            seats=seats,
            max_tokens=self.max_batched_tokens,
            keep=0,
            reserve=self.reserve_answer,
        )
        return StepPlan(tuple(chunks))
