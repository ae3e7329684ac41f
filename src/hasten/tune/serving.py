"""Tuning a server: which knobs meet an SLO at an offered load.

Thousands of settings can be predicted in the time that one can be run: the real policy runs on the fitted iteration
cost in the simulator. So every point is predicted, the best few are confirmed on the real engine next to the untuned
setting, and the verdict rests on the confirmed numbers alone. Prediction and measurement are handed in as callables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.budget import SLO
from hasten.clock import Clock, MonotonicClock
from hasten.errors import ConfigurationError
from hasten.tune.frontier import Axis, Candidate, Frontier
from hasten.tune.search import Outcome, Search
from hasten.tune.space import PER_STEP, Knob, Point, Space, key_of

if TYPE_CHECKING:
    from hasten.serve.cost import IterationCost
    from hasten.serve.metrics import ServingMetrics
    from hasten.serve.policy import Policy
    from hasten.serve.workload import Workload
    from hasten.tune.guessing import Guessing

__all__ = ["ServingResult", "policy_for", "simulated", "tune_serving", "values_of"]

AXES = (Axis("e2e@p99"), Axis("attainment", maximise=True, kind="ratio"))


def values_of(metrics: ServingMetrics) -> dict[str, float]:
    """The values that a search compares: goodput, attainment, throughput, and p99 of each latency in seconds."""
    return {
        "goodput": metrics.goodput,
        "attainment": metrics.slo_attainment,
        "output_throughput": metrics.output_throughput,
        "ttft@p99": metrics.ttft.p99,
        "tpot@p99": metrics.tpot.p99,
        "itl@p99": metrics.itl.p99,
        "e2e@p99": metrics.e2e.p99,
    }


def policy_for(point: Point, slo: SLO, cost: IterationCost | None, overhead: float = 0.0) -> Policy:
    """The policy that a point names; ``overhead`` is what a step takes beside ``cost``, for budgets per step."""
    from hasten.serve.policy import Pace, make

    knobs = {k: point[k] for k in ("token_budget", "max_num_seqs") if k in point}
    if knobs.get("token_budget") == PER_STEP:
        if cost is None:
            raise ConfigurationError("a token budget per step needs the cost of a step; hand in a fitted cost")
        pace = Pace.for_slo(replace(cost, m0=cost.m0 + overhead, a=cost.a + overhead), slo)
        knobs |= {"token_budget": pace.ceiling(knobs.get("max_num_seqs", 128)), "pace": pace}
    return make(point.get("policy", "stall-free"), **knobs)


def simulated(
    costs: Mapping[str, IterationCost],
    load: Workload,
    slo: SLO,
    *,
    blocks: int | Mapping[str, int],
    block_size: int = 16,
    overhead: float = 0.0,
    guessing: Mapping[tuple[str, str], Guessing] | None = None,
) -> Callable[[Point], dict[str, float]]:
    """A prediction for points with the knobs policy, precision, kv_precision, token_budget, max_num_seqs, speculate
    and guesses.

    ``costs``: what :func:`~hasten.tune.kv_precision.runtime_of` says of a point -> its fitted cost; ``blocks`` likewise
    where caches of equal memory have not equally many. The same policy object that would run in the engine runs here.
    ``guessing``: (precision, word of ``--speculate``) -> what was measured of it.
    """
    from hasten.serve.simulate import Simulator
    from hasten.tune.kv_precision import runtime_of

    def predict(point: Point) -> dict[str, float]:
        precision = point.get("precision", next(iter(costs)))
        runtime = runtime_of({**point, "precision": precision})
        if runtime not in costs:
            raise ConfigurationError(f"no cost was fitted for {runtime!r}; known are {', '.join(costs)}")
        policy = policy_for(point, slo, costs[runtime], overhead)
        word, plan = point.get("speculate", "off"), None
        if word != "off":
            found = (guessing or {}).get((precision, word))
            if found is None:
                raise ConfigurationError(f"nothing was measured of {word!r} with {precision}; measure it first")
            plan = found.simulated(point, costs[runtime])
        room = blocks if isinstance(blocks, int) else blocks[runtime]
        simulator = Simulator(
            costs[runtime], policy, blocks=room, block_size=block_size, slo=slo, overhead=overhead, speculation=plan
        )
        return values_of(simulator.run(load).metrics)

    return predict


@dataclass(frozen=True)
class ServingResult:
    """What the search found, judged on confirmed numbers."""

    best: Candidate
    """the confirmed setting with the most attainment; the untuned one where nothing clearly beat it"""
    baseline: Candidate
    """the untuned setting, measured"""
    predicted: tuple[Candidate, ...]
    """every point with its prediction, best first"""
    confirmed: tuple[Candidate, ...]
    """what was measured, the baseline first"""
    slo: SLO
    """what was asked"""
    target: float = 0.99
    """attainment that counts as meeting the SLO"""
    costs: Mapping[str, IterationCost] = field(default_factory=dict)
    """what a step takes, by :func:`~hasten.tune.kv_precision.runtime_of` of a setting, where that was fitted"""

    @property
    def improved(self) -> bool:
        """Whether the tuned setting really does better than the untuned one."""
        return self.best.knobs != self.baseline.knobs

    def verdict(self) -> str:
        """One plain sentence."""
        tuned, untuned = self.best.values, self.baseline.values
        if not self.improved:
            return f"tuning did not help: the untuned setting serves {untuned['attainment']:.1%} within {self.slo}"
        met = "meets" if tuned["attainment"] >= self.target else "still misses"
        return (
            f"{self.best.name} {met} {self.slo}: {tuned['attainment']:.1%} of requests instead of "
            f"{untuned['attainment']:.1%}, goodput {tuned['goodput']:.3g} instead of {untuned['goodput']:.3g} /s"
        )

    @property
    def frontier(self) -> Frontier:
        """Confirmed settings: end-to-end latency against attainment."""
        return Frontier(self.confirmed, AXES)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "verdict": self.verdict(),
            "slo": str(self.slo),
            "best": self.best.to_json(),
            "baseline": self.baseline.to_json(),
            "confirmed": [c.to_json() for c in self.confirmed],
            "predicted": [c.to_json() for c in self.predicted],
        }


def _score(values: Mapping[str, float]) -> tuple[float, float, float]:
    """Less is better: attainment in steps of half a per cent, goodput in steps of two per cent, then the tail."""
    tail = values.get("e2e@p99", math.inf)
    goodput = values.get("goodput", 0.0)
    steps = round(math.log(goodput) / math.log(1.02)) if goodput > 0 else -math.inf
    return (-round(values.get("attainment", 0.0) * 200), -steps, math.inf if math.isnan(tail) else tail)


def _better(tuned: Mapping[str, float], untuned: Mapping[str, float]) -> bool:
    """Whether a difference is worth claiming: a per cent more requests in the SLO, or as many and 5 % more goodput."""
    gain = tuned["attainment"] - untuned["attainment"]
    return gain >= 0.01 or (gain >= -0.005 and tuned["goodput"] >= 1.05 * untuned["goodput"])


def tune_serving(
    space: Space,
    predict: Callable[[Point], Mapping[str, float]],
    measure: Callable[[Point], Mapping[str, float]],
    slo: SLO,
    *,
    baseline: Point,
    confirm: int = 3,
    target: float = 0.99,
    storage: Path | None = None,
    name: str = "serving",
    facts: Mapping[str, Any] | None = None,
    time_limit: float | None = None,
    clock: Clock | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> ServingResult:
    """Predict every point of ``space``, confirm the best ``confirm`` of them between two runs of ``baseline``.

    ``predict`` and ``measure`` give values as :func:`values_of` names them; ``baseline`` is the untuned setting and
    need not lie in the space. With ``storage`` a killed search goes on where it was. ``time_limit`` in seconds
    bounds the confirmation; the baseline and one candidate are always measured.
    """
    if confirm < 1:
        raise ConfigurationError(f"confirm is {confirm}; at least 1 candidate must be measured")
    clock = clock or MonotonicClock()
    told: Callable[[str, float], None] = progress or (lambda stage, share: None)
    points = list(space.points())
    predicted: list[Candidate] = []
    for index, point in enumerate(points):
        told(f"predicting {_name(point)}", 0.4 * index / len(points))
        predicted.append(Candidate(_name(point), point, {}, dict(predict(point))))
    predicted.sort(key=lambda c: _score(c.predicted))
    chosen = [c.knobs for c in predicted if key_of(c.knobs) != key_of(baseline)][:confirm]
    expectations = {key_of(c.knobs): c.predicted for c in predicted}
    # The untuned setting runs first and last, so that a machine that drifts is not taken for a success.
    turns = [f"{turn} {key_of(p)}" for turn, p in enumerate([baseline, *chosen, baseline])]
    search = Search(
        Space((Knob("setting", tuple(turns)),)),
        lambda choice: Outcome(dict(measure(_point(choice)))),
        AXES,
        label=lambda choice: _name(_point(choice)),
        storage=storage,
        name=name,
        facts={"slo": str(slo), **(facts or {})},
        first=tuple({"setting": t} for t in turns),
    )
    done = search.run(
        time_limit=time_limit, least=2, clock=clock, progress=lambda s, x: told(f"measuring {s}", 0.4 + 0.6 * x)
    )
    judged = []
    for c in done:
        attained = c.values.get("attainment", 0.0)
        broken = () if attained >= target else (f"attains {attained:.1%}",)
        point = _point(c.knobs)
        expected = expectations.get(key_of(point), {})
        if c.measured:
            judged.append(replace(c, knobs=point, predicted=expected, violations=broken))
    untuned = [c for c in judged if key_of(c.knobs) == key_of(baseline)]
    if not untuned:
        raise ConfigurationError("the untuned setting could not be measured, so nothing can be compared with it")
    reference = min(untuned, key=lambda c: _score(c.values))  # the better of its runs counts
    confirmed = (reference, *(c for c in judged if key_of(c.knobs) != key_of(baseline)))
    best = min(confirmed, key=lambda c: _score(c.values))
    if not _better(best.values, reference.values):
        best = reference
    told("done", 1.0)
    return ServingResult(best, reference, tuple(predicted), confirmed, slo, target)


def _point(choice: Point) -> dict[str, Any]:
    import json

    point: dict[str, Any] = json.loads(choice["setting"].partition(" ")[2])
    return point


def _name(point: Point) -> str:
    plain = ("policy", "precision")
    return ", ".join(f"{v}" if k in plain else f"{k} {v}" for k, v in point.items() if (k, v) != ("guesses", 0))
