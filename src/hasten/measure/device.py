"""Where a model can run: the host and the CUDA devices that torch sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hasten.errors import ConfigurationError

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Device", "cuda_names", "detect", "lies_on", "resolve", "synchronise"]


@dataclass(frozen=True)
class Device:
    """One place to run.

    >>> detect()[0].name
    'cpu'
    """

    name: str
    """torch's name: cpu, cuda:0, …"""
    description: str
    """model name"""
    memory: int
    """bytes"""
    dtypes: tuple[str, ...]
    """number formats with hardware support for matrix products"""


def cuda_names() -> tuple[str, ...]:
    """Names of the CUDA devices; empty where there are none. Touches no device."""
    import torch

    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def detect() -> list[Device]:
    """The host first, then every CUDA device."""
    import torch

    from hasten.measure.machine import Machine

    machine = Machine.detect()
    dtypes = ["float32"]
    if any(flag in machine.isa for flag in ("avx512_bf16", "amx_bf16", "bf16")):
        dtypes.append("bfloat16")
    if any(flag in machine.isa for flag in ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")):
        dtypes.append("int8")
    found = [Device("cpu", machine.cpu, machine.memory, tuple(dtypes))]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        formats = ["float32", "float16"]
        if properties.major >= 8:
            formats += ["bfloat16", "int8"]
        if (properties.major, properties.minor) >= (8, 9):
            formats.append("float8_e4m3fn")
        found.append(Device(f"cuda:{index}", properties.name, properties.total_memory, tuple(formats)))
    return found


def resolve(name: str) -> torch.device:
    """torch's device ``name``; raises :class:`~hasten.errors.ConfigurationError` where this machine has none such."""
    import torch

    known = [d.name for d in detect()]
    wanted = "cuda:0" if name == "cuda" else name
    if wanted not in known:
        raise ConfigurationError(f"device {name!r} is not here; this machine has {', '.join(known)}")
    return torch.device(wanted)


def synchronise(device: torch.device | str) -> None:
    """Wait until everything queued on ``device`` is done; on the host there is nothing to wait for."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def lies_on(model: nn.Module) -> torch.device | None:
    """The device of a model's parameters and buffers, None where it has none.

    Raises :class:`~hasten.errors.ConfigurationError` where they are on several.

    >>> import torch
    >>> lies_on(torch.nn.Linear(2, 2)), lies_on(torch.nn.ReLU())
    (device(type='cpu'), None)
    """
    import itertools

    found = {t.device for t in itertools.chain(model.parameters(), model.buffers())}
    if len(found) > 1:
        told = ", ".join(sorted(map(str, found)))
        raise ConfigurationError(f"the model lies on several devices ({told}); move all of it to one")
    return next(iter(found), None)
