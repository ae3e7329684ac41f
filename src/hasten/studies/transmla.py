"""TransMLA: grouped-query attention is latent attention of the same cache size, and can be made smaller after training.

"TransMLA: Multi-head Latent Attention Is All You Need", Meng et al. 2025, arXiv:2502.07864. Conversion and compression
of the embedded model (4 M weights, one key head of 64) on held-out code; the expressiveness theorem on small layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from hasten.studies.study import Check, Scale, Study

__all__ = ["study"]


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


def converse(scale: Scale) -> Iterator[Check]:
    """Head-wise keys of a latent layer against the best that grouped-query weights of the same cache can do."""
    rng = np.random.default_rng(scale.seed)
    errors = []
    for _ in range(scale.choose(quick=10, full=50)):
        hidden, width, share, groups = 24, 4, 2, 2
        latent = rng.standard_normal((hidden, groups * width))
        expand = rng.standard_normal((groups * width, share * groups * width))
        keys = latent @ expand  # (hidden, heads * width): what each head's keys are of a token
        heads = keys.reshape(hidden, groups, share, width)
        fitted = heads.mean(2, keepdims=True)  # least squares: heads of a group must be equal
        errors.append(float(np.linalg.norm(heads - fitted) / np.linalg.norm(heads)))
    yield Check.at_least(
        "least error of grouped-query keys for random latent keys, equal cache",
        min(errors),
        0.1,
        "",
        f"closed-form best fit, {len(errors)} layers; mean {np.mean(errors):.2f}",
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


def _nats(model: Any, lists: list[list[int]]) -> float:
    import torch

    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(torch.tensor([t]))[0, :-1].float(), torch.tensor(t[1:]))
            for t in lists
        ]
    return float(torch.stack(losses).mean())


def _data(scale: Scale) -> tuple[Any, list[list[int]], list[list[int]], list[list[int]]]:
    from hasten.language import load
    from hasten.language.corpus import documents

    model = load("pycode-4m")
    out: dict[str, list[list[int]]] = {"train": [], "validation": [], "test": []}
    for document in documents(suite=False):
        if len(document.text) > 3000 and len(out[document.split]) < 400:
            out[document.split].append(model.tokenizer.encode(document.text[:3000])[:256])
    most = scale.choose(quick=8, full=24)
    return model, out["train"], out["validation"][:most], out["test"][:most]


def compression(scale: Scale) -> Iterator[Check]:
    """Smaller caches: which way of choosing them loses least, and how far a short training brings them back."""
    import torch

    from hasten.compress import ToMLA

    model, train, fit, held = _data(scale)
    base = model.decoder.float()
    calibration = [torch.tensor([t]) for t in fit]
    plain = _nats(base, held)
    for share, rank, rope in ((0.5, 32, 32), (0.75, 16, 16)):
        loss = {}
        for name, knobs in (
            ("balanced", {}),
            ("unbalanced", {"balance": False}),
            ("weights alone", {"by_data": False}),
        ):
            found = ToMLA(kv_rank=rank, rope_dims=rope, **knobs)(base, calibration)
            loss[name] = _nats(found, held) - plain
        folded = ToMLA(kv_rank=rank, rope_dims=rope, freqfold="auto")(base, calibration)
        loss["balanced, folded"] = _nats(folded, held) - plain
        shown = ", ".join(f"{k} {v:+.3f}" for k, v in loss.items())
        others = min(loss["unbalanced"], loss["weights alone"])
        yield Check(
            f"loss added at cache -{share:.0%}: balanced less than both controls",
            loss["balanced"],
            "nat",
            f"< {others:.3f}",
            loss["balanced"] < others,
            f"{shown}; original {plain:.3f} nat",
        )
        if share == 0.5:
            best = min((ToMLA(kv_rank=rank, rope_dims=rope)(base, calibration), folded), key=lambda m: _nats(m, fit))
            steps = scale.choose(quick=20, full=300)
            _train(best, train, steps, 3e-4, scale.seed)
            after = _nats(best, held) - plain
            yield Check.at_most(
                "loss added at cache -50% after a short training",
                after,
                0.05,
                "nat",
                f"{steps} steps of 8 x 256 tokens; before {loss['balanced, folded']:+.3f}",
            )


def _train(model: Any, lists: list[list[int]], steps: int, rate: float, seed: int, only: str | None = None) -> None:
    import torch

    rng = np.random.default_rng(seed)
    full = [t for t in lists if len(t) == 256]
    chosen = [p for n, p in model.named_parameters() if only is None or only in n]
    for p in model.parameters():
        p.requires_grad_(False)
    for p in chosen:
        p.requires_grad_(True)
    optimiser = torch.optim.AdamW(chosen, lr=rate, weight_decay=0.0)
    model.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10) * (1 - step / steps)
        batch = torch.tensor([full[i] for i in rng.integers(0, len(full), 8)])
        with torch.autocast("cpu", torch.bfloat16):  # weights and updates stay float32
            logits = model(batch)[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits.float(), batch[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(chosen, 1.0)
        optimiser.step()
    model.eval()


def expressive(scale: Scale) -> Iterator[Check]:
    """The same checkpoint, steps and cache: latent factors trained against grouped-query training going on."""
    import copy

    from hasten.compress import ToMLA

    model, train, _, held = _data(scale)
    base = model.decoder.float()
    gains = []
    steps = scale.choose(quick=10, full=200)
    for seed in range(scale.choose(quick=1, full=3)):
        grouped = copy.deepcopy(base)
        latent = ToMLA()(base)
        for one in (grouped, latent):
            _train(one, train, steps, 2e-4, seed)
        gains.append(_nats(grouped, held) - _nats(latent, held))
    extra = sum(p.numel() for p in latent.parameters()) - sum(p.numel() for p in base.parameters())
    spread = 2 * float(np.std(gains)) if len(gains) > 1 else 0.0
    yield Check(
        "validation loss of grouped-query less latent training, equal steps",
        float(np.mean(gains)),
        "nat",
        "> 0",
        bool(np.mean(gains) - spread > 0),
        f"{steps} steps, {len(gains)} seeds, {extra} more parameters",
    )


def decoding(scale: Scale) -> Iterator[Check]:
    """Cache bytes per token and time per token at the longest context that the model has."""
    import torch

    from hasten.compress import ToMLA
    from hasten.language import load
    from hasten.language.loading import LanguageModel
    from hasten.language.speculate.session import Session
    from hasten.studies._speculation import medians

    model = load("pycode-4m")
    ids = list(range(5, 4000, 4))[:960]
    small: Any = ToMLA(kv_rank=16, rope_dims=16)(model.decoder.float(), [torch.tensor([ids[:256]])])
    latent = LanguageModel("latent", model.config, decoder=small.bfloat16())
    runs: dict[str, Any] = {}
    sizes = {}
    for name, one in (("grouped", model), ("latent", latent)):
        session = Session(one.executor, 1100)
        session.feed(ids)
        sizes[name] = one.executor.bytes_per_token

        def step(session: Any = session) -> None:
            session.done = len(ids)
            session.feed([7])

        runs[name] = step
    times = medians(runs, scale.choose(quick=15, full=101))
    yield Check.equal(
        "cache bytes of a token, latent", sizes["latent"], sizes["grouped"] // 4, "B", f"of {sizes['grouped']}"
    )
    yield Check.at_most(
        "time per token, latent over grouped, 960 tokens of context",
        times["latent"] / times["grouped"],
        1.0,
        "×",
        f"{times['grouped'] * 1e3:.2f} → {times['latent'] * 1e3:.2f} ms; the model is not bound by its cache here",
    )
    yield Check.unavailable("decode tokens/s at 8k on a GPU", "no GPU here", "×")


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
