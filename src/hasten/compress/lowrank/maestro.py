"""Maestro: low rank as part of training, its rank chosen layer by layer, and a family of sizes from one run.

"Maestro: Uncovering Low-Rank Structures via Trainable Decomposition", Horváth et al. 2023, arXiv:2308.14929. Loss: full
pass on the labels, a pass with one layer cut to a prefix on the full pass's distribution, and the group lasso
(:mod:`ordered`). Differs from the paper in: AdamW with a cosine in place of SGD; components are dropped where their
tail is below a share of the layer's whole; sizes are cut by loss on training data per multiply-add saved; on request
(``down_to``) every second cut pass is of a whole small size, which no pass that cuts one layer ever is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from hasten.budget import format_quantity, parse_quantity
from hasten.clock import Clock
from hasten.compress.lowrank.cutting import batch_loss, cut_to, recalibrate, share_of, uses_of
from hasten.compress.lowrank.moments import evaluating, output_sqnr
from hasten.compress.lowrank.ordered import (
    OrderedConv2d,
    OrderedLinear,
    RankSampler,
    group_lasso,
    ordered_layers,
)
from hasten.compress.replace import replace_module
from hasten.compress.technique import LayerReport, TechniqueReport, register
from hasten.errors import ConfigurationError
from hasten.measure.counting import call
from hasten.measure.latency import Protocol, compare
from hasten.train.fit import fit

__all__ = ["Family", "Maestro", "MaestroFit", "Member", "recalibrate"]

_RULES = Protocol(warmup=2, warmup_time=0.0, min_samples=15, min_time=0.05, max_time=10.0)
"""How sizes of a family are timed."""

Loss = Callable[[Any, Any], Tensor]


@register
@dataclass(frozen=True)
class Maestro:
    """Training of ordered low-rank layers.

    >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> batch = (torch.randn(64, 16), torch.randint(0, 4, (64,)))
    >>> small = Maestro(epochs=2, ignore_last=False)(model, [batch])
    >>> sorted(small.fit.ranks)
    ['0', '2']
    """

    epochs: int = 20
    """passes over the training batches"""
    rate: float = 1e-3
    """peak learning rate"""
    group_lasso: float = 1e-5
    """weight of the group lasso; 1e-6 to 1e-3"""
    shrink: float = 1e-2
    """components go whose tail is below this share of the layer's importance; 0 keeps all"""
    share: float | None = None
    """multiply-adds of the decomposed layers over the dense ones' to which ranks fall while training goes on; None
    leaves ranks to the group lasso"""
    settle: float = 0.34
    """share of the epochs after which ranks have fallen to ``share``; what is left then trains as it is"""
    down_to: float | None = None
    """for a family: every second cut pass cuts all layers at once, to a size drawn between this share of the dense
    multiply-adds and all; None cuts one layer at a time, as published, and then no small size was ever trained"""
    full_pass: bool = True
    """train the whole model on the labels beside the cut one; False trains the cut one alone, on the labels"""
    ignore_first: int = 0
    """so many layers at the beginning stay as they are"""
    ignore_last: bool = True
    """the last layer stays as it is"""
    ordered: bool = True
    """False draws no prefixes: factors without an order, for comparison"""
    rows: int = 0
    """above 0: whether a layer is deployed as one matrix or two is measured at so many rows; else by multiply-adds"""
    seed: int = 0
    """draws prefixes"""

    name: ClassVar[str] = "maestro"

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.rate <= 0:
            raise ConfigurationError(
                f"epochs {self.epochs} at rate {self.rate} train nothing; give at least 1 and above 0"
            )
        if self.group_lasso < 0 or not 0 <= self.shrink < 1:
            raise ConfigurationError(
                f"group_lasso {self.group_lasso} and shrink {self.shrink}; give ≥ 0, and 0 to below 1"
            )
        if self.share is not None and not (0 < self.share <= 1 and 0 < self.settle < 1):
            raise ConfigurationError(
                f"share {self.share} and settle {self.settle}; give a share of the dense multiply-adds in (0, 1], and "
                "one of the epochs between 0 and 1"
            )
        if self.down_to is not None and not (0 < self.down_to < 1 and self.ordered):
            raise ConfigurationError(
                f"down_to is {self.down_to}; give a share of the dense multiply-adds between 0 and 1, with ordered=True"
            )
        if self.ignore_first < 0 or self.rows < 0:
            raise ConfigurationError(
                f"ignore_first {self.ignore_first} and rows {self.rows} are counts; give 0 or more"
            )

    def __call__(
        self,
        model: nn.Module,
        calibration: Sequence[Any] | None = None,
        *,
        loss: Loss | None = None,
        progress: Callable[[str, float], None] | None = None,
    ) -> nn.Module:
        """A new, trained module with ``report`` and ``fit`` (:class:`MaestroFit`).

        ``calibration``: batches (inputs, labels) for ``loss`` (cross-entropy where not given); batches without labels
        train towards what ``model`` gives.
        """
        if not calibration:
            raise ConfigurationError(
                "maestro trains; give batches (inputs, labels), or inputs alone to follow the model"
            )
        batches = [b if isinstance(b, (tuple, list)) and len(b) == 2 else (b, None) for b in calibration]
        labelled = batches[0][1] is not None
        if not labelled:
            with evaluating(model), torch.no_grad():
                batches = [(x, model(x)) for x, _ in batches]
        judge: Loss = loss or (functional.cross_entropy if labelled else functional.mse_loss)
        whole, reports = self._decompose(model)
        layers = ordered_layers(whole)
        if not layers:
            raise ConfigurationError("no layer is left to decompose; lower ignore_first, or set ignore_last=False")
        sampler = RankSampler(self.seed)
        uses = uses_of(whole, batches[0][0]) if self.share is not None or self.down_to is not None else {}
        settled = max(1, round(self.settle * self.epochs))
        done = steps = 0
        follow = loss is None and labelled

        def objective(one: nn.Module, batch: Any) -> Tensor:
            nonlocal steps
            x, y = batch
            steps += 1
            total = torch.zeros(())
            made = None
            final = self.share is not None and done >= settled  # nothing is left to drop, so order serves nothing
            if self.full_pass or not self.ordered or final:
                made = one(x)
                total = total + judge(made, y)
            if self.ordered and not final:
                every = self.down_to is not None and steps % 2 == 0
                drawn: Any = sampler.sized(layers, uses, self.down_to or 1.0) if every else sampler.drawn(layers)
                with drawn:
                    part = one(x)
                if made is None:
                    total = total + judge(part, y)
                elif follow:
                    total = total + functional.cross_entropy(part, made.detach().softmax(-1))
                else:
                    total = total + (judge(part, y) if labelled else functional.mse_loss(part, made.detach()))
            return total + self.group_lasso * group_lasso(one) if self.group_lasso and not final else total

        history: list[dict[str, int]] = []

        def cut(epoch: int, value: float) -> None:
            nonlocal done
            for layer in layers.values():
                if self.shrink and done < settled:
                    layer.shrink(self.shrink, least=1)
            done = epoch + 1
            if self.share is not None and done <= settled:
                cut_to(layers, self.share ** (done / settled), uses, lambda: batch_loss(whole, judge, batches[:8]))
            history.append({n: layer.rank for n, layer in layers.items()})

        def order(epoch: int) -> list[Any]:
            generator = torch.Generator().manual_seed(self.seed * 1009 + epoch)
            return [batches[i] for i in torch.randperm(len(batches), generator=generator)]

        with torch.random.fork_rng(devices=[]):
            losses = fit(
                whole, order, objective, self.epochs, self.rate, seed=self.seed, progress=progress, on_epoch=cut
            )
        whole.eval()
        recalibrate(whole, [x for x, _ in batches])  # passes of prefixes have moved the running statistics too
        found = MaestroFit(whole, {n: layer.rank for n, layer in layers.items()}, tuple(history), tuple(losses), judge)
        small = found.deploy(rows=self.rows, example=batches[0][0] if self.rows else None)
        small.train(model.training)
        notes = [
            f"{len(layers)} layers in ordered components over {self.epochs} epochs; ranks "
            + ", ".join(f"{n} {layer.left.shape[1]} to {layer.rank}" for n, layer in layers.items())
        ]
        if self.share is not None:
            notes.append(f"{share_of(layers, uses):.1%} of the multiply-adds; {self.share:.1%} were asked for")
        if any(layer.rank == 1 for layer in layers.values()):
            ones = ", ".join(n for n, layer in layers.items() if layer.rank == 1)
            notes.append(f"rank 1 was kept in {ones}; lower group_lasso or shrink if quality suffers")
        for name, layer in layers.items():
            size = layer.dense_size * layer.left.element_size()
            after = layer.size() * layer.left.element_size()
            dense = layer.size() == layer.dense_size
            reports.append(
                LayerReport(
                    name, "one matrix" if dense else f"rank {layer.rank}", f"of {layer.left.shape[1]}", size, after
                )
            )
        places = {n: i for i, (n, _) in enumerate(model.named_modules())}
        reports.sort(key=lambda r: places[r.layer])
        measured = {"sqnr": output_sqnr(model, small, [b[0] for b in batches[:4]])}
        small.report = TechniqueReport(self.name, tuple(reports), tuple(notes), measured)  # type: ignore[assignment]
        small.fit = found  # type: ignore[assignment]
        return small

    def _decompose(self, model: nn.Module) -> tuple[nn.Module, list[LayerReport]]:
        """The model with ordered layers at full rank, and reports of those that stay."""
        owners: dict[int, list[str]] = {}
        for name, module in model.named_modules():
            for parameter in module.parameters(recurse=False):
                owners.setdefault(id(parameter), []).append(name)
        whole = copy.deepcopy(model)
        # Exact types: a subclass may compute something else with the same weight.
        kinds: dict[type[Any], Any] = {nn.Linear: OrderedLinear, nn.Conv2d: OrderedConv2d}
        found = [(n, m) for n, m in model.named_modules() if type(m) in kinds]
        reports = []
        for index, (name, module) in enumerate(found):
            weight: Any = module.weight
            size = weight.numel() * weight.element_size()
            reason = ""
            if len(owners[id(weight)]) > 1:
                raise ConfigurationError(
                    f"{' and '.join(owners[id(weight)])} share one weight, which has no two kinds of factors; untie "
                    "them, or give them layers of their own"
                )
            if index < self.ignore_first:
                reason = "one of the first layers"
            elif self.ignore_last and index == len(found) - 1:
                reason = "the last layer"
            elif isinstance(module, nn.Conv2d) and module.groups != 1:
                reason = f"{module.groups} groups have no common factors"
            if reason:
                reports.append(LayerReport(name, "kept", reason, size, size))
                continue
            new = kinds[type(module)].of(module)
            whole = replace_module(whole, name, new)
        return whole, reports


