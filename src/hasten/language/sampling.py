"""Logits to tokens, for all rows of a step at once.

Every row draws one uniform number ``u = hash(seed, number of tokens generated)`` and takes the token at which the
cumulative probability passes ``u``. The draw is a function of the request alone: who else is in the batch, how prompts
were cut and whether the sequence was preempted do not matter. A step whose rows all take the likeliest token costs one
``max``; every other stage runs only for the rows that ask for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hasten.errors import ConfigurationError
from hasten.language.params import GrammarSpec, SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from hasten.language.structured import GrammarState

__all__ = [
    "GrammarSpec",
    "Sampled",
    "Sampler",
    "SamplingParams",
    "SamplingState",
    "TokenLogprobs",
    "top_logprobs",
    "uniform",
]

_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    """SplitMix64's finaliser: a bijection of 64 bits (Steele, Lea, Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def uniform(seed: int, counter: int) -> float:
    """The number in [0, 1) that belongs to (seed, counter).

    >>> uniform(1, 0) == uniform(1, 0), uniform(1, 0) == uniform(1, 1)
    (True, False)
    """
    return (_mix(_mix(seed & _MASK) ^ (counter & _MASK)) >> 11) * 2.0**-53


class SamplingState:
    """What one sequence carries from token to token."""

    __slots__ = ("counts", "generated", "grammar", "params", "plain", "prompt_mask", "seed", "stop_ids")

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        prompt: Sequence[int] | np.ndarray,
        vocab_size: int,
        eos_ids: Sequence[int] = (),
        grammar: GrammarState | None = None,
    ) -> None:
        self.params = params
        self.seed = seed
        self.generated = 0
        self.grammar = grammar
        ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_ids))
        self.stop_ids: frozenset[int] = frozenset(ends)
        self.counts: Any = None
        self.prompt_mask: Any = None
        if params.penalised:
            self.counts = np.zeros(vocab_size, dtype=np.float32)
            self.prompt_mask = np.zeros(vocab_size, dtype=bool)
            self.prompt_mask[np.asarray(prompt, dtype=np.int64)] = True
        self.plain = (
            params.greedy
            and not params.penalised
            and not params.logit_bias
            and params.logprobs is None
            and params.min_tokens == 0
            and grammar is None
        )

    def ahead(self, tokens: Sequence[int]) -> SamplingState:
        """This state as it will be once ``tokens`` have been generated too; this one stays as it is.

        A state with a grammar cannot look ahead and raises :class:`~hasten.errors.ConfigurationError`.
        """
        if self.plain or not tokens:
            return self  # the likeliest token asks for nothing that came before
        if self.grammar is not None:
            raise ConfigurationError("a sequence with a grammar takes one token at a time; do not guess for it")
        later = SamplingState.__new__(SamplingState)
        for name in SamplingState.__slots__:
            setattr(later, name, getattr(self, name))
        later.generated += len(tokens)
        if self.counts is not None:
            later.counts = self.counts.copy()
            np.add.at(later.counts, np.asarray(tokens, dtype=np.int64), 1.0)
        return later

    def observe(self, token: int) -> None:
        """Take note of a token that was generated."""
        self.generated += 1
        if self.counts is not None:
            self.counts[token] += 1.0
        if self.grammar is not None:
            self.grammar.accept(token)


@dataclass(frozen=True, slots=True)
class Sampled:
    """The tokens of one step, row by row."""

    tokens: list[int]
    finite: list[bool] | None
    """None where every row was finite; else False for rows whose logits held no usable number"""
    logprobs: dict[int, TokenLogprobs] | None
    """by row, for the rows that asked"""


