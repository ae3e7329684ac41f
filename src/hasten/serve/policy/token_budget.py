"""A token budget per step: running decodes first, then pieces of prompts until the budget is full.

The time of a step follows its number of tokens, so a fixed number keeps steps near-equal: no decode waits for a whole
prompt, and large batches cost little latency. Invariants: no step exceeds the budget; a decode that has memory is in
every step; nobody is admitted before an earlier one in rank. Two publications use the mechanism and differ in the ties:

* Sarathi-Serve (Agrawal et al., OSDI 2024, arXiv:2403.02310): memory for the whole prompt is set aside at admission.
* DeepSpeed-FastGen (Holmes et al., 2024, arXiv:2401.08671): memory piece by piece, even splits, a rule for deadlock.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Literal

from hasten.serve.batch import Chunk, Observation, StepPlan
from hasten.serve.policy.base import in_turn, rank, require
from hasten.serve.policy.pace import Pace, Share
from hasten.serve.request import Sequence

__all__ = ["DynamicChunk", "TokenBudget"]


@dataclass(frozen=True)
class DynamicChunk:
    """Chunks that shrink as a prompt advances, so that a chunk's time stays level while its context grows.

    >>> DynamicChunk(high=512, low=128, stages=4, span=4096).limit(computed=3000)
    256
    """

    high: int = 2048
    """tokens of the first stage"""
    low: int = 512
    """tokens of the last stage"""
    stages: int = 8
    """steps from high to low, at equal distances of the prompt"""
    span: int = 8192
    """prompt tokens over which the stages are spread"""
    multiple: int = 32
    """sizes are rounded up to this multiple"""

    def __post_init__(self) -> None:
        require(self.high >= self.low >= 1, f"chunks go from {self.high} to {self.low}; high must be ≥ low ≥ 1")
        require(self.stages >= 1 and self.span >= 1 and self.multiple >= 1, "stages, span, multiple must be positive")

    def limit(self, computed: int) -> int:
        """Largest chunk for a sequence with ``computed`` tokens."""
        stage = min(computed * self.stages // self.span, self.stages - 1)
        size = self.high - (self.high - self.low) * stage // max(1, self.stages - 1)
        return -(-size // self.multiple) * self.multiple


@dataclass(frozen=True)
class TokenBudget:
    """Fill every step up to ``token_budget`` tokens, decodes first.

    >>> from hasten.serve.batch import Observation
    >>> from hasten.serve.request import Sequence
    >>> new = Sequence(seq=1, arrival=0.0, prompt_len=20, max_tokens=4)
    >>> busy = Sequence(seq=0, arrival=0.0, prompt_len=8, max_tokens=4, known=9, computed=8, blocks=1)
    >>> plan = TokenBudget(token_budget=8, max_num_seqs=4).decide(Observation(0.0, [new], [busy], 100, 101, 16))
    >>> [(c.seq, c.length) for c in plan.chunks]        # seven tokens of the prompt ride along
    [(0, 1), (1, 7)]
    """

    token_budget: int = 512
    """tokens in one step at most"""
    max_num_seqs: int = 128
    """sequences that may run at once"""
    split: Literal["greedy", "even"] = "greedy"
    """``greedy``: prompt pieces fill the budget; ``even``: the waiting prompt tokens are spread evenly over
    the fewest steps"""
    tile: int = 1
    """an even piece is rounded up to this multiple (kernels pay whole tiles)"""
    reserve: Literal["prompt", "chunk"] = "prompt"
    """memory asked for at admission: the whole prompt, or only the piece at hand"""
    when_full: Literal["preempt", "wait"] = "preempt"
    """a decode without a block preempts the last in rank, or waits until nothing at all can be scheduled"""
    on_deadlock: Literal["youngest", "reset_all"] = "youngest"
    """when nothing can be scheduled: release the youngest until one fits, or release every running sequence"""
    watermark: float = 0.01
    """share of the cache that admission leaves free while others run, so that they are not preempted at once"""
    dynamic: DynamicChunk | None = None
    """shrink the pieces of a prompt as it advances"""
    pace: Pace | None = None
    """how long steps may take: prompts get what the decodes of each step leave of that, up to the token budget"""

    def __post_init__(self) -> None:
        require(
            self.token_budget >= 1,
            f"token_budget is {self.token_budget}; a step computes at least 1 token",
        )
        require(self.max_num_seqs >= 1, f"max_num_seqs is {self.max_num_seqs}; at least 1 sequence must run")
        require(self.tile >= 1, f"tile is {self.tile}; give 1 or the tile of the kernels, such as 64")
        require(0 <= self.watermark < 1, f"watermark is {self.watermark}; it is a share of the cache from 0 to below 1")
        for name, value, known in (
            ("split", self.split, ("greedy", "even")),
            ("reserve", self.reserve, ("prompt", "chunk")),
            ("when_full", self.when_full, ("preempt", "wait")),
            ("on_deadlock", self.on_deadlock, ("youngest", "reset_all")),
        ):
            require(value in known, f"{name} is {value!r}; known are {', '.join(known)}")
        if self.token_budget < self.max_num_seqs:
            self._small_budget()

    def _small_budget(self) -> None:
        warnings.warn(
            f"token_budget {self.token_budget} is below max_num_seqs {self.max_num_seqs}: with more than "
            f"{self.token_budget} sequences decoding the later ones starve, and only that many can run; "
            "raise the budget or lower max_num_seqs",
            stacklevel=4,
        )

    @property
    def name(self) -> str:
        return "token-budget"

    def decide(self, observation: Observation) -> StepPlan:
        """Decodes, then pieces of admitted prompts, then new prompts in their order."""
        chunks, preempted = self._fill(observation, observation.running, observation.free_blocks, admit=True)
        if not chunks and observation.running and len(preempted) < len(observation.running):
            return self._break_deadlock(observation)
        return StepPlan(tuple(chunks), tuple(preempted))

    def _fill(
        self, observation: Observation, running: SequenceOf[Sequence], free: int, *, admit: bool
    ) -> tuple[list[Chunk], list[int]]:
        size = observation.block_size
        budget = self.token_budget
        chunks: list[Chunk] = []
        preempted: list[int] = []
        prompts: list[Sequence] = []  # admitted, with more than one token missing
        decodes: list[Sequence] = []
        need = 0  # blocks for the next token of every decode
        promised = 0  # blocks set aside for admitted prompts, not held yet
        whole = self.reserve == "prompt"
        for seq in running:
            known = seq.known
            if known - seq.computed == 1 and known > seq.prompt_len:
                decodes.append(seq)
                if known > seq.blocks * size:
                    need += 1
            else:
                prompts.append(seq)
                if whole:
                    promised += max(0, -(-known // size) - seq.blocks)
        if need <= free - promised and len(decodes) <= budget:
            chunks = [Chunk(seq.seq, seq.computed, 1) for seq in decodes]
            free -= need
        elif self.when_full == "preempt":
            chunks, preempted, free, promised = self._decode_scarce(running, size, free, promised, budget)
            if preempted:
                gone = set(preempted)
                prompts = [seq for seq in prompts if seq.seq not in gone]
        else:
            for seq in in_turn(decodes)[:budget]:
                want = 1 if seq.known > seq.blocks * size else 0
                if want > free:
                    break
                free -= want
                chunks.append(Chunk(seq.seq, seq.computed, 1))
        room = budget - len(chunks)
        if room <= 0 or not (prompts or observation.waiting):
            return chunks, preempted
        if self.split == "even":
            room = self._even(room, prompts, observation)
        share = Share(room) if self.pace is None else self.pace.share(room, decodes)
        if len(prompts) > 1:
            prompts.sort(key=rank)
        for seq in prompts:
            length = share.piece(seq.computed, seq.known - seq.computed)
            if length <= 0:
                return chunks, preempted
            if self.dynamic is not None:
                length = min(length, self.dynamic.limit(seq.computed))
            want = -(-(seq.computed + length) // size) - seq.blocks
            if want > free:
                length = (free + seq.blocks) * size - seq.computed
                want = free
                if length <= 0:
                    if whole:
                        continue
                    return chunks, preempted
            if want > 0:
                free -= want
                promised -= want if whole else 0
            share.take(seq.computed, length)
            chunks.append(Chunk(seq.seq, seq.computed, length))
        if admit and not preempted and share.tokens > 0:
            seats = self.max_num_seqs - len(running)
            keep = int(self.watermark * observation.total_blocks) if chunks else 0
            self._admit(observation, chunks, free - max(0, promised), share, seats, keep)
        return chunks, preempted

    def _admit(
        self, observation: Observation, chunks: list[Chunk], free: int, share: Share, seats: int, keep: int
    ) -> None:
        """New prompts in their order, until time, memory or seats end; the first that does not fit ends it."""
        size = observation.block_size
        whole = self.reserve == "prompt"
        for seq in observation.waiting:
            computed = seq.computed
            length = share.piece(computed, seq.known - computed)
            if length <= 0 or seats <= 0 or not share.admits(seq.known):
                return
            if self.dynamic is not None:
                length = min(length, self.dynamic.limit(computed))
            want = -(-(seq.known if whole else computed + length) // size) - seq.blocks
            if want > free - keep:
                if whole:
                    return
                length = (free - keep + seq.blocks) * size - computed
                if length <= 0:
                    return
                want = free - keep
            free -= max(0, want)
            share.take(computed, length)
            seats -= 1
            keep = keep or int(self.watermark * observation.total_blocks)
            chunks.append(Chunk(seq.seq, computed, length))

    def _decode_scarce(
        self, running: SequenceOf[Sequence], size: int, free: int, promised: int, budget: int
    ) -> tuple[list[Chunk], list[int], int, int]:
        """Decodes in rank when blocks or budget are short: the last in rank makes room, it may be the one that asks."""
        queue = in_turn(running)
        chunks: list[Chunk] = []
        preempted: list[int] = []
        index = 0
        while index < len(queue) and len(chunks) < budget:
            seq = queue[index]
            if not seq.decoding:
                index += 1
                continue
            want = 1 if seq.known > seq.blocks * size else 0
            while want > free - promised and len(queue) > index:
                victim = queue.pop()
                preempted.append(victim.seq)
                free += victim.blocks
                if not victim.decoding and self.reserve == "prompt":
                    promised -= max(0, -(-victim.known // size) - victim.blocks)
            if index < len(queue):
                free -= want
                chunks.append(Chunk(seq.seq, seq.computed, 1))
                index += 1
        return chunks, preempted, free, promised

    def _even(self, room: int, prompts: list[Sequence], observation: Observation) -> int:
        """Prompt tokens for this step so that all that wait are spread evenly over the fewest steps."""
        total = sum(seq.known - seq.computed for seq in prompts)
        enough = room * 64  # beyond this many steps an even share differs from the room by less than a tile
        for seq in observation.waiting:
            total += seq.known - seq.computed
            if total > enough:
                return room
        if total <= room:
            return room
        steps = -(-total // room)
        share = -(-total // steps)
        return min(room, -(-share // self.tile) * self.tile)

    def _break_deadlock(self, observation: Observation) -> StepPlan:
        """Sequences hold memory, none can move: release some, so that the first in rank goes on."""
        queue = in_turn(observation.running)
        if self.on_deadlock == "reset_all":
            return StepPlan((), tuple(seq.seq for seq in reversed(queue)))
        free = observation.free_blocks
        released: list[int] = []
        while len(queue) > 1:
            victim = queue.pop()
            released.append(victim.seq)
            free += victim.blocks
            chunks, preempted = self._fill(observation, queue, free, admit=False)
            if chunks:
                return StepPlan(tuple(chunks), tuple(released + preempted))
        return StepPlan()
