"""Encodings, the ear, and sounds of any sample rate."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import ConfigurationError, DataError
from hasten.spiking import encode
from hasten.spiking.cochlea import Cochlea, CochleaStream, cochleagram
from hasten.spiking.sound import Resampler, read_wav
from hasten.testing import StreamKit

pytestmark = pytest.mark.usefixtures("one_thread")


def test_rate_has_the_rate() -> None:
    x = torch.tensor([0.1, 0.5, 0.9])
    spikes = encode.rate(x, 4000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(spikes.mean(0), x, atol=0.03, rtol=0)
    assert set(spikes.unique().tolist()) == {0.0, 1.0}


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=8), st.integers(1, 20))
def test_latency_is_one_spike_and_the_larger_comes_first(values: list[float], steps: int) -> None:
    x = torch.tensor(values)
    spikes = encode.latency(x, steps)
    assert torch.equal(spikes.sum(0), (x > 0).float())
    when = spikes.argmax(0)
    for i in range(len(values)):
        for j in range(len(values)):
            if x[i] > x[j] > 0:
                assert when[i] <= when[j]


def slow_delta(x: list[float], threshold: float) -> tuple[list[int], list[int]]:
    level, up, down = x[0], [], []
    for value in x:
        up.append(int(value - level > threshold))
        down.append(int(value - level < -threshold))
        level += threshold * (up[-1] - down[-1])
    return up, down


def test_delta_follows_and_goes_on() -> None:
    values = [0.0, 0.7, 2.1, 2.2, -0.4, -0.4, 0.0, 3.0]
    spikes, _ = encode.delta(torch.tensor(values)[:, None], 0.5)
    up, down = slow_delta(values, 0.5)
    assert spikes[:, 0].tolist() == up
    assert spikes[:, 1].tolist() == down
    first, level = encode.delta(torch.tensor(values)[:3, None], 0.5)
    second, _ = encode.delta(torch.tensor(values)[3:, None], 0.5, level)
    assert torch.equal(torch.cat([first, second]), spikes)


def test_direct_and_frames() -> None:
    assert encode.direct(torch.ones(2, 3), 4).shape == (4, 2, 3)
    frames = encode.event_frames(
        [0.0, 0.015, 0.9], [1, 0, 0], [0, 1, 0], [1, -1, 1], step=0.01, steps=3, shape=(2, 2)
    )  # fmt: skip
    assert frames.sum() == 2
    assert frames[0, 1, 0, 1] == frames[1, 0, 1, 0] == 1


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="scale"):
        encode.rate(torch.tensor([1.5]), 3)
    with pytest.raises(ConfigurationError, match="at least one step"):
        encode.latency(torch.tensor([0.5]), 0)
    with pytest.raises(ConfigurationError, match="positive threshold"):
        encode.delta(torch.zeros(2, 1), 0.0)
    with pytest.raises(ConfigurationError, match="x = 40 lies outside a sensor of 34 × 34"):
        encode.event_frames([0.1], [40], [3], [1], step=0.03, steps=10, shape=(34, 34))
    with pytest.raises(ConfigurationError, match="y = -1 lies outside"):
        encode.event_frames([0.1, 0.1], [4, 3], [3, -1], [1, 1], step=0.03, steps=10, shape=(34, 34))
    with pytest.raises(ConfigurationError, match=r"lists of \[1, 2\]"):
        encode.event_frames([0.1], [4, 5], [3, 3], [1, 1], step=0.03, steps=10, shape=(34, 34))
    with pytest.raises(ConfigurationError, match="not one sound"):
        cochleagram(torch.zeros(100, 2))


def sound(seconds: float = 0.5, rate: int = 8000) -> torch.Tensor:
    t = torch.arange(int(seconds * rate)) / rate
    envelope = (t > 0.1) * torch.exp(-4 * (t - 0.1).clamp_min(0))
    return 0.4 * envelope * torch.sin(2 * torch.pi * (400 + 900 * t) * t)


class TestEar(StreamKit):
    def stream(self) -> CochleaStream:
        return CochleaStream(Cochlea(channels=12))

    def input(self) -> torch.Tensor:
        return sound()

    def same(self, a: list, b: list) -> bool:  # type: ignore[type-arg]
        return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class TestEarOverBackground(TestEar):
    def stream(self) -> CochleaStream:
        return CochleaStream(Cochlea(channels=12, background=20.0))

    def input(self) -> torch.Tensor:
        return sound() + 0.01 * torch.randn(4000, generator=torch.Generator().manual_seed(0))


def test_a_steady_background_falls_silent_and_a_sound_over_it_does_not() -> None:
    noise = 0.003 * torch.randn(40000, generator=torch.Generator().manual_seed(0))
    later = slice(300, 440)  # three seconds to learn the background
    mixed = noise.clone()
    mixed[36000:] += sound()
    ear, plain = Cochlea(background=20.0), Cochlea()
    assert cochleagram(noise, plain)[later].sum() > 500
    assert cochleagram(noise, ear)[later].sum() < 40
    assert cochleagram(mixed, ear)[450:].sum() > 0.5 * cochleagram(sound(), ear).sum()


def test_a_tone_is_heard_in_its_band_when_it_begins() -> None:
    ear = Cochlea(channels=20)
    t = torch.arange(8000) / 8000
    spikes = cochleagram(0.3 * torch.sin(2 * torch.pi * 1000 * t) * (t > 0.5), ear)
    up = spikes[:, :20]
    assert not spikes[:49].any()
    first = up[50:58].sum(0)
    mel = 2595 * np.log10(1 + np.array([80.0, 1000.0, 3800.0]) / 700)
    expected = (mel[1] - mel[0]) / (mel[2] - mel[0]) * 21 - 1
    assert abs(int(first.argmax()) - expected) <= 1.5


def test_a_quiet_sound_is_heard_like_a_loud_one() -> None:
    loud, soft = cochleagram(sound()), cochleagram(0.1 * sound())
    assert loud.sum() >= soft.sum() > 0
    assert (loud == soft).float().mean() > 0.98
    ear = Cochlea(quietest=-15.0)  # the quietest level is above the soft sound: it is heard in part
    assert cochleagram(0.1 * sound(), ear).sum() < 0.7 * soft.sum()


def test_after_a_loud_sound_a_quiet_one_is_heard_again_with_time_or_at_once_when_told() -> None:
    soft, silence = 0.02 * sound(), torch.zeros(2400)
    alone = int(cochleagram(soft)[10:].sum())
    counts = []
    for forget in (False, True):
        stream = CochleaStream()
        stream.steps(torch.cat([sound(), silence]))
        if forget:
            stream.forget()
        counts.append(int(stream.steps(soft)[10:].sum()))
    assert counts[0] < alone == counts[1]


class TestResampler(StreamKit):
    def stream(self):  # type: ignore[no-untyped-def]
        class Listed(Resampler):
            def push(self, chunk: torch.Tensor) -> list[float]:  # type: ignore[override]
                return super().push(chunk).tolist()

            def flush(self) -> list[float]:  # type: ignore[override]
                return super().flush().tolist()

        return Listed(11025, 8000)

    def input(self) -> torch.Tensor:
        return sound(0.2, 11025)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100, 48000])
def test_a_tone_keeps_its_frequency_and_height(rate: int) -> None:
    t = torch.arange(rate) / rate
    resampler = Resampler(rate, 8000)
    out = torch.cat([resampler.push(torch.sin(2 * torch.pi * 440 * t)), resampler.flush()])
    assert len(out) == 8000
    expected = torch.sin(2 * torch.pi * 440 * torch.arange(8000) / 8000)
    assert (out - expected)[200:-200].abs().max() < 5e-3


def test_what_8_khz_cannot_hold_is_gone() -> None:
    t = torch.arange(48000) / 48000
    resampler = Resampler(48000, 8000)
    assert resampler.push(torch.sin(2 * torch.pi * 7000 * t))[500:].abs().max() < 0.02


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_files_of_any_width(tmp_path: Path, width: int) -> None:
    wanted = np.array([0.0, 0.5, -0.5, 0.25, -1.0])
    scaled = np.round(wanted * 2 ** (8 * width - 1)).astype(np.int64)
    raw = (scaled + 128).astype(np.uint8).tobytes() if width == 1 else b"".join(
        int(v).to_bytes(width, "little", signed=True) for v in scaled
    )  # fmt: skip
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(width)
        file.setframerate(8000)
        file.writeframes(raw)
    rate, chunks = read_wav(tmp_path / "a.wav")
    assert rate == 8000
    np.testing.assert_allclose(torch.cat(list(chunks)).numpy(), wanted, atol=2 ** (1 - 8 * width))


def test_chunks_have_a_length_and_empty_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="hold no sound"):
        read_wav(tmp_path / "any.wav", 0.0)
    (tmp_path / "empty.wav").write_bytes(b"")
    with pytest.raises(DataError, match="it is empty"):
        read_wav(tmp_path / "empty.wav")


def test_a_file_that_is_no_sound_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"RIFFnothing")
    with pytest.raises(DataError, match=r"a\.wav"):
        read_wav(tmp_path / "a.wav")
