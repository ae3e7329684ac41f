"""Packing posting lists: (head, row, distance) triples to page-aligned blocks with checksums."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from hasten.retrieve.index.codes import code_bytes, encode
from hasten.retrieve.index.format import DIRECTORY, SLOT_BITS, Generation, bytes_of_list, checksum
from hasten.retrieve.index.gather import plain
from hasten.retrieve.index.io import PAGE, Writer
from hasten.retrieve.index.metric import COSINE, INNER, factors, mapped, native

__all__ = ["PAIR", "ListShape", "ListWriter", "centres_of", "empty_directory", "shape_of", "sort_pairs", "writing"]

PAIR = np.dtype([("head", "<i4"), ("distance", "<f4"), ("row", "<i8")])
"""one copy of a row: the list it goes to and its squared distance to the head"""

Centres = Callable[[Any], NDArray[np.float32]]
"""(heads,) numbers -> their vectors (heads, width)"""

njit = numba.njit(nogil=True, cache=True)


def sort_pairs(pairs: NDArray[Any]) -> NDArray[Any]:
    """By head, then by distance, then by row, so that the result does not depend on who found them first."""
    return pairs[np.lexsort((pairs["row"], pairs["distance"], pairs["head"]))]


@njit
def _pack(rows, extra, numbers, begins, offsets, row_bytes, metric, out):
    """Lay lists out in ``out``: rows, factors (cosine), row numbers; ``rows`` (total, row_bytes) uint8."""
    for j in range(begins.shape[0] - 1):
        at = offsets[j]
        first, last = begins[j], begins[j + 1]
        for r in range(first, last):
            out[at : at + row_bytes] = rows[r]
            at += row_bytes
        if metric == 1:
            at = (at + 3) & ~3
            for r in range(first, last):
                out[at : at + 4] = extra[r : r + 1].view(np.uint8)
                at += 4
        at = (at + 7) & ~7
        for r in range(first, last):
            out[at : at + 8] = numbers[r : r + 1].view(np.uint8)
            at += 8


@dataclass(frozen=True)
class ListShape:
    """What the rows of all lists have in common."""

    metric: int
    largest: float
    width: int
    itemsize: int


def shape_of(generation: Generation) -> ListShape:
    """That of a generation's lists."""
    g, m = generation, generation.manifest
    return ListShape(g.metric, m.largest, m.width, g.heads.itemsize)


def centres_of(generation: Generation, heads: NDArray[Any]) -> Centres | None:
    """``heads`` by number in the mapped space, where the lists of a generation have byte codes."""
    g, m = generation, generation.manifest
    return (lambda which: mapped(plain(heads[which], m.dtype), g.metric, m.largest)) if m.coded else None


@dataclass
class ListWriter:
    """Writes lists to one segment file, fills the directory and notes where each row lies."""

    writer: Writer
    segment: int
    directory: NDArray[Any]
    """(H,) records to fill"""
    location: NDArray[np.int64]
    """(rows,) written for every row of a list; the first copy written stays"""
    shape: ListShape
    centres: Centres | None = None
    """heads by number in the mapped space: lists get byte codes; None: they get none"""
    batch_bytes: int = 1 << 25
    offset: int = 0

    def write(
        self, heads: NDArray[Any], counts: NDArray[Any], pairs: NDArray[Any], take: Callable[[Any], NDArray[Any]]
    ) -> None:
        """Write the lists of ``heads``, whose sorted ``pairs`` follow each other with ``counts`` each.

        ``take(rows)`` gives the vectors of row numbers. Memory stays near ``batch_bytes`` at a time.
        """
        row_bytes = self.shape.width * self.shape.itemsize
        begins = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        plain_sizes = bytes_of_list(counts.astype(np.int64), row_bytes, self.shape.metric)
        sizes = plain_sizes
        if self.centres is not None:
            space = self.shape.width + (self.shape.metric == INNER)
            blocks = np.array([code_bytes(int(c), space) for c in np.unique(counts)], np.int64)
            codes = blocks[np.searchsorted(np.unique(counts), counts)] if len(counts) else blocks
            sizes = -(-plain_sizes // 64) * 64 + codes
        padded = -(-sizes // PAGE) * PAGE
        ends = np.cumsum(padded)
        at = 0
        while at < len(heads):
            base = int(ends[at - 1]) if at else 0
            stop = max(at + 1, int(np.searchsorted(ends, base + self.batch_bytes, "right")))
            low, high = int(begins[at]), int(begins[stop])
            numbers = np.ascontiguousarray(pairs["row"][low:high])
            unique, where = np.unique(numbers, return_inverse=True)
            taken = take(unique) if high > low else np.empty((0, self.shape.width), np.uint8)
            vectors = native(taken)[where]
            extra = np.zeros(0, np.float32)
            if self.shape.metric == COSINE and high > low:
                extra = factors(taken, COSINE, self.shape.largest)[where]
            offsets = (ends[at:stop] - padded[at:stop] - base).astype(np.int64)
            out = np.zeros(int(ends[stop - 1]) - base, np.uint8)
            if high > low:
                raw = np.ascontiguousarray(vectors).view(np.uint8).reshape(high - low, row_bytes)
                _pack(raw, extra, numbers, begins[at : stop + 1] - low, offsets, row_bytes, self.shape.metric, out)
                if self.centres is not None:
                    behind = offsets + -(-plain_sizes[at:stop] // 64) * 64
                    flat = mapped(taken, self.shape.metric, self.shape.largest)[where]
                    encode(flat, self.centres(heads[at:stop]), begins[at : stop + 1] - low, behind, out)
            self._describe(heads[at:stop], counts[at:stop], sizes[at:stop], offsets, pairs, begins[at : stop + 1], out)
            slots = np.arange(low, high) - np.repeat(begins[at:stop], counts[at:stop])
            places = (np.repeat(heads[at:stop].astype(np.int64), counts[at:stop]) << SLOT_BITS) | slots
            fresh = self.location[numbers] < 0
            self.location[numbers[fresh][::-1]] = places[fresh][::-1]
            self.writer.write(out.data)
            self.offset += len(out)
            at = stop

    def _describe(
        self, heads: Any, counts: Any, sizes: Any, offsets: Any, pairs: Any, begins: Any, out: NDArray[np.uint8]
    ) -> None:
        entry = self.directory
        entry["offset"][heads] = offsets + self.offset
        entry["count"][heads] = counts
        entry["bytes"][heads] = sizes * (counts > 0)
        entry["segment"][heads] = self.segment
        last = np.maximum(begins[1:] - 1, 0)
        far = pairs["distance"][last] if len(pairs) else np.zeros(len(heads), np.float32)
        entry["radius"][heads] = np.where(counts > 0, np.sqrt(np.maximum(far, 0)), 0)
        for head, offset, size in zip(
            heads, offsets, sizes, strict=True
        ):  # one checksum per list; the bytes are hashed in C
            entry["crc32"][head] = checksum(out[offset : offset + size])


@contextmanager
def writing(
    writer: Writer,
    segment: int,
    directory: NDArray[Any],
    location: NDArray[np.int64],
    shape: ListShape,
    centres: Centres | None,
    batch_bytes: int = 1 << 25,
) -> Iterator[ListWriter]:
    """A new segment file: synced when its lists are written, closed in any case."""
    try:
        lists = ListWriter(writer, segment, directory, location, shape, centres, batch_bytes)
        yield lists
        writer.sync()
    finally:
        writer.close()


def empty_directory(count: int) -> NDArray[Any]:
    """A directory of ``count`` empty lists."""
    return np.zeros(count, DIRECTORY)
