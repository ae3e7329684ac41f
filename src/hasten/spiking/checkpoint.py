"""Trained weights that are made once: named by a hash of what made them, kept in the user's cache.

The name covers the source of the training function, its settings (the seed among them) and the bytes of its data, so
any change of these trains anew and nothing else does. A run that was cut off goes on from its own folder.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import shutil
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.errors import DataError
from hasten.measure.cache import cache_folder

__all__ = ["fingerprint", "trained"]

Train = Callable[[Path], dict[str, Any]]


def fingerprint(script: Callable[..., Any], settings: Mapping[str, Any], data: Mapping[str, Tensor]) -> str:
    """Twelve hexadecimal digits of the source of ``script``, the settings (JSON values) and the data's bytes."""
    digest = hashlib.blake2b(digest_size=6)
    tree = ast.parse(textwrap.dedent(inspect.getsource(script)))  # layout and comments do not count
    digest.update(ast.dump(tree).encode())
    digest.update(json.dumps(dict(settings), sort_keys=True).encode())
    for name, tensor in sorted(data.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def trained(
    name: str,
    script: Callable[..., dict[str, Any]],
    settings: Mapping[str, Any],
    data: Mapping[str, Tensor],
    *,
    folder: Path | None = None,
    **handed: Any,
) -> dict[str, Any]:
    """What ``script(**data, **settings, checkpoint=folder, **handed)`` returns: tensors and plain values, made once.

    ``handed`` (progress, say) is not part of the name. Raises :class:`~hasten.errors.DataError` for a file that is
    there and cannot be read.
    """
    place = folder if folder is not None else cache_folder() / "trained"
    stem = f"{name}-{fingerprint(script, settings, data)}"
    file = place / f"{stem}.pt"
    if file.exists():
        try:
            loaded: dict[str, Any] = torch.load(file, weights_only=True)
        except Exception as error:  # torch raises whatever a broken archive meets first
            raise DataError(
                f"{str(file)!r} cannot be read ({type(error).__name__}); delete it to train again"
            ) from error
        return loaded
    working = place / f"{stem}.running"
    working.mkdir(parents=True, exist_ok=True)
    result = script(**data, **settings, checkpoint=working, **handed)
    temporary = place / f".{stem}.{os.getpid()}.part"
    torch.save(result, temporary)
    os.replace(temporary, file)
    shutil.rmtree(working, ignore_errors=True)
    return result