@dataclass(frozen=True)
class Member:
    """One size of a family."""

    share: float
    """multiply-adds of the decomposed layers over those of the dense ones"""
    ranks: dict[str, int]
    """rank of every layer"""
    loss: float
    """on the calibration, after its normalisation statistics were computed anew"""
    model: nn.Module
    """deployed"""


class Family(list[Member]):
    """Members from the largest to the smallest."""

    def under(self, latency: float | str, example: Any, *, clock: Clock | None = None) -> Member:
        """The member of the least loss whose median time for ``example`` is at most ``latency`` (seconds, or a text
        such as ``2ms``), all measured in turns. Raises :class:`~hasten.errors.ConfigurationError` where none is.
        """
        limit = parse_quantity(latency, "time") if isinstance(latency, str) else float(latency)
        calls = {str(i): partial(call, member.model.eval(), example) for i, member in enumerate(self)}
        with torch.inference_mode():
            samples = compare(calls, _RULES, clock=clock).samples
        times = [samples[str(i)].median for i in range(len(self))]
        fast = [member for member, time in zip(self, times, strict=True) if time <= limit]
        if not fast:
            raise ConfigurationError(
                f"the fastest of {len(self)} sizes takes {format_quantity(min(times), 'time')}, above "
                f"{format_quantity(limit, 'time')}; ask for smaller budgets, or for more time"
            )
        return min(fast, key=lambda member: member.loss)


