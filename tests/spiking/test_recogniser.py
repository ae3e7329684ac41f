"""The recogniser as a stream, on an untrained network: when it decides does not depend on the chunks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hasten.errors import DataError
from hasten.spiking import Cochlea, DelayConfig, DelayNet, Recogniser, load_recogniser
from hasten.spiking.recogniser import RecogniserConfig, _from_onset, _soon
from hasten.testing import StreamKit

pytestmark = pytest.mark.usefixtures("one_thread")


def sound() -> torch.Tensor:
    """Two bursts with silence around them, 1.6 s."""
    t = torch.arange(12800) / 8000
    on = ((t > 0.2) & (t < 0.5)) | ((t > 1.0) & (t < 1.2))
    return 0.4 * on * torch.sin(2 * torch.pi * (300 + 600 * t) * t)


def recogniser(theta: float = 0.99) -> Recogniser:
    torch.manual_seed(0)
    ear = Cochlea(channels=16)
    net = DelayNet(DelayConfig(ear.lines, (12,), 10, 0.1, ear.step, threshold=0.1))
    return Recogniser(net, ear, RecogniserConfig(theta=theta))


class TestStream(StreamKit):
    def stream(self) -> Recogniser:
        return recogniser()

    def input(self) -> torch.Tensor:
        return sound()


@pytest.mark.parametrize("theta", [0.0, 0.99])
def test_each_burst_is_one_word(theta: float) -> None:
    words = recogniser(theta).push(sound())
    words += recogniser(theta).flush()
    assert len(words) == 2
    assert [w.begin for w in words] == pytest.approx([0.19, 0.99], abs=0.03)
    assert all(0 < w.confidence <= 1 and 0 <= w.digit <= 9 for w in words)
    if theta == 0.0:
        assert all(w.latency == pytest.approx(0.1, abs=0.011) for w in words)  # at the earliest step allowed
    else:
        assert all(w.latency > 0.3 for w in words)  # at the silence


def test_recordings_are_moved_to_where_the_stream_begins() -> None:
    spikes = torch.zeros(10, 3, 4)
    spikes[3, 0], spikes[9, 0, 0], spikes[0, 2] = 1.0, 1.0, 1.0
    moved, heard = _from_onset(spikes, 4)
    assert heard.tolist() == [0, 2]
    assert moved[:, 0].sum(-1).tolist() == [0, 4, 0, 0, 0, 0, 0, 1, 0, 0]
    assert moved[:, 1].sum(-1).tolist() == [4] + 9 * [0]


def test_the_loss_asks_at_every_moment_of_decision() -> None:
    torch.manual_seed(0)
    net = DelayNet(DelayConfig(6, (8,), 3, 0.05, dropout=0.0, threshold=0.2))
    spikes = (torch.rand(30, 4, 6, generator=torch.Generator().manual_seed(1)) < 0.2).float()
    labels = torch.tensor([0, 1, 2, 1])
    scores = net.potentials(spikes).softmax(-1)
    asked = [-scores[:t].mean(0)[torch.arange(4), labels].log().mean() for t in range(10, 31)]
    torch.testing.assert_close(_soon(net, spikes, labels), sum(asked) / len(asked))


def test_a_word_after_a_much_louder_one_is_heard() -> None:
    soft = 0.02 * sound()
    alone, after = recogniser().push(soft), recogniser().push(torch.cat([sound(), torch.zeros(4000), soft]))
    assert len(alone) == 2
    assert len(after) == 4


def test_the_end_of_the_sound_decides_an_open_word() -> None:
    subject = recogniser()
    assert not subject.push(sound()[:3000])
    (word,) = subject.flush()
    assert word.begin < word.decided <= 3000 / 8000
    size = subject.state_bytes
    subject.reset()
    subject.push(sound())
    assert subject.state_bytes == size


def recordings(path: Path) -> None:
    """Words whose digit is their pitch."""
    rng, parts, label, take = np.random.default_rng(0), [], [], []
    t = np.arange(2400) / 8000
    for number in range(11):
        for digit in range(10):
            tone = np.sin(2 * np.pi * (200 + 300 * digit) * t) * np.exp(-6 * t) * (t > 0.02)
            parts.append((8000 * (tone + 0.01 * rng.standard_normal(2400))).astype(np.int16))
            label.append(digit)
            take.append(number)
    offsets = np.cumsum([0, *(len(p) for p in parts)])
    np.savez(path, audio=np.concatenate(parts), offsets=offsets, label=np.array(label), take=np.array(take))


@pytest.mark.slow
def test_training_once(tmp_path: Path) -> None:
    recordings(tmp_path / "words.npz")
    told: list[float] = []
    subject, figures = load_recogniser(
        tmp_path / "words.npz", epochs=2, folder=tmp_path / "cache", progress=lambda stage, share: told.append(share)
    )
    assert told
    assert 0 <= figures["accuracy"] <= 1
    again, same = load_recogniser(tmp_path / "words.npz", epochs=2, folder=tmp_path / "cache")
    assert same == figures
    assert [w.digit for w in again.push(sound())] == [w.digit for w in subject.push(sound())]


def test_the_last_takes_can_be_kept_out_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recordings(tmp_path / "words.npz")
    seen: list[torch.Tensor] = []

    def stop(name: str, script: object, settings: object, tensors: dict[str, torch.Tensor], **others: object) -> None:
        seen.append(tensors["take"])
        raise InterruptedError

    monkeypatch.setattr("hasten.spiking.recogniser.trained", stop)
    for last in (False, True):
        with pytest.raises(InterruptedError):
            load_recogniser(tmp_path / "words.npz", last=last)
    assert torch.equal(seen[0] < 5, seen[1] > 5)  # eleven takes: 0 … 4 and 6 … 10 change places
    assert torch.equal(seen[1], 10 - seen[0])


def test_data_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fsdd_8k"):
        load_recogniser(tmp_path / "nothing.npz")
