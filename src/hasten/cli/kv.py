"""``hasten kv``: caches of keys and values on disk: what a folder holds, whether it is sound, making and using one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["decode", "encode", "inspect", "prune", "verify"]

_Folder = Annotated[Path, typer.Argument(help="Folder that hasten serve --kv-store or hasten kv encode wrote.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _codec(folder: Path) -> Any:
    from hasten.errors import ConfigurationError
    from hasten.language.kvcodec import KVCodec

    path = folder / "codec.npz"
    if not path.is_file():
        raise ConfigurationError(f"{str(folder)!r} holds no codec.npz; name the folder of a KV store")
    return KVCodec.load(path, None)


def _entries(folder: Path) -> list[Path]:
    """Files of keys and values, the least recently used first."""
    return sorted(folder.rglob("*.hkv"), key=lambda p: (p.stat().st_mtime, p.name))


def _heads(folder: Path) -> list[tuple[Path, int, dict[str, Any] | None, str]]:
    """Each file with its size, its head (None where it is unsound) and why."""
    from hasten.errors import DataError
    from hasten.language.kvcodec import head_and_payload

    out: list[tuple[Path, int, dict[str, Any] | None, str]] = []
    for path in _entries(folder):
        blob = path.read_bytes()
        try:
            out.append((path, len(blob), head_and_payload(blob)[0], ""))
        except DataError as error:
            out.append((path, len(blob), None, str(error)))
    return out


def inspect(folder: _Folder, json: _Json = False) -> None:
    """Say what a folder holds: whose caches, how many tokens, at which levels, in how many bytes."""
    import json as encoder

    from rich.console import Console
    from rich.table import Table

    codec = _codec(folder)
    found = _heads(folder)
    levels: dict[int, list[int]] = {}
    for _, size, head, _ in found:
        if head is not None:
            row = levels.setdefault(int(head["level"]), [0, 0, 0])
            row[0] += 1
            row[1] += int(head["tokens"])
            row[2] += size
    unsound = sum(head is None for _, _, head, _ in found)
    document = {
        "model": codec.model,
        "entries": len(found),
        "unsound": unsound,
        "bytes": sum(size for _, size, _, _ in found),
        "levels": {str(k): {"entries": v[0], "tokens": v[1], "bytes": v[2]} for k, v in sorted(levels.items())},
        "quality": {str(k): v for k, v in sorted(codec.quality.items())},
    }
    if json:
        print(encoder.dumps(document))
        return
    table = Table(
        "level", "entries", "tokens", "bytes", "bytes a token", "perplexity", title=f"model {codec.model[:12]}"
    )
    for level, (count, tokens, size) in sorted(levels.items()):
        quality = "exact" if level == 0 else f"x {codec.quality[level]:.4f}" if level in codec.quality else "–"
        table.add_row(str(level), str(count), str(tokens), str(size), f"{size / max(1, tokens):.0f}", quality)
    console = Console()
    console.print(table)
    if unsound:
        console.print(f"{unsound} of {len(found)} entries are unsound; hasten kv verify names them")


def verify(
    folder: _Folder,
    delete: Annotated[bool, typer.Option("--delete", help="Remove the entries that are unsound.")] = False,
    json: _Json = False,
) -> None:
    """Decode every entry; exit with 1 if one is corrupt, cut off or another model's."""
    import json as encoder

    from rich.console import Console

    from hasten.errors import DataError

    codec = _codec(folder)
    bad: list[tuple[str, str]] = []
    entries = _entries(folder)
    for path in entries:
        try:
            codec.check(path.read_bytes())
        except DataError as error:
            bad.append((str(path.relative_to(folder)), str(error)))
            if delete:
                path.unlink(missing_ok=True)
    if json:
        print(encoder.dumps({"entries": len(entries), "unsound": dict(bad), "deleted": len(bad) if delete else 0}))
    else:
        console = Console()
        for name, why in bad:
            console.print(f"{name}: {why}", highlight=False)
        more = ", the others are deleted" if delete and bad else ""
        console.print(f"{len(entries) - len(bad)} of {len(entries)} entries are sound{more}")
    if bad and not delete:
        raise typer.Exit(1)


def prune(
    folder: _Folder,
    keep: Annotated[str, typer.Option(help="Bytes that may stay, such as 500MB; the oldest go first.")],
    json: _Json = False,
) -> None:
    """Delete the oldest entries until the rest fits."""
    import json as encoder

    from hasten.budget import parse_quantity

    _codec(folder)  # a folder that is no store is left alone
    limit = parse_quantity(keep, "bytes")
    sizes = [(path, path.stat().st_size) for path in _entries(folder)]
    total, deleted = sum(size for _, size in sizes), 0
    for path, size in sizes:
        if total <= limit:
            break
        path.unlink(missing_ok=True)
        total -= size
        deleted += 1
    if json:
        print(encoder.dumps({"deleted": deleted, "entries": len(sizes) - deleted, "bytes": total}))
    else:
        print(f"{deleted} of {len(sizes)} entries deleted, {total} bytes are left")


