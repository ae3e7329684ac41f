"""``hasten compress``: a language model as a folder in fewer bits, or with a smaller cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["compress"]


def compress(
    model: Annotated[str, typer.Argument(help="Folder of a language model, or the name of an embedded one.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; it must not exist.")],
    scheme: Annotated[
        str | None,
        typer.Option("--scheme", help="One format for all: W8A8, W8A16, W4A16, W4A8, W3A16, NF4, FP8, MXFP4 …"),
    ] = None,
    keep: Annotated[
        float | None, typer.Option("--keep", help="Share of the quality (inverse perplexity) to keep, such as 0.99.")
    ] = None,
    fastest: Annotated[
        bool, typer.Option("--fastest", help="With --keep: a width for each layer, by measured times. The default.")
    ] = True,
    data: Annotated[
        Path | None, typer.Option("--data", help='Text to calibrate and measure on: .jsonl with "text", or plain text.')
    ] = None,
    sequences: Annotated[int, typer.Option("--sequences", help="Pieces of the text that are used at most.")] = 64,
    length: Annotated[int, typer.Option("--length", help="Tokens of a piece.")] = 256,
    skip: Annotated[
        list[str] | None, typer.Option("--skip", help="Patterns of layers to leave; lm_head if none is given.")
    ] = None,
    gptq: Annotated[
        bool,
        typer.Option(
            "--gptq/--round",
            help="With --data: error-compensated rounding (the default), or to nearest in ranges fitted to the text.",
        ),
    ] = True,
    tokens: Annotated[int, typer.Option("--tokens", help="With --keep: rows that a layer sees in a step.")] = 1,
    technique: Annotated[
        str | None,
        typer.Option(
            "--technique", help="mla: latent attention, exact or a smaller cache; modular: narrower layers (MoDeGPT)."
        ),
    ] = None,
    ratio: Annotated[
        float | None, typer.Option("--ratio", help="With modular: share of the layers' parameters to remove; 0.2.")
    ] = None,
    kv_rank: Annotated[
        float | None, typer.Option("--kv-rank", help="With mla: numbers of the latent, or a share below 1.")
    ] = None,
    rope_dims: Annotated[
        int | None, typer.Option("--rope-dims", help="With mla: numbers that keep their rotation, shared by all heads.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Quantise a language model, or make its cache smaller; `hasten serve` loads the folder.

    --scheme W4A16 for one format, --keep 0.99 for a width for each layer: transformers reads these too.
    --technique mla for latent attention: the same tokens, and with --kv-rank and --rope-dims a smaller cache.
    --technique modular for narrower heads and feed-forwards: --ratio of their parameters goes, fitted to --data.
    """
    from rich.console import Console
    from rich.markup import escape

    from hasten.cli.progress import stages
    from hasten.errors import ConfigurationError
    from hasten.language import load
    from hasten.language.compressed import write
    from hasten.language.compressing import TextSample, by_scheme, keeping, read_texts

    console = Console(stderr=json)
    if [scheme, keep, technique].count(None) != 2:
        raise ConfigurationError(
            "say what to make, one thing: --scheme W4A16, or --keep 0.99 for a width for each layer, or --technique mla"
        )
    if technique not in (None, "mla", "modular"):
        raise ConfigurationError(
            f"--technique is {technique}; here it may be mla or modular, others: hasten tune MODULE --also"
        )
    if technique != "modular" and ratio is not None:
        raise ConfigurationError("--ratio is the share that --technique modular removes; add it")
    if technique == "modular" and data is None:
        raise ConfigurationError("--technique modular is fitted to text and measured on it; give --data FILE")
    if technique != "mla" and (kv_rank is not None or rope_dims is not None):
        raise ConfigurationError("--kv-rank and --rope-dims size the cache of --technique mla; add it")
    if keep is not None and data is None:
        raise ConfigurationError("--keep measures the quality on text; give --data FILE")
    if out.exists():
        raise ConfigurationError(f"{out} exists already; name a folder that does not, or remove it")
    loaded = load(model, dtype="bf16")
    if loaded.folder is None:
        raise ConfigurationError(f"{model} has random weights and no folder; give a model folder")
    patterns = tuple(skip) if skip else ("lm_head",)
    if technique == "modular":
        assert data is not None
        _narrower(console, loaded, out, data, (sequences, length), 0.2 if ratio is None else ratio, json)
        return
    if technique is not None:
        _smaller_cache(console, loaded, out, data, (sequences, length), kv_rank, rope_dims, json)
        return
    with stages(console) as told:
        sample = None
        if data is not None:
            sample = TextSample.of(loaded, read_texts(data), length=length, most=sequences)
        if scheme is not None:
            result = by_scheme(loaded, scheme, sample, skip=patterns, gptq=gptq, progress=told)
        else:
            assert sample is not None
            assert keep is not None
            result = keeping(loaded, keep, sample, skip=patterns, tokens=tokens, progress=told)
        told("writing", 0.97)
        settings = write(result.model, loaded.folder, out)
    before = sum(f.stat().st_size for f in loaded.folder.glob("*.safetensors"))
    after = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    told_json = _document(result, settings, out, before, after)
    if json:
        import json as encoder

        print(encoder.dumps(told_json, ensure_ascii=False))
        return
    _show(console, result, before, after)
    if settings["quant_method"] == "hasten":
        console.print("this format is read by hasten alone; transformers reads symmetric 4 and 8 bits and FP8")
    console.print(f"[bold]{escape(_verdict(result, before, after))}[/]")
    console.print(f"serve it: hasten serve {out}")


