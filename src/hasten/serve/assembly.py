"""One step's work as a ragged batch, and which of its logits are wanted for what."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hasten.language.forks import Fork
from hasten.language.ragged import RaggedBatch
from hasten.language.speculate.proposal import Proposal
from hasten.serve.batch import blocks_for
from hasten.serve.layout import BatchLayout
from hasten.serve.track import Track, Work

__all__ = ["Probe", "StepBatch", "assemble"]


@dataclass(frozen=True, slots=True)
class Probe:
    """Logits that say how likely a prompt's own tokens are."""

    track: Track
    row: int
    """the first of them"""
    count: int


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What a step computes."""

    batch: RaggedBatch
    ready: list[tuple[Track, int]]
    """sequences that get a token, each with the row of its logits; rows of its guesses follow"""
    probes: list[Probe]


def assemble(
    layout: BatchLayout, work: list[Work], guesses: dict[int, Proposal], forks: dict[int, Fork], block_size: int
) -> StepBatch:
    """Lay out ``work`` in the buffers of ``layout``; guesses stand behind the known tokens, trees in their forks."""
    width = blocks_for(max(end for _, _, end in work), block_size)
    contexts = [start for _, start, _ in work]
    slots = [track.slot for track, _, _ in work]
    if all(end - start == 1 and end == t.request.known and t.prompt_logprobs is None for t, start, end in work):
        ids = [int(track.tokens[start]) for track, start, _ in work]
        ready = [(track, row) for row, (track, _, _) in enumerate(work)]
        return StepBatch(layout.build_decode(ids, contexts, slots, width), ready, [])
    rows: list[int] = []
    ready = []
    probes: list[Probe] = []
    at = 0
    for track, start, end in work:
        last = at + end - start
        logs, prompt_len = track.prompt_logprobs, track.request.prompt_len
        if logs is not None and len(logs) <= prompt_len:
            first = max(0, len(logs) - 1 - start)  # the logits at p belong to the token at p + 1
            count = min(end, prompt_len - 1) - start - first
            if count > 0:
                probes.append(Probe(track, len(rows), count))
                rows.extend(range(at + first, at + first + count))
        if end >= track.request.known:
            ready.append((track, len(rows)))
            rows.extend(range(last - 1 - (end - track.request.known), last))  # with guesses: one more each
        at = last
    pieces = [
        track.tokens[start:end]
        if end <= track.request.known
        else np.concatenate([track.tokens[start : track.request.known], guesses[track.request.seq].tokens])
        for track, start, end in work
    ]
    if forks:
        branches = [forks.get(track.request.seq) for track, _, _ in work]
        return StepBatch(layout.build_forked(pieces, contexts, slots, rows, width, branches), ready, probes)
    return StepBatch(layout.build(pieces, contexts, slots, rows, width), ready, probes)
