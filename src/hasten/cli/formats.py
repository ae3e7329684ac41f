"""``hasten tune MODEL --formats 3..8``: every number format of some widths, its fidelity and its LUTs on an FPGA."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["compare_formats", "widths_of"]


def widths_of(text: str) -> list[int]:
    """``3..8`` or ``4,6,8`` as widths.

    >>> widths_of("3..5"), widths_of("8,4")
    ([3, 4, 5], [4, 8])
    """
    from hasten.errors import ConfigurationError

    try:
        first, dots, last = text.partition("..")
        found = list(range(int(first), int(last) + 1)) if dots else sorted({int(t) for t in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 2 or found[-1] > 8:
        raise ConfigurationError(f"--formats is {text!r}; give widths between 2 and 8, such as 3..8 or 4,8")
    return found


def compare_formats(
    console: Console,
    target: str,
    widths: str,
    shapes: list[str] | None,
    dtype: str,
    *,
    calibration: Path | None = None,
    data: Path | None = None,
    report: Path | None = None,
    json: bool = False,
) -> None:
    """Print the table, the front over LUTs and the break-even; ``report`` becomes a picture of it.

    ``target`` is built and called with inputs of ``shapes``. The score is the share of the float model's output that is
    kept, on ``data``.
    """
    from hasten.cli.measure import build, calibration_inputs, examples, taken
    from hasten.cli.progress import stages
    from hasten.compress.quantize.explore import formats
    from hasten.files import check_place
    from hasten.measure.fpga import Fpga
    from hasten.tune.model import fidelity

    tried = widths_of(widths)
    if report is not None:
        check_place(report)  # not after minutes of work
    module, example = build(target), examples(shapes, dtype, "cpu")
    module = taken(target, module, example)
    learned, judged = (None if f is None else calibration_inputs(f, example) for f in (calibration, data))
    judged = judged or learned or [example]
    with stages(console) as told:
        found = formats(
            module, learned or [example], lambda small: fidelity(module, small, judged), bits=tried,
            cost=Fpga.load(), progress=told,
        )  # fmt: skip
    flip = found.break_even()
    if report is not None:
        found.plot(str(report))
        console.print(f"picture: {report}")
    if json:
        import json as encoder

        front = {id(c) for c in found.front()}
        rows = [
            {"formats": c.label, "bits": c.bits, "score": c.score, "luts": c.luts, "front": id(c) in front}
            for c in found.candidates
        ]
        print(encoder.dumps({"candidates": rows, "integer_share": found.integer_share(), "break_even": flip}))
        return
    console.print(found.table(), highlight=False, markup=False)
    if calibration is None:
        console.print("inputs are random; give --calibration and --data for ranges and scores that mean something")
    edge = "at no size of the floats' own hardware" if flip is None else f"below {flip:.2f} times its size"
    console.print(
        f"integers are {found.integer_share():.0%} of the front (*) over LUTs of a multiply-accumulate; floats are "
        f"half of it {edge}"
    )
