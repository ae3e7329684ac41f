"""Language models: loading, tokenising, caching, running, sampling, infilling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.language.cache import BlockPool
    from hasten.language.config import DecoderConfig
    from hasten.language.decoder import Decoder
    from hasten.language.executor import Executor, KVCache
    from hasten.language.loading import LanguageModel, load, random_model
    from hasten.language.ragged import RaggedBatch
    from hasten.language.sampling import SamplingParams
    from hasten.language.tokenizer import Tokenizer

__all__ = [
    "BlockPool",
    "Decoder",
    "DecoderConfig",
    "Executor",
    "KVCache",
    "LanguageModel",
    "RaggedBatch",
    "SamplingParams",
    "Tokenizer",
    "load",
    "random_model",
]

_HOMES = {
    "BlockPool": "cache",
    "Decoder": "decoder",
    "DecoderConfig": "config",
    "Executor": "executor",
    "KVCache": "executor",
    "LanguageModel": "loading",
    "RaggedBatch": "ragged",
    "SamplingParams": "params",
    "Tokenizer": "tokenizer",
    "load": "loading",
    "random_model": "loading",
}


def __getattr__(name: str) -> Any:  # torch is imported when something is used, not with the package
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
