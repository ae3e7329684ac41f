"""Shapes of guesses side by side, and the rates that a fixed tree is fitted to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from hasten.errors import ConfigurationError
from hasten.language.speculate.calibrate import guesses_tried, laws_of
from hasten.language.speculate.dyspec import DynamicTree
from hasten.language.speculate.loop import generate
from hasten.language.speculate.shapes import Chain, FixedTree, KAry, Shape
from hasten.language.speculate.tree_draft import TreeDraft

__all__ = ["ShapeResult", "compare", "laws_of", "parse_shapes", "rank_rates"]


@dataclass(frozen=True)
class ShapeResult:
    """What one shape did on all prompts."""

    name: str
    tokens_per_pass: float
    """tokens per pass of the target, the bonus token included, for every shape alike"""
    accepted: float
    """guesses that stood per pass"""
    target_calls: int
    draft_calls: int
    seconds: float
    per_prompt: list[float] = field(default_factory=list)
    """guesses that stood per pass, for each prompt"""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def compare(
    target: Any, draft: Any, prompts: Sequence[Sequence[int]], shapes: Sequence[Shape], *, max_tokens: int = 64,
    temperature: float = 0.0, draft_temperature: float = 0.6, seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> list[ShapeResult]:  # fmt: skip
    """Answer every prompt with every shape; greedily all give the same tokens, so counts compare like with like."""
    if not prompts:
        raise ConfigurationError(
            "shapes are compared on prompts and none is left; give at least 2, half fit fixed trees"
        )
    out = []
    for number, shape in enumerate(shapes):
        passes = accepted = drafts = tokens = 0
        seconds, each = 0.0, []
        for index, prompt in enumerate(prompts):
            found = generate(
                target, prompt, max_tokens=max_tokens, temperature=temperature, seed=seed + index,
                proposer=TreeDraft(draft, shape, draft_temperature=draft_temperature),
            )  # fmt: skip
            passes += found.target_calls
            accepted += found.accepted
            drafts += found.draft_calls
            tokens += len(found.tokens) - 1
            seconds += found.seconds
            each.append(found.accepted / max(1, found.target_calls))
            if progress is not None:
                progress((number + (index + 1) / len(prompts)) / len(shapes))
        out.append(
            ShapeResult(shape.name, tokens / max(1, passes), accepted / max(1, passes), passes, drafts, seconds, each)
        )
    return out


def rank_rates(
    target: Any, draft: Any, calibration: Sequence[Sequence[int]], *, temperature: float = 0.0,
    draft_temperature: float = 0.6, ranks: int = 8, every: int = 4,
) -> list[float]:  # fmt: skip
    """How often the r-th candidate of the draft is the one that stands, over positions of calibration token lists.

    See :func:`~hasten.language.speculate.calibrate.guesses_tried` for what is counted.
    """
    rates, seen = np.zeros(ranks), 0
    for guess in guesses_tried(
        target, draft, calibration, temperature=temperature, draft_temperature=draft_temperature, ranks=ranks,
        every=every,
    ):  # fmt: skip
        seen += guess.rank == 0
        rates[guess.rank] += guess.reached * guess.stands
    return (rates / max(1, seen)).tolist()  # type: ignore[no-any-return]


def parse_shapes(text: str, target: Any, draft: Any, calibration: Sequence[Sequence[int]]) -> list[Shape]:
    """Shapes from ``chain:5,kary:2x4,fixed:16,dynamic:16,layered:16``."""
    out: list[Shape] = []
    for part in text.split(","):
        kind, _, size = part.strip().partition(":")
        try:
            if kind == "chain":
                out.append(Chain(int(size)))
            elif kind == "kary":
                width, _, depth = size.partition("x")
                out.append(KAry(int(width), int(depth)))
            elif kind == "fixed":
                out.append(FixedTree.fit(target, draft, calibration, int(size)))
            elif kind in ("dynamic", "layered"):
                out.append(DynamicTree(int(size), 1.0 / int(size) if kind == "layered" else None))
            else:
                raise ConfigurationError(f"shape {kind!r} is not known; chain, kary, fixed, dynamic, layered are")
        except ValueError as error:
            if isinstance(error, ConfigurationError):
                raise
            raise ConfigurationError(f"shape {part!r} has no size; write for example dynamic:16 or kary:2x4") from None
    return out
