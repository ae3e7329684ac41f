"""A language model with a smaller cache, measured on text: latent attention written as a folder.

Without a size the conversion is exact (the same function, a cache as large as before). With one it is fitted to text,
and the perplexity on other text says what it cost. Bytes are those of a token in all layers at 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hasten.compress.mla import ToMLA
from hasten.errors import ConfigurationError
from hasten.language.compressing import Converted, TextSample, float_decoder, perplexity_of
from hasten.language.latent import is_latent, save

if TYPE_CHECKING:
    from hasten.language.loading import LanguageModel

__all__ = ["SmallerCache", "smaller_cache", "stored_type"]


@dataclass(frozen=True)
class SmallerCache(Converted):
    """A decoder with latent attention, in float32."""

    bytes_per_token: tuple[int, int]
    """of the cache at 16 bits, before and after"""

    def write(self, source: Path, out: Path) -> None:
        """A folder with the tokeniser of ``source`` and its weights in bfloat16 where the source's are."""
        decoder: Any = self.model
        save(decoder.to(stored_type(source)), out, source)


def smaller_cache(model: LanguageModel, technique: ToMLA, sample: TextSample | None) -> SmallerCache:
    """Convert ``model``; a technique of level 1 needs a ``sample``.

    Raises :class:`~hasten.errors.ConfigurationError` on one line.
    """
    if is_latent(model.decoder):
        raise ConfigurationError(f"{model.name} has latent attention already; give the folder that it was made of")
    if technique.level and sample is None:
        raise ConfigurationError("a smaller cache is fitted to text and measured on it; give --data FILE")
    decoder = float_decoder(model)
    found: Any = technique(decoder, None if sample is None else sample.calibration)
    perplexity = None
    if sample is not None:
        perplexity = (perplexity_of(decoder, sample.held_out), perplexity_of(found, sample.held_out))
    return SmallerCache(found, perplexity, (found.model_cache_bytes, found.cache_bytes_per_token))


def stored_type(folder: Path) -> torch.dtype:
    """Type of the matrices in a folder; float32 where its files mix types."""
    from safetensors import safe_open

    kinds = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            kinds |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(kinds.pop() if len(kinds) == 1 else "", torch.float32)
