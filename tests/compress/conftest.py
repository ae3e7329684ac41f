from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def measured_times(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests of a process: kernels that several convert to are timed once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _not_the_users_cache(measured_times: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("HASTEN_CACHE", str(measured_times))
