"""Makes ``fakes`` importable and keeps torch to one thread."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import json  # noqa: E402

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def start_fake():
    """Starts servers on a fake model; all of them are stopped at the end."""
    from hasten.serve.server import start

    handles = []

    def begin(delay=0.0, *, max_context=512, chat=True, **settings):
        model = json.dumps({"delay": delay, "max_context": max_context, "chat": chat})
        settings = {"loader": "fakes:load", "max_num_seqs": 8, "num_blocks": 256, "threads": 1, "seed": 0} | settings
        handles.append(start(model, timeout=120, **settings))
        return handles[-1]

    yield begin
    for handle in handles:
        handle.stop(10)


@pytest.fixture(scope="session")
def server(start_fake):
    """One quick server for all tests that leave it as it was."""
    return start_fake()
