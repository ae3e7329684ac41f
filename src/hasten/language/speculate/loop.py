"""Speculative decoding of one sequence, no scheduler: what the engine does, in the open, for trees and hierarchies too.

Each pass of the model takes the last known token and the guesses, and gives at least one new token. Greedy: the tokens
are those of plain decoding. At a temperature: with a chain proposer they are those of plain decoding with the same seed
(coupled rule), with a tree or a hierarchy they follow the same law (rejection rule).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hasten.clock import Clock, MonotonicClock
from hasten.errors import ConfigurationError, ContextLengthError, InvalidRequestError
from hasten.language.params import SamplingParams
from hasten.language.sampling import Sampler, SamplingState
from hasten.language.speculate.draft import check_pair
from hasten.language.speculate.law import Dice
from hasten.language.speculate.proposal import Ask, Proposer
from hasten.language.speculate.session import Session
from hasten.language.speculate.tree_draft import TreeDraft
from hasten.language.speculate.triforce import TriForce
from hasten.language.speculate.verify import accept, accept_chain, probabilities, verify_chain, verify_tree

__all__ = ["Speculated", "generate"]


@dataclass
class Speculated:
    """An answer, and what it took."""

    tokens: list[int]
    """ids of the answer"""
    target_calls: int = 0
    """passes of the model behind the prompt"""
    draft_calls: int = 0
    """passes of drafts"""
    proposed: int = 0
    """guesses that were verified"""
    accepted: int = 0
    """guesses that stood"""
    bytes_read: int = 0
    """weights, keys and values that all passes behind the prompt read"""
    seconds: float = 0.0
    """time behind the prompt"""
    details: dict[str, float] = field(default_factory=dict)
    """what a hierarchy counts beside that"""

    @property
    def tokens_per_pass(self) -> float:
        """Tokens per pass of the model, the first token left out: the prompt's own pass gave it."""
        return (len(self.tokens) - 1) / self.target_calls if self.target_calls else float("nan")

    @property
    def acceptance(self) -> float:
        """Share of the guesses that stood."""
        return self.accepted / self.proposed if self.proposed else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Bytes read per token."""
        return self.bytes_read / max(1, len(self.tokens) - 1)

    @property
    def seconds_per_token(self) -> float:
        """Time per token."""
        return self.seconds / max(1, len(self.tokens) - 1)


def generate(
    target: Any,
    prompt: Sequence[int],
    *,
    max_tokens: int = 64,
    proposer: Proposer | TreeDraft | TriForce | None = None,
    length: int = 5,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    stop: Sequence[int] = (),
    clock: Clock | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Speculated:
    """Answer a prompt of token ids; ``proposer`` None decodes plainly.

    ``length``: guesses per pass of a chain proposer. Raises :class:`~hasten.errors.ConfigurationError` for a draft with
    another vocabulary, :class:`~hasten.errors.ContextLengthError` where prompt and answer do not fit.

    >>> from hasten.language import load
    >>> from hasten.language.speculate.lookup import PromptLookup
    >>> model = load("pycode-4m")
    >>> plain = generate(model, [5, 6, 7, 5, 6], max_tokens=8)
    >>> generate(model, [5, 6, 7, 5, 6], max_tokens=8, proposer=PromptLookup()).tokens == plain.tokens
    True
    """
    if not prompt:
        raise InvalidRequestError("the prompt has no tokens; it needs at least one", "prompt")
    executor = target.executor
    if len(prompt) + max_tokens > executor.max_context:
        raise ContextLengthError(
            f"the prompt has {len(prompt)} tokens and max_tokens is {max_tokens}; this model takes "
            f"{executor.max_context} tokens of both together"
        )
    if isinstance(proposer, TreeDraft):
        check_pair(target, proposer.draft)
    elif isinstance(proposer, TriForce) and proposer.small is not None:
        check_pair(target, proposer.small)
    run = _Run(target, list(prompt), max_tokens, temperature, top_p, top_k, seed, set(stop), clock, on_token)
    if isinstance(proposer, TriForce):
        run.hierarchy(proposer)
    elif isinstance(proposer, TreeDraft):
        run.trees(proposer)
    else:
        run.chains(proposer, length)
    return run.out


class _Run:
    """One answer under way."""

    def __init__(
        self, target: Any, prompt: list[int], max_tokens: int, temperature: float, top_p: float, top_k: int, seed: int,
        stop: set[int], clock: Clock | None, on_token: Callable[[int], None] | None,
    ) -> None:  # fmt: skip
        self.known = prompt
        self.target, self.max_tokens, self.stop, self.on_token = target, max_tokens, stop, on_token
        self.cut: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        self.seed = seed
        self.greedy = temperature <= 1e-5
        self.clock = clock or MonotonicClock()
        self.session = Session(target.executor, min(len(prompt) + max_tokens + 1024, target.executor.max_context + 256))
        self.dice = Dice(seed)
        self.out = Speculated([])
        self.ended = False

    def give(self, tokens: Sequence[int]) -> int:
        """Hand out new tokens up to the end of the answer; how many were taken."""
        for count, token in enumerate(tokens):
            if self.ended:
                return count
            self.known.append(token)
            self.out.tokens.append(token)
            if self.on_token is not None:
                self.on_token(token)
            self.ended = token in self.stop or len(self.out.tokens) >= self.max_tokens
        return len(tokens)

    def _law(self, logits: Any) -> Any:
        return probabilities(logits.numpy(), **self.cut)

    def _started(self, draft_passes: Callable[[], int] = lambda: 0) -> None:
        self._passes, self._bytes = self.session.passes, self.session.bytes_read
        self._draft_passes, self._begin = draft_passes(), self.clock.now()

    def _ended(self, draft_passes: Callable[[], int] = lambda: 0, draft_bytes: int = 0) -> None:
        self.out.seconds = self.clock.now() - self._begin
        self.out.target_calls = self.session.passes - self._passes
        self.out.bytes_read = self.session.bytes_read - self._bytes + draft_bytes
        self.out.draft_calls = draft_passes() - self._draft_passes

    def chains(self, proposer: Proposer | None, length: int) -> None:
        """Plain decoding, or chains verified by the coupled rule: one and the same stream of choices."""
        params = SamplingParams(max_tokens=self.max_tokens, **self.cut)
        vocab = self.target.executor.vocab_size
        sampler, state = Sampler(vocab), SamplingState(params, self.seed, self.known, vocab)
        logits = self.session.feed(self.known)
        for token in (sampler.sample(logits, [state]).tokens[0],):
            state.observe(token)
            self.give([token])
        self._started()
        while not self.ended:
            left = self.max_tokens - len(self.out.tokens) - 1
            ask = Ask(0, np.asarray(self.known, np.int64), min(length, left))
            proposal = proposer.propose([ask])[0] if proposer is not None and left > 0 else None
            guesses = list(proposal.tokens) if proposal is not None else []
            self.out.draft_calls += 1 if proposal is not None else 0
            if len(guesses) > 24:
                guesses = guesses[:24]
            start = self.session.done
            logits = self.session.feed([self.known[-1], *guesses], every=True)
            chosen = sampler.sample(logits, [state.ahead(guesses[:i]) for i in range(len(guesses) + 1)]).tokens
            stood = accept_chain(guesses, chosen)
            self.session.done = start + stood + 1
            for token in chosen[: stood + 1]:
                state.observe(token)
            self.out.proposed += len(guesses)
            self.out.accepted += stood
            if proposer is not None and proposal is not None and guesses:
                proposer.learn(proposal.cut(len(guesses)), stood)
            self.give(chosen[: stood + 1])
        calls = self.out.draft_calls
        self._ended()
        self.out.draft_calls = calls
        if proposer is not None:
            proposer.forget(0)

    def trees(self, draft: TreeDraft) -> None:
        """Trees of a draft: greedy by equality, at a temperature by the rejection rule."""
        draft.begin(min(len(self.known) + self.max_tokens + 1024, draft.draft.executor.max_context + 256))
        law = self._law(self.session.feed(self.known))
        self.give([self.dice(law[0])])
        self._started(lambda: draft.calls)
        while not self.ended:
            tree = draft.grow(self.known, None if self.greedy else self.dice)
            room = self.target.executor.max_context - len(self.known)
            if int(tree.depths.max(initial=0)) >= room:
                raise ConfigurationError("the tree is deeper than the context that is left; lower its budget")
            logits = self.session.check(self.known[self.session.done :], tree.parents, tree.tokens)
            pending = len(self.known) - self.session.done
            rows = logits[pending - 1 :]
            if self.greedy:
                path, token = accept(tree, rows.argmax(-1).tolist())
            else:
                path, token = verify_tree(tree, self._law(rows), self.dice)
            self.session.keep(pending, path)
            draft.settle(path)
            self.out.proposed += len(tree)
            self.out.accepted += len(path)
            self.give([tree.tokens[i] for i in path] + [token])
        self._ended(lambda: draft.calls)

    def hierarchy(self, plan: TriForce) -> None:
        """A hierarchy: the model with a part of its cache drafts for the model with all of it."""
        law = self._law(plan.begin(self.target, self.session, self.known, self.max_tokens, self.cut))
        self.give([self.dice(law[0])])
        self._started()
        while not self.ended:
            left = self.max_tokens - len(self.out.tokens) - 1
            tokens, laws = plan.draft(self.known, self.dice, left)
            start = self.session.done
            logits = plan.verify(self.session, [*self.known[start:], *tokens])
            target = self._law(logits)[-len(tokens) - 1 :]
            stood, token = verify_chain(tokens, laws, target, self.dice)
            self.out.proposed += len(tokens)
            self.out.accepted += stood
            self.session.done = len(self.known) + stood
            plan.settle(self.session, [*self.known, *tokens[:stood]], stood)
            self.give([*tokens[:stood], token])
        self._ended()
        plan.report(self.out)
