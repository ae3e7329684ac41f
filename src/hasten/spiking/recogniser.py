"""Spoken digits from a live sound: an ear of spikes, a network with learned delays, and an exit on confidence.

A word begins with the first spikes after silence; from there the network's class scores are summed, and the word is
decided as soon as the mean score of one class exceeds a threshold that was chosen on held-back recordings, or when
silence follows. The time from the beginning to the decision is part of the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hasten.adapt.threshold import calibrate
from hasten.errors import DataError
from hasten.spiking.checkpoint import trained
from hasten.spiking.cochlea import Cochlea, CochleaStream, cochleagram
from hasten.spiking.delay_net import DelayConfig, DelayNet

__all__ = ["Heard", "Recogniser", "RecogniserConfig", "load_recogniser", "train_recogniser"]


@dataclass(frozen=True)
class RecogniserConfig:
    """When a word begins and when it is decided."""

    theta: float = 0.8
    """mean score above which a word is decided"""
    least_steps: int = 10
    """steps of a word before it may be decided"""
    quiet_steps: int = 25
    """steps without a spike that end a word"""
    onset_spikes: int = 4
    """spikes within two steps that begin a word"""


@dataclass(frozen=True)
class Heard:
    """One decided word."""

    digit: int
    """the class"""
    confidence: float
    """mean score of the class since the word began"""
    begin: float
    """when the word began, seconds from the beginning of the sound"""
    decided: float
    """when it was decided, seconds from the beginning of the sound"""

    @property
    def latency(self) -> float:
        """Seconds of sound between the beginning of the word and the decision."""
        return self.decided - self.begin


_EAR, _CONFIG = Cochlea(background=20.0), RecogniserConfig()


class Recogniser:
    """Samples in, words out: ``push(samples)`` gives a :class:`Heard` when a word is decided.

    Samples (n,) in [-1, 1] at ``ear.sample_rate``. Mutable, one sound at a time; ``reset`` begins anew; any cut of the
    sound gives the same words.
    """

    def __init__(self, net: DelayNet, ear: Cochlea = _EAR, config: RecogniserConfig = _CONFIG) -> None:
        self.net = net if net.discrete else net.discretise()
        self.ear, self.config = ear, config
        self._cochlea, self._stream = CochleaStream(ear), self.net.stream()
        self.reset()

    def reset(self) -> None:
        """Silence."""
        self._cochlea.reset()
        self._stream.reset()
        self._step = 0
        self._begin: int | None = None
        self._decided = False
        self._quiet = 0
        self._recent = 0
        self._score: Tensor | None = None
        self._before = torch.zeros(0, self.ear.lines)

    @property
    def state_bytes(self) -> int:
        """Bytes that it keeps between two chunks."""
        return self._stream.state_bytes + 8 * (self.ear.width - self.ear.hop) + 4 * self.ear.channels

    def push(self, chunk: Tensor) -> list[Heard]:
        """Words that were decided within these samples."""
        steps = (spikes for part in chunk.split(self.ear.hop) for spikes in self._cochlea.push(part))  # one at a time
        return [word for spikes in steps if (word := self._advance(spikes)) is not None]

    def flush(self) -> list[Heard]:
        """The word that the end of the sound leaves undecided."""
        word = self._decide() if self._begin is not None and not self._decided else None
        return [word] if word is not None else []

    def _advance(self, spikes: Tensor) -> Heard | None:
        count = int(spikes.sum())
        self._step += 1
        self._quiet = 0 if count else self._quiet + 1
        if self._begin is None:
            sudden = self._recent + count >= self.config.onset_spikes
            self._recent = count
            if not sudden:
                self._before = spikes[None]
                return None
            self._begin = self._step - 1 - len(self._before)
            for one in self._before:  # the step in which the word may have begun
                self._stream.push(one[None])
        self._score = self._stream.push(spikes[None])[0]
        word = None
        heard = self._step - self._begin
        if not self._decided and heard >= self.config.least_steps:
            sure = float(self._score.max()) / heard > self.config.theta
            word = self._decide() if sure or self._quiet >= self.config.quiet_steps else None
        if self._quiet >= self.config.quiet_steps:
            word = word if word is not None or self._decided else self._decide()
            self._stream.reset()
            self._cochlea.forget()
            self._begin, self._decided, self._recent, self._score = None, False, 0, None
            self._before = torch.zeros(0, self.ear.lines)
        return word

    def _decide(self) -> Heard | None:
        if self._score is None or self._begin is None:
            return None
        self._decided = True
        best = int(self._score.argmax())
        share = float(self._score[best]) / (self._step - self._begin)
        return Heard(best, share, self._begin * self.ear.step, self._step * self.ear.step)


def _spikes(audio: Any, offsets: Any, chosen: Any, ear: Cochlea, steps: int) -> Tensor:
    """(steps, samples, lines); a recording is cut or padded with silence."""
    rows = []
    for index in chosen:
        samples = torch.zeros(steps * ear.hop)
        sound = torch.as_tensor(audio[offsets[index] : offsets[index + 1]]).float()[: len(samples)] / 32768
        samples[: len(sound)] = sound
        rows.append(cochleagram(samples, ear))
    return torch.stack(rows, 1)


def _from_onset(spikes: Tensor, onset_spikes: int) -> tuple[Tensor, Tensor]:
    """Recordings (steps, samples, lines) moved so that each begins where :class:`Recogniser` would begin its word, and
    which samples (n,) have such a beginning; the end fills up with silence."""
    steps = len(spikes)
    counts = spikes.sum(-1)
    pairs = counts + torch.cat([torch.zeros_like(counts[:1]), counts[:-1]])
    begun = pairs >= onset_spikes
    heard = begun.any(0)
    begin = (begun.to(torch.int64).argmax(0) - 1).clamp_min(0)
    at = torch.arange(steps).unsqueeze(1) + begin
    moved = spikes.gather(0, at.clamp_max(steps - 1).unsqueeze(-1).expand_as(spikes))
    return (moved * (at < steps).unsqueeze(-1))[:, heard], heard.nonzero().flatten()


def _thinned(x: Tensor, generator: torch.Generator) -> Tensor:
    """Some spikes are lost."""
    return x * (torch.rand(x.shape, generator=generator) > 0.05)


def _soon(net: nn.Module, spikes: Tensor, labels: Tensor) -> Tensor:
    """Log-loss of the mean score since the word began, at every moment at which it may be decided: the answer is asked
    for early, where the sum of all scores would be content with one in the silence behind the word."""
    assert isinstance(net, DelayNet)
    heard = torch.arange(1, len(spikes) + 1).reshape(-1, 1)
    scores = net.potentials(spikes).softmax(-1)
    right = scores.gather(-1, labels.reshape(1, -1, 1).expand(len(spikes), -1, 1))[..., 0].cumsum(0) / heard
    return -right[_CONFIG.least_steps - 1 :].clamp_min(1e-6).log().mean()


def train_recogniser(
    audio: Tensor, offsets: Tensor, label: Tensor, take: Tensor, *, ear: dict[str, Any], epochs: int, seed: int,
    checkpoint: Path, progress: Callable[[str, float], None] = lambda stage, share: None,
) -> dict[str, Any]:  # fmt: skip
    """Train on recordings (int16 samples at 8 kHz, joined): takes 0-4 are for tests, 5-8 choose the threshold."""
    hearing, steps = Cochlea(**ear), 80
    torch.manual_seed(seed)
    indices = torch.arange(len(label))
    train, valid, test = indices[take >= 9], indices[(take >= 5) & (take < 9)], indices[take < 5]
    x, begun = _from_onset(_spikes(audio, offsets, train.tolist(), hearing, steps), _CONFIG.onset_spikes)
    y = label[train[begun]].long()
    net = DelayNet(DelayConfig(hearing.lines, (64, 64), 10, 0.25, hearing.step, tau=15e-3, dropout=0.3))
    net.fit(
        (x, y), None, epochs, rate=5e-3, delay_rate=0.2, seed=seed, checkpoint=checkpoint / "net.pt", augment=_thinned,
        progress=lambda share: progress("training", share), bf16=True, loss=_soon,
    )  # fmt: skip
    final = net.discretise()
    with torch.inference_mode():
        spoken, heard = _from_onset(_spikes(audio, offsets, valid.tolist(), hearing, steps), _CONFIG.onset_spikes)
        scores = final.potentials(spoken).softmax(-1).cumsum(0)
        mean = scores / torch.arange(1, steps + 1).reshape(-1, 1, 1)
        right = mean.argmax(-1) == label[valid[heard]].long()
        least = _CONFIG.least_steps
        frontier = calibrate(mean.amax(-1)[least - 1 :].numpy(), right[least - 1 :].numpy())
        chosen = frontier.best(0.01)
        held = final(_spikes(audio, offsets, test.tolist(), hearing, steps)).argmax(-1) == label[test].long()
    return {
        "net": final.state_dict(), "config": {**asdict(net.config), "hidden": list(net.config.hidden)},
        "theta": min(1.0, chosen.threshold), "steps": chosen.mean_stages + least - 1,
        "accuracy": float(held.float().mean()),
    }  # fmt: skip


def load_recogniser(
    data: Path, *, epochs: int = 40, seed: int = 0, last: bool = False, folder: Path | None = None, **handed: Any
) -> tuple[Recogniser, dict[str, Any]]:
    """The recogniser trained on ``data`` (``fsdd_8k.npz``), made once and kept in the cache; and its figures.

    The first five takes of each word are kept out of the training, with ``last`` the last five; the next four choose
    the threshold. Raises :class:`~hasten.errors.DataError` where the file cannot be used.
    """
    try:
        with np.load(data) as z:
            tensors = {k: torch.from_numpy(np.ascontiguousarray(z[k])) for k in ("audio", "offsets", "label", "take")}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{str(data)!r} holds no spoken digits ({error}); give the folder with speech/fsdd_8k.npz"
        ) from error
    if last:
        tensors["take"] = tensors["take"].max() - tensors["take"]
    settings = {"ear": asdict(_EAR), "epochs": epochs, "seed": seed}
    made = trained("spoken-digits", train_recogniser, settings, tensors, folder=folder, **handed)
    net = DelayNet(DelayConfig(**{**made["config"], "hidden": tuple(made["config"]["hidden"])})).discretise()
    net.load_state_dict(made["net"])
    figures = {k: made[k] for k in ("accuracy", "theta", "steps")}
    return Recogniser(net, _EAR, RecogniserConfig(theta=made["theta"])), figures
