"""The published rules on real text: vectors of medical answers, questions as queries."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hasten.studies._spann_ablations import choice_of_heads, closure_rule, pruning
from hasten.studies._spann_bench import Bench, true_neighbours
from hasten.studies.study import Check, Scale

__all__ = ["on_text", "text_vectors"]

WHERE = "text vectors"


def on_text(bench: Bench) -> Iterator[Check]:
    """The RNG rule, the choice of heads, and pruning, with the options of ``bench`` on text vectors of length 1 (then
    the nearest by L2 are the nearest by angle).
    """
    vectors, queries = text_vectors(bench.scale)
    if vectors is None or queries is None:
        for name in ("RNG rule over nearest-8", "balanced over random heads", "pruning"):
            yield Check.unavailable(f"{name}: {WHERE}", "retrieval/medquad_qa.jsonl.gz is not here", "", "≥ 0")
        return
    rows, asked = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (vectors, queries))
    folder = bench.folder / "text"
    folder.mkdir()
    truth = true_neighbours(rows, asked)
    text = Bench(bench.scale, folder, rows, asked, truth, bench.clock, bench.common, {}, {})
    try:
        yield closure_rule(text, f": {WHERE}")
        yield choice_of_heads(text, f": {WHERE}")
        yield from pruning(text, WHERE)
    finally:
        text.close()


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
