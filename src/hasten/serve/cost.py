"""How long one iteration takes, from what is in its batch.

An iteration either waits for memory (weights once, then the keys and values of everybody's context) or for arithmetic::

    t      = max(t_mem, t_comp)
    t_mem  = m0 + m1·context + m2·sequences
    t_comp = a  + b·tokens   + c·Σ length·(2·context + length) + m1·context + d·context of pieces

summed over chunks ``(context, length)``: ``context`` tokens are in the cache, ``length`` are computed; a piece is a
chunk of several tokens, whose kernel gathers its context first.
Coefficients are fitted by non-negative least squares on the relative error over measured batches. One cost drives the
simulator, the choice of the token budget, and the tuner. Seconds and tokens throughout.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hasten.budget import SLO, format_quantity
from hasten.clock import Clock, MonotonicClock
from hasten.errors import ConfigurationError, DataError
from hasten.files import write_text
from hasten.serve.cost_fit import fit_larger_line

__all__ = ["BudgetChoice", "FitReport", "IterationCost", "Sample"]

Chunks = Sequence[tuple[int, int]]
"""``(context, length)`` for each chunk of a batch"""
Sample = tuple[Chunks, float]
"""one measured batch and its seconds"""

_FORMAT = "hasten/iteration-cost/2"


@dataclass(frozen=True)
class FitReport:
    """How a cost was fitted and how well it predicts."""

    num_samples: int
    """batches that were fitted"""
    median_relative_error: float
    """on the fitted batches"""
    num_holdout: int = 0
    """batches that were kept apart"""
    holdout_median_relative_error: float = math.nan
    """on the batches that were kept apart"""
    holdout_p90_relative_error: float = math.nan
    """on the batches that were kept apart"""
    seconds: float = math.nan
    """what the measurement took"""
    note: str = ""
    """model, precision and machine, as the caller names them"""


@dataclass(frozen=True)
class BudgetChoice:
    """A token budget, what it is predicted to cost at worst, and the sentence that explains it."""

    token_budget: int
    """tokens in one step at most"""
    predicted: float
    """seconds of the worst batch within the budget"""
    feasible: bool
    """whether the worst batch meets the limit"""
    why: str
    """one sentence for the log"""


@dataclass(frozen=True)
class IterationCost:
    """Seconds of an iteration.

    >>> cost = IterationCost.preset("opt-13b/a100")
    >>> round(cost.time([(0, 512)]), 4)                       # one prompt of 512 tokens
    0.0721
    >>> round(cost.time([(1000, 1)] * 32), 4)                 # 32 decodes at a context of 1,000
    0.0419
    >>> cost.budget_for(SLO(tbt="100ms"), context=2000, cache_tokens=40_000).token_budget
    384
    """

    m0: float = 0.0
    """reading the weights, seconds"""
    m1: float = 0.0
    """reading keys and values, seconds per token of context"""
    m2: float = 0.0
    """seconds per sequence"""
    a: float = 0.0
    """fixed part of the arithmetic, seconds"""
    b: float = 0.0
    """seconds per computed token"""
    c: float = 0.0
    """attention, seconds per (query, key) pair, halved"""
    d: float = 0.0
    """gathering the context of a piece, seconds per token of it"""
    report: FitReport | None = field(default=None, compare=False)
    """how it was fitted, where it was"""

    def __post_init__(self) -> None:
        for name in _COEFFICIENTS:
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ConfigurationError(f"coefficient {name} is {value!r}; a cost needs finite numbers of at least 0")

    def seconds(
        self, context: float, sequences: float, tokens: float, attention: float, gathered: float = 0.0
    ) -> float:
        """Seconds from the sums over a batch, as :meth:`sums` gives them. Nothing costs 0."""
        if tokens <= 0:
            return 0.0
        reading = self.m1 * context
        memory = self.m0 + reading + self.m2 * sequences
        compute = self.a + self.b * tokens + self.c * attention + reading + self.d * gathered
        return memory if memory > compute else compute

    def time(self, chunks: Chunks) -> float:
        """Seconds of one iteration over ``chunks``, given as ``(context, length)``."""
        return self.seconds(*self.sums(chunks))

    def times(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        """Seconds of many iterations; ``sums`` (batches, 5) holds what :meth:`sums` gives for each."""
        context, sequences, tokens, attention, gathered = np.asarray(sums, dtype=np.float64).T
        reading = self.m1 * context
        memory = self.m0 + reading + self.m2 * sequences
        compute = self.a + self.b * tokens + self.c * attention + reading + self.d * gathered
        return np.where(tokens > 0, np.maximum(memory, compute), 0.0)

    @staticmethod
    def sums(chunks: Chunks) -> tuple[int, int, int, int, int]:
        """All that a cost looks at: context, sequences, tokens, attention and context of pieces of a batch."""
        context = tokens = attention = gathered = 0
        for past, length in chunks:
            context += past
            tokens += length
            attention += length * (2 * past + length)
            if length > 1:
                gathered += past
        return context, len(chunks), tokens, attention, gathered

    # --- fitting -----------------------------------------------------------------------------------------------------

    @classmethod
    def fit(cls, samples: Sequence[Sample], *, holdout: Sequence[Sample] = (), note: str = "") -> IterationCost:
        """Fit the coefficients to measured batches ``(chunks, seconds)``.

        Which of the two lines a batch lies on is unknown, so the fit alternates: assign every batch to the larger of
        the two predictions, solve the joint non-negative least squares on relative error, repeat; from several starts,
        keep the best. Raises :class:`~hasten.errors.DataError` for fewer than 7 usable samples.
        """
        usable = [(chunks, t) for chunks, t in samples if chunks and math.isfinite(t) and t > 0]
        if len(usable) < len(_COEFFICIENTS):
            raise DataError(
                f"{len(usable)} usable samples were given; a cost with {len(_COEFFICIENTS)} coefficients needs at "
                f"least {len(_COEFFICIENTS)} batches of different shape with a positive time"
            )
        sums = np.array([cls.sums(chunks) for chunks, _ in usable], dtype=np.float64)
        measured = np.array([t for _, t in usable])
        m0, m1, m2, a, b, c, d = fit_larger_line(sums, measured)
        cost = cls(m0, m1, m2, a, b, c, d)
        errors = np.abs(cost.times(sums) - measured) / measured
        held = [(chunks, t) for chunks, t in holdout if chunks and math.isfinite(t) and t > 0]
        outside = cost.relative_errors(held)
        report = FitReport(
            num_samples=len(usable),
            median_relative_error=float(np.median(errors)),
            num_holdout=len(held),
            holdout_median_relative_error=float(np.median(outside)) if len(held) else math.nan,
            holdout_p90_relative_error=float(np.percentile(outside, 90)) if len(held) else math.nan,
            note=note,
        )
        return replace(cost, report=report)

    def relative_errors(self, samples: Sequence[Sample]) -> NDArray[np.float64]:
        """|predicted - measured| / measured, one value per sample."""
        if not samples:
            return np.zeros(0)
        sums = np.array([self.sums(chunks) for chunks, _ in samples], dtype=np.float64)
        measured = np.array([t for _, t in samples])
        errors: NDArray[np.float64] = np.abs(self.times(sums) - measured) / measured
        return errors

    @classmethod
    def calibrate(
        cls,
        model: Any,
        clock: Clock | None = None,
        *,
        time_limit: float = 20.0,
        max_context: int | None = None,
        max_tokens: int = 512,
        max_num_seqs: int = 32,
        cache_tokens: int | None = None,
        repeats: int = 3,
        seed: int = 0,
        progress: bool | Callable[[float], None] = True,
        note: str = "",
        statistic: Literal["median", "minimum"] = "median",
    ) -> IterationCost:
        """Measure real batches of a model and fit; see :func:`hasten.serve.calibrate.measure_batches` for the knobs.

        ``model`` is an executor or a language model. The batches use random token ids and a cache of their own; every
        fifth batch is kept apart, and the error on those is in ``report``. Takes at most about ``time_limit`` seconds.
        """
        from hasten.serve.calibrate import measure_batches

        clock = clock or MonotonicClock()
        begin = clock.now()
        samples = measure_batches(
            model,
            clock,
            time_limit=time_limit,
            max_context=max_context,
            max_tokens=max_tokens,
            max_num_seqs=max_num_seqs,
            cache_tokens=cache_tokens,
            repeats=repeats,
            seed=seed,
            progress=progress,
            statistic=statistic,
        )
        shuffled = list(samples)
        random.Random(seed).shuffle(shuffled)
        apart = len(shuffled) // 5
        cost = cls.fit(shuffled[apart:], holdout=shuffled[:apart], note=note)
        assert cost.report is not None
        return replace(cost, report=replace(cost.report, seconds=clock.now() - begin))

    # --- what follows from it ----------------------------------------------------------------------------------------

    def worst_batch(
        self, token_budget: int, *, max_num_seqs: int = 128, context: int = 2048, cache_tokens: int | None = None
    ) -> float:
        """Seconds of the worst batch within a budget.

        Any number of decodes up to ``max_num_seqs``, all at ``context`` tokens, and one piece of a prompt that fills
        the rest of the budget at the end of a prompt of ``context`` tokens; together they hold at most
        ``cache_tokens``.
        """
        room = cache_tokens if cache_tokens is not None else (max_num_seqs + 1) * context
        context = min(context, room)
        decodes = np.arange(0, min(max_num_seqs, token_budget) + 1, dtype=np.float64)
        piece = token_budget - decodes
        past = np.where(piece > 0, np.maximum(context - piece, 0.0), 0.0)
        held = np.minimum(decodes * context, room - past)
        attention = piece * (2 * past + piece) + 2 * held + decodes
        sequences = decodes + (piece > 0)
        tokens = np.full_like(decodes, token_budget)
        gathered = np.where(piece > 1, past, 0.0)
        return float(self.times(np.stack([held + past, sequences, tokens, attention, gathered], axis=1)).max())

    def piece_within(self, limit: float, sums: tuple[float, float, float, float, float], past: int) -> int:
        """Tokens of a prompt, of which ``past`` are in the cache, that fit beside a batch into ``limit`` seconds.

        ``sums`` is what :meth:`sums` gives for the batch; 0 when nothing fits. The root of the quadratic that a piece
        of n tokens adds: ``b·n + c·n·(2·past + n)``.

        >>> cost = IterationCost.preset("opt-13b/a100")
        >>> decodes = cost.sums([(1000, 1)] * 16)
        >>> cost.piece_within(0.1, decodes, 0)
        656
        >>> cost.piece_within(0.1, cost.sums([(2000, 1)] * 100), 0)
        0
        """
        if limit == math.inf:
            return _ANY_PIECE
        context, sequences, tokens, attention, gathered = sums
        reading = self.m1 * (context + past)
        if self.m0 + reading + self.m2 * (sequences + 1) > limit:
            return 0
        left = limit - self.a - self.b * tokens - self.c * attention - reading - self.d * (gathered + past)
        if left <= 0:
            return 0
        slope = self.b + 2 * self.c * past
        root = slope + math.sqrt(slope * slope + 4 * self.c * left)
        return int(min(2 * left / root, _ANY_PIECE)) if root > 0 else _ANY_PIECE

    def budget_for(
        self,
        slo: SLO,
        *,
        max_num_seqs: int = 128,
        context: int = 2048,
        cache_tokens: int | None = None,
        tile: int = 64,
        max_budget: int = 8192,
    ) -> BudgetChoice:
        """The largest token budget whose worst batch meets the tighter of the limits on ITL (TBT) and TPOT.

        Rounded down to a multiple of ``tile`` (below one tile: to a power of two), because a piece one token over a
        tile pays for a whole one. Never below ``max_num_seqs`` (or one tile, where that is less): with fewer tokens
        than sequences the later ones starve, which is worse than a step over the limit in the worst case. When that
        budget does not meet the limit it is taken all the same and ``feasible`` is false. Without either limit the
        largest budget is taken, since nothing bounds it.
        """
        limits = {n: t.limit for n, t in slo.targets().items() if n in ("itl", "tpot")}

        def worst(budget: int) -> float:
            return self.worst_batch(budget, max_num_seqs=max_num_seqs, context=context, cache_tokens=cache_tokens)

        least = min(max_num_seqs, tile)
        tried = {2**i for i in range(14) if 2**i < tile} | set(range(tile, max(max_budget, tile) + 1, tile)) | {least}
        sizes = sorted(size for size in tried if size >= least)
        if not limits:
            budget = sizes[-1]
            return BudgetChoice(
                budget,
                worst(budget),
                True,
                f"token budget {budget}: the SLO bounds neither itl nor tpot, so nothing limits it",
            )
        name = min(limits, key=lambda n: limits[n])
        limit = limits[name]
        low, high = 0, len(sizes)  # sizes[:low] meet the limit; the worst time grows with the budget
        while low < high:
            middle = (low + high) // 2
            if worst(sizes[middle]) <= limit:
                low = middle + 1
            else:
                high = middle
        setting = f"{max_num_seqs} sequences at most, context {context}"
        if low == 0:
            predicted = worst(sizes[0])
            return BudgetChoice(
                sizes[0],
                predicted,
                False,
                f"no token budget meets {name} {format_quantity(limit, 'time')} at worst: token budget {sizes[0]}, the "
                f"least with which no sequence starves, takes {format_quantity(predicted, 'time')} ({setting}); relax "
                "the SLO, allow fewer sequences or a shorter context, or use a faster precision",
            )
        budget = sizes[low - 1]
        predicted = worst(budget)
        why = (
            f"token budget {budget}: its worst step takes {format_quantity(predicted, 'time')} of the "
            f"{format_quantity(limit, 'time')} that {name} allows ({setting})"
        )
        if low < len(sizes):
            why += f"; {sizes[low]} would take {format_quantity(worst(sizes[low]), 'time')}"
        return BudgetChoice(budget, predicted, True, why)

    def scaled(self, factor: float) -> IterationCost:
        """The same model on a machine that takes ``factor`` times as long."""
        return replace(self, **{name: getattr(self, name) * factor for name in _COEFFICIENTS})

    # --- files -------------------------------------------------------------------------------------------------------

    @classmethod
    def preset(cls, name: str) -> IterationCost:
        """A published or derived cost by name; :data:`PRESETS` says where each comes from.

        Raises :class:`~hasten.errors.ConfigurationError` with the known names.
        """
        try:
            return PRESETS[name]
        except KeyError:
            raise ConfigurationError(f"cost preset {name!r} is not known; choose one of {', '.join(PRESETS)}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        out: dict[str, Any] = {"format": _FORMAT} | {name: getattr(self, name) for name in _COEFFICIENTS}
        if self.report is not None:
            out["report"] = {
                k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(self.report).items()
            }
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> IterationCost:
        """The inverse of :meth:`to_dict`. Raises :class:`~hasten.errors.DataError` if it is something else."""
        if data.get("format") != _FORMAT:
            raise DataError(
                f"not an iteration cost: format is {data.get('format')!r}, expected {_FORMAT!r}; calibrate again"
            )
        try:
            fields: Any = data.get("report")
            report = None
            if fields is not None:
                report = FitReport(**{str(k): _number(v) for k, v in fields.items()})
            return cls(**{name: float(data[name]) for name in _COEFFICIENTS}, report=report)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"an iteration cost with a bad or missing field ({error}); calibrate again") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON; the file appears whole or not at all."""
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> IterationCost:
        """Read what :meth:`save` wrote. Raises :class:`~hasten.errors.DataError`."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(f"cannot read the iteration cost {str(path)!r} ({error}); calibrate again") from None
        if not isinstance(data, dict):
            raise DataError(f"{str(path)!r} does not hold an iteration cost; calibrate again")
        return cls.from_dict(data)


def _number(value: Any) -> Any:
    return math.nan if value is None else value


_ANY_PIECE = 1 << 30
"""tokens, where nothing bounds them"""

_COEFFICIENTS = ("m0", "m1", "m2", "a", "b", "c", "d")

PRESETS: dict[str, IterationCost] = {
    # DistServe (Zhong et al., OSDI 2024, arXiv:2401.09670), repository LLMServe/DistServe, simdistserve's fitted
    # coefficients on A100-80GB: prefill A + B·Σl + C·Σl², decode A' + B'·Σcontext + C'·batch (small batches).
    "opt-13b/a100": IterationCost(m0=19.93e-3, m1=6.27e-7, m2=3.85e-5, a=18.10e-3, b=1.019e-4, c=7.12e-9),
    "opt-13b/a100-tp2": IterationCost(m0=13.29e-3, m1=3.41e-7, m2=6.30e-5, a=14.74e-3, b=6.86e-5, c=2.45e-9),
    "opt-13b/a100-tp4": IterationCost(m0=10.26e-3, m1=1.88e-7, m2=3.27e-5, a=12.06e-3, b=3.81e-5, c=5.23e-10),
    "opt-66b/a100-tp4": IterationCost(m0=30.76e-3, m1=4.52e-7, m2=6.33e-5, a=29.44e-3, b=1.514e-4, c=8.32e-9),
    # Derived, not measured: Llama-2-70B (80 layers, 8 KV heads of 128, hidden 8192) in fp16 on four A100-80GB with
    # tensor parallelism. Weights 137 GB / (4·2.0 TB/s·0.8) = 21.5 ms; KV 327,680 B per token / 6.4 TB/s = 51 ns;
    # 138 GFLOP per token / (4·312 TFLOP/s·0.55) = 0.2 ms; attention 2·80·8192 FLOP per pair, at 0.4 of the peak;
    # 4 ms for all-reduces and launches in either line, 40 µs per sequence.
    "llama2-70b/a100-tp4": IterationCost(m0=25.5e-3, m1=5.1e-8, m2=4.0e-5, a=4.0e-3, b=2.0e-4, c=2.6e-9),
}
"""Costs by name. The OPT ones are published fits, ``llama2-70b/a100-tp4`` is derived from data sheets."""
