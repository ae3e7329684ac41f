"""Contexts that were computed before, fetched chunk by chunk, each as it fits the time that is left.

Every chunk of a context lies in a store at several levels of :mod:`kvcodec`. Before each chunk the controller takes the
bandwidth that the last one had, and picks the finest level with which all that remains meets the objective, or the
text, which the model computes (CacheGen, Liu et al. 2024, section 5.3). Chunk j + 1 travels while chunk j is decoded.
The controller is a policy: it sees an observation, does no I/O and drives simulation and real loading alike. Differs
from the paper in: the text comes first, with the index, and its time is the first estimate of the bandwidth; a model
that waits for bytes computes the chunk meanwhile, and whichever is there first is taken.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hasten.clock import Clock
from hasten.errors import ConfigurationError, DataError
from hasten.files import write_bytes
from hasten.language.kvcodec import KVCodec
from hasten.language.kvvalues import KeysValues, write_cache
from hasten.network import Trace

__all__ = [
    "ChunkSizes", "Controller", "Event", "FixedLevel", "LoadObservation", "Loaded", "RemoteStore", "Store", "load",
    "simulate",
]  # fmt: skip

TEXT = "text"
Choice = int | str
_TOKEN_BYTES = 4.0
_PIECE = 128
"""Tokens that a waiting model computes before it looks again."""


# ---- what can be fetched --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChunkSizes:
    """One chunk: what it weighs at each level, and what it costs to compute from text."""

    bytes: dict[int, float]
    """level -> bytes; 0 is exact, higher is finer from 1 on"""
    tokens: int
    prefill: float = 0.0
    """seconds to compute it, given the chunks before it"""
    decode: float = 0.0
    """seconds to decode it"""

    @property
    def text_bytes(self) -> float:
        """Bytes of its tokens."""
        return _TOKEN_BYTES * self.tokens


@dataclass(frozen=True)
class LoadObservation:
    """What is known before a chunk is fetched."""

    now: float
    """seconds since the request"""
    remaining: Sequence[ChunkSizes]
    """this chunk and those after it"""
    bandwidth: float | None
    """bytes per second of the last transfer, None where nothing was transferred yet"""
    busy_until: float = 0.0
    """when the model has finished what it was given so far"""


@dataclass(frozen=True)
class Controller:
    """The finest level that meets the objective, else whatever is fastest.

    >>> sizes = ChunkSizes({1: 1e6, 3: 2e6}, tokens=1000, prefill=5.0)
    >>> Controller(slo=2.0).decide(LoadObservation(0.0, [sizes], bandwidth=2e6))
    3
    >>> Controller(slo=0.7).decide(LoadObservation(0.0, [sizes], bandwidth=1e6))
    1
    >>> Controller(slo=9.0).decide(LoadObservation(0.0, [sizes], bandwidth=1e6))  # computing loses nothing
    'text'
    """

    slo: float
    """seconds to the first token"""
    prior: float | None = None
    """bandwidth to assume before the first chunk; None starts at the middle level"""
    margin: float = 0.9
    """share of the remaining time that a plan may use: bandwidth may fall"""
    hedge: bool = True
    """whether a model that waits for a chunk computes it from its text meanwhile"""

    def __post_init__(self) -> None:
        if not self.slo > 0:
            raise ConfigurationError(f"the objective is {self.slo} s to the first token; it must be above 0")

    @property
    def name(self) -> str:
        return f"adaptive {self.slo:g} s"

    def decide(self, observation: LoadObservation) -> Choice:
        """A level of the first remaining chunk, or ``"text"``. Pure."""
        chunks = observation.remaining
        coded = sorted(n for n in chunks[0].bytes if n > 0)
        levels = coded + ([0] if 0 in chunks[0].bytes else [])  # the exact bytes are the finest
        bandwidth = observation.bandwidth if observation.bandwidth is not None else self.prior
        if bandwidth is None:
            return coded[len(coded) // 2] if coded else (levels[0] if levels else TEXT)
        times: dict[Choice, float] = {}
        for level in levels:
            fetch = sum(c.bytes.get(level, max(c.bytes.values())) for c in chunks) / max(bandwidth, 1e-9)
            times[level] = fetch + chunks[-1].decode
        times[TEXT] = sum(c.prefill for c in chunks) + max(0.0, observation.busy_until - observation.now)
        left = self.margin * (self.slo - observation.now)
        if times[TEXT] <= left:
            return TEXT  # computing loses nothing at all
        for level in reversed(levels):
            if times[level] <= left:
                return level
        if self.hedge and coded:
            return coded[0]  # computed meanwhile, so it costs no time, and tells the bandwidth
        return min(times, key=lambda n: times[n])


@dataclass(frozen=True)
class FixedLevel:
    """The same choice always: what the controller is compared with."""

    choice: Choice

    @property
    def name(self) -> str:
        return f"always {self.choice}"

    def decide(self, observation: LoadObservation) -> Choice:
        """See :class:`Controller`."""
        return self.choice


@dataclass(frozen=True)
class Event:
    """One chunk that has arrived."""

    chunk: int
    choice: Choice
    began: float
    arrived: float
    ready: float
    """when its keys and values are in the cache"""
    bytes: float


def simulate(chunks: Sequence[ChunkSizes], link: Trace, policy: Any, *, start: float = 0.0) -> list[Event]:
    """Fetch the text and all chunks over ``link``, which the request meets at ``start``; times count from there."""
    text = sum(c.text_bytes for c in chunks)
    now = link.finish(start, text) - start
    busy, bandwidth = 0.0, text / now if now > 0 else None
    events = []
    for index, chunk in enumerate(chunks):
        choice = policy.decide(LoadObservation(now, chunks[index:], bandwidth, busy))
        size, arrived = 0.0, now
        computed = max(busy, now) + chunk.prefill
        if choice != TEXT:
            size = chunk.bytes[int(choice)]
            arrived = link.finish(start + now, size) - start
            decoded = max(busy, arrived) + chunk.decode
            if getattr(policy, "hedge", False) and computed < decoded:  # what is under way is given up
                choice, arrived = TEXT, computed
                size = link.delivered(start + arrived) - link.delivered(start + now)
            if arrived > now:
                bandwidth = size / (arrived - now)
        busy = computed if choice == TEXT else decoded
        events.append(Event(index, choice, now, arrived, busy, size))
        now = arrived
    return events


# ---- the store ------------------------------------------------------------------------------------------------------


def _safe(name: str) -> str:
    if not name or any(not (c.isalnum() or c in "-_.") for c in name) or name.startswith("."):
        raise ConfigurationError(f"a context cannot be called {name!r}; use letters, digits, - and _")
    return name


class Store:
    """Contexts on disk: ``<name>/index.json`` and ``<name>/<chunk>.<level>.hkv``. Any web server can serve the folder.

    Contract: several processes may read; a writer replaces files whole. ``get`` raises
    :class:`~hasten.errors.DataError` for what is not there; whether bytes are sound is the codec's to say.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def put(
        self, name: str, codec: KVCodec, kv: KeysValues, text: Sequence[int], *, chunk: int = 1000,
        levels: Sequence[int] = (0, 1, 2, 3),
    ) -> dict[str, Any]:  # fmt: skip
        """Encode a context at all levels; returns its index."""
        if len(text) != kv.tokens or chunk < 1:
            raise ConfigurationError(f"{kv.tokens} tokens of keys and {len(text)} of text, chunks of {chunk}")
        folder = self.folder / _safe(name)
        chunks = []
        for number, begin in enumerate(range(0, kv.tokens, chunk)):
            part, sizes = kv.cut(begin, min(begin + chunk, kv.tokens)), {}
            for level in levels:
                blob = codec.encode(part, level)
                write_bytes(folder / f"{number}.{level}.hkv", blob)
                sizes[level] = len(blob)
            chunks.append({"tokens": part.tokens, "bytes": sizes})
        index = {"model": codec.model, "chunk": chunk, "text": [int(t) for t in text], "chunks": chunks}
        write_bytes(folder / "index.json", json.dumps(index).encode())
        return index

    def _read(self, relative: str) -> bytes:
        try:
            return (self.folder / relative).read_bytes()
        except OSError as error:
            known = sorted(p.parent.name for p in self.folder.glob("*/index.json"))
            raise DataError(
                f"{relative!r} is not in the store {self.folder} ({error.strerror}); "
                f"contexts that it has: {', '.join(known[:8]) or 'none, encode one first'}"
            ) from None

    def index(self, name: str) -> dict[str, Any]:
        """What ``put`` returned."""
        raw = self._read(f"{_safe(name)}/index.json")
        try:
            found = json.loads(raw)
            assert {"model", "chunk", "text", "chunks"} <= set(found)
        except (ValueError, AssertionError, TypeError):
            raise DataError(f"the index of {name!r} is corrupt; put the context again") from None
        return found  # type: ignore[no-any-return]

    def get(self, name: str, chunk: int, level: int) -> bytes:
        """The stream of one chunk."""
        return self._read(f"{_safe(name)}/{chunk}.{level}.hkv")


