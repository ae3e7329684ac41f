"""What a policy sees and what it answers: ``Observation -> StepPlan``.

A :class:`StepPlan` is a list of chunks ``(seq, start, length)``. The real engine executes it with one ragged forward,
the simulator charges it to a cost model; neither knows which policy made it.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from enum import Enum

from hasten.serve.request import Sequence

__all__ = ["Chunk", "ChunkKind", "Observation", "StepPlan", "blocks_for"]


class ChunkKind(Enum):
    """What the computed positions are for."""

    COMPUTE = "compute"
    """catch up with known tokens"""
    VERIFY = "verify"
    """check proposed tokens (speculation)"""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute ``length`` tokens of sequence ``seq``, from position ``start`` (its number of computed tokens)."""

    seq: int
    start: int
    length: int
    kind: ChunkKind = ChunkKind.COMPUTE


@dataclass(frozen=True, slots=True)
class Observation:
    """The state of an engine at the moment a step is to be planned."""

    now: float
    """seconds on the engine's clock"""
    waiting: SequenceOf[Sequence]
    """not admitted, in the order in which they are to be served: priority, preempted ones first, then by the time
    at which the first token is due"""
    running: SequenceOf[Sequence]
    """admitted, in order of admission"""
    free_blocks: int
    """cache blocks that can be had now"""
    total_blocks: int
    """cache blocks in all"""
    block_size: int
    """tokens in one block"""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One iteration: first the preemptions, then one forward over all chunks.

    A waiting sequence is admitted by giving it a chunk. Preempted sequences lose their blocks and go back to the head
    of the queue; a plan never gives them a chunk. An empty plan means there is nothing to do until something arrives.
    """

    chunks: tuple[Chunk, ...] = ()
    preempt: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(c.length for c in self.chunks)


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold ``tokens`` tokens.

    >>> blocks_for(17, 16)
    2
    """
    return -(-tokens // block_size)
