"""The entropy coder: every plane comes back, both twins write the same bytes, and the size is that of the law."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import DataError
from hasten.language.rans import ESCAPE, Tables, cuts, decode, encode, frequencies
from hasten.language.rans_lanes import has_lanes

WAYS = [False] + ([True] if has_lanes() else [])


def case(seed, rows, tokens, channels, group, wide):
    """A plane, its tables, the table of each lane, and the ideal size in bits."""
    rng = np.random.default_rng(seed)
    lanes = -(-channels // 16) * 16
    width = rng.uniform(0.2, wide, (2 * rows * channels, 1))
    law = np.exp(-np.abs(np.arange(255) - rng.integers(80, 170)) / width)
    law = 0.999 * law / law.sum(-1, keepdims=True) + 0.001 / 255
    tables = Tables(frequencies(law.astype(np.float32)))
    ids = np.full((rows, 2, lanes), tables.count, np.int32)
    ids[:, :, :channels] = np.arange(2 * rows * channels).reshape(rows, 2, channels)
    ids[0, 1] = ids[0, 0]  # a row without anchors
    plane, bits = np.zeros((rows, tokens, lanes), np.uint8), 0.0
    for row in range(rows):
        for token in range(tokens):
            chances = law[ids[row, int(token % group == 0), :channels]]
            codes = (chances.cumsum(-1) < rng.random((channels, 1)) * chances.sum(-1, keepdims=True)).sum(-1)
            plane[row, token, :channels] = codes
            bits -= np.log2(chances[np.arange(channels), codes] / chances.sum(-1)).sum()
    return plane, group, tables, ids, bits


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.integers(0, 99), st.integers(1, 3), st.integers(1, 40), st.integers(1, 90), st.integers(1, 12),
    st.sampled_from([0.3, 3.0, 60.0]),
)  # fmt: skip
def test_any_plane_comes_back_and_both_twins_agree(seed, rows, tokens, channels, group, wide):
    plane, group, tables, ids, _ = case(seed, rows, tokens, channels, group, wide)
    streams = [encode(plane.copy(), group, tables, ids, lanes=way) for way in WAYS]
    assert all(stream == streams[0] for stream in streams)
    for way in WAYS:
        back = np.full_like(plane, 9)
        assert decode(*streams[0], back, group, tables, ids, lanes=way)
        assert np.array_equal(back, plane)


def test_the_size_is_the_cross_entropy_and_not_above_that_of_a_range_coder():
    rng = np.random.default_rng(0)
    law = rng.dirichlet(np.ones(255) * 0.3).astype(np.float32) * 0.999 + np.float32(0.001 / 255)
    plane = rng.choice(255, (4, 2000, 64), p=law.astype(float) / law.sum(dtype=float)).astype(np.uint8)
    tables, ids = Tables(frequencies(law[None])), np.zeros((4, 2, 64), np.int32)
    words, escapes = encode(plane.copy(), 10, tables, ids)
    ideal = -np.log2(law[plane] / law.sum()).sum() / 8
    assert len(words) + len(escapes) < 1.005 * ideal + 256  # 64 states of 32 bits
    constriction = pytest.importorskip("constriction")
    peer = constriction.stream.queue.RangeEncoder()
    peer.encode(plane.reshape(-1).astype(np.int32), constriction.stream.model.Categorical(law, perfect=False))
    assert len(words) + len(escapes) < 1.005 * 4 * len(peer.get_compressed()) + 256


def test_codes_that_no_table_holds_travel_beside():
    law = np.zeros((1, 255), np.float32)
    law[0, 100:104] = 1
    tables, ids = Tables(frequencies(law)), np.zeros((2, 2, 16), np.int32)
    plane = np.random.default_rng(0).integers(0, 255, (2, 30, 16)).astype(np.uint8)
    for way in WAYS:
        marked = plane.copy()
        words, escapes = encode(marked, 7, tables, ids, lanes=way)
        assert len(escapes) == (marked == ESCAPE).sum() > 900
        back = np.empty_like(plane)
        assert decode(words, escapes, back, 7, tables, ids, lanes=way)
        assert np.array_equal(back, plane)
        assert not decode(words, escapes[:-1], back, 7, tables, ids, lanes=way)
        assert not decode(words, escapes + b"x", back, 7, tables, ids, lanes=way)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_a_damaged_stream_is_noticed_or_harmless(data):
    plane, group, tables, ids, _ = case(1, 2, 20, 40, 5, 3.0)
    words, escapes = encode(plane.copy(), group, tables, ids)
    kind = data.draw(st.sampled_from(["cut", "more", "zeros", "noise"]))
    if kind == "cut":
        words = words[: data.draw(st.integers(0, len(words) - 2))]
    elif kind == "more":
        words += bytes(data.draw(st.integers(1, 5)) * 2)
    elif kind == "zeros":
        words = words[:256] + bytes(len(words) - 256)
    else:
        rng = np.random.default_rng(data.draw(st.integers(0, 99)))
        words = rng.integers(0, 256, len(words), np.uint8).tobytes()
    for way in WAYS:
        assert not decode(words, escapes, np.empty_like(plane), group, tables, ids, lanes=way)


def test_frequencies_add_up_and_tables_that_do_not_are_refused():
    flat, point = np.full(255, 1 / 255), np.eye(255)[7]
    steep = 0.5 ** np.arange(255)
    counts = frequencies(np.stack([flat, point, steep, steep[::-1]]).astype(np.float32))
    assert (counts.sum(-1, dtype=int) == 4096).all()
    assert counts[1, 7] == 4095
    assert counts[1, ESCAPE] == 1
    held = counts[:, :ESCAPE] > 0
    assert held[0].all()
    assert held[2].sum() < 16
    with pytest.raises(DataError, match="add up"):
        Tables((counts + 1).astype(np.uint16))
    gap = counts.copy()
    gap[0, 20] += gap[0, 30]
    gap[0, 30] = 0
    with pytest.raises(DataError, match="gaps"):
        Tables(gap)


def test_planes_are_cut_into_streams_by_size():
    assert cuts(16, 10, 64) == [0, 16]
    many = cuts(64, 4000, 512)
    assert many[0] == 0
    assert many[-1] == 64
    assert len(many) == 65
