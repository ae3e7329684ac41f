"""Decoders whose layers differ in size, in folders.

``config.json`` says the sizes of every layer under ``hasten_sizes``; nothing of what made them is needed to load the
model. Where only the feed-forwards shrank, and all alike, the folder is an ordinary one that others read as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from hasten.errors import ModelLoadError
from hasten.language.config import DecoderConfig
from hasten.language.decoder import FeedForward, empty_decoder
from hasten.language.decoder_files import fill, write_weights
from hasten.language.sized import layer_sizes, plain_config
from hasten.nn.norm import RMSNorm
from hasten.nn.sized import SizedAttention

__all__ = ["read", "save", "sized_decoder"]


def sized_decoder(config: DecoderConfig, sizes: list[dict[str, Any]]) -> Any:
    """An empty decoder whose layers have these sizes."""
    decoder = empty_decoder(config)
    if len(sizes) != config.num_layers:
        raise ModelLoadError(f"hasten_sizes names {len(sizes)} layers, the model has {config.num_layers}")
    for index, (layer, entry) in enumerate(zip(decoder.model.layers, sizes, strict=True)):
        place: Any = layer
        try:
            with torch.device("meta"):
                if "intermediate_size" in entry and isinstance(place.mlp, FeedForward):
                    place.mlp = FeedForward(config.hidden_size, entry["intermediate_size"], config.activation)
                if "key_width" in entry:
                    place.self_attn = _attention(config, index, entry)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelLoadError(
                f"hasten_sizes of layer {index} cannot be read ({error!r}); convert the model again"
            ) from None
    return decoder


def _attention(config: DecoderConfig, index: int, entry: dict[str, Any]) -> SizedAttention:
    width = entry["key_width"]
    norms = [RMSNorm(width, config.norm_eps, config.norm_offset) if config.qk_norm else None for _ in range(2)]
    attention = SizedAttention(
        hidden=config.hidden_size, heads=config.num_heads, kv_heads=config.num_kv_heads, key_width=width,
        value_width=entry["value_width"], scale=config.attention_scale, bias=entry["bias"], out_bias=entry["out_bias"],
        softcap=config.attention_softcap, window=config.window(index), q_norm=norms[0], k_norm=norms[1],
    )  # fmt: skip
    pairs = [len(line) for line in entry["rotary_pairs"]]
    attention.pairs = torch.empty(config.num_kv_heads, pairs[0], dtype=torch.long, device="meta")
    attention.local = config.uses_local_rotary(index)
    return attention


def save(decoder: Any, folder: str | Path, source: str | Path | None = None) -> None:
    """Write a decoder whose layers differ in size as a folder that ``load`` reads.

    ``source``: the folder that it came from, for tokeniser, chat template and the fields of its ``config.json``.
    """
    from hasten.files import write_text

    folder, plain = Path(folder), plain_config(decoder)
    config = write_weights(decoder, folder, None if source is None else Path(source))
    if plain is not None:
        config["intermediate_size"] = plain.intermediate_size
    else:
        config["hasten_sizes"] = layer_sizes(decoder)
    write_text(folder / "config.json", json.dumps(config, indent=1))


def read(folder: Path, config: DecoderConfig) -> Any | None:
    """The decoder in ``folder`` whose layers differ in size; None where it holds an ordinary model."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    sizes = content.get("hasten_sizes")
    if sizes is None:
        return None
    return fill(sized_decoder(config, sizes), folder, config)
