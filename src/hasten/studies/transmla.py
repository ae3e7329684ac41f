"""TransMLA: grouped-query attention is latent attention of the same cache size, and can be made smaller after training.

"TransMLA: Multi-head Latent Attention Is All You Need", Meng et al. 2025, arXiv:2502.07864. Conversion and compression
of the embedded model (4 M weights, one key head of 64) and of one with four key heads that is trained here, on held-out
code; the theorem on small layers. Expressiveness is judged on the second: with one key head a factor per head adds
nothing, for it is absorbed by the query and output matrices.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np

from hasten.errors import ConfigurationError
from hasten.studies._grouped import LENGTH, Pieces, fine_tune, grouped_model, nats, pieces, recovered, widened
from hasten.studies._spiking import interval
from hasten.studies.study import Check, Scale, Study

__all__ = ["study"]

EMBEDDED_TOKENS = 13_500_000
"""what pycode-4m was trained on"""


def run(scale: Scale) -> Iterator[Check]:
    """The checks of the card."""
    yield from exact(scale)
    scale.progress("converse", 0.2)
    yield from converse(scale)
    scale.progress("compression", 0.35)
    yield from compression(scale)
    scale.progress("expressiveness", 0.7)
    yield from expressive(scale)
    scale.progress("bytes", 0.95)
    yield from decoding(scale)
    scale.progress("done", 1.0)


def _small(groups: int, dtype: Any, **options: Any) -> Any:
    import torch

    from hasten.language import Decoder, DecoderConfig

    torch.manual_seed(0)
    model = Decoder(
        DecoderConfig(
            vocab_size=60,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=groups,
            head_dim=8,
            intermediate_size=48,
            max_position_embeddings=256,
            **options,
        )
    )
    return model.eval().to(dtype)


def exact(scale: Scale) -> Iterator[Check]:
    """Level 0, the turn alone, and absorbed against expanded."""
    import torch

    from hasten.compress import ToMLA

    tokens = torch.randint(0, 60, (2, 60), generator=torch.Generator().manual_seed(1))
    worst = turned = absorbed = 0.0
    x = torch.randn(2, 24, 32, dtype=torch.float64)
    angle = torch.outer(torch.arange(24.0).double(), 0.3 ** torch.arange(4).double())
    cos, sin = angle.cos(), angle.sin()
    for groups in (1, 2, 4):
        for bias in (False, True):
            model = _small(groups, torch.float32, attention_bias=bias)
            with torch.no_grad():
                worst = max(worst, float((ToMLA()(model)(tokens) - model(tokens)).abs().max()))
            wide = _small(groups, torch.float64, attention_bias=bias)
            total = groups * 8
            other: Any = ToMLA(kv_rank=total, rope_dims=total)(wide, [tokens])
            narrow: Any = ToMLA(kv_rank=0.5, rope_dims=4)(wide, [tokens])
            small = narrow.model.layers[0].self_attn
            with torch.no_grad():
                one, two = (m.model.layers[0].self_attn(x, cos, sin) for m in (wide, other))
                turned = max(turned, float((one - two).abs().max()))
                absorbed = max(absorbed, float((small(x, cos, sin) - small.expanded(x, cos, sin)).abs().max()))
    yield Check.at_most(
        "logits of level 0 against the original, fp32", worst, 1e-4, note="1, 2 and 4 key heads, biases"
    )
    yield Check.at_most("attention with all frequencies turned and kept, fp64", turned, 1e-9)
    yield Check.at_most("absorbed against expanded form, fp64", absorbed, 1e-9)


def unreachable(
    rng: np.random.Generator, *, hidden: int = 24, width: int = 4, groups: int = 2, share: int = 2
) -> float:
    """Relative error of the best grouped-query layer for a random latent layer of the same cache.

    A head's scores are ``x' B y`` with ``B = query' expand latent``; grouped-query layers reach every ``B`` whose rows
    lie in the ``width`` dimensions that the keys of its group span, so the best one is cut from the singular vectors of
    a group's heads, over all ways to put heads into groups.
    """
    heads = groups * share
    latent = rng.standard_normal((groups * width, hidden))
    forms = [
        rng.standard_normal((hidden, width)) @ rng.standard_normal((width, groups * width)) @ latent
        for _ in range(heads)
    ]
    left = [
        sum(float((np.linalg.svd(np.concatenate([forms[h] for h in group]))[1][width:] ** 2).sum()) for group in split)
        for split in _splits(list(range(heads)), share)
    ]
    return float(np.sqrt(min(left) / sum(float((form**2).sum()) for form in forms)))


def _splits(heads: list[int], share: int) -> Iterator[list[tuple[int, ...]]]:
    """All ways to put heads into groups of ``share``."""
    if not heads:
        yield []
        return
    for others in combinations(heads[1:], share - 1):
        rest = [h for h in heads[1:] if h not in others]
        for more in _splits(rest, share):
            yield [(heads[0], *others), *more]


def converse(scale: Scale) -> Iterator[Check]:
    """Scores of a latent layer against the best that grouped-query weights of the same cache can do."""
    rng = np.random.default_rng(scale.seed)
    errors = [unreachable(rng) for _ in range(scale.choose(quick=10, full=50))]
    yield Check.at_least(
        "least error of grouped-query scores for random latent layers, equal cache",
        min(errors),
        0.1,
        "",
        f"best fit by singular vectors, all groupings, {len(errors)} layers; mean {np.mean(errors):.2f}",
    )
    import torch

    from hasten.compress import ToMLA

    model = _small(2, torch.float64)
    turned: Any = ToMLA()(model)
    layer = turned.model.layers[0].self_attn
    old = model.model.layers[0].self_attn
    rebuilt = (layer.latent_value.detach() @ layer.latent_proj.weight.detach()).reshape(4, 8, 32)
    repeated = old.v_proj.weight.detach().view(2, 8, 32).repeat_interleave(2, 0)
    yield Check.at_most("latent fit of grouped-query values", float((rebuilt - repeated).abs().max()), 1e-6)


def compression(scale: Scale) -> Iterator[Check]:
    """Smaller caches: which way of choosing them loses least, and how far a short training brings them back."""
    from hasten.language import load

    model = load("pycode-4m")
    found = pieces(model.tokenizer, scale)
    embedded = model.decoder.float()
    one_head, four_heads = ((0.5, 32, 32), (0.75, 16, 16)), ((0.5, 48, 16), (0.75, 16, 16))
    yield from _cuts("one key head, embedded model", embedded, scale.choose(one_head[:1], one_head), found, scale)
    yield from _recovery(embedded, found, scale)
    grouped = grouped_model(model.config.vocab_size, found, scale)
    yield from _cuts("four key heads", grouped, scale.choose(four_heads[:1], four_heads), found, scale)


def _cuts(
    name: str, base: Any, sizes: tuple[tuple[float, int, int], ...], found: Pieces, scale: Scale
) -> Iterator[Check]:
    """Loss on held-out pieces by the way of the cut, in pairs; (share cut, rank, rotated numbers)."""
    from hasten.compress import ToMLA

    calibration = list(found.train[: scale.choose(quick=16, full=128)].split(16))
    plain = nats(base, found.test)
    for share, rank, rope in sizes:
        losses = {}
        ways: dict[str, dict[str, Any]] = {
            "balanced": {},
            "unbalanced": {"balance": False},
            "weights alone": {"by_data": False},
        }
        if not scale.quick and base.config.num_kv_heads > 1:  # with one head it never paid
            ways["balanced, folded"] = {"freqfold": "auto"}
        for way, knobs in ways.items():
            turned: Any = ToMLA(kv_rank=rank, rope_dims=rope, **knobs)(base, calibration)
            if turned.cache_bytes_per_token != (1 - share) * turned.model_cache_bytes:
                raise ConfigurationError(
                    f"rank {rank} and {rope} rotated numbers take {turned.cache_bytes_per_token} bytes a token; "
                    f"choose sizes that take {1 - share:.0%} of {turned.model_cache_bytes}"
                )
            losses[way] = nats(turned, found.test) - plain
        shown = ", ".join(f"{k} {float(v.mean()):+.3f}" for k, v in losses.items())
        for control in ("unbalanced", "weights alone"):
            gain = losses[control] - losses["balanced"]
            mean, error = float(gain.mean()), float(gain.std() / len(gain) ** 0.5)
            yield Check(
                f"loss added by {control} PCA over balanced, cache -{share:.0%}, {name}",
                mean,
                "nat",
                "interval above 0",
                mean - 1.96 * error > 0,
                f"± {1.96 * error:.3f} over {len(gain)} pieces; {shown}; original {float(plain.mean()):.3f} nat",
            )


def _recovery(base: Any, found: Pieces, scale: Scale) -> Iterator[Check]:
    """A tenth of what the embedded model learned from, from its own distribution."""
    from hasten.compress import ToMLA

    plain = float(nats(base, found.test).mean())
    calibration = list(found.train[: scale.choose(quick=16, full=128)].split(16))
    # Which numbers share the half was chosen on the validation pieces.
    small = ToMLA(kv_rank=48, rope_dims=16, freqfold=4)(base, calibration)
    before = float(nats(small, found.test).mean()) - plain
    tokens = scale.choose(quick=20_000, full=EMBEDDED_TOKENS // 10)
    small = recovered(
        small, base, found.train, tokens, scale.seed, lambda share: scale.progress("recovery", 0.5 + 0.2 * share)
    )
    yield Check.at_most(
        "loss added at cache -50% after a short training, embedded model",
        float(nats(small, found.test).mean()) - plain,
        0.05,
        "nat",
        f"{tokens:,} tokens ({tokens / EMBEDDED_TOKENS:.1%} of its training) to the original's distribution; before "
        f"{before:+.3f}",
    )


def expressive(scale: Scale) -> Iterator[Check]:
    """The same checkpoint, steps and cache: latent factors trained against grouped-query training going on."""
    from hasten.compress import ToMLA
    from hasten.language import load

    model = load("pycode-4m")
    found = pieces(model.tokenizer, scale)
    base = grouped_model(model.config.vocab_size, found, scale)
    steps, seeds = scale.choose(quick=4, full=60), scale.choose(quick=1, full=3)
    latent = ToMLA()(base)
    extra = sum(p.numel() for p in latent.parameters()) - sum(p.numel() for p in base.parameters())
    ways: dict[str, Any] = {"grouped": base, "latent": latent, "wider": widened(base, extra)}
    losses: dict[str, list[float]] = {name: [] for name in ways}
    for seed in range(seeds):
        for number, (name, start) in enumerate(ways.items()):
            scale.progress(f"expressiveness, seed {seed}, {name}", 0.7 + 0.25 * (3 * seed + number) / (3 * seeds))
            one = copy.deepcopy(start)
            fine_tune(one, found.train, steps=steps, rate=5e-4, seed=seed)
            losses[name].append(float(nats(one, found.test).mean()))
    before = float(nats(base, found.test).mean())
    shown = ", ".join(f"{k} {np.mean(v):.4f}" for k, v in losses.items())
    for control in ("grouped", "wider"):
        mean, half = interval([c - m for c, m in zip(losses[control], losses["latent"], strict=True)])
        what = "grouped-query" if control == "grouped" else "a wider feed-forward of as many parameters"
        yield Check(
            f"validation loss of {what} less latent training, equal steps",
            mean,
            "nat",
            "interval above 0",
            bool(mean - half > 0) if seeds > 1 else mean > 0,
            f"± {half:.4f}, {seeds} seeds, {steps} steps of 8 x {LENGTH} tokens, {extra} more parameters; before "
            f"{before:.4f}, after: {shown}",
        )


def decoding(scale: Scale) -> Iterator[Check]:
    """Cache bytes per token and time per token, at the longest context of the embedded model and stretched to 8,000."""
    import torch

    from hasten.compress import ToMLA
    from hasten.language import load
    from hasten.language.loading import LanguageModel
    from hasten.studies.triforce import long_model

    for context in scale.choose(quick=(960,), full=(960, 8000)):
        model = load("pycode-4m") if context <= 1024 else long_model(16_384)
        ids = (list(range(5, 4000, 4)) * 9)[:context]
        base = copy.deepcopy(model.decoder).float()
        small: Any = ToMLA(kv_rank=16, rope_dims=16)(base, [torch.tensor([ids[:256]])])
        latent = LanguageModel("latent", model.config, decoder=small.bfloat16())
        yield from _step_times({"grouped": model, "latent": latent}, ids, scale)
    yield Check.unavailable("decode tokens/s at 8k on a GPU", "no GPU here", "×")


def _step_times(models: dict[str, Any], ids: list[int], scale: Scale) -> Iterator[Check]:
    """One more token behind ``ids``, by both models in turns."""
    from hasten.language.speculate.session import Session
    from hasten.studies._speculation import medians

    runs: dict[str, Any] = {}
    sizes = {}
    for name, one in models.items():
        session = Session(one.executor, len(ids) + 100)
        session.feed(ids)
        sizes[name] = one.executor.bytes_per_token

        def step(session: Any = session) -> None:
            session.done = len(ids)
            session.feed([7])

        runs[name] = step
    times = medians(runs, scale.choose(quick=15, full=101))
    yield Check.equal(
        f"cache bytes of a token, latent, {len(ids):,} tokens of context",
        sizes["latent"],
        sizes["grouped"] // 4,
        "B",
        f"of {sizes['grouped']}",
    )
    yield Check.at_most(
        f"time per token, latent over grouped, {len(ids):,} tokens of context",
        times["latent"] / times["grouped"],
        1.0,
        "×",
        f"{times['grouped'] * 1e3:.2f} → {times['latent'] * 1e3:.2f} ms",
    )


study = Study(
    system="transmla",
    claim="Every grouped-query layer is a latent layer of the same cache, and the cache can be cut after training.",
    published={
        "theorem": "GQA is contained in MLA at equal cache, the converse is false (abstract)",
        "Llama-2-7B, cache -93 %": "10.6x speed at 8K context; 6 B tokens to recover (paper page, v5)",
        "perplexity without training, 512+64": "Qwen2.5-7B 8.41 from 6.85, Mistral-7B 9.58 from 5.32 (repository)",
    },
    run=run,
)
