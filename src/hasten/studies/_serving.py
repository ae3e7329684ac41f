"""What the studies of serving share: traces, a small real model, a loop without an engine, a replay in real time.

Not a study itself. Everything here is the plain way to do a thing, so that a study compares the library with it.
"""

from __future__ import annotations

import importlib.util
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hasten.clock import Clock
from hasten.errors import DataError
from hasten.serve import workload
from hasten.serve.batch import Observation, StepPlan
from hasten.serve.metrics import RequestRecord
from hasten.serve.policy.base import Policy
from hasten.serve.workload import RequestSpec, Workload
from hasten.studies.study import Scale

if TYPE_CHECKING:
    from hasten.language.loading import LanguageModel
    from hasten.language.params import SamplingParams
    from hasten.serve.engine import Engine

__all__ = [
    "Watched",
    "answer_alone",
    "closed_loop",
    "gaps",
    "halves",
    "one_thread",
    "quiet",
    "read_llama2c",
    "replay",
    "small_model",
    "token_prompts",
    "trace",
]


def quiet(make: Callable[[], Policy]) -> Policy:
    """Build a policy without its warning about a small budget, where the small budget is the point."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


# --- load ------------------------------------------------------------------------------------------------------------


def trace(scale: Scale, name: str) -> tuple[Workload, str]:
    """The Azure trace ``conv`` or ``code`` where it is, else the built-in sample; and a word on which it is."""
    path = scale.find(f"llm_traces/azure_{name}.csv.gz")
    if path is not None:
        return workload.load(path), f"azure_{name}, lengths drawn from the trace, Poisson arrivals"
    sample = {"conv": "conversation", "code": "code"}[name]
    return workload.sample(sample, requests=4000, seed=scale.seed), f"built-in sample {sample!r}, not the real trace"


def halves(load: Workload) -> tuple[Workload, Workload]:
    """Rows to choose knobs on, rows to judge on."""
    middle = len(load) // 2
    return Workload(load.requests[:middle], load.name), Workload(load.requests[middle:], load.name)


# --- a policy under observation --------------------------------------------------------------------------------------


@dataclass
class Watched:
    """Passes every decision of a policy on and counts what a stall-free policy must never do."""

    policy: Policy
    token_budget: int | None = None
    steps: int = 0
    stalls: int = 0
    """running decodes left out of a step that took nothing away from anybody"""
    over_budget: int = 0
    overtakes: int = 0
    """steps that admitted a later request before an earlier one"""
    needless: int = 0
    """steps that preempted although every running decode could have had its block"""
    order: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.policy.name

    def decide(self, observation: Observation) -> StepPlan:
        plan = self.policy.decide(observation)
        self.steps += 1
        planned = {chunk.seq for chunk in plan.chunks}
        size = observation.block_size
        decodes = [s for s in observation.running if s.decoding]
        if not plan.preempt:
            self.stalls += sum(1 for s in decodes if s.seq not in planned)
        else:
            wanted = sum(-(-s.known // size) - s.blocks for s in observation.running)
            self.needless += wanted <= observation.free_blocks
        if self.token_budget is not None and plan.num_tokens > self.token_budget:
            self.over_budget += 1
        admitted = [s.seq in planned for s in observation.waiting]
        self.overtakes += admitted != sorted(admitted, reverse=True)
        return plan


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: a small model gains nothing from more, and waits for them when the machine is busy."""
    import torch

    numba: Any = importlib.import_module("numba") if importlib.util.find_spec("numba") else None
    before = torch.get_num_threads(), numba.get_num_threads() if numba else 0
    torch.set_num_threads(1)
    if numba:
        numba.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        if numba:
            numba.set_num_threads(before[1])


# --- a small real model ----------------------------------------------------------------------------------------------


def small_model(scale: Scale, *, deterministic: bool = False) -> tuple[LanguageModel, str]:
    """A trained decoder in fp32: the stories260K checkpoint, else the embedded model; and its name."""
    from hasten.language.loading import load

    path = scale.find("weights/stories260K.bin")
    if path is not None:
        return read_llama2c(path, deterministic=deterministic), "stories260K, fp32"
    model = load("pycode-4m", dtype="fp32", deterministic=deterministic)
    model.decoder.float()  # the weights are kept in bf16; the plain decoder is to compute as the runtime does
    return model, "pycode-4m, fp32"


