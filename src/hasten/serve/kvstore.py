"""Prefixes that outlive the process: full pieces of prompts in a folder, found again by the names of their blocks.

A piece is ``blocks`` consecutive cache blocks; its file is called by the chained hash of all tokens up to its end, so
an equal name is an equal prefix. The engine asks before it admits a prompt and hands over pieces when a sequence ends;
a thread of its own encodes and writes. Invariant: what cannot be decoded, or belongs to another model, is never served;
it is counted, removed and computed again.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hasten.errors import ConfigurationError, DataError
from hasten.files import write_bytes
from hasten.language.kvcodec import KVCodec
from hasten.language.kvfit import fit
from hasten.language.kvvalues import KeysValues, fingerprint, read_cache, write_cache

__all__ = ["PrefixStore", "sample_contexts"]

_log = logging.getLogger("hasten.serve")


class PrefixStore:
    """Prefixes of one model in one folder. ``find`` and ``offer`` belong to the engine's thread."""

    def __init__(
        self, folder: str | Path, codec: KVCodec, *, level: int = 0, blocks: int = 4, queue_size: int = 64
    ) -> None:
        if blocks < 1:
            raise ConfigurationError(f"a piece of {blocks} blocks; give at least 1")
        self.folder, self.codec, self.level, self.blocks = Path(folder), codec, level, blocks
        self.hits = self.misses = self.refused = self.written = self.bytes_written = 0
        self._known = {p.stem for p in self.folder.glob("*.hkv")}
        self._queue: queue.Queue[tuple[str, KeysValues] | None] = queue.Queue(queue_size)
        self._thread = threading.Thread(target=self._write, name="kv-store", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls, folder: str | Path, model: Any, *, quality: float | None = 0.01,
        contexts: Callable[[], Sequence[Sequence[int]]] | None = None, **options: Any,
    ) -> PrefixStore:  # fmt: skip
        """The store of ``model`` in ``folder``; its codec is fitted at the first start.

        ``quality``: by how much the perplexity may rise (0.01 is one per cent), as measured on text that the tables
        have not seen; None keeps the exact numbers. ``contexts`` gives sample token lists for the fit. Raises
        :class:`~hasten.errors.ConfigurationError` for the store of another model.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "codec.npz"
        codec = None
        if path.is_file():
            try:
                codec = KVCodec.load(path, model.config)
            except DataError as error:  # damaged, or of an older version, whose pieces are refused one by one
                _log.warning("KV store: %s; it is fitted again", error)
        if codec is not None:
            if codec.model != fingerprint(model):
                raise ConfigurationError(
                    f"{str(folder)!r} is the KV store of another model or precision ({codec.model[:8]}…, this is "
                    f"{fingerprint(model)[:8]}…); give every model a folder of its own"
                )
        else:
            codec = fit(model, (contexts or (lambda: sample_contexts(model)))(), measure=quality is not None)
            codec.save(path)
        level = 0 if quality is None else codec.best_level(1.0 + quality)
        return cls(folder, codec, level=level, **options)

    def find(self, names: Sequence[bytes], known: Callable[[bytes], bool], size: int) -> list[tuple[int, KeysValues]]:
        """Pieces of a prefix whose blocks are called ``names`` and are not ``known`` to the cache, in order.

        Returned as (first block, keys and values); stops at the first piece that is missing or unsound.
        """
        out = []
        for last in range(self.blocks - 1, len(names), self.blocks):
            name = names[last].hex()
            if known(names[last]):
                continue
            if name not in self._known:
                self.misses += 1
                break
            path = self.folder / f"{name}.hkv"
            first = last + 1 - self.blocks
            try:
                kv = self.codec.decode(path.read_bytes())
                if kv.start != first * size or kv.tokens != self.blocks * size:
                    raise DataError("it holds other tokens than its name says")
            except (OSError, DataError) as error:
                _log.warning("KV store: %s is refused (%s)", path.name, error)
                self.refused += 1
                self._known.discard(name)
                path.unlink(missing_ok=True)
                break
            self.hits += 1
            out.append((first, kv))
        return out

    def offer(self, names: Sequence[bytes], cache: Any, table: Sequence[int]) -> None:
        """Keep the pieces of a computed prefix that the folder lacks; drops what the writer cannot keep up with."""
        size = cache.block_size
        for last in range(self.blocks - 1, len(names), self.blocks):
            name = names[last].hex()
            if name in self._known or self._queue.full():
                continue
            self._known.add(name)
            kv = read_cache(cache, table, (last + 1) * size, (last + 1 - self.blocks) * size)
            self._queue.put((name, kv))

    def place(self, cache: Any, table: Sequence[int], kv: KeysValues) -> None:
        """Put a piece into its blocks."""
        write_cache(cache, table, kv)

    def _write(self) -> None:
        while True:
            item = self._queue.get()
            try:
                if item is None:
                    return
                name, kv = item
                blob = self.codec.encode(kv, self.level, threads=1)  # the engine needs the other cores
                write_bytes(self.folder / f"{name}.hkv", blob)
                self.written += 1
                self.bytes_written += len(blob)
            except Exception as error:  # a full disk must not end the server
                _log.warning("KV store: a piece was not kept (%s)", error)
                if item is not None:
                    self._known.discard(item[0])
            finally:
                self._queue.task_done()

    def flush(self) -> None:
        """Wait until everything offered is on the disk."""
        self._queue.join()

    def close(self) -> None:
        """Write what is left and end the thread."""
        self._queue.put(None)
        self._thread.join(30)

    def counters(self) -> dict[str, int]:
        """For ``/metrics``."""
        return {
            "kv_store_hits": self.hits,
            "kv_store_misses": self.misses,
            "kv_store_refused": self.refused,
            "kv_store_written": self.written,
            "kv_store_bytes_written": self.bytes_written,
        }


def sample_contexts(model: Any, count: int = 12) -> list[list[int]]:
    """Token lists out of the standard library; any text will do for the spread of a model's keys and values."""
    from hasten.language.corpus import documents

    length = min(1000, model.executor.max_context - 8)
    out = []
    for document in documents(suite=False):
        if document.split != "train" and len(document.text) > 6 * length:
            tokens = list(model.tokenizer.encode(document.text[: 8 * length]))[:length]
            if len(tokens) >= min(200, length):
                out.append(tokens)
        if len(out) == count:
            break
    return out
