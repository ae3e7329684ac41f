"""Operations laid out for the loop: buffers in one arena, packed matrices, the table of whole numbers.

Buffers that are not needed at the same time share their place: what the next operation reads then still lies in the
cache. Constants, inputs and the result keep theirs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from hasten.compress.fused import run
from hasten.compress.fused.adaptive import GATES, TOKENS, room_for_rows
from hasten.compress.fused.attention import room_for
from hasten.compress.fused.lowering import Lowered
from hasten.compress.fused.products import describe_float32
from hasten.compress.fused.values import Buffer, Operation, Value
from hasten.nn.product import bfloat16, dispatch, float32, int8
from hasten.nn.product.blocks import PANEL, aligned
from hasten.nn.product.instructions import pairs_as_floats

__all__ = ["Matrices", "Program"]

_LINE = 16
"""Numbers of a line of memory."""
_STARTS = (10, 16, 22, 28, 34)


class Matrices:
    """Weights packed for one precision, shared by the programs of all shapes."""

    def __init__(self, precision: str) -> None:
        self.precision = precision
        self._held: dict[str, tuple[Any, int, int, str]] = {}
        self._lines: dict[str, Any] = {}

    def packed(self, name: str, weight: Tensor, exact: bool = False) -> tuple[Any, int, int, str]:
        """What the kernel reads, outputs, inputs, and the precision (bfloat16 takes an even number of inputs);
        ``exact``: float32 in any case."""
        if name not in self._held:
            outs, ins = weight.shape
            plain = np.ascontiguousarray(weight.float().numpy())
            precision = "fp32" if exact or (self.precision == "bf16" and ins % 2) else self.precision
            if precision == "bf16":
                bits = np.ascontiguousarray(weight.bfloat16().view(_short()).numpy().view(np.uint16))
                made: Any = bfloat16.pack(bits)
            else:
                made = int8.pack(plain) if precision == "int8" else float32.pack(plain)
            self._held[name] = (made, outs, ins, precision)
        return self._held[name]

    def lines(self, name: str, weight: Tensor) -> Any:
        """What look-ups read, (entries, width) float32; one for all threads, beside their arenas."""
        if name not in self._lines:
            self._lines[name] = np.ascontiguousarray(weight.float().numpy())
        return self._lines[name]

    @property
    def bytes(self) -> int:
        """Bytes of all matrices and of what is looked up."""
        return sum(self.bytes_of(n) for n in self._held) + sum(int(a.nbytes) for a in self._lines.values())

    def unpacked(self, name: str) -> Any:
        """The weight (out, in) float32 that the products use."""
        made, outs, ins, precision = self._held[name]
        if precision == "fp32":
            return float32.unpack(made, outs)
        if precision == "bf16":
            return bfloat16.unpack(made, outs, ins)
        codes, scales = made
        return int8.unpack(codes, scales, outs, ins)

    def precision_of(self, name: str) -> str:
        """fp32, bf16 or int8."""
        return self._held[name][3]

    @property
    def names(self) -> tuple[str, ...]:
        """Of what was packed."""
        return tuple(self._held)

    def bytes_of(self, name: str) -> int:
        """Bytes that a product reads."""
        made = self._held[name][0]
        return sum(a.nbytes for a in made) if isinstance(made, tuple) else int(made.nbytes)


class Program:
    """What :func:`run.run_samples` takes, for one shape of samples."""

    def __init__(self, lowered: Lowered, matrices: Matrices) -> None:
        assert lowered.result is not None
        self.lowered = lowered
        self._starts: dict[Buffer, int] = {}
        self._content: dict[Buffer, int] = {}
        self.size = self._lay_out(lowered)
        self._names = list(lowered.weights)
        self._biases: list[Any] = []
        table: list[list[int]] = []
        rows: list[Any] = []
        self.most_rows = self.widest = 1
        self.room_size = 4 * PANEL
        for operation in lowered.operations:
            self._measure(operation)
            table.append(self._row(operation, matrices, rows, lowered))
        self.table = np.array(table, np.int64).reshape(-1, run.COLUMNS)
        self.numbers = np.array([o.number for o in lowered.operations], np.float32)
        self.matrices = np.array(rows, np.int64).reshape(-1, dispatch.FIELDS)
        self.places = np.array([[self._start(v), v.size] for v in lowered.inputs], np.int64)
        self.result, self.outs = self._start(lowered.result), lowered.result.size

    @property
    def constant_bytes(self) -> int:
        """Of numbers beside the matrices: biases, norms, positions."""
        return 4 * sum(b.size for b in self._content) + sum(int(b.nbytes) for b in self._biases)

    def arena(self) -> Any:
        """Room for one thread, constants filled in."""
        made = aligned((self.size + _LINE,), np.float32)
        for buffer, start in self._content.items():
            assert buffer.content is not None
            made[start : start + buffer.size] = buffer.content.numpy()
        return made

    def room(self) -> Any:
        """What operations of one thread write beside their results."""
        return aligned((self.room_size,), np.float32)

    # --- places ------------------------------------------------------------------------------------------------------

    def _lay_out(self, lowered: Lowered) -> int:
        """A start for each buffer; the numbers in all."""
        lives: dict[Buffer, tuple[int, int]] = {}
        last = len(lowered.operations)
        for at, operation in enumerate(lowered.operations):
            for value in (operation.result, *operation.sources, *operation.extra):
                first = lives.get(value.buffer, (at, at))[0]
                lives[value.buffer] = (first, at)
        for value in lowered.inputs:
            lives[value.buffer] = (-1, last)
        assert lowered.result is not None
        lives[lowered.result.buffer] = (lives.get(lowered.result.buffer, (-1, 0))[0], last)
        size = 0
        for buffer in lives:
            if buffer.content is not None:
                self._starts[buffer] = self._content[buffer] = size
                size += _lines(buffer.size)
        taken: list[tuple[int, int, int]] = []  # (start, end, last use)
        for buffer, (first, end) in sorted(lives.items(), key=lambda item: item[1][0]):
            if buffer.content is not None:
                continue
            taken = sorted(t for t in taken if t[2] >= first)
            at, wanted = size, _lines(buffer.size)
            for start, stop, _ in taken:
                if start - at >= wanted:
                    break
                at = max(at, stop)
            self._starts[buffer] = at
            taken.append((at, at + wanted, end))
        return max((start + _lines(b.size) for b, start in self._starts.items()), default=0)

    def _start(self, value: Value) -> int:
        return int(self._starts[value.buffer] + value.start)

    # --- tables ------------------------------------------------------------------------------------------------------

    def _measure(self, operation: Operation) -> None:
        sizes = operation.sizes
        if operation.kind == run.PRODUCT:
            self.most_rows, self.widest = max(self.most_rows, sizes[0]), max(self.widest, _lines(sizes[1]))
            needed = sizes[0] * PANEL
        elif operation.kind == run.ATTENTION:
            needed = room_for(sizes[2], sizes[3], sizes[4])
        elif operation.kind == run.MATMUL:
            needed = sizes[3] * sizes[4]
        elif operation.kind == run.LOOKUP:
            needed = 0
        elif operation.kind == run.ADAPTIVE:
            rows, width, count, size, gate = sizes
            self.most_rows = max(self.most_rows, min(rows, TOKENS))
            self.widest = max(self.widest, _lines(max(width, size, gate)))
            needed = room_for_rows(rows, width, size, gate, (count - GATES) // 2 + 1)
        else:
            needed = 4 * _lines(sizes[-1])
        self.room_size = max(self.room_size, needed)

    def _row(self, operation: Operation, matrices: Matrices, rows: list[Any], lowered: Lowered) -> list[int]:
        row = [0] * run.COLUMNS
        row[0], row[1], row[2], row[4] = operation.kind, operation.code, operation.flag, -1
        row[5 : 5 + len(operation.sizes)] = operation.sizes
        for value, strides, at in zip((operation.result, *operation.sources), operation.strides, _STARTS, strict=False):
            row[at] = self._start(value)
            row[at + 1 : at + 1 + len(strides)] = strides
        if operation.kind == run.PRODUCT:
            row[3] = len(rows)
            rows.append(self._matrix(matrices, operation.matrix, lowered.weights[operation.matrix], operation.bias))
        elif operation.kind == run.LOOKUP:
            row[4] = matrices.lines(operation.matrix, lowered.weights[operation.matrix]).ctypes.data
        elif operation.kind == run.ADAPTIVE:
            row[3] = len(rows)
            rows += [
                self._matrix(matrices, name, lowered.weights[name], bias, exact)
                for name, bias, exact in operation.matrices
            ]
        elif operation.kind == run.NORM:  # which of weight and bias are there says the code
            given = iter(operation.extra)
            row[_STARTS[2]], row[_STARTS[3]] = (
                self._start(next(given)) if operation.code >> bit & 1 else -1 for bit in range(2)
            )
        elif operation.kind == run.ATTENTION:
            row[40] = operation.code
            if len(operation.sources) < 4:
                row[_STARTS[4]] = -1
        return row

    def _matrix(
        self, matrices: Matrices, name: str, weight: Tensor, given: Value | None, exact: bool = False
    ) -> Any:  # fmt: skip
        packed, outs, ins, precision = matrices.packed(name, weight, exact)
        bias = None
        if given is not None:
            content = given.buffer.content
            assert content is not None
            bias = np.ascontiguousarray(content.numpy())
            self._biases.append(bias)
        if precision != "fp32":
            form = "bf16-floats" if precision == "bf16" and pairs_as_floats() else precision
            return dispatch.describe(form, packed, bias, outs, ins)
        return describe_float32(packed, bias, outs, ins)


def _lines(count: int) -> int:
    return -(-count // _LINE) * _LINE


def _short() -> Any:
    import torch

    return torch.int16
