"""Putting a layer into a model in the place of another, so that it is really called.

``nn.TransformerEncoderLayer`` has a fast path in inference that reads the weights of its parts and calls none of them:
a part that rounds its input or holds its weight otherwise would be passed over in silence. Where a part is replaced the
fast path is closed.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

__all__ = ["replace_module", "spelled_out", "told_of"]

_Module = TypeVar("_Module", bound=nn.Module)


def spelled_out(model: nn.Module, path: str) -> nn.Module:
    """Have every encoder layer of torch's around ``path`` call its parts one by one, in place; returns the model."""
    module: Any = model
    for name in path.split("."):
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # what torch asks before it goes the fast path
        module = getattr(module, name, getattr(getattr(module, "layer", None), name, None))  # through wrappers
    return model


def replace_module(model: nn.Module, path: str, layer: nn.Module) -> nn.Module:
    """``model`` with ``layer`` at ``path``, in place; the layer itself where the path is empty.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> replace_module(model, "0", nn.Identity())
    Sequential(
      (0): Identity()
      (1): ReLU()
    )
    """
    if not path:
        return layer
    model.set_submodule(path, layer)
    return spelled_out(model, path)


def told_of(old: nn.Module, new: _Module) -> _Module:
    """``new``, a copy of ``old``, with what a technique left on it: the report and the recipe."""
    for name in ("report", "recipe"):
        if name in old.__dict__:
            setattr(new, name, old.__dict__[name])
    return new
