"""Compressed weights on a GPU: products and whole decoding steps beside bfloat16, in one process, in turns.

A product of a few rows reads its weight once, so what it can reach is the bytes of the codes over the bandwidth that
the same run measures; the share is printed. Kernels run as graphs over enough copies of the weight that it comes from
memory and not from a cache. The peers are torch's own: its bfloat16 product, ``_weight_int4pack_mm`` and
``_scaled_mm``; and our byte products, all with the rounding of the rows. Which kernel is chosen for how many rows is
printed with each shape. The decoders have random weights; a step's time is that of the replayed graph, and the whole
with the way of the logits to the host.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hasten.clock import MonotonicClock
from hasten.compress import kernels_cuda
from hasten.compress.kernels import available, kernel
from hasten.compress.packed import Packed
from hasten.language import random_model
from hasten.language.config import PRESETS

SHAPES = ((4096, 4096), (11008, 4096), (2560, 2048), (11264, 2048), (2048, 5632), (1536, 1024), (5632, 1024))
ROWS = (1, 16, 64, 512)
OURS = {"int8": ("int8", 32, True), "W8A16": ("int8", 32, False), "int4": ("int4", 32, False),
        "int4 g128": ("int4", 128, False), "fp8": ("fp8", 32, True)}  # fmt: skip
"""precision, inputs of a scale, and whether rows may be rounded, as ``--dtype`` lets them"""
PEERS = ("int4-g128-torch", "int8-bytes", "fp8-bytes", "fp8-dynamic")
clock = MonotonicClock()


@dataclass(frozen=True)
class Timed:
    """A product over each of ``packs``."""

    call: Callable[[Any], Any]
    packs: Sequence[Any]

    def captured(self) -> Callable[[], object]:
        """All of them as one graph."""

        def sweep() -> None:
            for packed in self.packs:
                self.call(packed)

        with torch.inference_mode():
            return kernels_cuda.captured(sweep, torch.device("cuda", torch.cuda.current_device()))


def interleaved(calls: dict[Any, Timed], rounds: int) -> dict[Any, float]:
    """Median seconds of one product of each, taking turns."""
    graphs: dict[Hashable, Callable[[], object]] = {n: c.captured() for n, c in calls.items()}
    times: dict[Hashable, list[float]] = {n: [] for n in calls}
    for turn in range(rounds + 1):
        for name in list(graphs)[:: 1 if turn % 2 else -1]:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graphs[name]()
            end.record()
            end.synchronize()
            if turn:
                times[name].append(begin.elapsed_time(end) * 1e-3 / len(calls[name].packs))
    return {n: float(np.median(t)) for n, t in times.items()}


def copies(size: int) -> int:
    """Of a weight of ``size`` bytes, so that they fill the caches three times."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(32, 3 * cache // size + 1))


def packs_of(form: str, shape: tuple[int, int], count: int | None = None) -> list[Packed]:
    """Random weights in our layout."""
    precision, group, _ = OURS[form]
    weight = torch.randn(*shape, device="cuda") * shape[1] ** -0.5
    first = kernels_cuda.lay_out_at(weight, precision, group)
    wanted = copies(first.bytes) if count is None else count
    return [first, *(kernels_cuda.lay_out_at(weight, precision, group) for _ in range(wanted - 1))]


def products(rows_of: Sequence[int], bandwidth: float) -> dict[str, Any]:
    """Every shape and number of rows."""
    names = {k.name for k in available("cuda")}
    found: dict[str, Any] = {}
    for shape in SHAPES:
        packs = {form: packs_of(form, shape) for form in OURS}
        ways = {f: kernels_cuda.choices(packs[f][0], OURS[f][0], rounds=OURS[f][2]) for f in OURS}
        print("; ".join(f"{f}: {' '.join(f'{n}={how}' for n, how in way.items())}" for f, way in ways.items()))
        plain = kernel("bf16", "cuda")
        weight = torch.randn(*shape, device="cuda") * shape[1] ** -0.5
        first = plain.pack(weight)
        halves = [first, *(plain.pack(weight) for _ in range(copies(first.bytes) - 1))]
        others = {}
        for name in PEERS:
            peer = kernel(name, "cuda") if name in names else None
            if peer is not None and peer.supports(*shape):
                one = peer.pack(weight)
                others[name] = (peer, [one, *(peer.pack(weight) for _ in range(copies(one.bytes) - 1))])
        for rows in rows_of:
            x = torch.randn(rows, shape[1], device="cuda", dtype=torch.bfloat16)
            calls = {"torch bf16": Timed(lambda p, x=x, plain=plain: plain.run(x, p), halves)}
            for form in OURS:
                way = kernels_cuda.way_for(ways[form], rows)
                calls[form] = Timed(lambda p, x=x, way=way: way(x, p, None), packs[form])
            for name, (peer, theirs) in others.items():
                calls[name] = Timed(lambda p, x=x, peer=peer: peer.run(x, p), theirs)
            times = interleaved(calls, 7)
            line = {n: {"seconds": t, "ratio": times["torch bf16"] / t,
                        "share": calls[n].packs[0].bytes / t / bandwidth} for n, t in times.items()}  # fmt: skip
            found[f"{shape[0]}x{shape[1]} {rows}"] = line
            told = ", ".join(
                f"{n} {v['ratio']:.2f}x" + (f" ({v['share']:.2f})" if rows <= 64 else "")
                for n, v in line.items()
                if n != "torch bf16"
            )
            base = line["torch bf16"]
            print(
                f"{shape[0]}x{shape[1]}, {rows} rows: bf16 {base['seconds'] * 1e6:.1f} us ({base['share']:.2f}); {told}"
            )
        torch.cuda.empty_cache()
    return found


