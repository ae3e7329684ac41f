"""A classifier made from nothing: simulated, trained, compressed, packed, and loaded as a stream."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hasten.compress.container import save
from hasten.errors import ModelLoadError
from hasten.events.classifier import classifier_of, make_classifier
from hasten.events.lightcurves import CLASSES


@pytest.mark.slow
def test_made_and_loaded(tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    made = make_classifier(
        tmp_path / "m", ("g", "r"), objects=80, epochs=1, progress=lambda stage, share: told.append((stage, share))
    )
    assert 0 <= made["accuracy"] <= 1
    assert made["file"] * 8 < made["torch.save"]
    assert told[-1] == ("packed", 1.0)
    assert [s for _, s in told] == sorted(s for _, s in told)
    stream = classifier_of(tmp_path / "m", on_error="skip")
    assert stream.bands == ("g", "r")
    assert stream.classes == CLASSES


def test_a_model_that_does_not_say_its_bands_is_refused(tmp_path: Path) -> None:
    save(nn.Linear(3, 2), tmp_path, torch.ones(1, 3))
    with pytest.raises(ModelLoadError, match="bands, classes, kernel"):
        classifier_of(tmp_path)
