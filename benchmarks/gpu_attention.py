"""Decode attention on a GPU: lean shares beside torch's SDPA and FlexAttention, 1k to 512k tokens of context.

All compute the same batch in bfloat16, 32 query heads over 8 key heads of 128, and are first compared with float32
softmax. Ours reads a paged cache; the peers read a dense one, which is their faster form, with the query heads of a
group as query rows. Times are of the kernels alone: each call is captured as a CUDA graph and replayed. Ragged batches
(one long sequence, many short) cost the peers padding, as they do in a server.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hasten.language import lean_triton
from hasten.language.lean_triton import Shares

HEADS, KV_HEADS, WIDTH, PAGE = 32, 8, 128, 16
SETTINGS = ((64, 2, 4, 3), (64, 3, 4, 2), (64, 2, 8, 3), (128, 1, 8, 3), (32, 4, 4, 4), (64, 4, 2, 2))
"""(tile, programs per multiprocessor, warps, stages)"""
FLEX = {(1, 2**12), (16, 2**12), (1, 2**16), (4, 2**17), (1, 2**19)}
"""even batches that FlexAttention runs too: it compiles seconds for each shape"""


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out (it compiles for a minute)")
    chosen = parser.parse_args()
    if not torch.cuda.is_available() or lean_triton.triton is None:
        raise SystemExit("this benchmark needs a CUDA device and Triton")
    properties = torch.cuda.get_device_properties(0)
    print(f"{properties.name}, torch {torch.__version__}, triton {lean_triton.triton.__version__}")
    best = tune(properties.multi_processor_count)
    rows = []
    for lengths in cases():
        row = one_case(lengths, best, not chosen.no_flex)
        rows.append(row)
        print(row.pop("text"), flush=True)
    for peer in ("sdpa", "flex", "one block per head"):
        ratios = [r[peer] / r["lean"] for r in rows if r.get(peer)]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            print(
                f"geometric mean over {peer}: {mean:.2f}x ({len(ratios)} cases, {min(ratios):.2f} to {max(ratios):.2f})"
            )
    if chosen.json:
        with open(chosen.json, "w", encoding="utf-8") as file:
            json.dump({"device": properties.name, "setting": best, "rows": rows}, file)


def cases() -> list[list[int]]:
    """Lengths of each batch."""
    even = [
        [n] * b for n in (2**10, 2**12, 2**14, 2**16, 2**17, 2**18, 2**19) for b in (1, 4, 16, 64) if n * b <= 2**20
    ]
    ragged = [[2**16] + [1024] * 15, [2**18] + [2048] * 7, [2**19] + [512] * 31, [1000 * i for i in range(1, 33)]]
    return even + ragged


def tune(processors: int) -> tuple[int, int, int, int]:
    """The setting with the least total time over three batches."""
    totals = {}
    for setting in SETTINGS:
        total = 0.0
        try:
            for lengths in ([2**12], [2**12] * 16, [2**14] * 16, [2**16], [2**16] + [1024] * 15):
                query, pages, tables, held = batch(lengths)
                total += timed(ours(query, pages, tables, held, setting, processors)) / (sum(lengths) / 2**16)
        except Exception as error:  # a setting may need more shared memory than there is
            print(f"setting {setting}: {str(error).splitlines()[0][:90]}")
            continue
        totals[setting] = total
        print(f"setting (tile, programs, warps, stages) {setting}: {total * 1e6:.1f} us in all")
    return min(totals, key=totals.__getitem__)


def batch(lengths: list[int]) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
    """Query, pages, block tables in shuffled order, lengths."""
    generator = torch.Generator("cuda").manual_seed(0)
    blocks = [-(-n // PAGE) for n in lengths]
    place: Any = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
    pages = tuple(torch.randn(sum(blocks), KV_HEADS, PAGE, WIDTH, **place) for _ in range(2))
    order = torch.randperm(sum(blocks), device="cuda", generator=generator).to(torch.int32)
    tables = torch.zeros(len(lengths), max(blocks), dtype=torch.int32, device="cuda")
    at = 0
    for row, count in enumerate(blocks):
        tables[row, :count] = order[at : at + count]
        at += count
    held = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    return torch.randn(len(lengths), HEADS, WIDTH, **place), pages, tables, held  # type: ignore[return-value]


def ours(query: Tensor, pages: Any, tables: Tensor, held: Tensor, setting: Any, processors: int) -> Callable[[], Any]:
    """A call with its shares made beforehand, as a step makes them once for all layers."""
    tile, programs, warps, stages = setting
    shares = Shares.of(held, HEADS, KV_HEADS, WIDTH, tile=tile, grid=programs * processors)
    return lambda: lean_triton.attend(
        query, *pages, tables, shares, scale=WIDTH**-0.5, warps=warps, stages=stages
    )[0]  # fmt: skip


def dense(pages: Any, tables: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """The cache padded to the longest: (batch, kv_heads, context, width) twice."""
    used = tables.long()
    return tuple(  # type: ignore[return-value]
        half[used].transpose(1, 2).reshape(len(lengths), KV_HEADS, -1, WIDTH)[:, :, : max(lengths)].contiguous()
        for half in pages
    )


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call, replayed from a graph."""
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(call, rep=20)) / 1e3


