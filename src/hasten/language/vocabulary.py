"""Training of the byte-level BPE tokeniser of the embedded models.

Text is cut into line breaks with the indentation that follows, words, single digits, punctuation and runs of spaces;
merges never cross a cut. Every byte is in the alphabet, so that any text can be written and read back.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["SPECIAL_TOKENS", "train_tokenizer", "write_tokenizer"]

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|fim_prefix|>",
    "<|fim_suffix|>",
    "<|fim_middle|>",
    "<|fim_pad|>",
    "<|file_sep|>",
    "<|cursor|>",
    "<|reserved|>",
)
"""Ids 0 to 7 of the embedded vocabulary."""

_CUTS = r"[\r\n]+[ \t]*|[0-9]| ?[\p{L}_]+| ?[^\s\p{L}0-9_]+|[ \t]+|\s+"


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> Any:
    """A ``tokenizers.Tokenizer`` with ``vocab_size`` entries, the special tokens first."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CUTS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(tokenizer: Any, folder: Path, context: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json as Hugging Face reads them."""
    import json

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    end = SPECIAL_TOKENS[0]
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "eos_token": end,
        "unk_token": None,
        "pad_token": "<|fim_pad|>",
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    generation = {"eos_token_id": 0, "pad_token_id": 4, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
