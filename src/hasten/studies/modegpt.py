"""MoDeGPT: pairs of matrices compressed together keep more of a language model than matrices one by one.

"MoDeGPT: Modular Decomposition for Large Language Model Compression", Lin et al. 2024, arXiv:2408.09632. The embedded
model (4 M weights, 8 layers of width 192) on library files that it never saw, calibration from its training files;
speed on a decoder of width 1024 with random weights. Small models are less redundant than those of the publication.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from hasten.studies.study import Check, Scale, Study

__all__ = ["study"]

_LINEARS = ("model.layers.*.self_attn.*", "model.layers.*.mlp.*")


def run(scale: Scale) -> Iterator[Check]:
    """The checks of the card."""
    yield from exact(scale)
    scale.progress("held-out text", 0.1)
    yield from quality(scale)
    scale.progress("cost", 0.75)
    yield from cost(scale)
    scale.progress("speed", 0.8)
    yield from speed(scale)
    scale.progress("done", 1.0)


def _tiny(**options: Any) -> Any:
    import torch

    from hasten.language import Decoder, DecoderConfig

    torch.manual_seed(0)
    model = Decoder(
        DecoderConfig(
            vocab_size=60,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            head_dim=16,
            intermediate_size=64,
            max_position_embeddings=256,
            **{"num_kv_heads": 2, **options},
        )  # fmt: skip
    )
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.15)
        else:
            p.data.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def exact(scale: Scale) -> Iterator[Check]:
    """What is exact: full width, the tail of the singular values, least squares, duplicated units."""
    import torch

    from hasten.compress.lowrank import pairs
    from hasten.compress.lowrank.modular import ModularDecomposition

    generator = torch.Generator().manual_seed(scale.seed)
    tokens = torch.randint(0, 60, (2, 60), generator=generator)
    worst = 0.0
    families: list[dict[str, Any]] = [
        {"num_kv_heads": 1}, {}, {"num_kv_heads": 4}, {"attention_bias": True, "attention_out_bias": True},
        {"partial_rotary_factor": 0.5}, {"qk_norm": True},
    ]  # fmt: skip
    for options in families:
        model = _tiny(**options)
        same = ModularDecomposition(ratio=1e-9)(model, [tokens])
        with torch.no_grad():
            worst = max(worst, float((same(tokens) - model(tokens)).abs().max()))
    yield Check.at_most(
        "logits with all widths kept against the original", worst, 1e-5,
        note="1, 2 and 4 key heads, biases, half rotation, norms on heads; all three pairs rebuilt",
    )  # fmt: skip

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    rows, first, second = normal(200, 12), normal(8, 12), normal(18, 8)
    moment = rows.T @ rows / len(rows)
    gap = 0.0
    for keep in range(1, 9):
        one, two, values = pairs.joint_svd(moment, first, second, keep)
        made = (rows @ first.T @ second.T - rows @ one.T @ two.T).norm() / len(rows) ** 0.5
        gap = max(gap, abs(float(made - values[keep:].square().sum().sqrt())))
    yield Check.at_most("Type III: error less the tail of the singular values", gap, 1e-8)
    _, _, values = pairs.joint_svd(moment, first, second, 3)
    best = float(values[3:].square().sum())
    target = rows @ first.T @ second.T
    tried = [torch.nn.Parameter(0.3 * normal(3, 12)), torch.nn.Parameter(0.3 * normal(18, 3))]
    optimiser = torch.optim.Adam(tried, lr=0.02)
    steps = scale.choose(quick=500, full=2000)
    for _ in range(steps):
        loss = (target - rows @ tried[0].T @ tried[1].T).square().sum() / len(rows)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    yield Check.at_most(
        "Type III: by how much Adam beats it", best - float(loss.detach()), 1e-6, note=f"{steps} steps, rank 3 of 8"
    )
    hidden, following = normal(400, 32).relu(), normal(10, 32)
    moment = hidden.T @ hidden / len(hidden)
    kept = pairs.select_greedily(moment, following, 16)
    solved, _ = pairs.nystrom(moment, following, kept)
    right = moment[kept] @ following.T
    residual = float((moment[kept][:, kept] @ solved.T - right).norm() / right.norm())
    yield Check.at_most("Type I: residual of the normal equations", residual, 1e-8)
    twice, both = hidden.repeat(1, 2), following.repeat(1, 2)
    moment = twice.T @ twice / len(twice)
    kept = pairs.select_greedily(moment, both, 32)
    solved, _ = pairs.nystrom(moment, both, kept)
    lost = float((twice[:, kept] @ solved.T - twice @ both.T).abs().max())
    yield Check.at_most("Type I: error at half width where every unit is there twice", lost, 1e-8)


def _rows(scale: Scale) -> tuple[Any, Any, Any, Any]:
    """The model, and token rows (n, 512) of its training files, of validation and of test files."""
    import torch

    from hasten.language import load
    from hasten.language.corpus import documents

    model = load("pycode-4m")
    out: dict[str, list[list[int]]] = {"train": [], "validation": [], "test": []}
    for document in documents(suite=False):
        if len(document.text) > 3000 and len(out[document.split]) < scale.choose(quick=60, full=400):
            ids = model.tokenizer.encode(document.text[:12_000])
            out[document.split] += [ids[i : i + 512] for i in range(0, min(len(ids), 2049) - 512, 512)]
    rng = np.random.default_rng(scale.seed)
    parts = []
    for split, count in (
        ("train", None),
        ("validation", scale.choose(quick=4, full=24)),
        ("test", scale.choose(quick=6, full=36)),
    ):
        picked = rng.permutation(len(out[split]))[:count]
        parts.append(torch.tensor([out[split][i] for i in picked]))
    return model, parts[0], parts[1], parts[2]


def _score(model: Any, rows: Any) -> tuple[float, float]:
    """Perplexity and accuracy of the next token."""
    import torch

    nats, right, count = 0.0, 0, 0
    with torch.inference_mode():
        for batch in rows.split(8):
            logits, wanted = model(batch)[:, :-1].float(), batch[:, 1:]
            nats += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum"))
            right += int((logits.argmax(-1) == wanted).sum())
            count += wanted.numel()
    return math.exp(nats / count), right / count


def quality(scale: Scale) -> Iterator[Check]:
    """Perplexity on unseen files against every baseline, at 20, 30 and 40 % of the blocks' parameters."""
    from hasten.compress.lowrank.blocks import find_blocks
    from hasten.compress.lowrank.modular import KINDS, ModularDecomposition
    from hasten.compress.lowrank.statistics import gather
    from hasten.compress.lowrank.truncated import TruncatedSvd

    model, train, validation, test = _rows(scale)
    base = model.decoder.float()
    plain, accuracy = _score(base, test)
    seeds = scale.choose(quick=1, full=3)
    ratios = scale.choose(quick=(0.3,), full=(0.2, 0.3, 0.4))
    size = scale.choose(quick=8, full=32)
    found: dict[tuple[float, str], list[float]] = {}
    kept: list[tuple[float, float]] = []
    temperature = 0.0
    for seed in range(seeds):
        rng = np.random.default_rng((scale.seed, seed))
        calibration = list(train[rng.permutation(len(train))[:size]].split(8))
        statistics = gather(base, find_blocks(base), calibration, KINDS)
        if not temperature:
            tried = {
                t: _score(
                    ModularDecomposition(0.3, allocation="influence", temperature=t)(
                        base, calibration[:1], statistics=statistics
                    ),
                    validation,
                )[0]
                for t in scale.choose(quick=(0.2,), full=(0.1, 0.2, 0.5))
            }
            temperature = min(tried, key=lambda t: tried[t])
        for index, ratio in enumerate(ratios):
            rivals: dict[str, Any] = {
                "modular": ModularDecomposition(ratio, allocation="influence", temperature=temperature),
                "measured": ModularDecomposition(ratio, allocation="measured"),
                "uniform": ModularDecomposition(ratio, allocation="uniform"),
                "leverage": ModularDecomposition(
                    ratio, allocation="influence", temperature=temperature, selection="leverage"
                ),
                "magnitude": ModularDecomposition(ratio, allocation="uniform", selection="magnitude"),
                "random": ModularDecomposition(ratio, allocation="uniform", selection="random", seed=seed),
            }
            for name, technique in rivals.items():
                # Measuring takes a share of the calibration; the others look at their statistics alone.
                rows = calibration if name == "measured" else calibration[:1]
                small = technique(base, rows, statistics=statistics)
                found.setdefault((ratio, name), []).append(_score(small, test)[0])
            small = TruncatedSvd(ratio, layers=_LINEARS)(base, calibration)
            found.setdefault((ratio, "matrix by matrix"), []).append(_score(small, test)[0])
            done = (seed + (index + 1) / len(ratios)) / seeds
            scale.progress(f"seed {seed}, {ratio:.0%} removed", 0.1 + 0.6 * done)
        small = ModularDecomposition(0.25, allocation="measured")(base, calibration, statistics=statistics)
        kept.append(_score(small, test))
    for ratio in ratios:
        mean = {name: float(np.mean(v)) for (r, name), v in found.items() if r == ratio}
        worst = max(found[ratio, "modular"])
        least = min(min(found[ratio, n]) for n in ("matrix by matrix", "magnitude", "random"))
        shown = ", ".join(f"{n} {v:.2f}" for n, v in mean.items())
        yield Check(
            f"perplexity at {ratio:.0%} removed: modular below matrix by matrix, magnitude and random",
            mean["modular"], "", f"< {least:.2f}", worst < least,
            f"{shown}; original {plain:.2f}; {seeds} calibrations of {size} rows of 512 tokens",
        )  # fmt: skip
        yield Check(
            f"perplexity at {ratio:.0%} removed: allocation by influence no worse than uniform",
            mean["modular"], "", f"≤ {mean['uniform']:.3f}", mean["modular"] <= mean["uniform"],
            f"temperature {temperature:g}, chosen on validation files; mean of {seeds} calibrations",
        )  # fmt: skip
        yield Check(
            f"perplexity at {ratio:.0%} removed: allocation by what each pair's cut does to predictions below uniform",
            mean["measured"], "", f"< {mean['uniform']:.3f}", max(found[ratio, "measured"]) < mean["uniform"],
            f"ours, not published; the worst of {seeds} calibrations is judged; by influence {mean['modular']:.2f}",
        )  # fmt: skip
    yield Check.at_most(
        "relative rise of perplexity at 25 % of the blocks' parameters",
        float(np.mean([p for p, _ in kept])) / plain - 1, 0.25, "", f"original {plain:.2f}",
    )  # fmt: skip
    yield Check.at_least(
        "share of next-token accuracy kept at 25 %", float(np.mean([a for _, a in kept])) / accuracy, 0.9, "",
        f"original {accuracy:.3f}; a small model is less redundant than those of the publication",
    )  # fmt: skip


