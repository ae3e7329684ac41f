"""The engine: runs what a policy decides on a real model.

One step: observe, decide, preempt, give blocks, one ragged forward, sample, hand out. There are no phases: every
sequence has known tokens and computed tokens, and the chunk that lets the second reach the first yields a new token.
Invariant: after every step the block pool is whole and holds only blocks of running sequences.

A request's life: ``add`` puts it into ``waiting``; the policy admits it by giving it a chunk, and it takes the
blocks of any prefix that the cache knows; chunks follow until prompt and answer are computed; it ends by a stop
token, its length, ``cancel`` or an error, and its blocks are free at once.
"""

from __future__ import annotations

import os
from bisect import insort
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from hasten.budget import SLO
from hasten.clock import Clock, MonotonicClock
from hasten.errors import (
    ConfigurationError,
    ContextLengthError,
    EngineError,
    InvalidRequestError,
    ModelLoadError,
    OutOfBlocksError,
)
from hasten.language.cache import BlockPool
from hasten.language.forks import Fork
from hasten.language.ragged import RaggedBatch
from hasten.language.sampling import Sampled, Sampler, SamplingParams, SamplingState, top_logprobs
from hasten.language.speculate.proposal import Host, Proposal, Proposer
from hasten.language.speculate.verify import accept_chain, accept_path
from hasten.serve.batch import Chunk, ChunkKind, Observation, StepPlan, blocks_for
from hasten.serve.guess_costs import SpeculationStats, StepTimes
from hasten.serve.kvstore import PrefixStore
from hasten.serve.layout import BatchLayout
from hasten.serve.metrics import RequestRecord
from hasten.serve.output import AnswerText, Completion, Output, Timing
from hasten.serve.policy.base import Policy
from hasten.serve.policy.speculation import SpeculationPolicy
from hasten.serve.request import FinishReason, Status
from hasten.serve.request import Sequence as Request
from hasten.serve.speculation import Candidate, Speculator
from hasten.serve.stats import EngineStats

__all__ = ["Engine"]

_BRANCHES = -1
"""the "sequence" whose blocks are the pages of trees of guesses, for the length of one step"""
_DEFAULT_CACHE = 1 << 30
"""bytes of the cache where nobody chose its size, at most"""


def _tokenizer_of(model: Any) -> Any:
    """The model's tokenizer, or None: a model without one is served by token ids."""
    try:
        return getattr(model, "tokenizer", None)
    except ModelLoadError:
        return None


class _Track:
    """Everything the engine keeps of one sequence; the policy sees ``request`` only."""

    __slots__ = (
        "cached",
        "followers",
        "highest",
        "names",
        "prompt_logprobs",
        "rank",
        "recomputed",
        "request",
        "slot",
        "state",
        "tokens",
        "version",
    )

    def __init__(self, request: Request, state: SamplingState, prompt: Sequence[int] | np.ndarray) -> None:
        self.request = request
        self.state = state
        room = request.prompt_len + min(state.params.max_tokens, 64)
        self.tokens = np.empty(room, dtype=np.int64)
        self.tokens[: request.prompt_len] = prompt
        self.slot = -1
        self.rank: tuple[int, bool, float, int] = (request.priority, True, request.due, request.seq)
        self.version = -1
        self.names: list[bytes] | None = None
        self.cached = 0
        self.highest = 0
        self.recomputed = 0
        self.followers: list[_Track] | None = None
        wanted = state.params.prompt_logprobs is not None
        self.prompt_logprobs: list[Any] | None = [None] if wanted else None

    def append(self, token: int) -> None:
        known = self.request.known
        if known == self.tokens.shape[0]:
            self.tokens = np.concatenate([self.tokens, np.empty_like(self.tokens)])
        self.tokens[known] = token
        self.request.known = known + 1

    def foresee(self, tokens: Sequence[int]) -> None:
        """Write tokens behind the known ones, before they are known, so that their block can be named."""
        known, end = self.request.known, self.request.known + len(tokens)
        while end > self.tokens.shape[0]:
            self.tokens = np.concatenate([self.tokens, np.empty_like(self.tokens)])
        self.tokens[known:end] = tokens

    def timing(self) -> Timing:
        request = self.request
        times = request.token_times
        return Timing(
            arrival=request.arrival,
            first_scheduled=request.first_scheduled,
            first_token=times[0] if times else None,
            last_token=times[-1] if times else None,
            prompt_tokens=request.prompt_len,
            output_tokens=len(times),
            cached_tokens=self.cached,
            preemptions=request.preemptions,
        )


