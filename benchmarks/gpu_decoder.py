"""The decoder on a GPU: ours beside transformers on the same random weights, in one process, in turns.

Decoding at batch 1 reads every weight once per token; the share of the memory bandwidth that the same run measures is
printed. transformers runs not compiled with SDPA, as ``generate`` does by default. Both give the logits of one prompt
first, which must agree.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import torch

from hasten.clock import MonotonicClock
from hasten.language import RaggedBatch, random_model
from hasten.language.config import PRESETS, DecoderConfig

BIG = DecoderConfig(
    vocab_size=32_000, hidden_size=2048, num_layers=22, num_heads=32, num_kv_heads=4, head_dim=64,
    intermediate_size=5632, max_position_embeddings=4096,
)  # fmt: skip
ROOM = 640
clock = MonotonicClock()


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random-245m", choices=["random-245m", "random-1b"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--json", help="write the figures here")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    config = BIG if chosen.model == "random-1b" else PRESETS["random-245m"]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {chosen.model}")
    model = random_model(config, device="cuda")
    mine = Ours(model)
    peer = peer_of(model)
    rows: dict[str, Any] = {}
    if peer is not None:
        gap = float((mine.logits(48) - peer.logits(48)).norm() / peer.logits(48).norm())
        print(f"logits differ by {gap:.2%} of their norm")
        if gap > 0.05:
            raise SystemExit("not the same model")
    bandwidth = read_bandwidth()
    contenders = {"hasten": mine} | ({"transformers": peer} if peer is not None else {})
    for batch in (1, 4, 16, 64):
        times: dict[str, list[float]] = {n: [] for n in contenders}
        for turn in range(chosen.rounds):
            for name, one in list(contenders.items())[:: 1 if turn % 2 else -1]:
                times[name].append(one.decode(batch, 128, chosen.tokens) / chosen.tokens)
        report(rows, f"decode, {batch} sequences", times, batch)
        if batch == 1:
            share = mine.executor.weight_bytes / rows["decode, 1 sequences"]["hasten"] / bandwidth
            print(f"  share of the bandwidth of {bandwidth / 1e12:.2f} TB/s: {share:.2f}")
            rows["share of bandwidth"] = share
    for length in (512,):
        times = {n: [] for n in contenders}
        for turn in range(chosen.rounds):
            for name, one in list(contenders.items())[:: 1 if turn % 2 else -1]:
                times[name].append(one.prefill(length))
        report(rows, f"prefill of {length}", times, length)
    if chosen.json:
        with open(chosen.json, "w", encoding="utf-8") as file:
            json.dump({"device": torch.cuda.get_device_name(), "model": chosen.model, "rows": rows}, file)


def report(rows: dict[str, Any], what: str, times: dict[str, list[float]], tokens: int) -> None:
    """Print medians and ratio."""
    medians = {n: float(np.median(t)) for n, t in times.items()}
    rows[what] = medians
    text = ", ".join(f"{n} {t * 1e3:.3f} ms ({tokens / t:.0f} tokens/s)" for n, t in medians.items())
    if "transformers" in medians:
        text += f"; {medians['transformers'] / medians['hasten']:.2f}x"
    print(f"{what}: {text}", flush=True)


def read_bandwidth() -> float:
    """Bytes per second that a sum over 2 GiB reads."""
    x = torch.ones(2**30, dtype=torch.bfloat16, device="cuda")
    best = 1e9
    for _ in range(8):
        torch.cuda.synchronize()
        begin = clock.now()
        x.view(-1, 2**15).sum(1)
        torch.cuda.synchronize()
        best = min(best, clock.now() - begin)
    return x.numel() * 2 / best


def prompt(length: int, number: int = 0) -> list[int]:
    """Token ids of a prompt."""
    return [16 + (i * 7 + number * 13) % 240 for i in range(length)]


class Ours:
    """Our executor, without the engine around it."""

    def __init__(self, model: Any) -> None:
        self.executor = model.executor
        self.cache = self.executor.new_cache(64 * ROOM // 16, 16)

    def _step(self, chunks: Any) -> Any:
        return self.executor.step(RaggedBatch.build(chunks), self.cache)

    def _table(self, number: int) -> list[int]:
        return list(range(number * ROOM // 16, (number + 1) * ROOM // 16))

    def logits(self, length: int) -> torch.Tensor:
        return self._step([(prompt(length), 0, self._table(0))])[0].clone()

    def decode(self, sequences: int, context: int, tokens: int) -> float:
        tables = [self._table(n) for n in range(sequences)]
        last = self._step([(prompt(context, n), 0, tables[n]) for n in range(sequences)]).argmax(1).tolist()
        self._step([([t], context, table) for t, table in zip(last, tables, strict=True)])  # captures
        torch.cuda.synchronize()
        begin = clock.now()
        for at in range(context, context + tokens):
            last = self._step([([t], at, table) for t, table in zip(last, tables, strict=True)]).argmax(1).tolist()
        return clock.now() - begin

    def prefill(self, length: int) -> float:
        torch.cuda.synchronize()
        begin = clock.now()
        int(self._step([(prompt(length), 0, self._table(0))])[0].argmax())
        return clock.now() - begin


def peer_of(model: Any) -> Any:
    """transformers with our weights, or None where it is not installed."""
    try:
        import transformers
    except ImportError:
        print("transformers is not installed")
        return None
    fields = model.config.to_huggingface()
    ours = ("architectures", "model_type", "torch_dtype")
    config = transformers.LlamaConfig(**{k: v for k, v in fields.items() if k not in ours})
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
    state = {k: v.to("cuda", torch.bfloat16) for k, v in model.decoder.state_dict().items()}
    if config.tie_word_embeddings and "lm_head.weight" not in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs.load_state_dict(state, strict=False, assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config=config).to("cuda")
    return Transformers(theirs.eval(), transformers.DynamicCache)


class Transformers:
    """Explicit forward calls with a growing cache."""

    def __init__(self, model: Any, cache: Any) -> None:
        self._model, self._cache = model, cache

    def _forward(self, ids: Any, cache: Any) -> Any:
        return self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    @torch.inference_mode()
    def logits(self, length: int) -> torch.Tensor:
        out: torch.Tensor = self._forward(torch.tensor([prompt(length)], device="cuda"), self._cache())[0].float().cpu()
        return out

    @torch.inference_mode()
    def decode(self, sequences: int, context: int, tokens: int) -> float:
        cache = self._cache()
        ids = torch.tensor([prompt(context, n) for n in range(sequences)], device="cuda")
        last = self._forward(ids, cache).argmax(-1, keepdim=True)
        last = self._forward(last, cache).argmax(-1, keepdim=True)
        torch.cuda.synchronize()
        begin = clock.now()
        for _ in range(tokens):
            last = self._forward(last, cache).argmax(-1, keepdim=True)
        last.tolist()
        return clock.now() - begin

    @torch.inference_mode()
    def prefill(self, length: int) -> float:
        torch.cuda.synchronize()
        begin = clock.now()
        int(self._forward(torch.tensor([prompt(length)], device="cuda"), self._cache()).argmax())
        return clock.now() - begin


if __name__ == "__main__":
    main()