def one_case(lengths: list[int], best: Any, with_flex: bool) -> dict[str, Any]:
    """Times of all contenders on one batch."""
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    query, pages, tables, held = batch(lengths)
    call = ours(query, pages, tables, held, best, processors)
    found = call()
    times: dict[str, Any] = {"lengths": lengths, "lean": timed(call)}
    # One block per head: as many programs as there are outputs, where the contexts are equal.
    if len(set(lengths)) == 1:
        shares = Shares.of(held, HEADS, KV_HEADS, WIDTH, tile=best[0], grid=len(lengths) * KV_HEADS)
        times["one block per head"] = timed(
            lambda: lean_triton.attend(query, *pages, tables, shares, scale=WIDTH**-0.5, warps=best[2], stages=best[3])
        )
    padded = len(lengths) * max(lengths)
    if padded <= 2**21:
        keys, values = dense(pages, tables, lengths)
        grouped = query.view(len(lengths), KV_HEADS, HEADS // KV_HEADS, WIDTH)
        mask = None
        if len(set(lengths)) > 1:
            mask = (torch.arange(max(lengths), device="cuda")[None] < held[:, None])[:, None, None]
        expected = attention32(grouped, keys, values, held)
        gap = float((found.view_as(expected).float() - expected).abs().max())
        if gap > 0.02:
            raise SystemExit(f"lean differs from float32 softmax by {gap} at {lengths[:3]}")
        times["sdpa"] = timed(lambda: functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask))
        if with_flex and (len(set(lengths)) > 1 or (len(lengths), max(lengths)) in FLEX):
            try:
                times["flex"] = timed(flex(grouped, keys, values, held, lengths))
            except Exception as error:  # whatever its compiler raises on this shape
                print(f"FlexAttention: {type(error).__name__} at {lengths[:2]}")
    size = sum(lengths) * KV_HEADS * WIDTH * 2 * 2
    peers = ", ".join(
        f"{k} {v * 1e6:.1f} us ({v / times['lean']:.2f}x)" for k, v in times.items() if k not in ("lean", "lengths")
    )
    shape = (
        f"{len(lengths)} x {lengths[0]}"
        if len(set(lengths)) == 1
        else f"{len(lengths)} of {min(lengths)} to {max(lengths)}"
    )
    times["text"] = f"{shape}: lean {times['lean'] * 1e6:.1f} us, {size / times['lean'] / 1e12:.2f} TB/s; {peers}"
    return times


def attention32(grouped: Tensor, keys: Tensor, values: Tensor, held: Tensor) -> Tensor:
    """Plain softmax in float32, a sequence at a time."""
    out = []
    for index in range(grouped.shape[0]):
        size = int(held[index])
        scores = grouped[index].float() @ keys[index, :, :size].float().transpose(-1, -2) * WIDTH**-0.5
        out.append(torch.softmax(scores, -1) @ values[index, :, :size].float())
    return torch.stack(out)


_compiled: Any = None


def flex(grouped: Tensor, keys: Tensor, values: Tensor, held: Tensor, lengths: list[int]) -> Callable[[], Any]:
    """FlexAttention, compiled; padding is masked by blocks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    global _compiled
    if _compiled is None:
        torch._dynamo.config.cache_size_limit = 64
        _compiled = torch.compile(flex_attention, dynamic=False)
    mask = None
    if len(set(lengths)) > 1:
        rows = grouped.shape[2]
        mask = create_block_mask(lambda b, h, q, k: k < held[b], len(lengths), None, rows, max(lengths), device="cuda")
    call = lambda: _compiled(grouped, keys, values, block_mask=mask)  # noqa: E731
    call()
    return call


if __name__ == "__main__":
    main()
