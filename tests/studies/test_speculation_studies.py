"""The studies of speculation, attention, caches and latent attention run, quick and without data.

Those of dyspec, triforce and transmla take up to a minute each and are left to `hasten study`; the parts that they
train with are tested here.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hasten.compress import ToMLA
from hasten.language import Decoder, DecoderConfig, random_model
from hasten.language.decoder import rotary_tables
from hasten.language.speculate import TriForce
from hasten.nn import rotate
from hasten.studies import _grouped, _recall, triforce
from hasten.studies.study import Scale
from hasten.testing.study_kit import StudyKit

torch.set_num_threads(1)


@pytest.fixture
def small():
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=50, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, intermediate_size=24,
        max_position_embeddings=64,
    )  # fmt: skip
    return Decoder(config).eval()


def test_every_piece_that_is_asked_for_was_said():
    for length in (64, 4096):
        ids = _recall.rows(np.random.default_rng(3), 2, length)
        assert ids.shape == (2, length)
        size = length - _recall.asked_of(length) * _recall.PIECE
        for row in ids.tolist():
            place = {word: i for i, word in enumerate(row[:size])}
            assert len(place) == size
            for at in range(size, length, _recall.PIECE):
                begin = place[row[at]]
                assert row[begin : begin + _recall.PIECE] == row[at : at + _recall.PIECE]


def test_every_question_has_its_record():
    one = _recall.question(np.random.default_rng(3), 130)
    assert one == _recall.question(np.random.default_rng(3), 130)
    assert len(one.answer) == _recall.RECORD - 1
    at = one.prompt.index(one.prompt[-1])
    assert at % _recall.RECORD == 0
    assert one.prompt[at + 1 : at + _recall.RECORD] == one.answer
    assert at < len(one.prompt) - 4 * _recall.RECORD


def test_the_loss_of_recall_counts_values_only():
    """A decoder that knows every value has no loss, whatever it says elsewhere."""
    vectors = torch.randn(_recall.VOCABULARY, 32, generator=torch.Generator().manual_seed(0))
    decoder = SimpleNamespace(lm_head=SimpleNamespace(weight=vectors))
    for length in (64, 128):
        ids = _recall.rows(np.random.default_rng(0), 2, length)
        sure = 10.0 * vectors[ids[:, 1:]]
        place = torch.arange(length - 1) + 1
        begin = length - _recall.asked_of(length) * _recall.PIECE
        unknown = (place < begin) | ((place - begin) % _recall.PIECE == 0)
        sure[:, unknown] = 0.0
        loss = _recall._values(decoder)
        assert float(loss(ids[:, :-1], sure)) < 1e-3
        sure[:, begin] = 0.0  # the word behind the first key
        assert float(loss(ids[:, :-1], sure)) > 0.05


def test_a_head_for_the_word_before_looks_there():
    torch.manual_seed(0)
    decoder = Decoder(_recall._config())
    _recall._begin(decoder)
    attention = decoder.model.layers[0].self_attn
    cos, sin = rotary_tables(decoder.config, 200)
    query, keys = (
        rotate(bias.view(4, 1, 64).expand(4, 200, 64), cos, sin)
        for bias in (attention.q_proj.bias, attention.k_proj.bias)
    )
    scores = query[0] @ keys[0].T
    assert scores[1:].tril(0).argmax(1).tolist() == list(range(199))


def test_the_climb_goes_on_when_a_length_is_learned():
    climb = _recall._Climb(np.random.default_rng(0), [42, 84], 0.5, 10**9)
    lengths = []
    for batch in climb:
        lengths.append(batch.shape[1])
        climb.recent.append(1.0 if len(lengths) < 10 else 0.1)
        if len(lengths) > 60:
            break
    assert lengths == sorted(lengths)
    assert set(lengths) == {42, 84}


def test_a_wider_decoder_is_the_same_function_and_can_learn(small):
    tokens = torch.randint(0, 50, (2, 20))
    wide = _grouped.widened(small, 960)
    more = sum(p.numel() for p in wide.parameters()) - sum(p.numel() for p in small.parameters())
    assert more == 960
    with torch.no_grad():
        torch.testing.assert_close(wide(tokens), small(tokens))
    _grouped.nats(wide, tokens)
    wide(tokens).square().mean().backward()
    assert wide.model.layers[0].mlp.down_proj.weight.grad[:, 24:].abs().sum() > 0


def test_a_fine_tune_goes_towards_its_teacher_and_is_repeatable(small):
    rows = torch.randint(0, 50, (16, 20), generator=torch.Generator().manual_seed(0))

    def trained():
        one = ToMLA(kv_rank=4, rope_dims=4)(small, [rows])
        before = far(one)
        _grouped.fine_tune(one, rows, steps=12, rate=3e-3, seed=0, teacher=small)
        return before, far(one), _grouped.nats(one, rows)

    def far(one):
        with torch.no_grad():
            return float((one(rows) - small(rows)).square().mean())

    assert _grouped.nats(small, rows).shape == (16,)
    first, second = trained(), trained()
    assert first[1] < first[0]
    torch.testing.assert_close(first[2], second[2])


@pytest.mark.slow
class TestLeanAttention(StudyKit):
    name = "lean-attention"


@pytest.mark.slow
class TestSmartSpec(StudyKit):
    name = "smartspec"


@pytest.mark.slow
class TestCacheGen(StudyKit):
    name = "cachegen"


def test_recall_goes_through_the_engine_and_times_are_taken_in_turns():
    config = DecoderConfig(
        vocab_size=50, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=24,
        max_position_embeddings=1300,
    )  # fmt: skip
    model = random_model(config, name="small", dtype="fp32")
    rng = np.random.default_rng(0)
    asked = [_recall.Question(tuple(rng.integers(0, 50, 1100).tolist()), (1, 2, 3, 4, 5, 6)) for _ in range(2)]
    acceptance, same = triforce._served(model, asked, 1200)
    assert 0 < acceptance.value <= 1
    assert same.holds
    plan = TriForce(None, budget=512, gamma=4)
    (plain, ours), times = triforce._in_turns(model, list(asked[0].prompt), plan, Scale(), max_tokens=8)
    assert plain.tokens == ours.tokens
    assert ours.draft_calls > 0 == plain.draft_calls
    assert min(times) > 0
