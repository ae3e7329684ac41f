"""MoDeGPT: pairs of matrices inside a decoder block shrink together, and nothing is added.

"MoDeGPT: Modular Decomposition for Large Language Model Compression", Lin et al. 2024, arXiv:2408.09632. The hidden
width between two matrices is cut so that what the pair makes of calibration is kept: Nyström for the feed-forward,
column selection for queries and keys, SVD for values and output (:mod:`pairs`). How much each pair loses follows from
what cutting it alone does to the predictions, or, as published, a layer's share from how little it changes its input.
Differs from the paper in: that allocation, greedy selection of hidden units, the joint optimum over the query heads of
a group, pseudo-inverses in place of ridges, and statistics of the compressed prefix on request.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from hasten.compress.lowrank import pairs
from hasten.compress.lowrank.allocation import measured_shares
from hasten.compress.lowrank.blocks import Block, find_blocks
from hasten.compress.lowrank.moments import Moments, observe, output_sqnr, require_cpu
from hasten.compress.lowrank.narrow import narrow_attention, narrow_feed_forward
from hasten.compress.lowrank.statistics import BlockStatistics, gather
from hasten.compress.scarce import Scarcity
from hasten.compress.technique import LayerReport, TechniqueReport, register
from hasten.errors import ConfigurationError

__all__ = ["ModularDecomposition", "Pair", "decompose_pair"]

KINDS = ("mlp", "qk", "vo")
SELECTIONS = ("greedy", "leverage", "magnitude", "random")


@register
@dataclass(frozen=True)
class ModularDecomposition:
    """Narrower heads and feed-forwards in every block of a decoder, without training.

    >>> from hasten.compress.lowrank.modular import ModularDecomposition
    >>> ModularDecomposition(ratio=0.3, allocation="uniform").modules
    ('mlp', 'qk', 'vo')
    """

    ratio: float = 0.3
    """share of the blocks' parameters that goes; embeddings and norms are not counted and not touched"""
    allocation: Literal["measured", "influence", "uniform"] = "measured"
    """``measured`` cuts every pair by what cutting it alone does to the predictions (:mod:`allocation`); ``influence``,
    as published, cuts layers that change their input little more than others; ``uniform`` cuts all alike"""
    temperature: float = 0.2
    """of ``influence``: 0.01 follows it sharply; 1 is nearly uniform where influences differ by 0.1"""
    modules: tuple[str, ...] = KINDS
    """pairs that are cut: mlp, qk (queries and keys), vo (values and output)"""
    selection: Literal["greedy", "leverage", "magnitude", "random"] = "greedy"
    """how hidden units are chosen: ``leverage`` as published; ``magnitude`` and ``random`` are baselines that choose
    columns of every pair so and refit nothing"""
    ridge: float = 1.0
    """of the leverage scores, in units of the moment's mean diagonal"""
    sequential: bool = False
    """statistics of the already compressed prefix instead of the original model: better, one pass for each layer"""
    most: float = 0.8
    """largest share that a layer may lose"""
    seed: int = 0
    """of the random selection"""

    name: ClassVar[str] = "modular"

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 0.8:
            raise ConfigurationError(f"ratio is {self.ratio}; give the share of parameters to remove, in (0, 0.8]")
        if self.allocation not in ("measured", "influence", "uniform"):
            raise ConfigurationError(f"allocation is {self.allocation!r}; give measured, influence or uniform")
        if self.temperature <= 0:
            raise ConfigurationError(f"temperature is {self.temperature}; give a positive number such as 0.1")
        if not self.modules or any(m not in KINDS for m in self.modules):
            raise ConfigurationError(f"modules are {self.modules}; give some of {', '.join(KINDS)}")
        if self.selection not in SELECTIONS:
            raise ConfigurationError(f"selection is {self.selection!r}; give one of {', '.join(SELECTIONS)}")

    def __call__(
        self,
        model: nn.Module,
        calibration: Sequence[Any] | None = None,
        *,
        statistics: Sequence[BlockStatistics] | None = None,
        progress: Callable[[str, float], None] | None = None,
    ) -> nn.Module:
        """A new, smaller module with a ``report``; ``calibration`` is token tensors (batch, time) or other inputs.

        Works on a decoder of :mod:`hasten.language` and on Llama, Qwen, Mistral, Gemma and OPT of transformers.
        ``statistics``: those of the same model and calibration (:func:`gather`), where several ratios are tried.
        """
        if not calibration:
            raise ConfigurationError("pairs are fitted to data; give calibration, such as token tensors (batch, time)")
        require_cpu(model)
        blocks = find_blocks(model)
        told = progress or (lambda stage, share: None)
        clone = copy.deepcopy(model)
        part = 0.3 if self.sequential else 0.7
        if statistics is None:
            kinds = () if self.sequential and self.allocation != "measured" else self.modules
            seen = gather(model, blocks, calibration, kinds, progress=lambda s, x: told(s, part * x))
        else:
            seen = list(statistics)
        notes = self._scarce(model, blocks, seen)
        shares = self._shares(model, blocks, seen, calibration, told)
        reports: list[LayerReport] = []
        spare = 0.0
        for index, (block, share) in enumerate(zip(blocks, shares, strict=True)):
            stats = seen[index]
            if self.sequential:
                stats = gather(clone, [block], calibration, self.modules, until=block.name)[0]
            wanted = spare + sum((1 - x) * block.weights(clone, (k,)) for k, x in share.items())
            with torch.no_grad():
                reports += self._cut(clone, block, stats, share, notes, spare)
            if self.allocation == "measured":  # what rounding took too much or too little, the next block makes up for
                spare = wanted - block.weights(clone, self.modules)
            seen[index] = BlockStatistics()
            told("decomposing", part + (0.95 - part) * (index + 1) / len(blocks))
        clone.train(model.training)
        measured = {"sqnr": output_sqnr(model, clone, calibration[:4])}
        counts = [sum(p.numel() for p in m.parameters()) for m in (model, clone)]
        weights = [sum(b.weights(m, KINDS) for b in blocks) for m in (model,)]
        removed = counts[0] - counts[1]
        measured |= {"removed_of_blocks": removed / weights[0], "removed_of_model": removed / counts[0]}
        notes.insert(
            0,
            f"{removed / weights[0]:.1%} of the parameters of {len(blocks)} blocks are gone, {removed / counts[0]:.1%} "
            f"of all {counts[0]:,}; statistics of the {'compressed prefix' if self.sequential else 'original model'}",
        )
        clone.report = TechniqueReport(self.name, tuple(reports), tuple(notes), measured)  # type: ignore[assignment]
        told("done", 1.0)
        return clone

    def _scarce(self, model: nn.Module, blocks: list[Block], seen: list[BlockStatistics]) -> list[str]:
        """The sentence on too few tokens. With fewer than a head has numbers the values of the pair would be cut down
        to what those tokens showed, and the rest of the head lost, however much of it was to stay."""
        scarce, notes = Scarcity(), list[str]()
        tokens, heads, widths = {}, {}, {}
        for block, stats in zip(blocks, seen, strict=True):
            if "vo" in self.modules:
                path = f"{block.attention}.v_proj"
                tokens[path], heads[path] = stats.tokens, block.width
                widths[path] = cast(nn.Linear, model.get_submodule(path)).in_features
            if "mlp" in self.modules and block.feed_forward is not None:
                tokens[block.down_path] = stats.tokens
                widths[block.down_path] = cast(nn.Linear, model.get_submodule(block.down_path)).in_features
        scarce.refuse("values and output of a head cannot be fitted", tokens, heads, "modules without vo", "tokens")
        scarce.rows("ModularDecomposition", tokens, widths, unit="tokens")
        scarce.tell(notes)
        return notes

    def _shares(
        self, model: nn.Module, blocks: list[Block], seen: list[BlockStatistics], calibration: Sequence[Any],
        told: Callable[[str, float], None],
    ) -> list[dict[str, float]]:  # fmt: skip
        """Share of the parameters that each pair of each block loses."""
        whole = torch.tensor([b.weights(model, KINDS) for b in blocks], dtype=torch.float64)
        chosen = torch.tensor([b.weights(model, self.modules) for b in blocks], dtype=torch.float64)
        average = float(self.ratio * whole.sum() / chosen.sum().clamp_min(1))
        if average > self.most:
            raise ConfigurationError(
                f"{', '.join(self.modules)} hold {chosen.sum() / whole.sum():.0%} of the blocks' parameters; removing "
                f"{self.ratio:.0%} of all would cut them by {average:.0%}, above {self.most:.0%}; "
                "lower the ratio or name more modules"
            )
        if self.allocation == "measured":
            return measured_shares(
                model, blocks, self.modules, calibration,
                lambda clone, i, shares: self._cut(clone, blocks[i], seen[i], shares, []),
                average, self.most, lambda x: told("measuring every pair", 0.7 * x),
            )  # fmt: skip
        influence = torch.tensor([s.influence for s in seen], dtype=torch.float64)
        shares = torch.full_like(influence, average)
        if self.allocation == "influence":
            shares = pairs.influence_sparsity(influence, average, self.temperature, self.most)
        return [dict.fromkeys(self.modules, x) for x in shares.tolist()]

    def _cut(
        self, clone: nn.Module, block: Block, stats: BlockStatistics, shares: Mapping[str, float], notes: list[str],
        spare: float = 0.0,
    ) -> list[LayerReport]:  # fmt: skip
        """Replace the parts of one block in ``clone``; kinds without a share stay. ``spare``: numbers that the block
        may have beyond its shares."""
        generator = torch.Generator().manual_seed(self.seed)
        target = spare + sum((1 - x) * block.weights(clone, (k,)) for k, x in shares.items())
        keep = {k: 1 - x for k, x in shares.items() if k != "mlp"}
        found = narrow_attention(clone, block, stats, keep, self.selection, generator, notes)
        if "mlp" in shares and block.feed_forward is not None:
            # Heads come in whole pairs; the feed-forward takes up what their rounding left.
            wanted = target - block.weights(clone, tuple(k for k in shares if k != "mlp"))
            found += narrow_feed_forward(clone, block, stats, wanted, self.selection, self.ridge, generator, notes)
        elif "mlp" in shares:
            found.append(LayerReport(f"{block.name}.mlp", "kept", "a feed-forward that is not one pair of matrices"))
        return found


