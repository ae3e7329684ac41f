"""Two nested speculations for long contexts: the model with a part of its own cache drafts for itself with all of it.

"TriForce: Lossless Acceleration of Long Sequence Generation with Hierarchical Speculative Decoding", Sun et al. 2024,
arXiv:2404.11912. A small model with a sink cache drafts for the middle level (target weights, retrieved keys), which
drafts for the target. Each level emits tokens of exactly the law that it reports, so the output has the target's law.
Differs from the public code in: an inner rejection samples the residual ``norm(max(p - q, 0))``, not ``p`` again (that
is biased); the view is made anew after ``refresh`` tokens; chunks are those that the last token attends to most, with
the one behind each, and not those whose mean key its query likes (``choose="query", follow=False``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hasten.errors import ConfigurationError
from hasten.language.ragged import RaggedBatch
from hasten.language.speculate.law import Draw, chance
from hasten.language.speculate.session import Session
from hasten.language.speculate.verify import probabilities
from hasten.language.speculate.view import PAGE, RetrievalView, check_budget, check_way, draft_batch, slots_for

__all__ = ["TriForce", "draft_middle"]

Law = NDArray[np.float64]


def draft_middle(
    small: Callable[[tuple[int, ...]], Law] | None,
    middle: Callable[[tuple[int, ...], int | None], tuple[Law, Law | None]],
    count: int,
    draw: Draw,
    *,
    resample: str = "residual",
) -> tuple[list[int], list[Law], int, int]:
    """The inner speculation: up to ``count`` tokens, the law of each, guesses of the small model, and how many stood.

    ``small(path)``: law after the tokens drafted so far. ``middle(path, guess)``: the middle level's law there and, in
    the same pass, after the guess. ``resample="middle"`` is the biased rule of the public code, kept as a control.
    """
    tokens: list[int] = []
    laws: list[Law] = []
    guessed = stood = 0

    def emit(token: int, law: Law) -> None:
        tokens.append(token)
        laws.append(law)

    while len(tokens) < count:
        path = tuple(tokens)
        if small is None:
            law, _ = middle(path, None)
            emit(draw(law), law)
            continue
        q = small(path)
        guess = draw(q)
        law, after = middle(path, guess)
        guessed += 1
        if chance(draw, float(law[guess] / q[guess])):
            stood += 1
            emit(guess, law)
            if len(tokens) < count and after is not None:
                emit(draw(after), after)
            continue
        rest = np.maximum(law - q, 0.0)
        mass = rest.sum()
        emit(draw(law if resample == "middle" or mass <= 0 else rest / mass), law)
    return tokens, laws, guessed, stood


class _Sinks:
    """The small model over the first tokens and the most recent ones; positions count within the window."""

    def __init__(self, executor: Any, sinks: int, window: int, room: int) -> None:
        self.sinks, self.window = sinks, window
        self.session = Session(executor, 2 * window + room + sinks)
        self._line: list[int] = []
        self._from = sinks  # where the window begins

    def law(self, known: Sequence[int], path: Sequence[int]) -> Tensor:
        """Logits after ``known + path``; what is computed already is not computed again."""
        text, most = [*known, *path], self.sinks + 2 * self.window
        if len(text) > most:
            if len(text) - self._from > 2 * self.window:  # the window has slid far enough: encode its end anew
                self._from = len(text) - self.window
            text = text[: self.sinks] + text[self._from :]
        same = 0
        limit = min(len(text) - 1, self.session.done)
        while same < limit and self._line[same] == text[same]:
            same += 1
        self.session.done = same
        logits = self.session.feed(text[same:])
        self._line = text
        return logits


class TriForce:
    """A plan for :func:`~hasten.language.speculate.loop.generate`; holds the state of one answer at a time.

    ``small`` None: two levels, the middle one drafts token by token.
    """

    def __init__(
        self, small: Any = None, *, budget: int = 1024, chunk: int = 8, gamma: int = 6, sinks: int = 16,
        window: int = 240, refresh: int | None = 256, choose: str = "mass", follow: bool = True,
    ) -> None:  # fmt: skip
        """``budget`` tokens of retrieved cache in chunks of ``chunk``; ``gamma`` tokens drafted per target pass.

        ``refresh``: tokens after which the view is made anew, None for never. ``choose``: chunks by query (mean keys,
        as published), by mass (the attention that they get), recent or random ones for comparison; ``follow`` takes the
        chunk behind each that the query likes too. Raises :class:`~hasten.errors.ConfigurationError`.
        """
        check_budget(budget, chunk)
        if gamma < 1 or sinks < 0 or window < 8:
            raise ConfigurationError(f"gamma {gamma} and window {window}: give at least 1 and 8")
        check_way(choose)
        self.small, self.budget, self.chunk, self.gamma = small, budget, chunk, gamma
        self.sinks, self.window, self.refresh, self.choose, self.follow = sinks, window, refresh, choose, follow

    @property
    def name(self) -> str:
        return f"triforce {self.budget}"

    def begin(
        self, target: Any, session: Session, prompt: Sequence[int], max_tokens: int, cut: dict[str, Any]
    ) -> Tensor:
        """Compute the prompt and build the view; logits after the prompt."""
        executor = target.executor
        if getattr(executor.config, "sliding_window", None) is not None:
            raise ConfigurationError(
                "the model attends through a sliding window already; a retrieval cache gains nothing"
            )
        self._executor, self._cut = executor, cut
        extra = (self.refresh or max_tokens) + 2 * self.gamma + 8
        pages = slots_for(self.budget, extra) // PAGE
        self._view = RetrievalView(
            executor.new_cache(pages, PAGE), range(pages), self.budget, self.chunk, self.choose, self.follow,
            getattr(executor.config, "attention_scale", None),
        )  # fmt: skip
        self._whole = len(prompt) <= self.budget
        self._small = None
        if self.small is not None:
            self._small = _Sinks(self.small.executor, self.sinks, self.window, self.gamma + 4)
            if self._small.session.executor.max_context < self.sinks + 2 * self.window + self.gamma + 4:
                raise ConfigurationError(
                    f"the small model takes {self.small.executor.max_context} tokens, sinks and window need "
                    f"{self.sinks + 2 * self.window + self.gamma + 4}; give a smaller window"
                )
        self._middle_passes = self._middle_bytes = self._guessed = self._stood = self._built = 0
        if len(prompt) > 1:
            session.feed(prompt[:-1])
        logits = self.verify(session, [prompt[-1]])
        self._tail: list[int] = []  # drafted tokens whose keys are in the view, behind its end
        self._build(session)
        return logits

    def verify(self, session: Session, tokens: Sequence[int]) -> Tensor:
        """A pass of the target over ``tokens`` behind ``session.done``; remembers the last row's queries."""
        self._queries: list[Tensor] = []
        batch = RaggedBatch.build([(tokens, session.done, session.table)], "all").watched(self._queries)
        logits: Tensor = session.executor.step(batch, session.cache)
        session._count(session.done, len(tokens))
        self._row = 0
        session.done += len(tokens)
        return logits

    def _build(self, session: Session) -> None:
        queries = [q[self._row] for q in self._queries]
        length = session.done
        if not self._whole:
            self._view.build(session.cache, session.table, length, queries)
            # Keys that were looked at, half of a token's bytes, and what was copied.
            tokens = self._view.looked / 2 + self._view.filled
            self._middle_bytes += int(tokens * self._executor.bytes_per_token)
        self._built += 1
        self._since = 0
        self._tail = []

    def draft(self, known: Sequence[int], draw: Draw, left: int) -> tuple[list[int], list[Law]]:
        """Tokens behind ``known`` for the target to verify, with the law of each."""
        count = min(self.gamma, left)
        if self._whole or count < 1:
            return [], []
        base = list(known)
        view, held = self._view, self._tail
        held.clear()

        def middle(path: tuple[int, ...], guess: int | None) -> tuple[Law, Law | None]:
            text = [*base[view.end :], *path, *([] if guess is None else [guess])]
            same = 0
            need = len(text) - (2 if guess is not None else 1)
            while same < min(len(held), need) and held[same] == text[same]:
                same += 1
            logits = self._executor.step(draft_batch([(view, text[same:], same)]), view.cache)
            held[same:] = text[same:]
            self._middle_passes += 1
            rows = view.filled + len(text)
            self._middle_bytes += self._executor.weight_bytes + rows * self._executor.bytes_per_token
            laws = probabilities(logits[need - same :].numpy(), **self._cut)
            return laws[0], laws[1] if guess is not None else None

        def small(path: tuple[int, ...]) -> Law:
            assert self._small is not None
            law: Law = probabilities(self._small.law(base, path).numpy(), **self._cut)[0]
            return law

        tokens, laws, guessed, stood = draft_middle(small if self._small else None, middle, count, draw)
        self._guessed += guessed
        self._stood += stood
        return tokens, laws

    def settle(self, session: Session, known: Sequence[int], stood: int) -> None:
        """The target has computed ``known``, ``session.done`` tokens of it for good."""
        if self._whole:
            return
        view = self._view
        self._row = stood  # of the verified rows this one is the last that stands
        grown = session.done - view.end
        self._since += grown
        if self.refresh is not None and self._since >= self.refresh or not view.room(grown + self.gamma + 2):
            self._build(session)
        else:
            view.extend(session.cache, session.table, session.done)

    def report(self, out: Any) -> None:
        """Add what the lower levels did to the answer's account."""
        out.draft_calls = self._middle_passes
        out.bytes_read += self._middle_bytes
        small = self._small.session if self._small is not None else None
        out.bytes_read += small.bytes_read if small is not None else 0
        out.details = {
            "inner_acceptance": self._stood / self._guessed if self._guessed else 0.0,
            "middle_passes": float(self._middle_passes),
            "small_passes": float(small.passes if small is not None else 0),
            "views": float(self._built),
        }
