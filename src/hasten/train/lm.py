"""The fitting loop of language models: next-token cross-entropy, two optimisers, one schedule, resumable.

Hidden matrices move by Muon (Jordan et al. 2024: momentum, then the nearest orthogonal matrix by Newton-Schulz steps;
scale of Liu et al. 2025, "Muon is Scalable for LLM Training"), everything else by AdamW. The rate warms up, stays, and
falls linearly to zero over the last part of the run (warm-up, stable, decay). A run is as long as its token count
says, or ends on time: with ``seconds`` the schedule follows the clock, and the log says how many tokens that were.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hasten.clock import Clock, MonotonicClock
from hasten.errors import ConfigurationError

__all__ = ["LMTraining", "bits_per_byte", "fit_lm"]


@dataclass(frozen=True)
class LMTraining:
    """Knobs of one run."""

    tokens: int = 20_000_000
    """tokens to train on; the schedule ends there"""
    seconds: float | None = None
    """time to train for; where given, the schedule ends at whichever of the two comes first"""
    batch_rows: int = 16
    """rows of a batch"""
    matrix_rate: float = 8e-3
    """peak learning rate of Muon, in AdamW's scale"""
    rate: float = 3e-3
    """peak learning rate of AdamW (embedding and norms)"""
    weight_decay: float = 0.05
    warm_up: float = 0.01
    """share of the run in which the rate rises"""
    decay: float = 0.4
    """share of the run in which the rate falls to zero"""
    clip: float = 1.0
    """largest norm of the gradient"""
    checkpoint_seconds: float = 300.0
    """time between checkpoints"""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.batch_rows < 1:
            raise ConfigurationError(f"tokens ({self.tokens}) and batch_rows ({self.batch_rows}) must be positive")
        if not 0 <= self.warm_up + self.decay <= 1:
            raise ConfigurationError(f"warm_up {self.warm_up} and decay {self.decay} must fit into the run")

    def factor(self, progress: float) -> float:
        """Share of the peak rate at ``progress`` (0 to 1)."""
        if progress < self.warm_up:
            return max(progress, 1e-3) / self.warm_up
        return min(1.0, max(0.0, 1.0 - progress) / self.decay) if self.decay else 1.0


def cross_entropy(logits: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, *, chunk: int = 2048) -> Tensor:
    """Mean next-token loss in nats without holding all logits at once.

    hidden (tokens, width), targets (tokens,); negative targets do not count.
    """
    total = hidden.new_zeros((), dtype=torch.float32)
    for rows, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        total = total + functional.cross_entropy(logits(rows).float(), wanted, ignore_index=-1, reduction="sum")
    return total / (targets >= 0).sum()


