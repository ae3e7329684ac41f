"""How the next token is to be chosen: the knobs of one request.

Light on purpose (no torch), so that a server's front process can read and check a request without loading the engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hasten.errors import InvalidRequestError

__all__ = ["GrammarSpec", "SamplingParams", "TokenLogprobs"]

_KINDS = ("json_schema", "json_object", "grammar", "regex")


def _check(holds: bool, param: str, value: object, expected: str) -> None:
    if not holds:
        raise InvalidRequestError(f"{param} is {value!r}; {expected}", param)


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """What the answer must conform to.

    >>> GrammarSpec("regex", "[0-9]+").kind
    'regex'
    """

    kind: str
    """json_schema, json_object, grammar (EBNF) or regex"""
    text: str = ""
    """the schema (as JSON), the grammar or the expression; empty for json_object"""

    def __post_init__(self) -> None:
        _check(self.kind in _KINDS, "guided", self.kind, f"known kinds are {', '.join(_KINDS)}")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Knobs of the choice of tokens; names and meaning are those of the OpenAI API and of vLLM.

    >>> SamplingParams(temperature=0.0, max_tokens=8).greedy
    True
    >>> SamplingParams(top_p=1.5)
    Traceback (most recent call last):
    ...
    hasten.errors.InvalidRequestError: top_p is 1.5; it must be in (0, 1], 1 turns it off

    Raises :class:`~hasten.errors.InvalidRequestError`, whose ``param`` is the field.
    """

    max_tokens: int = 16
    """tokens the answer may have; 0 computes the prompt only (for its logprobs)"""
    temperature: float = 1.0
    """divides the logits; 0 takes the most likely token"""
    top_k: int = 0
    """keep the k most likely tokens; 0 or -1 keeps all"""
    top_p: float = 1.0
    """keep the smallest set of tokens whose probability reaches p; 1 keeps all"""
    min_p: float = 0.0
    """drop tokens less likely than min_p times the most likely one"""
    presence_penalty: float = 0.0
    """taken from the logit of each token that the answer holds"""
    frequency_penalty: float = 0.0
    """taken from the logit of a token for each time the answer holds it"""
    repetition_penalty: float = 1.0
    """divides positive and multiplies negative logits of tokens of prompt or answer"""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, bias) pairs, added to the logits"""
    seed: int | None = None
    """makes the answer a function of prompt and seed; without it the engine draws one"""
    stop: tuple[str, ...] = ()
    """texts that end the answer; they are not part of it"""
    stop_token_ids: tuple[int, ...] = ()
    """tokens that end the answer"""
    include_stop_str_in_output: bool = False
    """whether the text keeps the stop string that ended it"""
    ignore_eos: bool = False
    """whether to go on after an end token"""
    min_tokens: int = 0
    """end and stop tokens are impossible before this many tokens"""
    logprobs: int | None = None
    """log probabilities of the chosen token and this many most likely ones; None gives none"""
    prompt_logprobs: int | None = None
    """the same for the tokens of the prompt"""
    skip_special_tokens: bool = True
    """whether the text leaves special tokens out"""
    grammar: GrammarSpec | None = None
    """what the answer must conform to"""

    def __post_init__(self) -> None:
        _check(self.max_tokens >= 0, "max_tokens", self.max_tokens, "it must be 0 or more")
        _check(0.0 <= self.temperature <= 1e4, "temperature", self.temperature, "it must be from 0 (greedy) to 2 or so")
        _check(self.top_k >= -1, "top_k", self.top_k, "it must be 1 or more, 0 turns it off")
        _check(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "it must be in (0, 1], 1 turns it off")
        _check(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "it must be in [0, 1]")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(-2.0 <= value <= 2.0, name, value, "it must be in [-2, 2]")
        _check(
            0.01 <= self.repetition_penalty <= 100.0,
            "repetition_penalty",
            self.repetition_penalty,
            "it must be in [0.01, 100], 1 turns it off",
        )
        _check(self.min_tokens >= 0, "min_tokens", self.min_tokens, "it must be 0 or more")
        _check(
            self.min_tokens <= self.max_tokens,
            "min_tokens",
            self.min_tokens,
            f"it must not exceed max_tokens, which is {self.max_tokens}",
        )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _check(value is None or 0 <= value <= 100, name, value, "it must be from 0 to 100")
        _check(self.seed is None or -(2**63) <= self.seed < 2**64, "seed", self.seed, "it must fit 64 bits")
        _check(all(self.stop), "stop", self.stop, "a stop string must not be empty")

    @classmethod
    def make(
        cls,
        *,
        stop: str | Iterable[str] | None = None,
        logit_bias: Mapping[int | str, float] | None = None,
        **fields: object,
    ) -> SamplingParams:
        """The same with ``stop`` as one text and ``logit_bias`` as a mapping, as requests have them."""
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        try:
            bias = tuple((int(token), float(value)) for token, value in (logit_bias or {}).items())
        except ValueError:
            raise InvalidRequestError(
                f"logit_bias has the keys {list(logit_bias or {})[:4]}; they must be token ids", "logit_bias"
            ) from None
        return cls(stop=stops, logit_bias=bias, **fields)  # type: ignore[arg-type]

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < 1e-5 or self.top_k == 1

    @property
    def penalised(self) -> bool:
        """Whether the choice depends on which tokens came before."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise :class:`~hasten.errors.InvalidRequestError` if a token id lies outside the vocabulary."""
        for name, ids in (("logit_bias", [t for t, _ in self.logit_bias]), ("stop_token_ids", self.stop_token_ids)):
            for token in ids:
                _check(0 <= token < vocab_size, name, token, f"token ids of this model are 0 to {vocab_size - 1}")


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities at one position, of the raw distribution (before temperature, penalties and masks)."""

    chosen: float
    """that of the token which stands there"""
    rank: int
    """1 for the likeliest"""
    top_ids: tuple[int, ...]
    """the likeliest tokens, best first"""
    top: tuple[float, ...]
    """their log probabilities"""
