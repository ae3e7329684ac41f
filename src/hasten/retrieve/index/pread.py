"""Reading many rows of a file without the GIL and without mapping it."""

from __future__ import annotations

import numba
from numba import types

from hasten.retrieve.index.simd import address_of

__all__ = ["read_rows"]

_pread = types.ExternalFunction("pread", types.int64(types.int32, types.uintp, types.uintp, types.int64))


@numba.njit(nogil=True, cache=True)
def read_rows(descriptor, offsets, out):
    """Fill ``out`` (rows, bytes) uint8 from the offsets; rows that follow each other are one read. Returns what is
    missing.
    """
    size = out.shape[1]
    base = address_of(out)
    at = 0
    missing = 0
    while at < offsets.shape[0]:
        stop = at + 1
        while stop < offsets.shape[0] and offsets[stop] == offsets[stop - 1] + size:
            stop += 1
        done = 0
        wanted = (stop - at) * size
        while done < wanted:
            got = _pread(descriptor, base + at * size + done, wanted - done, offsets[at] + done)
            if got <= 0:
                missing += wanted - done
                break
            done += got
        at = stop
    return missing
