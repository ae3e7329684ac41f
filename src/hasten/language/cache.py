"""Paged KV cache, the bookkeeping half: which block belongs to which sequence, and which prefix it holds.

A block holds ``block_size`` consecutive tokens. A full block is named by the hash of (hash of the block before, its
tokens), so two sequences with an equal prefix share its blocks (PagedAttention, Kwon et al. 2023, section 4.3; hashed
blocks as in vLLM's automatic prefix caching). A block that nobody holds keeps its content and its name until it is
needed for something else; the least recently freed goes first.

Contract: not thread-safe, one engine loop owns a pool. Every method either succeeds or changes nothing.
``check_integrity()`` raises when the books do not balance; tests call it after every random operation.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from hasten.errors import CacheError, OutOfBlocksError

__all__ = ["BlockPool"]

_ROOT = b"hasten"


Tokens = Sequence[int] | np.ndarray[Any, np.dtype[np.int64]]


def _chain(parent: bytes, tokens: Tokens) -> bytes:
    """Name of a block from its parent's name and its tokens; 128 bits, so that a collision is not a concern."""
    return hashlib.blake2b(np.asarray(tokens, dtype=np.int64).tobytes(), key=parent, digest_size=16).digest()


class BlockPool:
    """Books of ``num_blocks`` cache blocks of ``block_size`` tokens each.

    >>> pool = BlockPool(num_blocks=8, block_size=4)
    >>> pool.open(seq=0, tokens=range(10))      # nothing is cached yet
    0
    >>> pool.grow(seq=0, length=10)             # three blocks
    >>> pool.commit(seq=0, tokens=range(10))    # two of them are full: they get their names
    >>> pool.free(seq=0)
    >>> pool.open(seq=1, tokens=range(10))      # both full blocks are found again
    8
    """

    def __init__(self, num_blocks: int, block_size: int = 16, *, prefix_sharing: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise CacheError(f"a pool needs at least one block of one token, got {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_sharing = prefix_sharing
        self._references = [0] * num_blocks
        self._names: list[bytes | None] = [None] * num_blocks
        self._by_name: dict[bytes, int] = {}
        # Free blocks, least recently freed first; those with a name can still be found by prefix.
        self._free: OrderedDict[int, None] = OrderedDict((b, None) for b in range(num_blocks))
        self._tables: dict[int, list[int]] = {}
        self._committed: dict[int, tuple[int, bytes]] = {}  # full blocks named so far, name of the last
        self.queries = 0
        """tokens looked up in the prefix index so far"""
        self.hits = 0
        """tokens found there"""

    @property
    def num_free(self) -> int:
        """Blocks that can be had now (free ones, whether or not they still hold a known prefix)."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the blocks that sequences hold, 0 to 1."""
        return 1.0 - len(self._free) / self.num_blocks

    def table(self, seq: int) -> list[int]:
        """Blocks of ``seq`` in order. The list is the pool's own: read it, do not change or keep it."""
        return self._tables[seq]

    def match_prefix(self, tokens: Tokens) -> int:
        """Tokens at the head of ``tokens`` that the cache holds: whole blocks, always leaving one token to compute."""
        return len(self._lookup(tokens)) * self.block_size

    def _lookup(self, tokens: Tokens) -> list[int]:
        found: list[int] = []
        if not self.prefix_sharing:
            return found
        name, size = _ROOT, self.block_size
        for begin in range(0, (len(tokens) - 1) // size * size, size):
            name = _chain(name, tokens[begin : begin + size])
            block = self._by_name.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def names(self, tokens: Tokens) -> list[bytes]:
        """Names of the full blocks of ``tokens`` that a prefix may come from, for ``match_names``."""
        found: list[bytes] = []
        name, size = _ROOT, self.block_size
        if self.prefix_sharing:
            for begin in range(0, (len(tokens) - 1) // size * size, size):
                name = _chain(name, tokens[begin : begin + size])
                found.append(name)
        return found

    def match_names(self, names: Sequence[bytes]) -> int:
        """``match_prefix`` for names that were computed before; costs one look-up per block that is found."""
        for index, name in enumerate(names):
            if name not in self._by_name:
                return index * self.block_size
        return len(names) * self.block_size

    def open(self, seq: int, tokens: Tokens) -> int:
        """Begin the table of ``seq`` with the blocks of its known prefix; returns how many tokens they hold.

        Raises :class:`CacheError` if the sequence is open already.
        """
        if seq in self._tables:
            raise CacheError(f"sequence {seq} already has a block table; free it first")
        found = self._lookup(tokens)
        for block in found:
            self._take(block)
        self._tables[seq] = found
        name = self._names[found[-1]] if found else _ROOT
        assert name is not None
        self._committed[seq] = (len(found), name)
        self.queries += len(tokens)
        self.hits += len(found) * self.block_size
        return len(found) * self.block_size

    def _take(self, block: int) -> None:
        self._references[block] += 1
        self._free.pop(block, None)

    def can_grow(self, seq: int, length: int) -> bool:
        """Whether ``grow(seq, length)`` would succeed."""
        return -(-length // self.block_size) - len(self._tables[seq]) <= len(self._free)

    def grow(self, seq: int, length: int) -> None:
        """Give ``seq`` blocks for ``length`` tokens in all. Raises :class:`OutOfBlocksError`, then nothing changed."""
        table = self._tables[seq]
        need = -(-length // self.block_size) - len(table)
        if need > len(self._free):
            raise OutOfBlocksError(f"sequence {seq} needs {need} more cache blocks, {len(self._free)} are free")
        for _ in range(need):
            block, _ = self._free.popitem(last=False)
            name = self._names[block]
            if name is not None:  # its old content is given up now
                self._by_name.pop(name, None)
                self._names[block] = None
            self._references[block] = 1
            table.append(block)

    def knows(self, name: bytes) -> bool:
        """Whether a block of this name is there."""
        return name in self._by_name

    def adopt(self, name: bytes) -> int | None:
        """A free block under ``name``, whose content the caller writes now; None if there is one, or none is free.

        The block stays free and is found by its name until it is needed for something else.
        """
        if not self._free or name in self._by_name or not self.prefix_sharing:
            return None
        block, _ = self._free.popitem(last=False)
        old = self._names[block]
        if old is not None:
            self._by_name.pop(old, None)
        self._names[block] = name
        self._by_name[name] = block
        self._free[block] = None
        return block

    def shrink(self, seq: int, length: int) -> None:
        """Take back the blocks of ``seq`` beyond ``length`` tokens: guesses that did not stand had been there.

        Raises :class:`CacheError` if a block that goes has a name already; then nothing changed.
        """
        table = self._tables[seq]
        keep = -(-length // self.block_size)
        if keep < self._committed[seq][0]:
            raise CacheError(
                f"sequence {seq} cannot shrink to {length} tokens: {self._committed[seq][0]} blocks are named"
            )
        while len(table) > keep:
            block = table.pop()
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                self._free.move_to_end(block, last=self._names[block] is not None)  # nothing in it is worth keeping

    def commit(self, seq: int, tokens: Tokens) -> None:
        """Name the full blocks of ``seq``, whose computed tokens are ``tokens``, so that others can share them."""
        done, name = self._committed[seq]
        size = self.block_size
        full = len(tokens) // size
        if full <= done or not self.prefix_sharing:
            return
        table = self._tables[seq]
        for index in range(done, full):
            name = _chain(name, tokens[index * size : (index + 1) * size])
            block = table[index]
            if name not in self._by_name:  # else an equal block is known already; this one stays private
                self._by_name[name] = block
                self._names[block] = name
        self._committed[seq] = (full, name)

    def needs_commit(self, seq: int, computed: int) -> bool:
        """Whether ``commit`` with ``computed`` tokens would name a block; cheap, so that a step can skip slicing."""
        return self.prefix_sharing and computed // self.block_size > self._committed[seq][0]

    def free(self, seq: int) -> None:
        """Let go of every block of ``seq``. Raises ``KeyError`` for an unknown sequence."""
        for block in reversed(self._tables.pop(seq)):  # tails first: heads of prefixes are the last to be reused
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
        del self._committed[seq]

    def forget_prefixes(self) -> None:
        """Drop every name, so that later sequences share nothing with earlier ones."""
        self._by_name.clear()
        self._names = [None] * self.num_blocks

    def check_integrity(self) -> None:
        """Raise :class:`CacheError` unless every block is exactly where the books say."""
        counted = [0] * self.num_blocks
        for seq, table in self._tables.items():
            if len(set(table)) != len(table):
                raise CacheError(f"sequence {seq} holds a block twice: {table}")
            for block in table:
                counted[block] += 1
        for block in range(self.num_blocks):
            if counted[block] != self._references[block]:
                raise CacheError(f"block {block} has {self._references[block]} references, {counted[block]} holders")
            if (counted[block] == 0) != (block in self._free):
                raise CacheError(f"block {block} has {counted[block]} holders and free is {block in self._free}")
        for name, block in self._by_name.items():
            if self._names[block] != name:
                raise CacheError(f"block {block} is indexed under a name that it does not carry")
        if set(self._tables) != set(self._committed):
            raise CacheError("tables and commit marks name different sequences")
