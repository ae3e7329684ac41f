"""A small decoder that must look far back: words in any order, and pieces of what was said, asked for again.

    text = distinct words; then pieces of 8 of them, each of which begins with its key and goes on with its value

After a key the next word is the one that stood behind it, wherever that was: the decoder learns to copy. Every word has
a random vector that is not trained, so what is learned about one word holds for all. Two layers; two heads of the first
begin as heads for the word before (a bias on queries and keys, turned by one position), which training then moves as
all else: without them nothing was copied yet after 0.3 M words. It begins with rows of 64 words, goes on to longer
ones when it has learned a length, and ends with rows of up to 16,384 at a falling rate; only values count in the loss.
Made by this script from one seed and kept in the cache.
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

__all__ = ["CLIMB", "TURNS", "Question", "question", "recall_model", "rows"]

VOCABULARY = 16_384
PIECE = 8
"""words of a piece that is asked for in training: its key, and seven that must follow"""
RECORD = 7
"""words of a record of a prompt: its key, and six that must follow; not a divisor of a chunk of the cache"""
CLIMB = (64, 256, 1024)
"""words of a row, one after the other"""
TURNS = (4096, 4096, 8192, 16_384)
"""words of a row at the end, in turns"""
BATCH = 2048
"""words of a batch, where a row is not longer"""
JUDGED = 1024
"""places of a batch in the loss, drawn from those that can be known"""


def asked_of(length: int) -> int:
    """Pieces asked for at the end of a row: half of a short row, an eighth of a long one."""
    return length // PIECE // (2 if length < 2048 else 8)


def rows(rng: np.random.Generator, count: int, length: int) -> Tensor:
    """Ids (count, length) of a text without repetition and of pieces of it, which begin anywhere in it."""
    asked = asked_of(length)
    size = length - asked * PIECE
    text = np.stack([rng.permutation(VOCABULARY)[:size] for _ in range(count)])
    begin = rng.integers(0, size - PIECE + 1, (count, asked))
    pieces = np.take_along_axis(text, (begin[..., None] + np.arange(PIECE)).reshape(count, -1), 1)
    return torch.from_numpy(np.concatenate([text, pieces], 1))


@dataclass(frozen=True)
class Question:
    """A prompt that ends in a key.

    >>> asked = question(np.random.default_rng(0), 700)
    >>> len(asked.prompt), len(asked.answer)
    (694, 6)
    """

    prompt: tuple[int, ...]
    """records, a few of them again, and a key"""
    answer: tuple[int, ...]
    """what stood behind that key"""


def question(rng: np.random.Generator, length: int, answered: int = 3) -> Question:
    """``length`` words at most: records of distinct words, ``answered`` of them again, and the key of another."""
    records = length // RECORD - answered - 1
    text = rng.permutation(VOCABULARY)[: records * RECORD].reshape(records, RECORD)
    again = text[rng.permutation(records)[: answered + 1]]
    ids = np.concatenate([text, again]).reshape(-1).tolist()
    return Question(tuple(ids[: 1 - RECORD]), tuple(ids[1 - RECORD :]))


def _config() -> Any:
    from hasten.language import DecoderConfig

    return DecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=64,
        intermediate_size=64,
        max_position_embeddings=16_640,
        partial_rotary_factor=0.5,
        tie_embeddings=True,
        attention_bias=True,
    )


def _begin(decoder: Any, previous: float = 8.0, heads: int = 2) -> None:
    """Initial weights: fixed unit-like vectors of words, matrices of unit gain, heads for the word before.

    Query and key of such a head have a constant part of ``previous`` in each pair of turning entries, the query's one
    position behind, so that the score is highest at the word before.
    """
    from hasten.nn import rotary_frequencies

    config = decoder.config
    for name, weight in decoder.named_parameters():
        if weight.dim() == 2:
            word = name.endswith("embed_tokens.weight") or name.startswith("lm_head")
            torch.nn.init.normal_(weight, std=0.15 if word else weight.shape[1] ** -0.5)
    decoder.model.embed_tokens.weight.requires_grad_(False)
    turn = rotary_frequencies(config.rotary_dim, config.rope_theta, config.rope_scaling, 64)[0]
    first, pairs = decoder.model.layers[0].self_attn, len(turn)
    with torch.no_grad():
        for at in range(0, heads * config.head_dim, config.head_dim):
            first.q_proj.bias[at : at + pairs] = previous * torch.cos(turn)
            first.q_proj.bias[at + pairs : at + 2 * pairs] = -previous * torch.sin(turn)
            first.k_proj.bias[at : at + pairs] = previous


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


def _values(decoder: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss on words behind a key, among the words of the batch; other places cannot be known."""

    def loss(inputs: Tensor, hidden: Tensor) -> Tensor:
        length = inputs.shape[1] + 1
        begin = length - asked_of(length) * PIECE
        place = torch.arange(begin, length - 2)  # the last word is not among the inputs
        place = place[(place - begin) % PIECE < PIECE - 1]
        known, wanted = hidden[:, place].flatten(0, 1), inputs[:, place + 1].flatten()
        some = torch.randperm(len(wanted))[:JUDGED]
        words = inputs.unique()
        logits = torch.nn.functional.linear(known[some], decoder.lm_head.weight[words]).float()
        return torch.nn.functional.cross_entropy(logits, torch.searchsorted(words, wanted[some]))

    return loss


