"""Cold starts in fresh processes, and files that cannot be measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hasten.compress.container import save
from hasten.errors import ConfigurationError, ModelLoadError
from hasten.frozen.cold import cold_starts, kind_of


def test_a_packed_model_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    save(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), tmp_path / "m", torch.ones(1, 3))
    found = cold_starts([tmp_path / "m"], np.ones((2, 3), np.float32), processes=1, calls=3)
    (cold,) = found.values()
    assert cold.kind == "packed"
    assert cold.bytes == (tmp_path / "m" / "model.hasten").stat().st_size
    assert min(cold.imports, cold.load, cold.first, cold.warm) > 0
    assert cold.ready == cold.imports + cold.load + cold.first
    with pytest.raises(ModelLoadError, match="could not be run"):
        cold_starts([tmp_path / "m"], np.ones((2, 7), np.float32), processes=1, calls=1)


def test_kinds_are_told_by_names(tmp_path: Path) -> None:
    for name, kind in (("a.onnx", "onnx"), ("a.pt2", "export"), ("a.pt", "pickle"), ("a.hasten", "packed")):
        (tmp_path / name).write_bytes(b"")
        assert kind_of(tmp_path / name) == kind
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ModelLoadError, match="no known kind"):
        kind_of(tmp_path / "a.txt")
    with pytest.raises(ModelLoadError, match="not there"):
        cold_starts([tmp_path / "none.pt"], np.ones(3))
    with pytest.raises(ConfigurationError, match="processes"):
        cold_starts([tmp_path / "a.pt"], np.ones(3), processes=0)