def cost(scale: Scale) -> Iterator[Check]:
    """No gradient, and a calibration that costs a few forward passes."""
    import torch

    from hasten.clock import MonotonicClock
    from hasten.compress.lowrank.allocation import PASSES
    from hasten.compress.lowrank.blocks import find_blocks
    from hasten.compress.lowrank.modular import KINDS, ModularDecomposition
    from hasten.compress.lowrank.statistics import gather
    from hasten.measure.counting import cost as count

    model, train, _, _ = _rows(scale)
    base = model.decoder.float()
    calibration = list(train[: scale.choose(quick=4, full=16)].split(4))
    with torch.inference_mode():
        small: Any = ModularDecomposition(0.3)(base, calibration)
    yield Check.equal(
        "tensors with gradients after a run in inference mode",
        sum(p.grad is not None for p in [*base.parameters(), *small.parameters()]), 0,
        note="a backward pass would raise there",
    )  # fmt: skip
    clock, times = MonotonicClock(), {"forward": [0.0], "statistics": [0.0]}
    for _ in range(2):
        with torch.inference_mode():
            began = clock.now()
            for batch in calibration:
                base(batch)
            times["forward"].append(clock.now() - began)
        began = clock.now()
        gather(base, find_blocks(base), calibration, KINDS)
        times["statistics"].append(clock.now() - began)
    ratio = min(times["statistics"][1:]) / min(times["forward"][1:])
    yield Check.at_most(
        "calibration over one forward pass of the same rows", ratio + PASSES, 5.0, "×",
        f"statistics {ratio:.2f}, and {PASSES:g} passes that measuring every pair takes",
    )  # fmt: skip
    tokens = calibration[0][:1, :128]
    before, after = (count(m, tokens).macs for m in (base, small))
    removed = sum(p.numel() for p in base.parameters()) - sum(p.numel() for p in small.parameters())
    bytes_fall = sum(p.numel() * p.element_size() for p in small.parameters()) / sum(
        p.numel() * p.element_size() for p in base.parameters()
    )
    yield Check.at_least(
        "multiply-adds saved over parameters removed, each used once a token", (before - after) / (removed * 128), 1.0,
        "×", f"attention itself is narrower too; bytes {bytes_fall:.3f} of before, {removed:,} parameters fewer",
    )  # fmt: skip


