"""What the study of latent attention trains: a decoder with several key heads, and short trainings that go on from one.

The embedded model has one key head, where two claims are void: no rotation of heads can gather their energy, and a
factor per head is absorbed by the query and output matrices, so it adds nothing. ``grouped_model`` has four key heads
for eight query heads. Pieces of 256 tokens of library code; made by this script from one seed, kept in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hasten.spiking.checkpoint import trained
from hasten.studies.study import Scale
from hasten.train import LMTraining, fit_lm

__all__ = ["LENGTH", "PRETRAINING", "Pieces", "fine_tune", "grouped_model", "nats", "pieces", "widened"]

LENGTH = 256
PRETRAINING = 1_500_000
"""tokens that the grouped model is trained on"""


@dataclass(frozen=True)
class Pieces:
    """Token pieces (count, 256) of the three sides of the corpus."""

    train: Tensor
    validation: Tensor
    test: Tensor


def pieces(tokenizer: Any, scale: Scale) -> Pieces:
    """Library files, cut; in the order of a shuffle that the seed gives."""
    from hasten.language.corpus import documents

    rng = np.random.default_rng(scale.seed)
    sides: dict[str, list[list[int]]] = {"train": [], "validation": [], "test": []}
    most = scale.choose(quick=20_000, full=200_000)
    for document in documents(suite=False):
        ids = tokenizer.encode(document.text[:most])
        sides[document.split] += [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH + 1, LENGTH)]
    limits = {"train": None, "validation": scale.choose(quick=8, full=64), "test": scale.choose(quick=8, full=96)}
    cut = {}
    for name, found in sides.items():
        order = rng.permutation(len(found))[: limits[name]]
        cut[name] = torch.tensor(np.array(found, np.int64)[order])
    return Pieces(**cut)


@torch.no_grad()
def nats(model: nn.Module, rows: Tensor) -> Tensor:
    """Mean loss of each row (count, time) -> (count,)."""
    out = []
    for part in rows.split(16):
        logits = model(part)[:, :-1].float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
        out.append(loss.view(len(part), -1).mean(1))
    return torch.cat(out)


def fine_tune(
    model: nn.Module, rows: Tensor, *, steps: int, rate: float, seed: int, teacher: nn.Module | None = None,
    told: Callable[[float], None] = lambda share: None,
) -> None:  # fmt: skip
    """AdamW over all weights, 8 pieces a step, rate falling to zero; equal seeds see equal pieces.

    ``teacher``: its distribution is learned instead of the text (Kullback-Leibler divergence).
    """
    rng = np.random.default_rng(seed)
    parameters = list(model.parameters())
    for p in parameters:
        p.requires_grad_(True)
    optimiser = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    order = np.concatenate([rng.permutation(len(rows)) for _ in range(-(-steps * 8 // len(rows)))])
    model.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
        batch = rows[order[8 * step : 8 * step + 8]]
        with torch.autocast("cpu", torch.bfloat16):  # weights and updates stay float32
            logits = model(batch)[:, :-1].flatten(0, 1)
        if teacher is None:
            loss = nn.functional.cross_entropy(logits.float(), batch[:, 1:].flatten())
        else:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                wanted = teacher(batch)[:, :-1].flatten(0, 1)
            found, wanted = torch.log_softmax(logits.float(), -1), torch.log_softmax(wanted.float(), -1)
            loss = nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        told((step + 1) / steps)
    model.eval()


def widened(model: Any, extra: int) -> Any:
    """The decoder with ``extra`` more numbers inside its feed-forward layers in all, the same function at first.

    What comes in reads at random and writes with zeros, so it can learn and changes nothing yet.
    """
    from dataclasses import replace

    from hasten.language import Decoder

    config = model.config
    more = round(extra / (3 * config.hidden_size * config.num_layers))
    wide = Decoder(replace(config, intermediate_size=config.intermediate_size + more))
    state = {name: tensor.clone() for name, tensor in wide.state_dict().items()}
    for name, tensor in model.state_dict().items():
        if name.endswith("down_proj.weight"):
            state[name].zero_()
        state[name][tuple(slice(n) for n in tensor.shape)] = tensor
    wide.load_state_dict(state)
    return wide.eval()


def _config(vocabulary: int) -> Any:
    from hasten.language import DecoderConfig

    return DecoderConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        intermediate_size=512,
        max_position_embeddings=1024,
        tie_embeddings=True,
    )


def _train_grouped(
    *, rows: Tensor, tokens: int, vocabulary: int, seed: int, checkpoint: Path,
    told: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:  # fmt: skip
    """The weights and the log of a training from scratch; Muon and AdamW as for the embedded models."""
    from hasten.language import Decoder

    torch.manual_seed(seed)
    decoder = Decoder(_config(vocabulary))
    log: list[dict[str, float]] = []

    def batches() -> Iterator[Tensor]:
        rng = np.random.default_rng(seed)
        while True:
            for some in np.array_split(rng.permutation(len(rows)), max(1, len(rows) // 16)):
                yield rows[some]

    def note(line: dict[str, float]) -> None:
        if line["step"] % 20 == 0:
            log.append(dict(line))
            told(f"grouped model, {line['tokens'] / 1e6:.2f} M tokens, loss {line['loss']:.3f}")

    fit_lm(decoder, batches(), LMTraining(tokens=tokens, seed=seed), on_step=note)
    return {"weights": decoder.state_dict(), "log": log}


def grouped_model(vocabulary: int, found: Pieces, scale: Scale) -> Any:
    """The trained decoder in float32; some ten minutes of one core once."""
    from hasten.language import Decoder

    tokens = scale.choose(quick=20_000, full=PRETRAINING)
    settings = {"tokens": tokens, "vocabulary": vocabulary, "seed": scale.seed}

    def told(stage: str) -> None:
        scale.progress(stage, 0.3)

    made = trained("grouped", _train_grouped, settings, {"rows": found.train}, told=told)
    decoder = Decoder(_config(vocabulary))
    decoder.load_state_dict(made["weights"])
    return decoder.eval()
