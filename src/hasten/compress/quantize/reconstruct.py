"""The rounding of all layers of a block learned together, so that the block's output comes back, not each layer's.

The block runs on the inputs that the rounded model gives it; its goal is what the float block computed from the float
model's inputs. Weights move between the two grid values around the float weight (see :mod:`rounding`); the block's
static input steps stay. Blocks are taken in the order in which they run.

"BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction" https://arxiv.org/abs/2102.05426
Differs from the paper in: plain squared error of the block's output, no Fisher weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn

from hasten.compress.quantize.base import Quantized
from hasten.compress.quantize.layers import Simulated, convolve
from hasten.compress.quantize.passes import evaluating
from hasten.compress.quantize.rounding import LearnedRounding, beta, inverse_soft, soft
from hasten.compress.quantize.steps import Step, Work
from hasten.compress.quantize.targets import matrix, put
from hasten.compress.values import named_value
from hasten.errors import ConfigurationError
from hasten.measure.counting import call

__all__ = ["BlockReconstruction", "find_blocks"]


def find_blocks(model: nn.Module, layers: list[str]) -> list[str]:
    """Paths of the members of the first list or sequence of modules that hold at least two of ``layers`` each."""
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        names = [f"{path}.{name}" if path else name for name, _ in module.named_children()]
        held = [n for n in names if sum(layer.startswith(n + ".") for layer in layers) >= 2]
        if len(held) >= 2 or (held and len(held) == len(names)):
            return held
    return []


@named_value
@dataclass(frozen=True)
class BlockReconstruction(Step):
    """Learn the rounding block by block, after every layer was rounded.

    >>> BlockReconstruction(iterations=200).blocks
    ()
    """

    blocks: tuple[str, ...] = ()
    """patterns of the blocks' paths; empty: the members of the first list of modules with several layers each"""
    iterations: int = 500
    """steps of Adam for each block"""
    rate: float = 3e-2
    """its rate"""
    strength: float = 0.3
    """of the term that closes open roundings, against the block's relative error before"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if self.iterations < 1 or self.rate <= 0:
            raise ConfigurationError(
                f"{self.iterations} iterations at rate {self.rate} learn nothing; give 500 and 0.03"
            )

    @property
    def solves(self) -> bool:
        """By the outputs of blocks: with fewer rows than inputs many roundings give the same."""
        return True

    def finish(self, work: Work, original: nn.Module) -> None:
        """Change the codes of the simulated layers in place."""
        everything = [name for name, _ in work.model.named_modules()]
        chosen = [n for n in everything if any(fnmatchcase(n, p) for p in self.blocks)]
        chosen = chosen if self.blocks else find_blocks(original, work.layers)
        if not chosen:
            raise ConfigurationError("no block holds two layers; name them: BlockReconstruction(blocks=('layers.*',))")
        better = 0
        for index, path in enumerate(chosen):
            work.told(f"reconstruct {path}", index / len(chosen))
            better += self._block(work, original, path)
        work.notes.append(f"{better} of {len(chosen)} blocks came closer to their float outputs by reconstruction")

    def _block(self, work: Work, original: nn.Module, path: str) -> bool:
        """Whether the block came closer."""
        data = work.needs_data("BlockReconstruction")
        goals = [_first(out).detach() for _, out in _calls(original, path, data.inputs)]
        given = [arguments for arguments, _ in _calls(work.model, path, data.inputs)]
        block = work.model.get_submodule(path)
        trained = copy.deepcopy(block)
        modes = [m.training for m in trained.modules()]
        trained.eval()
        softened: list[tuple[str, _Soft]] = []
        for name, module in list(trained.named_modules()):
            if isinstance(module, Simulated) and module.format.bits <= 8:
                full = f"{path}.{name}" if name else path
                source = cast("Tensor | None", getattr(original.get_submodule(full), "weight", None))
                if source is None:
                    continue
                layer = _Soft(module, _float_weight(work, original, full, module))
                trained = put(trained, name, layer)
                softened.append((name, layer))
        del modes
        if not softened:
            return False
        for parameter in trained.parameters():
            parameter.requires_grad_(False)
        variables = [layer.v.requires_grad_() for _, layer in softened]
        power = sum(float(g.float().square().sum()) for g in goals)
        before = _error(block, given, goals) / power
        optimiser = torch.optim.Adam(variables, lr=self.rate)
        schedule = LearnedRounding(self.iterations, self.rate)
        order = torch.Generator().manual_seed(work.seed)
        numel = sum(v.numel() for v in variables)
        for iteration in range(self.iterations):
            along = iteration / self.iterations
            index = int(torch.randint(len(given), (1,), generator=order))
            with torch.enable_grad():
                out = _first(trained(*given[index][0], **given[index][1]))
                loss = (out.float() - goals[index].float()).square().sum() * len(given) / power / max(before, 1e-12)
                if along >= schedule.warm_up:
                    power_of = beta(along, schedule)
                    pull = torch.stack([(1 - (2 * soft(v) - 1).abs().pow(power_of)).sum() for v in variables]).sum()
                    loss = loss + self.strength * 20 * pull / numel
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        candidate = copy.deepcopy(block)
        for name, layer in softened:
            candidate = put(candidate, name, layer.hard())
        if _error(candidate, given, goals) / power >= before:
            return False
        for module, training in zip(candidate.modules(), [m.training for m in block.modules()], strict=False):
            module.training = training
        work.model = put(work.model, path, candidate)
        return True


class _Soft(nn.Module):
    """A simulated layer with open roundings."""

    def __init__(self, simulated: Simulated, weight: Tensor) -> None:
        super().__init__()
        self.simulated = simulated
        quantized = simulated.quantized()
        fmt, shape = simulated.format, simulated.matrix
        scale, zero = fmt.spread(quantized.scales, shape), fmt.spread(quantized.zeros, shape)
        self.down, up = fmt.neighbours(weight, scale, zero)
        self.step = up - self.down
        # Start where the rounded weight is, half of the way towards the true share.
        share = torch.where(
            self.step > 0, (weight - self.down) / self.step.clamp(min=1e-30), torch.full_like(weight, 0.5)
        )
        chosen = (quantized.dequantize() > self.down + self.step / 2).float()
        self.v = nn.Parameter(inverse_soft((share.clamp(0, 1) + chosen) / 2))
        self.quantized = quantized

    def forward(self, x: Tensor) -> Tensor:
        """As the layer, with weights between the grid's values."""
        inner = self.simulated
        if inner.activation is not None:
            x = inner.activation(x)
        weight = (self.down + soft(self.v) * self.step).view(inner.layer["shape"])
        return convolve(x, weight, inner.bias, inner.layer)

    def hard(self) -> Simulated:
        """The layer with each weight on one side."""
        inner = self.simulated
        values = torch.where(self.v.detach() >= 0, self.down + self.step, self.down)
        new: Quantized = inner.format.quantize(values, self.quantized.scales, self.quantized.zeros)
        made = Simulated(inner.layer, new, inner.bias, inner.activation)
        return made.train(inner.training)


def _float_weight(work: Work, original: nn.Module, path: str, layer: Simulated) -> Tensor:
    """The weight before it was rounded, after the steps that rewrote the model."""
    known = work.floats.get(path)
    return known if known is not None else matrix(original.get_submodule(path))


def _calls(model: nn.Module, path: str, inputs: list[Any]) -> Iterator[tuple[tuple[Any, Any], Any]]:
    """((arguments, named arguments), output) of the block for each input."""
    for example in inputs:
        caught: list[Any] = []

        def hook(module: nn.Module, arguments: Any, named: Any, result: Any, caught: list[Any] = caught) -> None:
            caught.append(((arguments, named), result))

        handle = model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)
        try:
            with evaluating(model):
                call(model, example)
        finally:
            handle.remove()
        yield from caught


def _first(result: Any) -> Tensor:
    return cast(Tensor, result[0] if isinstance(result, (tuple, list)) else result)


def _error(block: nn.Module, given: list[tuple[Any, Any]], goals: list[Tensor]) -> float:
    total = 0.0
    with evaluating(block):
        for (arguments, named), goal in zip(given, goals, strict=True):
            total += float((_first(block(*arguments, **named)).float() - goal.float()).square().sum())
    return total
