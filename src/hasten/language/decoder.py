"""One causal decoder for every family: the plain, differentiable form.

Token embedding, then layers of (norm, attention, norm, feed-forward) around a residual stream, then norm and the output
matrix. What a family adds (biases, norms on queries and keys, norms after a block, soft caps, sliding windows,
experts) is a field of :class:`DecoderConfig`. Parameters carry the names of Hugging Face checkpoints, so that a state
dictionary loads without renaming. Training, compression and tests use this module; serving runs the same weights
through :class:`hasten.language.executor.Executor`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hasten.language.config import DecoderConfig
from hasten.nn import RMSNorm, causal_mask, grouped_attention, rotary_frequencies, rotate

__all__ = ["Decoder", "empty_decoder"]


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions: (batch, time, hidden) -> the same."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.window = config.window(layer)
        self.local = config.uses_local_rotary(layer)
        hidden, width = config.hidden_size, config.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(hidden, config.num_heads * width, bias=bias)
        self.k_proj = nn.Linear(hidden, config.num_kv_heads * width, bias=bias)
        self.v_proj = nn.Linear(hidden, config.num_kv_heads * width, bias=bias)
        self.o_proj = nn.Linear(config.num_heads * width, hidden, bias=config.attention_out_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(width, config.norm_eps, config.norm_offset)
            self.k_norm = RMSNorm(width, config.norm_eps, config.norm_offset)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        config = self.config
        batch, time, _ = x.shape
        query = self.q_proj(x).view(batch, time, config.num_heads, config.head_dim)
        keys = self.k_proj(x).view(batch, time, config.num_kv_heads, config.head_dim)
        values = self.v_proj(x).view(batch, time, config.num_kv_heads, config.head_dim).transpose(1, 2)
        if config.qk_norm:
            query, keys = self.q_norm(query), self.k_norm(keys)
        query, keys = rotate(query.transpose(1, 2), cos, sin), rotate(keys.transpose(1, 2), cos, sin)
        mask = None
        if self.window is not None and self.window < time:
            mask = causal_mask(time, time, self.window).to(x.device)
        out = grouped_attention(
            query, keys, values, scale=config.attention_scale, mask=mask, softcap=config.attention_softcap
        )
        attended: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, time, -1))
        return attended


class FeedForward(nn.Module):
    """Gated feed-forward: ``down(act(gate(x)) * up(x))``."""

    def __init__(self, hidden: int, inner: int, activation: str) -> None:
        super().__init__()
        self.gelu = activation != "silu"
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        gate = functional.gelu(gate, approximate="tanh") if self.gelu else functional.silu(gate)
        out: Tensor = self.down_proj(gate * self.up_proj(x))
        return out


class Experts(nn.Module):
    """Mixture of experts: each token goes through its ``experts_per_token`` best feed-forwards.

    Router weights are the softmax over all experts, cut to the best and (``norm_topk_prob``) rescaled to one
    (Mixtral, Jiang et al. 2024; Qwen-MoE adds an expert that every token uses, scaled by a sigmoid gate).
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            FeedForward(config.hidden_size, config.moe_intermediate_size, config.activation)
            for _ in range(config.num_experts)
        )
        if config.shared_expert_size:
            self.shared_expert = FeedForward(config.hidden_size, config.shared_expert_size, config.activation)
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = route(self.gate(flat), self.config.experts_per_token, self.config.norm_topk_prob)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            token, place = torch.where(chosen == index)
            if token.numel():
                out = out.index_add(0, token, expert(flat[token]) * weights[token, place, None].to(flat.dtype))
        if self.config.shared_expert_size:
            out = out + torch.sigmoid(self.shared_expert_gate(flat)) * self.shared_expert(flat)
        return out.view_as(x)


def route(scores: Tensor, best: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """Weights and numbers of the experts of each token: scores (tokens, experts) -> two of (tokens, best)."""
    weights, chosen = torch.topk(torch.softmax(scores.float(), -1), best, -1)
    return (weights / weights.sum(-1, keepdim=True) if normalise else weights), chosen


class Layer(nn.Module):
    """One decoder layer around the residual stream."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.sandwich = config.sandwich_norms

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.norm_eps, config.norm_offset)

        self.self_attn = Attention(config, layer)
        feed_forward: nn.Module
        if config.is_expert_layer(layer):
            feed_forward = Experts(config)
        else:
            feed_forward = FeedForward(config.hidden_size, config.intermediate_size, config.activation)
        self.mlp = feed_forward
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        if self.sandwich:  # Gemma 2 and 3: a norm before and after each block
            self.pre_feedforward_layernorm = norm()
            self.post_feedforward_layernorm = norm()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), cos, sin)
        if self.sandwich:
            x = x + self.post_attention_layernorm(attended)
            x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
            return x
        x = x + attended
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Body(nn.Module):
    """Embedding, layers and last norm; the part that Hugging Face calls ``model``."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, config.norm_offset)


class Decoder(nn.Module):
    """A causal language model: token ids (batch, time) -> logits (batch, time, vocabulary).

    >>> config = DecoderConfig(vocab_size=16, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4,
    ...                        intermediate_size=16)
    >>> Decoder(config)(torch.zeros(1, 3, dtype=torch.long)).shape
    torch.Size([1, 3, 16])
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal initialisation; matrices that write to the residual stream shrink with depth (GPT-2)."""
        deep = 0.02 / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=deep if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Hidden states after the last norm: (batch, time) -> (batch, time, hidden)."""
        config = self.config
        x = self.model.embed_tokens(tokens)
        if config.embedding_scale != 1.0:
            x = x * torch.tensor(config.embedding_scale, dtype=x.dtype)
        tables = [rotary_tables(config, tokens.shape[1], local=False, device=x.device)]
        if config.local_rope_theta is not None:
            tables.append(rotary_tables(config, tokens.shape[1], local=True, device=x.device))
        layer: Any
        for layer in self.model.layers:
            cos, sin = tables[1 if layer.self_attn.local else 0]
            x = layer(x, cos, sin)
        hidden: Tensor = self.model.norm(x)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """The output matrix and the final soft cap: (..., hidden) -> (..., vocabulary)."""
        logits = self.lm_head(hidden)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(self.hidden(tokens))


def rotary_tables(
    config: DecoderConfig, positions: int, *, local: bool = False, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position: two of (positions, pairs), float32.

    ``local``: those of Gemma 3's sliding-window layers, which keep a smaller base and are not stretched.
    """
    frequencies, factor = rotary_frequencies(
        config.rotary_dim,
        config.local_rope_theta if local and config.local_rope_theta is not None else config.rope_theta,
        config.local_rope_scaling if local else config.rope_scaling,
        positions,
    )
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    return (angles.cos() * factor).to(device), (angles.sin() * factor).to(device)


class _Uninitialised(TorchFunctionMode):
    """Modules are built without drawing weights, for they are about to be read. Drawing on the meta device would import
    torch's compiler, which takes seconds and a hundred megabytes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def empty_decoder(config: DecoderConfig) -> Decoder:
    """A decoder on the meta device: its shapes without memory, for weights that are about to be read."""
    with torch.device("meta"), _Uninitialised():
        return Decoder(config)
