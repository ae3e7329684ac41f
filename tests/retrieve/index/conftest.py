"""Small collections, and the slow obvious search that everything is compared with."""

from types import SimpleNamespace

import numpy as np
import pytest

import hasten.retrieve as hr
from hasten.retrieve.index.format import seed_arrays
from hasten.retrieve.index.heads import make_seeds
from hasten.retrieve.index.links import link_heads
from hasten.retrieve.index.metric import factors, mapped


def brute(rows, queries, metric, k, names=None):
    """(ids, distances) of the k nearest by float64 arithmetic."""
    x, q = np.asarray(rows, np.float64), np.asarray(queries, np.float64)
    if metric == "l2":
        distance = np.sqrt(((q[:, None] - x[None]) ** 2).sum(-1))
    elif metric == "cosine":
        length = np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(x, axis=1)
        distance = 1 - (q @ x.T) / np.maximum(length, 1e-30)
    else:
        distance = -(q @ x.T)
    order = np.argsort(distance, axis=1, kind="stable")[:, :k]
    found = np.take_along_axis(distance, order, 1)
    return (order if names is None else np.asarray(names)[order]), found


def same_answers(hit, rows, queries, metric, k, names=None, tolerance=1e-4):
    """Every answer is as near as the true one at its place, distances are right, and nothing comes twice; True, or the
    assertion that fails."""
    names = np.arange(len(rows)) if names is None else np.asarray(names)
    _, wanted = brute(rows, queries, metric, k)
    scale = max(1.0, float(np.abs(wanted).max()))
    np.testing.assert_allclose(hit.distances, wanted, atol=tolerance * scale)
    place = {int(n): i for i, n in enumerate(names)}
    for q, ids in enumerate(hit.ids):
        assert len(set(ids.tolist())) == len(ids)
        own = np.array([place[int(i)] for i in ids])
        _, again = brute(np.asarray(rows)[own], queries[q : q + 1], metric, len(ids))
        np.testing.assert_allclose(np.sort(again[0]), np.sort(wanted[q]), atol=tolerance * scale)
    return True


def link(heads, metric=0, degree=16, threads=1, alpha=1.0):
    """Factors, graph, seeds and the largest norm of heads that are linked in a random order."""
    largest = float(np.linalg.norm(heads, axis=1).max())
    extra = factors(heads, metric, largest)
    seeds = seed_arrays(heads, make_seeds(mapped(heads, metric, largest)))
    graph = np.full((len(heads), degree), -1, np.int32)
    order = np.random.default_rng(0).permutation(len(heads))
    link_heads(heads, extra, graph, seeds, metric, largest, order, alpha=alpha, threads=threads)
    return extra, graph, seeds, largest


@pytest.fixture(scope="session")
def linked():
    """:func:`link`, for tests."""
    return link


@pytest.fixture(scope="session")
def squares():
    """Squared distances of all pairs of rows, in float64."""
    return lambda left, right: ((left[:, None].astype(np.float64) - right[None]) ** 2).sum(-1)


@pytest.fixture(scope="session")
def twin():
    """The slow obvious search, and the comparison with it."""
    return SimpleNamespace(brute=brute, same=same_answers)


@pytest.fixture(scope="session")
def collection():
    """(rows, queries) float32: 2000 of width 12."""
    return hr.clustered(2000, 12, 40)


@pytest.fixture(scope="session")
def built(collection, tmp_path_factory):
    """A directory that tests copy or open read-only."""
    path = tmp_path_factory.mktemp("built") / "index"
    hr.Spann.build(collection[0], path, threads=2).close()
    return path


@pytest.fixture
def index(built, tmp_path):
    """An index of the collection that a test may change."""
    import shutil

    shutil.copytree(built, tmp_path / "index")
    with hr.Spann.open(tmp_path / "index") as opened:
        yield opened
