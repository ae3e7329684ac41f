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
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from hasten.budget import SLO
from hasten.clock import Clock, MonotonicClock
from hasten.errors import (
    ConfigurationError,
    ContextLengthError,
    EngineError,
    InvalidRequestError,
    ModelLoadError,
)
from hasten.language.cache import BlockPool
from hasten.language.sampling import Sampled, Sampler, SamplingParams, SamplingState, top_logprobs
from hasten.language.speculate.proposal import Host, Proposal, Proposer
from hasten.serve import answers
from hasten.serve.assembly import Probe, assemble
from hasten.serve.batch import Observation, blocks_for
from hasten.serve.guess_costs import SpeculationStats, StepTimes
from hasten.serve.guessing import Guessing
from hasten.serve.kvstore import PrefixStore
from hasten.serve.layout import BatchLayout
from hasten.serve.metrics import RequestRecord
from hasten.serve.output import Completion, Output
from hasten.serve.policy.base import Policy
from hasten.serve.policy.speculation import SpeculationPolicy
from hasten.serve.request import FinishReason, Status
from hasten.serve.request import Sequence as Request
from hasten.serve.roster import Roster
from hasten.serve.speculation import Speculator
from hasten.serve.stats import EngineStats
from hasten.serve.track import Track

__all__ = ["Engine"]

_DEFAULT_CACHE = 1 << 30
"""bytes of the cache where nobody chose its size, at most"""


