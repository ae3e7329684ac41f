"""Keys and values of one context as plain numbers: out of a paged cache and into it, and what they are worth."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hasten.language.pages import coded, widened

__all__ = ["KeysValues", "capture", "fingerprint", "perplexity", "read_cache", "write_cache"]

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class KeysValues:
    """Keys and values of one context, keys rotated as the cache has them."""

    keys: Floats
    """(layers, tokens, channels), channels = kv_heads * head_dim"""
    values: Floats
    """the same shape"""
    start: int = 0
    """position of the first token"""

    @property
    def tokens(self) -> int:
        return int(self.keys.shape[1])

    def cut(self, begin: int, end: int) -> KeysValues:
        """Tokens ``begin`` to ``end``."""
        return KeysValues(self.keys[:, begin:end], self.values[:, begin:end], self.start + begin)


def fingerprint(model: Any) -> str:
    """Names a model's weights and shape: caches of one model mean nothing to another."""
    digest = hashlib.blake2b(repr(model.config).encode(), digest_size=12)
    executor = model.executor
    digest.update(str(executor.precision).encode())
    if getattr(executor, "kv_precision", "auto") != "auto":
        digest.update(executor.kv_precision.encode())
    some = torch.arange(min(64, model.config.vocab_size))
    digest.update(executor._embed(some).float().cpu().numpy().tobytes())
    digest.update(np.ascontiguousarray(_as_floats(executor._layers[-1].post_norm)).tobytes())
    return digest.hexdigest()


def _as_floats(x: Any) -> Any:
    return x.float().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def capture(model: Any, tokens: Sequence[int]) -> KeysValues:
    """Compute a context and return its keys and values."""
    from hasten.language.speculate.session import Session

    session = Session(model.executor, len(tokens))
    session.feed(list(tokens))
    return read_cache(session.cache, session.table, len(tokens))


def read_cache(cache: Any, table: Sequence[int], tokens: int, start: int = 0) -> KeysValues:
    """Tokens ``start`` to ``tokens`` out of a paged cache."""
    where = torch.tensor(list(table)[: -(-tokens // cache.block_size)])
    halves = []
    for half in (cache.keys, cache.values):
        pages = widened(half[:, where])  # (layers, blocks, kv_heads, size, width)
        line = pages.permute(0, 1, 3, 2, 4).reshape(pages.shape[0], -1, pages.shape[2] * pages.shape[4])
        halves.append(np.ascontiguousarray(line[:, start:tokens].numpy()))
    return KeysValues(halves[0], halves[1], start)


def write_cache(cache: Any, table: Sequence[int], kv: KeysValues) -> None:
    """Put keys and values into the blocks of a paged cache, from ``kv.start`` on."""
    size = cache.block_size
    positions = torch.arange(kv.start, kv.start + kv.tokens)
    blocks = torch.tensor(list(table))[positions // size]
    heads = cache.keys.shape[2]
    for half, content in ((cache.keys, kv.keys), (cache.values, kv.values)):
        rows = torch.from_numpy(np.ascontiguousarray(content)).view(content.shape[0], kv.tokens, heads, -1)
        rows = coded(rows) if half.dtype is torch.int8 else rows.to(half.dtype)
        half[:, blocks, :, positions % size] = rows.transpose(0, 1)


def perplexity(model: Any, tokens: Sequence[int], kv: KeysValues | None = None, split: int | None = None) -> float:
    """Perplexity of the tokens behind ``split`` (half by default), given the context as computed, or ``kv``."""
    from hasten.language.speculate.session import Session

    split = len(tokens) // 2 if split is None else split
    session = Session(model.executor, len(tokens))
    if kv is None:
        session.feed(list(tokens[:split]))
    else:
        write_cache(session.cache, session.table, kv.cut(0, split))
        session.done = split
    logits = session.feed(list(tokens[split:-1]), every=True, piece=len(tokens))
    logs = torch.log_softmax(logits.double(), -1)
    following = torch.tensor(list(tokens[split + 1 :]))
    return float(torch.exp(-logs[torch.arange(len(following)), following].mean()))
