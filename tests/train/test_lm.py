"""The fitting loop learns, resumes where it was cut off, and scores exactly."""

import math

import pytest
import torch

from hasten.clock import ManualClock
from hasten.errors import ConfigurationError
from hasten.language.config import DecoderConfig
from hasten.language.decoder import Decoder
from hasten.train import LMTraining, bits_per_byte, fit_lm

CONFIG = DecoderConfig(32, 16, 1, 2, 1, 8, 32, max_position_embeddings=64)


def batches(skip=0):
    generator = torch.Generator().manual_seed(0)
    number = 0
    while True:
        start = torch.randint(0, 32, (4, 1), generator=generator)
        rows = (start + torch.arange(17)) % 32
        number += 1
        if number > skip:
            yield rows


def test_learns_to_count():
    torch.manual_seed(0)
    model = Decoder(CONFIG)
    first = fit_lm(model, batches(), LMTraining(tokens=64, batch_rows=4), clock=ManualClock())
    last = fit_lm(model, batches(), LMTraining(tokens=64 * 200, batch_rows=4), clock=ManualClock())
    assert first["loss"] > 3.0
    with torch.no_grad():
        logits = model(torch.arange(16)[None])
    assert (logits.argmax(-1) == torch.arange(1, 17)).float().mean() > 0.9
    assert last["step"] == 200


def test_a_resumed_run_equals_one_that_was_not_cut(tmp_path):
    training = LMTraining(tokens=64 * 12, batch_rows=4)
    torch.manual_seed(1)
    whole, cut = Decoder(CONFIG), Decoder(CONFIG)
    cut.load_state_dict(whole.state_dict())
    fit_lm(whole, batches(), training, clock=ManualClock())

    class Killed(Exception):
        pass

    path = tmp_path / "checkpoint.pt"
    half = LMTraining(tokens=training.tokens, batch_rows=4, checkpoint_seconds=0.0)

    def kill(line):
        clock.advance(1.0)
        if line["step"] == 7:
            raise Killed

    clock = ManualClock()
    with pytest.raises(Killed):
        fit_lm(cut, batches(), half, clock=clock, checkpoint=path, on_step=kill)
    again = Decoder(CONFIG)
    done = torch.load(path, weights_only=True)["state"]["step"]
    assert 0 < done <= 7
    fit_lm(again, batches(skip=done), half, clock=ManualClock(), checkpoint=path)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_time_ends_a_run():
    clock = ManualClock()
    line = fit_lm(
        Decoder(CONFIG),
        batches(),
        LMTraining(tokens=10**9, seconds=10.0, batch_rows=4),
        clock=clock,
        on_step=lambda _: clock.advance(1.0),
    )
    assert line["step"] == 10


def test_divergence_is_named():
    def nan(inputs, hidden):
        return hidden.sum() * float("nan")

    with pytest.raises(ConfigurationError, match="lower the learning rate"):
        fit_lm(Decoder(CONFIG), batches(), LMTraining(tokens=999, batch_rows=4), extra_loss=nan)


def test_schedule():
    training = LMTraining(warm_up=0.1, decay=0.5)
    assert training.factor(0.05) == pytest.approx(0.5)
    assert training.factor(0.3) == 1.0
    assert training.factor(0.75) == pytest.approx(0.5)
    assert training.factor(1.0) == 0.0
    with pytest.raises(ConfigurationError, match="must fit"):
        LMTraining(warm_up=0.8, decay=0.5)


@pytest.mark.parametrize(("context", "stride"), [(8, 4), (64, 32), (5, 1)])
def test_bits_per_byte_counts_each_token_once(context, stride):
    documents = [list(range(20)), [3], list(range(9))]
    seen = []

    def logits(inputs):
        seen.append(inputs)
        return torch.zeros(*inputs.shape, 32)

    score = bits_per_byte(logits, documents, 60, start=0, context=context, stride=stride, batch_rows=2)
    assert score == pytest.approx(30 * math.log2(32) / 60)
    assert max(x.shape[1] for x in seen) <= context


def test_bits_per_byte_equals_the_plain_sum():
    torch.manual_seed(0)
    model = Decoder(CONFIG).eval()
    ids = torch.randint(0, 32, (30,)).tolist()
    with torch.no_grad():
        scores = torch.log_softmax(model(torch.tensor([[5, *ids[:-1]]])), -1)[0]
    wanted = -sum(scores[i, t].item() for i, t in enumerate(ids)) / math.log(2) / 100
    assert bits_per_byte(model, [ids], 100, start=5, context=64, stride=32) == pytest.approx(wanted, rel=1e-5)
