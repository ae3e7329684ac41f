"""Names beside points: none covers another, all stay inside, near ones stay near."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.measure import plots
from hasten.measure.labels import place

FRAME = (0.0, 0.0, 640.0, 300.0)


def boxes(corners: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([corners, corners + sizes], 1)


def covered(found: np.ndarray) -> int:
    """Pairs of boxes that overlap."""
    one, two = found[:, None], found[None]
    meets = (one[..., :2] < two[..., 2:]).all(-1) & (two[..., :2] < one[..., 2:]).all(-1)
    return int(np.triu(meets, 1).sum())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.sampled_from([1.0, 20.0, 200.0]))
def test_no_name_covers_another(seed: int, count: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    points = np.clip(np.array([200.0, 150.0]) + rng.normal(0, spread, (count, 2)), 5, [635, 295])
    sizes = np.stack([rng.uniform(20, 150, count), np.full(count, 12.0)], 1)
    corners = place(points, sizes, rng.uniform(0, 300, (20, 2)), points, FRAME)
    found = boxes(corners, sizes)
    assert covered(found) == 0
    assert (found[:, :2] >= -1e-9).all()
    assert (found[:, 2:] <= np.array(FRAME[2:]) + 1e-9).all()


def test_a_lonely_point_keeps_its_name_beside_it() -> None:
    points = np.array([[100.0, 100.0], [400.0, 200.0]])
    sizes = np.array([[60.0, 12.0]] * 2)
    found = boxes(place(points, sizes, np.zeros((0, 2)), points, FRAME), sizes)
    near = np.clip(points, found[:, :2], found[:, 2:]) - points
    assert np.hypot(*near.T).max() < 14


def test_a_name_keeps_off_markers_and_the_edge() -> None:
    point = np.array([[638.0, 298.0]])
    size = np.array([[80.0, 12.0]])
    crowd = np.array([[610.0, 285.0], [590.0, 290.0], [570.0, 280.0]])
    x0, y0 = place(point, size, crowd, point, FRAME)[0]
    assert x0 + 80 <= 640
    assert y0 + 12 <= 300
    for x, y in crowd:
        assert not (x0 < x < x0 + 80 and y0 < y < y0 + 12)


@pytest.mark.parametrize("count", [1, 9])
def test_the_frontier_writes_every_name_once(count: int) -> None:
    points = [(f"candidate {i}", 1e-3 + i * 1e-6, 0.99 + i * 1e-4) for i in range(count)] + [("worse", 3e-3, 0.9)]
    svg = plots.frontier(points, front=[p[0] for p in points[:count]], best=points[0][0])
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert [t for t in texts if t.startswith("candidate")] == [p[0] for p in points[:count]]
    assert "worse" not in texts
    assert svg == plots.frontier(points, front=[p[0] for p in points[:count]], best=points[0][0])
