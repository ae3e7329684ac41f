"""``hasten bench speculate``: what guessing tokens brings for a model and its draft."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["bench_speculate"]


def bench_speculate(
    model: Annotated[str, typer.Argument(help="Folder of a model, or the name of an embedded one.")] = "pycode-4m",
    draft: Annotated[str | None, typer.Option(help="Its draft; the embedded model has one of its own.")] = None,
    speculate: Annotated[str, typer.Option(help="auto, draft or ngram.")] = "auto",
    batch: Annotated[str, typer.Option(help="Sequences that decode together, such as 1,4,16.")] = "1,2,4,8,16,32",
    length: Annotated[int | None, typer.Option(help="The same number of guesses always; by goodput if left out.")] = None,
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
    dtype: Annotated[str, typer.Option(help="Precision of the weights: auto, fp32, bf16, int8, int4.")] = "auto",
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
        for r in rows:
            table.add_row(r.name, f"{r.tokens_per_pass:.2f}", f"{r.accepted:.2f}", str(r.target_calls), str(r.draft_calls))
        console.print(table)
        return
    if choose(target, speculate, draft) is None:
        raise ConfigurationError("--speculate off leaves nothing to measure; choose auto, draft or ngram")
    policy = None if length is None else FixedSpeculation(length)
    with Progress(console=Console(stderr=True), transient=True, disable=json) as bar:
        task = bar.add_task("decoding", total=1.0)
        results = measure_speculation(
            target,
            lambda: choose(target, speculate, draft),  # type: ignore[arg-type,return-value]
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