class Sampler:
    """Chooses one token per row.

    >>> state = SamplingState(SamplingParams(temperature=0.0), seed=0, prompt=[1], vocab_size=4)
    >>> Sampler(4).sample(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), [state]).tokens
    [1]

    Not thread-safe; it keeps the layout of the last step's rows, since steps resemble each other.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._rows: list[SamplingState] = []
        self._layout: _Layout | None = None

    def sample(self, logits: Tensor, rows: list[SamplingState]) -> Sampled:
        """``logits`` (rows, vocab) float32, left as they are; one state per row. States are not changed."""
        if self._rows != rows:
            self._rows = list(rows)
            self._layout = None if all(s.plain for s in rows) else _Layout(rows)
        layout = self._layout
        if layout is None:
            chosen, finite = _likeliest(logits)
            return Sampled(chosen.tolist(), finite, None)
        return self._general(logits, rows, layout)

    def _general(self, raw: Tensor, rows: list[SamplingState], layout: _Layout) -> Sampled:
        logits = raw
        if layout.edits:
            logits = raw.clone()
            layout.edit(logits, rows)
        likeliest, finite = _likeliest(logits)
        chosen = torch.from_numpy(likeliest)
        if layout.random:
            picked = layout.random_rows
            scaled = logits[picked] if len(layout.random) < len(rows) else logits
            if finite is not None:
                scaled = torch.nan_to_num(scaled, nan=-1e30, posinf=1e30, neginf=-torch.inf)
            draws = torch.tensor([uniform(rows[i].seed, rows[i].generated) for i in layout.random], dtype=torch.float64)
            chosen[picked] = _draw(scaled / layout.temperature, layout, draws)
        tokens: list[int] = chosen.tolist()
        logprobs = None
        if layout.logprobs:
            wanted = [rows[i].params.logprobs or 0 for i in layout.logprobs]
            found = top_logprobs(raw[layout.logprob_rows], chosen[layout.logprob_rows], wanted)
            logprobs = dict(zip(layout.logprobs, found, strict=True))
        return Sampled(tokens, finite, logprobs)


def _likeliest(logits: Tensor) -> tuple[np.ndarray, list[bool] | None]:
    """The likeliest token of each row, and which rows have a finite largest logit (None if all have).

    NumPy's argmax is vectorised and several times as fast as torch's on a CPU; both let not-a-number win.
    """
    values = logits.numpy()
    chosen = values.argmax(1)
    flags = np.isfinite(values[np.arange(len(chosen)), chosen])
    return chosen, None if flags.all() else flags.tolist()


class _Layout:
    """Which rows ask for what, as tensors; made once for a list of rows."""

    def __init__(self, rows: list[SamplingState]) -> None:
        params = [s.params for s in rows]
        self.penalised = [i for i, p in enumerate(params) if p.penalised]
        self.biased = [i for i, p in enumerate(params) if p.logit_bias]
        self.floored = [i for i, s in enumerate(rows) if s.params.min_tokens > 0 and s.stop_ids]
        self.guided = [i for i, s in enumerate(rows) if s.grammar is not None]
        self.edits = bool(self.penalised or self.biased or self.floored or self.guided)
        self.random = [i for i, p in enumerate(params) if not p.greedy]
        self.logprobs = [i for i, p in enumerate(params) if p.logprobs is not None]
        self.logprob_rows = torch.tensor(self.logprobs, dtype=torch.int64)
        drawn = [params[i] for i in self.random]
        self.random_rows = torch.tensor(self.random, dtype=torch.int64)
        self.temperature = torch.tensor([[p.temperature] for p in drawn], dtype=torch.float32)
        self.min_p = torch.tensor([[p.min_p] for p in drawn], dtype=torch.float32)
        self.any_min_p = any(p.min_p > 0 for p in drawn)
        self.sorted = torch.tensor([j for j, p in enumerate(drawn) if p.top_k > 0 or p.top_p < 1], dtype=torch.int64)
        self.whole = torch.tensor([j for j, p in enumerate(drawn) if p.top_k <= 0 and p.top_p == 1], dtype=torch.int64)
        cut = [drawn[j] for j in self.sorted.tolist()]
        self.cut_k = np.array([p.top_k if p.top_k > 0 else 2**31 for p in cut], dtype=np.int64)
        self.cut_p = np.array([p.top_p for p in cut], dtype=np.float64)
        self.cut_min_p = np.array([p.min_p for p in cut], dtype=np.float64)
        if self.penalised:
            some = [params[i] for i in self.penalised]
            self.penalised_rows = torch.tensor(self.penalised, dtype=torch.int64)
            self.presence = torch.tensor([[p.presence_penalty] for p in some], dtype=torch.float32)
            self.frequency = torch.tensor([[p.frequency_penalty] for p in some], dtype=torch.float32)
            self.repetition = torch.tensor([[p.repetition_penalty] for p in some], dtype=torch.float32)
        if self.biased:
            pairs = [(i, token, value) for i in self.biased for token, value in params[i].logit_bias]
            self.bias_rows = torch.tensor([p[0] for p in pairs], dtype=torch.int64)
            self.bias_ids = torch.tensor([p[1] for p in pairs], dtype=torch.int64)
            self.bias = torch.tensor([p[2] for p in pairs], dtype=torch.float32)

    def edit(self, logits: Tensor, rows: list[SamplingState]) -> None:
        """Penalties, biases, the floor of min_tokens and grammars, in place."""
        if self.penalised:
            counts = torch.from_numpy(np.stack([rows[i].counts for i in self.penalised]))
            prompt = torch.from_numpy(np.stack([rows[i].prompt_mask for i in self.penalised]))
            some = logits[self.penalised_rows]
            factor = torch.where((counts > 0) | prompt, self.repetition, 1.0)
            some = torch.where(some > 0, some / factor, some * factor)
            logits[self.penalised_rows] = some - self.frequency * counts - self.presence * (counts > 0)
        if self.biased:
            logits.index_put_((self.bias_rows, self.bias_ids), self.bias, accumulate=True)
        for i in self.guided:
            grammar = rows[i].grammar
            assert grammar is not None
            grammar.mask(logits[i])
        for i in self.floored:
            if rows[i].generated < rows[i].params.min_tokens:
                ends = list(rows[i].stop_ids)
                kept = logits[i, ends]
                logits[i, ends] = -torch.inf
                if rows[i].grammar is not None and not bool((logits[i] > -torch.inf).any()):
                    logits[i, ends] = kept  # the grammar allows nothing but the end


def _draw(logits: Tensor, layout: _Layout, draws: Tensor) -> Tensor:
    """Tokens (rows,) for tempered logits (rows, vocab) and draws (rows,) in [0, 1)."""
    rows = logits.shape[0]
    if layout.whole.numel() == rows and not layout.any_min_p:
        return _invert(torch.softmax(logits, -1), draws)
    if layout.sorted.numel() == rows:
        return _draw_cut(torch.softmax(logits, -1), layout, draws)
    out = torch.empty(rows, dtype=torch.int64)
    if layout.whole.numel():
        weights = torch.softmax(logits[layout.whole], -1)
        if layout.any_min_p:
            floor = layout.min_p[layout.whole] * weights.amax(-1, keepdim=True)
            weights = torch.where(weights < floor, 0.0, weights)
        out[layout.whole] = _invert(weights, draws[layout.whole])
    if layout.sorted.numel():
        chosen = _draw_cut(torch.softmax(logits[layout.sorted], -1), layout, draws[layout.sorted])
        out[layout.sorted] = chosen
    return out


def _draw_cut(probability: Tensor, layout: _Layout, draws: Tensor) -> Tensor:
    """Tokens (rows,) for probabilities (rows, vocab) of the rows that cut by top-k or top-p."""
    from hasten.language.kernels_sampling import draw_cut

    values = np.ascontiguousarray(probability.numpy())
    out = np.empty(values.shape[0], dtype=np.int64)
    draw_cut(values, values.view(np.int32), layout.cut_k, layout.cut_p, layout.cut_min_p, draws.numpy(), out)
    return torch.from_numpy(out)


def _invert(weights: Tensor, draws: Tensor) -> Tensor:
    """Index at which the running sum of weights (rows, n) passes draw * total; never one of weight zero."""
    running = weights.cumsum(-1, dtype=torch.float64)
    goal = draws[:, None] * running[:, -1:]
    index = torch.searchsorted(running, goal, right=True)[:, 0].clamp_(max=weights.shape[-1] - 1)
    return torch.where(weights.gather(-1, index[:, None])[:, 0] > 0, index, weights.argmax(-1))


def top_logprobs(logits: Tensor, chosen: Tensor, wanted: Sequence[int]) -> list[TokenLogprobs]:
    """Log probabilities of ``chosen`` (rows,) and the ``wanted[row]`` likeliest tokens of logits (rows, vocab)."""
    logs = torch.log_softmax(logits.float(), -1)
    own = logs.gather(-1, chosen[:, None])
    ranks = (logs > own).sum(-1).add_(1).tolist()
    most = min(max(wanted, default=0), logits.shape[-1])
    values, ids = (
        torch.topk(logs, most, -1) if most else (logs[:, :0], torch.empty((len(wanted), 0), dtype=torch.int64))
    )
    rows = zip(own[:, 0].tolist(), ranks, ids.tolist(), values.tolist(), wanted, strict=True)
    return [TokenLogprobs(own_, rank, tuple(i[:n]), tuple(v[:n])) for own_, rank, i, v, n in rows]
