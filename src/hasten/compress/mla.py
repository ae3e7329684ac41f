"""Grouped-query attention turned into latent attention: first exactly, then with a smaller cache.

"TransMLA: Multi-head Latent Attention Is All You Need", Meng et al. 2025, arXiv:2502.07864. Level 0: the cached vector
is what grouped-query attention caches, and repeating it per head is a factor (an identity). Level 1: one rotation per
frequency gathers the keys' energy (RoRoPE; neighbouring frequencies may share one, FreqFold), ``rope_dims`` numbers
keep their rotation, the rest loses it and is compressed with the values by one balanced PCA.
Differs from the paper in: over all frequencies, those keep the rotation that would miss it most, energy of keys times
that of queries times ``1 - cos(frequency * distance)`` on average; the paper keeps the strongest of each frequency.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hasten.compress.given import run_example
from hasten.compress.scarce import Scarcity
from hasten.compress.technique import LayerReport, TechniqueReport, register, sqnr
from hasten.errors import ConfigurationError
from hasten.nn import rotary_frequencies
from hasten.nn.latent import LatentAttention

__all__ = ["ToMLA"]

_COMPARED = 4
"""Tensors of the calibration on which a converted model is compared with the original."""


@register
@dataclass(frozen=True)
class ToMLA:
    """Latent attention in place of every grouped-query layer.

    >>> from hasten.compress.mla import ToMLA
    >>> ToMLA(kv_rank=0.5, rope_dims=32).level
    1
    """

    kv_rank: float | int | None = None
    """numbers of the latent; a share of what there is when below 1; None keeps all (level 0: exact)"""
    rope_dims: int | None = None
    """numbers that keep their rotation, shared by all heads; None keeps all"""
    freqfold: int | str = 1
    """neighbouring frequencies that share one rotation and turn at the fastest of them from then on; ``auto`` doubles
    it while the loss on the calibration falls"""
    balance: bool = True
    """scale keys to the size of values (mean norm of a channel) before the PCA, so that neither crowds the other out"""
    by_data: bool = True
    """PCA of what the calibration shows; False takes the weights alone, for comparison"""

    name: ClassVar[str] = "mla"

    def __post_init__(self) -> None:
        if self.kv_rank is not None and not 0 < self.kv_rank < math.inf:
            raise ConfigurationError(f"kv_rank is {self.kv_rank}; give a share below 1 or a number of at least 1")
        if self.rope_dims is not None and (self.rope_dims < 2 or self.rope_dims % 2):
            raise ConfigurationError(f"rope_dims is {self.rope_dims}; it counts pairs, so give an even number ≥ 2")
        if self.freqfold != "auto" and (not isinstance(self.freqfold, int) or self.freqfold < 1):
            raise ConfigurationError(f"freqfold is {self.freqfold!r}; give 1, 2, 4 … or auto")

    @property
    def level(self) -> int:
        """0 is exact, 1 compresses."""
        return 0 if self.kv_rank is None and self.rope_dims is None else 1

    def __call__(self, model: nn.Module, calibration: Sequence[Any] | None = None) -> nn.Module:
        """A new module with latent layers and a ``report``; ``calibration`` is token tensors (batch, time).

        Raises :class:`~hasten.errors.ConfigurationError` for a model without such layers or with norms on keys.
        """
        layers = _attentions(model)
        if self.level == 1 and self.by_data and not calibration:
            raise ConfigurationError("a smaller cache is fitted to data; give token tensors, or by_data=False")
        if self.freqfold == "auto" and self.level == 1:
            if not calibration:
                raise ConfigurationError("freqfold is auto, which needs tokens to try it on; give some, or a number")
            return self._folded(model, calibration)
        clone = copy.deepcopy(model).eval()
        seen = _inputs(model, layers, calibration or []) if self.level == 1 and self.by_data else {}
        context = max((t.shape[-1] for t in calibration or []), default=0)
        reports, notes = [], self._scarce(layers, seen)
        before = after = 0
        for name, old in layers.items():
            new = self._convert(old, seen.get(name), context)
            new.train(old.training)
            clone.set_submodule(name, new)
            groups = old.config.num_kv_heads * old.config.head_dim
            before, after = before + 2 * groups, after + new.cache_numbers
            sizes = [sum(p.numel() * p.element_size() for p in m.parameters()) for m in (old, new)]
            action = f"mla rank {new.rank} rope {new.rope}"
            reports.append(
                LayerReport(name, action, f"{2 * groups} numbers a token became {new.cache_numbers}", *sizes)
            )
        clone.train(model.training)
        notes.append(
            f"{len(reports)} layers; a token takes {after} numbers of cache, {2 * after} bytes at 16 bits, instead of "
            f"{before} and {2 * before} ({1 - after / before:.0%} less)"
        )
        measured = {}
        if calibration:
            measured["sqnr"] = _compare(model, clone, calibration[:_COMPARED])
        clone.report = TechniqueReport(self.name, tuple(reports), tuple(notes), measured)  # type: ignore[assignment]
        clone.cache_bytes_per_token = 2 * after  # type: ignore[assignment]
        clone.model_cache_bytes = 2 * before  # type: ignore[assignment]
        return clone

    def _scarce(self, layers: dict[str, Any], seen: dict[str, Tensor]) -> list[str]:
        """The sentence on too few tokens; refuses a latent of which the tokens leave a part to chance."""
        scarce, notes = Scarcity(), list[str]()
        tokens = {name: len(x) for name, x in seen.items()}
        totals = {n: m.config.num_kv_heads * m.config.head_dim for n, m in layers.items()}
        whole = {n: 2 * t - (t if self.rope_dims is None else min(self.rope_dims, t)) for n, t in totals.items()}
        if tokens and self.kv_rank is not None:
            ranks = {n: self._rank(w) for n, w in whole.items()}
            scarce.refuse("the latent is wider than what was seen", tokens, ranks, "by_data=False", "tokens")
            scarce.rows("ToMLA", tokens, whole, unit="tokens")
        scarce.tell(notes)
        return notes

    def _folded(self, model: nn.Module, calibration: Sequence[Any] | None) -> nn.Module:
        """The fold with the least loss on the calibration: doubled while it falls."""
        from dataclasses import replace

        best, least, fold = None, float("inf"), 1
        most = next(iter(_attentions(model).values())).config.head_dim // 2
        while fold <= most:
            found = replace(self, freqfold=fold)(model, calibration)
            loss = _loss(found, calibration or [])
            if loss >= least:
                break
            best, least, fold = found, loss, 2 * fold
        assert best is not None
        report: Any = best.report
        notes = (*report.notes, f"freqfold {fold // 2}, calibration loss {least:.4f}")
        best.report = TechniqueReport(report.technique, report.layers, notes, report.measured)  # type: ignore[assignment]
        return best

    def _convert(self, old: Any, x: Tensor | None, context: int) -> LatentAttention:
        config = old.config
        heads, groups, width = config.num_heads, config.num_kv_heads, config.head_dim
        total, half, share = groups * width, width // 2, heads // groups
        dtype = old.q_proj.weight.dtype
        key_weight, value_weight = (m.weight.detach().double() for m in (old.k_proj, old.v_proj))
        key_bias, value_bias = (
            torch.zeros(total, dtype=torch.float64) if m.bias is None else m.bias.detach().double()
            for m in (old.k_proj, old.v_proj)
        )
        # Components of all key heads: (frequency, head) pairs, real parts then imaginary parts.
        order = torch.tensor([j * width + f for f in range(half) for j in range(groups)])
        real, imaginary = order, order + half
        frequency = torch.arange(half).repeat_interleave(groups)
        missed = _missed(config, old.local, context or config.max_position_embeddings)
        asked = _asked(old, x)
        keep, turn, pairs = self._rotation(key_weight, key_bias, x, real, imaginary, frequency, groups, missed, asked)
        both = torch.cat([real, imaginary])
        mixed = torch.block_diag(turn, turn)  # acts on real and imaginary parts alike
        weight, bias = mixed @ key_weight[both], mixed @ key_bias[both]
        count = len(frequency)
        kept = torch.cat([keep, keep + count])
        lost = torch.cat([torch.tensor([i for i in range(count) if i not in set(keep.tolist())], dtype=torch.long)] * 2)
        lost[len(lost) // 2 :] += count
        # Head i sees the components of its own key head: an embedding of its query, then the same turn.
        spread = torch.zeros(heads, 2 * count, width, dtype=torch.float64)
        for head in range(heads):
            for place, row in enumerate(both.tolist()):
                if row // width == head // share:
                    spread[head, place, row % width] = 1.0
        absorbed = mixed @ spread
        z_weight = torch.cat([weight[lost], value_weight])
        z_bias = torch.cat([bias[lost], value_bias])
        rank = self._rank(len(z_weight))
        ratio = 1.0
        if len(lost) and self.balance:
            sample = z_weight.T if x is None else x @ z_weight.T + z_bias
            sizes = [part.norm(dim=0).mean() for part in (sample[:, : len(lost)], sample[:, len(lost) :])]
            ratio = float(sizes[0] / sizes[1].clamp_min(1e-12)) or 1.0
        scale = torch.ones(len(z_weight), dtype=torch.float64)
        scale[: len(lost)] = 1.0 / ratio
        basis = torch.eye(len(z_weight), dtype=torch.float64)
        if rank < len(z_weight):
            rows = z_weight * scale[:, None]
            moment = rows @ rows.T if x is None else (x @ rows.T + z_bias * scale).T @ (x @ rows.T + z_bias * scale)
            basis = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :rank].T
        plain = len(lost) > 0
        new = LatentAttention(
            hidden=config.hidden_size, heads=heads, width=width, rope=2 * len(keep), rank=rank, pairs=pairs,
            scale=config.attention_scale, plain_keys=plain, bias=config.attention_bias,
            out_bias=config.attention_out_bias, softcap=config.attention_softcap, window=old.window,
        ).to(dtype)  # fmt: skip
        new.local = old.local
        state = {
            "q_proj.weight": old.q_proj.weight, "o_proj.weight": old.o_proj.weight,
            "rope_proj.weight": weight[kept], "latent_proj.weight": basis @ (z_weight * scale[:, None]),
            "rope_query": absorbed[:, kept], "pairs": pairs,
        }  # fmt: skip
        back = basis.T / scale[:, None]  # from the latent to z
        if plain:
            state["latent_query"] = torch.einsum("zr,hzd->hrd", back[: len(lost)], absorbed[:, lost])
        values = back[len(lost) :]
        state["latent_value"] = torch.stack(
            [values[(h // share) * width : (h // share + 1) * width] for h in range(heads)]
        )
        if config.attention_bias:
            state["q_proj.bias"] = old.q_proj.bias
            state["rope_proj.bias"] = bias[kept]
            state["latent_proj.bias"] = basis @ (z_bias * scale)
        if config.attention_out_bias:
            state["o_proj.bias"] = old.o_proj.bias
        new.load_state_dict({k: v if k == "pairs" else v.detach().to(dtype) for k, v in state.items()})
        return new

    def _rank(self, most: int) -> int:
        if self.kv_rank is None:
            return most
        rank = round(self.kv_rank * most) if self.kv_rank < 1 else int(self.kv_rank)
        if rank > most:
            raise ConfigurationError(
                f"kv_rank is {rank}; what the rotated part leaves has {most} numbers (2 key heads * width - rope_dims)"
            )
        return max(1, rank)

    def _rotation(
        self, weight: Tensor, bias: Tensor, x: Tensor | None, real: Tensor, imaginary: Tensor, frequency: Tensor,
        groups: int, missed: Tensor, asked: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Which components keep the rotation, the orthogonal turn before that, and the frequency of each kept one.

        ``missed`` (frequencies,): share of a component's energy that scores get wrong where it is not rotated;
        ``asked`` (key heads, frequencies): energy of the queries that meet a component.
        """
        count = len(frequency)
        turn = torch.eye(count, dtype=torch.float64)
        if self.level == 0:
            return torch.arange(count), turn, frequency.clone()
        fold = int(self.freqfold)
        energy = torch.zeros(count, dtype=torch.float64)
        fastest = frequency.clone()
        if x is None:
            parts = [weight[real].T, weight[imaginary].T]
        else:
            parts = [x @ weight[real].T + bias[real], x @ weight[imaginary].T + bias[imaginary]]
        for begin in range(0, count, groups * fold):
            block = slice(begin, min(begin + groups * fold, count))
            moment = torch.stack([p[:, block].T @ p[:, block] for p in parts]).sum(0)
            moment = moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
            values, vectors = torch.linalg.eigh(moment)
            turn[block, block] = vectors.flip(1).T
            energy[block] = values.flip(0)
            fastest[block] = frequency[block][0]
            # A turned component is a mixture of those that the queries know, with squares of the turn as shares.
            energy[block] *= turn[block, block].square() @ asked.T.flatten()[block]
        rope = self.rope_dims if self.rope_dims is not None else 2 * count
        if rope > 2 * count:
            raise ConfigurationError(f"rope_dims is {rope}; the keys of all heads have {2 * count} numbers")
        keep = (energy * missed[fastest]).topk(rope // 2).indices.sort().values
        return keep, turn, fastest[keep]


def _asked(layer: Any, x: Tensor | None) -> Tensor:
    """Energy of each key head's queries by frequency, of the weights alone without ``x``: (key heads, frequencies)."""
    config, weight, bias = layer.config, layer.q_proj.weight.detach().double(), layer.q_proj.bias
    queries = weight.T if x is None else x @ weight.T + (0.0 if bias is None else bias.detach().double())
    energy = queries.square().mean(0).view(config.num_kv_heads, -1, 2, config.head_dim // 2)
    return energy.sum((1, 2))


def _missed(config: Any, local: bool, context: int) -> Tensor:
    """Mean of ``1 - cos`` of what each frequency turns over the distances in a context: (frequencies,) float64.

    A slow pair hardly turns, so it does nearly as well without.
    """
    theta, scaling = config.rope_theta, config.rope_scaling
    if local:
        scaling = config.local_rope_scaling
        theta = theta if config.local_rope_theta is None else config.local_rope_theta
    rates, _ = rotary_frequencies(config.rotary_dim, theta, scaling, context)
    return 1 - torch.outer(rates.double(), torch.arange(context, dtype=torch.float64)).cos().mean(1)


def _attentions(model: nn.Module) -> dict[str, Any]:
    """Grouped-query layers by name. Raises with what was seen where there are none, or where they cannot be turned."""
    found = {
        name: m
        for name, m in model.named_modules()
        if all(isinstance(getattr(m, f"{p}_proj", None), nn.Linear) for p in "qkvo") and hasattr(m, "config")
    }
    if not found:
        kinds = sorted({type(m).__name__ for m in model.modules()})
        raise ConfigurationError(
            f"the model has no layer with q_proj, k_proj, v_proj and o_proj; seen are {', '.join(kinds[:8])}"
        )
    config: Any = next(iter(found.values())).config
    if config.qk_norm:
        raise ConfigurationError(
            "the model normalises every head of its keys, which does not commute with mixing heads; it stays as it is"
        )
    if config.rotary_dim != config.head_dim:
        raise ConfigurationError(f"only {config.rotary_dim} of {config.head_dim} numbers are rotated; not supported")
    return found


def _inputs(model: nn.Module, layers: dict[str, Any], calibration: Sequence[Any]) -> dict[str, Tensor]:
    """What each layer is given on the calibration: (tokens, hidden) in float64."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    hooks = []
    for name, layer in layers.items():

        def note(module: Any, given: Any, name: str = name) -> None:
            seen[name].append(given[0].detach().reshape(-1, given[0].shape[-1]).double())

        hooks.append(layer.register_forward_pre_hook(note))
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            for index, tokens in enumerate(calibration):
                run_example(model, tokens, index)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    return {name: torch.cat(parts) for name, parts in seen.items()}


def _compare(model: nn.Module, other: nn.Module, calibration: Sequence[Any]) -> float:
    modes = [(m, m.training) for one in (model, other) for m in one.modules()]
    model.eval(), other.eval()
    with torch.no_grad():
        results = [torch.cat([one(t).flatten() for t in calibration]) for one in (model, other)]
    for module, training in modes:
        module.training = training
    return sqnr(results[0], results[1])


def _loss(model: nn.Module, calibration: Sequence[Any]) -> float:
    """Mean negative log probability of the next token."""
    losses = []
    with torch.no_grad():
        for tokens in calibration:
            logits = model(tokens)[:, :-1].float()
            losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
    return float(torch.stack(losses).mean())