def fit_lm(
    model: Any,
    batches: Iterator[Tensor],
    training: LMTraining,
    *,
    clock: Clock | None = None,
    checkpoint: Path | None = None,
    log: Path | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    evaluate_every: int = 200,
    extra_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, float]:
    """Train ``model`` in place; returns the last log line.

    ``model`` has ``hidden(tokens) -> (batch, time, width)`` and ``logits``; ``batches`` yields rows (batch, time + 1)
    int64, or a pair of inputs and targets. With ``checkpoint`` the run is saved there as it goes and goes on from there
    if the file exists; the file is replaced in one move, so that a kill leaves the old one. ``extra_loss(inputs,
    hidden)`` replaces the cross-entropy where given (distillation).
    """
    clock = clock or MonotonicClock()
    torch.manual_seed(training.seed)
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n and "lm_head" not in n]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=training.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    ]
    if matrices:
        optimisers.append(
            torch.optim.Muon(
                matrices, lr=training.matrix_rate, weight_decay=training.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    state = {"step": 0, "tokens": 0, "seconds": 0.0}
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimiser, values in zip(optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(values)
        state = saved["state"]
    began = clock.now() - state["seconds"]
    last_saved, line = clock.now(), {}
    average = None
    for batch in batches:
        state["seconds"] = clock.now() - began
        progress = state["tokens"] / training.tokens
        if training.seconds is not None:
            progress = max(progress, state["seconds"] / training.seconds)
        if progress >= 1:
            break
        factor = training.factor(progress)
        for optimiser, peak in zip(optimisers, (training.rate, training.matrix_rate), strict=False):
            for group in optimiser.param_groups:
                group["lr"] = peak * factor
        inputs, targets = (batch[:, :-1], batch[:, 1:]) if isinstance(batch, Tensor) else batch
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.hidden(inputs)
            if extra_loss is not None:
                loss = extra_loss(inputs, hidden)
            else:
                loss = cross_entropy(model.logits, hidden.flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        value = loss.item()
        if not math.isfinite(value):
            raise ConfigurationError(f"the loss is {value} at step {state['step']}; lower the learning rate")
        average = value if average is None else 0.98 * average + 0.02 * value
        state["step"] += 1
        state["tokens"] += inputs.numel()
        line = {**state, "progress": progress, "loss": average, "rate": factor}
        if evaluate is not None and state["step"] % evaluate_every == 0:
            line.update(evaluate())
        if on_step is not None:
            on_step(line)
        if log is not None and state["step"] % 20 == 0:
            with log.open("a") as file:
                file.write(json.dumps({k: round(v, 5) for k, v in line.items()}) + "\n")
        if checkpoint is not None and clock.now() - last_saved > training.checkpoint_seconds:
            _save(checkpoint, model, optimisers, state, training)
            last_saved = clock.now()
    if checkpoint is not None:
        _save(checkpoint, model, optimisers, state, training)
    return line


def _save(path: Path, model: nn.Module, optimisers: list[Any], state: dict[str, Any], training: LMTraining) -> None:
    temporary = path.with_suffix(".partial")
    content = {
        "model": model.state_dict(),
        "optimisers": [o.state_dict() for o in optimisers],
        "state": state,
        "training": asdict(training),
    }
    torch.save(content, temporary)
    os.replace(temporary, path)


@torch.inference_mode()
def bits_per_byte(
    logits: Callable[[Tensor], Tensor],
    documents: list[list[int]],
    num_bytes: int,
    *,
    start: int,
    context: int = 1024,
    stride: int = 512,
    batch_rows: int = 8,
    on_batch: Callable[[int, int], None] | None = None,
) -> float:
    """Cross-entropy of ``documents`` (token ids) in bits per byte of their text.

    ``logits`` maps ids (batch, time) to (batch, time, vocabulary). Each document begins after the token ``start`` and
    is read through windows of ``context`` tokens that move on by ``stride``, so that every token but the first ones
    has at least ``context - stride`` tokens of history. Each token counts once.
    """
    rows: list[tuple[list[int], int]] = []  # ids, first position that counts
    for ids in documents:
        whole = [start, *ids]
        first = 1
        while first < len(whole):
            begin = max(0, first - (context - stride)) if first > 1 else 0
            end = min(len(whole), begin + context + 1)
            rows.append((whole[begin:end], first - begin))
            first = end
    rows.sort(key=lambda row: len(row[0]))
    nats = 0.0
    for at in range(0, len(rows), batch_rows):
        group = rows[at : at + batch_rows]
        width = max(len(ids) for ids, _ in group)
        inputs = torch.zeros(len(group), width - 1, dtype=torch.int64)
        targets = torch.full((len(group), width - 1), -1, dtype=torch.int64)
        for index, (ids, first) in enumerate(group):
            row = torch.tensor(ids)
            inputs[index, : len(ids) - 1] = row[:-1]
            targets[index, first - 1 : len(ids) - 1] = row[first:]
        scores = logits(inputs).float()
        nats += functional.cross_entropy(
            scores.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum"
        ).item()
        if on_batch is not None:
            on_batch(min(at + batch_rows, len(rows)), len(rows))
    return nats / math.log(2) / num_bytes
