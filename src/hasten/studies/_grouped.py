"""What the study of latent attention trains: a decoder with several key heads, and short trainings that go on from one.

The embedded model has one key head, where two claims are void: no rotation of heads can gather their energy, and a
factor per head is absorbed by the query and output matrices, so it adds nothing. ``grouped_model`` has four key heads
for eight query heads. Pieces of 256 tokens of library code; made by this script from one seed, kept in the cache, as is
what a short training brings back of a model with a smaller cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from hasten.spiking.checkpoint import trained
from hasten.studies.study import Scale
from hasten.train import LMTraining, fit_lm

__all__ = ["LENGTH", "PRETRAINING", "Pieces", "fine_tune", "grouped_model", "nats", "pieces", "recovered", "widened"]

LENGTH = 256
PRETRAINING = 1_000_000
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


def _batches(rows: Tensor, count: int, seed: int) -> Iterator[Tensor]:
    """Some ``count`` rows at a time in the order of a shuffle, over and over."""
    rng = np.random.default_rng(seed)
    while True:
        for some in np.array_split(rng.permutation(len(rows)), max(1, len(rows) // count)):
            yield rows[some]


def _train_recovered(
    *, rows: Tensor, weights: Tensor, tokens: int, seed: int, checkpoint: Path, model: Any, teacher: Any,
    told: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:  # fmt: skip
    """The weights of ``model``, which begin as ``weights``, after ``tokens`` tokens of what the teacher computes: its
    distribution, and the stream behind each layer, which says more about a layer than the end of the model does."""
    training = LMTraining(
        tokens=tokens, batch_rows=8, matrix_rate=2e-3, rate=1e-3, weight_decay=0.0, warm_up=0.02, decay=0.6, seed=seed
    )
    file = checkpoint / "training.pt"
    done = torch.load(file, weights_only=True)["state"]["step"] if file.exists() else 0

    streams: dict[tuple[bool, int], Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _, given, out, place=(one is model, i): streams.__setitem__(place, out))
        for one in (model, teacher)
        for i, layer in enumerate(one.model.layers)
    ]

    def distance(inputs: Tensor, hidden: Tensor) -> Tensor:
        """Kullback-Leibler divergence from the teacher, in nats a token, and the relative errors of the streams."""
        with torch.no_grad():
            wanted = torch.log_softmax(teacher(inputs).flatten(0, 1).float(), -1)
        found = torch.log_softmax(model.logits(hidden).flatten(0, 1).float(), -1)
        total = functional.kl_div(found, wanted, reduction="batchmean", log_target=True)
        for i in range(len(model.model.layers)):
            own, other = streams[True, i].float(), streams[False, i].float()
            total = total + (own - other).square().mean() / other.square().mean()
        return total

    for p in model.parameters():
        p.requires_grad_(True)
    model.train()
    try:
        fit_lm(
            model, islice(_batches(rows, 8, seed), done, None), training, checkpoint=file, extra_loss=distance,
            on_step=lambda line: told(line["progress"]),
        )  # fmt: skip
    finally:
        for hook in hooks:
            hook.remove()
    model.eval()
    return {"weights": model.state_dict()}


def recovered(model: Any, teacher: Any, rows: Tensor, tokens: int, seed: int, told: Callable[[float], None]) -> Any:
    """``model`` after a short training to the teacher's distribution; goes on where it was cut off, made once."""
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    settings = {"tokens": tokens, "seed": seed}
    data = {"rows": rows, "weights": weights}
    made = trained("recovered", _train_recovered, settings, data, model=model, teacher=teacher, told=told)
    model.load_state_dict(made["weights"])
    return model.eval()


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
        hidden_size=128,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        head_dim=16,
        intermediate_size=384,
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

    def note(line: dict[str, float]) -> None:
        if line["step"] % 20 == 0:
            log.append(dict(line))
            told(f"grouped model, {line['tokens'] / 1e6:.2f} M tokens, loss {line['loss']:.3f}")

    fit_lm(decoder, _batches(rows, 16, seed), LMTraining(tokens=tokens, seed=seed), on_step=note)
    return {"weights": decoder.state_dict(), "log": log}


def grouped_model(vocabulary: int, found: Pieces, scale: Scale) -> Any:
    """The trained decoder in float32; some minutes of one core once."""
    from hasten.language import Decoder

    tokens = scale.choose(quick=20_000, full=PRETRAINING)
    settings = {"tokens": tokens, "vocabulary": vocabulary, "seed": scale.seed}

    def told(stage: str) -> None:
        scale.progress(stage, 0.3)

    made = trained("grouped", _train_grouped, settings, {"rows": found.train}, told=told)
    decoder = Decoder(_config(vocabulary))
    decoder.load_state_dict(made["weights"])
    return decoder.eval()
