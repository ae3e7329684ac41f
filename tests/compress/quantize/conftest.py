"""Makes ``quantize_models`` importable, and a table of kernel times that needs no measuring."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture
def known_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 takes twice the time of any other kernel."""
    from hasten.compress import kernels

    def measured(shape: tuple[int, int], tokens: int, names: list[str], **k: Any) -> dict[str, float]:
        return {n: 1.0 if n == "fp32" else 0.5 for n in names}

    monkeypatch.setattr(kernels, "measure_kernels", measured)
