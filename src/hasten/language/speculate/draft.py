"""A smaller model guesses: the draft's likeliest tokens, several ahead.

A draft that :class:`FusedDecoder` knows runs there, a few tens of microseconds a token; any other runs on an
:class:`Executor` of its own, all sequences together, one step per token. Its cache follows the sequence by the longest
common prefix of what it computed and what is known, so rejected guesses, preemption and restarts need no word from the
engine. Speculative decoding: Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ConfigurationError, OutOfBlocksError
from hasten.language.speculate.proposal import Ask, Calibration, Proposal

__all__ = ["ModelDraft", "check_pair", "claim", "common_prefix"]

_BINS = 20


def check_pair(target: Any, draft: Any) -> None:
    """Raise :class:`~hasten.errors.ConfigurationError` unless both models mean the same by every token."""
    sizes = target.config.vocab_size, draft.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ConfigurationError(
            f"the draft {draft.name} has a vocabulary of {sizes[1]} tokens, the model {target.name} has {sizes[0]}; "
            "a draft must share the tokeniser of its model: choose another draft, or --speculate ngram"
        )
    if getattr(target, "folder", None) is not None and getattr(draft, "folder", None) is not None:
        ids = range(sizes[0])
        one, other = target.tokenizer, draft.tokenizer
        if one.state() != other.state() and any(one.decode([i]) != other.decode([i]) for i in ids):
            raise ConfigurationError(
                f"the tokenisers of the draft {draft.name} and of the model {target.name} differ in what tokens mean; "
                "choose a draft that was trained with the model's tokeniser, or --speculate ngram"
            )


def common_prefix(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """Length of the longest common prefix."""
    count = min(len(one), len(other))
    differ = np.flatnonzero(one[:count] != other[:count])
    return int(differ[0]) if len(differ) else count


class _Fused:
    """Slots of a fused decoder, the least recently used given away first."""

    def __init__(self, decoder: Any, most: int) -> None:
        from hasten.language.speculate.fused import FusedDecoder

        self._decoder = FusedDecoder(decoder)
        self.context = self._decoder.context
        self._most = most
        self._slots: OrderedDict[int, int] = OrderedDict()
        self._done: dict[int, NDArray[np.int64]] = {}
        self._free: list[int] = []

    def forget(self, seq: int) -> None:
        slot = self._slots.pop(seq, None)
        if slot is not None:
            self._free.append(slot)
            self._done.pop(slot, None)

    def _slot(self, seq: int) -> int:
        if seq in self._slots:
            self._slots.move_to_end(seq)
            return self._slots[seq]
        if not self._free:
            if len(self._slots) >= self._most:
                self.forget(next(iter(self._slots)))
            else:
                slot = len(self._slots)
                self._decoder.reserve(slot + 1)
                self._free.append(slot)
        slot = self._slots[seq] = self._free.pop()
        return slot

    def guess(self, asks: Sequence[Ask], least: float) -> list[tuple[list[int], list[float]]]:
        out: list[tuple[list[int], list[float]]] = [([], [])] * len(asks)
        most = min(self._most, len(asks))
        for begin in range(0, len(asks), most):
            part = range(begin, min(begin + most, len(asks)))
            slots, pending, positions, counts = [], [], [], []
            for i in part:
                slot = self._slot(asks[i].seq)
                done = min(
                    common_prefix(self._done.get(slot, asks[i].tokens[:0]), asks[i].tokens), len(asks[i].tokens) - 1
                )
                slots.append(slot)
                pending.append(asks[i].tokens[done:])
                positions.append(done)
                counts.append(asks[i].count)
            tokens, chances, found = self._decoder.guess(slots, pending, positions, counts, least)
            for row, i in enumerate(part):
                n = int(found[row])
                out[i] = (tokens[row, :n].tolist(), chances[row, :n].tolist())
                self._done[slots[row]] = np.concatenate([asks[i].tokens, tokens[row, : n - 1]])
        return out


def claim(
    pool: Any, held: OrderedDict[int, NDArray[np.int64]], ask: Ask, room: int, forget: Callable[[int], None]
) -> int:
    """Tokens of ``ask`` that a draft's cache holds; blocks for the rest and ``room`` guesses are given.

    ``held``: the tokens of each sequence in the cache, the least recently asked first; those give way (``forget``).
    """
    known = len(ask.tokens)
    if ask.seq in held:
        held.move_to_end(ask.seq)
        done = min(common_prefix(held[ask.seq], ask.tokens), known - 1)
    else:
        done = pool.open(ask.seq, ask.tokens)
        held[ask.seq] = ask.tokens[:done]
    while not pool.can_grow(ask.seq, known + room):
        oldest = next(iter(held))
        if oldest == ask.seq:
            raise OutOfBlocksError(f"the draft's cache cannot hold the {known} tokens of one sequence")
        forget(oldest)
    pool.grow(ask.seq, known + room)
    return done


class _Stepped:
    """Any draft, on an executor: one step per guess for all sequences together."""

    def __init__(self, executor: Any, num_blocks: int, block_size: int = 16) -> None:
        from hasten.language.cache import BlockPool

        self._executor = executor
        self.context = int(executor.max_context)
        self._pool = BlockPool(num_blocks, block_size)
        self._cache = executor.new_cache(num_blocks, block_size)
        self._done: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def forget(self, seq: int) -> None:
        if seq in self._done:
            del self._done[seq]
            self._pool.free(seq)

    def guess(self, asks: Sequence[Ask], least: float) -> list[tuple[list[int], list[float]]]:
        from hasten.language.ragged import RaggedBatch

        out: list[tuple[list[int], list[float]]] = [([], []) for _ in asks]
        live: list[tuple[int, list[int], int, float]] = []
        for i, ask in enumerate(asks):
            try:
                done = claim(self._pool, self._done, ask, ask.count, self.forget)
            except OutOfBlocksError:
                continue
            live.append((i, ask.tokens[done:].tolist(), done, 1.0))
        live = [item for item in live if asks[item[0]].seq in self._done]  # a later one may have taken its blocks
        for _ in range(max((a.count for a in asks), default=0)):
            if not live:
                break
            batch = RaggedBatch.build([(p, start, self._pool.table(asks[i].seq)) for i, p, start, _ in live])
            logits = self._executor.step(batch, self._cache)
            top, best = logits.max(-1)
            chances = (1.0 / (logits - top[:, None]).exp().sum(-1)).tolist()
            following = []
            for (i, piece, start, running), token, chance in zip(live, best.tolist(), chances, strict=True):
                out[i][0].append(token)
                out[i][1].append(chance)
                running *= chance
                if running >= least and len(out[i][0]) < asks[i].count:
                    following.append((i, [token], start + len(piece), running))
            live = following
        for (tokens, _), ask in zip(out, asks, strict=True):
            if ask.seq in self._done and tokens:
                self._done[ask.seq] = np.concatenate([ask.tokens, tokens[:-1]]).astype(np.int64)
                self._pool.commit(ask.seq, ask.tokens)
        return out


class ModelDraft:
    """Guesses of a smaller model.

    >>> from hasten.language import load
    >>> draft = ModelDraft(load("pycode-draft-0.7m"))
    >>> len(draft.propose([Ask(0, np.array([5, 6, 7]), 4)])[0].tokens) in (1, 2, 3, 4)
    True
    """

    def __init__(self, draft: Any, *, least: float = 0.05, max_num_seqs: int = 64, fused: bool | None = None) -> None:
        """``draft``: a language model. ``least``: a continuation less probable than this is not gone on with.

        ``fused``: whether to run it as one kernel; by default where that is possible and the model is small.
        """
        from hasten.language.speculate.fused import FusedDecoder

        config = draft.config
        self.vocab_size = int(config.vocab_size)
        self.least = least
        layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
        small = config.num_layers * layer + config.vocab_size * config.hidden_size < 8_000_000
        able = FusedDecoder.supports(config) and getattr(draft, "device", "cpu") == "cpu"
        if fused and not able:
            raise ConfigurationError(f"{draft.name} has parts that the fused draft does not know; use fused=False")
        self._runner: _Fused | _Stepped
        if fused or (fused is None and able and small):
            self._runner = _Fused(draft.decoder, max_num_seqs)
        else:
            per_seq = -(-config.max_position_embeddings // 16)
            self._runner = _Stepped(draft.executor, min(per_seq * max_num_seqs, max(per_seq, 4096)))
        self._calibration = Calibration([(i + 0.5) / _BINS for i in range(_BINS)])

    @property
    def name(self) -> str:
        return "draft"

    def propose(self, asks: Sequence[Ask]) -> list[Proposal]:
        out = [Proposal()] * len(asks)
        able = [i for i, a in enumerate(asks) if a.count > 0 and len(a.tokens) + a.count <= self._runner.context]
        if not able:
            return out
        for i, (tokens, chances) in zip(able, self._runner.guess([asks[i] for i in able], self.least), strict=True):
            marks = tuple(min(int(c * _BINS), _BINS - 1) for c in chances)
            survival, running = [], 1.0
            for mark in marks:
                running *= self._calibration.chance(mark)
                survival.append(running)
            out[i] = Proposal(tuple(tokens), tuple(survival), None, self.name, marks)
        return out

    def learn(self, proposal: Proposal, accepted: int) -> None:
        for place, mark in enumerate(proposal.marks[: accepted + 1]):
            self._calibration.learn(mark, place < accepted)

    def forget(self, seq: int) -> None:
        self._runner.forget(seq)