def read_llama2c(path: Path, *, deterministic: bool = False) -> LanguageModel:
    """A decoder from a llama2.c checkpoint (its first, headed format), float32.

    The file holds seven int32 (width, inner width, layers, heads, KV heads, vocabulary, context), then float32
    matrices. It rotates neighbouring pairs of a head where our decoder rotates its halves, so query and key rows are
    reordered.
    """
    import torch

    from hasten.language.config import DecoderConfig
    from hasten.language.decoder import Decoder
    from hasten.language.loading import LanguageModel

    raw = path.read_bytes()
    if len(raw) < 28:
        raise DataError(f"{path.name} has {len(raw)} bytes, a llama2.c checkpoint has a header of 28")
    width, inner, layers, heads, kv_heads, vocab, context = struct.unpack("<7i", raw[:28])
    head = width // heads
    config = DecoderConfig(
        vocab_size=abs(vocab),
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head,
        intermediate_size=inner,
        max_position_embeddings=context,
        tie_embeddings=vocab > 0,
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    data = torch.from_numpy(np.frombuffer(raw, dtype="<f4", offset=28).copy())
    at = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        size = int(np.prod(shape))
        if at + size > data.numel():
            raise DataError(f"{path.name} ends after {data.numel()} numbers; it is truncated")
        at += size
        return data[at - size : at].reshape(shape)

    def halves_of(rows: torch.Tensor, count: int) -> torch.Tensor:
        return rows.reshape(count, head // 2, 2, width).transpose(1, 2).reshape(count * head, width)

    state: dict[str, torch.Tensor] = {"model.embed_tokens.weight": take(abs(vocab), width)}
    parts = {
        "input_layernorm": take(layers, width),
        "self_attn.q_proj": take(layers, heads * head, width),
        "self_attn.k_proj": take(layers, kv_heads * head, width),
        "self_attn.v_proj": take(layers, kv_heads * head, width),
        "self_attn.o_proj": take(layers, width, heads * head),
        "post_attention_layernorm": take(layers, width),
        "mlp.gate_proj": take(layers, inner, width),
        "mlp.down_proj": take(layers, width, inner),
        "mlp.up_proj": take(layers, inner, width),
    }
    for name, stacked in parts.items():
        for layer in range(layers):
            rows = stacked[layer]
            if name.endswith("q_proj"):
                rows = halves_of(rows, heads)
            elif name.endswith("k_proj"):
                rows = halves_of(rows, kv_heads)
            state[f"model.layers.{layer}.{name}.weight"] = rows.contiguous()
    state["model.norm.weight"] = take(width)
    take(context, head // 2), take(context, head // 2)  # rotation tables, which we compute
    state["lm_head.weight"] = state["model.embed_tokens.weight"] if vocab > 0 else take(abs(vocab), width)
    decoder = Decoder(config).eval()
    decoder.load_state_dict(state)
    return LanguageModel("stories260K", config, decoder=decoder, precision="fp32", deterministic=deterministic)


def token_prompts(model: LanguageModel, lengths: Sequence[int], seed: int) -> list[list[int]]:
    """Prompts of these lengths that the model itself might have written: sampled at temperature 1."""
    from hasten.language.params import SamplingParams
    from hasten.serve.engine import Engine

    engine = Engine(model, num_blocks=512, max_num_seqs=16, prefix_sharing=False)
    begin = model.config.bos_token_id or 0
    asked = [SamplingParams(max_tokens=max(1, n - 1), seed=seed + i, ignore_eos=True) for i, n in enumerate(lengths)]
    texts = engine.generate([[begin] for _ in lengths], asked)
    return [([begin, *done.tokens])[:n] for done, n in zip(texts, lengths, strict=True)]


def answer_alone(model: LanguageModel, prompt: Sequence[int], params: SamplingParams) -> list[int]:
    """The answer by the slow obvious loop: the plain decoder over all tokens, again for every token; no cache, no
    engine."""
    import torch

    from hasten.language.sampling import Sampler, SamplingState

    vocab = model.config.vocab_size
    sampler = Sampler(vocab)
    state = SamplingState(params, params.seed or 0, prompt, vocab, model.config.eos_token_ids)
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(params.max_tokens):
            logits = model.decoder(torch.tensor([tokens]))[0, -1:].float()
            token = sampler.sample(logits, [state]).tokens[0]
            state.observe(token)
            tokens.append(token)
            if token in state.stop_ids:
                break
    return tokens[len(prompt) :]


# --- the real engine in real time ------------------------------------------------------------------------------------


def _params(length: int) -> SamplingParams:
    from hasten.language.params import SamplingParams

    return SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)


def replay(
    engine: Engine, load: Iterable[RequestSpec], prompts: Sequence[Sequence[int]], clock: Clock
) -> list[RequestRecord]:
    """Serve a workload open loop in real time; arrivals are stamped with their due time, answers have the asked
    length."""
    todo = list(zip(load, prompts, strict=True))
    todo.reverse()
    begin = clock.now()
    before = len(engine.records)
    while todo or engine.has_work:
        now = clock.now() - begin
        while todo and todo[-1][0].arrival <= now:
            spec, prompt = todo.pop()
            engine.add(prompt, _params(spec.output_len), begin + spec.arrival, priority=spec.priority, slo=spec.slo)
        if engine.has_work:
            engine.step()
        elif todo:
            clock.sleep(todo[-1][0].arrival - now)
    return list(engine.records)[before:]


def closed_loop(
    engine: Engine, load: Iterable[RequestSpec], prompts: Sequence[Sequence[int]], clients: int
) -> tuple[list[RequestRecord], list[list[int]]]:
    """Serve a workload with ``clients`` that each wait for their answer; records and answers in order of the
    workload."""
    todo: list[tuple[int, RequestSpec, Sequence[int]]] = [
        (number, spec, prompt) for number, (spec, prompt) in enumerate(zip(load, prompts, strict=True))
    ]
    answers: list[list[int]] = [[] for _ in todo]
    todo.reverse()
    names: dict[int, int] = {}
    before = len(engine.records)

    def ask() -> None:
        if todo:
            number, spec, prompt = todo.pop()
            names[engine.add(prompt, _params(spec.output_len))] = number

    for _ in range(clients):
        ask()
    while engine.has_work:
        for output in engine.step():
            if output.token is not None:
                answers[names[output.seq]].append(output.token)
            if output.finish is not None:
                ask()
    records: list[RequestRecord] = list(engine.records)[before:]
    return sorted(records, key=lambda r: names[int(r.id)]), answers


def gaps(records: Iterable[RequestRecord]) -> Any:
    """(gaps,) all inter-token latencies of the records, seconds."""
    return np.concatenate([np.diff(r.token_times) for r in records if len(r.token_times) > 1])
