"""Inputs of the layers of a stack of blocks without running the blocks below again for each of them.

A model whose layers lie in a list of blocks, rounded in the order in which they run, has finished with block ``b``
when it comes to block ``b + 1``. So what reaches a block is kept, and only that block is run to reach a layer inside.
The next block's inputs are the outputs of this one where that is what the model does; it is checked on the first batch,
and else the model is run up to the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hasten.compress.quantize.arrivals import arrivals

__all__ = ["BlockChain", "blocks_of"]


def blocks_of(model: nn.Module) -> tuple[str, int] | None:
    """Path and length of the longest list of at least two blocks that is not inside another; None without one.

    >>> blocks_of(nn.Sequential(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])))
    ('0', 2)
    """
    found = [(path, len(m)) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    outer = [f for f in found if not any(f[0].startswith(f"{o[0]}.") for o in found)]
    return max(outer, key=lambda f: f[1], default=None)


class BlockChain:
    """What reaches the current block of ``model``, for every batch of calibration; valid while lower blocks rest.

    ``run(model, index)`` puts batch ``index`` through the model.
    """

    def __init__(self, model: nn.Module, count: int, run: Callable[[nn.Module, int], None]) -> None:
        self._model, self._count, self._run = model, count, run
        self._blocks = blocks_of(model)
        self._at = -1
        self._held: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def inputs_of(self, path: str) -> Iterator[Tensor] | None:
        """Inputs of the layer, one for each batch; None where it lies in no block."""
        block = self._block_of(path)
        if block is None:
            return None
        if block != self._at and not self._enter(block):
            return None
        return self._inside(path, block)

    def _block_of(self, path: str) -> int | None:
        if self._blocks is None or not path.startswith(f"{self._blocks[0]}."):
            return None
        number = path[len(self._blocks[0]) + 1 :].partition(".")[0]
        return int(number) if number.isdigit() else None

    def _module(self, block: int) -> nn.Module:
        assert self._blocks is not None
        return self._model.get_submodule(f"{self._blocks[0]}.{block}")

    def _enter(self, block: int) -> bool:
        """Find what reaches ``block``; False where it is not reached once by every batch."""
        previous = self._held if block == self._at + 1 and self._held else None
        first = self._arrive(block, 0)
        if first is None:
            return False
        held = [first]
        chained = previous is not None and self._same(self._pushed(block - 1, previous[0]), first)
        for index in range(1, self._count):
            one = self._pushed(block - 1, previous[index]) if chained and previous else self._arrive(block, index)
            if one is None:
                return False
            held.append(one)
        self._at, self._held = block, held
        return True

    def _arrive(self, block: int, index: int) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        caught = arrivals(self._module(block), lambda: self._run(self._model, index))
        return caught[0] if caught else None

    def _pushed(self, block: int, given: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        """``given`` with the block's result in the place of its first argument."""
        args, kwargs = given
        result = self._module(block)(*args, **kwargs)
        if not isinstance(result, Tensor) or not args or not isinstance(args[0], Tensor):
            return None
        return (result, *args[1:]), kwargs

    def _same(self, one: Any, other: tuple[tuple[Any, ...], dict[str, Any]]) -> bool:
        from torch.utils import _pytree as pytree

        if one is None:
            return False
        a, b = (pytree.tree_leaves(x) for x in (one, other))
        return len(a) == len(b) and all(
            torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y or x == y
            for x, y in zip(a, b, strict=True)
        )

    def _inside(self, path: str, block: int) -> Iterator[Tensor]:
        assert self._blocks is not None
        layer, module = self._model.get_submodule(path), self._module(block)
        for args, kwargs in self._held:
            for given, _ in arrivals(layer, partial(module, *args, **kwargs)):
                yield given[0].detach()
