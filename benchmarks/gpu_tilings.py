"""Cuts of our GPU kernels for a few rows, measured against each other: where the numbers of ``tiling`` come from.

Every cut is compiled once by some processes side by side, then all of a shape are timed in turns as graphs over
enough copies of the weight that it comes from memory. The table shows the best, and where the cut in use stands.
"""

from __future__ import annotations

import argparse
import itertools
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from gpu_compress import Timed, interleaved, packs_of

from hasten.compress import kernels_triton as ours
from hasten.compress.kernels_triton import Tiling

SHAPES = ((4096, 4096), (11008, 4096), (2560, 2048), (2048, 5632), (1536, 1024))
FORMATS = ("int8", "int4", "fp8", "bytes")
"""``bytes``: int8 weights times rows rounded to bytes, with the rounding"""


def of_one_row() -> list[Tiling]:
    """Cuts for one row."""
    shapes = (
        (4, 1024, 4), (8, 1024, 4), (16, 1024, 4), (2, 2048, 4), (4, 2048, 4), (8, 512, 4), (16, 512, 4), (8, 2048, 8),
        (4, 512, 2), (8, 512, 2), (4, 512, 1), (2, 512, 1), (2, 1024, 2), (4, 1024, 2),
    )  # fmt: skip
    cuts = [Tiling(block=b, width=w, warps=n, stages=s) for b, w, n in shapes for s in (1, 3)]
    return [*cuts, Tiling(8, 1024, warps=4, stages=2), Tiling(8, 1024, warps=4, stages=4)]


def of_some(rows: int, four: bool) -> list[Tiling]:
    """Cuts for up to some tens of rows, or some hundreds."""
    if rows > 64:
        blocks = ((128, 64, 128, 8, 3), (128, 128, 128, 8, 3), (128, 64, 256, 8, 3), (64, 64, 128, 4, 3))
        made = [Tiling(b, w // (2 if four else 1), m, 1, n, s) for b, w, m, n, s in blocks]
        return [*made, *(Tiling(c.block, c.width, c.many, 2, c.warps, c.stages) for c in made)]
    many = max(16, rows)
    blocks = ((64, 128, 4, 4), (64, 128, 4, 3), (64, 256, 4, 3), (64, 64, 4, 5), (128, 128, 8, 3), (128, 128, 4, 4),
              (128, 64, 4, 4), (32, 128, 4, 4), (64, 256, 8, 3))  # fmt: skip
    found = []
    for (block, width, warps, stages), splits in itertools.product(blocks, (1, 2, 4, 8)):
        found.append(Tiling(block, width // (2 if four else 1), many, splits, warps, stages))
    return found


def of_bytes(rows: int) -> list[Tiling]:
    """Cuts for bytes times bytes."""
    many = max(16, min(128, rows))
    if rows <= 64:
        shapes = (
            (64, 128, 4, 4),
            (64, 128, 4, 3),
            (32, 128, 4, 4),
            (64, 256, 4, 3),
            (128, 128, 4, 3),
            (128, 128, 8, 3),
        )
        return [Tiling(b, w, many, 1, n, s) for b, w, n, s in shapes]
    shapes = ((128, 128, 8, 3), (128, 128, 8, 4), (128, 128, 4, 3), (64, 128, 4, 4), (64, 128, 4, 3), (128, 64, 8, 4))
    return [Tiling(b, w, many, 1, n, s) for b, w, n, s in shapes]


def cuts_of(form: str, rows: int) -> list[Tiling]:
    """What is compared."""
    if form == "bytes":
        return of_bytes(rows)
    return of_one_row() if rows == 1 else of_some(rows, form == "int4")


def stored(form: str) -> str:
    """How the weight lies in memory."""
    return "int8" if form == "bytes" else form


def in_use(form: str, rows: int, packed: Any) -> Tiling:
    """What a product takes now."""
    return ours.cut_of_bytes(rows, packed) if form == "bytes" else ours.tiling(rows, packed)


def run(form: str, rows: int, x: Any, packed: Any, cut: Tiling) -> Any:
    """One product."""
    if form == "bytes":
        return ours.by_bytes(x, packed, None, cut)
    return (ours.by_row if rows == 1 else ours.by_tiles)(x, packed, None, cut)


def compiled(job: tuple[str, int, Tiling]) -> str | None:
    """Compile one cut in a process of its own; what went wrong, or None."""
    form, rows, cut = job
    try:
        for shape in ((1024, 4096), (1024, 5632)):
            packed = packs_of(stored(form), shape, 1)[0]
            x = torch.randn(rows, shape[1], device="cuda", dtype=torch.bfloat16)
            run(form, rows, x, packed, cut)
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001  (a cut may need more memory than a multiprocessor has)
        return f"{type(error).__name__}: {str(error)[:80]}"
    return None


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16, 64, 256])
    parser.add_argument("--formats", nargs="*", default=list(FORMATS))
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--best", type=int, default=3)
    parser.add_argument("--json", help="write all figures here")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    jobs = []
    for form, rows in itertools.product(chosen.formats, chosen.rows):
        cuts = cuts_of(form, rows)
        seen = {(c.block, c.width, c.many, c.warps, c.stages, c.splits > 1): c for c in cuts}
        jobs += [(form, rows, c) for c in seen.values()]
    with ProcessPoolExecutor(chosen.processes, mp_context=get_context("spawn")) as pool:
        failed = {job: why for job, why in zip(jobs, pool.map(compiled, jobs, chunksize=2), strict=True) if why}
    for (form, rows, cut), why in failed.items():
        print(f"{form} {rows} {told(cut)}: {why}")
    lost = {(f, r, c.block, c.width, c.warps, c.stages) for f, r, c in failed}
    found: dict[str, Any] = {}
    for form, rows, shape in itertools.product(chosen.formats, chosen.rows, SHAPES):
        packs = packs_of(stored(form), shape)
        x = torch.randn(rows, shape[1], device="cuda", dtype=torch.bfloat16)
        cuts, use = cuts_of(form, rows), in_use(form, rows, packs[0])
        candidates = {use, *(c for c in cuts if (form, rows, c.block, c.width, c.warps, c.stages) not in lost)}
        calls = {
            c: Timed(lambda p, c=c, x=x, rows=rows, form=form: run(form, rows, x, p, c), packs) for c in candidates
        }
        times = interleaved(calls, 5)
        order = sorted(times, key=lambda c: times[c])
        share = packs[0].bytes / times[order[0]] / 1e12
        name = f"{form} {shape[0]}x{shape[1]} {rows} rows"
        best = "; ".join(f"{told(c)} {times[c] * 1e6:.1f}" for c in order[: chosen.best])
        print(f"{name}: {best} | in use {told(use)} {times[use] * 1e6:.1f} us; best {share:.2f} TB/s", flush=True)
        found[name] = {told(c): times[c] for c in order}
    if chosen.json:
        with open(chosen.json, "w", encoding="utf-8") as file:
            json.dump({"device": torch.cuda.get_device_name(), "times": found}, file)


def told(cut: Tiling) -> str:
    """A cut in a few characters."""
    return f"{cut.block}x{cut.width}x{cut.many}/{cut.splits}w{cut.warps}s{cut.stages}"


if __name__ == "__main__":
    main()
