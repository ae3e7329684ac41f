"""The generated tasks hide their answer in one thing only."""

from __future__ import annotations

import pytest
import torch

from hasten.errors import ConfigurationError
from hasten.spiking.tasks import coincidence, recall


def test_classes_differ_only_in_timing() -> None:
    task = coincidence(200, 8, 4, 12, 40, jitter=1)
    assert torch.equal(task.spikes.sum(0), torch.ones(200, 8))
    when = task.spikes.argmax(0)
    for sample in range(50):
        moved = when[sample] - task.times[task.labels[sample]]
        assert moved.max() - moved.min() <= 2
    again = coincidence(50, 8, 4, 12, 40, seed=9)
    assert torch.equal(again.times, task.times)
    with pytest.raises(ConfigurationError, match="do not fit"):
        coincidence(5, 2, 2, 30, 30)


def test_the_answer_was_told_once() -> None:
    tokens, answers = recall(100, 20)
    assert tokens.shape == (100, 8 + 20 + 2)
    for row, answer in zip(tokens.tolist(), answers.tolist(), strict=True):
        told = dict(zip(row[:8:2], row[1:8:2], strict=True))
        assert told[row[-1]] == answer
        assert len(told) == 4
        assert all(t >= 32 for t in row[8:-1])
    with pytest.raises(ConfigurationError, match="different keys"):
        recall(1, 1, pairs=20)
