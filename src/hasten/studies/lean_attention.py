"""LeanAttention: equal shares of all tiles of all heads, exact, and faster on ragged decode batches.

"Lean Attention: Hardware-Aware Scalable Attention Mechanism for the Decode-Phase of Transformers", Sanovar et al. 2024,
arXiv:2405.10480. Balance is counted, time is measured on CPU threads with one kernel under three partitions. The
figures of a GPU need one; the Triton kernel is tested under Triton's interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from hasten.studies._speculation import medians
from hasten.studies.study import Check, Scale, Study

__all__ = ["study"]


def run(scale: Scale) -> Iterator[Check]:
    """The checks of the card."""
    yield from exactness(scale)
    scale.progress("balance", 0.2)
    yield from balance(scale)
    scale.progress("time on the CPU", 0.4)
    yield from cpu_time(scale)
    yield from peers(scale)
    yield from gpu_time()
    scale.progress("done", 1.0)


def exactness(scale: Scale) -> Iterator[Check]:
    """Any split and any merge tree, and every backend."""
    import torch

    from hasten.language.attention import decode
    from hasten.language.lean import State
    from hasten.language.lean import partial as partial_attention

    rng = np.random.default_rng(scale.seed)
    torch.manual_seed(scale.seed)
    worst = 0.0
    for _ in range(scale.choose(quick=100, full=2000)):
        time = int(rng.integers(1, 64))
        q, k, v = torch.randn(2, 8).double() * 30, torch.randn(2, time, 8).double(), torch.randn(2, time, 8).double()
        edges = [0, *np.sort(rng.integers(0, time + 1, 4)).tolist(), time]
        parts = [partial_attention(q, k[:, a:b], v[:, a:b]) for a, b in zip(edges, edges[1:], strict=False)]
        while len(parts) > 1:
            i, j = sorted(rng.choice(len(parts), 2, replace=False).tolist())
            right: State = parts.pop(j)
            parts.append(parts.pop(i).merge(right))
        scores = (k @ q[..., None]).squeeze(-1) * 8**-0.5
        plain = (torch.softmax(scores, -1)[..., None, :] @ v).squeeze(-2)
        worst = max(worst, float((parts[0].output() - plain).abs().max() / plain.abs().max()))
    yield Check.at_most("largest relative error of any merge tree, float64", worst, 1e-12)
    lengths = [700, 0, 1, 333, 64]
    q, (k, v) = torch.randn(5, 8, 64), torch.randn(2, 5, 2, 700, 64)
    expected = decode(q, k, v, lengths, backend="reference")
    gap = max(
        float((decode(q, k, v, lengths, backend=b, tile=64, grid=3) - expected).abs().max())
        for b in ("lean", "flash-2", "flash-decoding", "sdpa")
    )
    yield Check.at_most("largest difference of the backends, float32", gap, 5e-6, note="ragged, grouped, one empty")


def balance(scale: Scale) -> Iterator[Check]:
    """Longest shares at G = 264, the grid of 132 multiprocessors with two blocks each."""
    from hasten.language import lean

    for tiles, heads, expected in (([512], 32, (63, 512, 64)), ([2048], 56, (435, 2048, 512))):
        found = lean.compare([n * 256 for n in tiles], heads)
        yield Check.equal(
            f"longest share, {heads} heads of {tiles[0]} tiles",
            found["lean"],
            expected[0],
            "tiles",
            f"one block per head {found['flash-2']}, fixed split {found['flash-decoding']}; expected {expected}",
        )
    ragged = lean.compare([n * 256 for n in (1024, 300, 50, 2000)], 32)
    yield Check.equal("longest share, ragged batch", ragged["lean"], 409, "tiles", f"{ragged}; the card: 409/2000/1000")
    rng = np.random.default_rng(scale.seed)
    ratios, beaten = [], 0
    for heads in (4, 8, 16, 32):
        for batch in (1, 2, 4, 8, 16):
            for longest in (2**13, 2**15, 2**17):
                lengths = np.exp(rng.uniform(math.log(512), math.log(longest), batch)).astype(int).tolist()
                found = lean.compare(lengths, heads)
                ratios.append(found["flash-decoding"] / found["lean"])
                plan = lean.partition(lengths, heads)
                beaten += any(
                    lean.fixed_split(lengths, heads, splits=s).longest < plan.longest for s in (1, 2, 3, 4, 8, 16, 32)
                )
    yield Check.equal("grid points where a fixed split is shorter", beaten, 0)
    yield Check.at_least(
        "mean ratio of longest shares against the heuristic split",
        float(np.mean(ratios)),
        1.5,
        "×",
        f"{len(ratios)} ragged batches, 4 to 32 key heads, contexts of 512 to 131,072; least {min(ratios):.2f}",
    )


def cpu_time(scale: Scale) -> Iterator[Check]:
    """Two threads, one long sequence and three short ones."""
    import numba
    import torch

    from hasten.language.attention import decode

    threads = numba.get_num_threads()
    if threads < 2:
        yield Check.unavailable("time of one task per head over lean", "this run has one thread; shares need two", "×")
        return
    lengths = [32_768, 1024, 1024, 1024]
    blocks = [-(-n // 16) for n in lengths]
    tables = torch.zeros(4, max(blocks), dtype=torch.int32)
    at = 0
    for row, count in enumerate(blocks):
        tables[row, :count] = torch.arange(at, at + count)
        at += count
    for heads in (1, 4):
        cache: Any = tuple(torch.randn(2, at, 1, 16, 64))
        query = torch.randn(4, heads, 64)

        def go(backend: str, query: Any = query, cache: Any = cache) -> Any:
            return lambda: decode(query, cache, tables, lengths, backend=backend)

        times = medians({b: go(b) for b in ("lean", "flash-2", "flash-decoding")}, scale.choose(quick=9, full=41))
        rate = 2 * sum(lengths) * 64 * 4 / times["lean"]
        yield Check.at_least(
            f"time of one task per (sequence, head) over lean, {heads} query heads",
            times["flash-2"] / times["lean"],
            1.5,
            "×",
            f"{threads} threads, float32; lean {times['lean'] * 1e3:.2f} ms ({rate / 1e9:.0f} GB/s), equal "
            f"pieces of each {times['flash-decoding'] * 1e3:.2f} ms",
        )


def peers(scale: Scale) -> Iterator[Check]:
    """One sequence on the CPU, float32, eight query heads over two key heads of 64: what torch has beside ours."""
    import shutil

    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from hasten.language.attention import decode

    flexible, why = None, "no C++ compiler here, which torch.compile needs"
    if shutil.which("g++") or shutil.which("c++") or shutil.which("clang++"):
        from torch.nn.attention.flex_attention import flex_attention

        flexible = torch.compile(flex_attention)
    generator = torch.Generator().manual_seed(scale.seed)
    shown: list[str] = []
    ratios: dict[str, list[float]] = {"SDPA": [], "FlexAttention": []}
    for context in scale.choose(quick=(1024, 8192), full=(1024, 4096, 16_384, 65_536, 262_144, 524_288)):
        query = torch.randn(1, 8, 64, generator=generator)
        keys, values = (torch.randn(1, 2, context, 64, generator=generator) for _ in range(2))
        runs: dict[str, Any] = {
            "lean": partial(decode, query, keys, values, [context]),
            "SDPA": partial(scaled_dot_product_attention, query[:, :, None], keys, values, enable_gqa=True),
        }
        if flexible is not None:
            runs["FlexAttention"] = partial(flexible, query[:, :, None], keys, values, enable_gqa=True)
            try:
                same = torch.allclose(runs["FlexAttention"]()[:, :, 0], runs["lean"](), atol=1e-4)
                assert same, "the answers differ"
            except Exception as error:  # a compiler can fail in many ways
                flexible, why = None, f"FlexAttention does not compile here ({type(error).__name__})"
                runs.pop("FlexAttention")
        times = medians(runs, scale.choose(quick=5, full=15))
        shown.append(f"{context}: " + ", ".join(f"{n} {t * 1e3:.2f} ms" for n, t in times.items()))
        for name in ratios:
            if name in times:
                ratios[name].append(times[name] / times["lean"])
    for name, found in ratios.items():
        title = f"time of {name} over lean's, one sequence on the CPU, geometric mean of the contexts"
        if found:
            yield Check.at_least(title, float(np.exp(np.mean(np.log(found)))), 1.0, "×", "; ".join(shown))
        else:
            yield Check.unavailable(title, why, "×")


def gpu_time() -> Iterator[Check]:
    """The published setting."""
    import torch

    name = "geometric mean over one block per head, 1k to 512k"
    if not torch.cuda.is_available():
        yield Check.unavailable(name, "no GPU here; the Triton kernel is tested under the interpreter only", "×")
        return
    from hasten.language import lean_triton
    from hasten.language.attention import decode

    if lean_triton.triton is None:
        yield Check.unavailable(name, "Triton is not installed", "×")
        return
    ratios = []
    for context in (2**10, 2**13, 2**16, 2**19):
        for batch in (1, 4, 16):
            if context * batch > 2**20:
                continue
            pages = torch.randn(batch * context // 16, 8, 16, 128, device="cuda", dtype=torch.bfloat16)
            tables = torch.arange(batch * context // 16, device="cuda", dtype=torch.int32).view(batch, -1)
            query = torch.randn(batch, 32, 128, device="cuda", dtype=torch.bfloat16)

            def go(grid: int | None, q: Any = query, p: Any = pages, t: Any = tables, n: int = context) -> Any:
                def once() -> None:
                    decode(q, (p, p), t, [n] * q.shape[0], backend="triton", grid=grid)
                    torch.cuda.synchronize()

                return once

            times = medians({"lean": go(None), "head": go(8 * batch)}, 10)
            ratios.append(times["head"] / times["lean"])
    yield Check.at_least(name, float(np.exp(np.mean(np.log(ratios)))), 1.5, "×", "8 key heads, width 128, bfloat16")


study = Study(
    system="lean-attention",
    claim="Equal shares of all tiles make exact decode attention faster than one block per head and than fixed splits.",
    published={
        "decode attention, average": "2.6x over FlashAttention-2 (abstract)",
        "512k context": "up to 8.33x over FlashAttention-2 (abstract)",
        "over FlashDecoding": "1.73x on average, 2.18x at 256k (later revision)",
    },
    run=run,
)
