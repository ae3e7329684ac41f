"""Where the pairs of matrices are in somebody's decoder: found by the names and shapes of its layers.

A block is a module that holds an attention with ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj`` (or ``out_proj``)
and a feed-forward with ``up_proj`` and ``down_proj`` (gated by ``gate_proj``) or ``fc1`` and ``fc2``: the decoders of
hasten, and Llama, Qwen, Mistral, Gemma and OPT of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hasten.errors import ConfigurationError

__all__ = ["Block", "find_blocks"]

_FEED_FORWARDS = (("gate_proj", "up_proj", "down_proj"), ("fc1", "fc2"), ("up_proj", "down_proj"))


@dataclass(frozen=True)
class Block:
    """One decoder layer: names of its parts and the geometry of its attention."""

    name: str
    """path of the layer in the model"""
    attention: str
    """path of the attention"""
    out: str
    """leaf name of the output matrix of the attention"""
    feed_forward: str | None
    """path of the module that holds the feed-forward's matrices; None where there is none to be cut"""
    ups: tuple[str, ...]
    """leaf names of the matrices into the hidden units"""
    down: str
    """leaf name of the matrix out of them"""
    heads: int
    kv_heads: int
    width: int
    """of a head"""
    scale: float
    """factor on the scores"""
    native: bool
    """whether the attention is called as ``forward(x, cos, sin)``; False: as in transformers"""

    @property
    def down_path(self) -> str:
        """Path of the matrix out of the hidden units."""
        return f"{self.feed_forward}.{self.down}"

    def weights(self, model: nn.Module, kinds: tuple[str, ...]) -> int:
        """Numbers in the matrices of these kinds: mlp, qk, vo."""
        names: list[str] = []
        if "mlp" in kinds and self.feed_forward is not None:
            names += [f"{self.feed_forward}.{n}" for n in (*self.ups, self.down)]
        if "qk" in kinds:
            names += [f"{self.attention}.q_proj", f"{self.attention}.k_proj"]
        if "vo" in kinds:
            narrowed = hasattr(model.get_submodule(self.attention), "o_proj")
            names += [f"{self.attention}.v_proj", f"{self.attention}.{'o_proj' if narrowed else self.out}"]
        return sum(p.numel() for n in names for p in model.get_submodule(n).parameters())


def _linear(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), nn.Linear)


def find_blocks(model: nn.Module) -> list[Block]:
    """The blocks of a decoder in their order. Raises :class:`ConfigurationError` with the modules that were seen."""
    blocks = []
    for path, module in model.named_modules():
        out = next((n for n in ("o_proj", "out_proj") if _linear(module, n)), None)
        if out is None or not all(_linear(module, f"{n}_proj") for n in "qkv"):
            continue
        name = path.rpartition(".")[0]
        blocks.append(_block(model, name, path, module, out))
    if not blocks:
        kinds = sorted({type(m).__name__ for m in model.modules()})
        raise ConfigurationError(
            "the model has no attention with q_proj, k_proj, v_proj and o_proj or out_proj; seen are "
            f"{', '.join(kinds[:12])}; for other layouts use decompose_pair"
        )
    return blocks


def _block(model: nn.Module, name: str, path: str, attention: Any, out: str) -> Block:
    config = getattr(attention, "config", None)

    def first(*names: str) -> Any:
        for owner in (attention, config):
            for n in names:
                value = getattr(owner, n, None)
                if isinstance(value, (int, float)) and value:
                    return value
        return None

    heads = first("num_heads", "num_attention_heads", "heads")
    if heads is None:
        raise ConfigurationError(f"{path} does not say how many heads it has; give it a num_heads or a config")
    width = attention.q_proj.out_features // int(heads)
    kv_heads = attention.k_proj.out_features // width
    native = hasattr(config, "attention_scale")
    scale = float(config.attention_scale) if native else float(first("scaling") or width**-0.5)  # type: ignore[union-attr]
    place: str | None = None
    ups: tuple[str, ...] = ()
    down = ""
    for inner, module in model.get_submodule(name).named_modules():
        for names in _FEED_FORWARDS:
            if all(_linear(module, n) for n in names) and not inner.startswith(path.rpartition(".")[2]):
                place = f"{name}.{inner}" if inner else name
                ups, down = names[:-1], names[-1]
                break
        if place is not None:
            break
    if place is not None and ".experts." in f"{place}.":  # one expert of many is not the feed-forward
        place = None
    return Block(name, path, out, place, ups, down, int(heads), kv_heads, width, scale, native)


def rotary_of(given: tuple[Any, ...], named: dict[str, Any], native: bool) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines (..., time, pairs) that an attention was called with; None where nothing turns."""
    if native:
        return given[1], given[2]
    both = named.get("position_embeddings")
    if both is None:
        both = next((g for g in given[1:] if isinstance(g, tuple) and len(g) == 2), None)
    if both is None:
        return None
    half = both[0].shape[-1] // 2  # transformers writes every angle twice
    return both[0][..., :half], both[1][..., :half]
