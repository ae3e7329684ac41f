"""Saving a compressed module small, and as something that runs without torch.

Every tensor is written in the smallest of the forms that give back its exact bits: dense (half precision where that
loses nothing), the integer codes of its format, indices into its distinct values, or gaps between non-zero values. With
an example the module's program goes into the file too, checked against the module, and :func:`hasten.frozen.load`
runs it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hasten.compress.freeze import freeze
from hasten.compress.quantize.base import Quantized
from hasten.compress.quantize.granularity import PerGroup
from hasten.compress.quantize.integer import Int
from hasten.compress.quantize.selection import RowGroups
from hasten.errors import ConfigurationError, ModelLoadError
from hasten.frozen.container import Container, Encoding, Stored, encoded_size, write_container
from hasten.frozen.runner import MODEL_FILE, Frozen
from hasten.frozen.runner import load as load_frozen

__all__ = ["load_weights", "module_bytes", "save", "stored_form"]


def stored_form(tensor: Tensor, quantized: Quantized | None = None, encoding: Encoding = "best") -> Stored:
    """The smallest exact form of a tensor; ``quantized`` are its codes where it came from a format."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()  # exact, and numpy has no bfloat16
    plain = np.ascontiguousarray(tensor.detach().cpu().numpy())
    forms = [Stored.dense(plain)]
    if plain.dtype == np.float32:
        with np.errstate(over="ignore"):
            half = plain.astype(np.float16)
        if np.array_equal(half.astype(np.float32), plain):
            forms.append(Stored.dense(half))
        for form in (Stored.codebook(plain) if plain.size > 8 else None, Stored.grid(plain), Stored.sparse(plain)):
            if form is not None and np.array_equal(form.decode(), plain):
                forms.append(form)
        coded = _codes(quantized) if quantized is not None else None
        if coded is not None and np.array_equal(coded.decode(), plain):
            forms.append(coded)
    return min(forms, key=lambda f: encoded_size(f, encoding))


def _codes(quantized: Quantized) -> Stored | None:
    form = quantized.format
    if not isinstance(form, Int):
        return None
    granularity = form.granularity
    shape = quantized.shape
    spread: list[Any] = ["broadcast"]
    if isinstance(granularity, PerGroup):
        spread = ["repeat", granularity.axis % len(shape), granularity.size]
    elif isinstance(granularity, RowGroups):
        part = shape[0] // granularity.heads if shape[0] % granularity.heads == 0 else shape[0]
        spread = ["rows", granularity.size, part]
    scales = quantized.scales.detach().numpy()
    half = scales.astype(np.float16)
    scales = half if np.array_equal(half.astype(np.float32), scales) else scales
    zeros = None if quantized.zeros is None else quantized.zeros.detach().numpy().astype(np.int16)
    return Stored.codes(quantized.codes.numpy(), scales, form.bits, form.lowest, spread, zeros)


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    example: Any = None,
    *,
    encoding: Encoding = "best",
    tolerance: float = 1e-4,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Write ``folder/model.hasten``; bytes of the file and of the module as ``torch.save`` writes it.

    ``example`` (a tensor or a tuple of them) puts the program in; its result is compared with the module's, and a
    relative difference above ``tolerance`` refuses the file. ``extra`` is plain values that come back as ``meta``.
    """
    quantized: dict[str, Quantized] = getattr(model, "quantized", {})
    meta: dict[str, Any] = dict(extra or {})
    given = (example,) if isinstance(example, Tensor) else tuple(example) if example is not None else None
    if given is None:
        tensors = dict(model.state_dict())
    else:
        program = freeze(model, given)
        tensors = program.tensors
        slots = [[slot, name] for slot, name in program.slots]
        meta.update(program=program.steps, slots=slots, inputs=program.inputs, outputs=program.outputs)
        if program.batch is not None:
            meta |= {"batch": program.batch, "batch_reason": program.batch_reason}
    stored = {name: stored_form(t, quantized.get(name), encoding) for name, t in tensors.items()}
    for name, tensor in tensors.items():  # bit for bit, or not at all
        wanted = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()
        if not np.array_equal(stored[name].decode().astype(wanted.dtype), wanted, equal_nan=wanted.dtype.kind == "f"):
            raise ConfigurationError(f"{name} would not come back bit for bit; report this as a fault of hasten")
    if given is not None:
        arrays = {slot: stored[name].decode() for slot, name in program.slots}
        _compare(model, Frozen(program.steps, arrays, program.inputs, program.outputs), given, tolerance)
    size = write_container(Path(folder) / MODEL_FILE, stored, meta, encoding)
    return {"file": float(size), "torch.save": float(module_bytes(model))}


def _compare(model: nn.Module, frozen: Frozen, example: tuple[Any, ...], tolerance: float) -> None:
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    with torch.no_grad():
        wanted = model(*example)
    for module, training in modes:
        module.training = training
    found = frozen(*(x.numpy() for x in example))
    pairs = zip(*((v,) if not isinstance(v, tuple | list) else v for v in (wanted, found)), strict=True)
    for a, b in pairs:
        gap = float(np.abs(a.numpy() - b).max())
        if not gap <= tolerance * max(float(a.abs().max()), 1e-12):
            raise ConfigurationError(
                f"the packed program is {gap:g} away from the module; raise tolerance to accept that"
            )


def module_bytes(model: nn.Module) -> int:
    """Bytes of the whole module as ``torch.save`` pickles it."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return buffer.tell()


def load_weights(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Fill ``model`` in place with the tensors of a file that :func:`save` wrote; returned for chaining."""
    place = Path(folder)
    container = Container(place / MODEL_FILE if place.is_dir() else place)
    own = model.state_dict()
    missing = sorted(set(own) - set(container.names))
    if missing:
        raise ModelLoadError(f"{str(container.path)!r} holds no tensor {missing[0]!r}; build the model that was saved")
    for name, tensor in own.items():
        values = torch.from_numpy(np.array(container.tensor(name)))
        if values.shape != tensor.shape:
            raise ModelLoadError(
                f"{str(container.path)!r}: {name} has shape {tuple(values.shape)}, the model wants "
                f"{tuple(tensor.shape)}"
            )
        tensor.copy_(values)
    return model


load = load_frozen
