"""How the embedded models come to be: corpus, tokeniser, target and draft, from one seed.

``pycode-4m`` learns Python from the standard library; ``pycode-draft-0.7m`` learns to agree with it (its loss is half
cross-entropy, half the Kullback-Leibler divergence to the target's distribution). Both are plain Llama folders.
The base training only; the curriculum of "Improving FIM Code Completions via Context & Curriculum Based Learning" comes
on top of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten.language.config import PRESETS
from hasten.language.corpus import Document, documents
from hasten.language.decoder import Decoder
from hasten.language.infill import FimTokens, training_blocks
from hasten.language.vocabulary import train_tokenizer, write_tokenizer
from hasten.train import LMTraining, bits_per_byte, fit_lm
from hasten.train.lm import cross_entropy

__all__ = ["MARKS", "held_out", "train_pycode", "write_folder"]

_BLOCK = 512
"""Tokens of a training row; twice as many in the last part of the run, so that the whole context is learned."""
_LONG_FROM = 0.8
"""Share of the run after which rows have the length of the context."""
_DISTIL_FROM = 0.6
"""Share of a draft's run after which it follows the target; the target's forward pass makes a step several times dearer
(measured on one busy core: 3,200 against 11,600 tokens/s), so the first part reads more text instead."""

MARKS = FimTokens(prefix=1, suffix=2, middle=3, end=0)


def held_out(tokenizer: Any, docs: list[Document], split: str, limit: int | None = None) -> tuple[list[list[int]], int]:
    """Token ids of the library files of one side, and the bytes of their text.

    ``limit`` bytes at most, whole files in the order of their names' hash, for a quick look.
    """
    texts = [d.text for d in docs if d.split == split and d.library]
    if limit is not None:
        order = np.random.default_rng(0).permutation(len(texts))
        kept, size = [], 0
        for index in order:
            if size + len(texts[index]) <= limit:
                kept.append(texts[index])
                size += len(texts[index])
        texts = kept
    return [e.ids for e in tokenizer.encode_batch(texts)], sum(len(t.encode()) for t in texts)


def _batches(
    tokenizer: Any, texts: list[str], training: LMTraining, block_now: Callable[[], int], skip_tokens: int = 0
) -> Iterator[Tensor]:
    """Endless passes over ``texts``; pass ``n`` is drawn with its own seed, so that a resumed run goes on in place.

    A batch has the same number of tokens whatever the block; a pass ends early when the block changes.
    """

    def encode_batch(strings: list[str]) -> list[list[int]]:
        return [e.ids for e in tokenizer.encode_batch(strings)]

    number, skip = 0, skip_tokens
    while True:
        block = block_now()
        count = training.batch_rows * _BLOCK // block
        rng = np.random.default_rng((training.seed, number))
        rows = training_blocks(texts, encode_batch, MARKS, block=block, rng=rng)
        number += 1
        if skip >= len(rows) * block:
            skip -= len(rows) * block
            continue
        rows, skip = rows[skip // block :], 0
        for at in range(0, len(rows) - count + 1, count):
            yield torch.from_numpy(rows[at : at + count].astype(np.int64))
            if block_now() != block:
                break


def write_folder(decoder: Decoder, folder: Path) -> None:
    """Write config.json and model.safetensors (bfloat16), each in one move."""
    import os

    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {n: t.to(torch.bfloat16).contiguous() for n, t in decoder.state_dict().items() if n != "lm_head.weight"}
    if not decoder.config.tie_embeddings:
        state["lm_head.weight"] = decoder.lm_head.weight.to(torch.bfloat16)
    save_file(state, folder / "model.safetensors.partial", metadata={"format": "pt"})
    os.replace(folder / "model.safetensors.partial", folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(decoder.config.to_huggingface(), indent=2) + "\n")


def train_pycode(
    name: str,
    folder: Path,
    training: LMTraining,
    *,
    corpus: str | Path | None = None,
    target: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, float]:
    """Train the preset ``name`` into ``folder`` (resumes there); returns the last log line with its validation score.

    ``corpus``: a folder of Python files, default the standard library. ``target``: folder of the trained target whose
    tokeniser and distribution a draft follows.
    """
    from tokenizers import Tokenizer

    docs = documents(corpus)
    texts = [d.text for d in docs if d.split == "train"]
    # Library code twice in every pass: it is what a user completes; the test suite is twice as long and repeats itself.
    passes = texts + [d.text for d in docs if d.split == "train" and d.library]
    say(f"corpus: {len(texts)} training files, {sum(map(len, texts)) / 1e6:.1f} M characters")
    config = PRESETS[name]
    folder.mkdir(parents=True, exist_ok=True)
    if target is not None:
        for part in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            (folder / part).write_bytes((target / part).read_bytes())
    elif not (folder / "tokenizer.json").exists():
        write_tokenizer(train_tokenizer(texts, config.vocab_size), folder, config.max_position_embeddings)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    torch.manual_seed(training.seed)
    decoder = Decoder(config)
    checkpoint = folder / "checkpoint.pt"
    done = torch.load(checkpoint, weights_only=True)["state"]["tokens"] if checkpoint.exists() else 0
    ids, num_bytes = held_out(tokenizer, docs, "validation", limit=120_000)

    def evaluate() -> dict[str, float]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return {"bits_per_byte": bits_per_byte(decoder, ids, num_bytes, start=MARKS.end)}

    progress = 0.0

    def block_now() -> int:
        return _BLOCK if progress < _LONG_FROM else config.max_position_embeddings

    def on_step(line: dict[str, float]) -> None:
        nonlocal progress
        progress = line["progress"]
        if line["step"] % 20 == 0 or "bits_per_byte" in line:
            rest = f", {line['bits_per_byte']:.3f} bits/byte" if "bits_per_byte" in line else ""
            say(
                f"step {line['step']:.0f}, {line['tokens'] / 1e6:.2f} M tokens, {line['seconds']:.0f} s, "
                f"{line['tokens'] / max(line['seconds'], 1e-9):.0f} tokens/s, loss {line['loss']:.3f}{rest}"
            )

    extra = None
    if target is not None:
        extra = _distillation(decoder, target, lambda: progress >= _DISTIL_FROM)
    line = fit_lm(
        decoder,
        _batches(tokenizer, passes, training, block_now, done),
        training,
        checkpoint=checkpoint,
        log=folder / "training_log.jsonl",
        evaluate=evaluate,
        extra_loss=extra,
        on_step=on_step,
    )
    write_folder(decoder, folder)
    line.update(evaluate())
    return line


def _distillation(draft: Decoder, target: Path, active: Callable[[], bool]) -> Callable[[Tensor, Tensor], Tensor]:
    from safetensors.torch import load_file

    teacher = Decoder(PRESETS["pycode-4m"])
    teacher.load_state_dict(load_file(target / "model.safetensors"), strict=False)
    teacher.eval().requires_grad_(False)

    def loss(inputs: Tensor, hidden: Tensor) -> Tensor:
        if not active():
            return cross_entropy(draft.logits, hidden[:, :-1].flatten(0, 1), inputs[:, 1:].flatten())
        with torch.no_grad():
            wanted = torch.log_softmax(teacher(inputs).float(), -1)
        found = torch.log_softmax(draft.logits(hidden).float(), -1)
        divergence = (wanted.exp() * (wanted - found)).sum(-1).mean()
        targets = inputs[:, 1:]
        plain = -found[:, :-1].gather(-1, targets[..., None]).mean()
        return 0.5 * divergence + 0.5 * plain

    return loss
