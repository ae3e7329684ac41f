"""The hot path of a search: a batch of queries, walked, read and scored.

One call works without the GIL, straight out of the memory map. A list with codes is sifted by them and only rows that
may be near are touched (see ``codes``); of one without, every row is scored. Byte rows are scored in whole numbers
where the query is whole. A row in several lists is offered once. While a query's lists are scored those of the next one
are asked for: walks run a group of queries ahead. Nothing here allocates.
"""

from __future__ import annotations

import numba
import numpy as np

from hasten.retrieve.index.blocks import scan_delta, scan_list
from hasten.retrieve.index.codes import score_picks, sift_list, span_of_codes, touch_codes
from hasten.retrieve.index.exact import scan_all
from hasten.retrieve.index.kernel import hot
from hasten.retrieve.index.offer import offer, row_value
from hasten.retrieve.index.plan import CHECKED, KEPT, PAGE, SIZE, WHOLE, fetch_heads, find, mapped_value, runs, settle
from hasten.retrieve.index.simd import address_of, prefetch
from hasten.retrieve.index.walk import LANES

__all__ = ["BYTES", "DISTANCES", "LISTS", "READS", "search"]

FIRST = 4096
"""bytes that are asked for of a list without codes"""
LISTS, READS, BYTES, DISTANCES = range(4)
"""columns of the statistics: lists read, contiguous reads, bytes of their pages, distances to heads and rows"""


@hot
def _offer_heads(head_state, metric, query, const, pool_d, pool_i, size, best_d, best_r, found, k, dead, mask):
    """The heads that the walk met are rows too."""
    heads, head_row = head_state[0], head_state[4]
    width = heads.shape[1]
    base = address_of(heads)
    for t in range(size):
        h = pool_i[t]
        value = pool_d[t]
        if metric == 2:
            value = row_value(heads, metric, query, const, width, base + h * width * heads.itemsize, value)
        if value < best_d[k - 1]:
            found = offer(best_d, best_r, found, k, value, head_row[h], dead, mask)
    return found


@hot
def _wanted(head_state, lists, metric, h):
    """(begin, end) of what a search reads first of a list: its codes, or the beginning of its rows."""
    addresses, counts, _, coded = lists
    heads = head_state[0]
    row_bytes = heads.shape[1] * heads.itemsize
    if coded:
        return span_of_codes(addresses[h], counts[h], row_bytes, metric, heads.shape[1] + (metric == 2))
    return addresses[h], addresses[h] + min(FIRST, counts[h] * row_bytes)


@hot
def _ask(head_state, lists, metric, h):
    """Ask for it."""
    begin, end = _wanted(head_state, lists, metric, h)
    for line in range(begin, end, 64):
        prefetch(line)


@hot
def _touch(head_state, lists, metric, pool_i, coming):
    """Look up where the lists of the first ``coming`` heads lie."""
    addresses, counts, _, coded = lists
    heads = head_state[0]
    for t in range(coming):
        h = pool_i[t]
        if coded:
            touch_codes(
                addresses[h], counts[h], heads.shape[1] * heads.itemsize, metric, heads.shape[1] + (metric == 2)
            )
        elif counts[h] > 0:
            prefetch(addresses[h])


@hot
def _all_of_list(head_state, lists, metric, query, const, h, best_d, best_r, found, k, dead, mask, work):
    """Offer one list at once, by its codes where it has some; returns how many answers there are."""
    heads = head_state[0]
    addresses, counts, _, coded = lists
    if coded == 0 or metric == 3:
        return scan_list(
            heads, metric, query, const, heads.shape[1], addresses[h], counts[h], best_d, best_r, found, k, dead, mask
        )
    found, waiting = sift_list(
        head_state,
        metric,
        query,
        const,
        h,
        addresses[h],
        counts[h],
        best_d,
        best_r,
        found,
        k,
        dead,
        mask,
        work,
        0,
        0,
        0,
    )
    return score_picks(heads, metric, query, const, work[2], 0, waiting, best_d, best_r, found, k, dead, mask)


