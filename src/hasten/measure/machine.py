"""Which machine measured: a fingerprint that travels with every number.

The *hash* covers what decides speed and does not change between two runs (processor, cores this process may use,
instruction sets, memory, torch, its BLAS, its threads); the load and the time do not enter it. Cached measurements are
filed under the hash, so a new machine or a new torch measures again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Machine", "busy", "load_average", "waited"]

_ISA = (
    "avx", "avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_bf16", "amx_int8", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip


def load_average() -> float | None:
    """Runnable processes over the last minute, or None where the system does not tell."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None


def waited() -> float | None:
    """Seconds that this process's threads have stood ready without a core, added up; None where Linux does not tell.

    Between two calls it grows by what other work took: unlike a load average it leaves out the process's own.
    """
    total = 0
    try:
        for task in os.scandir("/proc/self/task"):
            with contextlib.suppress(OSError):  # the thread has ended
                total += int(Path(task.path, "schedstat").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return total / 1e9


def _cpuinfo() -> tuple[str, tuple[str, ...]]:
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), ()
    model = re.search(r"^(?:model name|Processor|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(flags.group(1).split()) if flags else set()
    return (model.group(1).strip() if model else platform.machine()), tuple(f for f in _ISA if f in present)


def _memory() -> int:
    """Bytes of main memory; inside a container, its limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total


def _cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def busy() -> bool:
    """Whether other work shares the cores so heavily that a measurement is not worth keeping.

    True when the load average is over one and a half runnable processes per core.
    """
    load = load_average()
    return load is not None and load > 1.5 * _cores()


@dataclass(frozen=True)
class Machine:
    """What decides speed here.

    >>> machine = Machine.detect()
    >>> machine.hash == Machine.detect().hash, len(machine.hash)
    (True, 16)
    """

    cpu: str
    """model name of the processor"""
    architecture: str
    """x86_64, aarch64, …"""
    cores: int
    """cores that this process may use"""
    isa: tuple[str, ...]
    """instruction sets that matter for linear algebra"""
    memory: int
    """bytes of main memory, or the container's limit"""
    system: str
    """operating system and its release"""
    python: str
    """version of Python"""
    torch: str
    """version of torch"""
    blas: str
    """the linear algebra behind torch: MKL, OpenBLAS, … and oneDNN's presence"""
    threads: int
    """threads that torch uses inside one operation"""
    accelerators: tuple[str, ...] = ()
    """names of the CUDA devices"""
    load: float | None = None
    """load average of the last minute when this was read; not part of the hash"""

    @classmethod
    def detect(cls) -> Machine:
        """Read this machine; a few milliseconds once torch is imported."""
        import torch

        from hasten.measure.device import cuda_names

        cpu, isa = _cpuinfo()
        info = torch.__config__.show()
        blas = re.search(r"BLAS_INFO=(\w+)", info)
        name = blas.group(1) if blas else "unknown"
        if torch.backends.mkldnn.is_available():
            name += "+onednn"
        return cls(
            cpu=cpu,
            architecture=platform.machine(),
            cores=_cores(),
            isa=isa,
            memory=_memory(),
            system=f"{platform.system()} {platform.release()}",
            python=platform.python_version(),
            torch=torch.__version__,
            blas=name,
            threads=torch.get_num_threads(),
            accelerators=cuda_names(),
            load=load_average(),
        )

    @property
    def hash(self) -> str:
        """16 hexadecimal digits over everything but the load and the operating system's release."""
        facts = {k: v for k, v in self._facts().items() if k not in ("load", "system", "python")}
        return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Another name of :attr:`hash`."""
        return self.hash

    def _facts(self) -> dict[str, Any]:
        return {
            "cpu": self.cpu,
            "architecture": self.architecture,
            "cores": self.cores,
            "isa": list(self.isa),
            "memory": self.memory,
            "system": self.system,
            "python": self.python,
            "torch": self.torch,
            "blas": self.blas,
            "threads": self.threads,
            "accelerators": list(self.accelerators),
            "load": self.load,
        }

    def to_json(self) -> dict[str, Any]:
        """Every fact and the hash."""
        return {**self._facts(), "hash": self.hash}

    def __str__(self) -> str:
        gpu = f", {', '.join(self.accelerators)}" if self.accelerators else ""
        load = f", load {self.load:.2f}" if self.load is not None else ""
        return (
            f"{self.cpu}, {self.cores} cores ({self.threads} threads), {self.memory / 2**30:.1f} GiB{gpu}, "
            f"torch {self.torch} ({self.blas}){load}"
        )
