"""Linear layers through torch's kernels and our own, and a measured table of which one is fastest on a device.

No kernel wins everywhere: a packed bf16 weight is best for one shape and batch, int8 with int8 activations for another,
and a 4-bit weight may lose outright at 16 tokens. So the choice is measured, per (out, in) and number of tokens,
with all candidates interleaved in one run; the table is filed under the machine's fingerprint, that of a GPU under its
name (:mod:`hasten.compress.kernels_cuda`), and under a stamp of our own kernels' code: others are measured again.

Each kernel states the relative error of its result against float32 for normally distributed weights and inputs,
``‖y - x Wᵀ‖ / ‖x Wᵀ‖``; the tests hold it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hasten.clock import Clock, MonotonicClock
from hasten.compress.packed import LinearKernel, Packed
from hasten.compress.panels import panel_kernels, panel_product, takes
from hasten.errors import ConfigurationError, DataError
from hasten.files import write_text
from hasten.kernel_cache import stamp_of
from hasten.measure.cache import cache_folder
from hasten.measure.latency import Protocol, compare
from hasten.measure.machine import Machine, busy

__all__ = [
    "GROUP_SIZES",
    "LinearKernel",
    "Packed",
    "available",
    "fastest",
    "kernel",
    "measure_kernels",
    "quantise_groups",
    "quantized_product",
]

GROUP_SIZES = (32, 64, 128, 256)
_ROOT = Path(__file__).resolve().parents[1]
_PRODUCTS = _ROOT / "nn" / "product" / "dispatch.py"
"""Where all of our CPU kernels come together."""


def _quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric 8-bit per output row: (out, in) -> int8 (out, in), float32 scales (out,)."""
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
    return torch.round(weight / scale[:, None]).clamp(-127, 127).to(torch.int8), scale


