"""Reading a Hugging Face folder: config.json and (sharded) safetensors, under one set of parameter names.

Families differ in how they store a few matrices (Phi-3 fuses query, key and value; Mixtral names its experts w1, w2,
w3; newer folders stack all experts). The reader renames and cuts them, lazily and tensor by tensor, so that a model is
never held twice. Anything missing, truncated, of another shape or not finite is named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.errors import ModelLoadError
from hasten.language.config import DecoderConfig

__all__ = ["WeightReader", "read_config"]


def read_config(folder: Path) -> DecoderConfig:
    """The configuration of the model in ``folder``. Raises :class:`ModelLoadError`, :class:`UnsupportedModelError`."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise ModelLoadError(
            f"{folder} is not a folder; give a Hugging Face model folder or the name of an embedded model"
        )
    if not path.is_file():
        raise ModelLoadError(
            f"{folder} has no config.json; a model folder holds config.json, *.safetensors, tokenizer.json"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelLoadError(f"{path} cannot be read as JSON ({error}); fetch the file again") from None
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path} holds no JSON object; fetch the file again")
    return DecoderConfig.from_huggingface(content)


class WeightReader:
    """Tensors of a model folder by the names of :class:`~hasten.language.decoder.Decoder`.

    Use as a context manager; tensors are read when asked for and belong to the caller.
    """

    def __init__(self, folder: Path, config: DecoderConfig) -> None:
        self.folder = folder
        self.config = config
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}  # stored name -> open file
        self._stored: dict[str, str] = {}  # stored name without prefix -> stored name

    def __enter__(self) -> WeightReader:
        from safetensors import SafetensorError, safe_open

        for path in self._paths():
            if not path.is_file():
                raise ModelLoadError(f"{path.name} is named by the index but missing in {self.folder}; fetch it again")
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
                for name in file.keys():  # noqa: SIM118 - a safetensors file is not a mapping
                    self._files[name] = file
                    short = re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", name)
                    self._stored[short.replace("model.lm_head", "lm_head")] = name
            except (SafetensorError, OSError, ValueError) as error:
                raise ModelLoadError(f"{path} is corrupt or truncated ({error}); fetch the file again") from None
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self._files.clear()

    def _paths(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            except (ValueError, KeyError, AttributeError) as error:
                raise ModelLoadError(f"{index} is not a safetensors index ({error!r}); fetch the file again") from None
            return [self.folder / name for name in sorted(set(names))]
        single = self.folder / "model.safetensors"
        if single.is_file():
            return [single]
        others = sorted(self.folder.glob("*.safetensors"))
        if not others:
            raise ModelLoadError(
                f"{self.folder} has no *.safetensors; convert the weights (pickled .bin files are not read) "
                "and try again"
            )
        return others

    def __contains__(self, name: str) -> bool:
        return any(True for _ in self._sources(name))

    def _sources(self, name: str) -> Iterator[tuple[str, slice | int | None, slice | None]]:
        """Where a parameter may be stored: (stored name, index of the first axis, rows of the next)."""
        if name in self._stored:
            yield self._stored[name], None, None
        config = self.config
        width, heads, groups = config.head_dim, config.num_heads, config.num_kv_heads
        cut = {
            "q_proj": slice(0, heads * width),
            "k_proj": slice(heads * width, (heads + groups) * width),
            "v_proj": slice((heads + groups) * width, (heads + 2 * groups) * width),
        }
        match = re.search(r"self_attn\.([qkv]_proj)\.", name)
        if match:
            fused = name.replace(match.group(1), "qkv_proj")
            if fused in self._stored:
                yield self._stored[fused], cut[match.group(1)], None
        half = {"gate_proj": slice(0, config.intermediate_size), "up_proj": slice(config.intermediate_size, None)}
        match = re.search(r"mlp\.(gate_proj|up_proj)\.", name)
        if match:
            fused = name.replace(match.group(1), "gate_up_proj")
            if fused in self._stored:
                yield self._stored[fused], half[match.group(1)], None
        renamed = name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
        match = re.search(r"mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight", name)
        if match:
            number, part = int(match.group(1)), match.group(2)
            old = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}[part]
            renamed = name.replace(match.group(0), f"block_sparse_moe.experts.{number}.{old}.weight")
            head = name[: match.start()]
            inner = config.moe_intermediate_size
            stacked = head + ("mlp.experts.down_proj" if part == "down_proj" else "mlp.experts.gate_up_proj")
            if stacked in self._stored:
                rows = {"gate_proj": slice(0, inner), "up_proj": slice(inner, 2 * inner), "down_proj": slice(None)}[
                    part
                ]
                yield self._stored[stacked], number, rows
        if renamed != name and renamed in self._stored:
            yield self._stored[renamed], None, None

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """The tensor of parameter ``name`` in its stored type. Raises :class:`ModelLoadError`."""
        if name == "lm_head.weight" and name not in self and self.config.tie_embeddings:
            name = "model.embed_tokens.weight"
        source = next(self._sources(name), None)
        if source is None:
            raise ModelLoadError(
                f"the weights in {self.folder} lack {name}; the folder is incomplete or of another family"
            )
        stored, first, rows = source
        part = self._files[stored].get_slice(stored)
        tensor: Tensor = part[:] if first is None else part[first] if rows is None else part[first, rows]
        if isinstance(first, int) and tensor.dim() == 3:
            tensor = tensor[0]
        if shape is not None and tuple(tensor.shape) != shape:
            raise ModelLoadError(
                f"{name} has shape {tuple(tensor.shape)}, config.json asks for {shape}; the two do not match"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelLoadError(f"{name} holds values that are not finite; the file is damaged or training diverged")
        return tensor
