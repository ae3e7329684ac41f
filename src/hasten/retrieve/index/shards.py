"""One collection on many machines: parts by the same balanced partition, dispatch by the same pruning.

The collection is cut into more parts than machines (balanced clustering; rows on a border are kept in both parts),
each part is an index of its own, and parts are packed onto machines by load (best fit, heaviest first). A query goes
to the parts whose centre is at most (1 + epsilon) times as far as the nearest one. A machine that is lost is reported
and the answer marked incomplete. Machines are threads of this process, or Ray actors (``hasten[ray]``); nothing here
needs Ray otherwise.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ConfigurationError, DataError, InvalidRequestError, MissingExtraError
from hasten.retrieve.index.build import BuildOptions, build
from hasten.retrieve.index.cluster import cluster, workspace
from hasten.retrieve.index.format import put
from hasten.retrieve.index.hit import SearchOptions
from hasten.retrieve.index.inputs import check_ids
from hasten.retrieve.index.io import DiskFolder
from hasten.retrieve.index.metric import INNER, check_rows, code_of, mapped, query_scale
from hasten.retrieve.index.query import check_queries
from hasten.retrieve.index.sources import Source, open_source
from hasten.retrieve.index.spann import Spann

__all__ = ["Machine", "ShardHit", "Shards", "pack"]

PLAN = "SHARDS.json"
BLOCK = 1 << 15
"""rows that are cut into parts at a time"""


@dataclass(frozen=True)
class ShardHit:
    """The answers of a batch over all machines; unpacks as ``scores, ids``."""

    distances: NDArray[np.float32]
    """(Q, k) ascending"""
    ids: NDArray[np.int64]
    """(Q, k); -1 where there are fewer answers"""
    parts: NDArray[np.int64]
    """(Q,) parts that each query went to"""
    machines: NDArray[np.int64]
    """(Q,) machines that each query went to"""
    complete: NDArray[np.bool_]
    """(Q,) False where a machine that was asked did not answer"""
    lost: tuple[int, ...]
    """machines that did not answer"""

    def __iter__(self) -> Any:
        yield self.distances
        yield self.ids


def pack(loads: Sequence[float], machines: int) -> list[int]:
    """Machine of each part: heaviest part first, each onto the machine that is least loaded.

    >>> pack([5, 3, 2, 2, 2], 2)
    [0, 1, 1, 0, 1]
    """
    if machines < 1:
        raise ConfigurationError(f"machines is {machines}; at least 1 must hold the parts")
    total = [0.0] * machines
    out = [0] * len(loads)
    for part in sorted(range(len(loads)), key=lambda p: (-loads[p], p)):
        best = min(range(machines), key=lambda m: (total[m], m))
        out[part] = best
        total[best] += loads[part]
    return out


class Machine:
    """Holds some parts and answers for them; lives in this process or in a Ray actor."""

    def __init__(self, path: str, parts: list[int], memory: float | None = None) -> None:
        self._indexes = {p: Spann.open(Path(path) / f"part-{p:05d}", read_only=True, memory=memory) for p in parts}

    def search(
        self, jobs: dict[int, tuple[NDArray[Any], NDArray[np.int64]]], k: int, options: SearchOptions | None
    ) -> list[tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]]:
        """``jobs``: part -> (queries, their numbers); gives (numbers, distances, ids) per part."""
        out = []
        for part, (queries, numbers) in jobs.items():
            index = self._indexes[part]
            hit = index.search(queries, min(k, len(index)), options=options, detail=False)
            out.append((numbers, hit.distances, hit.ids))
        return out

    def memory(self) -> int:
        """Bytes in memory."""
        return sum(i.memory()["total"] for i in self._indexes.values())

    def close(self) -> None:
        """Close the parts."""
        for index in self._indexes.values():
            index.close()


class Transport(Protocol):
    """How machines are reached."""

    def start(self, path: str, parts: list[list[int]]) -> None: ...

    def search(self, machine: int, jobs: Any, k: int, options: Any) -> Callable[[], Any]: ...

    def close(self) -> None: ...


class LocalTransport:
    """Machines in this process, one thread each."""

    def start(self, path: str, parts: list[list[int]]) -> None:
        """Open the parts."""
        self._machines = [Machine(path, p) for p in parts]
        self._pool = ThreadPoolExecutor(max(1, len(parts)))

    def search(self, machine: int, jobs: Any, k: int, options: Any) -> Callable[[], Any]:
        """Start a search; what is returned waits for it."""
        future: Future[Any] = self._pool.submit(self._machines[machine].search, jobs, k, options)
        return future.result

    def close(self) -> None:
        """Close the parts."""
        self._pool.shutdown()
        for machine in self._machines:
            machine.close()


class RayTransport:
    """Machines as Ray actors; the parts must lie where the actors can read them."""

    def __init__(self, timeout: float = 30.0, **options: Any) -> None:
        try:
            import ray
        except ImportError as error:
            raise MissingExtraError("ray", "ray", "an index on many machines") from error
        self._ray, self._timeout, self._options = ray, timeout, options
        self._owner = False

    def start(self, path: str, parts: list[list[int]]) -> None:
        """Start an actor per machine."""
        if not self._ray.is_initialized():
            self._ray.init(include_dashboard=False, log_to_driver=False)
            self._owner = True
        actor = self._ray.remote(**({"num_cpus": 1} | self._options))(Machine)
        self.actors = [actor.remote(os.path.abspath(path), p) for p in parts]

    def search(self, machine: int, jobs: Any, k: int, options: Any) -> Callable[[], Any]:
        """Start a search; what is returned waits for it."""
        reference = self.actors[machine].search.remote(jobs, k, options)
        return lambda: self._ray.get(reference, timeout=self._timeout)

    def close(self) -> None:
        """End the actors."""
        for actor in self.actors:
            self._ray.kill(actor)
        if self._owner:
            self._ray.shutdown()


class Shards:
    """An index on many machines.

    >>> import tempfile
    >>> rows = np.random.default_rng(0).normal(size=(600, 8)).astype(np.float32)
    >>> shards = Shards.build(rows, tempfile.mkdtemp() + "/all", machines=2)
    >>> hit = shards.search(rows[:3], k=1)
    >>> hit.ids[:, 0].tolist(), bool(hit.complete.all())
    ([0, 1, 2], True)
    >>> shards.close()
    """

    def __init__(self, path: str | os.PathLike[str], transport: Transport | None = None) -> None:
        place = Path(path)
        try:
            plan = json.loads((place / PLAN).read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"{str(place)!r} holds no shards ({error}); build them first") from error
        self._centres = np.load(place / "centres.npy")
        self.metric = code_of(plan["metric"])
        self._width = self._centres.shape[1] - (self.metric == INNER)
        self._largest = float(plan["largest"])
        self.rows: list[int] = plan["rows"]
        """rows of each part, those on borders in several"""
        self.total: int = plan["total"]
        """rows of the collection"""
        self.machine_of: list[int] = plan["machine_of"]
        """machine of each part in the plan; what runs here stays as it was opened"""
        self._owner = np.array(self.machine_of)
        self.machines = max(self.machine_of) + 1
        """how many machines there are"""
        self.load = np.zeros(len(self.rows))
        """queries that each part has answered: what :meth:`rebalance` packs by"""
        self._path = place
        self._transport = transport or LocalTransport()
        self._transport.start(
            str(place), [[p for p, m in enumerate(self.machine_of) if m == i] for i in range(self.machines)]
        )

    @classmethod
    def build(
        cls,
        vectors: Any,
        path: str | os.PathLike[str],
        *,
        machines: int,
        parts_per_machine: int = 4,
        overlap: float = 0.05,
        copies: int = 2,
        balanced: bool = True,
        ids: Any = None,
        column: str | None = None,
        options: BuildOptions | None = None,
        transport: Transport | None = None,
    ) -> Shards:
        """Cut, build every part, pack, open.

        ``vectors``, ``ids`` and ``column`` as :meth:`~hasten.retrieve.index.spann.Spann.build` takes them.
        ``overlap``: a row also goes to a part whose centre is at most (1 + overlap) times as far as the nearest, in a
        different direction (RNG rule), up to ``copies`` parts. ``balanced`` False cuts at random, as a baseline that
        no dispatch can prune.
        """
        target = Path(path)
        if target.exists() and any(target.iterdir()):
            raise DataError(f"{str(target)!r} exists already; choose another path, or delete it first")
        source = open_source(vectors, column=column)
        try:
            _build_parts(
                source, target, options or BuildOptions(), machines, parts_per_machine, overlap, copies, balanced, ids
            )
        finally:
            source.close()
        return cls(target, transport)

    def search(
        self, queries: Any, k: int = 10, *, epsilon: float = 0.1, options: SearchOptions | None = None
    ) -> ShardHit:
        """Ask the parts near each query; ``epsilon`` is the pruning of the dispatch, inf asks all.

        ``queries`` (Q, d) or (d,). A machine that does not answer is named in ``lost``, and every query that needed it
        is not ``complete``. Raises InvalidRequestError.
        """
        array = check_queries(queries, self._width)
        if k < 1:
            raise InvalidRequestError(f"k is {k}; ask for at least 1", "k")
        near = self._near(array, epsilon)
        self.load += near.sum(0)
        owner = self._owner
        waits = []
        for machine in range(self.machines):
            jobs = {}
            for part in np.flatnonzero(owner == machine):
                asked = np.flatnonzero(near[:, part])
                if len(asked):
                    jobs[int(part)] = (array[asked], asked)
            if jobs:
                waits.append((machine, jobs, self._begin(machine, jobs, k, options)))
        values = np.full((len(array), k), np.inf, np.float32)
        ids = np.full((len(array), k), -1, np.int64)
        complete = np.ones(len(array), np.bool_)
        lost = []
        for machine, jobs, wait in waits:
            try:
                answers = wait()
            except InvalidRequestError:
                raise
            except Exception:  # whatever took the machine away: the answer says that it is missing
                lost.append(machine)
                for _, asked in jobs.values():
                    complete[asked] = False
                continue
            for numbers, distance, found in answers:
                values[numbers], ids[numbers] = _merge(values[numbers], ids[numbers], distance, found, k)
        touched = np.zeros((len(array), self.machines), np.bool_)
        for place, machine in enumerate(owner):
            touched[:, machine] |= near[:, place]
        return ShardHit(values, ids, near.sum(1), touched.sum(1), complete, tuple(lost))

    def _begin(self, machine: int, jobs: Any, k: int, options: Any) -> Callable[[], Any]:
        try:
            return self._transport.search(machine, jobs, k, options)
        except Exception as error:  # a machine that cannot even be asked is lost too
            failure = error

            def fail() -> Any:
                raise failure

            return fail

    def _near(self, queries: NDArray[Any], epsilon: float) -> NDArray[np.bool_]:
        """Which parts each query goes to (Q, parts)."""
        scale = query_scale(queries, self.metric, self._largest)
        rows = mapped(queries if scale is None else queries * scale, self.metric, self._largest)
        if self.metric == INNER:  # a query has no extra coordinate
            rows[:, -1] = 0
        distance = np.sqrt(
            np.maximum((rows**2).sum(1)[:, None] + (self._centres**2).sum(1) - 2 * rows @ self._centres.T, 0)
        )
        return np.asarray(distance <= (1 + epsilon) * distance.min(1, keepdims=True) + 1e-6)

    def rebalance(self, loads: Sequence[float] | None = None) -> list[int]:
        """Pack the parts anew by the load that they have had, and write the plan; open again to use it (until then
        searches ask the machines that hold the parts now). Returns the machine of each part.
        """
        observed = self.load if loads is None else np.asarray(loads, float)
        if len(observed) != len(self.rows):
            raise ConfigurationError(f"{len(observed)} loads were given for {len(self.rows)} parts")
        self.machine_of = pack((observed + 1e-9).tolist(), self.machines)
        plan = json.loads((self._path / PLAN).read_text())
        plan["machine_of"] = self.machine_of
        folder = DiskFolder(self._path)
        writer = folder.create(PLAN + ".tmp")
        writer.write(json.dumps(plan).encode())
        writer.sync()
        writer.close()
        folder.rename(PLAN + ".tmp", PLAN)
        folder.sync()
        return self.machine_of

    def close(self) -> None:
        """Close all machines."""
        self._transport.close()


def _build_parts(
    source: Source,
    target: Path,
    options: BuildOptions,
    machines: int,
    parts_per_machine: int,
    overlap: float,
    copies: int,
    balanced: bool,
    ids: Any,
) -> None:
    """Cut the rows, build an index of each part, and write the plan; the directory appears whole or not at all."""
    n, metric, count = len(source), code_of(options.metric), machines * parts_per_machine
    if n < 4 * count:
        raise ConfigurationError(f"{n} rows are too few for {count} parts; use fewer machines")
    names = check_ids(ids, n)
    largest = max(check_rows(source.block(b, min(b + BLOCK, n)), metric, b) for b in range(0, n, BLOCK))
    rng = np.random.default_rng(options.seed)
    centres, members = _cut(source, metric, largest, count, overlap, copies, balanced, rng, options.seed)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        sizes = []
        for part, own in enumerate(members):
            if not len(own):
                own = np.array([int(rng.integers(n))])
            build(source.take(own), partial / f"part-{part:05d}", options, ids=own if names is None else names[own])
            sizes.append(len(own))
        stored = io.BytesIO()
        np.save(stored, centres if balanced else np.zeros_like(centres))
        put(DiskFolder(partial), "centres.npy", stored.getbuffer())
        plan = {
            "metric": options.metric,
            "largest": largest,
            "rows": sizes,
            "total": n,
            "machine_of": pack(sizes, machines),
        }
        put(DiskFolder(partial), PLAN, json.dumps(plan).encode())
        os.chmod(partial, 0o755)
        if target.exists():
            target.rmdir()
        os.rename(partial, target)
        DiskFolder(target.parent).sync()
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _cut(
    source: Source,
    metric: int,
    largest: float,
    count: int,
    overlap: float,
    copies: int,
    balanced: bool,
    rng: np.random.Generator,
    seed: int,
) -> tuple[NDArray[np.float32], list[NDArray[np.int64]]]:
    """Centres of ``count`` parts (count, width of the mapped space) and the rows of each; a part may be empty."""
    n = len(source)
    sample = mapped(source.take(np.sort(rng.choice(n, min(n, 20_000), replace=False))), metric, largest)
    centres = np.empty((count, sample.shape[1]), np.float32)
    work = workspace(count, sample.shape[1], len(sample))
    state = np.array([seed + 17], np.uint64)
    cluster(sample, np.arange(len(sample)), 0, len(sample), count, 1.0, True, state, centres, work)
    members: list[list[NDArray[np.int64]]] = [[] for _ in range(count)]
    for begin in range(0, n, BLOCK):
        rows = mapped(source.block(begin, min(begin + BLOCK, n)), metric, largest)
        numbers = np.arange(begin, begin + len(rows))
        label = None if balanced else rng.integers(0, count, len(rows))
        inside = _borders(rows, centres, overlap, copies).T if label is None else label == np.arange(count)[:, None]
        for part in range(count):
            members[part].append(numbers[inside[part]])
    return centres, [np.concatenate(pieces) for pieces in members]


def _borders(rows: NDArray[np.float32], centres: NDArray[np.float32], overlap: float, copies: int) -> NDArray[np.bool_]:
    """Which parts hold each row (rows, parts): the nearest, and by the RNG rule others that are nearly as near."""
    distance = np.sqrt(np.maximum((rows**2).sum(1)[:, None] + (centres**2).sum(1) - 2 * rows @ centres.T, 0))
    between = np.sqrt(np.maximum(((centres[:, None] - centres[None]) ** 2).sum(-1), 0))
    order = np.argsort(distance, axis=1)[:, : max(2 * copies, 4)]
    out = np.zeros(distance.shape, np.bool_)
    each = np.arange(len(rows))
    nearest = distance[each, order[:, 0]]
    taken = np.zeros(len(rows), np.int64)
    for t in range(order.shape[1]):
        part = order[:, t]
        good = (distance[each, part] <= (1 + overlap) * nearest) & (taken < copies)
        for earlier in range(t):  # few: candidates, not rows
            other = order[:, earlier]
            good &= ~out[each, other] | (between[part, other] >= distance[each, part])
        out[each[good], part[good]] = True
        taken += good
    return out


def _merge(
    values: NDArray[np.float32], ids: NDArray[np.int64], more: NDArray[np.float32], names: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Best ``k`` of two sorted answers (rows, …), each id once."""
    joined = np.concatenate([values, more], axis=1)
    labels = np.concatenate([ids, names], axis=1)
    order = np.lexsort((joined, labels), axis=1)
    labels_sorted = np.take_along_axis(labels, order, 1)
    again = np.zeros(labels.shape, np.bool_)
    again[:, 1:] = (labels_sorted[:, 1:] == labels_sorted[:, :-1]) & (labels_sorted[:, 1:] >= 0)
    sorted_values = np.where(again, np.inf, np.take_along_axis(joined, order, 1)).astype(np.float32)
    best = np.argsort(sorted_values, axis=1, kind="stable")[:, :k]
    out = np.take_along_axis(sorted_values, best, 1)
    return out, np.where(np.isinf(out), -1, np.take_along_axis(labels_sorted, best, 1))