def quantise_groups(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Affine 4-bit per group of inputs: codes int32 (out, in) in 0 … 15, scale and offset (in / group, out).

    A code q stands for ``(q - 8) * scale + offset``. Scale and offset are rounded to bf16 first, since that is what the
    kernel reads; the codes then make up for their rounding.
    """
    weight = weight.detach().float()
    out, inner = weight.shape
    groups = weight.view(out, inner // group, group)
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    scale = ((high - low) / 15).clamp(min=1e-12).bfloat16().float()
    offset = (low + 8 * scale).bfloat16().float()
    codes = torch.round((groups - offset[..., None]) / scale[..., None]) + 8
    return codes.clamp(0, 15).to(torch.int32).view(out, inner), scale.t().contiguous(), offset.t().contiguous()


def _plain(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "pack": lambda w: Packed((w.detach().to(dtype, copy=True).contiguous(),), (w.shape[0], w.shape[1])),
        "run": lambda x, p: functional.linear(x.to(dtype), p.tensors[0]).to(x.dtype),
        "unpack": lambda p: p.tensors[0].float(),
        "supports": lambda out, inner: True,
    }


def _pack_bf16(weight: Tensor) -> Packed:
    plain = weight.detach().to(torch.bfloat16).contiguous()
    return Packed((torch.ops.mkldnn._reorder_linear_weight(plain, 1),), (weight.shape[0], weight.shape[1]))


def _run_bf16(x: Tensor, packed: Packed) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(torch.bfloat16), packed.tensors[0], None, "none", [], "")
    return result.to(x.dtype)


def _pack_rows(weight: Tensor) -> Packed:
    codes, scale = _quantise_rows(weight)
    return Packed((codes, scale), (weight.shape[0], weight.shape[1]))


def _run_rows_bf16(x: Tensor, packed: Packed) -> Tensor:
    codes, scale = packed.tensors
    result = torch.ops.aten._weight_int8pack_mm(x.to(torch.bfloat16).contiguous(), codes, scale.to(torch.bfloat16))
    return result.to(x.dtype)  # type: ignore[no-any-return]


def _run_rows_dynamic(x: Tensor, packed: Packed) -> Tensor:
    codes, scale = packed.tensors
    step = x.abs().amax(dim=1, keepdim=True).float().clamp_(min=1e-12).mul_(1 / 127)
    product = torch._int_mm(torch.round(x / step).to(torch.int8), codes.t())
    return (product * step).mul_(scale).to(x.dtype)


def _pack_groups(group: int) -> Callable[[Tensor], Packed]:
    def pack(weight: Tensor) -> Packed:
        codes, scale, offset = quantise_groups(weight, group)
        stored = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        both = torch.stack([scale, offset], dim=-1).to(torch.bfloat16).contiguous()
        return Packed((stored, both), (weight.shape[0], weight.shape[1]), group)

    return pack


def _run_groups(x: Tensor, packed: Packed) -> Tensor:
    stored, both = packed.tensors
    rows = x.to(torch.bfloat16).contiguous()
    result = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, stored, packed.group, both)
    return result.to(x.dtype)  # type: ignore[no-any-return]


def _unpack_groups(packed: Packed) -> Tensor:
    """Through the kernel itself, exactly: a row of the identity picks a column of the weight."""
    columns = _run_groups(torch.eye(packed.shape[1], dtype=torch.bfloat16), packed)
    return columns.float().t().contiguous()


def _sixteens(out: int, inner: int) -> bool:
    """The quantised kernels read whole vectors; other sizes are refused, since torch does not check them all."""
    return out % 16 == 0 and inner % 32 == 0


Place = str | torch.device


def available(device: Place = "cpu") -> list[LinearKernel]:
    """The kernels that work on ``device``: each has computed a small product within its error bound.

    The first call takes a few milliseconds on the CPU, and on a GPU what compiling takes; the list is the same
    afterwards. Raises :class:`~hasten.errors.ConfigurationError` for a device that is not here.
    """
    return _available(_placed(device))


@lru_cache(maxsize=32)
def _placed(device: Place) -> torch.device:
    """The device with its number. Raises :class:`~hasten.errors.ConfigurationError` where there is none such."""
    if str(device) == "cpu":
        return torch.device("cpu")
    from hasten.measure.device import resolve

    return resolve(str(device)) if str(device) != "cuda" else torch.device(resolve("cuda").type, 0)


@lru_cache(maxsize=8)
def _available(device: torch.device) -> list[LinearKernel]:
    if device.type == "cuda":
        from hasten.compress.kernels_cuda import cuda_kernels

        tried: dict[tuple[str, ...], bool] = {}
        return [k for k in cuda_kernels() if _works(k, device, tried)]
    return [k for k in _cpu_kernels() if _works(k, device)]


def _cpu_kernels() -> list[LinearKernel]:
    return [
        LinearKernel("fp32", "fp32", error=1e-5, **_plain(torch.float32)),
        LinearKernel("bf16", "bf16", error=6e-3, **_plain(torch.bfloat16)),
        LinearKernel(
            "bf16-packed",
            "bf16",
            _pack_bf16,
            _run_bf16,
            lambda p: p.tensors[0].to_dense().float(),
            6e-3,
            lambda out, inner: True,
        ),
        LinearKernel(
            "int8-weight",
            "int8",
            _pack_rows,
            _run_rows_bf16,
            lambda p: p.tensors[0].float() * p.tensors[1][:, None],
            1.5e-2,
            _sixteens,
        ),
        LinearKernel(
            "int8-dynamic",
            "int8",
            _pack_rows,
            _run_rows_dynamic,
            lambda p: p.tensors[0].float() * p.tensors[1][:, None],
            2e-2,
            _sixteens,
        ),
        *panel_kernels(),
        *(
            LinearKernel(
                f"int4-g{group}",
                "int4",
                _pack_groups(group),
                _run_groups,
                _unpack_groups,
                0.13,
                lambda out, inner, group=group: _sixteens(out, inner) and inner % group == 0,  # type: ignore[misc]
            )
            for group in GROUP_SIZES
        ),
    ]


def _works(candidate: LinearKernel, device: torch.device, tried: dict[tuple[str, ...], bool] | None = None) -> bool:
    """Whether a small product is within the bound; ``tried`` holds what is known of kernels that differ only in the
    group."""
    kind = tuple(part for part in candidate.name.split("-") if part != f"g{candidate.group}")
    if tried is not None and kind in tried:
        return tried[kind]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=generator).to(device)
    x = torch.randn(4, 256, generator=generator).to(device)
    # A compiler says in its own ways that a processor lacks an instruction; on the CPU only torch refuses.
    refusals = (RuntimeError, NotImplementedError, AttributeError) if device.type == "cpu" else (Exception,)
    try:
        got = candidate.run(x, candidate.pack(weight))
        expected = x @ weight.t()
        works = bool((got - expected).norm() <= 2 * candidate.error * expected.norm())
    except refusals:
        works = False
    if tried is not None:
        tried[kind] = works
    return works


def kernel(name: str, device: Place = "cpu") -> LinearKernel:
    """The kernel ``name``; raises :class:`~hasten.errors.ConfigurationError` where ``device`` lacks it."""
    for candidate in available(device):
        if candidate.name == name:
            return candidate
    here = "here" if str(device) == "cpu" else f"on {device}"
    raise ConfigurationError(
        f"no kernel {name!r} {here}; this machine has {', '.join(k.name for k in available(device))}"
    )


Table = dict[str, dict[str, float]]
_TABLES: dict[str, Table] = {}
_LOADED_FROM: list[str] = []


@lru_cache(maxsize=8)
def _fingerprint(threads: int) -> str:
    """Hash of the machine; threads enter it, and everything else stays while the process lives."""
    return Machine.detect().hash


def _table_path(device: torch.device | None = None) -> Path:
    if device is not None and device.type == "cuda":
        from hasten.compress.kernels_cuda import table_name

        return cache_folder() / "kernels" / f"{table_name(device)}.json"
    name = f"{_fingerprint(torch.get_num_threads())}-{stamp_of(_PRODUCTS, _ROOT)}"
    return cache_folder() / "kernels" / f"{name}.json"


def _load_table(device: torch.device) -> tuple[Path, Table]:
    """The cached table of a device, read once per place; a broken file counts as empty."""
    path = _table_path(device)
    if str(path) not in _LOADED_FROM:
        _LOADED_FROM.append(str(path))
        table = _TABLES[str(path)] = {}
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            for key, row in json.loads(path.read_text()).items():
                table[str(key)] = {str(n): float(t) for n, t in row.items()}
    return path, _TABLES[str(path)]


def measure_kernels(
    shape: tuple[int, int],
    tokens: int,
    names: Sequence[str],
    *,
    clock: Clock | None = None,
    refresh: bool = False,
    copies_bytes: int = 64 * 2**20,
    protocol: Protocol | None = None,
    inputs: torch.dtype = torch.bfloat16,
    device: Place = "cpu",
) -> dict[str, float]:
    """Seconds per call (the best of several) of each kernel in ``names`` for weights (out, in) and ``tokens`` rows;
    cached.

    ``inputs`` is what the rows of the model are: those of a float32 model are converted for a kernel that reads
    bfloat16 and its results are converted back, which counts. On a busy machine the figures are used by this process
    but not kept. Kernels run interleaved, each over enough copies of the weight (``copies_bytes`` in all) that it comes
    from memory as it does in a model, and not from a cache. On a GPU they run as graphs, as they do in the engine: what
    a launch costs the host is not in the figure.
    """
    where = _placed(device)
    path, table = _load_table(where)
    key = f"{shape[0]}x{shape[1]}x{tokens}{'xfloat32' if inputs == torch.float32 else ''}"
    row = table.setdefault(key, {})
    wanted = [n for n in names if kernel(n, where).supports(*shape)]
    if refresh or any(n not in row for n in wanted):
        row.update(
            _measure_row(shape, tokens, wanted, clock or MonotonicClock(), copies_bytes, protocol, inputs, where)
        )
        if where.type == "cuda" or not busy():
            with contextlib.suppress(DataError):
                write_text(path, json.dumps(table) + "\n")
    return {n: row[n] for n in wanted}


def _measure_row(
    shape: tuple[int, int], tokens: int, names: Sequence[str], clock: Clock, size: int, protocol: Protocol | None,
    inputs: torch.dtype, device: torch.device,
) -> dict[str, float]:  # fmt: skip
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(*shape, generator=generator, device=device) * shape[1] ** -0.5
    x = torch.randn(tokens, shape[1], generator=generator, device=device).to(torch.bfloat16)
    if device.type == "cuda":
        size = max(size, 3 * torch.cuda.get_device_properties(device).L2_cache_size)
    calls: dict[str, Callable[[], object]] = {}
    counts: dict[str, int] = {}
    shared: dict[object, list[Packed]] = {}  # on a GPU, whose memory is small, kernels of a layout read the same copies
    for name in names:
        candidate = kernel(name, device)
        layout: object = candidate.pack if device.type == "cuda" else name
        packs = shared.get(layout) or [candidate.pack(weight)]
        counts[name] = max(1, min(32, size // max(packs[0].bytes, 1)))
        packs += [candidate.pack(weight) for _ in range(counts[name] - len(packs))]
        shared[layout] = packs
        given = x.float() if candidate.precision == "fp32" or inputs == torch.float32 else x
        calls[name] = _sweep(candidate, given, packs)
    rules = protocol or Protocol(warmup=1, warmup_time=0.0, min_samples=7, min_time=0.03, max_time=4.0)
    with torch.inference_mode():
        barrier = None
        if device.type == "cuda":
            from hasten.compress.kernels_cuda import captured

            calls = {name: captured(call, device) for name, call in calls.items()}
            barrier = partial(torch.cuda.synchronize, device)
        result = compare(calls, rules, clock=clock, synchronise=barrier)
    # The minimum: a neighbour on the machine only ever adds time, and the ranking is what is wanted.
    return {n: s.summary.minimum / counts[n] for n, s in result.samples.items()}


def _sweep(candidate: LinearKernel, x: Tensor, packs: Sequence[Packed]) -> Callable[[], object]:
    def run() -> None:
        for packed in packs:
            candidate.run(x, packed)

    return run


def fastest(
    shape: tuple[int, int],
    tokens: int,
    precisions: Iterable[str] = ("bf16", "int8", "int4"),
    clock: Clock | None = None,
    *,
    names: Sequence[str] | None = None,
    device: Place = "cpu",
) -> str:
    """Name of the fastest kernel for weights ``shape`` = (out, in) and ``tokens`` rows among ``precisions``.

    Measured on first use (well under a second per shape), then read from the table. ``names`` narrows the candidates;
    without it int4 is tried with groups of 32 only, which is the most accurate. Raises
    :class:`~hasten.errors.ConfigurationError` when no kernel of these precisions takes the shape.
    """
    wanted = set(precisions)
    pool = [k.name for k in available(device) if k.precision in wanted and k.supports(*shape)]
    if names is None:
        pool = [n for n in pool if not n.startswith("int4") or n == "int4-g32" or n.startswith("int4-g32-")]
    else:
        pool = [n for n in pool if n in names]
    if not pool:
        raise ConfigurationError(
            f"no kernel in {', '.join(sorted(wanted))} takes a weight of {shape[0]} x {shape[1]}; allow bf16 or fp32"
        )
    if len(pool) == 1:
        return pool[0]
    times = measure_kernels(shape, tokens, pool, clock=clock, device=device)
    return min(times, key=lambda n: times[n])


_ROWS = (1, 16, 128)
"""numbers of rows at which the kernels of one precision are compared"""
_BRIEF = Protocol(warmup=1, warmup_time=0.0, min_samples=5, min_time=0.0, max_time=0.3)


def quantized_product(
    weight: Tensor, precision: str, bias: Tensor | None = None, *, group: int = 32, clock: Clock | None = None
) -> tuple[Callable[[Tensor], Tensor], int]:
    """``x (rows, in) -> x Wᵀ + bias (rows, out)`` for a weight (out, in) stored in int8 or int4 (on a GPU fp8 too), on
    the device of the weight, and its bytes.

    Our own kernel where the processor has its instructions. Elsewhere the kernels of a precision share one stored
    weight, so the fastest is chosen at each call by the number of rows, from a brief measurement at packing (cached). A
    shape that no kernel of the precision takes is stored in bf16;
    the bytes tell. ``group`` is the number of inputs that share an int4 scale. Raises
    :class:`~hasten.errors.ConfigurationError` for another precision.
    """
    if precision not in ("int8", "int4") and (precision != "fp8" or weight.device.type != "cuda"):
        raise ConfigurationError(f"precision {precision!r} is not quantised; give int8 or int4, or fp8 on a GPU")
    if weight.device.type == "cuda":
        from hasten.compress.kernels_cuda import lay_out_at, product

        return product(lay_out_at(weight, precision, group), precision, bias)
    if takes(precision, *weight.shape) and (precision == "int8" or group == 32):
        ours, _, num_bytes = panel_product(weight, precision, bias)
        return lambda x: ours(x.to(torch.bfloat16).contiguous()).to(x.dtype), num_bytes
    shape = (weight.shape[0], weight.shape[1])
    wanted = f"int4-g{group}" if precision == "int4" else ""
    names = [k.name for k in available() if k.precision == precision and k.supports(*shape)]
    names = [n for n in names if n == wanted or (not wanted and not n.endswith("-panels"))]
    if not names:
        present = [k.name for k in available()]
        names = ["bf16-packed" if "bf16-packed" in present else "bf16"]
    packed = kernel(names[0]).pack(weight)
    offset = None if bias is None else bias.detach().clone()
    runs = []
    for rows in _ROWS:
        best = names[0]
        if len(names) > 1:
            times = measure_kernels(shape, rows, names, clock=clock, copies_bytes=16 * 2**20, protocol=_BRIEF)
            best = min(times, key=times.__getitem__)
        runs.append(kernel(best).run)
    few, some, many = runs

    def chosen(x: Tensor) -> Tensor:
        rows = x.shape[0]
        result = (few if rows <= 4 else some if rows <= 48 else many)(x, packed)
        return result if offset is None else result + offset.to(result.dtype)

    return chosen, packed.bytes
