"""Generated tasks whose answer lies in one thing only: in the timing of spikes, or in what was said long ago."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hasten.errors import ConfigurationError

__all__ = ["Coincidence", "coincidence", "recall"]


class Coincidence(NamedTuple):
    """Spikes (time, samples, lines), labels (samples,), and the planted times (classes, lines) in steps."""

    spikes: Tensor
    labels: Tensor
    times: Tensor


def coincidence(
    samples: int, lines: int, classes: int, span: int, steps: int, *, jitter: int = 0, seed: int = 0, plant: int = 0
) -> Coincidence:
    """Each line fires once; a class is nothing but the times at which its lines fire relative to each other.

    The times of a class are different whole steps from 0 to ``span``, drawn from ``plant``. A sample starts them at a
    random moment and moves each by up to ``jitter`` steps. Counts and rates are the same for all classes.
    """
    if span + 2 * jitter >= steps:
        raise ConfigurationError(f"times up to {span} with a jitter of {jitter} do not fit {steps} steps")
    if lines > span + 1:
        raise ConfigurationError(f"{lines} lines at different times need a span of {lines - 1} steps, got {span}")
    drawn = torch.rand(classes, span + 1, generator=torch.Generator().manual_seed(plant))
    times = drawn.argsort(1)[:, :lines]  # no two at once: without delays nothing ever coincides
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (samples,), generator=g)
    start = torch.randint(jitter, steps - span - jitter, (samples, 1), generator=g)
    moved = torch.randint(-jitter, jitter + 1, (samples, lines), generator=g)
    spikes = torch.zeros(steps, samples, lines)
    spikes.scatter_(0, (times[labels] + start + moved).unsqueeze(0), 1.0)
    return Coincidence(spikes, labels, times)


def recall(
    samples: int, distractors: int, *, pairs: int = 4, keys: int = 16, values: int = 16, noise: int = 16, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Remember: ``pairs`` of key and value, then noise, then one of the keys: which value? -> tokens, answers.

    Tokens (samples, 2 pairs + distractors + 2): keys are 0 … keys-1, values follow, then noise, then one token that
    asks; the last token is the key. Answers (samples,) are value tokens. Keys of a sample differ.
    """
    if pairs > keys:
        raise ConfigurationError(f"{pairs} pairs need as many different keys, there are {keys}")
    g = torch.Generator().manual_seed(seed)
    chosen = torch.rand(samples, keys, generator=g).argsort(1)[:, :pairs]
    stored = keys + torch.randint(0, values, (samples, pairs), generator=g)
    filler = keys + values + torch.randint(0, noise, (samples, distractors), generator=g)
    asked = torch.randint(0, pairs, (samples, 1), generator=g)
    ask = torch.full((samples, 1), keys + values + noise)
    told = torch.stack([chosen, stored], -1).flatten(1)
    tokens = torch.cat([told, filler, ask, chosen.gather(1, asked)], 1)
    return tokens, stored.gather(1, asked)[:, 0]
