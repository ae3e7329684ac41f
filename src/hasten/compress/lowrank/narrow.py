"""Narrower parts in the place of a block's own: which columns stay, and the new layers."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hasten.compress.lowrank import pairs
from hasten.compress.lowrank.blocks import Block
from hasten.compress.lowrank.huggingface import ForeignAttention
from hasten.compress.lowrank.statistics import BlockStatistics
from hasten.compress.technique import LayerReport
from hasten.nn.sized import SizedAttention

__all__ = ["linear", "narrow_attention", "narrow_feed_forward"]

_UNITS = 8
"""Hidden units come in multiples of this."""


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer with this weight (out, in) and bias."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.detach().clone().contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone().to(weight.dtype).contiguous())
    return layer


def _size(*layers: Any) -> int:
    return sum(p.numel() * p.element_size() for m in layers for p in m.parameters())


# ---- feed-forward ---------------------------------------------------------------------------------------------------


def narrow_feed_forward(
    clone: nn.Module,
    block: Block,
    stats: BlockStatistics,
    weights: float,
    selection: str,
    ridge: float,
    generator: torch.Generator,
    notes: list[str],
) -> list[LayerReport]:
    """Cut the hidden units until about ``weights`` numbers are left."""
    parent: Any = clone.get_submodule(block.feed_forward or "")
    ups = [getattr(parent, n) for n in block.ups]
    down = getattr(parent, block.down)
    before, units = _size(*ups, down), down.in_features
    fixed = 0 if down.bias is None else down.bias.numel()
    each = (sum(p.numel() for m in (*ups, down) for p in m.parameters()) - fixed) / units
    step = min(_UNITS, units)
    keep = max(step, min(units, round((weights - fixed) / each / step) * step))
    if keep >= units:
        return [LayerReport(f"{block.name}.mlp", "kept", f"all {units} units stay at this ratio", before, before)]
    assert stats.hidden is not None
    moment, following = stats.hidden.mean, down.weight.double()
    if stats.hidden.count < units:  # what was not seen is held by a ridge
        moment = moment + 1e-4 * moment.diagonal().mean() * torch.eye(units, dtype=moment.dtype)
    if selection == "greedy":
        if stats.order is None or len(stats.order) < keep:  # one after the other: fewer are the first of more
            stats.order = pairs.select_greedily(moment, following, keep)
        kept = stats.order[:keep].sort().values
    elif selection == "leverage":
        kept = pairs.best_by(pairs.leverage(moment, ridge), keep)
    elif selection == "magnitude":
        sizes = torch.stack([m.weight.double().norm(dim=1) for m in ups]).prod(0) * following.norm(dim=0)
        kept = pairs.best_by(sizes, keep)
    else:
        kept = torch.randperm(units, generator=generator)[:keep].sort().values
    solved, error = pairs.nystrom(moment, following, kept)
    if selection in ("magnitude", "random"):
        solved = following[:, kept]
        gap = following.clone()
        gap[:, kept] = 0
        error = float(((gap @ moment * gap).sum() / (following @ moment * following).sum()).sqrt())
    for name, layer in zip(block.ups, ups, strict=True):
        setattr(parent, name, linear(layer.weight[kept], None if layer.bias is None else layer.bias[kept]))
    setattr(parent, block.down, linear(solved.to(down.weight.dtype), down.bias))
    if hasattr(parent, "intermediate_size"):
        parent.intermediate_size = keep
    new = _size(*(getattr(parent, n) for n in (*block.ups, block.down)))
    return [
        LayerReport(
            f"{block.name}.mlp", f"nystrom {units} to {keep}", f"{selection} selection", before, new, error=error
        )
    ]


# ---- attention ------------------------------------------------------------------------------------------------------


def narrow_attention(
    clone: nn.Module,
    block: Block,
    stats: BlockStatistics,
    keep: Mapping[str, float],
    selection: str,
    generator: torch.Generator,
    notes: list[str],
) -> list[LayerReport]:
    """Put an attention with narrower heads in the block's place; ``keep``: the share of a head that stays, by kind (qk
    or vo); a kind that is not named stays as it is."""
    if "qk" not in keep and "vo" not in keep:
        return []
    old: Any = clone.get_submodule(block.attention)
    out: Any = getattr(old, block.out)
    width, reports = block.width, []
    normed = isinstance(getattr(old, "q_norm", None), nn.Module)
    chosen = torch.arange(width).expand(block.kv_heads, width)
    turned = stats.pairs if "qk" in keep else _pairs_of(old)
    count = turned
    before = _size(old.q_proj, old.k_proj)
    if "qk" in keep:
        chosen, count = _choose_columns(old, block, stats, keep["qk"], selection, normed, generator)
        error = _query_key_error(stats, chosen, block)
        share = chosen.shape[1] * before // width
        action = f"columns {width} to {chosen.shape[1]}" if chosen.shape[1] < width else "kept"
        text = f"{count} of {turned} rotary pairs" if turned else "no rotation"
        reports.append(LayerReport(f"{block.attention}.qk", action, text, before, share, error=error))
    value_width = width
    first = second = None
    if "vo" in keep:
        value_width = max(1, min(width, round(keep["vo"] * width)))
        value_width = min(width, value_width + value_width % 2)
        first, second, error = _values(old, out, block, stats, value_width, selection, generator)
        before = _size(old.v_proj, out)
        action = f"svd {width} to {value_width}" if value_width < width else "kept"
        reports.append(
            LayerReport(
                f"{block.attention}.vo",
                action,
                "singular values of the pair",
                before,
                value_width * before // width,
                error=error,
            )  # fmt: skip
        )
    new = _build(old, out, block, chosen, count, value_width, first, second)
    if normed and chosen.shape[1] < width:
        _rescale_norms(old, new, stats, chosen[0])
        text = "approximate: norms of queries and keys see fewer numbers and were rescaled to their mean size"
        if not any("norms of queries" in n for n in notes):
            notes.append(text)
    clone.set_submodule(block.attention, new)
    return reports


def _pairs_of(old: Any) -> int:
    """Rotary pairs of an attention whose queries and keys stay as they are."""
    rotary = getattr(getattr(old, "config", None), "rotary_dim", None)
    return int(rotary) // 2 if isinstance(rotary, int) else old.q_proj.out_features // int(_heads(old)) // 2


def _heads(old: Any) -> int:
    for owner in (old, getattr(old, "config", None)):
        for name in ("num_heads", "num_attention_heads"):
            if isinstance(getattr(owner, name, None), int):
                return int(getattr(owner, name))
    raise AttributeError("num_heads")


def _choose_columns(
    old: Any, block: Block, stats: BlockStatistics, keep: float, selection: str, normed: bool,
    generator: torch.Generator,
) -> tuple[Tensor, int]:  # fmt: skip
    """Columns of a head that stay, (kv_heads, kept) in the new layout, and how many of their pairs turn."""
    width, turned, share = block.width, stats.pairs, block.heads // block.kv_heads
    assert stats.query is not None
    assert stats.keys is not None
    scores = []
    for group in range(block.kv_heads):
        mine = slice(group * share, (group + 1) * share)
        if selection == "random":
            scores.append(torch.rand(width, generator=generator, dtype=torch.float64))
        elif selection == "magnitude":
            query = old.q_proj.weight.double().view(block.heads, width, -1)[mine].square().sum((0, 2))
            scores.append(
                (query * old.k_proj.weight.double().view(block.kv_heads, width, -1)[group].square().sum(1)).sqrt()
            )
        else:
            scores.append(pairs.column_scores(stats.query[mine], stats.keys[group]))
    if normed:  # one norm for all heads: they keep the same columns
        scores = [torch.stack(scores).sum(0)] * block.kv_heads
    rest = width - 2 * turned
    kept_pairs = max(1, min(turned, round(keep * turned))) if turned else 0
    kept_rest = max(0 if turned else 1, min(rest, round(keep * rest)))
    lines = []
    for one in scores:
        both = pairs.best_by(one[:turned] + one[turned : 2 * turned], kept_pairs)
        plain = pairs.best_by(one[2 * turned :], kept_rest) + 2 * turned
        lines.append(torch.cat([both, both + turned, plain]))
    return torch.stack(lines), kept_pairs


def _query_key_error(stats: BlockStatistics, chosen: Tensor, block: Block) -> float:
    """Relative error of all scores, causal or not, before the softmax: ``tr(C_Q[D, D] C_K[D, D])`` over the dropped."""
    assert stats.query is not None
    assert stats.keys is not None
    share, lost, total = block.heads // block.kv_heads, 0.0, 0.0
    for group in range(block.kv_heads):
        gone = torch.ones(block.width, dtype=torch.bool)
        gone[chosen[group]] = False
        key = stats.keys[group]
        for query in stats.query[group * share : (group + 1) * share]:
            total += float((query * key).sum())
            lost += float((query[gone][:, gone] * key[gone][:, gone]).sum())
    return math.sqrt(max(lost, 0.0) / max(total, 1e-300))


def _values(
    old: Any, out: Any, block: Block, stats: BlockStatistics, keep: int, selection: str, generator: torch.Generator
) -> tuple[Tensor, Tensor, float]:
    """New value weight (kv_heads * keep, hidden), new output weight (hidden, heads * keep), relative error."""
    width, share, hidden = block.width, block.heads // block.kv_heads, out.out_features
    value = old.v_proj.weight.double().view(block.kv_heads, width, -1)
    slices = out.weight.double().view(hidden, block.heads, width)
    assert stats.input is not None
    moment = stats.input.mean
    firsts, seconds = [], []
    lost = total = 0.0
    for group in range(block.kv_heads):
        # (share * hidden, width): the slices of all query heads that read these values
        second = slices[:, group * share : (group + 1) * share].permute(1, 0, 2).reshape(share * hidden, width)
        if selection in ("magnitude", "random"):
            sizes = value[group].norm(dim=1) * second.norm(dim=0)
            if selection == "random":
                sizes = torch.rand(width, generator=generator, dtype=torch.float64)
            kept = pairs.best_by(sizes, keep)
            gone = torch.ones(width, dtype=torch.bool)
            gone[kept] = False
            inner = value[group] @ moment @ value[group].T
            outer = second.T @ second
            total += float((inner * outer).sum())
            lost += float((inner[gone][:, gone] * outer[gone][:, gone]).sum())
            new_first, new_second = value[group][kept], second[:, kept]
        else:
            new_first, new_second, singular = pairs.joint_svd(moment, value[group], second, keep)
            total += float(singular.square().sum())
            lost += float(singular[keep:].square().sum())
        firsts.append(new_first)
        seconds.append(new_second.reshape(share, hidden, -1).permute(1, 0, 2))
    joined = torch.cat(seconds, 1).reshape(hidden, block.heads * keep)
    return torch.cat(firsts), joined, math.sqrt(max(lost, 0.0) / max(total, 1e-300))


def _build(
    old: Any, out: Any, block: Block, chosen: Tensor, count: int, value_width: int, first: Tensor | None,
    second: Tensor | None,
) -> SizedAttention:  # fmt: skip
    """The new attention; ``first`` and ``second`` None keep values and output as they are."""
    dtype, share, width = old.q_proj.weight.dtype, block.heads // block.kv_heads, block.width
    kind = SizedAttention if block.native else ForeignAttention
    bias = old.q_proj.bias is not None
    new_bias = None if out.bias is None else out.bias.double()
    if old.v_proj.bias is not None:  # attention weights add up to one, so the values' bias passes through
        spread = old.v_proj.bias.double().view(block.kv_heads, width).repeat_interleave(share, 0).flatten()
        new_bias = out.weight.double() @ spread + (0 if new_bias is None else new_bias)
    window = getattr(old, "window", getattr(old, "sliding_window", None))
    softcap = getattr(old.config, "attention_softcap", None) if block.native else getattr(
        old, "attn_logit_softcapping", None
    )  # fmt: skip
    normed = isinstance(getattr(old, "q_norm", None), nn.Module)
    with torch.device("meta"):
        new = kind(
            hidden=old.q_proj.in_features, heads=block.heads, kv_heads=block.kv_heads, key_width=chosen.shape[1],
            value_width=value_width, scale=block.scale, bias=bias, out_bias=new_bias is not None, softcap=softcap,
            window=window,
        )  # fmt: skip
    new.q_norm, new.k_norm = (copy.deepcopy(getattr(old, n)) if normed else None for n in ("q_norm", "k_norm"))
    new.pairs = chosen[:, :count].clone().contiguous() if count else torch.zeros(block.kv_heads, 0, dtype=torch.long)
    offsets = torch.arange(block.heads)[:, None] * width
    rows = (chosen.repeat_interleave(share, 0) + offsets).flatten()
    key_rows = (chosen + torch.arange(block.kv_heads)[:, None] * width).flatten()
    new.q_proj = linear(old.q_proj.weight[rows], old.q_proj.bias[rows] if bias else None)
    new.k_proj = linear(old.k_proj.weight[key_rows], old.k_proj.bias[key_rows] if bias else None)
    new.v_proj = linear(old.v_proj.weight if first is None else first.to(dtype), None)
    new.o_proj = linear(
        out.weight if second is None else second.to(dtype), None if new_bias is None else new_bias.to(dtype)
    )
    new.local = getattr(old, "local", False)
    if not block.native:
        new.layer_idx = getattr(old, "layer_idx", None)  # type: ignore[assignment]
        new.sliding_window = window  # type: ignore[assignment]
    return new.train(old.training)


def _rescale_norms(old: Any, new: Any, stats: BlockStatistics, kept: Tensor) -> None:
    """Norms over fewer numbers: the weights of those that stay, times the mean change of the root mean square."""
    for name, square in (("q_norm", stats.query_square), ("k_norm", stats.key_square)):
        norm: Any = getattr(old, name)
        offset = float(getattr(norm, "offset", 1.0 if "Gemma" in type(norm).__name__ else 0.0))
        factor = norm.weight.double() + offset
        assert square is not None
        plain = square / factor.square().clamp_min(1e-12)  # squares of the normalised numbers, up to one factor
        change = (plain[kept].mean() / plain.mean()).sqrt()
        fresh: Any = getattr(new, name)
        fresh.weight = nn.Parameter((factor[kept] * change - offset).to(norm.weight.dtype))
