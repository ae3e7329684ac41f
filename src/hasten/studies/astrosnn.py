"""AstroSNN, rerun in its parts: does an astrocyte's slow trace give a spiking language model memory, at a fixed cost?

"Astrocyte-Enabled Advancements in Spiking Neural Networks for Large Language Modeling", Shen et al., 2023,
arXiv:2312.07625. Its equations and figures were not found; the unit is that of :mod:`hasten.spiking.astrocyte`, our
choice. Differs from the paper in: sizes of a laptop, a recall task and the text of Shakespeare's plays byte by byte;
baselines of ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hasten.measure.latency import Protocol, compare
from hasten.spiking.astrocyte import AstroConfig, AstroLM
from hasten.spiking.tasks import recall
from hasten.studies import _spiking as part
from hasten.studies.study import Check, Scale, Study

__all__ = ["study"]

RECALL = {"vocab": 49, "width": 64, "layers": 2, "head_size": 16, "feed_forward": 128}
TEXT = {"vocab": 256, "width": 128, "layers": 4, "head_size": 32, "feed_forward": 512}


def run(scale: Scale) -> Iterator[Check]:
    """All checks of the card."""
    yield from exact(scale)
    scale.progress("memory", 0.05)
    yield from memory(scale)
    scale.progress("cost", 0.5)
    yield from cost(scale)
    scale.progress("language", 0.6)
    yield from language(scale)
    scale.progress("done", 1.0)


def exact(scale: Scale) -> Iterator[Check]:
    """One token at a time and whole sequences, on random weights."""
    torch.manual_seed(scale.seed)
    model = AstroLM(AstroConfig(**{**TEXT, "layers": 2}))  # type: ignore[arg-type]
    tokens = torch.randint(0, 256, (2, 150))
    for name, bound in (("float64", 1e-9), ("float32", 1e-4)):
        model = model.to(getattr(torch, name))
        with torch.inference_mode():
            whole, state, steps = model(tokens), model.init_state(2), []
            for t in range(tokens.shape[1]):
                logits, state = model.step(tokens[:, t], state)
                steps.append(logits)
            stepped = torch.stack(steps, 1)
            chunked = model(tokens, 17)
        worst = max(float((a - whole).abs().max()) for a in (stepped, chunked))
        yield Check.at_most(
            f"difference of the forms, {name}", worst, bound, note="step by step, and chunks of 17, of 150 tokens"
        )


def memory(scale: Scale) -> Iterator[Check]:
    """Four pairs, N distractors, one question."""
    if scale.quick:
        for distance in (32, 128, 512):
            yield Check.unavailable(f"recall behind {distance} distractors", "a full run only", "%")
        return
    rows: dict[str, dict[int, float]] = {}
    sizes: dict[str, int] = {}
    for index, kind in enumerate(("astro", "neurons")):
        span = (0.05 + 0.2 * index, 0.25 + 0.2 * index)
        settings = {"kind": kind, "sizes": asdict(AstroConfig(**RECALL)), "steps": 500, "seed": scale.seed}  # type: ignore[arg-type]
        made = part.cached(scale, "astro-recall", part.train_recall, settings, {}, span)
        model = part.language_model(kind, RECALL)
        assert isinstance(model, AstroLM)
        model.load_state_dict(made["net"])
        sizes[kind] = sum(p.numel() for p in model.parameters())
        rows[kind] = {}
        for distance in (32, 128, 512):
            tokens, answers = recall(500, distance, seed=99_999_999)
            with torch.inference_mode():
                guess = model.logits(model.hidden(tokens)[0][:, -1]).argmax(-1)
            rows[kind][distance] = float((guess == answers).float().mean())
    note = f"500 questions, chance 6 %; {sizes['astro']} and {sizes['neurons']} parameters, 500 steps of training each"
    for distance in (32, 128, 512):
        value, other = 100 * rows["astro"][distance], 100 * rows["neurons"][distance]
        bound = 90.0 if distance == 128 else 0.0
        text = f"{note}; neurons only {other:.1f} %"
        if bound:
            yield Check.at_least(f"recall behind {distance} distractors", value, bound, "%", text)
        else:
            yield Check(f"recall behind {distance} distractors", value, "%", "", None, f"for information; {text}")
    yield Check.at_most("recall behind 128 distractors without astrocytes", 100 * rows["neurons"][128], 50.0, "%", note)


class CachedTransformer(nn.Module):
    """A plain decoder with a cache of keys and values: the baseline whose cost grows with the context."""

    def __init__(self, vocab: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(vocab, width)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width, bias=False) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width, bias=False) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(4 * width, width, bias=False) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers + 1))

    def step(self, token: Tensor, keys: Tensor, values: Tensor, past: int) -> Tensor:
        """token (1,); keys and values (layers, heads, longest, head size) are written at ``past``."""
        x = self.embedding(token)
        for i, qkv in enumerate(self.qkv):
            q, k, v = qkv(self.norms[2 * i](x)).reshape(3, self.heads, 1, -1)
            keys[i, :, past], values[i, :, past] = k[:, 0], v[:, 0]
            mixed = functional.scaled_dot_product_attention(q, keys[i, :, : past + 1], values[i, :, : past + 1])
            x = x + self.out[i](mixed.reshape(1, -1))
            x = x + self.down[i](functional.gelu(self.up[i](self.norms[2 * i + 1](x))))
        return functional.linear(self.norms[-1](x), self.embedding.weight)


def cost(scale: Scale) -> Iterator[Check]:
    """Time per token behind 64 and 4096 tokens, in turns, with the rival of as many parameters."""
    torch.manual_seed(scale.seed)
    model = AstroLM(AstroConfig(**TEXT)).eval()  # type: ignore[arg-type]
    rival = CachedTransformer(256, 136, 4, 4).eval()
    count = [sum(p.numel() for p in m.parameters()) for m in (model, rival)]
    contexts = (64, 4096)
    states: dict[int, Any] = {}
    caches: dict[int, tuple[Tensor, Tensor]] = {}
    with torch.inference_mode():
        for context in contexts:
            states[context] = model.hidden(torch.randint(0, 256, (1, context)))[1]
            caches[context] = (torch.randn(4, 4, context + 1, 34), torch.randn(4, 4, context + 1, 34))
    token = torch.tensor([65])

    def ours(context: int) -> Any:
        def call() -> None:
            with torch.inference_mode():
                model.step(token, states[context])

        return call

    def theirs(context: int) -> Any:
        def call() -> None:
            with torch.inference_mode():
                rival.step(token, caches[context][0], caches[context][1], context)

        return call

    calls = {f"astro {c}": ours(c) for c in contexts} | {f"transformer {c}": theirs(c) for c in contexts}
    rules = Protocol(min_samples=scale.choose(quick=30, full=300), min_time=scale.choose(quick=0.1, full=1.0))
    timed = compare(calls, rules)
    at = {name: sample.median for name, sample in timed.samples.items()}
    note = ", ".join(f"{k}: {1e3 * v:.3f} ms" for k, v in at.items())
    yield Check.at_most(
        "time per token behind 4096 tokens over behind 64", at["astro 4096"] / at["astro 64"], 1.10, "×", note
    )
    yield Check.at_least(
        "the same for a transformer with a cache", at["transformer 4096"] / at["transformer 64"], 1.5, "×",
        f"{count[1]} parameters, ours {count[0]}",
    )  # fmt: skip
    held = {c: sum(p.numel() * p.element_size() for b in states[c] for p in b) for c in contexts}
    yield Check.equal(
        "bytes of state behind 4096 tokens", held[4096], held[64], "B",
        f"behind 64 as well; the cache of the transformer: {2 * 4 * 136 * 4096 * 4} behind 4096",
    )  # fmt: skip
    yield Check.unavailable("tokens per second on a GPU", "no CUDA device here; only the step form exists for one")


@torch.inference_mode()
def bits(model: nn.Module, data: Tensor, windows: int, context: int = 512) -> float:
    """Bits per byte over windows of the text; the first half of a window is context only."""
    rows = torch.stack([data[i * context : (i + 1) * context + 1] for i in range(windows)]).long()
    nats = 0.0
    for part_of in rows.split(16):
        logits = model(part_of[:, :-1])[:, context // 2 :]
        nats += float(functional.cross_entropy(logits.flatten(0, 1), part_of[:, context // 2 + 1 :].flatten())) * len(
            part_of
        )
    return nats / len(rows) / math.log(2)


def language(scale: Scale) -> Iterator[Check]:
    """Bits per byte after equal processor time, and how many of its signals are spikes."""
    data = None if scale.quick else part.shakespeare(scale)
    if data is None:
        reason = "a full run only" if scale.quick else "text/tinyshakespeare.txt.gz is not here"
        for name in ("neurons only", "an LSTM"):
            yield Check.unavailable(f"bits per byte below {name}", reason, "bit")
        yield Check.unavailable("spike rate", reason, "%")
        return
    train, held = data
    scores: dict[str, float] = {}
    notes = []
    rates: dict[str, float] = {}
    for index, kind in enumerate(("astro", "neurons", "lstm")):
        span = (0.6 + 0.12 * index, 0.72 + 0.12 * index)
        settings = {"kind": kind, "sizes": TEXT, "seconds": 120.0, "context": 256, "seed": 0}
        made = part.cached(scale, "astro-text", part.train_text, settings, {"data": train}, span)
        model = part.language_model(kind, TEXT)
        model.load_state_dict(made["net"])
        scores[kind] = bits(model.eval(), held, min(160, len(held) // 512 - 1))
        size = sum(p.numel() for p in model.parameters())
        notes.append(f"{kind} {scores[kind]:.3f} ({size} parameters, {made['steps']} steps)")
        if kind == "astro":
            assert isinstance(model, AstroLM)
            rates = model.spike_rates(held[:2048].reshape(4, 512).long())
    note = "120 s of one thread each: " + ", ".join(notes)
    for kind, name in (("neurons", "neurons only"), ("lstm", "an LSTM")):
        yield Check.at_least(f"bits per byte below {name}", scores[kind] - scores["astro"], 0.0, "bit", note)
    shown = ", ".join(f"{k} {100 * v:.0f} %" for k, v in rates.items())
    yield Check.at_most("spike rate", 100 * max(rates[k] for k in ("neuron", "key", "value")), 30.0, "%", shown)


study = Study(
    "astrosnn",
    claim="a slow astrocyte state that watches and modulates synapses gives a spiking language model memory over long "
    "distances, while time and memory per token do not grow with the context",
    published="no number in the abstract: exceptional memory retention, lower latency, higher throughput, smaller "
    "memory; a model of 1.5 billion parameters",
    run=run,
)
