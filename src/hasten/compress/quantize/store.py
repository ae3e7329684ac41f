"""Quantised models on disk: packed codes in ``model.safetensors``, the recipe and its plan in ``recipe.yaml``.

A layer is stored as it is in memory (codes bit by bit, short scales), with its formats in the header of the file;
what is not quantised is stored as it is. Loading needs the float model for its structure, and changes nothing of it.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from hasten.compress import values
from hasten.compress.quantize import realise as real
from hasten.compress.quantize.base import Format
from hasten.compress.quantize.compact import expand, shrink
from hasten.compress.quantize.layers import ActivationQuantizer, QuantizedLayer, Simulated, describe
from hasten.compress.quantize.targets import put
from hasten.compress.recipe import Recipe
from hasten.errors import ConfigurationError, ModelLoadError
from hasten.files import write_bytes

__all__ = ["load", "save"]

_FILE, _RECIPE, _VERSION = "model.safetensors", "recipe.yaml", 1


def save(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write the model to ``folder``; the path of the file. A half-written file never has its final name.

    >>> from hasten.compress.quantize import Quantize
    >>> small = Quantize.scheme("W4A16", real="never")(nn.Sequential(nn.Linear(64, 64)))
    >>> import tempfile
    >>> path = save(small, tempfile.mkdtemp())
    >>> again = load(path.parent, nn.Sequential(nn.Linear(64, 64)))
    >>> torch.equal(again[0].weight, small[0].weight)
    True
    """
    from safetensors.torch import save as to_bytes

    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    inside: list[str] = []
    aliases: dict[str, str] = {}
    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            inside.append(path)
            layers[path] = _layer(path, module, tensors)
    folded = [path for path, module in model.named_modules() if isinstance(module, nn.Identity)]
    kept = [m for n, m in model.named_modules() if not any(n == p or n.startswith(f"{p}.") or not p for p in inside)]
    whole = next((m for m in kept if hasattr(type(m), "packed_bytes")), None)
    if whole is not None:
        raise ConfigurationError(
            f"a {type(whole).__name__} is packed for this machine, and this format holds codes; store the model whole "
            "with torch.save, or the float model and the recipe"
        )
    for name, tensor in model.state_dict().items():
        if any(name.startswith(f"{path}.") or not path for path in inside):
            continue
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and key in seen:  # a tied weight is stored once
            aliases[name] = seen[key]
            continue
        seen[key] = name
        tensors[name] = tensor.detach().contiguous().clone()
    recipe = getattr(model, "recipe", None)
    header = {
        "format": "hasten",
        "version": str(_VERSION),
        "layers": json.dumps(layers),
        "identities": json.dumps(folded),
        "aliases": json.dumps(aliases),
    }
    target = Path(folder) / _FILE
    write_bytes(target, to_bytes(tensors, metadata=header))
    if isinstance(recipe, Recipe):
        recipe.save(Path(folder) / _RECIPE)
    return target


def _layer(path: str, module: QuantizedLayer, tensors: dict[str, Tensor]) -> dict[str, Any]:
    quantized = module.quantized()
    prefix = f"{path}." if path else ""
    for name, tensor in shrink(quantized).items():
        tensors[prefix + name] = tensor.contiguous()
    if module.bias is not None:
        tensors[prefix + "bias"] = module.bias.detach().contiguous().clone()
    activation = module.activation
    if activation is not None and activation.scale is not None:
        tensors[prefix + "input_scale"] = activation.scale.contiguous().clone()
        if activation.zero is not None:
            tensors[prefix + "input_zero"] = activation.zero.contiguous().clone()
    told = module.layer if isinstance(module, Simulated) else {"kind": "Linear", "shape": list(quantized.shape)}
    kernel = getattr(module, "kernel_name", real.INTEGER if not isinstance(module, Simulated) else None)
    return {
        "layer": told,
        "format": values.write(quantized.format),
        "activation": values.write(activation.format if activation is not None else getattr(module, "inputs", None)),
        "kernel": kernel,
    }