@hot
def _under_mask(
    head_state,
    lists,
    metric,
    query,
    const,
    delta,
    size,
    filtered,
    knobs,
    scratch,
    slot,
    best_d,
    best_r,
    found,
    k,
    dead,
    mask,
):
    """Read lists until ``k`` rows pass the filter and the next head is too far; returns (found, lists, candidates)."""
    counts = lists[1]
    pool_d, pool_i, order = scratch[1][slot], scratch[2][slot], scratch[3][slot]
    stretch = numba.float32(knobs[1])
    read = candidates = 0
    for t in range(size):
        h = pool_i[t]
        enough = read >= knobs[0] and found == k
        if read >= filtered or (
            enough and pool_d[t] > stretch * max(mapped_value(metric, const, best_d[k - 1]), numba.float32(0.0))
        ):
            break
        if counts[h] > 0:
            order[read] = t
            read += 1
            candidates += counts[h]
            found = _all_of_list(
                head_state, lists, metric, query, const, h, best_d, best_r, found, k, dead, mask, scratch[8:]
            )
        if delta[3].shape[0] > 0:
            found = scan_delta(metric, query, const, h, delta, best_d, best_r, found, k, mask)
    return found, read, candidates


@hot
def _kept_lists(
    head_state, lists, metric, query, const, radius, scratch, slot, after, coming, best_d, best_r, found, k, dead, mask
):
    """Read the lists that the plan kept, and ask for ``coming`` of the next query, whose slot is ``after``.

    Picks of a list are scored after the next one was sifted, when they have arrived. Returns (found, lists,
    candidates).
    """
    addresses, counts, radii, coded = lists
    heads = head_state[0]
    pool_d, pool_i, order, ahead = scratch[1][slot], scratch[2][slot], scratch[3][slot], scratch[2][after]
    work = scratch[8:]
    picks = work[2]
    kept = scratch[5][slot, KEPT]
    read = candidates = waiting = 0
    for t in range(kept):
        place = order[t]
        h = pool_i[place]
        begin = end = 0
        if t < coming:
            begin, end = _wanted(head_state, lists, metric, ahead[t])
        if radius != 0 and found == k:
            edge = np.sqrt(max(pool_d[place], numba.float32(0.0))) - radii[h]
            if edge > 0 and edge * edge > mapped_value(metric, const, best_d[k - 1]):
                for line in range(begin, end, 64):
                    prefetch(line)
                continue
        order[read] = place
        read += 1
        candidates += counts[h]
        if coded == 0 or metric == 3:
            for line in range(begin, end, 64):
                prefetch(line)
            found = scan_list(
                heads,
                metric,
                query,
                const,
                heads.shape[1],
                addresses[h],
                counts[h],
                best_d,
                best_r,
                found,
                k,
                dead,
                mask,
            )
            continue
        before = waiting
        found, waiting = sift_list(
            head_state,
            metric,
            query,
            const,
            h,
            addresses[h],
            counts[h],
            best_d,
            best_r,
            found,
            k,
            dead,
            mask,
            work,
            waiting,
            begin,
            end,
        )
        if waiting >= before > 0:
            found = score_picks(heads, metric, query, const, picks, 0, before, best_d, best_r, found, k, dead, mask)
            for r in range(before, waiting):
                for column in range(3):
                    picks[r - before, column] = picks[r, column]
            waiting -= before
    found = score_picks(heads, metric, query, const, picks, 0, waiting, best_d, best_r, found, k, dead, mask)
    for t in range(kept, coming):
        _ask(head_state, lists, metric, ahead[t])
    return found, read, candidates


