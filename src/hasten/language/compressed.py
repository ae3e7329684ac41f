"""Language models whose matrices are stored as codes: folders that transformers and vLLM read, and ours for the rest.

Symmetric integers of 4 and 8 bits and FP8 (E4M3) are written as ``compressed-tensors`` (``quantization_config`` in
config.json; codes packed into int32 words, int8 or float8), the format of llm-compressor. Formats that it lacks
(codebooks, other widths) are written as :func:`hasten.compress.quantize.save` writes them, for hasten alone. Reading
gives codes and scales: the runtime lays them out for its kernels without rounding again, the plain decoder gets what
they stand for.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from hasten.compress import values
from hasten.compress.quantize import FP8_E4M3, Format, Int, MiniFloat, PerChannel, PerGroup, PerToken, Quantized, save
from hasten.compress.quantize.bits import pack_bits, unpack_bits
from hasten.compress.quantize.compact import expand
from hasten.compress.quantize.layers import ActivationQuantizer, QuantizedLayer
from hasten.compress.recipe import Recipe
from hasten.errors import DataError, ModelLoadError
from hasten.language.config import DecoderConfig
from hasten.language.weights import WeightReader

__all__ = ["CompressedReader", "is_compressed", "packable", "write"]

_METHOD = "compressed-tensors"
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
          "chat_template.jinja", "vocab.json", "merges.txt")  # fmt: skip


def _settings(folder: Path) -> dict[str, Any] | None:
    try:
        given = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return None  # read_config says what is wrong with the file
    return given if isinstance(given, dict) and given.get("quant_method") in (_METHOD, "hasten") else None


def is_compressed(folder: Path) -> bool:
    """Whether the folder holds codes that :class:`CompressedReader` reads."""
    return _settings(folder) is not None


def packable(fmt: Format) -> bool:
    """Whether ``compressed-tensors`` has this weight format in the form that is written here."""
    if _is_fp8(fmt):
        return isinstance(fmt.granularity, PerChannel) and fmt.granularity.axis == 0
    if not isinstance(fmt, Int) or not fmt.symmetric or fmt.bits not in (4, 8):
        return False
    return isinstance(fmt.granularity, (PerChannel, PerGroup)) and fmt.granularity.axis in (0, 1, -1)


def _is_fp8(fmt: Format | None) -> TypeGuard[MiniFloat]:
    """Whether a code is the byte of torch's float8_e4m3fn."""
    wanted = (FP8_E4M3.e, FP8_E4M3.m, FP8_E4M3.bias, FP8_E4M3.signed, FP8_E4M3.special)
    return isinstance(fmt, MiniFloat) and (fmt.e, fmt.m, fmt.bias, fmt.signed, fmt.special) == wanted


# --- reading ---------------------------------------------------------------------------------------------------------


