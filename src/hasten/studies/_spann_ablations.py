"""Copies, the RNG rule, the choice and the share of heads, pruning: each against its absence.

Always at an equal number of list reads or at equal candidates, since the two give different answers.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.retrieve.index.build import BuildOptions, build
from hasten.retrieve.index.hit import SearchOptions
from hasten.retrieve.index.spann import Spann
from hasten.retrieve.index.tune import recall_of
from hasten.studies._spann_bench import WIDE, Bench, recall_at
from hasten.studies.study import Check, Scale

__all__ = ["ablations", "pruning", "text_vectors"]


def ablations(bench: Bench) -> Iterator[Check]:
    """Copies, the RNG rule, the choice of heads, the share of heads: at equal reads, and at equal candidates beside
    it. Each needs an index of its own, so this is the dearest part.
    """
    copies = {r: bench.index(f"copies-{r}", replicas=r) if r != 8 else bench.index("balanced") for r in (1, 4, 8, 10)}
    lines = {r: bench.curve(i) for r, i in copies.items()}
    reads = {r: recall_at(c, 0, 8) for r, c in lines.items()}
    equal = {r: recall_at(c, 1, 600) for r, c in lines.items()}
    note = "recall with 8 list reads " + ", ".join(f"{r}: {v:.3f}" for r, v in reads.items())
    note += "; at 600 candidates " + ", ".join(f"{r}: {v:.3f}" for r, v in equal.items())
    yield Check.at_least("copies: 4 over 1, recall at equal reads", reads[4] - reads[1], 0.005, "", note)
    yield Check.at_least("copies: 8 over 4, recall at equal reads", reads[8] - reads[4], 0.002, "", note)
    yield Check.at_most("copies: 10 over 8 at equal reads (saturation)", reads[10] - reads[8], 0.005, "", note)
    note = f"one copy {equal[1]:.3f}, eight {equal[8]:.3f} at 600 candidates: the gain is in reads, not in bytes"
    yield Check.at_most("copies: 8 over 1 at equal candidates", equal[8] - equal[1], 0.01, "", note)
    limited = bench.curve(bench.index("limited", epsilon=0.3, crowding=1.8))
    pair = recall_at(limited, 0, 8), reads[8]
    wanted = (recall_at(limited, 1, 300), recall_at(lines[8], 1, 300))
    note = (
        f"a copy at most 1.3 times as far as the nearest head: 8 reads {pair[0]:.4f}, without a limit {pair[1]:.4f}; "
    )
    note += f"at 300 candidates {wanted[0]:.4f} / {wanted[1]:.4f}; "
    note += f"copies {bench.index('limited').describe()['built']['replicas']:.2f} / "
    note += f"{copies[8].describe()['built']['replicas']:.2f}"
    yield Check.at_least("closure within 1.3: recall lost at equal reads", pair[0] - pair[1], -0.01, "", note)
    yield Check.at_least("closure within 1.3: recall won at 300 candidates", wanted[0] - wanted[1], 0.0, "", note)
    nearest = bench.curve(bench.index("nearest", rng_rule=False))
    points = (300, 600, 900)
    rng = [(recall_at(lines[8], 1, p), recall_at(nearest, 1, p)) for p in points]
    note = "RNG / nearest-8 at " + ", ".join(
        f"{p} candidates {a:.3f} / {b:.3f}" for p, (a, b) in zip(points, rng, strict=True)
    )
    note += f"; with 8 reads {reads[8]:.3f} / {recall_at(nearest, 0, 8):.3f}"
    yield Check.at_least("RNG rule over nearest-8, recall at 900 candidates", rng[-1][0] - rng[-1][1], 0.0, "", note)
    random = bench.curve(bench.index("random-1", replicas=1, heads="random"))
    pair = recall_at(lines[1], 1, 320), recall_at(random, 1, 320)
    reads_pair = recall_at(lines[1], 0, 8), recall_at(random, 0, 8)
    note = (
        f"one copy, 320 candidates: {pair[0]:.3f} / {pair[1]:.3f}; 8 reads: {reads_pair[0]:.3f} / {reads_pair[1]:.3f}"
    )
    yield Check.at_least("balanced over random heads, one copy, equal candidates", pair[0] - pair[1], 0.005, "", note)
    shares = {0.12: reads[8]}
    for share in (0.04, 0.08, 0.16, 0.2):
        name = "served" if share == 0.16 else f"heads-{share}"
        shares[share] = recall_at(bench.curve(bench.index(name, head_ratio=share)), 1, 600)
    shares[0.12] = equal[8]
    note = "recall at 600 candidates, by share of heads: " + ", ".join(
        f"{s:.0%} {v:.3f}" for s, v in sorted(shares.items())
    )
    yield Check.at_least("share of heads: 16 % over 4 %, equal candidates", shares[0.16] - shares[0.04], 0.0, "", note)
    yield Check.at_most("share of heads: 20 % over 16 % (saturation)", shares[0.2] - shares[0.16], 0.01, "", note)


def pruning(bench: Bench) -> Iterator[Check]:
    """Pruning by distance against a fixed number of lists with the same mean: on the generator and on real text
    vectors.
    """
    index = bench.index("balanced")
    yield _prune_check("generator", bench, index, bench.queries, bench.truth)
    vectors, queries = text_vectors(bench.scale)
    name = "pruning on text vectors: recall over a fixed number of lists with the same mean"
    if vectors is None or queries is None:
        yield Check.unavailable(name, "retrieval/medquad_qa.jsonl.gz is not here", "", "≥ 0")
        return
    build(vectors, bench.folder / "text", BuildOptions(metric="cosine", head_ratio=0.12, seed=bench.scale.seed))
    with Spann.open(bench.folder / "text", read_only=True) as text:
        yield _prune_check("text vectors", bench, text, queries, text.exact(queries, 10).ids)


def _prune_check(name: str, bench: Bench, index: Spann, queries: NDArray[Any], truth: NDArray[np.int64]) -> Check:
    heads = len(index._view.generation.counts)
    most = min(64, heads)
    beam = min(128, heads)
    fixed = []
    for lists in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
        hit = index.search(queries, 10, options=SearchOptions(lists=min(lists, most), epsilon=WIDE, beam=beam))
        fixed.append((float(hit.stats.lists.mean()), recall_of(hit.ids, truth)))
    gains = []
    for epsilon in (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4):
        hit = index.search(queries, 10, options=SearchOptions(lists=most, epsilon=epsilon, beam=beam))
        mean = float(hit.stats.lists.mean())
        base = float(np.interp(np.log(max(mean, 1.0)), np.log([f[0] for f in fixed]), [f[1] for f in fixed]))
        gains.append((recall_of(hit.ids, truth) - base, epsilon, mean, base))
    note = "; ".join(f"ε {e:g}: {g:+.4f} at {m:.1f} lists (fixed {b:.3f})" for g, e, m, b in gains)
    title = f"pruning on {name}: recall over a fixed number of lists with the same mean"
    inside = [g for g in gains if 2 <= g[2] < fixed[-1][0] and g[3] < 0.99]  # one list is no choice
    if not inside:
        return Check.unavailable(title, f"no ε prunes where recall is not full: {note}", "", "≥ 0")
    return Check.at_least(
        title,
        max(inside)[0],
        0.0,
        "",
        note + "; the best of those with two lists or more and a recall below 0.99 counts",
    )


def text_vectors(scale: Scale) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
    """LSA vectors (96 wide) of MedQuAD answers, and of questions as queries: hashed TF-IDF and a randomised SVD."""
    path = scale.find("retrieval/medquad_qa.jsonl.gz")
    if path is None:
        return None, None
    with gzip.open(path, "rt") as file:
        records = [json.loads(line) for line in file]
    texts = [r["answer"] for r in records]
    pieces = [p for t in texts for p in (t[i : i + 300] for i in range(0, min(len(t), 1500), 300)) if len(p) > 60]
    asked = [r["question"] for r in records][: scale.choose(quick=200, full=500)]
    size = 4096

    def counts(batch: list[str]) -> NDArray[np.float32]:
        out = np.zeros((len(batch), size), np.float32)
        for i, text in enumerate(batch):
            for word in re.findall(r"[a-z]{3,}", text.lower()):
                out[i, hash_of(word) % size] += 1
        return out

    pieces = pieces[: scale.choose(quick=6000, full=40_000)]
    table = counts(pieces)
    weight = np.log(len(pieces) / (1 + (table > 0).sum(0))).clip(0).astype(np.float32)
    table = np.log1p(table) * weight
    rng = np.random.default_rng(scale.seed)
    basis = np.linalg.qr(table.T @ (table @ rng.normal(size=(size, 112)).astype(np.float32)))[0]
    basis = np.linalg.qr(table.T @ (table @ basis))[0][:, :96]
    vectors = table @ basis
    questions = (np.log1p(counts(asked)) * weight) @ basis
    return vectors[np.linalg.norm(vectors, axis=1) > 1e-6], questions[np.linalg.norm(questions, axis=1) > 1e-6]


def hash_of(word: str) -> int:
    """A hash that is the same in every process."""
    value = 2166136261
    for letter in word.encode():
        value = ((value ^ letter) * 16777619) & 0xFFFFFFFF
    return value
