"""Steps on a GPU: decode batches replay a CUDA graph, other batches are launched kernel by kernel.

A decode step of a small model is hundreds of launches of a few microseconds each, more than its arithmetic. A batch in
which every sequence has one token is therefore padded to the next size of a short list and replayed from a graph
captured once; what describes the batch reaches the graph's buffers in one copy. Rows that pad repeat the first
sequence: they write the numbers that it writes, to the same place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hasten.language.kernels_triton import Step, prepare
from hasten.language.ragged import RaggedBatch

if TYPE_CHECKING:
    from hasten.language.executor import Executor, KVCache

__all__ = ["GpuSteps", "padded_count"]

_COUNTS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_NARROWEST = 64
"""blocks of the smallest captured block table"""


def padded_count(count: int) -> int | None:
    """The captured size that holds ``count`` sequences; None above the largest.

    >>> padded_count(5), padded_count(300)
    (8, None)
    """
    return next((c for c in _COUNTS if c >= count), None)


@dataclass
class _Captured:
    graph: Any
    packed: Tensor
    """(count * (2 + blocks),) int32: tokens, positions, block tables"""
    order: Tensor
    """(count,) int32; the graph reads it, so it lives as long"""
    logits: Tensor


class GpuSteps:
    """Runs the steps of an executor on its GPU.

    Contract: calls must not overlap; the cache handed in is read and written in place, so graphs belong to one cache
    and are captured anew for another.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._graphs: dict[tuple[int, int], _Captured] = {}
        self._cache_at = 0
        self._pool: Any = None
        mixture = executor.config.num_experts  # which experts run is known on the host only
        self.captures = executor.device.type == "cuda" and not mixture

    def step(self, batch: RaggedBatch, cache: KVCache) -> Tensor:
        """As :meth:`Executor.step`."""
        executor = self._executor
        if batch.special:
            from hasten.errors import ConfigurationError

            raise ConfigurationError("trees of guesses run on the CPU; on another device use a chain")
        count = batch.num_chunks
        decodes = count > 0 and batch.num_tokens == count == batch.logit_rows.shape[0]
        if self.captures and decodes and padded_count(count) is not None:
            return self._replay(batch, cache)
        step = prepare(batch, executor.device)
        return self._fetched(self._run(step, cache))

    def _run(self, step: Step, cache: KVCache) -> Tensor:
        executor = self._executor
        return executor.layers(executor.embed(step.tokens), cache, step.wanted, *executor.operations(step))

    def _fetched(self, logits: Tensor) -> Tensor:
        if not logits.is_cuda:  # no logits are wanted; a step is over all the same when it returns
            if self._executor.device.type == "cuda":
                torch.cuda.current_stream().synchronize()
            return logits
        out = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True)
        out.copy_(logits, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        return out

    def _replay(self, batch: RaggedBatch, cache: KVCache) -> Tensor:
        count, blocks = batch.num_chunks, batch.block_tables.shape[1]
        rows = padded_count(count) or count
        columns = max(_NARROWEST, 1 << (blocks - 1).bit_length())
        if cache.keys.data_ptr() != self._cache_at:
            self._graphs.clear()
            self._cache_at = cache.keys.data_ptr()
        held = self._graphs.get((rows, columns))
        if held is None:
            held = self._graphs[rows, columns] = self._capture(rows, columns, cache)
        host = torch.empty(rows * (2 + columns), dtype=torch.int32, pin_memory=True)
        view = host.numpy()
        order = np.arange(rows)
        order[count:] = 0
        view[:rows] = batch.tokens.numpy()[order]
        view[rows : 2 * rows] = batch.positions.numpy()[order]
        tables = view[2 * rows :].reshape(rows, columns)
        tables[:, :blocks] = batch.block_tables.numpy()[order]
        held.packed.copy_(host, non_blocking=True)
        held.graph.replay()
        # The order of the wanted rows is that of the batch, which may differ from that of the chunks.
        logits = self._fetched(held.logits[:count])
        wanted = batch.logit_rows
        return logits if torch.equal(wanted, torch.arange(count)) else logits[wanted]

    def _capture(self, rows: int, columns: int, cache: KVCache) -> _Captured:
        device = self._executor.device
        packed = torch.zeros(rows * (2 + columns), dtype=torch.int32, device=device)
        order = torch.arange(rows, dtype=torch.int32, device=device)

        def run() -> Tensor:
            step = Step(
                packed[:rows], packed[rows : 2 * rows], order, packed[2 * rows :].view(rows, columns), order, None
            )
            return self._run(step, cache)

        # Warming up writes a key and a value of token 0 to slot 0 of block 0; what stands there is kept.
        slot = (slice(None), 0, slice(None), 0)
        before = cache.keys[slot].clone(), cache.values[slot].clone()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = run()
        self._pool = graph.pool()
        cache.keys[slot], cache.values[slot] = before
        return _Captured(graph, packed, order, logits)
