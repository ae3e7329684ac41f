import subprocess
import sys

import pytest

import hasten.retrieve as hr
from hasten.retrieve.index import ann_benchmarks


def test_names_come_when_they_are_asked_for():
    import hasten.retrieve.index.cost_model  # noqa: F401 - a module that is loaded must not hide a name

    assert set(hr.__all__) >= {"Spann", "SearchOptions", "tune_search", "cost"}
    for name in hr.__all__:
        assert callable(getattr(hr, name)), f"{name} is not a module of the same name"
    with pytest.raises(AttributeError, match="nothing"):
        _ = hr.nothing


def test_import_is_light():
    code = "import sys, hasten.retrieve; print([m for m in ('torch', 'numba', 'numpy') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_the_adapter_of_ann_benchmarks():
    rows, queries = hr.clustered(800, 8, 30)
    algorithm = ann_benchmarks.Algorithm("angular", {"head_ratio": 0.2})
    with pytest.raises(ValueError, match="fit comes first"):
        algorithm.query(queries[0], 1)
    algorithm.fit(rows)
    algorithm.set_query_arguments(24, 64)
    alone = [algorithm.query(q, 5).tolist() for q in queries]
    algorithm.batch_query(queries, 5)
    assert [r.tolist() for r in algorithm.get_batch_results()] == alone
    assert algorithm.get_memory_usage() > 1
    assert "lists=24" in str(algorithm)
    folder = algorithm._folder
    algorithm.done()
    assert not folder.exists()
    with pytest.raises(ValueError, match="hamming"):
        ann_benchmarks.Algorithm("hamming")
