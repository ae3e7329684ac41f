"""``hasten bench speculate`` and ``bench attention``: what guesses bring, and how fast the cache is read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["bench_attention", "bench_speculate"]


def bench_speculate(
    model: Annotated[str, typer.Argument(help="Folder of a model, or the name of an embedded one.")] = "pycode-4m",
    draft: Annotated[str | None, typer.Option(help="Its draft; the embedded model has one of its own.")] = None,
    speculate: Annotated[str, typer.Option(help="auto, draft, ngram, tree[:12], triforce[-means][:1024].")] = "auto",
    batch: Annotated[str, typer.Option(help="Sequences that decode together, such as 1,4,16.")] = "1,2,4,8,16,32",
    length: Annotated[
        int | None, typer.Option(help="The same number of guesses always; by goodput if left out.")
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(help="Compare shapes instead, in tokens per pass: chain:5, kary:2x5, fixed:16, dynamic:16."),
    ] = None,
    prompts: Annotated[int, typer.Option(help="Prompts, used in turn.")] = 16,
    prompt_len: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 256,
    prompt_file: Annotated[Path | None, typer.Option(help="Text file with one prompt a line instead.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 96,
    rounds: Annotated[int, typer.Option(help="Turns of each.")] = 3,
    temperature: Annotated[float, typer.Option(help="For --shapes; speed is measured greedily.")] = 0.0,
    dtype: Annotated[
        str, typer.Option(help="Precision of the weights: auto, fp32, bf16, int8, int4; fp8 on a GPU.")
    ] = "auto",
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Answers are equal to the last token, at some cost in speed.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Decode with and without speculation and say what it brings: speed-up, acceptance, tokens per pass."""
    import json as codec

    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from hasten.errors import ConfigurationError
    from hasten.language import load
    from hasten.language.speculate.choose import DRAFTS, choose
    from hasten.serve.bench.speculate import measure_speculation, python_prompts
    from hasten.serve.policy import FixedSpeculation

    try:
        batches = [int(b) for b in batch.split(",")]
    except ValueError:
        raise ConfigurationError(f"--batch is {batch!r}; write for example 1,4,16") from None
    if min(batches) < 1 or rounds < 1 or max_tokens < 2:
        raise ConfigurationError("--batch and --rounds must be at least 1, --max-tokens at least 2")
    target = load(model, dtype=dtype, deterministic=deterministic)
    if prompt_file is not None:
        lines = prompt_file.read_text(encoding="utf-8").splitlines()
        asked = [target.tokenizer.encode(line) for line in lines if line]
    else:
        asked = python_prompts(target.tokenizer, prompts, prompt_len, seed)
    console = Console()
    if shapes is not None:
        name = draft or DRAFTS.get(model)
        if name is None:
            raise ConfigurationError(f"{model} has no draft of its own; name one with --draft")
        from hasten.language.speculate.compare import compare, parse_shapes

        small = load(name)
        chosen = parse_shapes(shapes, target, small, asked[len(asked) // 2 :])
        rows = compare(target, small, asked[: len(asked) // 2], chosen, max_tokens=max_tokens, temperature=temperature)
        if json:
            print(codec.dumps([r.to_json() for r in rows]))
            return
        table = Table("shape", "tokens per pass", "accepted", "target passes", "draft calls", title=model)
        for row in rows:
            table.add_row(
                row.name,
                f"{row.tokens_per_pass:.2f}",
                f"{row.accepted:.2f}",
                str(row.target_calls),
                str(row.draft_calls),
            )
        console.print(table)
        return
    if choose(target, speculate, draft) is None:
        raise ConfigurationError("--speculate off leaves nothing to measure; choose auto, ngram, draft, tree …")
    policy = None if length is None else FixedSpeculation(length)
    with Progress(console=Console(stderr=True), transient=True, disable=json) as bar:
        task = bar.add_task("decoding", total=1.0)
        results = measure_speculation(
            target,
            lambda: choose(target, speculate, draft),
            asked,
            batches=batches,
            max_tokens=max_tokens,
            rounds=rounds,
            policy=policy,
            progress=lambda share: bar.update(task, completed=share),
        )
    if json:
        print(codec.dumps([r.to_json() for r in results]))
        return
    table = Table("batch", "tokens/s", "with guesses", "speed-up (95 %)", "accepted", "guesses", "tokens per pass",
                  "accepted by place", title=f"{model}, {speculate}")  # fmt: skip
    for r in results:
        table.add_row(
            str(r.batch), f"{r.plain:.0f}", f"{r.speculative:.0f}", f"{r.speedup:.2f} ({r.low:.2f}–{r.high:.2f})",
            f"{r.acceptance:.0%}", f"{r.mean_length:.1f}", f"{r.tokens_per_pass:.2f}",
            " ".join(f"{p:.2f}" for p in r.per_position[:6]),
        )  # fmt: skip
    console.print(table)
    for r in results:
        if r.speedup < 1.0:
            console.print(f"batch {r.batch}: slower with speculation, by {1 - r.speedup:.1%}")
        if not r.same_tokens:
            console.print(f"batch {r.batch}: some answers differ at a near tie; --deterministic rules that out")


def bench_attention(
    context: Annotated[str, typer.Option(help="Tokens of context, such as 1k,32k or 1k..512k.")] = "1k..32k",
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    kv_heads: Annotated[int, typer.Option(help="Key heads.")] = 2,
    width: Annotated[int, typer.Option(help="Numbers of a head.")] = 64,
    batch: Annotated[str, typer.Option(help="Sequences, such as 1,4,16.")] = "1,4",
    ragged: Annotated[bool, typer.Option("--ragged", help="All sequences but the first have a quarter.")] = False,
    rounds: Annotated[int, typer.Option(help="Turns of each.")] = 9,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time decode attention by equal shares, by one task per head, by equal pieces, and by torch's kernel."""
    import json as codec

    import numba
    import torch
    from rich.console import Console
    from rich.table import Table

    from hasten.clock import MonotonicClock
    from hasten.errors import ConfigurationError
    from hasten.language import lean
    from hasten.language.attention import decode

    clock = MonotonicClock()
    try:
        counts = [int(b) for b in batch.split(",")]
        contexts = _contexts(context)
    except ValueError:
        raise ConfigurationError(
            f"--context {context!r} or --batch {batch!r} cannot be read; write 1k,32k and 1,4"
        ) from None
    rows = []
    for tokens in contexts:
        for count in counts:
            lengths = [tokens] + [max(1, tokens // 4) if ragged else tokens] * (count - 1)
            pages = -(-tokens // 16)
            keys, values = torch.randn(2, count * pages, kv_heads, 16, width)
            tables = torch.arange(count * pages, dtype=torch.int32).view(count, pages)
            query = torch.randn(count, heads, width)
            times: dict[str, list[float]] = {b: [] for b in ("lean", "flash-2", "flash-decoding", "sdpa")}
            for turn in range(rounds + 1):
                for name in list(times) if turn % 2 else list(times)[::-1]:
                    began = clock.now()
                    decode(query, (keys, values), tables, lengths, backend=name)
                    if turn:
                        times[name].append(clock.now() - began)
            middle = {name: sorted(t)[len(t) // 2] for name, t in times.items()}
            plan = lean.partition(lengths, kv_heads, 256, numba.get_num_threads())
            read = 2 * sum(lengths) * kv_heads * width * 4
            rows.append(
                {"context": tokens, "batch": count, "seconds": middle, "occupancy": plan.occupancy,
                 "bytes_per_second": read / middle["lean"]}
            )  # fmt: skip
    if json:
        print(codec.dumps(rows))
        return
    table = Table("context", "batch", "lean", "one task per head", "equal pieces", "torch, padded", "lean reads")
    for row in rows:
        seconds: dict[str, float] = row["seconds"]  # type: ignore[assignment]
        rate = float(row["bytes_per_second"])  # type: ignore[arg-type]
        table.add_row(
            str(row["context"]),
            str(row["batch"]),
            *(f"{seconds[n] * 1e3:.2f} ms" for n in ("lean", "flash-2", "flash-decoding", "sdpa")),
            f"{rate / 1e9:.1f} GB/s",
        )
    Console().print(table)


def _contexts(text: str) -> list[int]:
    def number(part: str) -> int:
        part = part.strip().lower()
        return int(part[:-1]) * 1024 if part.endswith("k") else int(part)

    first, dots, last = text.partition("..")
    if not dots:
        return [number(p) for p in text.split(",")]
    out = [number(first)]
    while out[-1] * 2 <= number(last):
        out.append(out[-1] * 2)
    return out