def _tokenizer_of(model: Any) -> Any:
    """The model's tokenizer, or None: a model without one is served by token ids."""
    try:
        return getattr(model, "tokenizer", None)
    except ModelLoadError:
        return None


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
        self._layout = BatchLayout(min(most, num_blocks))
        self._roster = Roster(self.pool, self._layout)
        self._guessing: Guessing | None = None
        if proposer is not None:
            times = StepTimes.measure(self.executor, self.clock, context=min(256, self.max_model_len // 2))
            speculator = Speculator(proposer, speculation, times=times)
            if hasattr(proposer, "attach"):
                proposer.attach(Host(self.executor, self.cache, self.pool.table, block_size, num_blocks))
            self._guessing = Guessing(speculator, self.executor, self.cache, self._roster, self.max_model_len)
        self._store = kv_store
        self._sampler = Sampler(self.vocab_size)
        self._next = 0
        self._seed = int.from_bytes(os.urandom(8), "little") if seed is None else seed
        self._grammars: Any = None
        self._held: list[Output] = []
        self._idle_steps = 0

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
        track = Track(request, state, prompt_tokens)
        self._roster.tracks[seq] = track
        if self._store is not None and params.prompt_logprobs is None:
            self._fetch(track, self._store)
        leader = self._roster.tracks.get(follow) if follow is not None else None
        if leader is not None and leader.request.generated == 0:
            self._roster.follow(track, leader)
        else:
            self._roster.enqueue(track)
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
        track = self._roster.tracks.get(seq)
        if track is None:
            return False
        self._held = [o for o in self._held if o.seq != seq]
        self._finish(track, reason)
        return True

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._roster.tracks or self._held)

    def has_news_of(self, seq: int) -> bool:
        """Whether a step may still bring something for this sequence."""
        return seq in self._roster.tracks or bool(self._held)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._roster.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that do not."""
        return self._roster.num_waiting

    # ---- the step -------------------------------------------------------------------------------------------------

    def step(self) -> list[Output]:
        """One iteration; what it brought, in the order of the batch. Empty when there was nothing to do."""
        outputs, self._held = self._held, []
        if not self._roster.tracks:
            return outputs
        begin = self.clock.now()
        plan = self.policy.decide(
            Observation(
                now=begin,
                waiting=self._roster.queue(),
                running=list(self._roster.running.values()),
                free_blocks=self.pool.num_free,
                total_blocks=self.pool.num_blocks,
                block_size=self.block_size,
            )
        )
        for seq in plan.preempt:
            self._roster.preempt(seq)
            self.counters.num_preemptions += 1
        guesses: dict[int, Proposal] = {}
        guessing = self._guessing
        if guessing is not None and plan.chunks and guessing.speculator.willing(len(plan.chunks)):
            plan, guesses = guessing.extend(plan, self.clock)
        guessed = self.clock.now() if guessing is not None else begin
        work = self._roster.prepare(plan.chunks, begin, guesses) if plan.chunks else []
        forks = guessing.branch(work, guesses) if guessing is not None and guesses else {}
        if not work:
            self._note_idle(bool(plan.preempt), outputs)
            return outputs
        self._idle_steps = 0
        step = assemble(self._layout, work, guesses, forks, self.block_size)
        logits = self.executor.step(step.batch, self.cache)
        for probe in step.probes:
            self._read_prompt_logprobs(probe, logits)
        if guessing is not None and guesses:
            verdict = guessing.judge(work, step.ready, logits, guesses, forks, self._sampler)
            self.counters.recomputed_tokens += self._roster.account(verdict.work)
            self._hand_out(verdict.tracks, verdict.rows, verdict.sampled, outputs)
            guessing.settle(step.ready, guesses, forks)
        else:
            self.counters.recomputed_tokens += self._roster.account(work)
            if step.ready:
                tracks = [track for track, _ in step.ready]
                picked = logits if len(tracks) == logits.shape[0] else logits[[row for _, row in step.ready]]
                sampled = self._sampler.sample(picked, [track.state for track in tracks])
                self._hand_out(tracks, list(range(len(tracks))), sampled, outputs)
        self.counters.iterations += 1
        self.counters.iteration_tokens.add(step.batch.num_tokens)
        if guessing is not None and len(step.ready) == len(work):
            end = self.clock.now()
            guessing.speculator.learn_step(
                step.batch.num_tokens,
                end - guessed,
                len(outputs),
                end - begin,
                guessed=sum(len(p.tokens) for p in guesses.values()),
            )
        return outputs

    def _fetch(self, track: Track, store: PrefixStore) -> None:
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
            self._roster.version += 1

    def _read_prompt_logprobs(self, probe: Probe, logits: torch.Tensor) -> None:
        logs = probe.track.prompt_logprobs
        assert logs is not None
        following = torch.from_numpy(probe.track.tokens[len(logs) : len(logs) + probe.count].copy())
        wanted = [probe.track.state.params.prompt_logprobs or 0] * probe.count
        logs.extend(top_logprobs(logits[probe.row : probe.row + probe.count], following, wanted))

    def _hand_out(self, tracks: list[Track], rows: list[int], sampled: Sampled, outputs: list[Output]) -> None:
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

    def _first_token(self, track: Track, now: float, output: Output) -> None:
        request = track.request
        output.prompt_logprobs = track.prompt_logprobs
        self.counters.prompt_tokens += request.prompt_len
        self.counters.generation_tokens += 1 if request.max_tokens else 0
        self.counters.ttft.add(now - request.arrival)
        if request.first_scheduled is not None:
            self.counters.queue.add(request.first_scheduled - request.arrival)
        self._roster.release_followers(track)

    def _finish(self, track: Track, reason: FinishReason, output: Output | None = None) -> None:
        request = track.request
        seq = request.seq
        if self._store is not None and request.status is Status.RUNNING and reason is not FinishReason.ERROR:
            names = self.pool.names(track.tokens[: request.computed + 1])
            self._store.offer(names, self.cache, self.pool.table(seq))
        self._roster.leave(track)
        if self._guessing is not None:
            self._guessing.speculator.forget(seq)
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
        if self._roster.tracks:
            raise EngineError(f"{len(self._roster.tracks)} sequences live; reset an engine that is idle")
        self.counters = EngineStats()
        if self._guessing is not None:
            self._guessing.speculator.reset()
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
        if self._guessing is not None:
            snapshot["counters"].update(self._guessing.speculator.stats.counters())
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
        return None if self._guessing is None else self._guessing.speculator.stats

    def check_integrity(self) -> None:
        """Raise :class:`~hasten.errors.CacheError` or ``EngineError`` unless books, tables and sequences agree."""
        self._roster.check_integrity()

    # ---- whole answers --------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Answer all prompts (texts, or lists of tokens) and return the completions in their order.

        Runs until nothing is left to do, so other requests that were added before finish too (their outputs are lost).
        """
        return answers.generate(self, prompts, params)

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[str]:
        """The answer's text piece by piece; leaving the loop early cancels the request."""
        return answers.stream(self, prompt, params)

    def tokenize(self, text: str) -> list[int]:
        """Tokens of ``text``; raises ``ConfigurationError`` if the model came without a tokenizer."""
        if self.tokenizer is None:
            raise ConfigurationError("text needs a model with a tokenizer; give token ids")
        return list(self.tokenizer.encode(text))
