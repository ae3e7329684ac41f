"""The search: propose, reject by prediction, measure, tell; under a hard budget and a time limit, resumable.

A proposal is predicted first; one that is predicted to break the budget by more than the prediction's own error is
rejected before it costs any time. What is left is measured. The sampler is Optuna's TPE with the budget's violations as
constraints, so feasible candidates are preferred before good ones; in a space that can be counted every point is
visited at most once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.clock import Clock, MonotonicClock
from hasten.errors import ConfigurationError, DataError
from hasten.measure.machine import Machine
from hasten.tune.frontier import Axis, Candidate
from hasten.tune.space import Point, Space, key_of
from hasten.tune.storage import guarded, open_study

__all__ = ["Outcome", "Search"]

_RECORD = "candidate"
_COUNTABLE = 20_000
_MORE_IS_BETTER = ("quality", "throughput", "goodput", "attainment")


@dataclass(frozen=True)
class Outcome:
    """What measuring one point gave."""

    values: Mapping[str, float]
    """by name"""
    detail: Mapping[str, Any] | None = None
    """plain values worth keeping"""


Violations = Callable[[Mapping[str, float]], list[str]]


@dataclass(frozen=True)
class Search:
    """A resumable search over a space.

    >>> from hasten.tune.space import Knob
    >>> search = Search(
    ...     Space((Knob("width", (1, 2, 3)),)),
    ...     measure=lambda p: Outcome({"time": p["width"] / 10, "quality": p["width"] / 3}),
    ...     axes=(Axis("time"), Axis("quality", maximise=True)),
    ...     violations=lambda v: ["too slow"] if v.get("time", 0) > 0.25 else [],
    ... )
    >>> sorted((c.name, c.feasible) for c in search.run())
    [('width=1', True), ('width=2', True), ('width=3', False)]
    """

    space: Space
    """what may be chosen"""
    measure: Callable[[Point], Outcome]
    """runs a point; a HastenError marks the point as impossible, with its reason"""
    axes: tuple[Axis, ...]
    """what is traded"""
    violations: Violations = lambda values: []
    """lines for the bounds that values break"""
    predict: Callable[[Point], Mapping[str, float] | None] = lambda point: None
    """values expected before measuring, or None where nothing is known; cheap"""
    margin: float | Mapping[str, float] = 0.2
    """relative error of the prediction, by the name of the value where they differ (0.2 for a name that is not there):
    a point is rejected when it breaks the budget even if it is this much better"""
    label: Callable[[Point], str] = lambda point: ", ".join(f"{k}={v}" for k, v in point.items())
    """short name of a point"""
    storage: Path | None = None
    """SQLite file; None keeps the study in memory"""
    name: str = "tune"
    """name of the study inside the file"""
    facts: Mapping[str, Any] | None = None
    """what else identifies the search (model, budget); checked when it is resumed"""
    first: tuple[Point, ...] = ()
    """points to try first"""
    seed: int = 0
    """of the sampler"""

    def run(
        self,
        *,
        time_limit: float | None = None,
        max_measured: int | None = None,
        least: int = 1,
        clock: Clock | None = None,
        progress: Callable[[str, float], None] | None = None,
    ) -> list[Candidate]:
        """Search until the space is spent, ``time_limit`` seconds passed or ``max_measured`` points were measured.

        The time limit ends it only when at least ``least`` points were measured.
        Points that the stored study holds are not measured again; they count. Returns every candidate, in order.
        Raises :class:`~hasten.errors.DataError` when the study cannot be kept; what was told stays in the file.
        """
        clock = clock or MonotonicClock()
        told: Callable[[str, float], None] = progress or (lambda stage, share: None)
        began = clock.now()
        size = self.space.size(_COUNTABLE)
        study = self._open()
        done = {key_of(c.knobs): c for c in self._stored(study)}
        queue = [p for p in self.first if key_of(p) not in done]
        rest = self.space.points()
        while len(done) < size:
            measured = sum(c.measured for c in done.values())
            if max_measured is not None and measured >= max_measured:
                break
            elapsed = clock.now() - began
            if time_limit is not None and elapsed >= time_limit and measured >= least:
                break
            shares = [len(done) / size, measured / max_measured if max_measured else 0.0]
            shares.append(elapsed / time_limit if time_limit else 0.0)
            with guarded(self.storage):
                trial, point = self._propose(study, done, queue, rest)
            if point is None:
                break
            told(self.label(point), min(1.0, max(shares)))
            candidate = self._try(point)
            with guarded(self.storage):
                self._tell(study, trial, candidate)
            done[key_of(point)] = candidate
        told("done", 1.0)
        return list(done.values())

    def _open(self) -> Any:
        import warnings

        import optuna

        facts = {
            "space": self.space.describe(),
            "axes": [[a.key, a.maximise] for a in self.axes],
            "machine": Machine.detect().hash,
            **(self.facts or {}),
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constraints are marked experimental
            sampler = optuna.samplers.TPESampler(
                seed=self.seed, n_startup_trials=8, constraints_func=_constraints, multivariate=False
            )
        directions = ["maximize" if a.maximise else "minimize" for a in self.axes]
        return open_study(self.storage, self.name, directions, facts, sampler)

    def _stored(self, study: Any) -> list[Candidate]:
        records = (t.user_attrs.get(_RECORD) for t in study.get_trials(deepcopy=False))
        return [Candidate.from_json(r) for r in records if r is not None]

    def _propose(
        self, study: Any, done: Mapping[str, Candidate], queue: list[Point], rest: Iterator[Point]
    ) -> tuple[Any, dict[str, Any] | None]:
        """A trial and a point that was not tried: the sampler proposes, the enumeration steps in for repetitions."""
        import optuna

        if queue:
            study.enqueue_trial(dict(queue.pop(0)))
        while True:
            trial, point = self._ask(study)
            if key_of(point) not in done and self.space.allowed(point):
                return trial, point
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            fresh = next((p for p in rest if key_of(p) not in done), None)
            if fresh is not None:
                study.enqueue_trial(dict(fresh))
            elif not study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,)):
                return None, None

    def _ask(self, study: Any) -> tuple[Any, dict[str, Any]]:
        trial = study.ask()
        return trial, self.space.build(lambda name, choices: trial.suggest_categorical(name, choices))

    def _try(self, point: Point) -> Candidate:
        name = self.label(point)
        predicted = dict(self.predict(point) or {})
        hopeful = {k: self._hopeful(k, v) for k, v in predicted.items()}
        broken = self.violations(hopeful) if predicted else []
        if broken:
            return Candidate(name, dict(point), {}, predicted, tuple(self.violations(predicted) or broken))
        try:
            outcome = self.measure(point)
        except (ConfigurationError, DataError) as error:
            return Candidate(name, dict(point), {}, predicted, (str(error),), {"error": str(error)})
        values = dict(outcome.values)
        return Candidate(name, dict(point), values, predicted, tuple(self.violations(values)), outcome.detail or {})

    def _hopeful(self, key: str, value: float) -> float:
        """A predicted value as good as its error allows."""
        margin = self.margin
        if isinstance(margin, Mapping):
            margin = margin.get(key.partition("@")[0], 0.2)
        return value * (1 + margin if key in _MORE_IS_BETTER else 1 - margin)

    def _tell(self, study: Any, trial: Any, candidate: Candidate) -> None:
        import optuna

        trial.set_user_attr(_RECORD, candidate.to_json())
        values = [candidate.values.get(a.key) for a in self.axes]
        if any(v is None or v != v for v in values):
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, values)


def _constraints(trial: Any) -> tuple[float, ...]:
    """Feasible-first: the number of broken bounds, which must be zero."""
    record = trial.user_attrs.get(_RECORD) or {}
    return (float(len(record.get("violations", ()))),)