class Engine:
    """Serves sequences with one model in one thread.

    >>> engine = Engine(model, policy=make("stall-free", token_budget=256))          # doctest: +SKIP
    >>> seq = engine.add([1, 2, 3], SamplingParams(max_tokens=8, temperature=0.0))   # doctest: +SKIP
    >>> while engine.has_work:                                                       # doctest: +SKIP
    ...     for output in engine.step():
    ...         print(output.seq, output.token, output.finish)

    Not thread-safe: one loop calls ``add``, ``cancel`` and ``step`` in turn. An ``Output`` is the caller's to keep. An
    exception out of the model's forward leaves the engine unusable; the sequences in it are lost.
    """

    def __init__(
        self,
        model: Any,
        policy: Policy | None = None,
        num_blocks: int | None = None,
        block_size: int = 16,
        clock: Clock | None = None,
        max_num_seqs: int = 128,
        deterministic: bool = False,
        *,
        seed: int | None = None,
        max_records: int = 100_000,
        prefix_sharing: bool = True,
        proposer: Proposer | None = None,
        speculation: SpeculationPolicy | None = None,
        kv_store: PrefixStore | None = None,
    ) -> None:
        """``model``: a language model, or an executor alone. ``policy``: by default stall-free with a budget of 512
        tokens.

        ``num_blocks``: by default as many as ``max_num_seqs`` full contexts need, within 1 GiB. ``deterministic``
        insists on an executor whose results do not depend on the rest of the batch. ``seed`` fixes what requests
        without a seed draw. ``max_records``: how many finished requests ``records`` keeps. ``proposer`` guesses tokens
        and ``speculation`` says how many (by goodput where it is left out); no token changes by it. ``kv_store`` keeps
        prefixes beyond the life of the engine.
        """
        self.model = model
        self.executor = getattr(model, "executor", model)
        self.tokenizer = _tokenizer_of(model)
        self.clock: Clock = clock or MonotonicClock()
        if policy is None:
            from hasten.serve.policy.registry import make

            policy = make("stall-free", token_budget=max(512, max_num_seqs), max_num_seqs=max_num_seqs)
        self.policy = policy
        self.block_size = block_size
        self.max_context = int(self.executor.max_context)
        self.vocab_size = int(self.executor.vocab_size)
        most = blocks_for(self.max_context, block_size)
        if num_blocks is None:
            per_block = max(1, int(getattr(self.executor, "bytes_per_token", 1))) * block_size
            num_blocks = max(most, min(most * max_num_seqs, _DEFAULT_CACHE // per_block))
        if num_blocks < 1:
            raise ConfigurationError(f"num_blocks is {num_blocks}; the cache needs at least one block")
        if deterministic and not getattr(self.executor, "deterministic", False):
            raise ConfigurationError("the executor is not deterministic; load the model with deterministic=True")
        self.pool = BlockPool(num_blocks, block_size, prefix_sharing=prefix_sharing)
        self.cache = self.executor.new_cache(num_blocks, block_size)
        self.max_model_len = min(self.max_context, num_blocks * block_size)
        """tokens of prompt and answer together that one sequence may have"""
        config = getattr(model, "config", None)
        eos = tuple(getattr(self.tokenizer, "eos_token_ids", ()) or getattr(config, "eos_token_ids", ()) or ())
        self.eos_token_ids: tuple[int, ...] = eos
        self.counters = EngineStats()
        self.records: deque[RequestRecord] = deque(maxlen=max_records)
        """finished requests, the newest last"""
        self._speculator: Speculator | None = None
        if proposer is not None:
            times = StepTimes.measure(self.executor, self.clock, context=min(256, self.max_model_len // 2))
            self._speculator = Speculator(proposer, speculation, times=times)
            if hasattr(proposer, "attach"):
                proposer.attach(Host(self.executor, self.cache, self.pool.table, block_size, num_blocks))
        self.pool.open(_BRANCHES, ())
        self._store = kv_store
        self._sampler = Sampler(self.vocab_size)
        self._layout = BatchLayout(min(most, num_blocks))
        self._tracks: dict[int, _Track] = {}
        self._waiting: list[_Track] = []
        self._running: dict[int, Request] = {}
        self._next = 0
        self._seed = int.from_bytes(os.urandom(8), "little") if seed is None else seed
        self._grammars: Any = None
        self._held: list[Output] = []
        self._idle_steps = 0
        self._queue: list[Request] = []  # ``_waiting`` as the policy sees it; rebuilt when stale
        self._queue_stale = False
        self._version = 0  # changes when the cache learns a prefix

    # ---- requests -------------------------------------------------------------------------------------------------

    def add(
        self,
        prompt_tokens: Sequence[int],
        params: SamplingParams | None = None,
        arrival: float | None = None,
        priority: int = 0,
        slo: SLO | None = None,
        *,
        follow: int | None = None,
        grammar: Any = None,
    ) -> int:
        """Take a request; returns the number of its sequence.

        ``arrival`` (seconds on the engine's clock) is now by default. ``follow`` names a sequence with the same
        prompt: the new one waits until that has computed the prompt, and shares its blocks. ``grammar`` is what
        ``compile_grammar`` made of ``params.grammar``, where that was done beforehand. Raises
        :class:`~hasten.errors.InvalidRequestError` and :class:`~hasten.errors.ContextLengthError`; nothing changed
        then.
        """
        params = params or SamplingParams()
        self.check(prompt_tokens, params)
        if grammar is None:
            grammar = self.compile_grammar(params)
        seq = self._next
        self._next += 1
        seed = params.seed if params.seed is not None else self._seed + seq * 0x9E3779B97F4A7C15
        state = SamplingState(params, seed, prompt_tokens, self.vocab_size, self.eos_token_ids, grammar)
        request = Request(
            seq=seq,
            arrival=self.clock.now() if arrival is None else arrival,
            prompt_len=len(prompt_tokens),
            max_tokens=params.max_tokens,
            priority=priority,
            slo=slo,
        )
        track = _Track(request, state, prompt_tokens)
        self._tracks[seq] = track
        if self._store is not None and params.prompt_logprobs is None:
            self._fetch(track, self._store)
        leader = self._tracks.get(follow) if follow is not None else None
        if leader is not None and leader.request.generated == 0:
            if leader.followers is None:
                leader.followers = []
            leader.followers.append(track)
        else:
            self._enqueue(track)
        return seq

    def check(self, prompt_tokens: Sequence[int], params: SamplingParams) -> None:
        """Raise what ``add`` would raise for this prompt."""
        length = len(prompt_tokens)
        if length == 0:
            raise InvalidRequestError("the prompt has no tokens; it needs at least one", "prompt")
        if length + max(1, params.max_tokens) > self.max_model_len:
            raise ContextLengthError(
                f"the prompt has {length} tokens and max_tokens is {params.max_tokens}; this model takes "
                f"{self.max_model_len} tokens of both together: shorten the prompt or lower max_tokens",
                "prompt" if length >= self.max_model_len else "max_tokens",
            )
        low, high = min(prompt_tokens), max(prompt_tokens)
        if low < 0 or high >= self.vocab_size:
            bad = low if low < 0 else high
            raise InvalidRequestError(
                f"the prompt holds the token {bad}; ids of this model are 0 to {self.vocab_size - 1}", "prompt"
            )
        params.check_vocabulary(self.vocab_size)

    def compile_grammar(self, params: SamplingParams) -> Any:
        """The state of ``params.grammar``, None without one; may run in another thread, one call at a time."""
        if params.grammar is None:
            return None
        if self.tokenizer is None:
            raise InvalidRequestError("a grammar needs a model with a tokenizer", "response_format")
        if self._grammars is None:
            from hasten.language.structured import GrammarCompiler

            self._grammars = GrammarCompiler(self.tokenizer, self.vocab_size)
        return self._grammars.start(params.grammar)

    def cancel(self, seq: int, reason: FinishReason = FinishReason.ABORT) -> bool:
        """End a sequence now; its blocks are free when this returns. False if it has ended already.

        ``reason`` is what the record says: ``STOP`` when the caller met a stop string.
        """
        track = self._tracks.get(seq)
        if track is None:
            return False
        self._held = [o for o in self._held if o.seq != seq]
        self._finish(track, reason)
        return True

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._tracks or self._held)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that do not."""
        return len(self._tracks) - len(self._running)

    # ---- the step -------------------------------------------------------------------------------------------------

    def step(self) -> list[Output]:
        """One iteration; what it brought, in the order of the batch. Empty when there was nothing to do."""
        outputs, self._held = self._held, []
        if not self._tracks:
            return outputs
        begin = self.clock.now()
        plan = self.policy.decide(
            Observation(
                now=begin,
                waiting=self._queue_now(),
                running=list(self._running.values()),
                free_blocks=self.pool.num_free,
                total_blocks=self.pool.num_blocks,
                block_size=self.block_size,
            )
        )
        for seq in plan.preempt:
            self._preempt(seq)
        guesses: dict[int, Proposal] = {}
        if self._speculator is not None and plan.chunks and self._speculator.willing(len(plan.chunks)):
            plan, guesses = self._guess(plan, self._speculator)
        guessed = self.clock.now() if self._speculator is not None else begin
        work = self._prepare(plan.chunks, begin, guesses) if plan.chunks else []
        forks = self._branch(work, guesses) if guesses else {}
        if not work:
            self._note_idle(bool(plan.preempt), outputs)
            return outputs
        self._idle_steps = 0
        batch, ready, probes = self._build(work, guesses, forks)
        logits = self.executor.step(batch, self.cache)
        if probes:
            self._read_prompt_logprobs(work, logits, probes)
        if guesses:
            self._verify(work, ready, logits, guesses, forks, outputs)
        else:
            self._account(work)
            if ready:
                picked = logits if len(ready) == logits.shape[0] else logits[[row for _, row in ready]]
                tracks = [track for track, _ in ready]
                sampled = self._sampler.sample(picked, [track.state for track in tracks])
                self._hand_out(tracks, list(range(len(tracks))), sampled, outputs)
        self.counters.iterations += 1
        self.counters.iteration_tokens.add(batch.num_tokens)
        if self._speculator is not None and len(ready) == len(work):
            end = self.clock.now()
            self._speculator.learn_step(
                batch.num_tokens,
                end - guessed,
                len(outputs),
                end - begin,
                guessed=sum(len(p.tokens) for p in guesses.values()),
            )
        return outputs

    # ---- speculation ----------------------------------------------------------------------------------------------

    def _guess(self, plan: StepPlan, speculator: Speculator) -> tuple[StepPlan, dict[int, Proposal]]:
        """Guesses for the decodes of a plan, where that pays."""
        candidates = []
        free = self.pool.num_free
        for chunk in plan.chunks:
            track = self._tracks[chunk.seq]
            request = track.request
            free -= max(0, blocks_for(chunk.start + chunk.length, self.block_size) - request.blocks)
            if chunk.length != 1 or not request.decoding or request.status is not Status.RUNNING:
                continue
            left = request.max_tokens - request.generated - 1
            limit = min(left, self.max_model_len - request.known - 1) if track.state.grammar is None else 0
            candidates.append(Candidate(chunk, request, track.tokens[: request.known], limit, track.state))
        return speculator.extend(plan, candidates, max(0, free), self.block_size, self.clock)

    def _branch(self, work: list[tuple[_Track, int, int]], guesses: dict[int, Proposal]) -> dict[int, Fork]:
        """Pages for the branches of trees, out of the free blocks; a tree that finds none is left out."""
        forks: dict[int, Fork] = {}
        pool = self.pool
        held = pool.table(_BRANCHES)

        def take() -> int:
            pool.grow(_BRANCHES, (len(held) + 1) * self.block_size)
            return held[-1]

        for index, (track, start, _) in enumerate(work):
            request = track.request
            proposal = guesses.get(request.seq)
            if proposal is None or proposal.parents is None:
                continue
            fork = Fork(request.known, pool.table(request.seq), self.block_size, take)
            before = len(held)
            try:
                for parent in proposal.parents:
                    fork.add(parent)
            except OutOfBlocksError:
                pool.shrink(_BRANCHES, before * self.block_size)
                del guesses[request.seq]
                work[index] = (track, start, request.known)
            else:
                forks[request.seq] = fork
        return forks

    def _verify(
        self,
        work: list[tuple[_Track, int, int]],
        ready: list[tuple[_Track, int]],
        logits: torch.Tensor,
        guesses: dict[int, Proposal],
        forks: dict[int, Fork],
        outputs: list[Output],
    ) -> None:
        """Choose a token at every wanted row, keep the guesses that equal the choices, and hand out."""
        states: list[SamplingState] = []
        spans: list[tuple[int, int]] = []
        rows: list[int] = []
        for track, row in ready:
            proposal = guesses.get(track.request.seq)
            count = 0 if proposal is None else len(proposal.tokens)
            spans.append((len(rows), count))
            for place in range(count + 1):
                states.append(track.state.ahead(proposal.branch(place - 1)) if proposal is not None else track.state)
                rows.append(row + place)
        sampled = self._sampler.sample(logits if len(rows) == logits.shape[0] else logits[rows], states)
        tracks: list[_Track] = []
        kept: list[int] = []
        for (track, _), (first, count) in zip(ready, spans, strict=True):
            path: list[int] = []
            proposal = guesses.get(track.request.seq)
            if proposal is not None:
                chosen = sampled.tokens[first : first + count + 1]
                if proposal.parents is None:
                    path = list(range(accept_chain(proposal.tokens, chosen)))
                else:
                    path = accept_path(proposal.tokens, proposal.parents, chosen)
                if sampled.finite is not None:  # nothing stands behind a row that says nothing
                    sound = [sampled.finite[first], *(sampled.finite[first + 1 + n] for n in path)]
                    path = path[: sound.index(False)] if False in sound else path
                assert self._speculator is not None
                self._speculator.learn(track.request.seq, proposal, path)
                track.foresee([chosen[0], *(chosen[1 + n] for n in path)])
                if path and track.request.seq in forks:
                    moves = forks[track.request.seq].kept(path[-1], self.pool.table(track.request.seq))
                    self.executor.move(self.cache, moves)
            tracks += [track] * (len(path) + 1)
            kept += [first, *(first + 1 + n for n in path)]
        ends = {id(track): 0 for track, _ in ready}
        for track in tracks:
            ends[id(track)] += 1
        self._account([(t, start, start + ends[id(t)] if t.request.seq in guesses else end) for t, start, end in work])
        self._hand_out(tracks, kept, sampled, outputs)
        for track, _ in ready:
            request = track.request
            if request.seq in guesses and request.status is Status.RUNNING:
                self.pool.shrink(request.seq, request.known)
                request.blocks = len(self.pool.table(request.seq))
        if forks:
            self.pool.shrink(_BRANCHES, 0)

    def _queue_now(self) -> list[Request]:
        """The waiting sequences in order; the first few know what the cache would give them now."""
        waiting = self._waiting
        if self._queue_stale:
            self._queue = [track.request for track in waiting]
            self._queue_stale = False
        for track in waiting[:8]:
            if track.version != self._version:
                track.version = self._version
                track.request.computed = self._match(track)
        return self._queue

    def _match(self, track: _Track) -> int:
        if track.prompt_logprobs is not None:  # every prompt token must be computed to see its logits
            return 0
        if track.names is None:
            track.names = self.pool.names(track.tokens[: track.request.known])
        return self.pool.match_names(track.names)

    def _enqueue(self, track: _Track) -> None:
        track.version = -1
        track.names = None
        insort(self._waiting, track, key=lambda t: t.rank)
        self._queue_stale = True

    def _fetch(self, track: _Track, store: PrefixStore) -> None:
        """Put what the store has of a prompt's prefix into free blocks, where admission finds it."""
        names = self.pool.names(track.tokens[: track.request.known])[: self.pool.num_free]
        for first, kv in store.find(names, self.pool.knows, self.block_size):
            part = names[first : first + store.blocks]
            blocks = [self.pool.adopt(name) for name in part]
            table = [0] * first + [0 if block is None else block for block in blocks]
            for index, block in enumerate(blocks):
                if block is not None:
                    at = index * self.block_size
                    store.place(self.cache, table, kv.cut(at, at + self.block_size))
            self._version += 1

    def _preempt(self, seq: int) -> None:
        track = self._tracks[seq]
        request = track.request
        self.pool.free(seq)
        self._layout.close(track.slot)
        del self._running[seq]
        request.computed = request.blocks = 0
        request.status = Status.WAITING
        request.preemptions += 1
        self.counters.num_preemptions += 1
        track.rank = (request.priority, False, request.due, seq)
        self._enqueue(track)

    def _prepare(
        self, chunks: Sequence[Chunk], now: float, guesses: dict[int, Proposal]
    ) -> list[tuple[_Track, int, int]]:
        """Admit and give blocks; the work as (track, start, end).

        Prefixes of all admitted sequences are taken before any block is given, so that no gift evicts a prefix that
        the plan counted on.
        """
        work: list[tuple[_Track, int, int]] = []
        tracks, size = self._tracks, self.block_size
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

    def _admit(self, track: _Track, now: float) -> int:
        request = track.request
        tokens = () if track.prompt_logprobs is not None else track.tokens[: request.known]
        found = self.pool.open(request.seq, tokens)
        self._waiting.remove(track)
        self._queue_stale = True
        track.slot = self._layout.open()
        request.status = Status.RUNNING
        request.computed = found
        table = self.pool.table(request.seq)
        request.blocks = len(table)
        if table:
            self._layout.extend(track.slot, 0, table)
        if request.first_scheduled is None:
            request.first_scheduled = now
            track.cached = track.highest = found
        self._running[request.seq] = request
        return found

    def _grow(self, track: _Track, length: int) -> None:
        request = track.request
        held = request.blocks
        self.pool.grow(request.seq, length)
        table = self.pool.table(request.seq)
        request.blocks = len(table)
        self._layout.extend(track.slot, held, table[held:])

    def _build(
        self, work: list[tuple[_Track, int, int]], guesses: dict[int, Proposal], forks: dict[int, Fork]
    ) -> tuple[RaggedBatch, list[tuple[_Track, int]], list[tuple[int, int, int]]]:
        """The batch, the tracks that get a token with their rows, and (work, first row, rows) of prompt logprobs."""
        size = self.block_size
        width = blocks_for(max(end for _, _, end in work), size)
        plain = all(end - start == 1 and end == t.request.known and t.prompt_logprobs is None for t, start, end in work)
        if plain:
            ids = [int(track.tokens[start]) for track, start, _ in work]
            starts = [start for _, start, _ in work]
            slots = [track.slot for track, _, _ in work]
            ready = [(track, row) for row, (track, _, _) in enumerate(work)]
            return self._layout.build_decode(ids, starts, slots, width), ready, []
        rows: list[int] = []
        ready = []
        probes: list[tuple[int, int, int]] = []
        at = 0
        for index, (track, start, end) in enumerate(work):
            last = at + end - start
            done = end >= track.request.known
            logs = track.prompt_logprobs
            if logs is not None and len(logs) <= track.request.prompt_len:
                first = max(0, len(logs) - 1 - start)  # the logits at p belong to the token at p + 1
                count = min(end, track.request.prompt_len - 1) - start - first
                if count > 0:
                    probes.append((index, len(rows), count))
                    rows.extend(range(at + first, at + first + count))
            if done:
                ready.append((track, len(rows)))
                rows.extend(range(last - 1 - (end - track.request.known), last))  # with guesses: one more each
            at = last
        pieces = [
            track.tokens[start:end]
            if end <= track.request.known
            else np.concatenate([track.tokens[start : track.request.known], guesses[track.request.seq].tokens])
            for track, start, end in work
        ]
        contexts = [start for _, start, _ in work]
        slots = [track.slot for track, _, _ in work]
        if forks:
            branches = [forks.get(track.request.seq) for track, _, _ in work]
            return self._layout.build_forked(pieces, contexts, slots, rows, width, branches), ready, probes
        return self._layout.build(pieces, contexts, slots, rows, width), ready, probes

    def _account(self, work: list[tuple[_Track, int, int]]) -> None:
        pool = self.pool
        for track, start, end in work:
            request = track.request
            request.computed = end
            if start < track.highest:
                again = min(end, track.highest) - start
                track.recomputed += again
                self.counters.recomputed_tokens += again
            if end > track.highest:
                track.highest = end
            if pool.needs_commit(request.seq, end):
                pool.commit(request.seq, track.tokens[:end])
                self._version += 1

    def _read_prompt_logprobs(
        self, work: list[tuple[_Track, int, int]], logits: torch.Tensor, probes: list[tuple[int, int, int]]
    ) -> None:
        for index, row, count in probes:
            track = work[index][0]
            logs = track.prompt_logprobs
            assert logs is not None
            following = torch.from_numpy(track.tokens[len(logs) : len(logs) + count].copy())
            wanted = [track.state.params.prompt_logprobs or 0] * count
            logs.extend(top_logprobs(logits[row : row + count], following, wanted))

    def _hand_out(self, tracks: list[_Track], rows: list[int], sampled: Sampled, outputs: list[Output]) -> None:
        """Give each track the token of its row; a track that occurs again takes several, until one ends it."""
        now = self.clock.now()
        stats = self.counters
        gaps: list[float] = []
        logprobs, finite = sampled.logprobs, sampled.finite
        for track, index in zip(tracks, rows, strict=True):
            request, state, token = track.request, track.state, sampled.tokens[index]
            if request.status is Status.FINISHED:
                continue
            times = request.token_times
            output = Output(request.seq, token)
            if finite is not None and not finite[index]:
                output.token = None
                output.error = "the model gave no finite logits for this sequence; check the weights and the precision"
                self._finish(track, FinishReason.ERROR, output)
                outputs.append(output)
                continue
            if request.max_tokens == 0:
                self._first_token(track, now, output)
                output.token = None
                self._finish(track, FinishReason.LENGTH, output)
                outputs.append(output)
                continue
            if times:
                gaps.append(now - times[-1])
                times.append(now)
            else:
                times.append(now)
                self._first_token(track, now, output)
                output.timing = track.timing()
            state.observe(token)
            track.append(token)
            if logprobs is not None:
                output.logprobs = logprobs.get(index)
            if token in state.stop_ids and state.generated >= state.params.min_tokens:
                output.stop_token = token
                self._finish(track, FinishReason.STOP, output)
            elif state.generated >= request.max_tokens:
                self._finish(track, FinishReason.LENGTH, output)
            elif state.grammar is not None and state.grammar.done:
                self._finish(track, FinishReason.STOP, output)
            outputs.append(output)
        stats.generation_tokens += len(gaps)
        if gaps:
            stats.itl.add_many(gaps)

    def _first_token(self, track: _Track, now: float, output: Output) -> None:
        request = track.request
        output.prompt_logprobs = track.prompt_logprobs
        self.counters.prompt_tokens += request.prompt_len
        self.counters.generation_tokens += 1 if request.max_tokens else 0
        self.counters.ttft.add(now - request.arrival)
        if request.first_scheduled is not None:
            self.counters.queue.add(request.first_scheduled - request.arrival)
        self._release_followers(track)

    def _release_followers(self, track: _Track) -> None:
        followers, track.followers = track.followers, None
        for follower in followers or ():
            self._enqueue(follower)

    def _finish(self, track: _Track, reason: FinishReason, output: Output | None = None) -> None:
        request = track.request
        seq = request.seq
        if request.status is Status.RUNNING:
            if self._store is not None and reason is not FinishReason.ERROR:
                names = self.pool.names(track.tokens[: request.computed + 1])
                self._store.offer(names, self.cache, self.pool.table(seq))
            self.pool.free(seq)
            self._layout.close(track.slot)
            del self._running[seq]
        elif track in self._waiting:
            self._waiting.remove(track)
            self._queue_stale = True
        else:  # it waits behind the sequence it follows
            for leader in self._tracks.values():
                if leader.followers and track in leader.followers:
                    leader.followers.remove(track)
        del self._tracks[seq]
        if self._speculator is not None:
            self._speculator.forget(seq)
        request.status = Status.FINISHED
        request.blocks = 0
        if track.followers:
            heir, *rest = track.followers  # the next one computes the prompt for the others
            track.followers = None
            heir.followers = rest or None
            self._enqueue(heir)
        times = request.token_times
        error = output.error if output is not None else None
        self.records.append(
            RequestRecord(
                id=str(seq),
                arrival=request.arrival,
                first_scheduled=request.first_scheduled,
                token_times=times,
                prompt_tokens=request.prompt_len,
                output_tokens=len(times),
                preemptions=request.preemptions,
                error=error,
                finish_reason=reason.value,
                recomputed_tokens=track.recomputed,
            )
        )
        stats = self.counters
        stats.finished[reason.value] += 1
        if times:
            stats.e2e.add(times[-1] - request.arrival)
            stats.request_prompt_tokens.add(request.prompt_len)
            stats.request_generation_tokens.add(len(times))
            if len(times) > 1:
                stats.tpot.add((times[-1] - times[0]) / (len(times) - 1))
        if output is not None:
            output.finish = reason
            output.timing = track.timing()

    def _note_idle(self, preempted: bool, outputs: list[Output]) -> None:
        """A policy that never plans anything must not spin for ever."""
        self._idle_steps += 1
        if self._idle_steps > (64 if preempted else 8) and not outputs:
            raise EngineError(
                f"policy {self.policy.name!r} planned nothing {self._idle_steps} times: {self.num_running} running, "
                f"{self.num_waiting} waiting, {self.pool.num_free} blocks free; raise num_blocks"
            )

    def reset(self) -> None:
        """Forget counters, records and cached prefixes, as after a warm-up. ``EngineError`` while sequences live."""
        if self._tracks:
            raise EngineError(f"{len(self._tracks)} sequences live; reset an engine that is idle")
        self.counters = EngineStats()
        if self._speculator is not None:
            self._speculator.reset()
        self.records.clear()
        self.pool.forget_prefixes()
        self.pool.queries = self.pool.hits = 0

    def close(self) -> None:
        """Write what the KV store has taken; without one there is nothing to do."""
        if self._store is not None:
            self._store.close()

    # ---- looking in -----------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Gauges, counters and histograms as plain data, in vLLM's vocabulary (see ``serve.stats``)."""
        snapshot = self.counters.snapshot()
        snapshot["counters"]["prefix_cache_queries"] = self.pool.queries
        snapshot["counters"]["prefix_cache_hits"] = self.pool.hits
        if self._speculator is not None:
            snapshot["counters"].update(self._speculator.stats.counters())
        if self._store is not None:
            snapshot["counters"].update(self._store.counters())
        snapshot["gauges"] = {
            "num_requests_running": self.num_running,
            "num_requests_waiting": self.num_waiting,
            "kv_cache_usage_perc": self.pool.usage,
            "kv_cache_blocks": self.pool.num_blocks,
            "kv_cache_bytes_per_token": int(getattr(self.executor, "bytes_per_token", 0)),
            "kv_cache_bits": {"int8": 8, "bf16": 16}.get(getattr(self.cache, "precision", ""), 32),
        }
        return snapshot

    @property
    def speculation(self) -> SpeculationStats | None:
        """What speculation did so far; None where nothing guesses."""
        return None if self._speculator is None else self._speculator.stats

    def check_integrity(self) -> None:
        """Raise :class:`~hasten.errors.CacheError` or ``EngineError`` unless books, tables and sequences agree."""
        self.pool.check_integrity()
        for seq, request in self._running.items():
            track = self._tracks.get(seq)
            if track is None or request.status is not Status.RUNNING:
                raise EngineError(f"sequence {seq} runs and is {request.status.value}")
            if len(self.pool.table(seq)) != request.blocks:
                raise EngineError(f"sequence {seq} says {request.blocks} blocks, the pool {len(self.pool.table(seq))}")
            if request.computed >= request.known or request.computed > request.blocks * self.block_size:
                raise EngineError(f"sequence {seq} has {request.computed} of {request.known} tokens computed")
        held = sum(len(t.followers or ()) for t in self._tracks.values())
        if len(self._running) + len(self._waiting) + held != len(self._tracks):
            raise EngineError(f"{len(self._tracks)} sequences, {len(self._running)} run, {len(self._waiting)} wait")
        if not self._tracks and self.pool.num_free != self.pool.num_blocks:
            raise EngineError(f"no sequence is left and {self.pool.num_blocks - self.pool.num_free} blocks are held")

    # ---- whole answers --------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Answer all prompts (texts, or lists of tokens) and return the completions in their order.

        Runs until nothing is left to do, so other requests that were added before finish too (their outputs are lost).
        """
        tokens = [self.tokenize(p) if isinstance(p, str) else list(p) for p in prompts]
        choices = [params or SamplingParams()] * len(tokens) if not isinstance(params, Sequence) else list(params)
        if len(choices) != len(tokens):
            raise InvalidRequestError(
                f"{len(tokens)} prompts and {len(choices)} params were given; give one per prompt"
            )
        for prompt, choice in zip(tokens, choices, strict=True):
            self.check(prompt, choice)
        live: dict[int, tuple[Completion, AnswerText | None]] = {}
        out: list[Completion] = []
        for prompt, choice in zip(tokens, choices, strict=True):
            completion = Completion(prompt)
            out.append(completion)
            text = AnswerText(self.tokenizer, choice) if self.tokenizer is not None else None
            live[self.add(prompt, choice)] = (completion, text)
        while live:
            for output in self.step():
                if output.seq in live:
                    self._take(output, live)
        return out

    def _take(self, output: Output, live: dict[int, tuple[Completion, AnswerText | None]]) -> None:
        completion, text = live[output.seq]
        new = [] if output.token is None else [output.token]
        completion.tokens += new
        if output.prompt_logprobs is not None:
            completion.prompt_logprobs = output.prompt_logprobs
        if output.logprobs is not None:
            completion.logprobs.append(output.logprobs)
        if text is not None:
            completion.text += text.push(new, finish=output.finish, stop_token=output.stop_token)
            if text.stopped is not None and output.finish is None:
                self.cancel(output.seq, FinishReason.STOP)
                output.finish = FinishReason.STOP
        if output.finish is not None:
            stopped = text is not None and text.stopped is not None
            completion.finish_reason = "stop" if stopped else output.finish.value
            completion.timing = output.timing
            completion.error = output.error
            del live[output.seq]

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[str]:
        """The answer's text piece by piece; leaving the loop early cancels the request."""
        params = params or SamplingParams()
        if self.tokenizer is None:
            raise ConfigurationError("text needs a model with a tokenizer; use add and step")
        seq = self.add(self.tokenize(prompt) if isinstance(prompt, str) else prompt, params)
        text = AnswerText(self.tokenizer, params)
        try:
            while seq in self._tracks or self._held:
                for output in self.step():
                    if output.seq != seq:
                        continue
                    new = [] if output.token is None else [output.token]
                    piece = text.push(new, finish=output.finish, stop_token=output.stop_token)
                    if piece:
                        yield piece
                    if text.stopped is not None:
                        self.cancel(seq, FinishReason.STOP)
                        return
        finally:
            self.cancel(seq)

    def tokenize(self, text: str) -> list[int]:
        """Tokens of ``text``; raises ``ConfigurationError`` if the model came without a tokenizer."""
        if self.tokenizer is None:
            raise ConfigurationError("text needs a model with a tokenizer; give token ids")
        return list(self.tokenizer.encode(text))
