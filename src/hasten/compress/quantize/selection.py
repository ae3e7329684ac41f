"""Which weights belong together: layers found by the pattern of their names, heads found in a model's config.

A pattern is compared with the last parts of a module's path, part by part: ``encoder.layer.*`` finds
``bert.encoder.layer.0`` and not its children. Frozen weights are left out, a weight that two modules share counts once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from hasten.compress.quantize.granularity import Granularity
from hasten.compress.values import named_value
from hasten.errors import ConfigurationError

__all__ = ["RowGroups", "head_groups", "heads_of", "weight_blocks"]


def _matches(path: str, pattern: str) -> bool:
    parts, wanted = path.split("."), pattern.split(".")
    if len(parts) < len(wanted) or not path:
        return False
    return all(fnmatchcase(p, w) for p, w in zip(parts[-len(wanted) :], wanted, strict=True))


def weight_blocks(model: nn.Module, groups: str | Sequence[str] = ()) -> dict[str, dict[str, nn.Parameter]]:
    """Block name -> {parameter path: weight}, for weights of two axes or more that require a gradient.

    ``groups`` are patterns of modules that become one block each; without any, each module that owns a weight is its
    own block. Raises :class:`~hasten.errors.ConfigurationError` where nothing matches.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> {name: list(block) for name, block in weight_blocks(model).items()}
    {'0': ['0.weight'], '2': ['2.weight']}
    """
    patterns = (groups,) if isinstance(groups, str) else tuple(groups)
    seen: set[int] = set()
    blocks: dict[str, dict[str, nn.Parameter]] = {}
    for path, module in model.named_modules():
        if patterns and not any(_matches(path, p) for p in patterns):
            continue
        own = {}
        for name, parameter in module.named_parameters(recurse=bool(patterns)):
            if parameter.dim() >= 2 and parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                own[f"{path}.{name}" if path else name] = parameter
        if own:
            blocks[path] = own
    if not blocks:
        names = [p for p, _ in model.named_modules() if p][:8]
        wanted = ", ".join(patterns) or "a trainable weight of two axes or more"
        raise ConfigurationError(f"no parameter of the model matches {wanted}; its modules are {', '.join(names)} …")
    return blocks


def parameters_of(blocks: dict[str, dict[str, nn.Parameter]]) -> dict[str, list[Tensor]]:
    """The weights alone, as :class:`~hasten.compress.quantize.hessian.Hessian` takes them."""
    return {name: list(block.values()) for name, block in blocks.items()}


def heads_of(model: Any) -> int | None:
    """Attention heads, from the model's config or its ``nn.MultiheadAttention``; None where nobody says.

    >>> heads_of(nn.TransformerEncoderLayer(8, 2))
    2
    """
    config = getattr(model, "config", None)
    for name in ("num_attention_heads", "n_head", "num_heads", "heads"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            return int(module.num_heads)
        value = getattr(module, "num_heads", None)
        if isinstance(value, int):
            return value
    return None


@named_value
@dataclass(frozen=True)
class RowGroups(Granularity):
    """One scale for a run of ``size`` neighbouring outputs with all their inputs, never across a head.

    Q-BERT's groups: a matrix of attention is cut by head, each head into runs; the last run of a head may be short.

    >>> RowGroups(6, heads=2).compact((16, 8))       # two heads of eight rows, each cut into 6 and 2
    (4, 1)
    """

    size: int = 6
    """outputs that share a scale"""
    heads: int = 1
    """the outputs are cut into so many equal parts first; 1 where they do not divide"""

    def __post_init__(self) -> None:
        if self.size < 1 or self.heads < 1:
            raise ConfigurationError(
                f"a run of {self.size} outputs in {self.heads} heads holds nothing; give 1 or more"
            )

    def _cut(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(outputs of a part, runs of a part)."""
        part = shape[0] // self.heads if shape[0] % self.heads == 0 else shape[0]
        return part, math.ceil(part / self.size)

    def compact(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Runs, then ones."""
        part, runs = self._cut(shape)
        return (shape[0] // part * runs, *(1 for _ in shape[1:]))

    def rows(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """(runs, elements of a run)."""
        part, runs = self._cut(tuple(x.shape))
        parts = x.reshape(-1, part, math.prod(x.shape[1:]))
        parts = nn.functional.pad(parts, (0, 0, 0, runs * self.size - part), value=fill)
        return parts.reshape(-1, self.size * parts.shape[-1])

    def spread(self, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Each run's scale at each of its outputs."""
        part, runs = self._cut(shape)
        parts = scale.reshape(shape[0] // part, runs, *scale.shape[1:])
        return parts.repeat_interleave(self.size, dim=1)[:, :part].reshape(shape[0], *scale.shape[1:])


def head_groups(model: nn.Module, groups: int = 128, heads: int | None = None) -> dict[str, RowGroups]:
    """Matrix path -> its runs, about ``groups`` of them in a matrix with one output per hidden unit.

    The run length is that of the hidden width, the same everywhere: with 768 outputs and 128 groups, 6. ``heads`` is
    looked up in the model where not given. ``groups`` below the number of heads is refused.
    """
    found = heads if heads is not None else heads_of(model)
    if found is None:
        raise ConfigurationError("the model does not say how many heads it has; give heads=…")
    if groups < found:
        raise ConfigurationError(f"{groups} groups cannot hold {found} heads apart; give {found} or more")
    blocks = weight_blocks(model)
    shapes = {path.rpartition(".")[0]: tuple(p.shape) for b in blocks.values() for path, p in b.items()}
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    if not isinstance(width, int):
        squares = [s[0] for s in shapes.values() if len(s) == 2 and s[0] == s[1]]
        width = max(squares, default=max(s[0] for s in shapes.values()))
    size = max(1, width // groups)
    return {path: RowGroups(size, found if shape[0] % found == 0 else 1) for path, shape in shapes.items()}
