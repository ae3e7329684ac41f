"""Deep compression of a whole small model: prune, cluster, round the centroids to 8 bits, and write it entropy-coded.

Each stage is trained on and keeps what the one before it did: zeros stay zero through clustering, ties stay through
rounding. The size after every stage is measured on the bytes that would be written.

"The Tiny Time-series Transformer: Low-latency High-throughput Classification of Astronomical Transients using Deep
Model Compression", Allam, Peloton and McEwen 2023, arXiv:2303.08951. Differs from the paper in that every weight matrix
is clustered (its code wraps the last layer), pruning follows a cubic schedule, and centroids are what 8 bits round.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hasten.compress.cluster import cluster_in_place
from hasten.compress.container import module_bytes, stored_form
from hasten.compress.finetune import Loss, batches_of, dropout, match_outputs, weights_of
from hasten.compress.precision import _loss as output_loss
from hasten.compress.prune import prune_in_place, sparsity_of
from hasten.compress.quantize.base import Quantized, significant
from hasten.compress.quantize.granularity import PerChannel
from hasten.compress.quantize.integer import Int
from hasten.compress.technique import LayerReport, TechniqueReport, register
from hasten.errors import ConfigurationError
from hasten.frozen.container import Encoding, encoded_size

__all__ = ["DeepCompression"]


@register
@dataclass(frozen=True)
class DeepCompression:
    """Prune, cluster, round and encode.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> tiny = DeepCompression(clusters=8, epochs=0)(model)
    >>> len(tiny[0].weight.unique()) <= 8, tiny.report.bytes_before > 8 * tiny.report.bytes_after
    (True, True)
    """

    clusters: int = 16
    """distinct values of a weight, 2 to 256; 0: no clustering"""
    sparsity: float = 0.5
    """share of zeros of a weight, below 1; 0: no pruning"""
    bits: int = 8
    """of the centroids (of every weight, per channel, without clustering); 32: not rounded"""
    epochs: int = 5
    """of fine-tuning for pruning, and as many for clustering; 0: one shot"""
    preserve_sparsity: bool = True
    """clustering keeps zeros; False loses them, as clustering alone would"""
    encode: Encoding = "best"
    """deflate, huffman, the better of both for each tensor, or none (then the file is memory-mapped)"""
    vector_bits: int = 8
    """of biases and norms: 8 with one scale each, 16 for half precision, 32 as they are"""
    rate: float = 1e-3
    """peak learning rate of the fine-tuning"""
    dropout: bool = False
    """whether the model's dropout acts while it is fine-tuned; without it the float model is followed more closely"""
    layers: tuple[str, ...] = ("*",)
    """patterns of parameter paths that are compressed"""
    skip: tuple[str, ...] = ()
    """patterns that are not"""
    seed: int = 0
    """of the fine-tuning"""

    name: ClassVar[str] = "deep-compression"

    def __post_init__(self) -> None:
        if self.clusters and not 2 <= self.clusters <= 256:
            raise ConfigurationError(f"{self.clusters} clusters are not 2 to 256; give 16, or 0 for none")
        if not 0 <= self.sparsity < 1:
            raise ConfigurationError(f"a sparsity of {self.sparsity} leaves nothing or is none; give 0 up to below 1")
        if self.bits not in (4, 5, 6, 7, 8, 32):
            raise ConfigurationError(f"{self.bits} bits are not known here; give 4 to 8, or 32 for no rounding")
        if self.vector_bits not in (8, 16, 32):
            raise ConfigurationError(f"{self.vector_bits} bits of biases are not known; give 8, 16 or 32")
        if self.epochs < 0 or self.rate <= 0:
            raise ConfigurationError(f"epochs ({self.epochs}) must not be negative and rate ({self.rate}) positive")
        if self.encode not in ("none", "deflate", "huffman", "best"):
            raise ConfigurationError(f"encode {self.encode!r} is not known; give none, deflate, huffman or best")

    def __call__(
        self,
        model: nn.Module,
        calibration: Any = None,
        *,
        loss: Loss | None = None,
        progress: Callable[[str, float], None] | None = None,
    ) -> nn.Module:
        """The compressed copy. ``calibration`` is training batches (or a function of the epoch) for ``loss(model,
        batch)``; without a loss, example inputs on which the outputs of the model given are matched."""
        clone = copy.deepcopy(model)
        modes = [(m, m.training) for m in clone.modules()]
        weights = weights_of(clone, self.layers, self.skip)
        if not weights:
            raise ConfigurationError(f"{type(model).__name__} has no weights that layers= and skip= leave; name others")
        before = {p: w.numel() * w.element_size() for p, w in weights.items()}
        sizes = {"torch.save": float(module_bytes(model)), "raw": self._bytes(clone)}
        whole = loss or match_outputs(model)
        if self.epochs:
            batches_of(calibration, "fine-tuning")
        told = progress or (lambda stage, share: None)
        with dropout(clone, self.dropout):
            if self.sparsity:
                prune_in_place(
                    clone, list(weights), self.sparsity, given=calibration, loss=whole, epochs=self.epochs,
                    rate=self.rate, every=20, phase=0.6, seed=self.seed, progress=lambda _, x: told("pruning", x / 2),
                )  # fmt: skip
                sizes["pruned"] = self._bytes(clone)
            if self.clusters:
                zeros = {
                    p: self.preserve_sparsity and bool((w == 0).any())
                    for p, w in weights_of(clone, self.layers, self.skip).items()
                    if w.numel() > self.clusters
                }
                cluster_in_place(
                    clone, zeros, self.clusters, given=calibration, loss=whole, epochs=self.epochs, rate=self.rate,
                    seed=self.seed + 1, progress=lambda _, x: told("clustering", 0.5 + x / 2),
                )  # fmt: skip
                sizes["clustered"] = self._bytes(clone)
        self._round(clone)
        sizes["rounded"] = self._bytes(clone)
        sizes["encoded"] = self._bytes(clone, self.encode)
        for module, training in modes:
            module.training = training
        told("deep compression", 1.0)
        clone.report = self._report(model, clone, before, sizes, calibration if loss is None else None)  # type: ignore[assignment]
        return clone

    def _bytes(self, model: nn.Module, encoding: Encoding = "none") -> float:
        """Bytes of all tensors in their smallest exact form."""
        quantized = getattr(model, "quantized", {})
        return float(
            sum(
                encoded_size(stored_form(t, quantized.get(n), encoding), encoding)
                for n, t in model.state_dict().items()
            )
        )

    def _round(self, model: nn.Module) -> None:
        if self.bits < 32:
            quantized: dict[str, Quantized] = {}
            for path, weight in weights_of(model, self.layers, self.skip).items():
                with torch.no_grad():
                    if self.clusters:
                        weight.copy_(_round_shared(weight.detach(), self.bits))
                    else:
                        found = Int(self.bits, PerChannel(0)).quantize(weight.detach())
                        weight.copy_(found.dequantize())
                        quantized[path] = found
            model.quantized = quantized  # type: ignore[assignment]
        if self.vector_bits < 32:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() < 2 and parameter.dtype == torch.float32:
                        small = (
                            parameter.half().float() if self.vector_bits == 16 else _round_shared(parameter.detach(), 8)
                        )
                        parameter.copy_(small)

    def _report(
        self, model: nn.Module, clone: nn.Module, before: dict[str, int], sizes: dict[str, float], inputs: Any
    ) -> TechniqueReport:
        reports = []
        for path, weight in weights_of(clone, self.layers, self.skip).items():
            quantized = getattr(clone, "quantized", {}).get(path)
            after = encoded_size(stored_form(weight.detach(), quantized, self.encode), self.encode)
            values = len(weight.unique())
            action = f"{sparsity_of(weight):.0%} zeros, {values} values"
            reports.append(LayerReport(path, action, "", before[path], after))
        first = sizes["torch.save"]
        steps = ", ".join(f"{name} {size:.0f} B ({first / size:.1f}×)" for name, size in sizes.items())
        notes = [f"size after each stage: {steps}", "torch.save counts the pickled module, the others tensors alone"]
        measured = {f"bytes {name}": size for name, size in sizes.items()}
        if inputs and not callable(inputs):
            measured["sqnr"] = output_loss(model, clone, list(inputs))
        return TechniqueReport(self.name, tuple(reports), tuple(notes), measured)


def _round_shared(weight: Tensor, bits: int) -> Tensor:
    """Distinct values rounded to ``bits`` with one scale; equal ones stay equal, zero stays zero, others do not become
    zero."""
    top = 2 ** (bits - 1) - 1
    scale = significant(weight.abs().max() / top, 16)
    codes = torch.round(weight / scale)
    codes = torch.where((codes == 0) & (weight != 0), weight.sign(), codes)
    return codes.clamp(-top, top) * scale
