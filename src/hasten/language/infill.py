"""Fill-in-the-middle: a document as prefix, suffix and middle, in the order in which a model reads it.

PSM: ``<prefix> P <suffix> S <middle> M <end>``; SPM: ``<prefix><suffix> S <middle> P M <end>`` (Bavarian et al. 2022,
"Efficient Training of Language Models to Fill in the Middle"; SPM in StarCoder's variant). Cuts fall between
characters, not tokens, and each piece is tokenised by itself, because a cursor may stand inside a word.
Differs from the paper in the size of a sample: pieces of files that fit the context, instead of whole documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hasten.errors import InvalidRequestError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["FimTokens", "infill_prompt", "psm", "spm", "split_middle", "training_blocks"]

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class FimTokens:
    """Ids of the tokens that mark the pieces."""

    prefix: int
    suffix: int
    middle: int
    end: int


def psm(prefix: Sequence[int], middle: Sequence[int], suffix: Sequence[int], marks: FimTokens) -> list[int]:
    """Prefix, suffix, middle."""
    return [marks.prefix, *prefix, marks.suffix, *suffix, marks.middle, *middle, marks.end]


def spm(prefix: Sequence[int], middle: Sequence[int], suffix: Sequence[int], marks: FimTokens) -> list[int]:
    """Suffix, prefix, middle; prefix and middle run on without a mark between them."""
    return [marks.prefix, marks.suffix, *suffix, marks.middle, *prefix, *middle, marks.end]


def split_middle(text: str, rng: np.random.Generator) -> tuple[str, str, str]:
    """Two uniform cuts: (prefix, middle, suffix) whose concatenation is ``text``."""
    low, high = sorted(int(c) for c in rng.integers(0, len(text) + 1, 2))
    return text[:low], text[low:high], text[high:]


def infill_prompt(
    encode: Encode,
    prefix: str,
    suffix: str,
    marks: FimTokens,
    *,
    head: Sequence[int] = (),
    context: int | None = None,
    max_tokens: int = 0,
) -> tuple[list[int], int]:
    """The PSM prompt that asks for the middle, and how many tokens had to be left out.

    ``head`` stands before everything (a beginning-of-sequence token). A prompt over ``context`` (None: no limit) loses
    tokens from the far ends, two of the prefix staying for each of the suffix. Raises :class:`InvalidRequestError`
    where ``max_tokens`` alone leaves no room.
    """
    before, after = encode(prefix), encode(suffix)
    if context is None:
        return [*head, marks.prefix, *before, marks.suffix, *after, marks.middle], 0
    room = context - max_tokens - 3 - len(head)
    if room < 2:
        raise InvalidRequestError(
            f"max_tokens is {max_tokens}, the context holds {context}; ask for at most {context - 5}", "max_tokens"
        )
    total = len(before) + len(after)
    if total > room:
        keep_after = min(len(after), max(room // 3, room - len(before)))
        before = before[len(before) - (room - keep_after) :] if room - keep_after < len(before) else before
        after = after[:keep_after]
    dropped = total - len(before) - len(after)
    return [*head, marks.prefix, *before, marks.suffix, *after, marks.middle], dropped


def training_blocks(
    texts: Sequence[str],
    encode_batch: Callable[[list[str]], list[list[int]]],
    marks: FimTokens,
    *,
    block: int,
    rng: np.random.Generator,
    fim_rate: float = 0.5,
) -> np.ndarray:
    """One pass over ``texts`` as packed rows: (rows, block + 1) int32, inputs and targets overlapping by one.

    A text is walked from start to end; each piece is, with probability ``fim_rate``, a fill-in-the-middle sample of 300
    to 1,700 characters (half PSM, half SPM), else plain text of 600 to 3,400 characters after an end mark.
    """
    import numpy as np  # the front of a server infills and needs none

    plans: list[tuple[int, ...]] = []  # kind and indices of the strings of each piece
    strings: list[str] = []
    for index in rng.permutation(len(texts)):
        text, at = texts[int(index)], 0
        while at < len(text):
            fim = rng.random() < fim_rate
            size = int(rng.integers(300, 1700)) if fim else int(rng.integers(600, 3400))
            piece, at = text[at : at + size], at + size
            if fim:
                kind = 1 if rng.random() < 0.5 else 2
                plans.append((kind, len(strings), len(strings) + 1, len(strings) + 2))
                strings.extend(split_middle(piece, rng))
            else:
                plans.append((0, len(strings), int(at >= len(text))))
                strings.append(piece)
    ids = encode_batch(strings)
    stream: list[int] = []
    order = rng.permutation(len(plans))
    for number in order:
        kind, *rest = plans[int(number)]
        if kind == 0:
            stream.append(marks.end)
            stream.extend(ids[rest[0]])
            if rest[1]:
                stream.append(marks.end)
        else:
            build = psm if kind == 1 else spm
            stream.extend(build(ids[rest[0]], ids[rest[1]], ids[rest[2]], marks))
    flat = np.asarray(stream, dtype=np.int32)
    rows = (len(flat) - 1) // block
    starts = np.arange(rows)[:, None] * block + np.arange(block + 1)[None, :]
    blocks: np.ndarray = flat[starts]
    return blocks
