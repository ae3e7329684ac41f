"""How an index is built."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from hasten.budget import parse_quantity
from hasten.errors import ConfigurationError
from hasten.retrieve.index.metric import COSINE, code_of

__all__ = ["BuildOptions"]


@dataclass(frozen=True)
class BuildOptions:
    """How an index is built.

    >>> BuildOptions(head_ratio=0.12).replicas
    8
    """

    metric: str = "l2"
    """l2, cosine or ip"""
    head_ratio: float = 0.16
    """share of the rows that become heads"""
    replicas: int = 8
    """most lists that hold a row"""
    list_bytes: float | str | None = None
    """a list holds as many rows as fit into this; default 12 KiB for byte rows, 48 KiB otherwise"""
    epsilon: float = 0.3
    """closure: a head may be this much farther than the nearest one. Farther copies fill lists and find nothing; 10
    leaves it to the RNG rule and ``replicas``, as published
    """
    rng_factor: float = 1.0
    """closure: how much farther than the heads taken a head may be from the row"""
    rng_rule: bool = True
    """False: the nearest heads, whatever their direction (for ablations)"""
    heads: str = "balanced"
    """balanced, kmeans (no penalty for crowded clusters) or random: how heads are chosen"""
    crowding: float = 1.8
    """closure: a list with this many times the mean takes a row only as its nearest or second nearest; 0: any"""
    candidates: int = 64
    """heads that closure looks at"""
    degree: int = 32
    """edges of a head in the graph"""
    build_beam: int = 64
    """beam when a head is linked"""
    alpha: float = 1.1
    """RNG rule of the graph: above 1 keeps more edges"""
    split_factor: int = 6
    """head selection: a crowded node gives ceil(count / split_factor) of its children"""
    branches: int = 16
    """children of a node of the tree: with fewer the lists are more even, with more the build is quicker"""
    leaf: int = 8
    """rows of a node that is not split"""
    codes: bool = True
    """lists of floats get byte codes behind them, a quarter of their size: mapped searches touch fewer rows"""
    seed: int = 0
    """every random draw of the build comes from it"""
    memory: float | str = "1GiB"
    """bytes that the build may take beyond what the process has already"""
    threads: int = 0
    """0: as many as the processor has cores"""

    def __post_init__(self) -> None:
        code_of(self.metric)
        if not 0 < self.head_ratio <= 1:
            raise ConfigurationError(
                f"head_ratio is {self.head_ratio}; choose a share of the rows within (0, 1], such as 0.12"
            )
        if not self.crowding >= 0:
            raise ConfigurationError(f"crowding is {self.crowding}; give times the mean list, such as 1.8, or 0")
        if not 1 <= self.replicas <= 32:
            raise ConfigurationError(f"replicas is {self.replicas}; a row may lie in 1 to 32 lists")
        if self.heads not in ("balanced", "kmeans", "random"):
            raise ConfigurationError(f"heads is {self.heads!r}; choose balanced, kmeans or random")
        if not 4 <= self.degree <= 128:
            raise ConfigurationError(f"degree is {self.degree}; the graph takes 4 to 128 edges")
        for name in ("memory", "list_bytes"):
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, parse_quantity(value, "bytes"))

    def to_json(self) -> dict[str, Any]:
        """By name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def row_limit(self, width: int, itemsize: int) -> int:
        """Rows that a list may hold."""
        size = self.list_bytes or (12288.0 if itemsize == 1 else 49152.0)
        limit = int(float(size) // 4096 * 4096 // (width * itemsize + 8 + (4 if code_of(self.metric) == COSINE else 0)))
        return max(limit, 8)
