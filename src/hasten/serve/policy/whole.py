"""Steps that compute whole prompts: the parts that request-level, prefill-first and Orca scheduling share.

Such a step gives a sequence everything it lacks at once. What remains to decide is who takes part, and what happens
when a running sequence finds no block for its next token: the last in rank gives up its blocks and is recomputed later.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from hasten.serve.batch import Chunk, Observation, blocks_for
from hasten.serve.policy.base import in_turn
from hasten.serve.request import Sequence

__all__ = ["admit_whole", "advance_running", "reservation"]


def reservation(sequence: Sequence, observation: Observation) -> int:
    """Blocks for the prompt and the longest answer, at most the whole cache."""
    need = blocks_for(sequence.prompt_len + sequence.max_tokens, observation.block_size)
    return min(max(need, blocks_for(sequence.known, observation.block_size)), observation.total_blocks)


def advance_running(observation: Observation) -> tuple[list[Chunk], list[int], int]:
    """Give every running sequence all it lacks; returns chunks, preempted sequences and the blocks left.

    When the blocks do not suffice, the last in rank is preempted, repeatedly; it may be the one that asks.
    """
    size, free = observation.block_size, observation.free_blocks
    chunks: list[Chunk] = []
    for seq in observation.running:
        known, computed = seq.known, seq.computed
        need = -(-known // size) - seq.blocks
        if need > 0:
            free -= need
        chunks.append(Chunk(seq.seq, computed, known - computed))
    if free >= 0:
        return chunks, [], free
    return _advance_scarce(observation)


def _advance_scarce(observation: Observation) -> tuple[list[Chunk], list[int], int]:
    size, free = observation.block_size, observation.free_blocks
    queue = in_turn(observation.running)
    chunks: list[Chunk] = []
    preempted: list[int] = []
    index = 0
    while index < len(queue):
        seq = queue[index]
        need = blocks_for(seq.known, size) - seq.blocks
        while need > free and len(queue) > index:
            victim = queue.pop()
            preempted.append(victim.seq)
            free += victim.blocks
        if index < len(queue):
            free -= max(0, need)
            chunks.append(Chunk(seq.seq, seq.computed, seq.pending))
            index += 1
    return chunks, preempted, free


def admit_whole(
    waiting: SequenceOf[Sequence],
    observation: Observation,
    *,
    free: int,
    seats: int,
    max_tokens: int | None,
    keep: int,
    reserve: bool,
) -> list[Chunk]:
    """Whole-prompt chunks for the head of the queue; stops at the first that does not fit.

    ``free`` blocks may be used and ``seats`` sequences admitted, ``max_tokens`` bounds the tokens of the step (a longer
    prompt goes alone), ``keep`` blocks stay free for those that run, ``reserve`` asks for the longest answer's blocks.
    """
    chunks: list[Chunk] = []
    total = 0
    for seq in waiting:
        if len(chunks) >= seats:
            break
        pending = seq.known - seq.computed
        if max_tokens is not None and chunks and total + pending > max_tokens:
            break
        wanted = reservation(seq, observation) if reserve else blocks_for(seq.known, observation.block_size)
        need = wanted - seq.blocks
        if need > free - keep:
            break
        free -= max(0, need)
        total += pending
        chunks.append(Chunk(seq.seq, seq.computed, pending))
    return chunks
