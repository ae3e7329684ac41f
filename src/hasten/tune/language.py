"""The search over serving knobs for a real language model: costs are calibrated, candidates are run on the engine.

Each precision's runtime is loaded and calibrated once; the simulator predicts every setting on its cost; the best are
confirmed by replaying the same workload on the engine in this process, in real time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.budget import SLO
from hasten.clock import Clock, MonotonicClock
from hasten.errors import ConfigurationError

if TYPE_CHECKING:
    from hasten.serve.cost import IterationCost
    from hasten.serve.workload import Workload
    from hasten.tune.serving import ServingResult
    from hasten.tune.space import Point

__all__ = ["replay_in_engine", "search", "tune_server"]


def replay_in_engine(
    model: Any, point: Point, load: Workload, slo: SLO, *, blocks: int, clock: Clock | None = None, seed: int = 0,
    draft: str | None = None, cost: IterationCost | None = None,
) -> dict[str, float]:  # fmt: skip
    """Serve ``load`` on a fresh engine with the knobs of ``point``, in the workload's own time; the values measured.

    ``cost`` of a step is needed where the token budget follows from the SLO.

    Prompts are library code where the model reads text: what guesses are worth depends on the text.
    """
    from hasten.language.sampling import SamplingParams
    from hasten.language.speculate.choose import choose
    from hasten.serve.engine import Engine
    from hasten.serve.metrics import summarise
    from hasten.tune.guessing import policy_of, prompts_for
    from hasten.tune.serving import policy_for, values_of

    clock = clock or MonotonicClock()
    if hasattr(model.executor, "keep_cache_in"):
        model.executor.keep_cache_in(point.get("kv_precision", getattr(model, "kv_precision", "auto")))
    policy = policy_for(point, slo, cost)
    proposer = choose(model, point.get("speculate", "off"), draft)
    engine = Engine(
        model, policy, num_blocks=blocks, clock=clock, proposer=proposer, speculation=policy_of(point),
        prefix_sharing=False,
    )  # fmt: skip
    prompts = prompts_for(model, [spec.prompt_len for spec in load], seed)
    began, origin, index = clock.now(), load[0].arrival, 0
    while index < len(load) or engine.has_work:
        while index < len(load) and load[index].arrival - origin <= clock.now() - began:
            spec = load[index]
            params = SamplingParams(temperature=0.0, max_tokens=spec.output_len, ignore_eos=True)
            engine.add(prompts[index], params, arrival=began + spec.arrival - origin)
            index += 1
        if engine.has_work:
            engine.step()
        else:
            clock.sleep(load[index].arrival - origin - (clock.now() - began))
    return values_of(summarise(engine.records, slo))


def search(
    name: str,
    slo: SLO,
    *,
    workload: str = "conversation",
    rate: float = 2.0,
    requests: int = 60,
    precisions: Sequence[str] = ("bf16", "int8"),
    kv_precisions: Sequence[str] = ("auto", "int8"),
    kv_quality: float = 0.01,
    speculate: Sequence[str] = ("off", "ngram", "auto"),
    draft: str | None = None,
    confirm: int = 3,
    storage: Path | None = None,
    time_limit: float | None = None,
    seed: int = 0,
    calibration_time: float = 8.0,
    clock: Clock | None = None,
    progress: Callable[[str, float], None] | None = None,
    model: Any = None,
) -> ServingResult:
    """Tune the server of the language model ``name`` for ``slo`` at ``rate`` requests per second.

    ``workload`` is a built-in sample or the file of a trace, scaled to the model's context; ``model`` hands in a loaded
    one. ``kv_precisions``: of the KV cache, as far as they raise the perplexity by at most ``kv_quality``.
    ``speculate``: who may guess, in the words of ``hasten serve --speculate``; those that the model cannot do are
    left out. The untuned setting is prefill-first in the first precision, without guesses.
    """
    from hasten.language import load as load_model
    from hasten.serve import workload as workloads
    from hasten.tune.guessing import words_for

    if not precisions:
        raise ConfigurationError("no precision is left to try; give for example --precisions bf16,int8")
    base = model if model is not None else load_model(name, dtype=precisions[0])
    context = int(base.config.max_position_embeddings)
    if workload in ("conversation", "code"):
        offered = workloads.sample(workload, rate=rate, requests=requests, seed=seed)
    else:
        offered = workloads.load(workload).at_rate(rate, seed=seed).head(requests)
    return tune_server(
        base,
        slo,
        offered.scaled(max_prompt=context * 5 // 8, max_output=context // 4),
        baseline={"policy": "prefill-first", "precision": precisions[0], "max_num_seqs": 64},
        precisions=precisions,
        kv_precisions=kv_precisions,
        kv_quality=kv_quality,
        speculate=words_for(base, speculate, draft),
        draft=draft,
        confirm=confirm,
        storage=storage,
        time_limit=time_limit,
        seed=seed,
        calibration_time=calibration_time,
        clock=clock,
        facts={
            "model": name,
            "rate": rate,
            "requests": requests,
            "workload": workload,
            "seed": seed,
            "speculate": list(speculate),
            "draft": draft,
        },
        progress=progress,
    )


def tune_server(
    model: Any,
    slo: SLO,
    offered: Workload,
    *,
    baseline: Point,
    precisions: Sequence[str],
    kv_precisions: Sequence[str] = ("auto",),
    kv_quality: float = 0.01,
    speculate: Sequence[str] = ("off",),
    guesses: Sequence[int] = (0, 4),
    draft: str | None = None,
    costs: Mapping[str, IterationCost] | None = None,
    blocks: int | None = None,
    overhead: float = 0.0,
    confirm: int = 3,
    storage: Path | None = None,
    time_limit: float | None = None,
    calibration_time: float = 8.0,
    seed: int = 0,
    clock: Clock | None = None,
    facts: Mapping[str, Any] | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> ServingResult:
    """Search policy knobs, precisions of weights and cache, and who guesses, for ``slo`` under the load ``offered``.

    ``speculate``: words of ``--speculate``; ``guesses``: numbers of guesses, 0 leaves them to goodput. ``costs`` are
    iteration costs that are known already; the others are calibrated. ``overhead`` in seconds is added to every
    simulated step.
    """
    from hasten.serve.cost import IterationCost as Cost
    from hasten.tune.guessing import measure_guessing, prompts_for
    from hasten.tune.kv_precision import runtime_of, within
    from hasten.tune.serving import simulated, tune_serving
    from hasten.tune.space import Knob, Space, serving_space

    if not speculate or not guesses or min(guesses) < 0:
        raise ConfigurationError("say at least off for speculate, and numbers of guesses from 0 on")

    clock = clock or MonotonicClock()
    told: Callable[[str, float], None] = progress or (lambda stage, share: None)
    if blocks is None:
        context = int(model.config.max_position_embeddings)
        blocks = max(2 * context // 16, min(4096, 2**29 // max(1, model.executor.bytes_per_token * 16)))
    models, known, room = {}, dict(costs or {}), {}
    kept = within(model, kv_precisions, kv_quality, seed=seed)
    for index, precision in enumerate(precisions):
        models[precision] = model if precision == model.executor.precision else model.with_precision(precision)
        executor = models[precision].executor
        usual = executor.bytes_per_token
        for part, kv in enumerate(kept):
            runtime = runtime_of({"precision": precision, "kv_precision": kv})
            told(f"calibrating {runtime}", 0.3 * (index + part / len(kept)) / len(precisions))
            if kv != "auto":
                executor.keep_cache_in(kv)
            room[runtime] = blocks * usual // executor.bytes_per_token
            if runtime not in known:
                known[runtime] = Cost.calibrate(models[precision], clock, time_limit=calibration_time, progress=False)
        if len(kept) > 1:
            executor.keep_cache_in("auto")

    words = [word for word in speculate if word != "off"]
    guessing = {}
    for index, (precision, word) in enumerate((p, w) for p in precisions for w in words):
        told(f"measuring {word} with {precision}", 0.3 + 0.1 * index / (len(precisions) * len(words)))
        prompts = prompts_for(models[precision], [spec.prompt_len for spec in list(offered)[:6]], seed + 1)
        guessing[precision, word] = measure_guessing(models[precision], word, prompts, draft=draft, clock=clock)

    def measure(point: Point) -> dict[str, float]:
        one = models[point["precision"]]
        runtime = runtime_of(point)
        return replay_in_engine(
            one, point, offered, slo, blocks=room[runtime], cost=known[runtime], clock=clock, seed=seed, draft=draft
        )

    space = serving_space(precisions=precisions)
    if len(kept) > 1:
        space = Space((*space.knobs, Knob("kv_precision", tuple(kept))), space.allowed)
    if words:
        counts = Knob("guesses", tuple(guesses), lambda point: point["speculate"] != "off")
        space = Space((*space.knobs, Knob("speculate", tuple(speculate)), counts), space.allowed)
    result = tune_serving(
        space,
        simulated(known, offered, slo, blocks=room, overhead=overhead, guessing=guessing),
        measure,
        slo,
        baseline=baseline,
        confirm=confirm,
        storage=storage,
        facts={**(facts or {}), **({"kv_loss": kept} if len(kept) > 1 else {})} or None,
        time_limit=time_limit,
        clock=clock,
        progress=lambda stage, share: told(stage, 0.4 + 0.6 * share),
    )
    return replace(result, costs=known)
