"""A draft model that grows a tree: one call of the draft per level or per place, on a cache of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from hasten.language.speculate.law import Draw
from hasten.language.speculate.session import Session
from hasten.language.speculate.shapes import Shape
from hasten.language.speculate.tree import TokenTree
from hasten.language.speculate.verify import probabilities

__all__ = ["TreeDraft"]


class TreeDraft:
    """Trees of one sequence; ``begin`` starts a new one.

    >>> from hasten.language import load
    >>> from hasten.language.speculate.dyspec import DynamicTree
    >>> draft = TreeDraft(load("pycode-draft-0.7m"), DynamicTree(budget=8))
    >>> draft.begin(64); len(draft.grow([5, 6, 7], None))
    8
    """

    def __init__(
        self, draft: Any, shape: Shape, *, draft_temperature: float = 0.6, top_p: float = 1.0, top_k: int = 0
    ) -> None:
        self.draft = draft
        self.shape = shape
        self.draft_temperature = draft_temperature
        self.top_p, self.top_k = top_p, top_k
        self._session: Session | None = None

    @property
    def name(self) -> str:
        return self.shape.name

    @property
    def calls(self) -> int:
        """Passes of the draft since ``begin``."""
        return self._session.passes if self._session is not None else 0

    def begin(self, capacity: int) -> None:
        """Forget the last sequence; there will be at most ``capacity`` tokens, guesses included."""
        self._session = Session(self.draft.executor, capacity)
        self._computed: set[int] = set()

    def grow(self, tokens: Sequence[int], draw: Draw | None) -> TokenTree:
        """A tree of guesses behind the known ``tokens``."""
        assert self._session is not None, "begin first"
        self._known = len(tokens)
        self._computed = set()
        pending = list(tokens[self._session.done :])

        def distributions(tree: TokenTree, nodes: Sequence[int]) -> NDArray[Any]:
            session = self._session
            assert session is not None
            if list(nodes) == [-1]:
                logits = session.feed(pending)
            else:
                logits = self._nodes(session, tree, nodes)
                self._computed.update(nodes)
            if draw is None and self.top_k == 0 and self.top_p >= 1.0 and self.draft_temperature > 1e-5:
                # Nothing is drawn, so nobody divides by these; single precision takes a fifth of the time.
                return (logits.float() / self.draft_temperature).softmax(1).numpy()
            return probabilities(logits, temperature=self.draft_temperature, top_p=self.top_p, top_k=self.top_k)

        return self.shape.grow(distributions, draw)

    def _nodes(self, session: Session, tree: TokenTree, nodes: Sequence[int]) -> Any:
        """Logits after some nodes, whose ancestors are computed: their rows alone, each in its own slot."""
        import torch

        from hasten.language.placement import Placement, tree_placement
        from hasten.language.ragged import RaggedBatch

        session.need(len(tree))
        positions, slots, lines = tree_placement(session.done, tree.parents)
        batch = RaggedBatch.build([([tree.tokens[i] for i in nodes], session.done, session.table)], "all")
        placed = RaggedBatch(
            batch.tokens, torch.tensor([positions[i] for i in nodes], dtype=torch.int32), batch.starts, batch.contexts,
            batch.block_tables, batch.logit_rows, Placement.of([slots[i] for i in nodes], [lines[i] for i in nodes]),
        )  # fmt: skip
        logits = session.executor.step(placed, session.cache)
        session._count(session.done, len(nodes))
        return logits

    def settle(self, path: Sequence[int]) -> None:
        """These nodes of the last tree stood; keys of those that were computed are kept."""
        assert self._session is not None
        held = [node for node in path if node in self._computed]
        if held != list(path[: len(held)]):  # an ancestor of a computed node is computed
            held = []
        self._session.keep(0, held)
