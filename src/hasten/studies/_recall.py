"""A small decoder that must look far back: records of names and words, and questions about them at the end.

    text = ": name = w w w w" of many records, then "? name = w w w w" of some of them, in any order

Names are single tokens, words come from an alphabet of 64, so that the next word follows from the name and the place
and not from the last word alone. The decoder learns with rows of 42, then 126 tokens, each until it has learned
them, then with rows of up to 4,096 tokens at a falling rate; only answers count in the loss (the records are noise that
nobody can predict). Made by this script from one seed and kept in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten.spiking.checkpoint import trained
from hasten.studies.study import Scale
from hasten.train import LMTraining, fit_lm

__all__ = ["LENGTHS", "Question", "question", "recall_model", "rows"]

RECORD, EQUALS, ASKED = 0, 1, 2
WORDS, NAMES, ANSWER = 64, 2048, 4
FIRST_WORD, FIRST_NAME = 3, 3 + WORDS
UNIT = ANSWER + 3
"""tokens of a record, and of a question with its answer"""
VOCABULARY = FIRST_NAME + NAMES
LENGTHS = (42, 126, 504, 2016, 4095)
"""tokens of a row: the first two one after the other, the rest in turns"""
BATCH = 4096
"""tokens of a batch"""


def rows(rng: np.random.Generator, count: int, length: int, questions: int | None = None) -> Tensor:
    """Token ids (count, time) of whole records and questions, ``length`` at most.

    ``questions``: of these how many; None for as many as records. No record is asked for twice.
    """
    total = length // UNIT
    asked = total // 2 if questions is None else questions
    records = total - asked
    names = rng.permuted(np.tile(np.arange(NAMES), (count, 1)), axis=1)[:, :records] + FIRST_NAME
    words = rng.integers(FIRST_WORD, FIRST_NAME, (count, records, ANSWER))
    which = rng.permuted(np.tile(np.arange(records), (count, 1)), axis=1)[:, :asked]
    out = np.empty((count, total, UNIT), np.int64)
    out[:, :records, 0], out[:, records:, 0], out[:, :, 2] = RECORD, ASKED, EQUALS
    out[:, :records, 1], out[:, :records, 3:] = names, words
    out[:, records:, 1] = np.take_along_axis(names, which, 1)
    out[:, records:, 3:] = np.take_along_axis(words, which[..., None], 1)
    return torch.from_numpy(out.reshape(count, -1))


@dataclass(frozen=True)
class Question:
    """A prompt that ends in a question.

    >>> asked = question(np.random.default_rng(0), 700)
    >>> len(asked.prompt), len(asked.answer)
    (697, 3)
    """

    prompt: tuple[int, ...]
    """records, a few answered questions, and a question with the first word of its answer"""
    answer: tuple[int, ...]
    """what comes next"""


def question(rng: np.random.Generator, length: int, answered: int = 3) -> Question:
    """``length`` tokens at most: records, ``answered`` questions with their answers, and one with its first word.

    The decoder learned to go on with an answer, wherever it stands, but not to find its first word reliably.
    """
    ids = rows(rng, 1, length, answered + 1)[0].tolist()
    return Question(tuple(ids[: 1 - ANSWER]), tuple(ids[1 - ANSWER :]))


def _config() -> Any:
    from hasten.language import DecoderConfig

    return DecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        intermediate_size=256,
        max_position_embeddings=16_384,
        partial_rotary_factor=0.5,
        tie_embeddings=True,
    )


class _Climb:
    """Batches of rows that get longer: a length is left when the loss on it has fallen under ``least``."""

    def __init__(self, rng: np.random.Generator, lengths: list[int], least: float, most: int) -> None:
        """``most`` tokens of one length at most."""
        self.rng, self.lengths, self.least, self.most = rng, lengths, least, most
        self.length = 0
        self.recent: list[float] = []

    def __iter__(self) -> Iterator[Tensor]:
        for length in self.lengths:
            self.length, self.recent, seen = length, [], 0
            while seen < self.most and (len(self.recent) < 20 or np.mean(self.recent[-20:]) > self.least):
                batch = rows(self.rng, max(1, BATCH // length), length)
                seen += batch.numel()
                yield batch


def _answers(decoder: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss on answers; logits of other places are not computed."""

    def loss(inputs: Tensor, hidden: Tensor) -> Tensor:
        time = inputs.shape[1]
        place = torch.arange(time - 1)
        begin = -(-((time + 1) // UNIT) // 2) * UNIT  # records come first, half of all or one more
        wanted = place[(place >= begin) & (place % UNIT >= UNIT - ANSWER - 1) & (place % UNIT < UNIT - 1)]
        logits = decoder.logits(hidden[:, wanted]).float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs[:, wanted + 1].flatten())

    return loss


def _train_recall(
    *, lengths: list[int], least: float, most: int, last: int, seed: int, checkpoint: Path,
    told: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:  # fmt: skip
    """The weights and the log of a training: the climb at a constant rate, then ``last`` tokens with a falling one."""
    from hasten.language import Decoder

    torch.manual_seed(seed)
    decoder = Decoder(_config())
    rng = np.random.default_rng(seed)
    log: list[dict[str, float]] = []
    loss = _answers(decoder)
    climb = _Climb(rng, lengths[:2], least, most)
    end = _Climb(rng, lengths[1:] * 1000, 0.0, BATCH // 2)

    def watched(inputs: Tensor, hidden: Tensor) -> Tensor:
        value = loss(inputs, hidden)
        climb.recent.append(value.item())
        return value

    def note(line: dict[str, float]) -> None:
        if line["step"] % 20 == 0:
            log.append({**line, "recent": float(np.mean(climb.recent[-20:]))})
            told(
                f"recall model, {line['tokens'] / 1e6:.2f} M tokens, rows of {climb.length}, "
                f"loss {log[-1]['recent']:.3f}"
            )

    constant = LMTraining(tokens=10**9, warm_up=0.0, decay=0.0, seed=seed)
    fit_lm(decoder, iter(climb), constant, extra_loss=watched, on_step=note)
    falling = LMTraining(tokens=last, warm_up=0.02, decay=0.98, seed=seed)
    climb = end
    fit_lm(decoder, iter(end), falling, extra_loss=watched, on_step=note)
    return {"weights": decoder.state_dict(), "log": log}


def recall_model(scale: Scale, lengths: tuple[int, ...] = LENGTHS, *, dtype: str = "bf16") -> Any:
    """The trained decoder as a language model (no tokeniser: prompts are ids); about 20 minutes of one core once."""
    from hasten.language import Decoder
    from hasten.language.loading import LanguageModel

    settings = {"lengths": list(lengths), "least": 0.7, "most": 1_500_000, "last": 4_000_000, "seed": scale.seed}

    def told(stage: str) -> None:
        scale.progress(stage, 0.3)

    made = trained("recall", _train_recall, settings, {}, told=told)
    decoder = Decoder(_config())
    decoder.load_state_dict(made["weights"])
    return LanguageModel("recall", _config(), decoder=decoder.eval(), precision=dtype)
