"""``hasten index``: build, search, change, check, tune and serve an index of vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["add", "bench", "build", "compact", "cost", "delete", "search", "serve", "snapshot", "tune", "verify"]

IndexPath = Annotated[Path, typer.Argument(help="Directory of the index.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Held = Annotated[str | None, typer.Option("--memory", help="What may be held, such as 8MiB; the rest is mapped.")]
Column = Annotated[
    str | None, typer.Option("--column", help="Vector column of a Parquet file, or dataset of an HDF5 file.")
]


def build(
    vectors: Annotated[Path, typer.Argument(help=".npy .fvecs .bvecs .fbin .u8bin .i8bin .hdf5 .parquet")],
    path: Annotated[Path, typer.Argument(help="New directory for the index.")],
    metric: Annotated[str, typer.Option("--metric", help="l2, cosine or ip.")] = "l2",
    head_ratio: Annotated[float, typer.Option("--head-ratio", help="Share of the rows that become heads.")] = 0.16,
    replicas: Annotated[int, typer.Option("--replicas", help="Most lists that hold a row.")] = 8,
    list_bytes: Annotated[str | None, typer.Option("--list-bytes", help="Size of a list, such as 48KiB.")] = None,
    memory: Annotated[str, typer.Option("--memory", help="What the build may take.")] = "1GiB",
    threads: Annotated[int, typer.Option("--threads", help="0: as many as there are cores.")] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of every random draw.")] = 0,
    column: Column = None,
    ids: Annotated[Path | None, typer.Option("--ids", help="Ids of the rows, a .npy file.")] = None,
    json: Json = False,
) -> None:
    """Build an index from a file of vectors."""
    from rich.console import Console

    from hasten.budget import format_quantity
    from hasten.cli.progress import stages
    from hasten.retrieve.index.build import BuildOptions
    from hasten.retrieve.index.build import build as run

    options = BuildOptions(
        metric=metric,
        head_ratio=head_ratio,
        replicas=replicas,
        list_bytes=list_bytes,
        memory=memory,
        threads=threads,
        seed=seed,
    )
    console = Console(stderr=True)
    names = None if ids is None else _array_in(ids, "--ids")
    with stages(console) as told:
        built = run(vectors, path, options, ids=names, column=column, progress=told)
    _print(
        built,
        json,
        f"{built['rows']} rows of {built['width']}: {built['heads']} heads, {built['replicas']:.2f} copies, lists of "
        f"{built['list_mean']:.1f} rows (spread {built['list_spread']:.2f}), "
        f"{format_quantity(built['postings_bytes'], 'bytes')}",
    )


def search(
    path: IndexPath,
    queries: Annotated[Path, typer.Argument(help="File of query vectors.")],
    k: Annotated[int, typer.Option("-k", help="Neighbours of each query.")] = 10,
    lists: Annotated[int | None, typer.Option("--lists", help="Most lists that are read.")] = None,
    epsilon: Annotated[float | None, typer.Option("--epsilon", help="Pruning: how much farther a head may be.")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Read everything.")] = False,
    where: Annotated[str | None, typer.Option("--where", help='JSON: ids, or such as {"year": {"min": 2020}}.')] = None,
    deadline: Annotated[str | None, typer.Option("--deadline", help="Per query, such as 5ms.")] = None,
    io: Annotated[str, typer.Option("--io", help="mmap, pread or direct.")] = "mmap",
    memory: Held = None,
    output: Annotated[Path | None, typer.Option("--output", help="Write ids and distances to this .npz file.")] = None,
    column: Column = None,
    json: Json = False,
) -> None:
    """Search an index."""
    import json as encoder

    from hasten.errors import InvalidRequestError
    from hasten.retrieve.index.sources import read_vectors
    from hasten.retrieve.index.spann import Spann

    try:
        condition = encoder.loads(where) if where else None
    except ValueError as error:
        raise InvalidRequestError(f"--where is {where!r}, which is not JSON ({error})", "where") from error
    with Spann.open(path, io=io, memory=memory, read_only=True) as index:
        chosen: Any = None if exact else lists if lists is not None else "default"
        hit = index.search(
            read_vectors(queries, column), k, lists=chosen, epsilon=epsilon, where=condition, deadline=deadline
        )
    if output is not None:
        _write_npz(output, ids=hit.ids, distances=hit.distances)
    value = {"ids": hit.ids.tolist(), "distances": hit.distances.tolist(), "stats": hit.stats.mean()}
    lines = "\n".join(" ".join(str(i) for i in row) for row in hit.ids.tolist())
    _print(_finite(value), json, lines)


def add(
    path: IndexPath,
    vectors: Annotated[Path, typer.Argument(help="File of new vectors.")],
    ids: Annotated[Path | None, typer.Option("--ids", help="Their ids, a .npy file; else the next free ones.")] = None,
    upsert: Annotated[bool, typer.Option("--upsert", help="Replace ids that exist.")] = False,
    column: Column = None,
    json: Json = False,
) -> None:
    """Add vectors; they are durable when this returns."""
    import numpy as np

    from hasten.retrieve.index.sources import read_vectors
    from hasten.retrieve.index.spann import Spann

    rows = read_vectors(vectors, column)
    with Spann.open(path) as index:
        if ids is not None:
            names = _array_in(ids, "--ids")
        else:
            known = index._generation.ids
            first = max(
                int(known.max()) + 1 if known is not None and len(known) else index._generation.manifest.rows,
                max(index._delta.place, default=-1) + 1,
            )
            names = np.arange(first, first + len(rows))
        (index.upsert if upsert else index.add)(names, rows)
        value = {"added": len(rows), "rows": len(index)}
    _print(value, json, f"added {value['added']} rows, there are {value['rows']}")


def delete(
    path: IndexPath, ids: Annotated[list[int], typer.Argument(help="Ids to delete.")], json: Json = False
) -> None:
    """Delete rows by id."""
    from hasten.retrieve.index.spann import Spann

    with Spann.open(path) as index:
        value = {"deleted": index.delete(ids), "rows": len(index)}
    _print(value, json, f"deleted {value['deleted']} rows, there are {value['rows']}")


def compact(
    path: IndexPath,
    rate: Annotated[str | None, typer.Option("--rate", help="Most bytes per second, such as 50MB.")] = None,
    everything: Annotated[bool, typer.Option("--everything", help="Write all lists again.")] = False,
    json: Json = False,
) -> None:
    """Merge additions and deletions into a new generation."""
    from hasten.retrieve.index.spann import Spann

    with Spann.open(path) as index:
        value = index.compact(rate=rate, everything=everything)
    _print(value, json, ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in value.items()))


def verify(
    path: IndexPath,
    repair: Annotated[bool, typer.Option("--repair", help="Empty corrupt lists and restore their rows.")] = False,
    vectors: Annotated[Path | None, typer.Option("--vectors", help="The raw vectors, for --repair.")] = None,
    json: Json = False,
) -> None:
    """Read everything and check it; ends with status 1 if something is wrong."""
    from hasten.retrieve.index.spann import Spann

    with Spann.open(path, read_only=not repair) as index:
        value: dict[str, Any] = {}
        if repair:
            value["repair"] = index.repair(vectors)
        found = index.verify()
    value |= found.to_json()
    state = "good" if found.good else "NOT good"
    _print(
        value,
        json,
        f"{state}: {found.rows} rows, {found.lists} lists, {len(found.corrupt)} corrupt, "
        f"{found.num_missing} rows missing" + "".join(f"\n{p}" for p in found.problems),
    )
    if not found.good:
        raise typer.Exit(1)


def snapshot(
    path: IndexPath, target: Annotated[str, typer.Argument(help="New directory, or - for a tar stream.")]
) -> None:
    """Copy the present state to a directory, or as a tar stream to standard output."""
    import sys

    from hasten.retrieve.index.spann import Spann

    with Spann.open(path, read_only=True) as index:
        index.snapshot(sys.stdout.buffer if target == "-" else target)


def bench(
    path: IndexPath,
    queries: Annotated[Path, typer.Argument(help="File of query vectors.")],
    truth: Annotated[
        Path | None, typer.Option("--truth", help="True ids (.ivecs, .npy, .hdf5); else computed.")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Neighbours of each query.")] = 10,
    lists: Annotated[str, typer.Option("--lists", help="Points of the curve.")] = "1,2,4,8,16,32,64",
    io: Annotated[str, typer.Option("--io", help="mmap, pread or direct.")] = "mmap",
    memory: Held = None,
    column: Column = None,
    json: Json = False,
) -> None:
    """Recall, queries per second, and what a query reads, along a curve."""
    from rich.console import Console
    from rich.table import Table

    from hasten.budget import format_quantity
    from hasten.errors import ConfigurationError
    from hasten.measure.machine import Machine
    from hasten.retrieve.index.hit import SearchOptions
    from hasten.retrieve.index.sources import read_vectors
    from hasten.retrieve.index.spann import Spann
    from hasten.retrieve.index.tune import measure_point

    try:
        ladder = [int(x) for x in lists.split(",")]
    except ValueError as error:
        raise ConfigurationError(f"--lists is {lists!r}; give numbers with commas, such as 4,8,16") from error
    rows = read_vectors(queries, column)
    with Spann.open(path, io=io, memory=memory, read_only=True) as index:
        known = _truth_in(truth)[:, :k] if truth is not None else index.exact(rows, k).ids
        points = [measure_point(index, rows, known, k, SearchOptions(lists=m, epsilon=1e15)) for m in ladder]
        held = index.memory()
    value = {"machine": Machine.detect().to_json(), "memory": held, "io": io, "points": [p.to_json() for p in points]}
    if json:
        _print(value, True, "")
        return
    table = Table("lists", "recall", "QPS, one thread", "time", "reads", "bytes", "distances", title=f"{path} ({io})")
    for p in points:
        table.add_row(
            f"{p.lists:.1f}",
            f"{p.recall:.4f}",
            f"{1 / p.seconds:.0f}",
            format_quantity(p.seconds, "time"),
            f"{p.reads:.1f}",
            format_quantity(p.bytes, "bytes"),
            f"{p.distances:.0f}",
        )
    Console().print(table)
    print(f"{format_quantity(held['total'], 'bytes')} in memory")


def tune(
    path: IndexPath,
    queries: Annotated[Path, typer.Argument(help="File of query vectors, at least 20.")],
    recall: Annotated[
        float | None, typer.Option("--recall", help="Such as 0.95: the cheapest knobs that reach it.")
    ] = None,
    p99: Annotated[str | None, typer.Option("--p99", help="Such as 5ms: the best recall within it.")] = None,
    truth: Annotated[
        Path | None, typer.Option("--truth", help="True ids (.ivecs, .npy, .hdf5); else computed.")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Neighbours of each query.")] = 10,
    save: Annotated[bool, typer.Option("--save", help="Make the result the index's default.")] = False,
    column: Column = None,
    json: Json = False,
) -> None:
    """Choose the knobs of a search by measuring."""
    from hasten.retrieve.index.sources import read_vectors
    from hasten.retrieve.index.spann import Spann

    known = _truth_in(truth) if truth is not None else None
    with Spann.open(path, read_only=not save) as index:
        tuned = index.tune(read_vectors(queries, column), known, recall=recall, p99=p99, k=k)
        if save:
            index.save_options(tuned.options)
    _print(tuned.to_json(), json, str(tuned))


def cost(
    n: Annotated[float, typer.Argument(help="Rows, such as 1e9.")],
    path: Annotated[Path | None, typer.Option("--index", help="Fit to parts of this index.")] = None,
    d: Annotated[int, typer.Option("-d", help="Width, without --index.")] = 128,
    b: Annotated[int, typer.Option("-b", help="Bytes of an element, without --index.")] = 1,
    ratio: Annotated[float, typer.Option("--head-ratio", help="Share of heads, without --index.")] = 0.12,
    recall: Annotated[float, typer.Option("--recall", help="Recall that the fit is for.")] = 0.95,
    json: Json = False,
) -> None:
    """What an index of so many rows takes, with the error of the fit."""
    from hasten.retrieve.index.cost_model import cost as model
    from hasten.retrieve.index.cost_model import cost_of_index
    from hasten.retrieve.index.spann import Spann

    if path is None:
        told = model(int(n), d, b, ratio)
    else:
        with Spann.open(path, read_only=True) as index:
            told = cost_of_index(index, int(n), recall=recall)
    _print(_finite(told.to_json()), json, str(told))


def serve(
    path: IndexPath,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port to listen on.")] = 8000,
    threads: Annotated[int, typer.Option("--threads", help="Threads of a batch.")] = 1,
    max_batch: Annotated[int, typer.Option("--max-batch", help="Most queries of a batch.")] = 256,
    io: Annotated[str, typer.Option("--io", help="mmap, pread or direct.")] = "mmap",
    memory: Held = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Refuse changes.")] = False,
    auto_compact: Annotated[
        int | None, typer.Option("--auto-compact", help="Compact after so many added rows.")
    ] = 50_000,
) -> None:
    """Serve an index over HTTP."""
    from rich.console import Console

    from hasten.retrieve.index.service import serve as run
    from hasten.retrieve.index.spann import Spann

    index = Spann.open(path, io=io, memory=memory, read_only=read_only, auto_compact=auto_compact)
    Console(stderr=True).print(f"{len(index)} rows of {index.width} ({index.metric}) on http://{host}:{port}")
    run(index, host, port, threads=threads, max_batch=max_batch)


def _array_in(path: Path, name: str) -> Any:
    """The array of a .npy file that an option names; raises DataError with one line."""
    import numpy as np

    from hasten.errors import DataError

    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{name} is {str(path)!r}, which is no .npy file ({error}); numpy.save writes one") from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{name} is {str(path)!r}, which holds several arrays; give a .npy file with one")
    return array


def _truth_in(path: Path) -> Any:
    """True ids (queries, k) of a file; an HDF5 file of ann-benchmarks has them under ``neighbors``."""
    from hasten.retrieve.index.sources import read_vectors

    return read_vectors(path, "neighbors" if path.suffix.lower() in (".hdf5", ".h5") else None)


def _write_npz(path: Path, **arrays: Any) -> None:
    """Arrays as one .npz file, written beside its place and moved there."""
    import io

    import numpy as np

    from hasten.retrieve.index.io import DiskFolder

    data = io.BytesIO()
    np.savez(data, **arrays)
    folder = DiskFolder(path.parent, make=True)
    writer = folder.create(f".{path.name}.part")
    writer.write(data.getbuffer())
    writer.sync()
    writer.close()
    folder.rename(f".{path.name}.part", path.name)


def _print(value: Any, as_json: bool, text: str) -> None:
    import json

    print(json.dumps(value, ensure_ascii=False, default=str) if as_json else text)


def _finite(value: Any) -> Any:
    """JSON has no infinity and no nan."""
    import math

    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
