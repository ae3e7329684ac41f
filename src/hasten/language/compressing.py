"""A language model in fewer bits, measured on text: one scheme for all matrices, or the fastest that keep a quality.

Quality is the inverse perplexity on held-out text, relative to the model given: 0.99 means that the perplexity rose by
1 %. ``keep`` searches a width for each group of layers by the loss that each causes and bisection, with the
measured times of this machine's kernels; the result is then quantised for real, with GPTQ, and measured again, and
layers go back to 8 bits, then to float, until it keeps what was asked.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hasten.compress.quantize import FitRanges, Gptq, Int, PerChannel, PerGroup, Quantize
from hasten.compress.quantize.augmented import AugmentedHessian
from hasten.compress.quantize.bisect import BisectPrecision
from hasten.compress.quantize.layer_latency import layer_latency
from hasten.compress.technique import TechniqueReport
from hasten.errors import ConfigurationError, DataError
from hasten.language.latent import is_latent

if TYPE_CHECKING:
    from hasten.language.loading import LanguageModel

__all__ = [
    "Compressed",
    "Converted",
    "TextSample",
    "by_scheme",
    "float_decoder",
    "keeping",
    "loss_of",
    "perplexity_of",
    "read_texts",
]

Progress = Callable[[str, float], None]
_BATCH = 8
"""Sequences that go through the model together: a simulated layer finds its weights anew in each call."""
_BYTE, _HALF = Int(8, PerChannel(0)), Int(4, PerGroup(1, 32))


@dataclass(frozen=True)
class TextSample:
    """Batches of token sequences (batch, time) for calibration, and others that are only measured on."""

    calibration: tuple[Tensor, ...]
    held_out: tuple[Tensor, ...]

    @classmethod
    def of(
        cls, model: LanguageModel, texts: Sequence[str], *, length: int = 256, most: int = 64, share: float = 0.25
    ) -> TextSample:
        """Cut ``texts`` into sequences of ``length`` tokens, at most ``most``; the last ``share`` is held out."""
        if length < 2 or most < 2:
            raise ConfigurationError(
                f"{most} pieces of {length} tokens leave nothing to predict or to measure on; give at least 2 of each"
            )
        length = min(length, model.config.max_position_embeddings)
        pieces: list[Tensor] = []
        line: list[int] = []
        for text in texts:
            line += model.tokenizer.encode(text)
            while len(line) >= length and len(pieces) < most:
                pieces.append(torch.tensor([line[:length]]))
                line = line[length:]
        if not pieces and len(line) >= 16:
            half = len(line) // 2
            pieces = [torch.tensor([line[:half]]), torch.tensor([line[half : 2 * half]])]
        if len(pieces) < 2:
            raise DataError(
                f"the text has {len(line)} tokens; give at least {2 * length}, for calibration and to measure on"
            )
        held = max(1, round(share * len(pieces)))
        return cls(_batched(pieces[:-held]), _batched(pieces[-held:]))


def _batched(pieces: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(pieces[at : at + _BATCH]) for at in range(0, len(pieces), _BATCH))


@dataclass(frozen=True)
class Converted:
    """A decoder that a technique made of a language model, and what that cost."""

    model: nn.Module = field(repr=False)
    """the decoder as it is now"""
    perplexity: tuple[float, float] | None
    """of the model given and of this one on the held-out text, where there was text"""

    @property
    def report(self) -> TechniqueReport:
        """Layer by layer."""
        found: TechniqueReport = self.model.report  # type: ignore[assignment]
        return found

    @property
    def kept(self) -> float | None:
        """Quality that was kept: perplexity before over after."""
        return None if self.perplexity is None else self.perplexity[0] / self.perplexity[1]


@dataclass(frozen=True)
class Compressed(Converted):
    """A decoder with codes in place of matrices; :func:`hasten.language.compressed.write` makes a folder of it."""

    widths: dict[str, int]
    """layer -> bits, 16 for what was kept"""
    predicted: tuple[float, float] | None = None
    """seconds of all layers for one token before and after, by the measured table of kernels, where it was searched"""
    notes: tuple[str, ...] = ()
    """plain sentences"""


def read_texts(path: Path) -> list[str]:
    """Texts of a file: ``.jsonl`` with a field ``text`` (or ``content``, ``prompt``), else the whole file.

    Raises :class:`~hasten.errors.DataError` on one line.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); name a UTF-8 text or .jsonl file") from error
    if path.suffix not in (".jsonl", ".ndjson"):
        return [content]
    texts = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: no JSON ({error}); repair or remove the line") from None
        fields = record if isinstance(record, dict) else {"text": record}
        found = next((fields[k] for k in ("text", "content", "prompt") if isinstance(fields.get(k), str)), None)
        if found is None:
            raise DataError(f'{path}, line {number}: no text; write {{"text": "…"}}')
        texts.append(found)
    return texts


