import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.language.ragged import RaggedBatch
from hasten.serve.layout import BatchLayout


@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.integers(0, 30), st.lists(st.integers(0, 99), min_size=10, max_size=10)),
        min_size=1,
        max_size=40,
    ),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_equal_to_the_plain_builder(chunks, decode):
    if decode:
        chunks = [(1, context, table) for _, context, table in chunks]
    layout = BatchLayout(max_blocks=10)
    slots, pieces = [], []
    for length, _, table in chunks:
        slot = layout.open()
        layout.extend(slot, 0, table[:4])  # in two parts, as it grows
        layout.extend(slot, 4, table[4:])
        slots.append(slot)
        pieces.append(np.arange(length, dtype=np.int64) + slot)
    assert len(set(slots)) == len(slots)
    contexts = [context for _, context, _ in chunks]
    plain = RaggedBatch.build([(p.tolist(), c, t) for p, (_, c, t) in zip(pieces, chunks, strict=True)])
    if decode:
        fast = layout.build_decode([int(p[0]) for p in pieces], contexts, slots, 10)
    else:
        fast = layout.build(pieces, contexts, slots, plain.logit_rows.tolist(), 10)
    for field in ("tokens", "positions", "starts", "contexts", "block_tables", "logit_rows"):
        a, b = getattr(fast, field), getattr(plain, field)
        assert a.dtype == b.dtype
        assert a.tolist() == b.tolist()
        assert a.is_contiguous()


def test_rows_are_used_again():
    layout = BatchLayout(max_blocks=2)
    first = [layout.open() for _ in range(40)]
    for slot in first:
        layout.close(slot)
    assert {layout.open() for _ in range(40)} == set(first)
