"""A discrete-event simulator that runs the engine's own policy on a cost model.

The policy object, the sequences, the plans and the counting of blocks are those of the real engine; only the forward is
replaced by ``IterationCost``. A step that begins at ``t`` sees what had arrived by ``t`` and delivers its tokens at
``t + cost``. Invariant: the books of blocks balance after every step, a plan that overdraws them is an error.
Open loop (arrivals of a workload), closed loop (clients that wait for their answer) and replicas behind a balancer.
"""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hasten.budget import SLO
from hasten.errors import ConfigurationError, EngineError
from hasten.serve.balance import Balancer, Load, RoundRobin
from hasten.serve.batch import Chunk, ChunkKind, Observation, StepPlan, blocks_for
from hasten.serve.cost import IterationCost
from hasten.serve.metrics import Distribution, RequestRecord, ServingMetrics, summarise
from hasten.serve.policy.base import Policy
from hasten.serve.request import Sequence, Status
from hasten.serve.simulated_guesses import Guesser, SimulatedSpeculation
from hasten.serve.workload import RequestSpec

__all__ = ["SimulatedEngine", "SimulationReport", "Simulator"]


def _turn(seq: Sequence) -> tuple[int, bool, float, int]:
    """Place among those that wait, as in the engine: what was preempted goes before what is new."""
    return (seq.priority, seq.preemptions == 0, seq.due, seq.seq)


@dataclass(frozen=True)
class SimulationReport:
    """What a simulated run gave; latencies as :class:`~hasten.serve.metrics.Distribution`."""

    records: list[RequestRecord]
    """one per request, in order of arrival"""
    duration: float
    """seconds from the first arrival to the end of the last step"""
    steps: NDArray[np.float64]
    """(steps, 4): begin, seconds, tokens, sequences of each step, of all replicas in order of their end"""
    slo: SLO | None = None
    """what goodput is counted against"""
    peak_running: int = 0
    """most sequences that ran at once on one replica"""
    guesses: list[tuple[float, int, int]] = field(default_factory=list)
    """(begin, decodes, guesses) of each step with decodes, where speculation was simulated"""

    @cached_property
    def metrics(self) -> ServingMetrics:
        """All metrics of the run."""
        return summarise(self.records, self.slo, self.duration)

    @property
    def ttft(self) -> Distribution:
        return self.metrics.ttft

    @property
    def tpot(self) -> Distribution:
        return self.metrics.tpot

    @property
    def tbt(self) -> Distribution:
        return self.metrics.itl

    @property
    def queue(self) -> Distribution:
        return self.metrics.queue

    @property
    def busy(self) -> float:
        """Seconds spent in steps, summed over replicas."""
        return float(self.steps[:, 1].sum()) if len(self.steps) else 0.0


