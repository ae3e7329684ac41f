"""Compressed models against their float selves and against the libraries' own: each pair in turns, in one process.

A ResNet-20-class network at batch 1 and 64: torch eager, onnxruntime in float and in int8 (its static quantisation),
ours in bytes. The 245 M decoder at batch 1 and 64: float32, bfloat16, int8 (also with keys and values in bytes), int4.
And the search: what ``hasten.tune`` finds in three minutes against the best of an exhaustive grid at the same quality.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from hasten.clock import MonotonicClock
from hasten.measure.latency import Protocol, compare

clock = MonotonicClock()
TURNS = 6
"""rounds in which every precision has its turn; the first, which touches all memory, is not counted"""


class Block(nn.Module):
    """Two convolutions and a shortcut without weights, as the CIFAR networks of "Deep Residual Learning" have."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer)
        self.conv2, self.bn2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer)
        self.stride, self.side = stride, outer // 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.side, self.side))
        return functional.relu(y + x)


class ResNet(nn.Module):
    """6 n + 2 layers; parameter names as in the weights of the public data folder."""

    def __init__(self, n: int = 3) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        stages, inner = [], 16
        for stage, outer in enumerate((16, 32, 64)):
            blocks = [Block(inner if i == 0 else outer, outer, 2 if i == 0 and stage else 1) for i in range(n)]
            stages.append(nn.Sequential(*blocks))
            inner = outer
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(functional.adaptive_avg_pool2d(x, 1).flatten(1))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="folder with cifar10_resnet20.npz; random weights without")
    parser.add_argument("--only", action="append", choices=["convolutions", "decoder", "tune"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16, help="decoder steps that are timed")
    parser.add_argument("--time-limit", type=float, default=180.0, help="of the search, seconds")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    parts = chosen.only or ["convolutions", "decoder", "tune"]
    if "convolutions" in parts:
        convolutions(chosen.weights, chosen.threads)
    if "decoder" in parts:
        decoder(chosen.tokens)
    if "tune" in parts:
        search(chosen.time_limit)


def times(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each, in turns."""
    rules = Protocol(warmup=3, warmup_time=0.1, min_samples=40, min_time=0.5, max_time=20.0)
    with torch.inference_mode():
        result = compare(calls, rules, clock=clock)
    return {n: s.summary.at(50.0) for n, s in result.samples.items()}


def show(what: str, found: dict[str, float], ours: str, bars: dict[str, float]) -> None:
    """One line for each contender, and the ratios that have a bar."""
    for name, seconds in found.items():
        ratio = seconds / found[ours]
        bar = f", bar {bars[name]}: {'reached' if ratio >= bars[name] else 'MISSED'}" if name in bars else ""
        print(f"{what}: {name} {seconds * 1e3:.3f} ms, {ratio:.2f}x the time of {ours}{bar}", flush=True)


def convolutions(weights: Path | None, threads: int) -> None:
    """ResNet-20."""
    from hasten.compress.int8 import Int8Network

    torch.manual_seed(0)
    model = ResNet().eval()
    if weights is not None:
        stored = np.load(weights / "cifar10_resnet20.npz")
        model.load_state_dict({k: torch.from_numpy(np.array(stored[k])) for k in stored.files})
    images = [torch.randn(16, 3, 32, 32) for _ in range(4)]
    small = Int8Network(only_faster=False)(model, images)
    print(f"ResNet-20, {'trained' if weights else 'random'} weights: {small.report.notes[0]}, "
          f"SQNR {small.report.measured['sqnr']:.1f} dB")  # fmt: skip
    for batch in (1, 64):
        x = torch.randn(batch, 3, 32, 32)
        calls: dict[str, Callable[[], Any]] = {
            "torch eager": lambda x=x: model(x),
            "hasten bytes": lambda x=x: small(x),
        }
        calls |= onnx_runs(model, images, x, threads)
        found = times(calls)
        bars = {"torch eager": 1.5, "onnxruntime int8": 1.0} if batch == 1 else {}
        show(f"ResNet-20, batch {batch}", found, "hasten bytes", bars)


def onnx_runs(model: nn.Module, images: list[torch.Tensor], x: torch.Tensor, threads: int) -> dict[str, Any]:
    """The same network in onnxruntime, or nothing where it is not installed."""
    try:
        import onnxruntime as ort
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    except ImportError:
        print("onnxruntime is not installed: no peer")
        return {}

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{"x": i.numpy()} for i in images]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        plain, whole = f"{folder}/float.onnx", f"{folder}/int8.onnx"
        torch.onnx.export(model, (images[0],), plain, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "batch"}})
        quantize_static(plain, whole, Reader(), quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8,
                        weight_type=QuantType.QInt8, per_channel=True)  # fmt: skip
        for name, path in (("onnxruntime float32", plain), ("onnxruntime int8", whole)):
            options = ort.SessionOptions()
            options.intra_op_num_threads = threads
            session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            given = {"x": x.numpy()}
            runs[name] = lambda session=session, given=given: session.run(None, given)
    return runs


def decoder(tokens: int) -> None:
    """The 245 M decoder, all precisions in turns."""
    from hasten.language import RaggedBatch, random_model
    from hasten.language.config import PRESETS

    room, context = 12, 128
    kinds = ("fp32", "bf16", "int8", "int4", "int8, cache in bytes")
    runners: dict[str, Any] = {}
    for kind in kinds:
        precision, _, cache = kind.partition(", ")
        executor = random_model(PRESETS["random-245m"], dtype=precision).executor
        executor.keep_cache_in("int8" if cache else "auto")
        runners[kind] = executor, executor.new_cache(64 * room, 16)
    for batch, least in ((1, tokens), (64, max(4, tokens // 4))):
        tables = [list(range(i * room, (i + 1) * room)) for i in range(batch)]
        found: dict[str, list[float]] = {k: [] for k in kinds}
        for turn in range(TURNS + 1):
            for kind in kinds[:: 1 if turn % 2 else -1]:
                executor, cache = runners[kind]
                began = clock.now()
                for at in range(context, context + least):
                    executor.step(RaggedBatch.build([([20 + i % 99], at, t) for i, t in enumerate(tables)]), cache)
                if turn:
                    found[kind].append((clock.now() - began) / least)
        medians = {k: float(np.median(t)) for k, t in found.items()}
        for ours in ("int8", "int8, cache in bytes"):
            those = {k: t for k, t in medians.items() if k == ours or not k.startswith("int8")}
            show(f"decoder of 245 M, batch {batch}, one step", those, ours, {"fp32": 2.5, "bf16": 1.5})


def search(limit: float) -> None:
    """tune against its own whole space."""
    import hasten

    torch.manual_seed(0)
    model = nn.Sequential(
        *[m for _ in range(4) for m in (nn.Linear(1024, 1024), nn.GELU())], nn.Linear(1024, 64)
    ).eval()
    data = [torch.randn(4, 1024)]
    budget = "quality>98%"
    began = clock.now()
    quick = hasten.tune(model, data, budget, time_limit=limit)  # type: ignore[operator]
    spent = clock.now() - began
    whole = hasten.tune(model, data, budget, time_limit=None)  # type: ignore[operator]
    best = min((c for c in whole.frontier.candidates if c.feasible), key=lambda c: c.values["latency@p50"])
    assert quick.best is not None
    again = times({"found": lambda: quick.model(data[0]), "grid": lambda: _built(best, model, data)(data[0])})
    print(f"tune: {quick.best.name} after {spent:.0f} s and {len(quick.frontier.candidates)} candidates; "
          f"best of the grid of {len(whole.frontier.candidates)}: {best.name}; "
          f"time {again['found'] / again['grid']:.3f} of it (bar 1.02)")  # fmt: skip


_made: dict[str, nn.Module] = {}


def _built(candidate: Any, model: nn.Module, data: list[Any]) -> nn.Module:
    from hasten.tune.space import recipe_of

    if candidate.name not in _made:
        _made[candidate.name] = recipe_of(candidate.knobs, model, 4).apply(model, data)[0]
    return _made[candidate.name]


if __name__ == "__main__":
    main()
