"""Names beside points, placed so that they can be read.

Around each point lie places in rings; each costs its distance, and far more what it would cover: other names, markers,
the curve, the edge of the plot. The names of crowded points are placed last and pick the cheapest place left; a name
away from its point gets a thin line to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["place", "write_labels"]

_Array = np.ndarray[Any, Any]
_ANGLES = np.arange(24) * (2 * np.pi / 24) + np.pi / 4
_RADII = np.array([7.0, 12, 18, 26, 36, 48, 62, 78, 96, 116, 140, 168, 200, 240, 290, 350])
_NEAR = 14.0
"""pixels: up to here a name needs no line to its point"""
_NAME, _EDGE, _MARKER, _CURVE = 1e5, 1e5, 400.0, 60.0
"""what covering a name, leaving the plot, or covering a marker or a step of the curve costs, in pixels of distance"""


def _boxes(point: _Array, size: _Array) -> tuple[_Array, _Array]:
    """Places for a name of ``size`` (width, height) around ``point``: boxes (n, 4) as x0, y0, x1, y1; distances (n,).

    The middle of the side (or the corner) that looks at the point lies on the ring.
    """
    unit = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], 1)
    at = point + (_RADII[:, None, None] * unit).reshape(-1, 2)
    lean = np.tile(np.clip((1 - unit * 1.35) / 2, 0, 1), (len(_RADII), 1))  # share of the box before the ring
    low = at - lean * size
    return np.concatenate([low, low + size], 1), np.repeat(_RADII, len(_ANGLES))


def _overlaps(boxes: _Array, others: _Array) -> _Array:
    """How many of ``others`` (m, 4) each box (n, 4) meets: (n,)."""
    if not len(others):
        return np.zeros(len(boxes))
    one, two = boxes[:, None], others[None]
    meets = (one[..., :2] < two[..., 2:]).all(-1) & (two[..., :2] < one[..., 2:]).all(-1)
    return np.asarray(meets.sum(1), dtype=float)


def _around(points: _Array, half: float) -> _Array:
    return np.concatenate([points - half, points + half], 1)


def _samples(starts: _Array, ends: _Array, step: float) -> _Array:
    """Points along straight lines (n, 2) to (n, 2), no further apart than ``step``: (m, 2)."""
    parts = [np.linspace(a, b, max(2, int(np.hypot(*(b - a)) / step) + 1)) for a, b in zip(starts, ends, strict=True)]
    return np.concatenate(parts) if parts else np.zeros((0, 2))


def place(
    points: _Array, sizes: _Array, markers: _Array, curve: _Array, frame: tuple[float, float, float, float]
) -> _Array:
    """Lower left corners of the names' boxes, in pixels: (n, 2).

    points (n, 2) with names of sizes (n, 2); markers (m, 2) and the corners of a curve (k, 2) are better not covered;
    names stay in ``frame`` (x0, y0, x1, y1) where they fit at all.

    >>> none = np.zeros((0, 2))
    >>> x, y = place(np.array([[50.0, 50.0]]), np.array([[20.0, 8.0]]), none, none, (0, 0, 99, 99))[0]
    >>> bool(max(abs(x - 50), abs(y - 50)) < 30)
    True
    """
    spots = _around(np.concatenate([points, markers]), 4.5)
    drawn = _around(_samples(curve[:-1], curve[1:], 5.0), 1.5)
    gaps = np.hypot(*(points[:, None] - points[None]).transpose(2, 0, 1)) + np.eye(len(points)) * 1e9
    taken = np.zeros((0, 4))
    ways = np.zeros((0, 4))
    result = np.zeros_like(points)
    for index in np.argsort(-gaps.min(1), kind="stable"):
        boxes, distance = _boxes(points[index], sizes[index])
        cost = distance + _NAME * _overlaps(boxes, taken) + _MARKER * _overlaps(boxes, spots)
        cost += _CURVE * _overlaps(boxes, drawn) + 2 * _CURVE * _overlaps(boxes, ways)
        outside = np.clip(np.array(frame[:2]) - boxes[:, :2], 0, None) + np.clip(boxes[:, 2:] - frame[2:], 0, None)
        cost += _EDGE * (outside.sum(1) > 0) + outside.sum(1)
        middle = np.clip(points[index], boxes[:, :2], boxes[:, 2:])  # where the line to the point would end
        for number in np.argsort(cost)[:24]:  # lines across names already there, for the best places only
            if distance[number] > _NEAR and len(taken):
                way = _around(_samples(points[index][None], middle[number][None], 4.0), 0.5)
                cost[number] += 3 * _MARKER * float(_overlaps(way, taken).sum() > 0)
        best = int(cost.argmin())
        taken = np.concatenate([taken, boxes[best : best + 1]])
        if distance[best] > _NEAR:
            ways = np.concatenate([ways, _around(_samples(points[index][None], middle[best][None], 4.0), 0.5)])
        result[index] = boxes[best, :2]
    return result


def write_labels(
    axes: Axes,
    named: Sequence[tuple[str, float, float]],
    others: Sequence[tuple[float, float]],
    *,
    colour: str,
    size: float = 8.0,
) -> None:
    """Write the names of points (name, x, y), joined in that order by a curve, among markers at ``others``.

    All else has to be drawn before, since the places depend on where the axes end up.
    """
    figure: Any = axes.figure
    texts = [axes.annotate(n, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=size) for n, x, y in named]
    for text in texts:
        text.set_in_layout(False)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in texts]
    sizes = np.array([[box.width + 4, box.height + 1] for box in boxes])
    to_pixels = axes.transData.transform
    at = np.asarray(to_pixels([(x, y) for _, x, y in named]), dtype=float)
    rest = np.asarray(to_pixels(list(others)), dtype=float) if others else np.zeros((0, 2))
    frame = axes.get_window_extent()
    corners = place(at, sizes, rest, at, (frame.x0, frame.y0, frame.x1, frame.y1))
    points_per_pixel = 72 / figure.dpi
    for text, (name, x, y), point, corner, extent in zip(texts, named, at, corners, sizes, strict=True):
        text.remove()
        end = np.clip(point, corner, corner + extent)
        far = float(np.hypot(*(end - point))) > _NEAR
        offset = (corner + [2, 0.5] - point) * points_per_pixel
        written = axes.annotate(
            name, (x, y), xytext=(float(offset[0]), float(offset[1])), textcoords="offset points", fontsize=size,
            color=colour, annotation_clip=False,
        )  # fmt: skip
        written.set_in_layout(False)
        if far:
            line = axes.transData.inverted().transform([point, end])
            axes.plot(line[:, 0], line[:, 1], "-", color=colour, alpha=0.45, linewidth=0.6, scalex=False, scaley=False)
