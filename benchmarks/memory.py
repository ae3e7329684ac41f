"""Memory of a served model beyond its weights and its KV pool.

The server's processes are added up: memory of their own, and the pages of each mapped file (libraries) once. That is
what PSS would say if nothing else on the machine used the same libraries. The weights are the bytes of the checkpoint,
so a second copy would show. The pool is filled by requests before the reading that counts, since memory that nobody
has touched is not there yet; what there is when the server is ready, part of the pool in it, is noted beside.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from harness import MODEL, Row, options, report
from random_model import ensure

from hasten.language.loading import model_folder
from hasten.language.weights import read_config
from hasten.serve.bench.dataset import random_specs
from hasten.serve.bench.drive import replay
from hasten.serve.server import start

_MIB = 2**20


def reading(pid: int) -> dict[str, Any]:
    """Bytes of the process and its children: anonymous memory of each, pages of each file once."""
    root = psutil.Process(pid)
    anonymous = resident = 0
    files: dict[str, int] = {}
    processes = []
    for process in [root, *root.children(recursive=True)]:
        own = 0
        for mapping in process.memory_maps(grouped=True):
            if mapping.path.startswith("/"):  # its own changed pages are private, the rest is shared
                own += mapping.private_dirty
                clean = mapping.rss - mapping.private_dirty
                files[mapping.path] = max(files.get(mapping.path, 0), clean)
            else:
                own += mapping.rss
        anonymous += own
        resident += process.memory_info().rss
        processes.append({"command": process.cmdline()[1:3], "anonymous": own, "rss": process.memory_info().rss})
    largest = dict(sorted(files.items(), key=lambda item: -item[1])[:8])
    whole = sum(files.values())
    return {
        "memory": anonymous + whole,
        "anonymous": anonymous,
        "files": whole,
        "rss": resident,
        "processes": processes,
        "largest": {Path(path).name: size for path, size in largest.items()},
    }


def measure(name: str, chosen: Any) -> tuple[Row, dict[str, Any]]:
    """One model: the row and what is behind it."""
    folder = model_folder(name)
    config = read_config(folder)
    weights = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    pool = chosen.cache_tokens * 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2
    length = config.max_position_embeddings // 4 * 3
    room = min(config.max_position_embeddings - length, 16)
    count = max(chosen.sequences, -(-2 * chosen.cache_tokens // length))
    specs = [replace(s, arrival=0.0) for s in random_specs(count, length, room, 0.0, 0)]
    server = start(
        name,
        threads=chosen.threads,
        dtype="bf16",
        num_blocks=chosen.cache_tokens // 16,
        max_num_seqs=chosen.sequences,
        token_budget=512,
        max_queue=4096,
    )
    with server:
        before = reading(server.process.pid)
        records = asyncio.run(replay(server.url, specs))
        after = reading(server.process.pid)
    failed = [r.error for r in records if r.error]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(records)} requests failed: {failed[0]}")
    extra = {"ready": before["memory"] - weights, "under load": after["memory"] - weights - pool}
    worst = max(extra["under load"], before["memory"] - weights - pool) / _MIB
    note = (
        f"{extra['ready'] / _MIB:.0f} MiB when ready (with what the warm-up has touched of the pool), "
        f"{extra['under load'] / _MIB:.0f} MiB after {count} requests, "
        f"of which {after['files'] / _MIB:.0f} MiB are pages of libraries; "
        f"weights {weights / _MIB:.0f}, pool {pool / _MIB:.0f} MiB"
    )
    row = Row(f"memory beside weights and pool, {folder.name}", unit="MiB", ours=worst, score=worst, at_least=300.0)
    details = {"weights": weights, "pool": pool, "ready": before, "loaded": after}
    return replace(row, limit=True, note=note), details


def main() -> None:
    """Run and print."""
    parser = options(__doc__)
    parser.add_argument("--models", nargs="+", default=["pycode-4m", str(MODEL)], help="names or folders")
    parser.add_argument("--cache-tokens", type=int, default=16384, help="tokens of the KV pool (default 16384)")
    parser.add_argument("--sequences", type=int, default=32)
    chosen = parser.parse_args()
    if str(MODEL) in chosen.models:
        ensure(Path(MODEL), chosen.threads)
    results = {name: measure(name, chosen) for name in chosen.models}
    rows = [row for row, _ in results.values()]
    report("memory of a server", rows, chosen.json, models={n: d for n, (_, d) in results.items()})


if __name__ == "__main__":
    main()