def speed(scale: Scale) -> Iterator[Check]:
    """Tokens a second in the runtime, width 1024, random weights; everything interleaved."""
    import torch

    from hasten.compress.lowrank.modular import ModularDecomposition
    from hasten.language import DecoderConfig, RaggedBatch
    from hasten.language.executor import Executor
    from hasten.language.loading import random_model
    from hasten.language.sized import executor_of
    from hasten.measure import Protocol, compare

    config = DecoderConfig(
        vocab_size=4096, hidden_size=1024, num_layers=scale.choose(quick=1, full=4), num_heads=16, num_kv_heads=4,
        head_dim=64, intermediate_size=2816, max_position_embeddings=1024,
    )  # fmt: skip
    base = random_model(config, seed=scale.seed).decoder
    tokens = [torch.randint(0, 4096, (1, 16), generator=torch.Generator().manual_seed(scale.seed))]
    # Which columns stay does not matter for time, so none are searched for.
    knobs: dict[str, Any] = {"ratio": 0.3, "allocation": "uniform", "selection": "random"}
    models = {
        "feed-forwards 30 %": ModularDecomposition(modules=("mlp",), **knobs)(base, tokens),
        "all pairs 30 %": ModularDecomposition(**knobs)(base, tokens),
    }

    class Factored(Executor):
        """Every matrix as two, of 70 % of its numbers."""

        def _pack(self, weight: Any, precision: str | None = None, bias: Any = None, rounds: bool | None = None) -> Any:
            out, inner = weight.shape
            if out == config.vocab_size:
                return super()._pack(weight, precision, bias, rounds)
            rank = int(0.7 * out * inner / (out + inner)) // 16 * 16
            down, up = (
                super()._pack(weight[:rank].contiguous()),
                super()._pack(weight[:, :rank].contiguous(), None, bias),
            )
            both: Any = _Two(down, up)
            return both

    state = base.state_dict()
    runs = {
        "unchanged": Executor(config, lambda name, shape: state[name].detach()),
        **{n: executor_of(m) for n, m in models.items()},
        "matrix by matrix 30 %": Factored(config, lambda name, shape: state[name].detach()),
    }
    times: dict[str, dict[str, float]] = {}
    for kind, length, context in (("decode", 1, 128), ("prefill", 256, 0)):
        calls = {}
        for name, executor in runs.items():
            cache = executor.new_cache(32)
            executor.step(RaggedBatch.build([([3] * 128, 0, list(range(32)))]), cache)
            batch = RaggedBatch.build([([5] * length, context, list(range(32)))])
            calls[name] = lambda e=executor, b=batch, c=cache: e.step(b, c)
        rounds = scale.choose(quick=5, full=21)
        rules = Protocol(warmup=2, warmup_time=0.0, min_samples=rounds, max_samples=rounds, min_time=0.0)
        found = compare(calls, rules)
        times[kind] = {n: found.speedup(n).value for n in calls if n != "unchanged"}
        times[kind]["seconds"] = found.samples["unchanged"].median
    for kind in ("decode", "prefill"):
        gain = times[kind]
        shown = ", ".join(f"{n} {v:.2f}×" for n, v in gain.items() if n != "seconds")
        note = f"{shown}; unchanged {gain['seconds'] * 1e3:.2f} ms; bf16, {config.num_layers} layers"
        yield Check.at_least(f"{kind} throughput over the unchanged model", gain["feed-forwards 30 %"], 1.15, "×", note)
        yield Check(
            f"{kind}: matrix by matrix is slower than pairs at the same number of parameters",
            gain["matrix by matrix 30 %"], "×", f"< {gain['all pairs 30 %']:.2f}",
            gain["matrix by matrix 30 %"] < gain["all pairs 30 %"],
            "all pairs against two factors for each matrix, same share removed",
        )  # fmt: skip


class _Two:
    """Two packed matrices in a row."""

    packed = None

    def __init__(self, down: Any, up: Any) -> None:
        self._down, self._up = down, up
        self.in_features, self.out_features = down.in_features, up.out_features

    def __call__(self, x: Any) -> Any:
        return self._up(self._down(x))


study = Study(
    system="modegpt",
    claim="Compressing pairs of matrices by the decomposition that suits them keeps 90-95 % of quality at 25-30 % "
    "fewer parameters without training, and adds no matrix.",
    published={
        "Llama-2/3 and OPT, 25-30 % compression": "90-95 % of zero-shot performance (abstract)",
        "compressing a 13B model": "98 % less compute than gradient-based structured methods (abstract)",
        "inference throughput": "up to +46 % (abstract)",
    },
    run=run,
)
