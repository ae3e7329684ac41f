"""Bytes: what a model's tensors hold, and what the process took at its peak."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, device, nn

__all__ = ["model_bytes", "packed_bytes", "peak_rss", "resident", "rise", "tensor_bytes"]


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind ``tensors``; a storage that several views share counts once.

    >>> import torch
    >>> x = torch.zeros(4, 8)
    >>> tensor_bytes([x, x.t(), x[0]])
    128
    """
    storages = {}
    for tensor in tensors:
        if tensor.is_mkldnn or tensor.layout is not _strided():
            storages[("opaque", id(tensor))] = tensor.numel() * tensor.element_size()
        else:
            storage = tensor.untyped_storage()
            storages[(str(tensor.device), storage.data_ptr())] = storage.nbytes()
    return sum(storages.values())


def _strided() -> object:
    import torch

    return torch.strided


def model_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, packed weights included (those of a ``weight_bytes`` attribute)."""
    held = tensor_bytes([*model.parameters(), *model.buffers()])
    return held + packed_bytes(model)


def packed_bytes(model: nn.Module) -> int:
    """Bytes of weights that live outside parameters and buffers, as the modules' ``packed_bytes`` state them."""
    stated = (getattr(m, "packed_bytes", 0) for m in model.modules())
    return sum(s for s in stated if isinstance(s, int))


def resident() -> int:
    """Bytes of this process in main memory now; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * resource.getpagesize()


def peak_rss() -> int:
    """Largest number of bytes that this process ever had in main memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rise(call: Callable[[], object], place: device | None = None) -> int:
    """Bytes by which one call lifts the process above where it stood (its peak on Linux, else a lower bound).

    Linux resets the peak on request, so the figure is that of this call; elsewhere an earlier, higher peak hides it. On
    a GPU (``place``) it is what torch's allocator gave at the peak of the call.
    """
    if place is not None and place.type == "cuda":
        from torch import cuda

        cuda.synchronize(place)
        cuda.reset_peak_memory_stats(place)
        stood = cuda.memory_allocated(place)
        call()
        cuda.synchronize(place)
        return max(0, cuda.max_memory_allocated(place) - stood)
    before = resident()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        resets = True
    except OSError:
        resets = False
    call()
    peak = _high_water() if resets else peak_rss()
    return max(0, peak - before)


def _high_water() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return peak_rss()