@hot
def _search_everything(queries, consts, metric, head_state, lists, delta, dead, mask, k, out_d, out_r, stats):
    for q in range(queries.shape[0]):
        query = address_of(queries[q])
        total = scan_all(metric, query, consts[q], head_state, lists, delta, out_d[q], out_r[q], k, dead, mask)
        count = head_state[0].shape[0]
        stats[q, LISTS], stats[q, DISTANCES] = count, count + total


@hot
def search(
    queries,
    consts,
    metric,
    head_state,
    lists,
    delta,
    dead,
    mask,
    knobs,
    filtered,
    k,
    scratch,
    out_d,
    out_r,
    stats,
    detail,
):
    """Search a batch: queries (count, lanes) float32 -> values ``out_d`` and rows ``out_r`` (count, k), ascending.

    ``lists`` is (addresses, counts, radii, whether they have codes). A negative number of lists scores everything.
    ``filtered`` lists are read at most under a ``mask``. ``stats`` (count, 4) int64, zeros.
    ``detail`` also counts reads and bytes. Slots without an answer hold inf and -1.
    """
    heads = head_state[0]
    row_bytes = heads.shape[1] * heads.itemsize
    pools_d, pools_i, orders, coded, notes = scratch[1], scratch[2], scratch[3], scratch[4], scratch[5]
    limit = knobs[0]
    out_d[:] = np.inf
    out_r[:] = -1
    if limit < 0:
        _search_everything(queries, consts, metric, head_state, lists, delta, dead, mask, k, out_d, out_r, stats)
        return
    count = queries.shape[0]
    if count > 0:
        find(head_state, metric, queries, 0, min(LANES, count), consts, knobs, scratch, 0)
        fetch_heads(head_state, scratch, 0)
        _touch(head_state, lists, metric, pools_i[0], min(limit, notes[0, SIZE]))
        for t in range(min(limit, notes[0, SIZE])):
            _ask(head_state, lists, metric, pools_i[0, t])
    for q in range(count):
        slot, after = q % (2 * LANES), (q + 1) % (2 * LANES)
        query, const = address_of(queries[q]), consts[q]
        best_d, best_r = out_d[q], out_r[q]
        settle(head_state, lists, metric, queries, q, const, knobs, scratch, slot)
        coming = 0
        if q + 1 < count:
            if (q + 1) % LANES == 0:  # the group is used up: the next one walks
                find(head_state, metric, queries, q + 1, min(LANES, count - q - 1), consts, knobs, scratch, after)
            coming = min(limit, notes[after, SIZE])
            fetch_heads(head_state, scratch, after)
            _touch(head_state, lists, metric, pools_i[after], coming)
        pool_d, pool_i, size = pools_d[slot], pools_i[slot], notes[slot, SIZE]
        found = _offer_heads(head_state, metric, query, const, pool_d, pool_i, size, best_d, best_r, 0, k, dead, mask)
        if mask.shape[0] > 0:
            found, read, candidates = _under_mask(
                head_state,
                lists,
                metric,
                query,
                const,
                delta,
                size,
                filtered,
                knobs,
                scratch,
                slot,
                best_d,
                best_r,
                found,
                k,
                dead,
                mask,
            )
        else:
            whole = notes[slot, WHOLE] != 0
            code, asked = (3, address_of(coded[slot])) if whole else (metric, query)
            found, read, candidates = _kept_lists(
                head_state,
                lists,
                code,
                asked,
                const,
                knobs[5],
                scratch,
                slot,
                after,
                coming,
                best_d,
                best_r,
                found,
                k,
                dead,
                mask,
            )
            if delta[3].shape[0] > 0:
                for t in range(min(size, max(limit, 1))):
                    found = scan_delta(metric, query, const, pool_i[t], delta, best_d, best_r, found, k, mask)
        stats[q, LISTS], stats[q, DISTANCES] = read, notes[slot, CHECKED] + candidates
        if detail:
            pages, stats[q, READS] = runs(lists, metric, row_bytes, pool_i, orders[slot], read, scratch[7])
            stats[q, BYTES] = pages * PAGE
