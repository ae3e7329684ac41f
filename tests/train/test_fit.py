from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hasten.errors import ConfigurationError, DataError
from hasten.train.fit import fit


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def task() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    y = x @ torch.randn(4, 2)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 2)), list(
        zip(x.split(16), y.split(16), strict=True)
    )


def test_it_learns_and_is_deterministic() -> None:
    results = []
    for _ in range(2):
        model, batches = task()
        results.append(fit(model, batches, loss, epochs=30, rate=2e-2, seed=3))
    assert results[0] == results[1]
    assert results[0][-1] < 0.3 * results[0][0]


def test_a_run_that_was_cut_off_ends_with_the_same_weights(tmp_path: Path) -> None:
    model, batches = task()
    whole = fit(model, batches, loss, epochs=6, rate=1e-2)
    cut, _ = task()

    class Stop(Exception):
        pass

    def stop(epoch: int, value: float) -> None:
        if epoch == 3:
            raise Stop

    place = tmp_path / "deep" / "run.pt"
    with pytest.raises(Stop):
        fit(cut, batches, loss, epochs=6, rate=1e-2, checkpoint=place, on_epoch=stop)
    again, _ = task()
    assert fit(again, batches, loss, epochs=6, rate=1e-2, checkpoint=place) == whole
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert fit(again, batches, loss, epochs=6, rate=1e-2, checkpoint=place) == whole  # nothing is left to do
    with pytest.raises(DataError, match="does not belong"):
        fit(nn.Linear(4, 2), batches, loss, epochs=6, checkpoint=place)
    place.write_bytes(b"x")
    with pytest.raises(DataError, match="does not belong"):
        fit(again, batches, loss, epochs=6, checkpoint=place)


def test_batches_by_epoch_and_chosen_parameters() -> None:
    model, batches = task()
    kept = model[2].weight.detach().clone()  # type: ignore[index]
    asked: list[int] = []

    def of(epoch: int) -> list[tuple[Tensor, Tensor]]:
        asked.append(epoch)
        return batches[:1]

    told: list[float] = []
    fit(model, of, loss, epochs=3, parameters=model[0].parameters(), progress=lambda n, s: told.append(s))  # type: ignore[index]
    assert asked == [0, 1, 2]
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert torch.equal(model[2].weight, kept)  # type: ignore[index]


def test_what_cannot_be_trained() -> None:
    model, batches = task()
    with pytest.raises(ConfigurationError, match="train nothing"):
        fit(model, batches, loss, epochs=0)
    with pytest.raises(DataError, match="the loss is nan"):
        fit(model, [(batches[0][0] * float("nan"), batches[0][1])], loss)
    with pytest.raises(DataError, match="holds no batch"):
        fit(model, lambda epoch: [], loss)
