"""Operations laid out for the loop: places of values in the arena, packed weights, the two tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hasten.compress.int8 import run
from hasten.compress.int8.lowering import Lowered
from hasten.compress.int8.operations import Convolution, Joined, Mean, Operation, Pool, Shortcut, Value
from hasten.nn.product.blocks import aligned
from hasten.nn.product.convolution import pack, panel_widths

__all__ = ["Place", "Program"]

_LINE = 64


@dataclass(frozen=True)
class Place:
    """Where a value lies: the byte of its first inner place, bytes of a line, bytes of a place."""

    start: int
    line: int
    held: int


class Program:
    """What :func:`run.run_batch` takes, made once for one shape of images."""

    def __init__(self, lowered: Lowered) -> None:
        self.lowered = lowered
        self.places: dict[int, Place] = {}
        self._borders: list[tuple[int, int, int]] = []
        size = self._lay_out()
        self.arena = aligned((size + _LINE,), np.uint8)
        for start, count, zero in self._borders:
            self.arena[start : start + count] = zero
        weights, params, rows, numbers = [], [], [], []
        self._weights_at = self._params_at = 0
        self.macs = 0
        for operation in lowered.operations:
            packed, some = self._constants(operation)
            rows.append(self._row(operation))
            numbers.append(self._numbers(operation))
            weights.append(packed)
            params.append(some)
            self._weights_at += packed.size
            self._params_at += some.size
        self.weights = aligned((max(1, self._weights_at),), np.int8)
        self.weights[: self._weights_at] = np.concatenate(weights)
        self.params = np.concatenate([*params, np.zeros(1, np.float32)])
        self.table = np.array(rows, np.int64)
        self.numbers = np.array(numbers, np.float32)
        self.sums_size = max(
            64, *(max(o.shape[1], 16) * 64 for o in lowered.operations), *(o.shape[2] for o in lowered.operations)
        )
        entry = lowered.entry
        place = self.places[id(entry)]
        self.entry = np.array([place.start, place.line, place.held], np.int64)
        self.inverse, self.zero = np.float32(1 / entry.scale), np.float32(entry.zero)
        self.floats = int(np.prod(lowered.operations[-1].shape)) if lowered.output is None else 0

    @property
    def num_bytes(self) -> int:
        """Of the weights and what scales their sums."""
        return int(self.weights.nbytes + self.params.nbytes)

    def arenas(self, count: int) -> Any:
        """A copy of the arena for each thread, borders filled."""
        made = aligned((count, -(-self.arena.size // _LINE) * _LINE), np.uint8)
        made[:, : self.arena.size] = self.arena
        return made

    # --- values ------------------------------------------------------------------------------------------------------

    def _lay_out(self) -> int:
        at = 0
        values = [self.lowered.entry, *(o.result for o in self.lowered.operations if o.result is not None)]
        for value in values:
            held = -(-value.channels // 4) * 4
            line = (value.width + 2 * value.border) * held
            count = (value.height + 2 * value.border) * line
            # The last block of a line may read a few words past it; another value's bytes there change nothing.
            self.places[id(value)] = Place(at + value.border * (line + held), line, held)
            self._borders.append((at, count, value.zero))
            at = -(-(at + count) // _LINE) * _LINE
        return at

    # --- tables ------------------------------------------------------------------------------------------------------

    def _constants(self, operation: Operation) -> tuple[Any, Any]:
        if not isinstance(operation, Convolution):
            return np.zeros(0, np.int8), np.zeros(0, np.float32)
        source, weight = operation.source, operation.weight
        total = weight.astype(np.int64).reshape(len(weight), -1).sum(1)
        scale = operation.weight_scale * source.scale
        bias = operation.bias - total * source.zero * scale
        self.macs += int(weight[0].size * np.prod(operation.shape))
        params = np.concatenate([scale, bias]).astype(np.float32)
        if operation.depthwise:
            packed = weight[:, 0].transpose(1, 2, 0).reshape(-1)
            return np.pad(packed, (0, -packed.size % _LINE)), params
        return pack(weight), params

    def _row(self, operation: Operation) -> list[int]:
        source = self.places[id(operation.source)]
        height, width, outputs = operation.shape
        row = dict.fromkeys(run.FIELDS, 0) | {
            "source": source.start, "source_line": source.line, "source_channels": source.held, "height": height,
            "width": width, "outputs": outputs, "weights": self._weights_at, "params": self._params_at,
            "shortcut": -1, "floats": -1, "padded": sum(panel_widths(outputs)),
        }  # fmt: skip
        if operation.result is None:
            row["floats"] = 0
        else:
            result = self.places[id(operation.result)]
            row |= {"result": result.start, "result_line": result.line, "result_channels": result.held}
        if isinstance(operation, Convolution):
            _, _, rows, columns = operation.weight.shape
            back = operation.padding * (source.line + source.held)
            row |= {
                "kind": run.DEPTHWISE if operation.depthwise else run.CONVOLUTION, "source": source.start - back,
                "rows": rows, "quads": columns * source.held // 4, "stride": operation.stride, "window": columns,
            }  # fmt: skip
            row |= self._shortcut(operation.shortcut)
        elif isinstance(operation, Pool):
            back = operation.padding * (source.line + source.held)
            row |= {
                "kind": run.POOL, "source": source.start - back, "rows": operation.window,
                "window": operation.window, "stride": operation.stride,
            }  # fmt: skip
        elif isinstance(operation, Mean):
            row |= {"kind": run.MEAN, "rows": operation.source.height, "window": operation.source.width}
        elif isinstance(operation, Joined):
            row |= {"kind": run.JOINED} | self._shortcut(operation.shortcut)
        return [row[name] for name in run.FIELDS]

    def _shortcut(self, shortcut: Shortcut | None) -> dict[str, int]:
        if shortcut is None:
            return {}
        place = self.places[id(shortcut.value)]
        return {
            "shortcut": place.start, "shortcut_line": place.line, "shortcut_channels": place.held,
            "shortcut_stride": shortcut.stride, "shortcut_offset": shortcut.offset,
            "shortcut_held": shortcut.value.channels,
        }  # fmt: skip

    def _numbers(self, operation: Operation) -> list[float]:
        low, high = getattr(operation, "low", -np.inf), getattr(operation, "high", np.inf)
        some = dict.fromkeys(run.NUMBERS, 0.0) | {"low": low, "high": high}
        result: Value | None = operation.result
        if result is not None:
            some |= {"inverse": 1 / result.scale, "zero": result.zero}
            some["low"] = max(0.0, result.zero + low / result.scale) if np.isfinite(low) else 0.0
            some["high"] = min(255.0, float(np.rint(result.zero + high / result.scale))) if np.isfinite(high) else 255.0
        shortcut: Shortcut | None = getattr(operation, "shortcut", None)
        if shortcut is not None:
            some |= {"shortcut_scale": shortcut.value.scale, "shortcut_zero": shortcut.value.zero}
        some |= {"source_scale": operation.source.scale, "source_zero": operation.source.zero}
        return [some[name] for name in run.NUMBERS]
