"""What a proposer is worth on a model, measured once so that a simulator can predict every load.

A few prompts are answered with a fixed number of guesses; how often a tested guess stands, and the seconds that a guess
takes, are all that the simulation needs. A turn in which the proposer has nothing to say counts as a guess that fell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from hasten.clock import Clock, MonotonicClock
from hasten.errors import ConfigurationError

if TYPE_CHECKING:
    from hasten.language.speculate.proposal import Ask, Proposal
    from hasten.serve.cost import IterationCost
    from hasten.serve.policy.speculation import DraftCost, SpeculationPolicy
    from hasten.serve.simulated_guesses import SimulatedSpeculation
    from hasten.tune.space import Point

__all__ = ["Guessing", "measure_guessing", "policy_of", "prompts_for", "words_for"]


@dataclass(frozen=True)
class Guessing:
    """A proposer on a model.

    >>> Guessing(alpha=0.8, seconds=1e-4).draft.per_token
    0.0001
    """

    alpha: float
    """chance that a tested guess stands"""
    seconds: float
    """time of a guess"""

    @property
    def draft(self) -> DraftCost:
        """In the words of the policies."""
        from hasten.serve.policy.speculation import DraftCost

        return DraftCost(per_token=self.seconds)

    def simulated(self, point: Point, cost: IterationCost, seed: int = 0) -> SimulatedSpeculation:
        """For :class:`~hasten.serve.simulate.Simulator`, with the lengths that a point asks for."""
        from hasten.serve.simulated_guesses import SimulatedSpeculation as Plan

        policy = policy_of(point, cost)
        assert policy is not None
        return Plan(policy, lambda now: self.alpha, cost, self.draft, seed)


def policy_of(point: Point, cost: IterationCost | None = None) -> SpeculationPolicy | None:
    """The lengths of a point: ``guesses`` 0 leaves them to goodput; None where nothing is guessed."""
    from hasten.serve.policy.speculation import FixedSpeculation, GoodputSpeculation

    if point.get("speculate", "off") == "off":
        return None
    guesses = int(point.get("guesses", 0))
    if guesses:
        return FixedSpeculation(guesses)
    return GoodputSpeculation(cost=cost) if cost is not None else GoodputSpeculation()


def words_for(model: Any, words: Sequence[str], draft: str | None = None) -> tuple[str, ...]:
    """Those of ``words`` that this model can do: without a draft neither ``draft`` nor ``tree``.

    Raises :class:`~hasten.errors.ConfigurationError` for a word that is none.
    """
    from hasten.language.speculate.choose import DRAFTS, parse

    known = [(word, parse(word)[0]) for word in words]
    drafted = draft is not None or str(getattr(model, "name", "")) in DRAFTS
    return tuple(word for word, kind in known if drafted or kind not in ("draft", "tree"))


def prompts_for(model: Any, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Prompts of these lengths: held-out library code where the model reads text, else random tokens."""
    import numpy as np

    from hasten.errors import ModelLoadError

    rng = np.random.default_rng(seed)
    vocabulary = int(model.executor.vocab_size)
    try:
        tokenizer = getattr(model, "tokenizer", None)
    except ModelLoadError:
        tokenizer = None
    line: list[int] = []
    if tokenizer is not None:
        most = max(lengths, default=0)
        for text in _texts():
            line += tokenizer.encode(text)
            if len(line) >= 8 * most + 20_000:
                break
    out = []
    for length in lengths:
        if len(line) > length:
            at = int(rng.integers(0, len(line) - length))
            out.append(line[at : at + length])
        else:
            out.append(rng.integers(0, vocabulary, length).tolist())
    return out


@lru_cache(maxsize=1)
def _texts() -> list[str]:
    """Held-out library files; finding them reads the whole library."""
    from hasten.language.corpus import documents

    return [d.text[:20_000] for d in documents(suite=False) if d.split == "test"]


class _Watched:
    """A proposer whose guesses and seconds are counted."""

    def __init__(self, proposer: Any, clock: Clock) -> None:
        self._proposer, self._clock = proposer, clock
        self.name = proposer.name
        self.most = getattr(proposer, "most", 0)
        self.seconds = 0.0
        self.calls = self.guesses = self.stood = self.tested = 0

    def attach(self, host: Any) -> None:
        if hasattr(self._proposer, "attach"):
            self._proposer.attach(host)

    def propose(self, asks: Sequence[Ask]) -> list[Proposal]:
        began = self._clock.now()
        found: list[Proposal] = self._proposer.propose(asks)
        self.calls += 1
        if self.calls > 2:  # the first ones load code
            self.seconds += self._clock.now() - began
            self.guesses += sum(len(p.tokens) for p in found)
        self.tested += sum(not p.tokens for p in found)
        from dataclasses import replace

        return [replace(p, source=self.name) if p.tokens else p for p in found]

    def learn(self, proposal: Proposal, accepted: int) -> None:
        self.stood += accepted
        self.tested += min(accepted + 1, len(proposal.tokens))

    def learn_path(self, proposal: Proposal, path: Sequence[int]) -> None:
        self.stood += len(path)
        self.tested += min(len(path) + 1, proposal.depth)

    def forget(self, seq: int) -> None:
        self._proposer.forget(seq)


def measure_guessing(
    model: Any, word: str, prompts: Sequence[Sequence[int]], *, draft: str | None = None, tokens: int = 48,
    guesses: int = 4, clock: Clock | None = None,
) -> Guessing:  # fmt: skip
    """Answer some prompts greedily with the proposer that ``word`` names, see ``choose``.

    Its own learning is left out, so that what is measured does not depend on the order of the prompts.
    """
    from hasten.language.params import SamplingParams
    from hasten.language.speculate.choose import choose
    from hasten.serve.engine import Engine
    from hasten.serve.policy import FixedSpeculation, make

    if not prompts:
        raise ConfigurationError("guesses are measured on prompts, and none was given")
    clock = clock or MonotonicClock()
    proposer = choose(model, word, draft)
    if proposer is None:
        return Guessing(0.0, 0.0)
    watched = _Watched(proposer, clock)
    engine = Engine(
        model, make("stall-free", token_budget=512, max_num_seqs=1), max_num_seqs=1, clock=clock, proposer=watched,
        speculation=FixedSpeculation(guesses), prefix_sharing=False,
    )  # fmt: skip
    room = engine.max_model_len
    params = SamplingParams(max_tokens=min(tokens, room // 2), temperature=0.0, ignore_eos=True)
    for prompt in prompts:
        engine.generate([list(prompt)[-(room - params.max_tokens - 1) :]], params)
    return Guessing(watched.stood / max(1, watched.tested), watched.seconds / max(1, watched.guesses))
