"""Folders of decoders that differ from what a family's config.json can say: weights, configuration, tokeniser.

What :mod:`latent` and :mod:`sized_files` share; each adds one field to config.json and knows the decoder that it names.
"""

from __future__ import annotations

import json
import shutil
import textwrap
from pathlib import Path
from typing import Any

import torch

from hasten.errors import ModelLoadError
from hasten.language.config import DecoderConfig

__all__ = ["fill", "write_weights"]


def write_weights(decoder: Any, folder: Path, source: Path | None) -> dict[str, Any]:
    """Write the weights and copy the tokeniser's files of ``source``; its config.json, or that of the decoder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.contiguous() for k, v in decoder.state_dict().items()}
    if decoder.config.tie_embeddings:
        state.pop("lm_head.weight", None)
    draft = folder / ".model.safetensors.part"
    save_file(state, draft, metadata={"format": "pt"})
    draft.replace(folder / "model.safetensors")
    if source is None:
        made: dict[str, Any] = decoder.config.to_huggingface()
        return made
    for path in source.iterdir():
        if path.name.startswith(("tokenizer", "special_tokens", "chat_template", "generation_config")):
            shutil.copy(path, folder / path.name)
    found: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    return found


def fill(decoder: Any, folder: Path, config: DecoderConfig) -> Any:
    """The decoder with the weights of ``folder``. Raises :class:`~hasten.errors.ModelLoadError` on one line."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(
            f"{folder / 'model.safetensors'} cannot be read ({error}); convert the model again"
        ) from None
    if config.tie_embeddings and "model.embed_tokens.weight" in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    bad = next((n for n, t in state.items() if t.is_floating_point() and not torch.isfinite(t).all()), None)
    if bad is not None:
        raise ModelLoadError(f"{bad} holds values that are not finite; the file is damaged, convert the model again")
    try:
        decoder.load_state_dict(state, assign=True)
    except RuntimeError as error:
        line = textwrap.shorten(str(error).splitlines()[-1], 240, placeholder=" …")
        raise ModelLoadError(f"the weights in {folder} do not fit their config.json ({line})") from None
    if config.tie_embeddings:
        decoder.lm_head.weight = decoder.model.embed_tokens.weight
    return decoder.eval()
