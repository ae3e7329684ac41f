"""CUDA's linear kernels as entries of the table: torch's own, and ours where Triton is installed.

All kernels of a precision of ours read one layout (:mod:`hasten.compress.device_codes`), so a weight is laid out once
and the number of rows decides which of them runs: one row at a time, a few through the matrix units, many by opening
the codes and leaving the product to the library. Bound of the few: bytes of the codes over the memory's bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hasten.compress import device_codes as layout
from hasten.compress import kernels_triton as ours
from hasten.compress.packed import LinearKernel, Packed
from hasten.errors import MissingExtraError
from hasten.kernel_cache import stamp_of
from hasten.measure.latency import Protocol

__all__ = [
    "GROUP_SIZES",
    "PRECISIONS",
    "against_bf16",
    "captured",
    "choices",
    "cuda_kernels",
    "family",
    "lay_out_at",
    "product",
    "table_name",
    "way_for",
]

GROUP_SIZES = (32, 64, 128, 256)
PRECISIONS = ("int8", "int4", "fp8")
"""what :func:`lay_out_at` stores"""
_ERRORS = {"int8": 1.5e-2, "int4": 0.13, "fp8": 3.5e-2}
_ROWS = {1: ("row", "tiles"), **dict.fromkeys((16, 64, 256, 512), ("tiles", "opened"))}
"""numbers of rows at which the kernels of one layout are compared, and which of them could win there"""
_ROUNDED: dict[str, dict[int, tuple[str, ...]]] = {
    "int8": dict.fromkeys((16, 64, 256, 512), ("bytes",)),
    "fp8": dict.fromkeys((16, 64, 256, 512), ("bytes", "dynamic")),
}
"""those that round the rows as well; ``int8-dynamic`` is left out, for its sums pass through memory as int32"""
_FEW = 4
"""rows from which reading a weight for each of them is never worth it"""

_BRIEF = Protocol(warmup=1, warmup_time=0.0, min_samples=7, min_time=0.0, max_time=0.3)

Run = Callable[[Tensor, Packed, "Tensor | None"], Tensor]


def _by_row(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    return (ours.by_row if x.shape[0] <= _FEW else ours.by_tiles)(x, packed, bias)


_RUNS: dict[str, Run] = {"row": _by_row, "tiles": ours.by_tiles, "opened": ours.by_opening}


def family(precision: str, group: int = 0) -> str:
    """What the names of the kernels of one layout begin with: ``int8``, ``fp8``, ``int4-g32``."""
    return f"int4-g{group}" if precision == "int4" else precision


def cuda_kernels() -> list[LinearKernel]:
    """All that could run; :func:`hasten.compress.kernels.available` tries each."""
    found = [_plain("fp32", torch.float32, 1e-5), _plain("bf16", torch.bfloat16, 6e-3)]
    found += [_tinygemm(group) for group in GROUP_SIZES]
    if ours.triton is None:
        return found
    layouts: list[tuple[str, int, Callable[[Tensor], Packed]]] = [
        ("int8", 0, layout.int8_rows),
        ("fp8", 0, layout.float8_rows),
        *(("int4", group, _groups_of(group)) for group in GROUP_SIZES),
    ]
    for precision, group, pack in layouts:
        found += [_ours(precision, group, pack, how) for how in _RUNS]
    bytes_only = _ours("int8", 0, layout.int8_rows, "tiles")
    found.append(_other(bytes_only, "int8-bytes", ours.by_bytes, 2e-2, lambda out, inner: True))
    found.append(_other(bytes_only, "int8-dynamic", _run_bytes, 2e-2, lambda out, inner: out % 8 == 0))
    floats = _ours("fp8", 0, layout.float8_rows, "tiles")
    found.append(_other(floats, "fp8-bytes", ours.by_bytes, 5e-2, lambda out, inner: True))
    found.append(_other(floats, "fp8-dynamic", _run_float8, 5e-2, lambda out, inner: out % 16 == 0))
    return found


def _plain(name: str, dtype: torch.dtype, error: float) -> LinearKernel:
    return LinearKernel(
        name,
        name,
        lambda w: Packed((w.detach().to(dtype, copy=True).contiguous(),), (w.shape[0], w.shape[1])),
        lambda x, p: functional.linear(x.to(dtype), p.tensors[0]).to(x.dtype),
        lambda p: p.tensors[0].float(),
        error,
        lambda out, inner: True,
    )


def _groups_of(group: int) -> Callable[[Tensor], Packed]:
    return lambda weight: layout.int4_groups(weight, group)


def _ours(precision: str, group: int, pack: Callable[[Tensor], Packed], how: str) -> LinearKernel:
    run = _RUNS[how]
    return LinearKernel(
        f"{family(precision, group)}-{how}",
        precision,
        pack,
        lambda x, p: run(x, p, None),
        layout.opened,
        _ERRORS[precision],
        lambda out, inner: inner >= max(group, 16),
        group,
    )


def _other(
    like: LinearKernel, name: str, run: Callable[[Tensor, Packed], Tensor], error: float,
    supports: Callable[[int, int], bool],
) -> LinearKernel:  # fmt: skip
    return LinearKernel(name, like.precision, like.pack, run, like.unpack, error, supports)


_LEAST_ROWS = 32
"""``torch._int_mm`` wants more than 16 rows"""


def _run_bytes(x: Tensor, packed: Packed) -> Tensor:
    """Rows as bytes with a step each, through ``torch._int_mm``."""
    held, rows = layout.codes_in(packed), x.shape[0]
    codes, steps = ours.round_rows(x, held.codes.shape[1], torch.int8, max(_LEAST_ROWS, -(-rows // 8) * 8))
    total = torch._int_mm(codes, held.codes.t())[:rows]
    return (total * steps[:rows, None]).mul_(held.scales.view(1, -1)).to(x.dtype)


def _run_float8(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """Rows as FP8 with a step each, through ``torch._scaled_mm``."""
    held, rows = layout.codes_in(packed), x.shape[0]
    codes, steps = ours.round_rows(x, held.codes.shape[1], torch.float8_e4m3fn, -(-rows // 16) * 16)
    result = torch._scaled_mm(
        codes, held.codes.t(), scale_a=steps[:, None], scale_b=held.scales.view(1, -1), out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )  # fmt: skip
    result = result[:rows].to(x.dtype)
    return result if bias is None else result.add_(bias)


_ROUNDING: dict[str, Run] = {"bytes": ours.by_bytes, "dynamic": _run_float8}

_TILES_OF_INPUTS = 8


def _tinygemm(group: int) -> LinearKernel:
    """torch's own 4-bit product for a few rows: affine, a bfloat16 scale and offset for each group."""
    from hasten.compress.kernels import quantise_groups

    def pack(weight: Tensor) -> Packed:
        codes, scale, offset = quantise_groups(weight, group)
        both = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8).contiguous()
        stored = torch.ops.aten._convert_weight_to_int4pack(both, _TILES_OF_INPUTS)
        steps = torch.stack([scale, offset], dim=-1).to(torch.bfloat16).contiguous()
        return Packed((stored, steps), (weight.shape[0], weight.shape[1]), group)

    def run(x: Tensor, packed: Packed) -> Tensor:
        stored, steps = packed.tensors
        result: Tensor = torch.ops.aten._weight_int4pack_mm(x.to(torch.bfloat16), stored, group, steps)
        return result.to(x.dtype)

    def unpack(packed: Packed) -> Tensor:
        eye = torch.eye(packed.shape[1], dtype=torch.bfloat16, device=packed.tensors[0].device)
        return run(eye, packed).float().t().contiguous()

    return LinearKernel(
        f"int4-g{group}-torch",
        "int4",
        pack,
        run,
        unpack,
        0.13,
        lambda out, inner: out % 8 == 0 and inner % 128 == 0 and inner % group == 0,
        group,
    )