class CompressedReader(WeightReader):
    """As :class:`WeightReader`, for a folder with codes; :meth:`codes` gives a matrix as it is stored."""

    def __init__(self, folder: Path, config: DecoderConfig) -> None:
        super().__init__(folder, config)
        self._settings = _settings(folder) or {}
        self._layers: dict[str, Any] = {}

    def __enter__(self) -> CompressedReader:
        super().__enter__()
        if self._settings.get("quant_method") == "hasten":
            try:
                for file in {id(f): f for f in self._files.values()}.values():
                    self._layers |= json.loads((file.metadata() or {})["layers"])
            except (KeyError, ValueError) as error:
                raise ModelLoadError(
                    f"{self.folder} says hasten, its weights do not ({error}); save it again"
                ) from None
        return self

    @property
    def rounds_inputs(self) -> bool:
        """Whether the folder says that all its matrices go with inputs of 8 bits (W8A8, FP8_DYNAMIC)."""
        groups = self._settings.get("config_groups") or {}
        told = [group.get("input_activations") or {} for group in groups.values()]
        return bool(told) and all(t.get("num_bits") == 8 for t in told)

    def codes(self, name: str, shape: tuple[int, ...]) -> Tensor | Quantized:
        """The matrix ``name`` (…``.weight``) as codes where it is stored so, else as :meth:`read` gives it."""
        path = name.removesuffix(".weight")
        if not name.endswith(".weight"):
            return self.read(name, shape)
        if path in self._layers:
            return self._ours(path, shape)
        if f"{path}.weight_packed" in self._stored or f"{path}.weight_scale" in self._stored:
            return self._theirs(path, shape)
        return self.read(name, shape)

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """What a parameter stands for, in bfloat16 where it is stored as codes."""
        path = name.removesuffix(".weight")
        if path != name and (path in self._layers or f"{path}.weight_scale" in self._stored):
            found = self.codes(name, shape or ())
            return found.dequantize().to(torch.bfloat16) if isinstance(found, Quantized) else found
        return super().read(name, shape)

    def _ours(self, path: str, shape: tuple[int, ...]) -> Quantized:
        told = self._layers[path]
        fmt = values.read(told["format"])
        stored = tuple(told["layer"]["shape"])
        self._agree(path, stored, shape)
        parts = {k: super(CompressedReader, self).read(f"{path}.{k}") for k in ("codes", "scales", "zeros")
                 if f"{path}.{k}" in self._stored}  # fmt: skip
        try:
            return expand(parts, fmt, stored)
        except (KeyError, RuntimeError) as error:
            raise ModelLoadError(f"layer {path} of {self.folder} cannot be restored ({error}); save it again") from None

    def _theirs(self, path: str, shape: tuple[int, ...]) -> Quantized:
        scales = super().read(f"{path}.weight_scale").float()
        kept = super().read
        if f"{path}.weight_packed" in self._stored:
            words = kept(f"{path}.weight_packed")
            size = kept(f"{path}.weight_shape") if f"{path}.weight_shape" in self._stored else None
            out = int(words.shape[0])
            inner = int(size[1]) if size is not None else int(shape[1]) if len(shape) == 2 else 0
            bits = 4 if words.shape[1] == -(-inner // 8) else 8
            flat = words.contiguous().view(torch.uint8).reshape(out, -1)
            codes = unpack_bits(flat.reshape(-1), bits, flat.numel() * 8 // bits).view(out, -1)[:, :inner]
            codes = codes.to(torch.int16) - (1 << (bits - 1))
        elif (stored := self._as_stored(f"{path}.weight")).dtype == torch.float8_e4m3fn:
            return self._fp8(path, stored.view(torch.uint8), scales, shape)
        else:
            codes = stored.to(torch.int16)
            bits, (out, inner) = 8, (int(codes.shape[0]), int(codes.shape[1]))
            if codes.abs().max() > 128:
                raise ModelLoadError(f"layer {path} of {self.folder} is no int8 matrix; give an int-quantized folder")
        if f"{path}.weight_zero_point" in self._stored or f"{path}.weight_g_idx" in self._stored:
            raise ModelLoadError(
                f"layer {path} of {self.folder} has zero points or reordered groups, which are not read; quantise it "
                "symmetrically without act-order"
            )
        self._agree(path, (out, inner), shape)
        scales = scales.reshape(out, -1)
        groups = scales.shape[1]
        granularity = PerChannel(0) if groups == 1 else PerGroup(1, -(-inner // groups))
        fmt = Int(bits, granularity, full_range=bool((codes == -(1 << (bits - 1))).any()))
        return Quantized(codes.to(torch.int8), scales, None, fmt)

    def _as_stored(self, name: str) -> Tensor:
        """A tensor of the file without a look at its values, which torch has none of for float8."""
        stored = self._stored[name]
        tensor: Tensor = self._files[stored].get_tensor(stored)
        return tensor

    def _fp8(self, path: str, codes: Tensor, scales: Tensor, shape: tuple[int, ...]) -> Quantized:
        if scales.numel() not in (1, len(codes)):
            raise ModelLoadError(
                f"layer {path} of {self.folder} has {scales.numel()} scales for {len(codes)} outputs; FP8 is read with "
                "one for each output or one for all"
            )
        if ((codes & 0x7F) == 0x7F).any():
            raise ModelLoadError(f"layer {path} of {self.folder} holds values that are not finite; the file is damaged")
        self._agree(path, (int(codes.shape[0]), int(codes.shape[1])), shape)
        each = scales.reshape(-1, 1).expand(len(codes), 1).contiguous()
        return Quantized(codes, each, None, FP8_E4M3.per_channel())

    def _agree(self, path: str, stored: tuple[int, ...], shape: tuple[int, ...]) -> None:
        if shape and stored != tuple(shape):
            raise ModelLoadError(
                f"{path}.weight has shape {stored}, config.json asks for {tuple(shape)}; the two do not match"
            )


# --- writing ---------------------------------------------------------------------------------------------------------


def write(small: nn.Module, source: Path, target: Path) -> dict[str, Any]:
    """Write the decoder ``small`` (a technique's result) as a folder beside which ``source`` is the original.

    Returns what config.json says about the codes. The folder appears whole or not at all; raises
    :class:`~hasten.errors.DataError` where ``target`` exists or cannot be written.
    """
    layers = {path: m for path, m in small.named_modules() if isinstance(m, QuantizedLayer)}
    if target.exists():
        raise DataError(f"{target} exists already; name a folder that does not, or remove it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as part:
            folder = Path(part) / "model"
            folder.mkdir()
            config = json.loads((source / "config.json").read_text(encoding="utf-8"))
            kind = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"), torch.bfloat16)
            settings = _write_weights(small, layers, folder, kind)
            config["quantization_config"] = settings
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for name in _FILES:
                if (source / name).is_file():
                    shutil.copyfile(source / name, folder / name)
            recipe = getattr(small, "recipe", None)
            if isinstance(recipe, Recipe):
                recipe.save(folder / "recipe.yaml")
            folder.rename(target)
    except OSError as error:
        raise DataError(f"{target} was not written ({error.strerror or error}); name another place") from error
    return settings


def _write_weights(
    small: nn.Module, layers: Mapping[str, QuantizedLayer], folder: Path, kind: torch.dtype
) -> dict[str, Any]:
    """``kind``: of what is not stored as codes."""
    from safetensors.torch import save_file

    if not all(packable(m.quantized().format) for m in layers.values()):
        save(_rest_in(small, kind), folder)
        return {"quant_method": "hasten"}
    tensors: dict[str, Tensor] = {}
    groups: dict[str, dict[str, Any]] = {}
    for path, module in layers.items():
        quantized = module.quantized()
        inputs = module.activation
        entry = _group_entry(quantized.format, inputs)
        found = groups.setdefault(json.dumps(entry, sort_keys=True), {**entry, "targets": []})
        found["targets"].append("re:^" + re.escape(path) + "$")
        tensors |= _tensors(path, quantized, packed=entry["format"] == "pack-quantized")
        if entry["format"] == "float-quantized" and inputs is not None and inputs.scale is not None:
            tensors[f"{path}.input_scale"] = inputs.scale.detach().float().reshape(1)
        if module.bias is not None:
            tensors[f"{path}.bias"] = module.bias.detach().to(kind)
    ours = tuple(f"{path}." for path in layers)
    tied = getattr(getattr(small, "config", None), "tie_embeddings", False)
    for name, tensor in small.state_dict().items():
        if not name.startswith(ours) and not (tied and name == "lm_head.weight"):
            tensors[name] = tensor.detach().to(kind, copy=True).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    linear = [n for n, m in small.named_modules() if isinstance(m, nn.Linear)]
    entries = list(groups.values())
    if len(entries) == 1 and not [n for n in linear if n != "lm_head"]:
        entries[0]["targets"] = ["Linear"]
    kinds = {e.pop("format") for e in entries}
    return {
        "quant_method": _METHOD,
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": e for i, e in enumerate(entries)},
        "ignore": linear,
        "kv_cache_scheme": None,
    }


def _rest_in(small: nn.Module, kind: torch.dtype) -> nn.Module:
    """A copy whose parameters that are no codes have the type ``kind``."""
    clone = copy.deepcopy(small)
    for module in clone.modules():
        if not isinstance(module, QuantizedLayer):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(kind)
    return clone


def _group_entry(fmt: Format, inputs: ActivationQuantizer | None) -> dict[str, Any]:
    """One of ``config_groups``; inputs are told where the format has them: int8 for each token, FP8 also fixed."""
    grouped = fmt.granularity if isinstance(fmt.granularity, PerGroup) else None
    weights = {
        "num_bits": fmt.bits, "type": "float" if _is_fp8(fmt) else "int", "symmetric": True, "dynamic": False,
        "strategy": "group" if grouped else "channel", "group_size": grouped.size if grouped else None,
    }  # fmt: skip
    given = inputs.format if inputs is not None else None
    told: dict[str, Any] | None = None
    if _is_fp8(fmt) and _is_fp8(given):
        strategy = "token" if isinstance(given.granularity, PerToken) else "tensor"
        told = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": given.dynamic, "strategy": strategy}
    elif isinstance(fmt, Int) and isinstance(given, Int) and isinstance(given.granularity, PerToken):
        told = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    kind = "float-quantized" if _is_fp8(fmt) else "pack-quantized" if told is None else "int-quantized"
    return {"weights": weights, "input_activations": told, "output_activations": None, "format": kind}


def _tensors(path: str, quantized: Quantized, *, packed: bool) -> dict[str, Tensor]:
    out, inner = quantized.shape
    scales = quantized.scales.reshape(out, -1)
    exact = [k for k in (torch.bfloat16, torch.float16) if torch.equal(scales.to(k).float(), scales)]
    stored = {f"{path}.weight_scale": scales.to(exact[0]) if exact else scales.clone()}
    if _is_fp8(quantized.format):
        return stored | {f"{path}.weight": quantized.codes.contiguous().view(torch.float8_e4m3fn)}
    if not packed:
        return stored | {f"{path}.weight": quantized.codes.to(torch.int8).contiguous()}
    bits = quantized.format.bits
    codes = (quantized.codes.to(torch.int16) + (1 << (bits - 1))).to(torch.int32)
    missing = -inner % (32 // bits)
    codes = nn.functional.pad(codes, (0, missing))
    words = pack_bits(codes, bits).view(out, -1).contiguous().view(torch.int32)
    shape = torch.tensor([out, inner], dtype=torch.int64)
    return stored | {f"{path}.weight_packed": words, f"{path}.weight_shape": shape}
