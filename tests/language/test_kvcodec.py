"""The codec: what is coded comes back bit by bit, and what is not sound is refused."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import ConfigurationError, DataError
from hasten.language import DecoderConfig, load, random_model
from hasten.language.kvcodec import KVCodec, head_and_payload
from hasten.language.kvfit import fit, straightened
from hasten.language.kvvalues import KeysValues, capture, perplexity, write_cache
from hasten.language.speculate.session import Session

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return load("pycode-4m")


@pytest.fixture(scope="module")
def contexts(model):
    import inspect
    import json.decoder
    import textwrap

    texts = [inspect.getsource(m) for m in (textwrap, json.decoder)]
    return [model.tokenizer.encode(t)[:240] for t in texts] + [model.tokenizer.encode(texts[0])[300:540]]


@pytest.fixture(scope="module")
def codec(model, contexts):
    return fit(model, contexts, levels=(1, 3))


def test_symbols_come_back_bit_by_bit(codec, model, contexts):
    kv = capture(model, contexts[0])
    for level in (1, 3):
        codes, scales = codec.codes(kv, level)
        found = {}

        def put(plane, its_scales, first, last, found=found):
            found.update({row: (plane[row].copy(), its_scales[row].copy()) for row in range(first, last)})

        blob = codec.encode(kv, level)
        head, payload = codec._checked(blob)
        codec._decompress(payload, head, put, 1)
        rows = codes.reshape(-1, kv.tokens, codes.shape[-1])
        assert sorted(found) == list(range(len(rows)))
        for row, (plane, its_scales) in found.items():
            assert np.array_equal(plane[:, : rows.shape[2]], rows[row])
            assert np.array_equal(its_scales, scales[row])
        assert blob == codec.encode(kv, level) == codec.encode(kv, level, threads=2)
        assert np.array_equal(codec.decode(blob, threads=1).keys, codec.decode(blob, threads=2).keys)


@pytest.mark.parametrize("delta", [True, False, None])
@pytest.mark.parametrize("tokens", [1, 7, 10, 11, 37])
def test_any_length_survives(model, contexts, delta, tokens):
    codec = fit(model, contexts[:1], levels=(4,), delta=delta, measure=False)
    kv = capture(model, contexts[0][:60]).cut(60 - tokens, 60)
    back = codec.decode(codec.encode(kv, 4))
    assert back.start == 60 - tokens
    for a, b in ((kv.keys, back.keys), (kv.values, back.values)):
        assert np.sqrt(np.mean((a - b) ** 2)) < 0.2 * np.std(a)


def test_finer_levels_cost_more_and_lose_less(codec, model, contexts):
    report = codec.report(capture(model, contexts[2]))
    assert report[1]["bytes"] < report[3]["bytes"]
    assert report[1]["key_error"] > report[3]["key_error"]
    assert report[3]["bits_per_value"] < 16 / 4
    assert 0.9 < codec.quality[3] < 1.1
    assert codec.best_level(1e9) == 1
    assert codec.best_level(0.5) == 0


def test_level_zero_is_exact_and_shorter_than_its_numbers(codec, model, contexts):
    kv = capture(model, contexts[0])
    blob = codec.encode(kv, 0)
    back = codec.decode(blob)
    assert np.array_equal(back.keys, kv.keys)
    assert np.array_equal(back.values, kv.values)
    assert len(blob) < 2 * 2 * kv.keys.size
    odd = KeysValues(kv.keys + 1e-4, kv.values)  # no bfloat16
    assert np.array_equal(codec.decode(codec.encode(odd, 0)).keys, odd.keys)


def test_a_decoded_cache_continues_like_the_computed_one(codec, model, contexts):
    tokens = contexts[2]
    exact = codec.decode(codec.encode(capture(model, tokens), 0))
    session = Session(model.executor, 300)
    write_cache(session.cache, session.table, exact)
    session.done = len(tokens)
    other = Session(model.executor, 300)
    other.feed(tokens)
    assert torch.equal(session.feed([5]), other.feed([5]))
    half = codec.decode(codec.encode(capture(model, tokens[:120]), 0))
    assert perplexity(model, tokens, half, 120) == pytest.approx(perplexity(model, tokens, None, 120), rel=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_damage_is_found(codec, model, contexts, data):
    blob = bytearray(codec.encode(capture(model, contexts[0][:24]), data.draw(st.sampled_from([0, 1]))))
    kind = data.draw(st.sampled_from(["flip", "cut", "more"]))
    if kind == "flip":
        at = data.draw(st.integers(0, len(blob) - 1))
        blob[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del blob[data.draw(st.integers(0, len(blob) - 1)) :]
    else:
        blob += b"x"
    with pytest.raises(DataError):
        codec.decode(bytes(blob))


def test_foreign_and_impossible_input_is_refused(codec, model, contexts, tmp_path):
    config = DecoderConfig(
        vocab_size=64, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=16,
        max_position_embeddings=128,
    )  # fmt: skip
    other = random_model(config, name="other", dtype="fp32")
    small = fit(other, [list(range(40))], levels=(1,), measure=False)
    with pytest.raises(DataError, match="belongs to the model"):
        codec.decode(small.encode(capture(other, list(range(20))), 1))
    with pytest.raises(DataError, match="layers"):
        codec.encode(capture(other, list(range(20))))
    kv = capture(model, contexts[0][:20])
    kv.keys[0, 0, 0] = np.inf
    with pytest.raises(DataError, match="finite"):
        codec.encode(kv)
    with pytest.raises(ConfigurationError, match="contexts"):
        fit(model, [[1, 2]])
    path = tmp_path / "codec.npz"
    codec.save(path)
    again = KVCodec.load(path, model.config)
    blob = codec.encode(capture(model, contexts[0][:30]), 3)
    assert again.encode(capture(model, contexts[0][:30]), 3) == blob
    assert again.quality == codec.quality
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="no codec"):
        KVCodec.load(path, model.config)


def test_streams_of_an_older_format_or_of_other_tables_are_refused(codec, model, contexts, tmp_path):
    kv = capture(model, contexts[0][:30])
    blob = codec.encode(kv, 1)
    with pytest.raises(DataError, match="older"):
        codec.decode(b"hkv1" + blob[4:])
    again = fit(model, contexts[1:], levels=(1,), measure=False)
    with pytest.raises(DataError, match="other tables"):
        again.decode(blob)
    path = tmp_path / "codec.npz"
    codec.save(path)
    with np.load(path) as file:
        held = dict(file)
    head = json.loads(held["head"].tobytes())
    del head["format"]
    held["head"] = np.frombuffer(json.dumps(head).encode(), np.uint8)
    np.savez(path, **held)
    with pytest.raises(DataError, match="format 1"):
        KVCodec.load(path, model.config)


def test_keys_are_turned_as_the_plain_form_says(model, contexts):
    kv = capture(model, contexts[0][:40]).cut(7, 40)
    codec = fit(model, contexts[:1], levels=(4,), delta=False, measure=False)
    codes, _ = codec.codes(kv, 4)
    form = codec._form(4)
    width = form.width.reshape(-1, 2)[:, :, None, None]
    for which, x in enumerate(straightened(kv, model.config)):
        bins = np.rint((x - codec.mean[:, None, which]) / width[:, which])
        off = codes[:, which].astype(int) - 127 - np.clip(bins, -127, 127)
        assert np.abs(off).max() <= 1
        assert (off != 0).mean() < 1e-3  # rounding at the edge of a bin


def test_a_missing_level_gives_the_next_lower(codec, model, contexts):
    kv = capture(model, contexts[0][:20])
    assert codec.encode(kv, 2) == codec.encode(kv, 1)
    assert head_and_payload(codec.encode(kv, 9))[0]["level"] == 3
