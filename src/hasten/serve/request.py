"""A request and the sequence that answers it.

One rule replaces the phases of prefill and decode: every sequence has *known* tokens (prompt, then prompt + answer) and
*computed* tokens (those whose keys and values are in the cache). A step lets computed catch up with known; the chunk
that catches up yields the next token, which makes ``known`` grow by one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from hasten.budget import SLO

__all__ = ["FinishReason", "Sequence", "Status"]


class Status(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(Enum):
    """Why a sequence ended, in the words of the OpenAI API where it has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(slots=True, eq=False)
class Sequence:
    """What a policy may know about one sequence; engine and simulator keep it up to date.

    A policy reads it and never writes.
    """

    seq: int
    """number of the sequence, unique in one engine"""
    arrival: float
    """seconds on the engine's clock"""
    prompt_len: int
    """tokens of the prompt"""
    max_tokens: int
    """tokens the answer may have at most"""
    known: int = 0
    """tokens known so far: prompt + generated"""
    computed: int = 0
    """tokens whose keys and values are in the cache (for a waiting sequence: those a shared prefix would give)"""
    blocks: int = 0
    """cache blocks held"""
    priority: int = 0
    """lower is served first, as in vLLM; equal priorities by the time the first token is due"""
    slo: SLO | None = None
    """objective of this request, or the server's"""
    status: Status = Status.WAITING
    preemptions: int = 0
    """how often the blocks were taken away to be recomputed"""
    first_scheduled: float | None = None
    """when the first chunk was planned"""
    token_times: list[float] = field(default_factory=list)
    """when each generated token was ready, on the engine's clock"""

    def __post_init__(self) -> None:
        if self.known == 0:
            self.known = self.prompt_len

    @property
    def due(self) -> float:
        """When its first token is due: arrival and what its objective allows; the arrival where it has none."""
        target = None if self.slo is None else self.slo.ttft
        return self.arrival if target is None else self.arrival + target.limit

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return self.known - self.prompt_len

    @property
    def pending(self) -> int:
        """Known tokens that are not computed yet; at least 1 while the sequence lives."""
        return self.known - self.computed

    @property
    def decoding(self) -> bool:
        """True when one token is all that is missing: the step yields the next token of the answer."""
        return self.known - self.computed == 1 and self.known > self.prompt_len