def _train_recall(
    *, climb: list[int], turns: list[int], least: float, most: int, last: int, seed: int, checkpoint: Path,
    told: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:  # fmt: skip
    """The weights and the log of a training: the climb at a constant rate, then ``last`` tokens with a falling one."""
    from hasten.language import Decoder

    torch.manual_seed(seed)
    decoder = Decoder(_config())
    _begin(decoder)
    rng = np.random.default_rng(seed)
    log: list[dict[str, float]] = []
    loss = _values(decoder)
    batches = _Climb(rng, climb, least, most)
    end = _Climb(rng, turns * 1000, 0.0, 1)

    def watched(inputs: Tensor, hidden: Tensor) -> Tensor:
        value = loss(inputs, hidden)
        batches.recent.append(value.item())
        return value

    def note(line: dict[str, float]) -> None:
        if line["step"] % 10 == 0:
            log.append({**line, "recent": float(np.mean(batches.recent[-10:]))})
            told(
                f"recall model, {line['tokens'] / 1e6:.2f} M words, rows of {batches.length}, "
                f"loss {log[-1]['recent']:.3f}"
            )

    constant = LMTraining(tokens=10**9, warm_up=0.0, decay=0.0, rate=1e-2, seed=seed)
    fit_lm(decoder, iter(batches), constant, extra_loss=watched, on_step=note)
    falling = LMTraining(tokens=last, warm_up=0.02, decay=0.98, rate=1e-2, seed=seed)
    batches = end
    fit_lm(decoder, iter(end), falling, extra_loss=watched, on_step=note)
    return {"weights": decoder.state_dict(), "log": log}


def recall_model(scale: Scale, *, dtype: str = "bf16") -> Any:
    """The trained decoder as a language model (no tokeniser: prompts are ids); about 6 minutes of one core once."""
    from hasten.language import Decoder
    from hasten.language.loading import LanguageModel

    settings = {
        "climb": list(CLIMB), "turns": list(TURNS), "least": 0.5, "most": 1_500_000, "last": 1_000_000,
        "seed": scale.seed,
    }  # fmt: skip

    def told(stage: str) -> None:
        scale.progress(stage, 0.3)

    made = trained("recall-keys", _train_recall, settings, {}, told=told)
    decoder = Decoder(_config())
    decoder.load_state_dict(made["weights"])
    return LanguageModel("recall", _config(), decoder=decoder.eval(), precision=dtype)
