"""From a folder or a name to a language model that runs.

The fast runtime (:class:`Executor`) packs the weights tensor by tensor while they are read; the plain
:class:`Decoder` is built only when it is asked for, so that serving holds the weights once.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hasten.errors import ConfigurationError, ModelLoadError
from hasten.language.compressed import CompressedReader, is_compressed
from hasten.language.config import PRESETS, DecoderConfig
from hasten.language.weights import WeightReader, read_config

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hasten.language.decoder import Decoder
    from hasten.language.executor import Executor
    from hasten.language.generate import Answer
    from hasten.language.tokenizer import Tokenizer

__all__ = ["EMBEDDED", "LanguageModel", "load", "model_folder", "random_model"]

_MODELS = Path(__file__).parent / "models"
EMBEDDED = ("pycode-4m", "pycode-draft-0.7m")
"""Models that come with the package."""


class LanguageModel:
    """A decoder with its tokeniser, in the forms that the rest of the library works with."""

    def __init__(
        self,
        name: str,
        config: DecoderConfig,
        *,
        folder: Path | None = None,
        decoder: Decoder | None = None,
        device: str = "cpu",
        precision: str = "auto",
        deterministic: bool = False,
        kv_precision: str = "auto",
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.name = name
        self.kv_precision = kv_precision
        self.config = config
        self.folder = folder
        self.device = device
        self.precision = precision
        self.deterministic = deterministic
        self._decoder = decoder
        self._progress = progress

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokeniser of the folder. Raises :class:`ModelLoadError` where there is none."""
        from hasten.language.tokenizer import Tokenizer

        if self.folder is None:
            raise ModelLoadError(f"{self.name} has random weights and no tokeniser; feed it token ids")
        return Tokenizer.from_folder(self.folder)

    @property
    def decoder(self) -> Decoder:
        """The plain module, in the type in which the weights are stored; read on first use."""
        if self._decoder is None:
            self._decoder = self._read_decoder()
        return self._decoder

    def _read_decoder(self) -> Decoder:
        from hasten.language.decoder import empty_decoder

        assert self.folder is not None
        decoder = empty_decoder(self.config)
        kind = CompressedReader if is_compressed(self.folder) else WeightReader
        with kind(self.folder, self.config) as reader:
            state = {n: reader.read(n, tuple(t.shape)) for n, t in decoder.state_dict().items()}
        decoder.load_state_dict(state, assign=True)
        if self.config.tie_embeddings:
            decoder.lm_head.weight = decoder.model.embed_tokens.weight
        return decoder.to(self.device).eval()

    @cached_property
    def executor(self) -> Executor:
        """The runtime that serves: packed weights, one ragged forward."""
        executor = self._new_executor()
        if self.kv_precision != "auto":
            executor.keep_cache_in(self.kv_precision)
        return executor

    def _new_executor(self) -> Executor:
        from hasten.language.executor import Executor

        options: dict[str, Any] = {
            "device": self.device,
            "precision": self.precision,
            "deterministic": self.deterministic,
        }
        stored = self.folder is not None and is_compressed(self.folder)
        if self._decoder is not None and not stored:
            from hasten.language.latent import LatentExecutor, is_latent
            from hasten.language.sized import executor_of, is_sized

            if is_latent(self._decoder):
                return LatentExecutor(self._decoder, progress=self._progress, **options)
            if is_sized(self._decoder):
                return executor_of(self._decoder, progress=self._progress, **options)
            state = self._decoder.state_dict()
            return Executor(self.config, lambda name, shape: state[name].detach(), progress=self._progress, **options)
        assert self.folder is not None
        if stored:
            with CompressedReader(self.folder, self.config) as reader:
                # Codes run as they are stored, unless another precision is asked for.
                read: Any = reader.codes if self.precision == "auto" else reader.read
                rounds = reader.rounds_inputs
                return Executor(self.config, read, progress=self._progress, rounds=rounds, **options)
        with WeightReader(self.folder, self.config) as plain:
            return Executor(self.config, plain.read, progress=self._progress, **options)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return tuple(self.tokenizer.eos_token_ids) if self.folder is not None else self.config.eos_token_ids

    def generate(
        self, prompt: str | Sequence[int], *, on_token: Callable[[int], None] | None = None, **knobs: Any
    ) -> Answer:
        """Answer one prompt (text or token ids); ``knobs`` are those of :class:`SamplingParams`, greedy by default.

        >>> load("pycode-4m").generate("import ", max_tokens=4).prompt_tokens
        2
        """
        from hasten.language.generate import generate
        from hasten.language.params import SamplingParams

        tokenizer = None if self.folder is None else self.tokenizer
        ids = list(prompt) if not isinstance(prompt, str) else self.tokenizer.encode(prompt)
        params = SamplingParams(**{"temperature": 0.0, **knobs})
        return generate(self.executor, ids, params, tokenizer=tokenizer, eos=self.eos_token_ids, on_token=on_token)

    def infill(
        self, prefix: str, suffix: str, *, on_token: Callable[[int], None] | None = None, **knobs: Any
    ) -> Answer:
        """What the model would write between ``prefix`` and ``suffix``; ``knobs`` as for :meth:`generate`."""
        from hasten.language.generate import infill
        from hasten.language.params import SamplingParams

        params = SamplingParams(**{"temperature": 0.0, **knobs})
        return infill(self.executor, self.tokenizer, prefix, suffix, params, eos=self.eos_token_ids, on_token=on_token)

    def with_precision(self, precision: str) -> LanguageModel:
        """The same model, to be run at another precision."""
        return LanguageModel(
            self.name,
            self.config,
            folder=self.folder,
            decoder=self._decoder,
            device=self.device,
            precision=precision,
            deterministic=self.deterministic,
            kv_precision=self.kv_precision,
        )