def load(folder: str | os.PathLike[str], model: nn.Module, *, kernels: bool = True) -> nn.Module:
    """A copy of ``model`` with what ``folder`` holds.

    Layers that ran a real kernel when they were saved get it again where this machine has it (``kernels``), and are
    simulated elsewhere: the same function. Raises :class:`~hasten.errors.ModelLoadError` on one line.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / _FILE
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118  (the file is no mapping)
                tensors[key] = file.get_tensor(key)
        if header.get("format") != "hasten":
            raise ModelLoadError(
                f"{str(path)!r} is no quantised model of hasten; load it with the library that made it"
            )
        if header.get("version") != str(_VERSION):
            raise ModelLoadError(f"{str(path)!r} has version {header.get('version')}; this hasten reads {_VERSION}")
        layers: dict[str, Any] = json.loads(header["layers"])
        identities: list[str] = json.loads(header["identities"])
        tensors.update({name: tensors[first] for name, first in json.loads(header["aliases"]).items()})
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ModelLoadError(f"{str(path)!r} cannot be read ({error}); name a folder that save() wrote") from error
    clone = copy.deepcopy(model)
    for name in identities:
        try:
            clone = put(clone, name, nn.Identity())
        except AttributeError as error:
            raise ModelLoadError(
                f"{str(path)!r} names {name!r}, which the model lacks; give the model it was made of"
            ) from error
    for name, told in layers.items():
        clone = put(clone, name, _restore(path, clone, name, told, tensors, kernels))
    prefixes = tuple(f"{name}." if name else "" for name in layers)
    rest = {k: v for k, v in tensors.items() if not k.startswith(prefixes)} if prefixes else tensors
    wanted = {k for k in clone.state_dict() if not k.startswith(prefixes)}
    wrong = sorted(wanted ^ set(rest))
    if wrong:
        raise ModelLoadError(f"{str(path)!r} and the model differ in {wrong[0]!r}; give the model that it was made of")
    try:
        clone.load_state_dict(rest, strict=False)
    except RuntimeError as error:
        line = str(error).splitlines()[-1].strip()
        raise ModelLoadError(
            f"{str(path)!r} does not fit the model ({line}); give the model that it was made of"
        ) from error
    recipe = Path(folder) / _RECIPE
    if recipe.exists():
        clone.recipe = Recipe.load(recipe)  # type: ignore[assignment]
    return clone


def _restore(
    path: Path, model: nn.Module, name: str, told: dict[str, Any], tensors: dict[str, Tensor], kernels: bool
) -> nn.Module:
    prefix = f"{name}." if name else ""
    try:
        old = model.get_submodule(name)
        shape = cast(list[int], told["layer"]["shape"])
        if describe(old)["shape"] != shape:
            raise ModelLoadError(
                f"layer {name!r} of {str(path)!r} has shape {tuple(shape)}, the model's "
                f"{tuple(describe(old)['shape'])}; give the model that it was made of"
            )
        fmt = values.read(told["format"])
        assert isinstance(fmt, Format)
        rows = shape[0]
        inner = int(torch.Size(shape[1:]).numel())
        parts = {k: tensors[prefix + k] for k in ("codes", "scales", "zeros") if prefix + k in tensors}
        quantized = expand(parts, fmt, (rows, inner))
        activation = None
        if told["activation"] is not None:
            activation = ActivationQuantizer(
                values.read(told["activation"]), tensors.get(prefix + "input_scale"), tensors.get(prefix + "input_zero")
            )
    except (KeyError, TypeError, AttributeError, RuntimeError, AssertionError, ConfigurationError) as error:
        raise ModelLoadError(f"layer {name!r} of {str(path)!r} cannot be restored ({error}); save it again") from error
    made = Simulated(told["layer"], quantized, tensors.get(prefix + "bias"), activation).train(old.training)
    kernel = told.get("kernel")
    if kernels and kernel is not None:
        possible = real.candidates(fmt, activation.format if activation is not None else None, (rows, inner))
        if kernel in possible:
            return real.realise(made, kernel)
    return made
