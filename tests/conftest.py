"""Makes ``documents`` importable, and holds what the tests that run documents share."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.append(str(Path(__file__).parent))

if not Path("/dev/nvidiactl").exists():  # no GPU: Triton's kernels run under its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")


# The same examples in every run; none is wrong for having taken long, for kernels compile and machines are shared.
settings.register_profile("hasten", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("hasten")


def pytest_collection_finish() -> None:
    """What imports made stays: collections during tests look at what tests make, and compiling makes much at once."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def document_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for the whole file, so that the roofs of the machine are measured once; never the user's."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def elsewhere(tmp_path: Path, document_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_CACHE", str(document_cache))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
