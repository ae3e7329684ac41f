"""What this machine can do at best: bytes per second from memory, operations per second of a matrix product.

Both are measured, never looked up: a read of a buffer far larger than the caches, a copy, a cache-sized read, and a
square matrix product per number format. The result is filed under the machine's fingerprint in the user's cache folder.
The best of several rounds counts, since a ceiling is what is wanted.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hasten.clock import Clock, MonotonicClock
from hasten.errors import DataError
from hasten.files import write_text
from hasten.measure.cache import cache_folder
from hasten.measure.machine import Machine, busy

__all__ = ["Ceilings", "measure_ceilings"]

_VERSION = 2
_FORMATS = ("float32", "bfloat16", "float16", "int8")


@dataclass(frozen=True)
class Ceilings:
    """The roofs of one device.

    >>> roofs = Ceilings("cpu", read=30e9, copy=20e9, rates={"float32": 1e11})
    >>> Ceilings.from_json(roofs.to_json()) == roofs
    True
    """

    device: str
    """cpu, cuda:0, …"""
    read: float
    """bytes per second when a large buffer is read once"""
    copy: float
    """bytes per second of a large copy, read and written bytes together"""
    rates: dict[str, float]
    """operations per second (a multiply-add is two) of a matrix product, by number format"""
    machine: str = ""
    """hash of the machine"""

    def rate(self, dtype: str) -> float:
        """Operations per second for ``dtype``; a format that was not measured counts as float32."""
        return self.rates.get(dtype, self.rates["float32"])

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "device": self.device,
            "read": self.read,
            "copy": self.copy,
            "rates": dict(self.rates),
            "machine": self.machine,
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Ceilings:
        """The inverse of :meth:`to_json`. Raises ``KeyError`` or ``TypeError`` for anything else."""
        rates = {str(k): float(v) for k, v in document["rates"].items()}
        if "float32" not in rates:
            raise KeyError("rates of float32")
        return cls(
            str(document["device"]),
            float(document["read"]),
            float(document["copy"]),
            rates,
            str(document.get("machine", "")),
        )


def _best(call: Callable[[], object], clock: Clock, limit: float, rounds: int = 12) -> float:
    """Shortest of up to ``rounds`` calls within ``limit`` seconds; the first call warms up and does not count."""
    call()
    best, began = float("inf"), clock.now()
    for _ in range(rounds):
        begin = clock.now()
        call()
        end = clock.now()
        best = min(best, end - begin)
        if end - began > limit:
            break
    return best


def _measure(
    device: str, clock: Clock, size: int, width: int, limit: float, told: Callable[[str, float], None]
) -> Ceilings:

    from hasten.measure.device import synchronise

    def timed(call: Callable[[], object]) -> float:
        def whole() -> None:
            call()
            synchronise(device)

        return _best(whole, clock, limit)

    told("memory bandwidth", 0.0)
    read, copy = _memory_rates(device, size, timed)
    rates: dict[str, float] = {}
    for index, name in enumerate(_FORMATS):
        told(f"matrix rate, {name}", (index + 1) / (len(_FORMATS) + 1))
        rate = _matrix_rate(name, device, width, timed)
        if rate is not None:
            rates[name] = rate
    told("done", 1.0)
    return Ceilings(device, read, copy, rates, Machine.detect().hash)


def _memory_rates(device: str, size: int, timed: Callable[[Callable[[], object]], float]) -> tuple[float, float]:
    """Bytes per second of a read and of a copy of ``size`` bytes."""
    import torch

    buffer = torch.ones(size // 4, dtype=torch.float32, device=device)
    rows, vector = buffer.view(-1, 1024), torch.ones(1024, dtype=torch.float32, device=device)
    # A matrix-vector product reads as a model does; the better of the two is the roof.
    read = size / min(timed(buffer.sum), timed(lambda: torch.mv(rows, vector)))
    target = torch.empty_like(buffer)
    return read, 2 * size / timed(lambda: target.copy_(buffer))


def _matrix_rate(name: str, device: str, width: int, timed: Callable[[Callable[[], object]], float]) -> float | None:
    """Operations per second of a square product, or None where the format has no kernel here."""
    import torch

    work = 2.0 * width**3
    try:
        if name == "int8":
            a = torch.randint(-8, 8, (width, width), dtype=torch.int8, device=device)
            b = a.t().contiguous().t()
            return work / timed(lambda: torch._int_mm(a, b))
        dtype = getattr(torch, name)
        x = torch.randn(width, width, device=device).to(dtype)
        if device == "cpu" and dtype != torch.float32:
            # A packed weight shows what the format can do; a plain product would repack it each time.
            packed = torch.ops.mkldnn._reorder_linear_weight(x, width)
            return work / timed(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
        return work / timed(lambda: x @ x)
    except (RuntimeError, NotImplementedError):
        return None


def measure_ceilings(
    device: str = "cpu",
    *,
    clock: Clock | None = None,
    refresh: bool = False,
    size: int = 256 * 2**20,
    width: int = 1536,
    limit: float = 0.6,
    progress: Callable[[str, float], None] | None = None,
) -> Ceilings:
    """The roofs of ``device``, from the cache or measured now (about three seconds).

    ``size`` bytes of buffer, ``width`` of the square matrices, ``limit`` seconds per quantity. An unreadable cache file
    is measured over, and a cache that cannot be written only costs the next run its time. On a busy machine the result
    is used but not kept.
    """
    machine = Machine.detect()
    path = cache_folder() / "ceilings" / f"{machine.hash}-{device.replace(':', '-')}-v{_VERSION}.json"
    if not refresh:
        # absent or unreadable: measured below, and written anew
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            return Ceilings.from_json(json.loads(path.read_text()))
    roofs = _measure(device, clock or MonotonicClock(), size, width, limit, progress or (lambda stage, share: None))
    if not busy():
        with contextlib.suppress(DataError):
            write_text(path, json.dumps(roofs.to_json()) + "\n")
    return roofs