@dataclass(frozen=True)
class MaestroFit:
    """What a training run found."""

    whole: nn.Module
    """the trained module with ordered layers"""
    ranks: dict[str, int]
    """components that are left"""
    history: tuple[dict[str, int], ...]
    """ranks after each epoch"""
    losses: tuple[float, ...]
    """mean training loss of each epoch"""
    judge: Loss = field(repr=False)
    """loss of outputs and labels"""

    def deploy(self, ranks: dict[str, int] | None = None, *, rows: int = 0, example: Any = None) -> nn.Module:
        """Plain layers of these ranks; one matrix where that is no dearer (or, with ``rows``, measured to be
        faster)."""
        small = copy.deepcopy(self.whole)
        inputs: dict[str, Tensor] = {}
        if rows:
            inputs = _inputs(self.whole, example, rows)
        for name, layer in ordered_layers(small).items():
            rank = (ranks or self.ranks)[name]
            dense = layer.size(rank) >= layer.dense_size
            if rows and rank:
                dense = _dense_is_faster(layer, rank, inputs[name])
            plain: Any = layer
            new = plain.deployed(rank, dense)
            new.train(layer.training)
            small = replace_module(small, name, new)
        return small

    def family(
        self,
        budgets: Sequence[float],
        calibrate: Sequence[Any],
        *,
        step: float = 0.1,
        progress: Callable[[str, float], None] | None = None,
    ) -> Family:
        """Nested models whose decomposed layers take these shares of the dense multiply-adds, without training.

        Greedy: the ``step`` of components goes whose loss on ``calibrate`` (batches of inputs and labels: training
        data) rises least per multiply-add saved. Normalisation statistics are computed anew for each member.
        """
        if not budgets or any(not 0 < b <= 1 for b in budgets):
            raise ConfigurationError(f"budgets are {tuple(budgets)}; give shares of the dense multiply-adds in (0, 1]")
        work = copy.deepcopy(self.whole)
        layers = ordered_layers(work)
        uses = uses_of(work, calibrate[0][0])
        members = Family()
        start = share_of(layers, uses)

        def tell(now: float) -> None:
            if progress is not None:
                progress("cutting", min(1.0, (start - now) / max(start - min(budgets), 1e-9)))

        for budget in sorted(budgets, reverse=True):
            spent = cut_to(
                layers, budget, uses, lambda: batch_loss(work, self.judge, calibrate), step=step, tell=tell
            )  # fmt: skip
            member = copy.deepcopy(work)
            recalibrate(member, [b[0] for b in calibrate])
            ranks = {n: layer.rank for n, layer in layers.items()}
            fresh = MaestroFit(member, ranks, (), (), self.judge)
            members.append(Member(spent, ranks, batch_loss(member, self.judge, calibrate), fresh.deploy()))
        return members


def _inputs(model: nn.Module, example: Any, rows: int) -> dict[str, Tensor]:
    """An input of every ordered layer, cut or repeated to ``rows`` along its first axis."""
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda m, given, n=name: seen.__setitem__(n, given[0].detach()))
        for name, layer in ordered_layers(model).items()
    ]
    with evaluating(model), torch.no_grad():
        model(example)
    for hook in hooks:
        hook.remove()
    return {n: x[torch.arange(rows) % len(x)].contiguous() for n, x in seen.items()}


def _dense_is_faster(layer: Any, rank: int, x: Tensor) -> bool:
    one, two = layer.deployed(rank, True).eval(), layer.deployed(rank, False).eval()
    rules = Protocol(warmup=2, warmup_time=0.0, min_samples=9, max_samples=200, min_time=0.02)
    with torch.inference_mode():
        times = compare({"one": lambda: one(x), "two": lambda: two(x)}, rules)
    return times.samples["one"].median <= times.samples["two"].median
