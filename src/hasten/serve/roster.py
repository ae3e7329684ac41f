"""Who waits and who runs: the order of the waiting, the blocks of the running, and what each has computed.

Invariant: a sequence either waits (in order of priority, preempted ones first), or runs and holds blocks, or follows a
sequence with the same prompt until that has computed it.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence

from hasten.errors import EngineError, OutOfBlocksError
from hasten.language.cache import BlockPool
from hasten.language.speculate.proposal import Proposal
from hasten.serve.batch import Chunk, ChunkKind
from hasten.serve.layout import BatchLayout
from hasten.serve.request import Sequence as Request
from hasten.serve.request import Status
from hasten.serve.track import Track, Work

__all__ = ["Roster"]

_KNOWING = 8
"""Sequences at the head of the queue for whom the cache is asked what it has of their prompt."""


class Roster:
    """The sequences of an engine."""

    def __init__(self, pool: BlockPool, layout: BatchLayout) -> None:
        self.pool = pool
        self.layout = layout
        self.tracks: dict[int, Track] = {}
        """all that have not ended, by number"""
        self.running: dict[int, Request] = {}
        """those that hold blocks"""
        self.version = 0
        """changes when the cache learns a prefix"""
        self._waiting: list[Track] = []
        self._queue: list[Request] = []  # ``_waiting`` as the policy sees it; rebuilt when stale
        self._stale = False

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no blocks."""
        return len(self.tracks) - len(self.running)

    def queue(self) -> list[Request]:
        """The waiting sequences in order; the first few know what the cache would give them now."""
        waiting = self._waiting
        if self._stale:
            self._queue = [track.request for track in waiting]
            self._stale = False
        for track in waiting[:_KNOWING]:
            if track.version != self.version:
                track.version = self.version
                track.request.computed = self._match(track)
        return self._queue

    def _match(self, track: Track) -> int:
        if track.prompt_logprobs is not None:  # every prompt token must be computed to see its logits
            return 0
        if track.names is None:
            track.names = self.pool.names(track.tokens[: track.request.known])
        return self.pool.match_names(track.names)

    def enqueue(self, track: Track) -> None:
        """Let a sequence wait, at the place of its rank."""
        track.version = -1
        track.names = None
        insort(self._waiting, track, key=lambda t: t.rank)
        self._stale = True

    def follow(self, track: Track, leader: Track) -> None:
        """Let a sequence wait until ``leader`` has computed the prompt of both."""
        if leader.followers is None:
            leader.followers = []
        leader.followers.append(track)

    def release_followers(self, track: Track) -> None:
        """The prompt is computed: those who waited for it queue up."""
        followers, track.followers = track.followers, None
        for follower in followers or ():
            self.enqueue(follower)

    def preempt(self, seq: int) -> None:
        """Take a running sequence's blocks and let it wait again, before those that never ran."""
        track = self.tracks[seq]
        request = track.request
        self.pool.free(seq)
        self.layout.close(track.slot)
        del self.running[seq]
        request.computed = request.blocks = 0
        request.status = Status.WAITING
        request.preemptions += 1
        track.rank = (request.priority, False, request.due, seq)
        self.enqueue(track)

    def prepare(self, chunks: Sequence[Chunk], now: float, guesses: dict[int, Proposal]) -> list[Work]:
        """Admit and give blocks; what is left of the plan as work.

        Prefixes of all admitted sequences are taken before any block is given, so that no gift evicts a prefix that
        the plan counted on. A sequence for whose guesses there is no room loses them (also in ``guesses``).
        """
        work: list[Work] = []
        tracks, size = self.tracks, self.pool.block_size
        for chunk in chunks:
            track = tracks[chunk.seq]
            request = track.request
            start = chunk.start
            if request.status is Status.WAITING:
                start = self._admit(track, now)
            verifies = chunk.kind is ChunkKind.VERIFY
            work.append((track, start, start + chunk.length if verifies else min(start + chunk.length, request.known)))
        short = False
        for index, (track, _, end) in enumerate(work):
            request = track.request
            if end > request.blocks * size:
                try:
                    self._grow(track, end)
                except OutOfBlocksError:  # a shared prefix took free blocks that the plan counted twice
                    if guesses.pop(request.seq, None) is not None:  # go on without the guesses, if that helps
                        end = request.known
                        work[index] = (track, request.computed, end)
                        if end <= request.blocks * size or self.pool.can_grow(request.seq, end):
                            self._grow(track, end)
                            continue
                    short = True
                    work[index] = (track, 0, 0)
        if short:
            work = [item for item in work if item[2] > item[1]]
        return work

    def _admit(self, track: Track, now: float) -> int:
        request = track.request
        tokens = () if track.prompt_logprobs is not None else track.tokens[: request.known]
        found = self.pool.open(request.seq, tokens)
        self._waiting.remove(track)
        self._stale = True
        track.slot = self.layout.open()
        request.status = Status.RUNNING
        request.computed = found
        table = self.pool.table(request.seq)
        request.blocks = len(table)
        if table:
            self.layout.extend(track.slot, 0, table)
        if request.first_scheduled is None:
            request.first_scheduled = now
            track.cached = track.highest = found
        self.running[request.seq] = request
        return found

    def _grow(self, track: Track, length: int) -> None:
        request = track.request
        held = request.blocks
        self.pool.grow(request.seq, length)
        table = self.pool.table(request.seq)
        request.blocks = len(table)
        self.layout.extend(track.slot, held, table[held:])

    def account(self, work: list[Work]) -> int:
        """Note what a step has computed; returns how many of those tokens had been computed before."""
        pool, again = self.pool, 0
        for track, start, end in work:
            request = track.request
            request.computed = end
            if start < track.highest:
                repeated = min(end, track.highest) - start
                track.recomputed += repeated
                again += repeated
            if end > track.highest:
                track.highest = end
            if pool.needs_commit(request.seq, end):
                pool.commit(request.seq, track.tokens[:end])
                self.version += 1
        return again

    def leave(self, track: Track) -> None:
        """A sequence ends: its blocks are free, and one of those that followed it takes the lead."""
        request = track.request
        seq = request.seq
        if request.status is Status.RUNNING:
            self.pool.free(seq)
            self.layout.close(track.slot)
            del self.running[seq]
        elif track in self._waiting:
            self._waiting.remove(track)
            self._stale = True
        else:  # it waits behind the sequence it follows
            for leader in self.tracks.values():
                if leader.followers and track in leader.followers:
                    leader.followers.remove(track)
        del self.tracks[seq]
        request.status = Status.FINISHED
        request.blocks = 0
        if track.followers:
            heir, *rest = track.followers  # the next one computes the prompt for the others
            track.followers = None
            heir.followers = rest or None
            self.enqueue(heir)

    def check_integrity(self) -> None:
        """Raise :class:`~hasten.errors.CacheError` or ``EngineError`` unless books, tables and sequences agree."""
        pool = self.pool
        pool.check_integrity()
        for seq, request in self.running.items():
            track = self.tracks.get(seq)
            if track is None or request.status is not Status.RUNNING:
                raise EngineError(f"sequence {seq} runs and is {request.status.value}")
            if len(pool.table(seq)) != request.blocks:
                raise EngineError(f"sequence {seq} says {request.blocks} blocks, the pool {len(pool.table(seq))}")
            if request.computed >= request.known or request.computed > request.blocks * pool.block_size:
                raise EngineError(f"sequence {seq} has {request.computed} of {request.known} tokens computed")
        held = sum(len(t.followers or ()) for t in self.tracks.values())
        if len(self.running) + len(self._waiting) + held != len(self.tracks):
            raise EngineError(f"{len(self.tracks)} sequences, {len(self.running)} run, {len(self._waiting)} wait")
        if not self.tracks and pool.num_free != pool.num_blocks:
            raise EngineError(f"no sequence is left and {pool.num_blocks - pool.num_free} blocks are held")
