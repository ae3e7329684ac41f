"""What reaches a module: the model is run up to it and stopped there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["arrivals"]

Given = tuple[tuple[Any, ...], dict[str, Any]]


class _Reached(Exception):
    """What was waited for is there."""


def arrivals(module: nn.Module, run: Callable[[], Any], calls: int = 1) -> list[Given]:
    """Arguments of the first ``calls`` calls of ``module`` within ``run()``, which goes no further; fewer where it is
    called less often.

    >>> import torch
    >>> net = nn.Sequential(nn.Identity(), nn.ReLU())
    >>> arrivals(net[1], lambda: net(torch.tensor([-1.0])))
    [((tensor([-1.]),), {})]
    """
    caught: list[Given] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args, kwargs))
        if len(caught) == calls:
            raise _Reached

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with contextlib.suppress(_Reached):
            run()
    finally:
        handle.remove()
    return caught
