"""A language model with narrower heads and feed-forwards, fitted to text and measured on other text (MoDeGPT).

The folder says the sizes of every layer; nothing of what made it is needed to serve it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.compress.lowrank.modular import ModularDecomposition
from hasten.errors import ConfigurationError, DataError
from hasten.language import sized_files
from hasten.language.compressing import Converted, TextSample, float_decoder, perplexity_of
from hasten.language.compressing_cache import stored_type
from hasten.language.sized import is_sized

if TYPE_CHECKING:
    from hasten.language.loading import LanguageModel

__all__ = ["Narrower", "narrower"]


@dataclass(frozen=True)
class Narrower(Converted):
    """A decoder whose layers differ in size, in float32."""

    removed: tuple[float, float]
    """share of the parameters that is gone: of the blocks, of the whole model"""

    def write(self, source: Path, out: Path) -> None:
        """A folder with the tokeniser of ``source`` and its weights in bfloat16 where the source's are."""
        decoder: Any = self.model
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as part:
                folder = Path(part) / "model"
                sized_files.save(decoder.to(stored_type(source)), folder, source)
                folder.rename(out)  # whole or not at all
        except OSError as error:
            raise DataError(f"{out} was not written ({error.strerror or error}); name another place") from error


def narrower(
    model: LanguageModel, technique: ModularDecomposition, sample: TextSample,
    progress: Callable[[str, float], None] | None = None,
) -> Narrower:  # fmt: skip
    """Fit the pairs to the sample's calibration; perplexity is that of its held-out text."""
    decoder: Any = float_decoder(model)
    if is_sized(decoder):
        raise ConfigurationError(f"{model.name} has layers of different sizes already; give the folder it was made of")
    told = progress or (lambda stage, share: None)
    found: Any = technique(decoder, list(sample.calibration), progress=lambda s, x: told(s, 0.9 * x))
    told("measuring", 0.9)
    perplexity = (perplexity_of(decoder, sample.held_out), perplexity_of(found, sample.held_out))
    share = found.report.measured
    return Narrower(found, perplexity, (share["removed_of_blocks"], share["removed_of_model"]))
