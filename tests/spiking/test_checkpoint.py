"""Nothing trains twice, and a change trains anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hasten.errors import DataError
from hasten.spiking.checkpoint import fingerprint, trained

CALLS: list[int] = []


def script(x: torch.Tensor, *, factor: int, checkpoint: Path) -> dict[str, torch.Tensor]:
    CALLS.append(factor)
    (checkpoint / "half").write_text("done")
    return {"y": factor * x}


def other(x: torch.Tensor, *, factor: int, checkpoint: Path) -> dict[str, torch.Tensor]:
    return {"y": factor * x + 1}


def test_made_once_and_named_by_what_made_it(tmp_path: Path) -> None:
    CALLS.clear()
    data = {"x": torch.ones(3)}
    for _ in range(2):
        assert torch.equal(trained("a", script, {"factor": 2}, data, folder=tmp_path)["y"], torch.full((3,), 2.0))
    assert CALLS == [2]
    assert torch.equal(trained("a", script, {"factor": 3}, data, folder=tmp_path)["y"], torch.full((3,), 3.0))
    trained("a", script, {"factor": 2}, {"x": torch.zeros(3)}, folder=tmp_path)
    assert CALLS == [2, 3, 2]
    assert len(list(tmp_path.glob("*.pt"))) == 3
    assert not list(tmp_path.glob("*.running"))
    assert fingerprint(script, {"factor": 2}, data) != fingerprint(other, {"factor": 2}, data)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    data = {"x": torch.ones(3)}
    trained("a", script, {"factor": 2}, data, folder=tmp_path)
    (file,) = tmp_path.glob("*.pt")
    file.write_bytes(b"not an archive")
    with pytest.raises(DataError, match="delete it"):
        trained("a", script, {"factor": 2}, data, folder=tmp_path)
