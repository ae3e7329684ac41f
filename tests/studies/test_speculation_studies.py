"""The studies of speculation, attention, caches and latent attention run, quick and without data.

Those of dyspec, triforce and transmla take up to a minute each and are left to `hasten study`; the parts that they
train with are tested here.
"""

import numpy as np
import pytest
import torch

from hasten.compress import ToMLA
from hasten.language import Decoder, DecoderConfig
from hasten.studies import _grouped, _recall
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


def test_every_question_has_its_record():
    ids = _recall.rows(np.random.default_rng(3), 4, 130).reshape(4, -1, _recall.UNIT)
    assert ids.shape[1] == 130 // _recall.UNIT
    for row in ids.tolist():
        records = {unit[1]: unit[3:] for unit in row if unit[0] == _recall.RECORD}
        asked = [unit for unit in row if unit[0] == _recall.ASKED]
        assert len(asked) == len(row) // 2 == len({unit[1] for unit in asked})
        assert all(records[unit[1]] == unit[3:] for unit in asked)
    one = _recall.question(np.random.default_rng(3), 130)
    assert one == _recall.question(np.random.default_rng(3), 130)
    assert one.prompt[-4] == _recall.ASKED
    at = one.prompt.index(one.prompt[-3])
    assert one.prompt[at + 2 : at + 6] == (one.prompt[-1], *one.answer)


def test_the_loss_of_recall_counts_answers_only():
    """A decoder that knows every answer has no loss, whatever it says elsewhere."""

    class Knows:
        def logits(self, hidden):
            return hidden

    for length in (42, 49, 126):
        ids = _recall.rows(np.random.default_rng(0), 2, length)
        sure = 50.0 * torch.nn.functional.one_hot(ids[:, 1:], _recall.VOCABULARY).float()
        units = ids.shape[1] // _recall.UNIT
        place = torch.arange(sure.shape[1]) + 1
        records = place < (units - units // 2) * _recall.UNIT
        sure[:, records | (place % _recall.UNIT < 3)] = 0.0
        loss = _recall._answers(Knows())(ids[:, :-1], sure)
        assert float(loss) < 1e-3


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