# --- a product that chooses by its rows ------------------------------------------------------------------------------


def lay_out_at(weight: Tensor, precision: str, group: int = 32) -> Packed:
    """A weight (out, in) in the layout of ``precision`` (one of :data:`PRECISIONS`), on its own device."""
    needs_triton(precision)
    if precision == "int4":
        return layout.int4_groups(weight, group)
    return layout.int8_rows(weight) if precision == "int8" else layout.float8_rows(weight)


def needs_triton(what: str) -> None:
    """Raises :class:`~hasten.errors.MissingExtraError` where our kernels cannot run."""
    if ours.triton is None:
        raise MissingExtraError("triton", "gpu", f"weights in {what} on a GPU")


def product(
    packed: Packed, precision: str, bias: Tensor | None = None, *, rounds: bool = False
) -> tuple[Callable[[Tensor], Tensor], int]:
    """``x (rows, in) -> x Wᵀ + bias (rows, out)`` in the type of x, and the bytes of the codes.

    Which kernel runs follows from the number of rows alone, by the measured table of the device, so a call can be
    captured in a graph. ``rounds``: kernels that round each row of x to bytes (FP8 with FP8 weights) may win, too. One
    call at a time may use a weight.
    """
    needs_triton(precision)
    choice = choices(packed, precision, rounds=rounds)
    offset = None if bias is None else bias.detach().clone().contiguous()
    return lambda x: way_for(choice, x.shape[0])(x, packed, offset), packed.bytes


