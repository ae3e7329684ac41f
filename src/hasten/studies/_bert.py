"""A small BERT that the sensitivity studies train, on images as rows of pixels or on verbs that agree.

The architecture is that of ``transformers``, from a config and with random weights; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hasten.train.fit import fit

__all__ = ["DigitBert", "agreement", "batches", "classify", "rows", "score", "train_bert"]

Told = Callable[[str], None]


class DigitBert(nn.Module):
    """``BertForSequenceClassification`` on rows of pixels (batch, rows, pixels) or on token ids (batch, time)."""

    def __init__(
        self, layers: int = 4, width: int = 128, heads: int = 4, classes: int = 10, vocabulary: int = 0,
        pixels: int = 8,
    ) -> None:  # fmt: skip
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        self.config: Any = BertConfig(
            vocab_size=max(vocabulary, 2), hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=2 * width, max_position_embeddings=64, hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1, pad_token_id=0,
        )  # fmt: skip
        self.config.num_labels = classes
        self.rows = nn.Linear(pixels, width) if not vocabulary else None
        self.net: Any = BertForSequenceClassification(self.config)

    def forward(self, x: Tensor) -> Tensor:
        """-> logits (batch, classes)."""
        if self.rows is None:
            found: Tensor = self.net(input_ids=x).logits
            return found
        logits: Tensor = self.net(inputs_embeds=self.rows(x)).logits
        return logits


def rows(images: Tensor) -> Tensor:
    """(n, 1, rows, pixels) -> (n, rows, pixels): a row of pixels is a token."""
    return images[:, 0]


def agreement(count: int, seed: int, phrases: int = 3) -> tuple[Tensor, Tensor]:
    """Sentences whose verb does or does not agree in number with the subject: ids (count, time), labels (count,).

    ``begin noun (preposition noun)* verb``, up to ``phrases`` nouns between that have either number; 0 fills up. Ids:
    1 begins, 2 to 9 are singular and 10 to 17 plural nouns, 18 to 21 prepositions, 22 to 25 singular and 26 to 29
    plural verbs.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, (count, *shape), generator=generator)

    subject, verb, between = draw(2), draw(2), draw(phrases + 1)
    length = 3 + 2 * phrases
    ids = torch.zeros(count, length, dtype=torch.int64)
    ids[:, 0], ids[:, 1] = 1, 2 + 8 * subject + draw(8)
    for k in range(phrases):
        there = between > k
        ids[:, 2 + 2 * k] = torch.where(there, 18 + draw(4), 0)
        ids[:, 3 + 2 * k] = torch.where(there, 2 + draw(16), 0)
    ids[torch.arange(count), 2 + 2 * between] = 22 + 4 * verb + draw(4)
    return ids, (subject == verb).long()


def classify(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of (inputs, labels)."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def batches(x: Tensor, y: Tensor, seed: int, size: int = 64) -> Callable[[int], list[tuple[Tensor, Tensor]]]:
    """Batches of an epoch in a seeded order."""

    def of(epoch: int) -> list[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1009 * seed + epoch))
        return [(x[i], y[i]) for i in order.split(size)]

    return of


def score(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """(accuracy, loss)."""
    model.eval()
    with torch.no_grad():
        logits = model(x)
    return float((logits.argmax(1) == y).float().mean()), float(nn.functional.cross_entropy(logits, y))


def train_bert(
    x: Tensor, y: Tensor, *, shape: dict[str, int], epochs: int, rate: float, seed: int, checkpoint: Path,
    told: Told = lambda stage: None,
) -> dict[str, Any]:  # fmt: skip
    """Weights after the whole run and after a tenth of it."""
    torch.manual_seed(seed)
    model = DigitBert(**shape)
    early: dict[str, Tensor] = {}

    def keep(epoch: int, loss: float) -> None:
        told(f"seed {seed}: BERT, epoch {epoch + 1}, loss {loss:.3f}")
        if epoch + 1 == max(1, epochs // 10):
            early.update({k: v.clone() for k, v in model.state_dict().items()})

    fit(model, batches(x, y, seed), classify, epochs=epochs, rate=rate, weight_decay=0.01, seed=seed, on_epoch=keep)
    return {"net": model.state_dict(), "early": early}
