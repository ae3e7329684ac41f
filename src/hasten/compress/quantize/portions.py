"""Disjoint random portions of a sequence of batches, of any nesting of tensors, without copying what is not drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hasten.errors import DataError

__all__ = ["portions", "rows_of"]


def rows_of(batch: Any) -> int:
    """Samples of a batch: the length that its tensors share; 0 where they share none."""
    lengths = {len(t) for t in pytree.tree_leaves(batch) if isinstance(t, Tensor) and t.dim()}
    return lengths.pop() if len(lengths) == 1 else 0


def _take(batch: Any, rows: Tensor) -> Any:
    return pytree.tree_map(lambda t: t[rows] if isinstance(t, Tensor) and t.dim() else t, batch)


def portions(batches: Sequence[Any], count: int, fraction: float, seed: int) -> list[list[Any]]:
    """``count`` disjoint portions of about ``fraction`` of all samples each; a portion is a list of batches.

    Samples are drawn from every batch. Batches whose tensors share no length are dealt out whole. Raises
    :class:`~hasten.errors.DataError` where there are fewer samples than portions.

    >>> parts = portions([torch.arange(10)], count=2, fraction=0.3, seed=0)
    >>> [len(p[0]) for p in parts], len({int(v) for p in parts for v in p[0]})
    ([3, 3], 6)
    """
    if not batches:
        raise DataError("there is no batch to draw portions from; give at least one")
    generator = torch.Generator().manual_seed(seed)
    sizes = [rows_of(b) for b in batches]
    if 0 in sizes:
        if len(batches) < count:
            raise DataError(f"{len(batches)} batches cannot be dealt into {count} portions; give {count} or more")
        order = torch.randperm(len(batches), generator=generator).tolist()
        each = max(1, int(fraction * len(batches)))
        return [[batches[i] for i in order[k * each : (k + 1) * each]] for k in range(count)]
    total = sum(sizes)
    each = max(1, int(fraction * total + 1e-9))
    if each * count > total:
        raise DataError(f"{total} samples cannot be cut into {count} portions; give more data or fewer portions")
    starts = torch.tensor([0, *sizes]).cumsum(0)
    result = []
    places = torch.randperm(total, generator=generator)
    for k in range(count):
        drawn = places[k * each : (k + 1) * each].sort().values
        pieces = []
        for index, batch in enumerate(batches):
            rows = drawn[(drawn >= starts[index]) & (drawn < starts[index + 1])] - starts[index]
            if len(rows):
                pieces.append(_take(batch, rows))
        result.append(_merged(pieces))
    return result


def _merged(pieces: list[Any], most: int = 1024) -> list[Any]:
    """The same samples in fewer batches, where their tensors agree but for the number of samples."""
    flat = [pytree.tree_flatten(p) for p in pieces]
    leaves, spec = flat[0]
    for others, other in flat[1:]:
        if other != spec or any(_kind(a) != _kind(b) for a, b in zip(leaves, others, strict=True)):
            return pieces
    if sum(map(rows_of, pieces)) > most:
        half = len(pieces) // 2
        return [*_merged(pieces[:half], most), *_merged(pieces[half:], most)] if half else pieces
    joined = [
        torch.cat(column) if isinstance(column[0], Tensor) and column[0].dim() else column[0]
        for column in zip(*(others for others, _ in flat), strict=True)
    ]
    return [pytree.tree_unflatten(joined, spec)]


def _kind(leaf: Any) -> Any:
    return (leaf.dtype, tuple(leaf.shape[1:])) if isinstance(leaf, Tensor) and leaf.dim() else leaf