def decoders(names: Sequence[str], rounds: int, tokens: int) -> dict[str, Any]:
    """Whole steps of the runtime."""
    from gpu_decoder import BIG, Ours

    found: dict[str, Any] = {}
    for name in names:
        config = BIG if name == "random-1b" else PRESETS["random-245m"]
        model = random_model(config, device="cuda")
        contenders: dict[str, Any] = {}
        for precision in ("bf16", "int8", "int4", "fp8"):
            begin = clock.now()
            contenders[precision] = Ours(model.with_precision(precision))
            made = contenders[precision].executor
            speed = ", ".join(f"{n} {ratio:.2f}x" for n, ratio in made.speed.items())
            size, took = made.weight_bytes / 1e6, clock.now() - begin
            print(f"{name} {precision}: {size:.0f} MB of weights, made in {took:.1f} s {speed}", flush=True)
        for batch in (1, 16, 64):
            times: dict[str, list[float]] = {n: [] for n in contenders}
            for turn in range(rounds):
                for other in list(contenders)[:: 1 if turn % 2 else -1]:
                    times[other].append(contenders[other].decode(batch, 128, tokens) / tokens)
            whole = {n: float(np.median(t)) for n, t in times.items()}
            steps = replayed({n: c.executor for n, c in contenders.items()}, batch)
            found[f"{name} batch {batch}"] = {"whole": whole, "graph": steps}
            told = ", ".join(
                f"{n} {whole['bf16'] / whole[n]:.2f}x ({steps['bf16'] / steps[n]:.2f}x)" for n in whole if n != "bf16"
            )
            base = f"bf16 {whole['bf16'] * 1e3:.2f} ms ({steps['bf16'] * 1e3:.2f} ms on the device)"
            print(f"{name}, {batch} sequences: {base}; {told}", flush=True)
        for length in (512,):
            times = {n: [] for n in contenders}
            for turn in range(rounds):
                for other in list(contenders)[:: 1 if turn % 2 else -1]:
                    times[other].append(contenders[other].prefill(length))
            whole = {n: float(np.median(t)) for n, t in times.items()}
            found[f"{name} prefill {length}"] = {"whole": whole}
            told = ", ".join(f"{n} {whole['bf16'] / whole[n]:.2f}x" for n in whole if n != "bf16")
            print(f"{name}, prompt of {length}: bf16 {whole['bf16'] * 1e3:.2f} ms; {told}", flush=True)
        del contenders, model
        torch.cuda.empty_cache()
    return found


def replayed(executors: dict[str, Any], batch: int) -> dict[str, float]:
    """Seconds of the captured step alone, in turns."""
    times: dict[str, list[float]] = {n: [] for n in executors}
    for _ in range(9):
        for name, executor in executors.items():
            graph = next(g.graph for (rows, _), g in executor._gpu._graphs.items() if rows == batch)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) * 1e-3)
    return {n: float(np.median(t[2:])) for n, t in times.items()}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["products", "decoders"], help="leave the other out")
    parser.add_argument("--models", nargs="*", default=["random-245m", "random-1b"])
    parser.add_argument("--rows", type=int, nargs="*", default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--json", help="write the figures here")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    from gpu_decoder import read_bandwidth

    bandwidth = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, reads {bandwidth / 1e12:.2f} TB/s")
    begin = clock.now()
    names = ", ".join(k.name for k in available("cuda"))
    print(f"kernels (tried in {clock.now() - begin:.1f} s): {names}", flush=True)
    found: dict[str, Any] = {}
    if chosen.only != "decoders":
        found["products"] = products(chosen.rows, bandwidth)
    if chosen.only != "products":
        found["decoders"] = decoders(chosen.models, chosen.rounds, chosen.tokens)
    if chosen.json:
        with open(chosen.json, "w", encoding="utf-8") as file:
            json.dump({"device": torch.cuda.get_device_name(), "bandwidth": bandwidth, **found}, file)


if __name__ == "__main__":
    main()