def way_for(choice: dict[int, str], rows: int) -> Run:
    """What runs ``rows`` rows, of what :func:`choices` gave."""
    how = choice[next((n for n in choice if rows <= n), max(choice))]
    return _ROUNDING[how] if how in _ROUNDING else _RUNS[how]


def choices(packed: Packed, precision: str, *, rounds: bool = False) -> dict[int, str]:
    """Up to which number of rows which kernel runs; the last one beyond all."""
    if packed.device.type != "cuda":  # the interpreter has no times
        return {1: "row", 64: "tiles", 256: "bytes" if rounds and precision == "int8" and _whole(packed) else "opened"}
    found = {}
    for rows, times in _times(packed, precision, rounds).items():
        ours_only = {how: t for how, t in times.items() if how != "bf16"}
        found[rows] = min(ours_only, key=lambda how: ours_only[how])
    return found or {1: "tiles"}


def against_bf16(packed: Packed, precision: str, *, rounds: bool = False) -> dict[int, tuple[float, float]]:
    """Seconds of what :func:`choices` takes and of a bfloat16 weight, by rows; nothing where there is no GPU."""
    if packed.device.type != "cuda":
        return {}
    found = {}
    for rows, times in _times(packed, precision, rounds).items():
        found[rows] = (min(t for how, t in times.items() if how != "bf16"), times["bf16"])
    return found


def _whole(packed: Packed) -> bool:
    """Whether a row of the weight has one scale and no zero point, so that sums of bytes can be scaled at the end."""
    return not packed.group and not layout.codes_in(packed).zeros.numel()


def _times(packed: Packed, precision: str, rounds: bool) -> dict[int, dict[str, float]]:
    """Seconds of each way by rows, from the table; a weight of the same shape and precision stands for this one."""
    from hasten.compress.kernels import available, measure_kernels

    device = packed.device
    wanted = min(packed.group or GROUP_SIZES[0], GROUP_SIZES[-1])
    stem = family(precision, next(g for g in GROUP_SIZES if g >= wanted))
    rounds = rounds and _whole(packed)
    present = {k.name for k in available(device) if k.supports(*packed.shape)}
    found = {}
    for rows, ways in _ROWS.items():
        more = _ROUNDED.get(precision, {}).get(rows, ()) if rounds else ()
        names = {f"{stem}-{how}": how for how in (*ways, *more) if f"{stem}-{how}" in present}
        if not names:  # smaller than what the table measures
            return {}
        times = measure_kernels(packed.shape, rows, ["bf16", *names], protocol=_BRIEF, device=device)
        found[rows] = {names.get(n, n): t for n, t in times.items()}
    return found


# --- measuring -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def table_name(device: torch.device) -> str:
    """Under which the times of a device are filed: its model, the versions that make the code, and a stamp of ours."""
    compiler = "none" if ours.triton is None else ours.triton.__version__
    root = Path(__file__).resolve().parents[1]
    code = "".join(stamp_of(Path(str(part.__file__)).resolve(), root) for part in (ours, layout))
    name = f"{torch.cuda.get_device_name(device)} torch {torch.__version__} triton {compiler} {code}"
    return "".join(c if c.isalnum() or c in ".+-" else "-" for c in name)


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """``call`` as a graph: replaying it costs one launch, so that short kernels are timed and not Python.

    What cannot be captured is called as it is.
    """
    with torch.cuda.device(device):
        stream: Any = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        graph: Any = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError:
            torch.cuda.synchronize(device)
            return call
    return graph.replay  # type: ignore[no-any-return]
