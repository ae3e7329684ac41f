"""The pair of knobs is chosen on batches held out."""

import pytest
import torch
from torch import nn

from hasten.compress.lowrank.maestro import Maestro
from hasten.compress.lowrank.search import search_maestro
from hasten.errors import ConfigurationError


def test_the_least_loss_held_out_wins():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(192, 16)
    data = [(p, p[:, :4].argmax(1)) for p in x.split(64)]
    told = []
    best, trials = search_maestro(
        Maestro(epochs=3, rate=5e-3, share=0.2), model, data[:2], data[2:], (0.5, 0.3), group_lassos=(1e-6, 1.0),
        shrinks=(1e-3,), calibrate=1, progress=lambda s, p: told.append(p),
    )  # fmt: skip
    assert [t.mean for t in trials] == sorted(t.mean for t in trials)
    assert (best.group_lasso, best.share) == (trials[0].group_lasso, 0.2)
    assert best.group_lasso == 1e-6  # the other presses everything to nothing
    assert all(len(t.losses) == 2 for t in trials)
    assert told == [0.5, 1.0]
    with pytest.raises(ConfigurationError, match="held out"):
        search_maestro(Maestro(epochs=1), model, data, [], (0.5,))
