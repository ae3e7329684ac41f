"""Speed of decomposed layers and models against the unchanged ones, in turns, in one process.

A low-rank branch fused and not; a decoder of width 1024 with 30 % of its blocks' parameters gone, in the runtime; a
vision transformer whose tokens choose how much of a layer they take. A loss is called a loss.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from hasten.measure import Machine, Protocol, compare


def branch(rules: Protocol) -> list[dict[str, Any]]:
    """Four bits with a branch of rank 32: its own passes against shared ones, bfloat16 beside."""
    from hasten.compress.lowrank.fourbit import SvdQuantLinear

    rows = []
    for size in (1024, 3072):
        layer = SvdQuantLinear(in_features=size, out_features=size, rank=32, execution="fast")
        plain = torch.nn.Linear(size, size, bias=False).bfloat16()
        for count in (1, 16, 256):
            x = torch.randn(count, size).bfloat16()
            calls = {"bfloat16": partial(plain, x), "naive": partial(layer.unfused, x), "fused": partial(layer, x)}
            rows += _turns(f"branch {size} x {size}, {count} rows", calls, rules)
    return rows


def decoder(rules: Protocol) -> list[dict[str, Any]]:
    """Decoding one token and reading 256, width 1024, bfloat16 weights."""
    from hasten.compress.lowrank.modular import ModularDecomposition
    from hasten.language import DecoderConfig, RaggedBatch
    from hasten.language.executor import Executor
    from hasten.language.loading import random_model
    from hasten.language.sized import executor_of

    config = DecoderConfig(
        vocab_size=4096, hidden_size=1024, num_layers=6, num_heads=16, num_kv_heads=4, head_dim=64,
        intermediate_size=2816, max_position_embeddings=1024,
    )  # fmt: skip
    base = random_model(config).decoder
    state = base.state_dict()
    tokens = [torch.randint(0, 4096, (1, 16), generator=torch.Generator().manual_seed(0))]
    # Which columns stay does not matter for time.
    knobs: dict[str, Any] = {"ratio": 0.3, "allocation": "uniform", "selection": "random"}
    runs = {
        "unchanged": Executor(config, lambda name, shape: state[name].detach()),
        "feed-forwards, 30 %": executor_of(ModularDecomposition(modules=("mlp",), **knobs)(base, tokens)),
        "all pairs, 30 %": executor_of(ModularDecomposition(**knobs)(base, tokens)),
    }
    rows = []
    for kind, length, context in (("decode at 128", 1, 128), ("prefill of 256", 256, 0)):
        calls: dict[str, Callable[[], object]] = {}
        for name, executor in runs.items():
            cache = executor.new_cache(32)
            executor.step(RaggedBatch.build([([3] * 128, 0, list(range(32)))]), cache)
            calls[name] = partial(executor.step, RaggedBatch.build([([5] * length, context, list(range(32)))]), cache)
        rows += _turns(kind, calls, rules)
    return rows


def adaptive(rules: Protocol) -> list[dict[str, Any]]:
    """A vision transformer of 50 tokens whose feed-forwards run a quarter of their learners, chosen by random gates.

    From how many tokens on gates are asked is measured before. One image also goes through either network in one call.
    """
    from hasten.compress.acm import ACM, measure_gates, set_budget
    from hasten.compress.fused import FusedModule
    from hasten.nn.product.instructions import has_bytes
    from hasten.studies._vision_models import VisionTransformer

    rows = []
    for width in (64, 192):
        torch.manual_seed(0)
        model = VisionTransformer(28, 4, width=width, depth=4, heads=4).eval()
        images = torch.randn(256, 1, 28, 28)
        technique = ACM(targets=("layers.*.up>down",), epochs=1, gate_epochs=1, tune_epochs=0)
        small = technique(model, [images[:8]])
        set_budget(small, [images[:64]], 0.25)
        measure_gates(small)
        for count in (1, 64, 256):
            calls: dict[str, Callable[[], object]] = {
                "unchanged": partial(model, images[:count]), "adaptive, 25 %": partial(small, images[:count]),
            }  # fmt: skip
            if count == 1 and has_bytes():
                for name, one in (("unchanged", model), ("adaptive, 25 %", small)):
                    for precision in ("fp32", "int8"):
                        whole = FusedModule(one, precision)
                        calls[f"{name}, one call, {precision}"] = partial(whole, images[:1])
            rows += _turns(f"ViT of width {width}, batch {count}", calls, rules)
    return rows


def _turns(what: str, calls: dict[str, Callable[[], object]], rules: Protocol) -> list[dict[str, Any]]:
    with torch.inference_mode():
        found = compare(calls, rules)
    out = []
    for name, sample in found.samples.items():
        gain = found.speedup(name) if name != found.baseline else None
        out.append({
            "what": what, "name": name, "seconds": sample.median, "p90": sample.at(90), "samples": len(sample.times),
            "speedup": None if gain is None else gain.value,
            "interval": None if gain is None else [gain.low, gain.high],
        })  # fmt: skip
    return out


def main() -> None:
    """Print the table; ``--json`` writes what was measured as one object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("branch", "decoder", "adaptive"), help="one of the three parts")
    parser.add_argument("--rounds", type=int, default=41, help="samples of each candidate")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rules = Protocol(warmup=3, warmup_time=0.0, min_samples=given.rounds, max_samples=given.rounds, min_time=0.0)
    rows = []
    for name, part in (("branch", branch), ("decoder", decoder), ("adaptive", adaptive)):
        if given.only in (None, name):
            rows += part(rules)
    machine = Machine.detect()
    if given.json:
        print(json.dumps({"machine": machine.hash, "threads": given.threads, "rows": rows}))
        return
    table = Table(title=f"low rank and adaptive computation, {given.threads} threads, machine {machine.hash}")
    for head in ("what", "contender", "median", "p90", "against the first"):
        table.add_column(head)
    for row in rows:
        gain = row["speedup"]
        verdict = "" if gain is None else f"{gain:.2f}×" + (" SLOWER" if row["interval"][1] < 1 else "")
        table.add_row(row["what"], row["name"], f"{row['seconds'] * 1e3:.3f} ms", f"{row['p90'] * 1e3:.3f} ms", verdict)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