def _smaller_cache(
    console: Any, loaded: Any, out: Path, data: Path | None, cut: tuple[int, int], kv_rank: float | None,
    rope_dims: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Latent attention as a folder, and what a token takes; ``cut``: pieces of the text and their tokens."""
    from rich.markup import escape

    from hasten.cli.progress import stages
    from hasten.compress import ToMLA
    from hasten.language.compressing import TextSample, read_texts
    from hasten.language.compressing_cache import smaller_cache

    whole = kv_rank is None or kv_rank < 1 or not math.isfinite(kv_rank)
    fold: int | str = 1 if kv_rank is None and rope_dims is None else "auto"
    made = ToMLA(kv_rank=kv_rank if whole else int(kv_rank or 0), rope_dims=rope_dims, freqfold=fold)
    with stages(console) as told:
        told("reading the text", 0.05)
        sample = None if data is None else TextSample.of(loaded, read_texts(data), most=cut[0], length=cut[1])
        told("converting", 0.2)
        result = smaller_cache(loaded, made, sample)
        told("writing", 0.97)
        result.write(loaded.folder, out)
    before, after = result.bytes_per_token
    if as_json:
        import json as encoder

        old, new = result.perplexity or (None, None)
        content = {
            "folder": str(out), "cache_bytes_per_token_before": before, "cache_bytes_per_token_after": after,
            "exact": made.level == 0, "perplexity_before": old, "perplexity_after": new, "kept": result.kept,
            "notes": list(result.report.notes),
        }  # fmt: skip
        print(encoder.dumps(content, ensure_ascii=False))
        return
    for note in _unsaid(result.report.notes):
        console.print(note, style="dim", markup=False)
    text = f"{before:,} bytes of cache a token -> {after:,}"
    text += "; the same function" if made.level == 0 else ""
    if result.perplexity is not None:
        text += f"; perplexity {result.perplexity[0]:.3f} -> {result.perplexity[1]:.3f} on held-out text"
    console.print(f"[bold]{escape(text)}[/]")
    console.print(f"serve it: hasten serve {out}")


def _narrower(
    console: Any, loaded: Any, out: Path, data: Path, cut: tuple[int, int], ratio: float, as_json: bool
) -> None:
    """Narrower layers as a folder; ``cut``: pieces of the text and their tokens."""
    from rich.markup import escape

    from hasten.cli.progress import stages
    from hasten.compress import ModularDecomposition
    from hasten.language.compressing import TextSample, read_texts
    from hasten.language.compressing_width import narrower

    made = ModularDecomposition(ratio)
    with stages(console) as told:
        sample = TextSample.of(loaded, read_texts(data), most=cut[0], length=cut[1])
        result = narrower(loaded, made, sample, told)
        told("writing", 0.97)
        result.write(loaded.folder, out)
    old, new = result.perplexity or (0.0, 0.0)
    if as_json:
        import json as encoder

        content = {
            "folder": str(out), "removed_of_layers": result.removed[0], "removed_of_model": result.removed[1],
            "perplexity_before": old, "perplexity_after": new, "kept": result.kept, "notes": list(result.report.notes),
        }  # fmt: skip
        print(encoder.dumps(content, ensure_ascii=False))
        return
    for note in _unsaid(result.report.notes)[:5]:
        console.print(note, style="dim", markup=False)
    text = f"perplexity {old:.3f} -> {new:.3f} on held-out text ({result.kept:.2%} kept)"
    console.print(f"[bold]{escape(text)}[/]")
    console.print(f"serve it: hasten serve {out}")


def _unsaid(notes: Sequence[str]) -> list[str]:
    """Notes without the one that was a warning already."""
    return [n for n in notes if not n.startswith("too little calibration")]


def _document(result: Any, settings: Any, out: Path, before: int, after: int) -> dict[str, Any]:
    return {
        "folder": str(out),
        "bytes_before": before,
        "bytes_after": after,
        "perplexity_before": result.perplexity[0] if result.perplexity else None,
        "perplexity_after": result.perplexity[1] if result.perplexity else None,
        "kept": result.kept,
        "predicted_seconds": list(result.predicted) if result.predicted else None,
        "widths": result.widths,
        "quantization": settings,
        "notes": [*result.report.notes, *result.notes],
    }


def _show(console: Any, result: Any, before: int, after: int) -> None:
    from rich.table import Table

    table = Table("layers", "bits", "bytes")
    groups: dict[tuple[str, int], list[Any]] = {}
    rows = {r.layer: r for r in result.report.layers}
    for path, width in result.widths.items():
        groups.setdefault((path.rpartition(".")[2], width), []).append(rows.get(path))
    for (kind, width), found in groups.items():
        size = sum(r.bytes_after for r in found if r is not None)
        table.add_row(f"{len(found)} × {kind}", "kept" if width == 16 else str(width), f"{size:,}" if size else "–")
    console.print(table)
    for note in result.notes[:5]:
        console.print(note, style="dim", markup=False)
    if len(result.notes) > 5:
        console.print(f"… and {len(result.notes) - 5} more (--json)", style="dim")


def _verdict(result: Any, before: int, after: int) -> str:
    text = f"{before:,} bytes -> {after:,}"
    if result.perplexity is not None:
        old, new = result.perplexity
        text += f"; perplexity {old:.3f} -> {new:.3f} on held-out text ({result.kept:.2%} kept)"
    if result.predicted is not None:
        text += (
            f"; layers {result.predicted[0] / result.predicted[1]:.2f}× as fast for one token by this machine's table"
        )
    return text
