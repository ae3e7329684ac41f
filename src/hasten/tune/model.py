"""``hasten.tune(model, data, budget)``: the recipe that meets the budget and loses least.

Every candidate is built from a recipe and measured interleaved with the unchanged model in one run, so a speed-up is
never the machine's mood. Memory and size are predicted from the formats before anything is built. The chosen one is
measured once more from scratch before it is called best; if it does not hold, the next one is tried.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hasten.budget import Budget
from hasten.clock import Clock, MonotonicClock
from hasten.compress import Plan, Recipe, WeightPrecision
from hasten.compress.given import answers, finite_examples, finite_parameters, fitting
from hasten.errors import ConfigurationError
from hasten.measure import energy as energies
from hasten.measure.counting import call
from hasten.measure.device import lies_on, synchronise
from hasten.measure.latency import Comparison, Protocol, compare
from hasten.measure.machine import Machine
from hasten.measure.memory import model_bytes, rise
from hasten.measure.stats import summarise
from hasten.tune.confirm import confirm, thorough
from hasten.tune.frontier import Axis, Candidate, Frontier
from hasten.tune.layers import sensitivities
from hasten.tune.saved import describe, identity
from hasten.tune.search import Outcome, Search
from hasten.tune.space import Point, Space, recipe_of, recipe_space, with_choices

__all__ = ["TuneResult", "fidelity", "tune"]

_MEASURED = {"latency", "quality", "size", "throughput", "memory", "energy"}
_WHOLE = ("int8-network", "fused")
"""Formats of whole networks, whose operations are not those of the table of kernels."""
_MOST_POINTS = 1000
"""Of a space, that are looked through for those to begin with."""
_BITS = {"fp32": 32.0, "bf16": 16.0, "int8": 8.0, "int4": 4.0, "fp8": 8.0}


def fidelity(model: nn.Module, other: nn.Module, data: Sequence[Any]) -> float:
    """How much of the unchanged model's output is kept: ``1 - ‖y - y₀‖ / ‖y₀‖`` over all examples, at least 0.

    The default quality where no labels are given.
    """
    error = norm = 0.0
    with torch.inference_mode():
        for example in data:
            for a, b in zip(_floats(call(model, example)), _floats(call(other, example)), strict=True):
                error += float((a.double() - b.double()).square().sum())
                norm += float(a.double().square().sum())
    return max(0.0, 1.0 - (error / norm) ** 0.5) if norm else 1.0


def _floats(tree: Any) -> list[Tensor]:
    from torch.utils import _pytree as pytree

    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@dataclass(frozen=True)
class TuneResult:
    """What the search found."""

    best: Candidate | None
    """the best confirmed candidate inside the budget; None where nothing met it"""
    frontier: Frontier
    """everything that was considered"""
    recipe: Recipe
    """how to make the best model, with its plan; empty where the unchanged model is best or nothing met the budget"""
    model: nn.Module
    """the best model; the unchanged one where nothing met the budget"""
    baseline: Candidate
    """the unchanged model's own numbers"""
    budget: Budget
    """what was asked"""
    study: Path | None
    """the SQLite file, where one was kept"""
    comparison: Comparison | None = None
    """the confirming run of the best against the unchanged model"""
    points: int | None = None
    """points of the space; more than there are candidates when the time limit ended the search"""
    sensitivity: Mapping[str, float] = field(default_factory=dict)
    """quality lost, as a share of the unchanged model's, by each layer of the best recipe alone; empty where its layers
    do not stand alone"""
    tuned: Mapping[str, Any] = field(default_factory=dict)
    """class, parameters and digest of the unchanged model, so that a stored result is not taken for another's"""

    def verdict(self) -> str:
        """One plain sentence, and how much of the space was tried where that was not all."""
        tried = len(self.frontier.candidates)
        rest = (
            "" if self.points is None or tried >= self.points else f" ({tried} of {self.points} candidates were tried)"
        )
        return self._sentence() + self._beside() + rest

    def _beside(self) -> str:
        """What other work took of the cores, where it was much: ratios may be others on an idle machine."""
        if self.comparison is None or not self.comparison.disturbed:
            return ""
        return (
            f"; threads waited for a core {self.comparison.waited:.1f} s of each second, so other work ran beside: on "
            "an idle machine ratios may differ"
        )

    def _sentence(self) -> str:
        if self.best is None:
            near = self.frontier.closest(self.budget)
            guess = "" if near is None or near.measured else " (predicted)"
            detail = f"; closest is {near.name}: {'; '.join(near.violations)}{guess}" if near is not None else ""
            return f"no candidate meets {self.budget}{detail}"
        if not self.recipe.techniques:
            kept = f"the unchanged model meets {self.budget}"
            if len(self.frontier.candidates) <= 1 < (self.points or 1):
                return f"{kept}; no recipe was tried in that time, so give a longer one"
            return f"{kept}, and no measured recipe does better; nothing needs to be given up"
        quality = f"{100 * self.best.values['quality']:.2f} % of the quality kept"
        speed = self.comparison.verdict(self.best.name) if self.comparison is not None else ""
        return f"{self.best.name} meets {self.budget} with {quality}; {speed}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, the recipe as YAML."""
        return {
            "verdict": self.verdict(),
            "budget": str(self.budget),
            "best": self.best.to_json() if self.best is not None else None,
            "baseline": self.baseline.to_json(),
            "recipe": self.recipe.to_yaml(),
            "frontier": self.frontier.to_json(),
            "comparison": self.comparison.to_json() if self.comparison is not None else None,
            "sensitivity": dict(self.sensitivity),
            "machine": Machine.detect().to_json(),
        }

    def report(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained HTML file."""
        from hasten.tune.report import of_result

        of_result(self).write(path)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write recipe, figures and page to ``folder``; :func:`hasten.tune.load` reads them. See :mod:`saved`."""
        from hasten.tune.saved import save

        return save(self, folder)


class _Bench:
    """Builds candidates and measures each next to the unchanged model."""

    def __init__(
        self,
        model: nn.Module,
        data: Sequence[Any],
        budget: Budget,
        quality: Callable[[nn.Module], float] | None,
        tokens: int,
        protocol: Protocol,
        clock: Clock,
        power: float | None = None,
        energy: Callable[[nn.Module], float] | None = None,
        given: Mapping[str, Recipe] | None = None,
        inputs: Sequence[Any] | None = None,
    ) -> None:
        self.given, self.inputs = given or {}, inputs
        self.model, self.data, self.budget, self.energy = model, data, budget, energy
        self.place = lies_on(model) or torch.device("cpu")
        self.quality, self.tokens, self.protocol, self.clock, self.power = quality, tokens, protocol, clock, power
        self.reference = quality(model) if quality is not None else 1.0
        if quality is not None and not self.reference > 0:
            raise ConfigurationError(
                f"the unchanged model's quality is {self.reference}; give a positive one that is larger when better"
            )
        self.metrics = {b.metric for b in budget.bounds}
        self.percentiles = sorted({50.0, 99.0} | {b.percentile for b in budget.bounds if b.percentile is not None})
        self.size = model_bytes(model)
        self.unchanged: dict[str, float] | None = None  # its figures of the latest run

    def build(self, point: Point) -> tuple[nn.Module, Plan]:
        return self.recipe(point).apply(self.model, self.calibration(point))

    def recipe(self, point: Point) -> Recipe:
        """What the point stands for."""
        given = self.given.get(point["format"])
        return given if given is not None else recipe_of(point, self.model, self.tokens)

    def calibration(self, point: Point) -> Sequence[Any] | None:
        """Inputs to learn from. The data themselves serve for ranges of activations and for one threshold alone: what
        fits matrices to them would then be judged on them."""
        if point["format"] == "fused":
            return self.data  # for the shapes alone, and what is timed
        if self.inputs is not None:
            return self.inputs
        return self.data if point["format"] in ("int8-network", "confidence") else None

    def predict(self, point: Point) -> Mapping[str, float] | None:
        """Least bytes that the recipe can reach (every linear weight in its format, scales not counted), and seconds:
        those of the unchanged model less what the table of kernels says its layers save."""
        if point["format"] in self.given or point["format"] in _WHOLE or point.get("remove"):
            return None  # other layers shrink too, or layers by how much their ranks say
        if point["format"] not in _BITS:  # unchanged weights
            return {"size": float(self.size)}
        technique = recipe_of(point, self.model, self.tokens).techniques[0]
        assert isinstance(technique, WeightPrecision)
        bits, saved = _BITS[point["format"]], 0.0
        for name, layer in self.model.named_modules():
            if type(layer) is nn.Linear and name not in technique.skip:
                held = layer.weight.numel() * layer.weight.element_size()
                saved += max(0.0, held - layer.weight.numel() * bits / 8)
        found = {"size": self.size - saved}
        if self.unchanged is not None and "latency" in self.metrics:
            before = self.unchanged["latency@p50"]
            share = max(0.0, 1 - technique.saved_time(self.model, clock=self.clock) / before) if before else 1.0
            found |= {k: v * share for k, v in self.unchanged.items() if k.startswith("latency@")}
        return found

    def measure(self, point: Point) -> Outcome:
        new, plan = self.build(point)
        changes = [action for step in plan.steps for action in step.values()]
        if changes and all(action == "kept" for action in changes):
            raise ConfigurationError(f"it is the unchanged model: {_why_kept(new)}")
        comparison = self.compare({"candidate": new})
        values = self.values(new, comparison, "candidate")
        unchanged = self.unchanged = self.values(self.model, comparison, "unchanged")
        detail = {
            "plan": plan.to_dict(),
            "speedup": comparison.speedup("candidate").to_json(),
            "unchanged": unchanged,
            "notes": list(getattr(getattr(new, "report", None), "notes", ())),
            "layers": {r.layer: [r.reason, r.bytes_after] for r in getattr(getattr(new, "report", None), "layers", ())},
        }
        return Outcome(values, detail)

    def rebuild(self, candidate: Candidate) -> tuple[nn.Module, Recipe]:
        """The candidate's model from its plan, and its recipe."""
        steps = tuple(candidate.detail.get("plan", {}).get("steps", ()))
        recipe = replace(self.recipe(candidate.knobs), plan=Plan(steps))
        return recipe.apply(self.model, self.calibration(candidate.knobs))[0], recipe

    def compare_longer(self, others: Mapping[str, nn.Module]) -> Comparison:
        """As :meth:`compare`, by the rules of the last run."""
        return self.compare(others, thorough(self.protocol))

    def compare(self, others: Mapping[str, nn.Module], protocol: Protocol | None = None) -> Comparison:
        """Models by name in turns with the unchanged one."""
        example = self.data[0]

        def runner(one: nn.Module) -> Callable[[], None]:
            def run() -> None:
                with torch.inference_mode():
                    call(one, example)

            return run

        calls = {"unchanged": runner(self.model), **{name: runner(one) for name, one in others.items()}}
        barrier = (lambda: synchronise(self.place)) if self.place.type == "cuda" else None
        return compare(calls, protocol or self.protocol, clock=self.clock, synchronise=barrier)

    def kept(self, model: nn.Module) -> float:
        """Quality of a model as a share of the unchanged one's."""
        if self.quality is not None:
            return self.quality(model) / self.reference
        return fidelity(self.model, model, self.data)

    def values(self, model: nn.Module, comparison: Comparison, name: str) -> dict[str, float]:
        summary = summarise(comparison.samples[name].times, self.percentiles)
        kept = self.kept(model)
        size = float(model_bytes(model))
        return {
            **self.bounded(model, summary.at(50.0), size),
            **{f"latency@p{q:g}": summary.at(q) for q in self.percentiles},
            "quality": kept,
            "size": size,
            "throughput": 1 / summary.mean if summary.mean else float("inf"),
        }

    def bounded(self, model: nn.Module, seconds: float, size: float) -> dict[str, float]:
        """Memory and joules of one call, only where the budget bounds them."""
        found: dict[str, float] = {}

        def run() -> None:
            with torch.inference_mode():
                call(model, self.data[0])

        if "memory" in self.metrics:
            found["memory"] = size + rise(run, self.place)
        if "energy" in self.metrics and self.energy is not None:
            found["energy"] = self.energy(model)
        elif "energy" in self.metrics:
            meter = energies.detect_meter(str(self.place))
            if meter is not None:
                found["energy"] = energies.measure_energy(run, meter, clock=self.clock).joules
            elif self.power is not None:
                found["energy"] = energies.tdp(seconds, self.power).joules
        return found


def _why_kept(new: nn.Module) -> str:
    """The reason of the first layer, and for how many others there is one."""
    layers = getattr(getattr(new, "report", None), "layers", ())
    told = [r for r in layers if r.reason]
    if not told:
        return "every layer was kept"
    rest = f", and {len(layers) - 1} more layers were kept" if len(layers) > 1 else ""
    return f"layer {told[0].layer!r} was kept: {told[0].reason}{rest}"


def named(recipes: Sequence[Recipe], taken: Sequence[Any] = ()) -> dict[str, Recipe]:
    """Recipes by their labels, which say that they were given where the space has one of its own (``taken``); raises
    :class:`~hasten.errors.ConfigurationError` for two that look the same."""
    found: dict[str, Recipe] = {}
    for recipe in recipes:
        if not isinstance(recipe, Recipe) or not recipe.techniques:
            raise ConfigurationError(f"recipes holds {recipe!r}; give Recipe((technique, …)), not the empty one")
        label = f"{recipe.label} (given)" if recipe.label in taken else recipe.label
        if label in found:
            raise ConfigurationError(f"two recipes are {recipe.label!r}; give each once")
        found[label] = recipe
    return found


def _judge(budget: Budget) -> Callable[[Mapping[str, float]], list[str]]:
    return lambda values: budget.violations(values)


def tune(
    model: nn.Module,
    data: Sequence[Any],
    budget: Budget | str,
    *,
    quality: Callable[[nn.Module], float] | None = None,
    space: Space | None = None,
    recipes: Sequence[Recipe] = (),
    calibration: Sequence[Any] | None = None,
    storage: str | os.PathLike[str] | None = None,
    name: str = "tune",
    time_limit: float | None = 120.0,
    protocol: Protocol | None = None,
    tokens: int | None = None,
    power: float | None = None,
    energy: Callable[[nn.Module], float] | None = None,
    clock: Clock | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> TuneResult:
    """Find the recipe that makes ``model`` meet ``budget`` and loses least quality.

    ``data``: examples (tensors, tuples of arguments or dicts); the first is timed, all judge the fidelity. ``quality``:
    a function of a model that is larger when better; without it the fidelity of the output counts. ``recipes``: further
    candidates beside those of the space, of any techniques (conditional computation, decompositions, mixed precision,
    and what they compose to). ``calibration``: inputs from which techniques may learn, best not those of ``data``;
    a recipe that needs them and gets none is a candidate that says so. ``storage``: an
    SQLite file, so that a killed search goes on where it was. ``tokens``: rows that a linear layer sees at a time,
    taken from the first example where it is not given. Candidates are built and timed on the device of the model, where
    ``data`` lie, too. The model is set to eval mode while it is tuned and is otherwise untouched. Memory (weights and
    what one call takes) and energy are measured where the budget bounds them; without a meter the energy is ``power``
    (watts) times the median time. ``energy`` counts joules instead, such as those of a table of operations.
    """
    if isinstance(budget, str):
        budget = Budget.parse(budget)
    if not isinstance(budget, Budget):
        raise ConfigurationError(f'budget is {budget!r}; give a text such as "p99<5ms, quality>99%", or a Budget')
    fitting("tune", model, data, "data")
    fitting("tune", model, calibration)
    if tokens is not None and tokens < 1:
        raise ConfigurationError(f"tokens is {tokens}, and a layer sees at least one row; give 1 or more")
    if space is not None and not any(k.name == "format" for k in space.knobs):
        raise ConfigurationError("space has no knob 'format'; give Knob('format', ('unchanged', …)), or leave it out")
    if not data:
        raise ConfigurationError("tuning needs at least one example; give data=[example]")
    unknown = sorted({b.metric for b in budget.bounds} - _MEASURED)
    if unknown:
        raise ConfigurationError(
            f"tune does not measure {', '.join(unknown)} per candidate; bound {', '.join(sorted(_MEASURED))}"
        )
    if power is not None and not power > 0:
        raise ConfigurationError(f"power is {power}; give the watts under load, such as 65")
    place = lies_on(model)
    unmetered = power is None and energy is None and energies.detect_meter(str(place or "cpu")) is None
    if unmetered and any(b.metric == "energy" for b in budget.bounds):
        raise ConfigurationError(
            "this machine has no energy meter that may be read; give power= (--power), its watts under load, so that "
            "energy is power times time"
        )
    finite_parameters(model, "tuned")
    finite_examples(data, "data")
    if calibration is not None:
        finite_examples(calibration, "calibration")
    clock = clock or MonotonicClock()
    rules = protocol or Protocol(min_samples=60, min_time=0.4, max_time=20.0)
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        answers(model, data[0])
        wide = space or recipe_space(model)
        bench = _Bench(
            model,
            data,
            budget,
            quality,
            tokens or _rows(data[0]),
            rules,
            clock,
            power,
            energy,
            named(recipes, next((k.choices for k in wide.knobs if k.name == "format"), ())),
            calibration,
        )
        chosen = with_choices(wide, "format", tuple(bench.given))
        axes = (Axis(_latency_key(budget)), Axis("quality", maximise=True, kind="ratio"))
        search = Search(
            chosen,
            bench.measure,
            axes,
            violations=_judge(budget),
            predict=bench.predict,
            margin={"size": 0.0},  # a lower bound
            label=lambda point: bench.recipe(point).label,
            storage=Path(storage) if storage is not None else None,
            name=name,
            facts={"budget": str(budget), "model": identity(model), "tokens": bench.tokens},
            first=_first(chosen, tuple(bench.given)),
        )
        candidates = search.run(time_limit=time_limit, clock=clock, progress=progress)
        return replace(_conclude(bench, candidates, axes, search.storage), points=chosen.size())
    finally:
        for module, training in modes:
            module.training = training


def _conclude(
    bench: _Bench, candidates: Sequence[Candidate], axes: tuple[Axis, ...], storage: Path | None
) -> TuneResult:
    """Confirm the best with a fresh run; what does not hold is marked and the next one is tried."""
    baseline = next((c for c in candidates if c.knobs["format"] == "unchanged"), None)
    if baseline is None or not baseline.measured:
        outcome = bench.measure({"format": "unchanged"})
        broken = tuple(bench.budget.violations(outcome.values))
        baseline = Candidate("unchanged", {"format": "unchanged"}, outcome.values, {}, broken)
    found = confirm(candidates, axes, bench.budget, bench.rebuild, bench.compare_longer, bench.values)
    frontier, model = Frontier(found.pool, axes), found.model if found.model is not None else bench.model
    if found.best is not None and found.model is None:
        baseline = found.best
    return TuneResult(
        found.best, frontier, found.recipe, model, baseline, bench.budget, storage, found.comparison,
        sensitivity=sensitivities(bench.model, found.model, bench.kept), tuned=describe(bench.model),
    )  # fmt: skip


def _first(space: Space, given: Sequence[str] = ()) -> tuple[Point, ...]:
    """The unchanged model, then the recipes that were given, which a time limit must not leave out, then whole networks
    in another form: the fewest, and mostly the furthest from it."""
    points: list[Point] = [{"format": name} for name in ("unchanged", *given)]
    formats = next((k.choices for k in space.knobs if k.name == "format"), ())
    if any(f in _WHOLE for f in formats):
        whole = (p for p in itertools.islice(space.points(), _MOST_POINTS) if p["format"] in _WHOLE)
        points += [p for p in whole if not p.get("remove")]
    return tuple(points)


def _latency_key(budget: Budget) -> str:
    bound = next((b.percentile for b in budget.bounds if b.metric == "latency"), None)
    return f"latency@p{bound if bound is not None else 50.0:g}"


def _rows(example: Any) -> int:
    """Rows that a linear layer sees: all but the last dimension of the first tensor."""
    from torch.utils import _pytree as pytree

    tensors = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)]
    if not tensors:
        return 1
    first = tensors[0]
    return max(1, first.numel() // first.shape[-1] if first.is_floating_point() and first.ndim else first.numel())