def encode(
    model: Annotated[str, typer.Argument(help="Folder of a model, or the name of an embedded one.")],
    text: Annotated[Path, typer.Argument(help="Text file whose cache is computed and stored.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the store; made if it is not there.")],
    name: Annotated[str | None, typer.Option(help="Name of the context; the file's by default.")] = None,
    levels: Annotated[str, typer.Option(help="Levels to store, by commas; 0 is exact.")] = "0,1,2,3",
    chunk: Annotated[int, typer.Option(help="Tokens of a chunk.")] = 1000,
    dtype: Annotated[
        str, typer.Option(help="Precision of the weights: auto, fp32, bf16, int8, int4; fp8 on a GPU.")
    ] = "auto",
    json: _Json = False,
) -> None:
    """Compute the cache of a text and store it in chunks; the codec is fitted at the first time."""
    import json as encoder

    from hasten.errors import ConfigurationError, ContextLengthError
    from hasten.language import load
    from hasten.language.kvcodec import KVCodec
    from hasten.language.kvfit import fit
    from hasten.language.kvstream import Store
    from hasten.language.kvvalues import capture, fingerprint
    from hasten.serve.kvstore import sample_contexts

    if not text.is_file():
        raise ConfigurationError(f"{str(text)!r} is no file; name a text file")
    try:
        chosen = tuple(int(x) for x in levels.split(","))
    except ValueError:
        raise ConfigurationError(f"--levels is {levels!r}; write for example 0,1,2,3") from None
    one = load(model, dtype=dtype)
    tokens = list(one.tokenizer.encode(text.read_text(encoding="utf-8")))
    if len(tokens) > one.executor.max_context:
        raise ContextLengthError(
            f"{text} has {len(tokens)} tokens, the model takes {one.executor.max_context}; shorten the text"
        )
    output.mkdir(parents=True, exist_ok=True)
    path = output / "codec.npz"
    codec = KVCodec.load(path, one.config) if path.is_file() else fit(one, sample_contexts(one))
    if codec.model != fingerprint(one):
        raise ConfigurationError(
            f"{str(output)!r} is the KV store of another model or precision ({codec.model[:8]}…, this is "
            f"{fingerprint(one)[:8]}…); give every model a folder of its own"
        )
    if not path.is_file():
        codec.save(path)
    index = Store(output).put(name or text.stem, codec, capture(one, tokens), tokens, levels=chosen, chunk=chunk)
    if json:
        print(encoder.dumps(index))
        return
    print(f"{name or text.stem}: {len(tokens)} tokens in {len(index['chunks'])} chunks")


def decode(
    model: Annotated[str, typer.Argument(help="Folder of a model, or the name of an embedded one.")],
    folder: _Folder,
    name: Annotated[str, typer.Argument(help="Name of the context.")],
    level: Annotated[int, typer.Option(help="Level to read; 0 is exact.")] = 2,
    prompt: Annotated[str, typer.Option(help="Text behind the context.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Tokens to write behind it.")] = 32,
    dtype: Annotated[
        str, typer.Option(help="Precision of the weights: auto, fp32, bf16, int8, int4; fp8 on a GPU.")
    ] = "auto",
) -> None:
    """Read a stored cache and go on writing from it, without computing the context."""
    from hasten.errors import ConfigurationError, ContextLengthError, DataError
    from hasten.language import load
    from hasten.language.kvcodec import KVCodec
    from hasten.language.kvstream import Store
    from hasten.language.kvvalues import fingerprint, write_cache
    from hasten.language.ragged import RaggedBatch

    one = load(model, dtype=dtype)
    _codec(folder)
    codec = KVCodec.load(folder / "codec.npz", one.config)
    if codec.model != fingerprint(one):
        raise ConfigurationError(f"{str(folder)!r} is the KV store of another model or precision; name its own model")
    store = Store(folder)
    index = store.index(name)
    tokens = list(index["text"])
    more = list(one.tokenizer.encode(prompt)) if prompt else []
    total = len(tokens) + len(more) + max_tokens
    if total > one.executor.max_context:
        raise ContextLengthError(
            f"context, prompt and answer are {total} tokens, the model takes {one.executor.max_context}; ask for less"
        )
    blocks = -(-total // 16)
    cache, table = one.executor.new_cache(blocks, 16), list(range(blocks))
    for number in range(len(index["chunks"])):
        if str(level) not in index["chunks"][number]["bytes"]:
            kept = ", ".join(index["chunks"][number]["bytes"])
            raise DataError(f"{name!r} is not stored at level {level}; choose one of {kept}")
        write_cache(cache, table, codec.decode(store.get(name, number, level)))
    known = [*tokens, *more]
    done = len(tokens) - 1  # the last token's logits are computed anew
    out: list[int] = []
    while len(out) < max_tokens:
        logits = one.executor.step(RaggedBatch.build([(known[done:], done, table)]), cache)
        done = len(known)
        token = int(logits[-1].argmax())
        if token in (one.config.eos_token_ids or ()):
            break
        out.append(token)
        known.append(token)
    print(prompt + one.tokenizer.decode(out))