class SimulatedEngine:
    """One engine on a cost model. Not thread-safe; ``start`` and ``finish`` alternate.

    >>> from hasten.serve.policy import StallFree
    >>> engine = SimulatedEngine(IterationCost.preset("opt-13b/a100"), StallFree(), blocks=100)
    >>> engine.add("a", RequestSpec(0.0, prompt_len=100, output_len=2), now=0.0)
    True
    >>> round(engine.start(0.0), 4), [r.id for r in engine.finish()]       # the prompt, first token
    (0.0284, [])
    >>> round(engine.start(0.03), 4), [r.id for r in engine.finish()]      # second token: done
    (0.05, ['a'])
    """

    def __init__(
        self,
        cost: IterationCost,
        policy: Policy,
        *,
        blocks: int,
        block_size: int = 16,
        max_context: int | None = None,
        overhead: float = 0.0,
        speculation: SimulatedSpeculation | None = None,
    ) -> None:
        if blocks < 1 or block_size < 1:
            raise ConfigurationError(
                f"a cache of {blocks} blocks of {block_size} tokens holds nothing; both must be ≥ 1"
            )
        self.cost = cost
        self.policy = policy
        self.blocks = blocks
        self.block_size = block_size
        self.capacity = blocks * block_size
        self.max_context = min(max_context or self.capacity, self.capacity)
        self.overhead = overhead
        self.free = blocks
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.records: dict[int, RequestRecord] = {}
        self.steps: list[tuple[float, float, int, int]] = []
        self.peak_running = 0
        self.busy_until: float | None = None
        """when the step in progress ends; ``None`` when idle"""
        self._live: dict[int, Sequence] = {}
        self._plan = StepPlan()
        self._guesser = None if speculation is None else speculation.start()
        self.guesses: list[tuple[float, int, int]] = []
        """(begin of the step, decodes, guesses) of each step with decodes, where speculation is simulated"""
        self._count = 0

    @property
    def has_work(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.waiting or self.running)

    @property
    def load(self) -> Load:
        """What is left to do."""
        tokens = sum(s.known - s.computed for s in self.waiting) + sum(s.known - s.computed for s in self.running)
        return Load(len(self.waiting) + len(self.running), tokens)

    def add(self, name: str, spec: RequestSpec, now: float) -> bool:
        """Take a request in. One that can never fit is refused: a failed record, and ``False``."""
        number = self._count
        self._count += 1
        record = RequestRecord(name, now, prompt_tokens=spec.prompt_len)
        self.records[number] = record
        if spec.prompt_len + spec.output_len > self.max_context:
            record.error = (
                f"prompt of {spec.prompt_len} and answer of {spec.output_len} tokens exceed the {self.max_context} "
                "tokens that one sequence may hold"
            )
            record.finish_reason = "error"
            return False
        seq = Sequence(
            seq=number, arrival=now, prompt_len=spec.prompt_len, max_tokens=spec.output_len, priority=spec.priority,
            slo=spec.slo,
        )  # fmt: skip
        seq.token_times = record.token_times
        self._live[number] = seq
        insort(self.waiting, seq, key=_turn)
        return True

    def observe(self, now: float) -> Observation:
        """What the policy sees; the lists are live, valid until the next ``start``."""
        return Observation(now, self.waiting, self.running, self.free, self.blocks, self.block_size)

    def start(self, now: float) -> float | None:
        """Begin the next step; returns when it ends, ``None`` when the policy has nothing to do.

        Raises :class:`~hasten.errors.EngineError` when the plan breaks the contract (blocks, order of tokens).
        """
        plan = self.policy.decide(self.observe(now))
        if plan.preempt:
            self._preempt(plan.preempt)
        if not plan.chunks:
            return now if plan.preempt else None  # a step that only lets go takes no time
        drafting = 0.0
        if self._guesser is not None:
            self._guesser.now = now
            plan, drafting = self._guess(plan, self._guesser, now)
        size, free, live = self.block_size, self.free, self._live
        context = tokens = attention = gathered = 0
        admitted = 0
        for chunk in plan.chunks:
            seq, begin, length = live[chunk.seq], chunk.start, chunk.length
            end = begin + length
            if seq.status is not Status.RUNNING:
                if seq.first_scheduled is None:
                    seq.first_scheduled = now
                seq.status = Status.RUNNING
                self.running.append(seq)
                admitted += 1
            if begin != seq.computed or length < 1 or (end > seq.known and chunk.kind is not ChunkKind.VERIFY):
                raise EngineError(
                    f"policy {self.policy.name} planned tokens {begin} to {end} of sequence {seq.seq}, which has "
                    f"computed {seq.computed} of {seq.known}"
                )
            if end > seq.blocks * size:
                need = -(-end // size)
                free -= need - seq.blocks
                seq.blocks = need
            context += begin
            tokens += length
            attention += length * (begin + end)
            if length > 1 and chunk.kind is not ChunkKind.VERIFY:
                gathered += begin
        if free < 0:
            raise EngineError(f"policy {self.policy.name} planned {-free} cache blocks more than there are free")
        self.free = free
        if admitted:
            head = self.waiting[:admitted]
            if all(seq.status is Status.RUNNING for seq in head):
                del self.waiting[:admitted]
            else:
                self.waiting[:] = [seq for seq in self.waiting if seq.status is not Status.RUNNING]
            if len(self.running) > self.peak_running:
                self.peak_running = len(self.running)
        seconds = self.cost.seconds(context, len(plan.chunks), tokens, attention, gathered) + self.overhead + drafting
        self.steps.append((now, seconds, tokens, len(plan.chunks)))
        self._plan = plan
        self.busy_until = now + seconds
        return self.busy_until

    def finish(self) -> list[RequestRecord]:
        """End the step in progress: deliver its tokens; returns the requests that are complete."""
        end = self.busy_until
        assert end is not None, "finish without start"
        self.busy_until = None
        live = self._live
        done: list[Sequence] = []
        for chunk in self._plan.chunks:
            seq = live[chunk.seq]
            computed = chunk.start + chunk.length
            if chunk.kind is ChunkKind.VERIFY:
                assert self._guesser is not None
                stood = self._guesser.outcome(chunk.seq, chunk.length - 1)
                computed = seq.known + stood
                seq.token_times.extend([end] * stood)
                seq.known = computed
                held = blocks_for(computed + 1, self.block_size)
                if seq.blocks > held:
                    self.free += seq.blocks - held
                    seq.blocks = held
            seq.computed = computed
            if computed == seq.known:
                seq.known = computed + 1
                seq.token_times.append(end)
                if computed + 1 - seq.prompt_len >= seq.max_tokens:
                    done.append(seq)
        if not done:
            return []
        finished = []
        for seq in done:
            self.free += seq.blocks
            seq.status = Status.FINISHED
            del live[seq.seq]
            if self._guesser is not None:
                self._guesser.acceptance.forget(seq.seq)
            record = self.records[seq.seq]
            record.first_scheduled = seq.first_scheduled
            record.output_tokens = len(seq.token_times)
            record.preemptions = seq.preemptions
            record.finish_reason = "length"
            finished.append(record)
        self.running[:] = [seq for seq in self.running if seq.status is Status.RUNNING]
        return finished

    def _guess(self, plan: StepPlan, guesser: Guesser, now: float) -> tuple[StepPlan, float]:
        """The plan with guesses for its decodes, and the seconds that drafting takes."""
        size = self.block_size
        decodes = [c for c in plan.chunks if c.length == 1 and self._live[c.seq].decoding and self._live[c.seq].blocks]
        free = self.free - sum(
            max(0, blocks_for(c.start + c.length, size) - self._live[c.seq].blocks) for c in plan.chunks
        )
        limits = []
        for chunk in decodes:
            seq = self._live[chunk.seq]
            spare = max(0, seq.blocks * size - seq.known)
            limit = max(0, min(seq.max_tokens - seq.generated - 1, spare + max(0, free) * size))
            limit = min(limit, guesser.policy.max_length)
            free -= blocks_for(max(0, limit - spare), size)
            limits.append(limit)
        if not decodes:
            return plan, 0.0
        pieces = plan.num_tokens - len(decodes)
        lengths = guesser.lengths([c.seq for c in decodes], [c.start for c in decodes], pieces, limits)
        self.guesses.append((now, len(decodes), sum(lengths)))
        if not any(lengths):
            return plan, 0.0
        by_seq = {c.seq: k for c, k in zip(decodes, lengths, strict=True) if k}
        chunks = tuple(
            Chunk(c.seq, c.start, c.length + by_seq[c.seq], ChunkKind.VERIFY) if c.seq in by_seq else c
            for c in plan.chunks
        )
        return StepPlan(chunks, plan.preempt), float(guesser.draft.seconds(max(lengths), sum(lengths)))

    def _preempt(self, numbers: SequenceOf[int]) -> None:
        for number in numbers:
            seq = self._live[number]
            if seq.status is not Status.RUNNING:
                raise EngineError(f"policy {self.policy.name} preempts sequence {number}, which does not run")
            self.free += seq.blocks
            self.records[number].recomputed_tokens += seq.computed
            seq.blocks = seq.computed = 0
            seq.preemptions += 1
            seq.status = Status.WAITING
            insort(self.waiting, seq, key=_turn)
        self.running[:] = [seq for seq in self.running if seq.status is Status.RUNNING]

    def check_integrity(self) -> None:
        """Raise :class:`~hasten.errors.EngineError` unless every block is held or free and every sequence is
        somewhere."""
        held = sum(seq.blocks for seq in self.running)
        if held + self.free != self.blocks or any(seq.blocks for seq in self.waiting):
            raise EngineError(f"{held} blocks held and {self.free} free do not make {self.blocks}")
        for seq in self.running:
            if seq.blocks * self.block_size < seq.computed:
                raise EngineError(f"sequence {seq.seq} has computed {seq.computed} tokens in {seq.blocks} blocks")
        if len(self.waiting) + len(self.running) != len(self._live):
            raise EngineError("a sequence is neither waiting nor running")


@dataclass(frozen=True)
class Simulator:
    """Simulated engines that serve a workload.

    >>> from hasten.serve import workload
    >>> from hasten.serve.policy import StallFree
    >>> load = workload.sample("conversation", rate=1.0, requests=50, seed=0)
    >>> report = Simulator(IterationCost.preset("opt-13b/a100"), StallFree(token_budget=384), blocks=2500).run(load)
    >>> report.metrics.completed, report.tbt.p99 < 0.11
    (50, True)
    """

    cost: IterationCost
    """seconds of an iteration"""
    policy: Policy
    """decides every step; shared by the replicas, since it holds no state"""
    blocks: int = 2500
    """cache blocks of each replica"""
    block_size: int = 16
    """tokens in one block"""
    replicas: int = 1
    """independent engines"""
    balancer: Balancer = field(default_factory=RoundRobin)
    """places arrivals on replicas"""
    slo: SLO | None = None
    """what goodput is counted against"""
    max_context: int | None = None
    """tokens of prompt and answer that one request may have; by default what the cache holds"""
    overhead: float = 0.0
    """seconds of every step outside the model"""
    speculation: SimulatedSpeculation | None = None
    """guesses of tokens; None for none"""

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ConfigurationError(f"replicas is {self.replicas}; at least 1 engine must serve")

    def run(self, workload: Iterable[RequestSpec]) -> SimulationReport:
        """Open loop: requests arrive when the workload says, whatever the engines do."""
        arrivals = [(spec.arrival, number, spec) for number, spec in enumerate(workload)]
        heapq.heapify(arrivals)
        return self._run(arrivals, [])

    def run_closed(self, workload: Iterable[RequestSpec], clients: int, think: float = 0.0) -> SimulationReport:
        """Closed loop: ``clients`` send one request each and the next one ``think`` seconds after the answer.

        The workload gives the lengths; its arrival times are not used.
        """
        if clients < 1:
            raise ConfigurationError(f"clients is {clients}; at least 1 must ask")
        queue = [(0.0, number, spec) for number, spec in enumerate(workload)]
        return self._run(queue[:clients], queue[clients:], think)

    def _run(
        self,
        arrivals: list[tuple[float, int, RequestSpec]],
        later: list[tuple[float, int, RequestSpec]],
        think: float = 0.0,
    ) -> SimulationReport:
        engines = [
            SimulatedEngine(
                self.cost,
                self.policy,
                blocks=self.blocks,
                block_size=self.block_size,
                max_context=self.max_context,
                overhead=self.overhead,
                speculation=self.speculation,
            )
            for _ in range(self.replicas)
        ]
        later.reverse()
        ends: list[tuple[float, int]] = []  # steps in progress
        first = arrivals[0][0] if arrivals else 0.0
        placed = 0
        now = first
        while arrivals or ends:
            now = ends[0][0] if ends else math.inf
            if arrivals and arrivals[0][0] < now:
                now = arrivals[0][0]
            touched: list[int] = []
            while ends and ends[0][0] <= now:
                index = heapq.heappop(ends)[1]
                touched.append(index)
                for _ in engines[index].finish():
                    if later:
                        _, number, spec = later.pop()
                        heapq.heappush(arrivals, (now + think, number, spec))
            while arrivals and arrivals[0][0] <= now:
                when, number, spec = heapq.heappop(arrivals)
                index = 0
                if self.replicas > 1:
                    index = self.balancer.choose(placed, spec.prompt_len, [engine.load for engine in engines])
                placed += 1
                if engines[index].add(str(number), spec, when):
                    touched.append(index)
                elif later:
                    _, following, following_spec = later.pop()
                    heapq.heappush(arrivals, (now + think, following, following_spec))
            for index in touched:
                engine = engines[index]
                if engine.busy_until is None and engine.has_work:
                    end = engine.start(now)
                    if end is not None and engine.busy_until is None:  # it only let go: plan again at once
                        end = engine.start(now)
                    if end is None or engine.busy_until is None:
                        raise EngineError(
                            f"policy {self.policy.name} has nothing to do at {now:.3f} s with {len(engine.waiting)} "
                            f"waiting and {len(engine.running)} running sequences and {engine.free} free blocks"
                        )
                    heapq.heappush(ends, (end, index))
        records = sorted(
            (r for engine in engines for r in engine.records.values()), key=lambda r: (r.arrival, int(r.id))
        )
        rows = sorted((row for engine in engines for row in engine.steps), key=lambda row: row[0] + row[1])
        steps = np.array(rows, dtype=np.float64).reshape(-1, 4)
        peak = max(engine.peak_running for engine in engines)
        guesses = [row for engine in engines for row in engine.guesses]
        return SimulationReport(records, now - first, steps, self.slo, peak, guesses)
