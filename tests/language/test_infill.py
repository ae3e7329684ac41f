"""Fill-in-the-middle samples hold the document, whole."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import InvalidRequestError
from hasten.language.infill import FimTokens, infill_prompt, psm, split_middle, spm, training_blocks

MARKS = FimTokens(prefix=1001, suffix=1002, middle=1003, end=1000)


def encode(text):
    return list(text.encode())


def parts(ids, *marks):
    out, current = [], []
    for i in ids:
        if i in marks:
            out.append(bytes(current))
            current = []
        else:
            current.append(i)
    return [*out, bytes(current)]


@given(text=st.text(), seed=st.integers(0, 10_000))
def test_both_orders_hold_every_byte(text, seed):
    before, middle, after = split_middle(text, np.random.default_rng(seed))
    assert before + middle + after == text
    pieces = [encode(p) for p in (before, middle, after)]
    _, p, s, m, rest = parts(psm(*pieces, MARKS), 1001, 1002, 1003, 1000)
    assert (p + m + s, rest) == (text.encode(), b"")
    head, empty, s, pm, rest = parts(spm(*pieces, MARKS), 1001, 1002, 1003, 1000)
    assert (head, empty, rest) == (b"", b"", b"")
    assert pm + s == text.encode()


@given(
    before=st.integers(0, 300), after=st.integers(0, 300), context=st.integers(32, 200), max_tokens=st.integers(1, 20)
)
def test_prompt_keeps_what_is_near_the_cursor(before, after, context, max_tokens):
    prefix, suffix = "".join(chr(97 + i % 26) for i in range(before)), "z" * after
    ids, dropped = infill_prompt(encode, prefix, suffix, MARKS, context=context, max_tokens=max_tokens)
    assert len(ids) + max_tokens <= context
    _, p, s, _ = parts(ids, 1001, 1002, 1003)
    assert prefix.encode().endswith(p)
    assert suffix.encode().startswith(s)
    assert len(p) + len(s) + dropped == before + after
    assert dropped == 0 or len(ids) + max_tokens == context


def test_no_room_is_named():
    with pytest.raises(InvalidRequestError, match="context holds 16"):
        infill_prompt(encode, "a", "b", MARKS, context=16, max_tokens=16)


def test_rows_overlap_by_one_and_cover_the_text():
    texts = [f"line {i}\n" * 200 for i in range(5)]
    rows = training_blocks(
        texts, lambda s: [encode(x) for x in s], MARKS, block=64, rng=np.random.default_rng(0), fim_rate=0.0
    )
    assert rows.shape[1] == 65
    assert (rows[1:, 0] == rows[:-1, -1]).all()
    plain = [i for i in rows[:, :-1].ravel().tolist() if i < 1000]
    assert abs(len(plain) - sum(map(len, texts))) <= 64
