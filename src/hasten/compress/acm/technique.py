"""From a trained model to one that computes as much as each token needs: distil, train gates, tune end to end.

Phase 1: every part is distilled on its own inputs, for all prefixes of learners at once. Phase 2: gates learn how many
learners a token is worth. Phase 3: ``L = task + λ_b |share - β| - λ_e H + λ_d D`` with hard Gumbel choices. "Adaptive
Computation Modules", Wójcik et al. 2023, arXiv:2312.10193. Differs from the paper in: learners may begin as the part's
own hidden units; what a token is worth is told by the loss; before and after tuning all gates lean by one number until
the budget is met, since tuning of a few hundred steps does not get there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from hasten.compress.acm import labels as worth
from hasten.compress.acm.running import (
    adaptive_layers,
    executed_share,
    lean_choices,
    load_map,
    measure_gates,
    set_budget,
    set_fixed,
)
from hasten.compress.acm.targets import Target, find_targets, put, replacement
from hasten.compress.lowrank.moments import evaluating, output_sqnr
from hasten.compress.technique import LayerReport, TechniqueReport, register
from hasten.errors import ConfigurationError
from hasten.train.fit import fit

__all__ = ["ACM", "adaptive_layers", "executed_share", "load_map", "measure_gates", "set_budget", "set_fixed"]

Loss = Callable[[nn.Module, Any], Tensor]
Tell = Callable[[str, float], None]


@register
@dataclass(frozen=True)
class ACM:
    """Adaptive computation in the parts of a model that match ``targets``.

    >>> model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    >>> small = ACM(learners=4, targets=("0>2",), epochs=1, gate_epochs=1, tune_epochs=1)(model, [torch.randn(64, 8)])
    >>> type(small[0]).__name__, small.report.touched
    ('AdaptiveComputation', ('0>2',))
    """

    learners: int = 4
    """of each layer"""
    targets: tuple[str, ...] = ("*.mlp",)
    """patterns of names; ``*.up>down`` is a span of neighbours; a single matrix works too (attention projections)"""
    total_cost: float = 1.0
    """multiply-adds of all learners over those of the part"""
    budget: float = 0.5
    """share of the multiply-adds that tuning aims at, gates included"""
    labels: Literal["loss", "improvement"] = "loss"
    """what gates learn: the learners that lower the loss most for the budget, or the publication's rule"""
    improvement: float = 1.2
    """by that rule a label is the first k whose next learner lowers the error by less than this factor"""
    init: Literal["neurons", "random"] = "neurons"
    """how learners begin"""
    epochs: int = 2
    """of distillation"""
    rate: float = 1e-3
    """of distillation"""
    gate_epochs: int = 1
    gate_rate: float = 1e-2
    tune_epochs: int = 3
    """of end-to-end tuning; 0 leaves it out"""
    tune_rate: float = 5e-4
    tune_gate_rate: float | None = None
    """of the gates in tuning, whose gradients are small and noisy; None: three times ``tune_rate``"""
    budget_weight: float = 1.0
    """of the distance to the budget; the publication has 0.1 over many more steps"""
    entropy_weight: float = 0.05
    """of the spread of choices, against gates that always choose alike"""
    diversity_weight: float = 0.05
    """of differences between examples: easy ones cheap, hard ones dear"""
    measure: bool = False
    """find by measuring from how many tokens on gates pay, and set ``min_tokens`` of every layer so"""
    seed: int = 0

    name: ClassVar[str] = "acm"

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1:
            raise ConfigurationError(f"budget is {self.budget}; give a share of the multiply-adds in (0, 1]")
        if self.learners < 1 or self.total_cost <= 0:
            raise ConfigurationError(
                f"{self.learners} learners at a cost of {self.total_cost} is no layer; give ≥ 1 and > 0"
            )
        if self.improvement <= 1:
            raise ConfigurationError(f"improvement is {self.improvement}; give a factor above 1, such as 1.2")
        if self.labels not in ("loss", "improvement"):
            raise ConfigurationError(f"labels is {self.labels!r}; give 'loss' or 'improvement'")
        if self.init not in ("neurons", "random") or not self.targets:
            raise ConfigurationError(f"init {self.init!r} or targets {self.targets} cannot be used")
        if self.epochs < 1 or self.gate_epochs < 1 or self.tune_epochs < 0:
            raise ConfigurationError("epochs and gate_epochs must be at least 1, tune_epochs at least 0")

    def __call__(
        self,
        model: nn.Module,
        calibration: Sequence[Any] | None = None,
        *,
        train: Sequence[Any] | None = None,
        loss: Loss | None = None,
        progress: Tell | None = None,
    ) -> nn.Module:
        """All three phases: a new module with a ``report``.

        ``calibration``: inputs, no labels. ``train``: batches for ``loss(model, batch)``, by default (inputs, labels)
        for cross-entropy; without them tuning follows the original's outputs on the calibration.
        """
        if not calibration:
            raise ConfigurationError(
                "learners are distilled; give calibration inputs, or batches (inputs, labels) in train"
            )
        tell = progress or (lambda stage, share: None)
        small = self.distil(model, calibration, progress=lambda s, x: tell("distilling", 0.4 * x))
        small = self.gates(
            small, model, calibration, train=train, loss=loss, progress=lambda s, x: tell("gates", 0.4 + 0.1 * x)
        )
        if self.tune_epochs:
            small = self.finetune(
                small, train, loss=loss, teacher=None if train is not None else model,
                inputs=calibration, progress=lambda s, x: tell("tuning", 0.5 + 0.5 * x),
            )  # fmt: skip
        small.train(model.training)
        report = self._report(model, small, calibration)
        if self.measure:
            found = measure_gates(small)
            few = max(found.values())
            note = (
                f"below {few} tokens in a call gates cost more than they save here, so fewer take "
                f"{min(layer.typical for layer in adaptive_layers(small).values())} learners and more; {few} is "
                "min_tokens now"
            )
            report = replace(report, notes=(*report.notes, note))
        small.report = report  # type: ignore[assignment]
        return small

    # ---- phase 1 ----------------------------------------------------------------------------------------------------

    def distil(self, model: nn.Module, calibration: Sequence[Any], *, progress: Tell | None = None) -> nn.Module:
        """Learners in the place of every target, each trained on the original's inputs; no gate is asked yet."""
        targets = find_targets(model, self.targets, calibration)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            layers = nn.ModuleList(
                replacement(model, t, self.learners, self.total_cost, self.init == "neurons") for t in targets
            )
            frozen = copy.deepcopy(model).eval().requires_grad_(False)

            def objective(students: nn.Module, batch: Any) -> Tensor:
                pairs = worth.pairs(frozen, targets, batch)
                total = torch.zeros(())
                for layer, (z, y) in zip(layers, pairs, strict=True):
                    made = layer.prefixes(z)[layer.least :]  # type: ignore[operator]
                    total = total + (made - y).square().mean()
                return total / len(targets)

            fit(layers, list(calibration), objective, self.epochs, self.rate, seed=self.seed, progress=progress)
        clone = copy.deepcopy(model)
        for target, layer in zip(targets, layers, strict=True):
            put(clone, target, layer)
        clone.acm_targets = tuple(targets)  # type: ignore[assignment]
        return clone.train(model.training)

    # ---- phase 2 ----------------------------------------------------------------------------------------------------

    def gates(
        self,
        small: nn.Module,
        model: nn.Module,
        calibration: Sequence[Any],
        *,
        train: Sequence[Any] | None = None,
        loss: Loss | None = None,
        progress: Tell | None = None,
    ) -> nn.Module:
        """Gates that foresee how many learners are worth their cost; learners stay. ``model`` is the original.

        With ``labels="loss"`` tokens matter by the gradient of ``loss`` on ``train``; where only ``train`` is given,
        by that of cross-entropy with classes drawn from the outputs; without, by that of the outputs.
        """
        clone = copy.deepcopy(small)
        targets: Sequence[Target] = clone.acm_targets  # type: ignore[assignment]
        layers = [adaptive_layers(clone)[t.name] for t in targets]
        frozen = copy.deepcopy(model).eval().requires_grad_(False)
        own = loss is not None and train is not None
        batches = list(train or ()) if own else list(calibration)
        scalar = loss if own else worth.of_outputs if train is None else worth.of_classes
        assert scalar is not None

        def weighed(batch: Any) -> list[tuple[Tensor, Tensor]]:
            """Inputs and the weighted errors of every prefix, part by part."""
            rows = worth.weighted_pairs(frozen, targets, batch, scalar)
            with torch.no_grad():
                return [
                    (z, worth.errors(layer.prefixes(z), y, w)) for layer, (z, y, w) in zip(layers, rows, strict=True)
                ]

        sizes = [layer.cost_of(1) - layer.cost_of(0) for layer in layers]
        least = [layer.least for layer in layers]
        price = 0.0

        def objective(gates: nn.Module, batch: Any) -> Tensor:
            total = torch.zeros(())
            if self.labels == "loss":
                given = []
                for (z, wrong), size, k in zip(weighed(batch), sizes, least, strict=True):
                    given.append((z, worth.cheapest(wrong, price * size, k), worth.stake(wrong, price * size, k)))
                total_stake = torch.cat([s for _, _, s in given]).mean() * len(layers)
            else:
                given = []
                for layer, (z, y) in zip(layers, worth.pairs(frozen, targets, batch), strict=True):
                    with torch.no_grad():
                        least_k = max(layer.least, 1)
                        labels = worth.first_that_helps_little(layer.prefixes(z), y, self.improvement, least_k)
                    given.append((z, labels, torch.ones(len(z))))
                total_stake = torch.tensor(float(len(layers)))
            for layer, (z, labels, stake) in zip(layers, given, strict=True):
                each = functional.cross_entropy(layer.scores(z), labels - layer.least, reduction="none")
                total = total + (each * stake).mean() / total_stake
            return total

        chosen = nn.ModuleList(layer.gate for layer in layers)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            if self.labels == "loss":
                some = [weighed(batch) for batch in batches[:8]]
                joined = [torch.cat([row[i][1] for row in some], 1) for i in range(len(layers))]
                aim = sum(self.budget * layer.cost_of(layer.learners) - layer.gate_cost for layer in layers)
                price = worth.find_price(joined, sizes, least, aim)
            fit(chosen, batches, objective, self.gate_epochs, self.gate_rate, seed=self.seed, progress=progress)
        clone.train(small.training)
        set_fixed(clone, None)
        return clone

    # ---- phase 3 ----------------------------------------------------------------------------------------------------

    def finetune(
        self,
        small: nn.Module,
        train: Sequence[Any] | None,
        *,
        budget: float | None = None,
        loss: Loss | None = None,
        teacher: nn.Module | None = None,
        inputs: Sequence[Any] | None = None,
        progress: Tell | None = None,
    ) -> nn.Module:
        """Everything is trained together towards the task and the budget.

        Labels are needed unless ``teacher`` (the original) and ``inputs`` are given: then its outputs are followed.
        """
        if train is None and (teacher is None or inputs is None):
            raise ConfigurationError("there are no labels; give train, or teacher and inputs to follow the original")
        share = self.budget if budget is None else budget
        if not 0 < share <= 1:
            raise ConfigurationError(f"budget is {share}; give a share of the multiply-adds in (0, 1]")
        clone = copy.deepcopy(small)
        set_fixed(clone, None)
        layers = list(adaptive_layers(clone).values())
        task = loss or _cross_entropy
        if train is None:
            assert teacher is not None
            frozen = copy.deepcopy(teacher).eval().requires_grad_(False)
            batches: Sequence[Any] = list(inputs or ())
            task = _follow(frozen)
        else:
            batches = list(train)
        full = sum(layer.cost_of(layer.learners) for layer in layers)

        def objective(one: nn.Module, batch: Any) -> Tensor:
            total = task(one, batch)
            spent = torch.zeros(())
            entropy = torch.zeros(())
            loads = torch.zeros(())  # of each example, over all layers
            for layer in layers:
                choice = layer.choice
                assert choice is not None
                steps = torch.arange(layer.least, layer.learners + 1, dtype=choice.dtype)
                mean = (choice * steps).sum(-1)
                spent = spent + layer.gate_cost + (layer.cost_of(1) - layer.gate_cost) * mean.mean()
                shares = choice.flatten(1, -2).mean(1) if choice.dim() > 2 else choice
                whole = -(shares * (shares + 1e-9).log()).sum(-1).mean() / torch.tensor(float(choice.shape[-1])).log()
                entropy = entropy + whole
                loads = loads + (mean.flatten(1).mean(1) if mean.dim() > 1 else mean) / (layer.learners * len(layers))
            total = total + self.budget_weight * (spent / full - share).abs()
            total = total - self.entropy_weight * entropy / len(layers)
            return total - 2 * self.diversity_weight * (loads[:, None] - loads[None, :]).abs().mean()

        def order(epoch: int) -> list[Any]:
            generator = torch.Generator().manual_seed(self.seed * 1009 + epoch)
            return [batches[i] for i in torch.randperm(len(batches), generator=generator)]

        seen: list[Any]
        if train is None:
            seen = list(batches[:8])
        else:
            seen = [b[0] if isinstance(b, (tuple, list)) else b for b in batches[:8]]
        lean_choices(clone, seen, share)  # so that what is tuned is a model of this budget from the first step on
        gates = [p for layer in layers for p in layer.gate.parameters()]
        held = {id(p) for p in gates}
        rate = 3 * self.tune_rate if self.tune_gate_rate is None else self.tune_gate_rate
        groups = [
            {"params": [p for p in clone.parameters() if p.requires_grad and id(p) not in held], "lr": self.tune_rate},
            {"params": gates, "lr": rate},
        ]
        with torch.random.fork_rng(devices=[]):
            fit(
                clone, order, objective, max(1, self.tune_epochs), self.tune_rate, seed=self.seed, parameters=groups,
                progress=progress,
            )  # fmt: skip
        set_budget(clone, seen, share)  # choices by argmax spend otherwise than those by lot in training
        clone.train(small.training)
        return clone

    def _report(self, model: nn.Module, small: nn.Module, calibration: Sequence[Any]) -> TechniqueReport:
        targets: Sequence[Target] = small.acm_targets  # type: ignore[assignment]
        with evaluating(small), torch.no_grad():
            counts: dict[str, list[float]] = {}
            shares = []
            for example in calibration[:8]:
                small(example)
                shares.append(executed_share(small))
                for name, layer in adaptive_layers(small).items():
                    assert layer.last is not None
                    counts.setdefault(name, []).append(float(layer.last.double().mean()))
        reports = []
        for target in targets:
            layer = adaptive_layers(small)[target.name]
            mean = sum(counts[target.name]) / len(counts[target.name])
            layer.typical = max(layer.least, min(layer.learners, round(mean)))
            before = sum(
                p.numel() * p.element_size() for n in target.names for p in model.get_submodule(n).parameters()
            )
            after = sum(p.numel() * p.element_size() for p in layer.parameters())
            action = f"{layer.learners} learners of {layer.size}"
            reports.append(LayerReport(target.label, action, f"{mean:.2f} run on average", before, after))
        share = sum(shares) / len(shares)
        notes = [
            f"{share:.1%} of the adaptive layers' multiply-adds run, gates included; aimed at {self.budget:.0%}",
            "few tokens at a time may take longer than without gates; measure=True finds from how many on they pay",
        ]
        measured = {"sqnr": output_sqnr(model, small, calibration[:4]), "share": share}
        return TechniqueReport(self.name, tuple(reports), tuple(notes), measured)


def _cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return functional.cross_entropy(model(x), y)


def _follow(teacher: nn.Module) -> Loss:
    """Distance to the teacher's outputs relative to their size."""

    def loss(model: nn.Module, x: Any) -> Tensor:
        with torch.no_grad():
            wanted = teacher(x)
        gap: Tensor = (model(x) - wanted).square().mean() / wanted.square().mean().clamp_min(1e-12)
        return gap

    return loss
