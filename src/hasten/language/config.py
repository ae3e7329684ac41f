"""What a decoder is made of: one frozen configuration for every family.

:func:`DecoderConfig.from_huggingface` reads the ``config.json`` of a Hugging Face folder; a field there that would
change the result and is not understood is refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hasten.errors import UnsupportedModelError
from hasten.nn import RotaryScaling

__all__ = ["ARCHITECTURES", "PRESETS", "DecoderConfig"]

ARCHITECTURES: dict[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Phi3ForCausalLM": "phi3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "MixtralForCausalLM": "mixtral",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
"""Architectures that load, with the ``model_type`` of each."""


_LLAMA_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "norm_eps",
    "rope_theta",
    "tie_embeddings",
    "bos_token_id",
    "eos_token_ids",
)
"""What the config.json of a plain Llama can say."""


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and habits of a causal decoder."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    """inner width of the feed-forward"""
    max_position_embeddings: int = 1024
    """context in tokens"""
    family: str = "llama"
    """``model_type`` of the checkpoint"""
    activation: str = "silu"
    """silu or gelu_tanh"""
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    """1 where the stored norm weight is the difference from one (Gemma)"""
    rope_theta: float = 10_000.0
    rope_scaling: RotaryScaling = field(default_factory=RotaryScaling)
    partial_rotary_factor: float = 1.0
    """share of a head that is rotated (Phi)"""
    local_rope_theta: float | None = None
    """base of the sliding-window layers where it differs (Gemma 3)"""
    local_rope_scaling: RotaryScaling = field(default_factory=RotaryScaling)
    tie_embeddings: bool = False
    attention_bias: bool = False
    """biases on queries, keys and values"""
    attention_out_bias: bool = False
    qk_norm: bool = False
    """RMSNorm on each head of queries and keys (Qwen 3, Gemma 3)"""
    sandwich_norms: bool = False
    """a norm after each block as well as before (Gemma 2 and 3)"""
    embedding_scale: float = 1.0
    query_scale: float | None = None
    """attention scores are divided by the square root of this; None for ``head_dim``"""
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    sliding_window: int | None = None
    """keys that a sliding-window layer sees, the query's own included"""
    sliding_layers: tuple[bool, ...] = ()
    """which layers slide; empty means all of them if ``sliding_window`` is set"""
    num_experts: int = 0
    experts_per_token: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    shared_expert_size: int = 0
    """inner width of the expert that every token uses (Qwen2-MoE); 0 for none"""
    expert_layers: tuple[bool, ...] = ()
    """which layers have experts; empty means all of them if ``num_experts`` is set"""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise UnsupportedModelError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedModelError(
                f"{self.num_heads} heads cannot share {self.num_kv_heads} key heads evenly; "
                "the first must be a multiple"
            )
        if self.head_dim % 2:
            raise UnsupportedModelError(f"head_dim is {self.head_dim}; rotary positions need an even width")

    @property
    def attention_scale(self) -> float:
        """Factor on the scores."""
        return float(float(self.query_scale or self.head_dim) ** -0.5)

    @property
    def rotary_dim(self) -> int:
        """Entries of a head that turn with the position."""
        return int(self.head_dim * self.partial_rotary_factor)

    def window(self, layer: int) -> int | None:
        """Keys that ``layer`` sees, None for all."""
        if self.sliding_window is None or (self.sliding_layers and not self.sliding_layers[layer]):
            return None
        return self.sliding_window

    def uses_local_rotary(self, layer: int) -> bool:
        """Whether ``layer`` turns with the base of the sliding-window layers."""
        return self.local_rope_theta is not None and self.window(layer) is not None

    def is_expert_layer(self, layer: int) -> bool:
        """Whether the feed-forward of ``layer`` is a mixture of experts."""
        return self.num_experts > 0 and (not self.expert_layers or self.expert_layers[layer])

    def to_huggingface(self) -> dict[str, Any]:
        """The ``config.json`` of a Llama folder; other families keep the file they came with.

        Raises :class:`UnsupportedModelError` for a configuration that Llama cannot express.
        """
        plain = replace(
            DecoderConfig(1, 1, 1, 1, 1, 2, 1),
            **{name: getattr(self, name) for name in _LLAMA_FIELDS},
        )
        if plain != self:
            raise UnsupportedModelError(f"a {self.family} model cannot be written as a Llama config.json")
        eos: Any = list(self.eos_token_ids)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
            "torch_dtype": "bfloat16",
        }

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Read the contents of a ``config.json``.

        Raises :class:`UnsupportedModelError` that names the architecture or field and what would do.
        """
        if "text_config" in config and config.get("model_type") == "gemma3":
            config = {**config["text_config"], "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
        names = config.get("architectures") or []
        family = next((ARCHITECTURES[n] for n in names if n in ARCHITECTURES), None)
        if family is None and config.get("model_type") in ARCHITECTURES.values():
            family = config["model_type"]
        if family is None:
            raise UnsupportedModelError(
                f"architecture {', '.join(names) or config.get('model_type')!r} is not supported; "
                f"supported are {', '.join(ARCHITECTURES)}"
            )
        try:
            return _read(family, config)
        except KeyError as error:
            raise UnsupportedModelError(f"config.json of a {family} model lacks the field {error}") from None


def _read(family: str, config: Mapping[str, Any]) -> DecoderConfig:
    heads, layers, hidden = config["num_attention_heads"], config["num_hidden_layers"], config["hidden_size"]
    gemma = family.startswith("gemma")
    activation = str(config.get("hidden_activation") or config.get("hidden_act") or "silu")
    activations = {
        "silu": "silu",
        "swish": "silu",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu": "gelu_tanh" if gemma else "",
    }
    if not activations.get(activation):
        raise UnsupportedModelError(f"activation {activation!r} is not supported; silu and gelu_pytorch_tanh are")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        if method not in ("compressed-tensors", "hasten"):  # language/compressed.py reads these
            raise UnsupportedModelError(
                f"the weights are stored quantised ({method}); give the unquantised folder, or compressed-tensors"
            )
    if config.get("use_bidirectional_attention"):
        raise UnsupportedModelError("use_bidirectional_attention is set; only causal decoders are supported")
    if config.get("mlp_bias"):
        raise UnsupportedModelError("mlp_bias is set; feed-forwards with biases are not supported")
    rotary = _rotary(config)
    windows = _windows(family, config, layers)
    eos = config.get("eos_token_id")
    bias = bool(config.get("attention_bias", False)) or family in ("qwen2", "qwen2_moe")
    if family == "qwen2_moe":
        bias = bool(config.get("qkv_bias", True))
    tie = config.get("tie_word_embeddings")
    return DecoderConfig(
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        intermediate_size=config["intermediate_size"],
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        family=family,
        activation=activations[activation],
        norm_eps=config.get("rms_norm_eps", 1e-6),
        norm_offset=1.0 if gemma else 0.0,
        tie_embeddings=gemma if tie is None else bool(tie),
        attention_bias=bias,
        attention_out_bias=bool(config.get("attention_bias", False)),
        qk_norm=family in ("qwen3", "qwen3_moe", "gemma3_text"),
        sandwich_norms=gemma,
        embedding_scale=float(hidden) ** 0.5 if gemma else 1.0,
        query_scale=config.get("query_pre_attn_scalar") if gemma else None,
        attention_softcap=config.get("attn_logit_softcapping") if gemma else None,
        logit_softcap=config.get("final_logit_softcapping") if gemma else None,
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        **rotary,
        **windows,
        **_experts(family, config, layers),
    )


def _rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """Both spellings: ``rope_parameters`` (transformers 5) and ``rope_theta`` with ``rope_scaling`` (4)."""
    given = dict(config.get("rope_parameters") or {})
    local: dict[str, Any] | None = None
    if "full_attention" in given:
        local = dict(given.get("sliding_attention") or {})
        given = dict(given["full_attention"])
    theta = given.get("rope_theta") or config.get("rope_theta") or 10_000.0
    scaling = {**(config.get("rope_scaling") or {}), **given}
    out: dict[str, Any] = {
        "rope_theta": float(theta),
        "rope_scaling": _scaling(scaling, config),
        "partial_rotary_factor": float(
            given.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
        ),
    }
    local_theta = (local or {}).get("rope_theta") or config.get("rope_local_base_freq")
    if local_theta:
        out["local_rope_theta"] = float(local_theta)
        out["local_rope_scaling"] = _scaling(local or {}, config)
    return out


def _scaling(given: Mapping[str, Any], config: Mapping[str, Any]) -> RotaryScaling:
    kind = given.get("rope_type") or given.get("type") or "default"
    kind = {"su": "longrope"}.get(kind, kind)
    if kind not in ("default", "linear", "llama3", "yarn", "longrope"):
        raise UnsupportedModelError(
            f"rope scaling {kind!r} is not supported; default, linear, llama3, yarn, longrope are"
        )
    if kind == "default":
        return RotaryScaling()
    context = config.get("max_position_embeddings", 2048)
    original = (
        given.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or context
    )
    return RotaryScaling(
        kind=kind,
        factor=float(given.get("factor") or (context / original if kind == "longrope" else 1.0)),
        low_freq_factor=float(given.get("low_freq_factor", 1.0)),
        high_freq_factor=float(given.get("high_freq_factor", 4.0)),
        original_context=int(original),
        beta_fast=float(given.get("beta_fast") or 32.0),
        beta_slow=float(given.get("beta_slow") or 1.0),
        attention_factor=given.get("attention_factor"),
        short_factor=tuple(given.get("short_factor") or ()),
        long_factor=tuple(given.get("long_factor") or ()),
    )


def _windows(family: str, config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return {}
    kinds = config.get("layer_types")
    if kinds:
        slides = tuple(kind == "sliding_attention" for kind in kinds)
    elif family == "gemma2":
        slides = tuple(index % 2 == 0 for index in range(layers))
    elif family == "gemma3_text":
        pattern = config.get("sliding_window_pattern", 6)
        slides = tuple(bool((index + 1) % pattern) for index in range(layers))
    elif family in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe"):
        slides = tuple(index >= config.get("max_window_layers", layers) for index in range(layers))
    else:
        slides = ()
    return {"sliding_window": int(window), "sliding_layers": slides}


def _experts(family: str, config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    if family == "mixtral":
        return {
            "num_experts": config.get("num_local_experts", 8),
            "experts_per_token": config["num_experts_per_tok"],
            "moe_intermediate_size": config["intermediate_size"],
            "norm_topk_prob": True,
        }
    if family not in ("qwen2_moe", "qwen3_moe"):
        return {}
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    return {
        "num_experts": config.get("num_experts") or config["num_local_experts"],
        "experts_per_token": config["num_experts_per_tok"],
        "moe_intermediate_size": config["moe_intermediate_size"],
        "norm_topk_prob": bool(config.get("norm_topk_prob", False)),
        "shared_expert_size": config.get("shared_expert_intermediate_size", 0) if family == "qwen2_moe" else 0,
        "expert_layers": tuple(index not in dense and (index + 1) % step == 0 for index in range(layers)),
    }


PRESETS: dict[str, DecoderConfig] = {
    "pycode-4m": DecoderConfig(
        vocab_size=4096,
        hidden_size=192,
        num_layers=8,
        num_heads=3,
        num_kv_heads=1,
        head_dim=64,
        intermediate_size=512,
        max_position_embeddings=1024,
        tie_embeddings=True,
        eos_token_ids=(0,),
    ),
    "pycode-draft-0.7m": DecoderConfig(
        vocab_size=4096,
        hidden_size=128,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=64,
        intermediate_size=320,
        max_position_embeddings=1024,
        tie_embeddings=True,
        eos_token_ids=(0,),
    ),
    "random-245m": DecoderConfig(
        vocab_size=32_000,
        hidden_size=1024,
        num_layers=16,
        num_heads=16,
        num_kv_heads=4,
        head_dim=64,
        intermediate_size=2816,
        max_position_embeddings=4096,
        eos_token_ids=(2,),
    ),
}
"""Shapes by name: the two embedded models, and the one that the speed benchmarks fill with random weights."""
