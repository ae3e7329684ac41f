"""Speed of the decoder alone: ours, transformers and llama.cpp on the same weights, in one run, in turns.

Before anything is timed the contenders compute the logits of one prompt, so that a ratio is between equal work.
Decoding at batch 1 reads every weight once per token; the bytes per second of that are held against the memory
bandwidth that the same process measures here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from contenders import prompt
from harness import MODEL, Absent, Field, Row, median, options, report
from random_model import ensure, gguf_path

OURS = {"bf16": "hasten bf16", "int8": "hasten int8", "int4": "hasten int4"}
PEERS = {"f16": "llama.cpp f16", "q8_0": "llama.cpp q8_0", "q4_0": "llama.cpp q4_0"}
TORCH = "transformers bf16"


def deviation(a: Sequence[float], b: Sequence[float]) -> float:
    """How far two rows of logits are apart, as a share of the second's length; 0 is equal."""
    x, y = np.asarray(a), np.asarray(b)
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def check_equal_work(field: Field) -> dict[str, float]:
    """Deviation of each contender from ours at 16 bits; one that computes another model is taken out."""
    out = {}
    reference = field.present[OURS["bf16"]].ask("logits", tokens=prompt(48))
    for name in [n for n in field.present if n != OURS["bf16"]]:
        try:
            out[name] = deviation(field.present[name].ask("logits", tokens=prompt(48)), reference)
        except Absent as reason:
            field.drop(name, str(reason))
            continue
        allowed = 0.05 if name in (PEERS["f16"], TORCH) else 0.5
        if out[name] > allowed:
            field.drop(name, f"its logits are {out[name]:.0%} away from ours: not the same model")
    return out


def bandwidth_row(seconds: Sequence[float], tokens: int, context: int, info: dict[str, float], peak: float) -> Row:
    """Bytes per second of decoding at batch 1 against the measured bandwidth (bytes per second)."""
    read = info["weight_bytes"] + info["bytes_per_token"] * (context + tokens / 2)
    rate = read * tokens / median(seconds)
    note = f"{info['weight_bytes'] / 1e6:.0f} MB of weights and the KV cache so far, per token"
    return Row(
        "decode, batch 1: share of bandwidth",
        "memory read",
        rate / 1e9,
        peak / 1e9,
        "GB/s",
        rate / peak,
        aim=0.85,
        note=note,
    )


def main() -> None:
    """Run and print."""
    parser = options(__doc__)
    parser.add_argument("--model", type=Path, default=MODEL, help=f"folder of random_model.py (default {MODEL})")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender (default 9)")
    parser.add_argument("--context", type=int, default=128, help="tokens before decoding starts (default 128)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to decode (default 64)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill, at most 512 (default 512)")
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"], help="of transformers (default sdpa)")
    chosen = parser.parse_args()
    ensure(chosen.model, chosen.threads)
    field = Field()
    try:
        for precision, name in OURS.items():
            field.add(name, "hasten", model=str(chosen.model), precision=precision, threads=chosen.threads)
        if OURS["bf16"] not in field.present:
            raise SystemExit(f"{OURS['bf16']}: {field.absent[OURS['bf16']]}")
        field.add(TORCH, "transformers", model=str(chosen.model), attention=chosen.attention, threads=chosen.threads)
        for kind, name in PEERS.items():
            field.add(name, "llama.cpp", model=str(gguf_path(chosen.model, kind)), threads=chosen.threads)
        details = {
            "deviations": check_equal_work(field),
            "contenders": {n: c.info for n, c in field.present.items()},
            "absent": field.absent,
        }
        rows, times = measure(field, chosen)
    finally:
        field.close()
    details |= {"times": times, "idle_share": field.idle_share, "threads": chosen.threads}
    if field.idle_share > 0.02:
        print(f"the waiting contenders used {field.idle_share:.1%} of a core during somebody's turn")
    report(f"decoder, {chosen.model.name}, {chosen.threads} threads", rows, chosen.json, **details)


def measure(field: Field, chosen: object) -> tuple[list[Row], dict[str, dict[str, list[float]]]]:
    """The rows of the table and the times behind them."""
    rounds, context, tokens, length = (getattr(chosen, n) for n in ("rounds", "context", "tokens", "prompt"))
    ours, f16 = OURS["bf16"], PEERS["f16"]
    everybody = [*OURS.values(), TORCH, *PEERS.values()]
    plain = [ours, TORCH, f16]
    info = field.present[ours].info
    peaks = [field.present[ours].ask("bandwidth")]
    single = field.in_turns(everybody, "decode", rounds, sequences=1, context=context, tokens=tokens)
    if ours not in single:
        raise SystemExit(f"{ours}: {field.absent[ours]}")
    peaks.append(field.present[ours].ask("bandwidth"))
    prefill = field.in_turns(plain, "prefill", rounds, length=length)
    many = field.in_turns(plain, "decode", max(3, rounds // 2), sequences=16, context=context, tokens=tokens)
    rate = "tokens/s"
    one, sixteen = "decode, batch 1", "decode, 16 sequences"
    rows = [
        field.compare(one, single, ours, TORCH, tokens, rate, 2.5),
        bandwidth_row(single[ours], tokens, context, info, max(peaks)),
        field.compare(one, single, ours, f16, tokens, rate, 0.9, 1.1),
        field.compare(f"{one}, int8", single, OURS["int8"], PEERS["q8_0"], tokens, rate, aim=1.2),
        field.compare(f"{one}, int4", single, OURS["int4"], PEERS["q4_0"], tokens, rate, aim=1.0),
        field.compare(f"prefill of {length}", prefill, ours, f16, length, rate, 2.0, 2.5),
        field.compare(f"prefill of {length}", prefill, ours, TORCH, length, rate),
        field.compare(sixteen, many, ours, TORCH, 16 * tokens, rate, 3.0, 5.0),
        field.compare(sixteen, many, ours, f16, 16 * tokens, rate),
    ]
    return rows, {"decode 1": single, "prefill": prefill, "decode 16": many}


if __name__ == "__main__":
    main()