def model_folder(name: str | Path) -> Path:
    """Folder of an embedded model by name, or the path itself. Raises :class:`ModelLoadError`."""
    if str(name) in EMBEDDED:
        return _MODELS / str(name)
    path = Path(name)
    if not path.exists():
        raise ModelLoadError(f"{str(name)!r} is neither a folder nor one of the embedded models {', '.join(EMBEDDED)}")
    return path


def load(
    name: str | Path = "pycode-4m",
    *,
    device: str = "cpu",
    dtype: str = "auto",
    deterministic: bool = False,
    kv_precision: str = "auto",
    context: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LanguageModel:
    """Load a Hugging Face folder or an embedded model.

    ``dtype``: precision of the weights in the runtime (auto, fp32, bf16, int8, int4). ``deterministic``: the tokens of
    a prompt do not depend on what else is in the batch. ``kv_precision``: of the KV cache, ``auto`` (that of the
    activations) or ``int8`` (8 bits and a scale for each token and key head, on the CPU). ``context``: tokens that a
    sequence may have, at most the model's own (a model with LongRoPE uses its short factors throughout where the
    context is within the original one, its long factors throughout where it is beyond). ``progress(done, total)`` is
    called as layers are packed.

    >>> load("pycode-4m").config.num_layers
    8

    Raises :class:`ModelLoadError`, :class:`UnsupportedModelError`, :class:`ConfigurationError`.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigurationError(f"device {device!r} was asked for, torch sees no CUDA device; use device='cpu'")
    if str(name) in PRESETS and str(name).startswith("random-"):
        given: dict[str, Any] = {"device": device, "dtype": dtype, "deterministic": deterministic}
        return random_model(PRESETS[str(name)], name=str(name), kv_precision=kv_precision, **given)
    folder = model_folder(name)
    config = read_config(folder)
    if context is not None:
        if not 1 <= context <= config.max_position_embeddings:
            raise ConfigurationError(
                f"a context of {context} tokens was asked for, {folder.name} has {config.max_position_embeddings}"
            )
        config = replace(config, max_position_embeddings=context)
    from hasten.language.latent import read as read_latent
    from hasten.language.sized_files import read as read_sized

    return LanguageModel(
        str(name) if str(name) in EMBEDDED else folder.name,
        config,
        folder=folder,
        decoder=read_latent(folder, config) or read_sized(folder, config),
        device=device,
        precision=dtype,
        deterministic=deterministic,
        kv_precision=kv_precision,
        progress=progress,
    )


def random_model(
    config: DecoderConfig,
    *,
    name: str = "random",
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "auto",
    deterministic: bool = False,
    kv_precision: str = "auto",
    weights: torch.dtype = torch.bfloat16,
) -> LanguageModel:
    """A model of this shape with random weights: right for timing, useless for text."""
    from hasten.language.decoder import Decoder

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = Decoder(config).to(weights).to(device).eval()
    return LanguageModel(
        name, config, decoder=decoder, device=device, precision=dtype, deterministic=deterministic,
        kv_precision=kv_precision,
    )  # fmt: skip