@dataclass(frozen=True)
class Pair:
    """Two or three matrices of a user's own model: those into hidden units, and the one out of them.

    >>> Pair(up=("fc1",), down="fc2").kind
    'nystrom'
    """

    up: tuple[str, ...]
    """paths of the layers whose outputs are the hidden units; two where one gates the other"""
    down: str
    """path of the layer that reads the hidden units"""
    kind: Literal["nystrom", "svd"] = "nystrom"
    """``nystrom`` for anything elementwise in between, ``svd`` where nothing is in between"""


def decompose_pair(
    model: nn.Module, pair: Pair, calibration: Sequence[Any], *, keep: int, selection: str = "greedy"
) -> nn.Module:
    """A new module in which the hidden width of one pair is ``keep``.

    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> decompose_pair(model, Pair(("0",), "2"), [torch.randn(100, 8)], keep=16)[0]
    Linear(in_features=8, out_features=16, bias=True)
    """
    clone = copy.deepcopy(model)
    down: Any = model.get_submodule(pair.down)
    if not 0 < keep <= down.in_features:
        raise ConfigurationError(
            f"{pair.down} reads {down.in_features} hidden units; keep between 1 and that, not {keep}"
        )
    ups: list[Any] = [model.get_submodule(n) for n in pair.up]
    if any(u.out_features != down.in_features for u in ups):
        sizes = ", ".join(f"{n} {u.out_features}" for n, u in zip(pair.up, ups, strict=True))
        raise ConfigurationError(f"{pair.down} reads {down.in_features} numbers, but {sizes} are made; name a pair")
    dtype = down.weight.dtype
    if pair.kind == "svd":
        if len(ups) != 1:
            raise ConfigurationError(f"an svd pair has one matrix in, not {len(ups)}; use kind='nystrom'")
        moment = Moments(ups[0].in_features)
        observe(model, calibration, {pair.up[0]: lambda given, named: moment.add(given[0])})
        with torch.no_grad():
            first, second, _ = pairs.joint_svd(moment.mean, ups[0].weight, down.weight, keep)
            bias = None if down.bias is None else down.bias.detach().clone()
            if ups[0].bias is not None:
                bias = down.weight @ ups[0].bias + (0 if bias is None else bias)
        clone.set_submodule(pair.up[0], linear(first.to(dtype), None))
        clone.set_submodule(pair.down, linear(second.to(dtype), bias))
        return clone
    moment = Moments(down.in_features)
    observe(model, calibration, {pair.down: lambda given, named: moment.add(given[0])})
    with torch.no_grad():
        mean = moment.mean
        kept = (
            pairs.select_greedily(mean, down.weight.double(), keep).sort().values
            if selection == "greedy"
            else pairs.best_by(pairs.leverage(mean), keep)
        )
        weight, _ = pairs.nystrom(mean, down.weight, kept)
    for name, up in zip(pair.up, ups, strict=True):
        clone.set_submodule(name, linear(up.weight.detach()[kept], None if up.bias is None else up.bias.detach()[kept]))
    clone.set_submodule(pair.down, linear(weight.to(dtype), None if down.bias is None else down.bias.detach().clone()))
    return clone


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer with this weight."""
    from hasten.compress.lowrank.narrow import linear as made

    return made(weight, bias)
