"""Recall within a memory, and speed beside other indices where they are installed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from hasten.errors import HastenError
from hasten.measure.stats import paired_ratio, percentile
from hasten.retrieve.index.hit import SearchOptions
from hasten.retrieve.index.spann import Spann
from hasten.retrieve.index.tune import recall_of
from hasten.studies._spann_bench import WIDE, Bench
from hasten.studies.study import Check

__all__ = ["curves"]


def curves(bench: Bench) -> Iterator[Check]:
    """Recall within memory, and speed beside other indices where they are installed."""
    index = bench.index("served", head_ratio=0.16)
    best: tuple[float, SearchOptions, float] | None = None
    for beam in (16, 24, 32, 48, 64):
        for lists in (4, 6, 8, 10, 12, 16, 24, 32):
            if lists > beam:
                continue
            options = SearchOptions(lists=lists, beam=beam, epsilon=WIDE)
            recall = recall_of(index.search(bench.queries, 10, options=options, detail=False).ids, bench.truth)
            if recall >= 0.96:
                seconds = _batch(bench, index, options)
                if best is None or seconds < best[0]:
                    best = (seconds, options, recall)
                break
    if best is None:
        yield Check.at_least("curve: recall@10 that is reached", 0.0, 0.96, "", "no knob of the ladder reached it")
        return
    seconds, options, recall = best
    told = index.search(bench.queries, 10, options=options).stats.mean()
    singles = []
    for query in bench.queries:
        begin = bench.clock.now()
        index.search(query, 10, options=options, detail=False)
        singles.append(bench.clock.now() - begin)
    p50, p99 = percentile(singles, 50).value, percentile(singles, 99).value
    note = (
        f"{options.lists} lists, beam {options.beam}: {1 / seconds:.0f} queries/s on one thread, "
        f"single p50 {p50 * 1e6:.0f} µs, "
        f"p99 {p99 * 1e6:.0f} µs; {told['reads']:.1f} reads, "
        f"{told['bytes'] / 1024:.0f} KiB, {told['distances']:.0f} distances"
    )
    yield Check.at_least("curve: recall@10 that is reached", recall, 0.96, "", note)
    links = (bench.rows.nbytes + len(bench.rows) * (4 * 33 + 8)) / 1.0  # rows, 32 links and their count, a label
    share = index.memory()["total"] / links
    note = f"{index.memory()['total'] / 2**20:.1f} MiB of heads, graph, seeds and directory; "
    note += f"HNSW with M = 16 keeps {links / 2**20:.0f} MiB"
    yield Check.at_most("memory over that of HNSW (rows and links, M = 16)", share, 0.25, "×", note)
    yield from _beside_hnswlib(bench, index, options, recall)
    yield from _beside_faiss(bench, index, options, recall)
    yield from _cold(bench, options)


def _batch(bench: Bench, index: Spann, options: SearchOptions, rounds: int = 3) -> float:
    best = float("inf")
    for _ in range(rounds):
        begin = bench.clock.now()
        index.search(bench.queries, 10, options=options, threads=1, detail=False)
        best = min(best, bench.clock.now() - begin)
    return best / len(bench.queries)


def _turns(bench: Bench, ours: Any, peer: Any, rounds: int = 7) -> tuple[list[float], list[float]]:
    """Seconds of batches in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            begin = bench.clock.now()
            (ours, peer)[side]()
            times[side].append(bench.clock.now() - begin)
    return times


def _beside_hnswlib(bench: Bench, index: Spann, options: SearchOptions, recall: float) -> Iterator[Check]:
    name = "queries per second over hnswlib, one thread, recall ≥ 0.96"
    try:
        import hnswlib
    except ImportError:
        yield Check.unavailable(
            name, "hnswlib is not installed here; benchmarks/vector_search.py compares", "×", "≥ 0.2"
        )
        return
    peer = hnswlib.Index("l2", bench.rows.shape[1])
    peer.init_index(len(bench.rows), M=16, ef_construction=200)
    peer.add_items(bench.rows)
    for ef in (10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 256):
        peer.set_ef(ef)
        other = recall_of(peer.knn_query(bench.queries, 10, num_threads=1)[0].astype(np.int64), bench.truth)
        if other >= 0.96:
            break
    ours, theirs = _turns(
        bench,
        lambda: index.search(bench.queries, 10, options=options, threads=1, detail=False),
        lambda: peer.knn_query(bench.queries, 10, num_threads=1),
    )
    ratio = paired_ratio(theirs, ours)
    note = f"ours recall {recall:.3f}, hnswlib ef {ef} recall {other:.3f}; "
    note += f"95 % CI {ratio.low:.2f} to {ratio.high:.2f}; the aim is 0.4"
    yield Check.at_least(name, ratio.value, 0.2, "×", note)


def _beside_faiss(bench: Bench, index: Spann, options: SearchOptions, recall: float) -> Iterator[Check]:
    name = "p50 of single queries over faiss's mapped IVF-Flat, recall ≥ 0.96"
    try:
        import faiss
    except ImportError:
        yield Check.unavailable(name, "faiss is not installed here; benchmarks/vector_search.py compares", "×", "< 1")
        return
    faiss.omp_set_num_threads(2)
    width = bench.rows.shape[1]
    quantizer = faiss.IndexFlatL2(width)
    made = faiss.IndexIVFFlat(quantizer, width, int(4 * np.sqrt(len(bench.rows))))
    made.train(bench.rows)
    made.add(bench.rows)
    faiss.write_index(made, str(bench.folder / "faiss.bin"))
    faiss.omp_set_num_threads(1)
    peer = faiss.read_index(str(bench.folder / "faiss.bin"), faiss.IO_FLAG_MMAP)
    for probes in (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256):
        peer.nprobe = probes
        other = recall_of(peer.search(bench.queries, 10)[1], bench.truth)
        if other >= 0.96:
            break
    ours, theirs = [], []
    for query in bench.queries:
        begin = bench.clock.now()
        index.search(query, 10, options=options, detail=False)
        middle = bench.clock.now()
        peer.search(query[None], 10)
        ours.append(middle - begin)
        theirs.append(bench.clock.now() - middle)
    p50, other50 = percentile(ours, 50).value, percentile(theirs, 50).value
    note = f"ours {p50 * 1e6:.0f} µs at {recall:.3f}, faiss {other50 * 1e6:.0f} µs at {other:.3f} with {probes} probes"
    yield Check.at_most(name, p50 / other50, 1.0, "×", note)


def _cold(bench: Bench, options: SearchOptions) -> Iterator[Check]:
    """The same queries past the page cache; reported, since the disk decides."""
    try:
        with Spann.open(bench.folder / "served", io="direct", read_only=True) as index:
            times = []
            for query in bench.queries[:100]:
                begin = bench.clock.now()
                hit = index.search(query, 10, options=options)
                times.append(bench.clock.now() - begin)
            agree = bool((hit.ids == bench.built["served"].search(query, 10, options=options).ids).all())
    except (OSError, HastenError) as error:
        yield Check.unavailable("cold reads give the answers of warm ones", f"no O_DIRECT here: {error}")
        return
    p50, p99 = percentile(times, 50).value, percentile(times, 99).value
    note = f"O_DIRECT, single queries: p50 {p50 * 1e6:.0f} µs, p99 {p99 * 1e6:.0f} µs, "
    note += f"{hit.stats.reads[0]} reads of {hit.stats.bytes[0]} bytes"
    yield Check.equal("cold reads give the answers of warm ones", int(agree), 1, "", note)