class RemoteStore(Store):
    """The same over HTTP: ``url`` is the address of the folder."""

    def __init__(self, url: str, *, timeout: float = 30.0) -> None:
        super().__init__(url)
        self.url, self.timeout = url.rstrip("/"), timeout

    def put(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Refused: a store is written where it lies."""
        raise ConfigurationError("a store over HTTP is read only; put contexts where the folder is")

    def _read(self, relative: str) -> bytes:
        try:
            with urllib.request.urlopen(f"{self.url}/{relative}", timeout=self.timeout) as answer:
                return bytes(answer.read())
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise DataError(f"{relative!r} cannot be fetched from {self.url} ({error})") from None


# ---- loading --------------------------------------------------------------------------------------------------------


@dataclass
class Loaded:
    """A context in the cache of a session that goes on from there."""

    session: Any
    tokens: list[int]
    events: list[Event] = field(default_factory=list)


def load(
    store: Store, name: str, codec: KVCodec, model: Any, policy: Any, clock: Clock, *, link: Trace | None = None,
    room: int = 256, prefill_rate: float | None = None,
) -> Iterator[Event | Loaded]:  # fmt: skip
    """Fetch a context chunk by chunk; yields an :class:`Event` for each, and a :class:`Loaded` at the end.

    ``link`` slows the fetching down to a trace, for trials; without it the store is as fast as it is. A chunk that is
    corrupt, truncated or of another model is computed from its text. ``room``: tokens that the session can take after
    the context. ``prefill_rate``: tokens per second that the model computes, to weigh text against bytes.
    """
    from concurrent.futures import ThreadPoolExecutor

    from hasten.language.speculate.session import Session

    began = clock.now()
    index = store.index(name)
    if index["model"] != codec.model:
        raise DataError(
            f"{name!r} was stored by the model {index['model'][:8]}…, this codec is of {codec.model[:8]}…; put it again"
        )
    text = list(index["text"])
    session = Session(model.executor, len(text) + room)
    rate = prefill_rate or 1000.0
    chunks = [ChunkSizes({int(k): v for k, v in c["bytes"].items()}, c["tokens"], c["tokens"] / rate)
              for c in index["chunks"]]  # fmt: skip

    events: list[Event] = []

    def arrive(before: float, size: float) -> None:
        if link is not None:
            clock.sleep(max(0.0, link.finish(before, size) - (clock.now() - began)))

    def fetch(number: int, choice: Choice) -> tuple[bytes | None, float, float, float]:
        before, blob, size = clock.now() - began, None, 0.0
        if choice != TEXT:
            try:
                blob = store.get(name, number, int(choice))
                size = float(len(blob))
            except DataError:
                blob = b""
            arrive(before, size)
        return blob, before, clock.now() - began, size

    weight = sum(c.text_bytes for c in chunks)
    arrive(0.0, weight)
    taken = clock.now() - began
    bandwidth = weight / taken if taken > 0 else None
    # Two, so that a chunk which is not waited for does not hold up the next.
    with ThreadPoolExecutor(2, "kv-fetch") as pool:
        choice = policy.decide(LoadObservation(taken, chunks, bandwidth))
        under_way = pool.submit(fetch, 0, choice)
        for number, chunk in enumerate(chunks):
            begin = number * index["chunk"]
            piece = text[begin : begin + chunk.tokens]
            session.done = begin
            asked = clock.now() - began
            if getattr(policy, "hedge", False) and choice != TEXT:
                while not under_way.done() and session.done < begin + len(piece):
                    session.feed(piece[session.done - begin :][:_PIECE])
            whole = session.done == begin + len(piece)
            if whole and not under_way.done():
                blob, before, arrived, size, choice = None, asked, clock.now() - began, 0.0, TEXT
            else:
                blob, before, arrived, size = under_way.result()
                if arrived > before and size:
                    bandwidth = size / (arrived - before)
            chosen = choice
            if number + 1 < len(chunks):
                choice = policy.decide(LoadObservation(arrived, chunks[number + 1 :], bandwidth))
                under_way = pool.submit(fetch, number + 1, choice)
            kv = None
            if blob is not None:
                try:
                    kv = codec.decode(blob)
                    if kv.start != begin or kv.tokens != len(piece):
                        raise DataError(f"chunk {number} of {name!r} holds other tokens than its index says")
                except DataError:
                    kv, chosen = None, TEXT
            if kv is not None:
                write_cache(session.cache, session.table, kv)
                session.done = begin + len(piece)
            elif session.done < begin + len(piece):
                session.feed(piece[session.done - begin :])
            event = Event(number, chosen, before, arrived, clock.now() - began, size)
            events.append(event)
            yield event
    yield Loaded(session, text, events)


def violations(chunks: Sequence[ChunkSizes], links: Sequence[Trace], policy: Any, slo: float, starts: Sequence[float],
               last: float = 0.0) -> float:  # fmt: skip
    """Share of loads whose first token (``last`` seconds after the last chunk) comes later than ``slo``."""
    late = [simulate(chunks, link, policy, start=s)[-1].ready + last > slo for link in links for s in starts]
    return float(np.mean(late))