def loss_of(decoder: nn.Module, batch: Tensor) -> Tensor:
    """Mean nats per token of (batch, time) token ids."""
    logits = decoder(batch)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())


def perplexity_of(decoder: nn.Module, batches: Sequence[Tensor]) -> float:
    with torch.inference_mode():
        total = sum(float(loss_of(decoder, b)) * len(b) for b in batches)
        return math.exp(total / sum(len(b) for b in batches))


def float_decoder(model: LanguageModel) -> nn.Module:
    """The decoder in float32, as techniques take it; refuses a folder of codes."""
    from hasten.language.compressed import is_compressed

    if model.folder is not None and is_compressed(model.folder):
        raise ConfigurationError(f"{model.name} is compressed already; give the folder that it was made of")
    decoder = model.decoder
    if is_latent(decoder):
        raise ConfigurationError(
            f"{model.name} has latent attention, which a folder of codes cannot hold; serve it with --dtype int8 or "
            "int4, which quantises as it loads"
        )
    if any(p.dtype is not torch.float32 for p in decoder.parameters()):
        decoder = copy.deepcopy(decoder).float()  # the caller's model keeps its precision
    return decoder.eval()


def by_scheme(
    model: LanguageModel, scheme: str, sample: TextSample | None = None, *, skip: Sequence[str] = ("lm_head",),
    gptq: bool = True, progress: Progress | None = None,
) -> Compressed:  # fmt: skip
    """Every matrix at ``scheme`` (W8A8, W4A16, NF4, …); ``skip``: patterns of layers.

    Where there is text, rounding is GPTQ's, with ``gptq=False`` to nearest in ranges fitted to the layers' outputs.
    Perplexity is that of the simulated model, which the runtime's kernels follow up to the bytes of their activations.
    """
    told = progress or (lambda stage, share: None)
    decoder = float_decoder(model)
    steps = [Gptq() if gptq else FitRanges()] if sample is not None else []
    technique = Quantize.scheme(scheme, skip=_present(decoder, skip), steps=steps, real="never")
    calibration = list(sample.calibration) if sample is not None else None
    small = technique(decoder, calibration, progress=lambda s, x: told(s, 0.9 * x))
    told("measuring", 0.9)
    both = None
    if sample is not None:
        both = perplexity_of(decoder, sample.held_out), perplexity_of(small, sample.held_out)
    return Compressed(small, both, _widths(small))


