"""Everything the engine keeps of one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hasten.language.sampling import SamplingState
from hasten.serve.output import Timing
from hasten.serve.request import Sequence as Request

__all__ = ["Track", "Work"]


class Track:
    """Everything the engine keeps of one sequence; the policy sees ``request`` only."""

    __slots__ = (
        "cached",
        "followers",
        "highest",
        "names",
        "prompt_logprobs",
        "rank",
        "recomputed",
        "request",
        "slot",
        "state",
        "tokens",
        "version",
    )

    def __init__(self, request: Request, state: SamplingState, prompt: Sequence[int] | np.ndarray) -> None:
        self.request = request
        self.state = state
        room = request.prompt_len + min(state.params.max_tokens, 64)
        self.tokens = np.empty(room, dtype=np.int64)
        self.tokens[: request.prompt_len] = prompt
        self.slot = -1
        self.rank: tuple[int, bool, float, int] = (request.priority, True, request.due, request.seq)
        self.version = -1
        self.names: list[bytes] | None = None
        self.cached = 0
        self.highest = 0
        self.recomputed = 0
        self.followers: list[Track] | None = None
        wanted = state.params.prompt_logprobs is not None
        self.prompt_logprobs: list[Any] | None = [None] if wanted else None

    def append(self, token: int) -> None:
        known = self.request.known
        if known == self.tokens.shape[0]:
            self.tokens = np.concatenate([self.tokens, np.empty_like(self.tokens)])
        self.tokens[known] = token
        self.request.known = known + 1

    def foresee(self, tokens: Sequence[int]) -> None:
        """Write tokens behind the known ones, before they are known, so that their block can be named."""
        known, end = self.request.known, self.request.known + len(tokens)
        while end > self.tokens.shape[0]:
            self.tokens = np.concatenate([self.tokens, np.empty_like(self.tokens)])
        self.tokens[known:end] = tokens

    def timing(self) -> Timing:
        request = self.request
        times = request.token_times
        return Timing(
            arrival=request.arrival,
            first_scheduled=request.first_scheduled,
            first_token=times[0] if times else None,
            last_token=times[-1] if times else None,
            prompt_tokens=request.prompt_len,
            output_tokens=len(times),
            cached_tokens=self.cached,
            preemptions=request.preemptions,
        )


Work = tuple[Track, int, int]
"""a sequence and the tokens, from the first to behind the last, that a step computes of it"""
