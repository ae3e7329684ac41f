"""Request-level batching: a batch is formed once and runs until its last request ends.

This is how inference servers batched before continuous batching (static batching as in FasterTransformer). It is the
lowest baseline: early finishers leave holes that nobody fills, and arrivals wait for the slowest request of the batch.
Blocks for prompt and longest answer are set aside at admission, so nothing is ever preempted.
"""

from __future__ import annotations

from dataclasses import dataclass

from hasten.serve.batch import Observation, StepPlan
from hasten.serve.policy.base import require
from hasten.serve.policy.whole import admit_whole, advance_running

__all__ = ["RequestLevel"]


@dataclass(frozen=True)
class RequestLevel:
    """Admit a batch, run it to its end, admit the next.

    >>> from hasten.serve.batch import Observation
    >>> from hasten.serve.request import Sequence
    >>> new = Sequence(seq=1, arrival=0.0, prompt_len=20, max_tokens=4)
    >>> busy = Sequence(seq=0, arrival=0.0, prompt_len=8, max_tokens=4, known=9, computed=8, blocks=1)
    >>> plan = RequestLevel().decide(Observation(0.0, [new], [busy], 100, 101, 16))
    >>> [(c.seq, c.length) for c in plan.chunks]        # the newcomer waits for the batch to end
    [(0, 1)]
    """

    max_num_seqs: int = 128
    """sequences in one batch"""

    def __post_init__(self) -> None:
        require(self.max_num_seqs >= 1, f"max_num_seqs is {self.max_num_seqs}; a batch holds at least 1 sequence")

    @property
    def name(self) -> str:
        return "request-level"

    def decide(self, observation: Observation) -> StepPlan:
        """Advance the batch; only when it is empty, form the next one."""
        if observation.running:
            chunks, preempted, _ = advance_running(observation)
            return StepPlan(tuple(chunks), tuple(preempted))
        chunks = admit_whole(
            observation.waiting,
            observation,
            free=observation.free_blocks,
            seats=self.max_num_seqs,
            max_tokens=None,
            keep=0,
            reserve=True,
        )
        return StepPlan(tuple(chunks))
