"""A model for tests of the engine: fast, exact, and wrong as soon as the cache is.

Its "keys" are the token ids themselves. The logits after a context are random numbers seeded by the hash of every token
of that context *as read back through the block table*, so a wrong block, position or order changes every token.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from hasten.language.tokenizer import Tokenizer

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def fake_logits(context: np.ndarray, vocab: int) -> np.ndarray:
    """Logits (vocab,) after the tokens ``context``."""
    state = np.uint64(1469598103934665603)
    with np.errstate(over="ignore"):
        weights = np.arange(1, len(context) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        state ^= ((context.astype(np.uint64) + np.uint64(1)) * (weights | np.uint64(1))).sum(dtype=np.uint64)
        words = (np.arange(vocab, dtype=np.uint64) + np.uint64(1)) * (state | np.uint64(1))
        words ^= words >> np.uint64(29)
        words *= np.uint64(0xBF58476D1CE4E5B9)
        words ^= words >> np.uint64(32)
    return (words >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24) * 8.0


class FakeExecutor:
    """Implements the executor's interface on token ids."""

    precision = "fp32"
    bytes_per_token = 64
    weight_bytes = 0

    def __init__(self, vocab_size: int = 64, max_context: int = 256, clock: Any = None, cost: float = 0.0) -> None:
        self.vocab_size = vocab_size
        self.max_context = max_context
        self.deterministic = False
        self.steps: list[int] = []
        self.keep_steps = True
        self._clock, self._cost = clock, cost

    def new_cache(self, num_blocks: int, block_size: int = 16) -> torch.Tensor:
        return torch.full((num_blocks, block_size), -1, dtype=torch.int64)

    def step(self, batch: Any, cache: torch.Tensor) -> torch.Tensor:
        size = cache.shape[1]
        tokens = batch.tokens.numpy()
        starts, contexts, tables = batch.starts.numpy(), batch.contexts.numpy(), batch.block_tables.numpy()
        positions = batch.positions.numpy()
        flat = cache.numpy()
        out = np.zeros((len(batch.logit_rows), self.vocab_size), dtype=np.float32)
        wanted = {int(r): i for i, r in enumerate(batch.logit_rows)}
        for c in range(len(contexts)):
            begin, end = int(starts[c]), int(starts[c + 1])
            assert (positions[begin:end] == contexts[c] + np.arange(end - begin)).all()
            where = positions[begin:end]
            flat[tables[c][where // size], where % size] = tokens[begin:end]
        if batch.copies is not None:
            self.move(cache, batch.copies)
        for c in range(len(contexts)):
            begin, end = int(starts[c]), int(starts[c + 1])
            total = int(contexts[c]) + end - begin
            seen = flat[tables[c][: -(-total // size)]].reshape(-1)[:total]
            assert (seen >= 0).all(), "read a cache entry that nobody wrote"
            for row in range(begin, end):
                if row in wanted:
                    out[wanted[row]] = fake_logits(seen[: int(contexts[c]) + row - begin + 1], self.vocab_size)
        if self.keep_steps:
            self.steps.append(len(tokens))
        if self._clock is not None:
            self._clock.sleep(self._cost)
        return torch.from_numpy(out)

    def move(self, cache: torch.Tensor, copies: Any) -> None:
        block, slot, to, place = torch.as_tensor(copies).long().T
        assert len(copies) == 0 or (cache[block, slot] >= 0).all(), "copied a cache entry that nobody wrote"
        cache[to, place] = cache[block, slot]


def fake_tokenizer(*, chat: bool = True, fim: bool = True) -> Tokenizer:
    """Byte-level, 256 bytes and a few special tokens, no merges."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>"]
    if fim:
        special += ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
    backend.add_special_tokens(special)
    config: dict[str, Any] = {"eos_token": "<|endoftext|>"}
    if chat:
        config["chat_template"] = CHAT
    return Tokenizer(backend.to_str(), config)


def fake_model(delay: float = 0.0, max_context: int = 512, **options: Any) -> SimpleNamespace:
    """A model as ``hasten.language.load`` gives one; ``delay`` seconds per step."""
    clock = None
    if delay:
        from hasten.clock import MonotonicClock

        clock = MonotonicClock()
    tokenizer = fake_tokenizer(**options)
    executor = FakeExecutor(vocab_size=264, max_context=max_context, clock=clock, cost=delay)
    executor.keep_steps = False
    config = SimpleNamespace(vocab_size=264, max_position_embeddings=max_context, eos_token_ids=tokenizer.eos_token_ids)
    return SimpleNamespace(name="fake", executor=executor, tokenizer=tokenizer, config=config)


def load(path: str, **options: Any) -> SimpleNamespace:
    """What a worker of the tests calls instead of ``hasten.language.load``; ``path`` holds the options as JSON."""
    return fake_model(**json.loads(path or "{}"))


def load_tiny(path: str, **options: Any) -> Any:
    """A real decoder with random weights and the tokenizer of the fake model, for a worker that calibrates."""
    from hasten.language.config import DecoderConfig
    from hasten.language.loading import random_model

    config = DecoderConfig(
        vocab_size=264,
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        intermediate_size=64,
        max_position_embeddings=256,
    )
    model = random_model(config, name="tiny", dtype="fp32", weights=torch.float32)
    model.__dict__["tokenizer"] = fake_tokenizer()
    return model