def keeping(
    model: LanguageModel, keep: float, sample: TextSample, *, skip: Sequence[str] = ("lm_head",), tokens: int = 1,
    progress: Progress | None = None,
) -> Compressed:  # fmt: skip
    """The fastest mix of float, 8 and 4 bits whose perplexity on the held-out text is at most 1 / ``keep`` times that
    of the model; ``tokens``: rows that a layer sees in one step."""
    if not 0 < keep <= 1:
        raise ConfigurationError(f"keep={keep} is no share of the quality; give above 0 and at most 1, such as 0.99")
    if tokens < 1:
        raise ConfigurationError(f"tokens={tokens}, and a layer sees at least one row in a step; give 1 or more")
    told = progress or (lambda stage, share: None)
    decoder = float_decoder(model)
    patterns = _present(decoder, skip)
    tuning, search = [b[:2] for b in sample.calibration[:2]], sample.calibration[-2:]
    # Pairs would cost a pass for each two layers that are near; the result is measured and relaxed anyway.
    scoring = AugmentedHessian(probes=0, pairs="none", bits=(8, 4), weight=Int(8, PerGroup(1, 32)), activation=None,
                               skip=patterns)  # fmt: skip
    with torch.no_grad():
        scores = scoring(decoder, loss_of, tuning, progress=lambda s, x: told(s, 0.5 * x))
    table = layer_latency(decoder, lambda m, x: m(x), sample.calibration[0][:1, :tokens])
    found = BisectPrecision(
        scores, lambda m, batches: 1 / perplexity_of(m, batches), floor=keep, bits=(8, 4), latency=table
    )(decoder, list(search), progress=lambda s, x: told(s, 0.5 + 0.2 * x))
    widths = {p: w for p, w in found.widths.items() if w < 16}
    if not widths and sum("stays above" in n for n in found.notes) == len(scores.units):
        raise ConfigurationError(
            f"no layer of {model.name} is faster in fewer bits on this machine at {tokens} rows; use --scheme to save "
            "memory"
        )
    order = sorted(scores.units, key=lambda u: _score(scores, u), reverse=True)
    base = perplexity_of(decoder, sample.held_out)
    notes = list(found.notes)
    small, after = decoder, base
    for attempt in _relaxed(widths, order):
        if not attempt:
            break
        told("quantising for real", 0.75)
        technique = _technique(attempt, decoder)
        small = technique(decoder, list(sample.calibration))
        after = perplexity_of(small, sample.held_out)
        widths = attempt
        if base / after >= keep:
            break
    else:
        widths = {}
    if not widths:
        raise ConfigurationError(
            f"no mix of 8 and 4 bits keeps {keep:.2%} of the quality on this text; lower --keep, or give more text"
        )
    every = _widths(small)
    before = sum(table(p, 16) for p in every)
    then = sum(table(p, w) for p, w in every.items())
    return Compressed(small, (base, after), every, (before, then), tuple(notes))


def _score(scores: Any, unit: tuple[str, ...]) -> float:
    return float(scores.scores[4][scores.units.index(unit)])


def _relaxed(widths: dict[str, int], order: Sequence[tuple[str, ...]]) -> Iterator[dict[str, int]]:
    """The plan, then wider ones: of the narrow units the most sensitive get the next width, a quarter at a time."""
    current = dict(widths)
    yield current
    for narrow, wide in ((4, 8), (8, 16)):
        units = [u for u in order if any(current.get(p) == narrow for p in u)]
        step = max(1, len(units) // 4)
        for at in range(0, len(units), step):
            for unit in units[at : at + step]:
                for path in unit:
                    if current.get(path) == narrow:
                        current = (
                            {**current, path: wide} if wide < 16 else {k: v for k, v in current.items() if k != path}
                        )
            yield dict(current)


def _technique(widths: dict[str, int], decoder: nn.Module) -> Quantize:
    rest = [n for n, m in decoder.named_modules() if isinstance(m, nn.Linear) and n not in widths]
    halves = tuple((path, _HALF) for path, width in widths.items() if width == 4)
    return Quantize(_BYTE, overrides=halves, skip=tuple(rest), steps=[Gptq()], real="never")


def _present(decoder: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    from fnmatch import fnmatchcase

    names = [n for n, m in decoder.named_modules() if isinstance(m, nn.Linear)]
    found = tuple(p for p in patterns if any(fnmatchcase(n, p) for n in names))
    for pattern in patterns:
        if pattern not in (*found, "lm_head"):  # a tied model has no head of its own, and that is asked for by default
            raise ConfigurationError(f"no layer is called {pattern!r}; the model has {', '.join(names[:8])} …")
    return found


def _widths(small: nn.Module) -> dict[str, int]:
    from hasten.compress.quantize.layers import QuantizedLayer

    found = {}
    for path, module in small.named_modules():
        if isinstance(module, QuantizedLayer):
            found[path] = module.quantized().format.bits
        elif isinstance(module, nn.Linear):
            found[path] = 16
    return found
