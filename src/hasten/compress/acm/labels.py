"""What gates learn to say before anything is tuned: how many learners a token is worth.

The publication's rule takes the first k whose next learner lowers a token's error by less than a fifth. It sees neither
how large the error is nor whether the output hears it: learners that were distilled well all pass, and every token is
told to run all of them. The rule here asks for the least ``w |h(z, k) - y|² + price k``, w the squared gradient of the
loss at that token of the original, and one price for all parts, found by bisection so that labels cost the budget.
"Adaptive Computation Modules", Wójcik et al. 2023, arXiv:2312.10193. Differs from the paper in: this second rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hasten.compress.acm.targets import Target, tokens_of
from hasten.errors import ConfigurationError
from hasten.measure.counting import call

__all__ = ["cheapest", "find_price", "first_that_helps_little", "pairs", "stake", "weighted_pairs"]

Scalar = Callable[[nn.Module, Any], Tensor]


def pairs(model: nn.Module, targets: Sequence[Target], batch: Any) -> list[tuple[Tensor, Tensor]]:
    """What each part is given and gives, as rows (tokens, width)."""
    given: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}
    hooks = []
    for target in targets:
        name = target.name
        first, last = (model.get_submodule(n) for n in (target.names[0], target.names[-1]))
        hooks.append(
            first.register_forward_pre_hook(lambda m, a, n=name: given.__setitem__(n, tokens_of(a[0].detach())))
        )
        hooks.append(last.register_forward_hook(lambda m, a, r, n=name: made.__setitem__(n, tokens_of(r.detach()))))
    try:
        with torch.no_grad():
            call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return [(given[t.name], made[t.name]) for t in targets]


def weighted_pairs(
    model: nn.Module, targets: Sequence[Target], batch: Any, scalar: Scalar
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """:func:`pairs`, and the squared gradient of ``scalar(model, batch)`` at what each part gives, (tokens,).

    ``model`` needs no parameter with gradients: they begin at the outputs of the parts.
    """
    given: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}

    def keep(module: nn.Module, arguments: Any, result: Tensor, name: str) -> Tensor:
        held = result if result.requires_grad else result.detach().requires_grad_()
        held.retain_grad()
        made[name] = held
        return held.clone()  # what follows may work in place

    hooks = []
    for target in targets:
        name = target.name
        first, last = (model.get_submodule(n) for n in (target.names[0], target.names[-1]))
        hooks.append(
            first.register_forward_pre_hook(lambda m, a, n=name: given.__setitem__(n, tokens_of(a[0].detach())))
        )
        hooks.append(last.register_forward_hook(lambda m, a, r, n=name: keep(m, a, r, n)))
    try:
        with torch.enable_grad():
            value = scalar(model, batch)
            if value.requires_grad:
                value.backward()
    finally:
        for hook in hooks:
            hook.remove()
    if all(x.grad is None for x in made.values()):
        raise ConfigurationError(
            f"no gradient of the output reaches {', '.join(t.label for t in targets)}, so nothing says which tokens "
            "matter; give labels='improvement', which asks for none"
        )
    found = []
    for target in targets:
        y = made[target.name]
        grad = torch.zeros_like(y) if y.grad is None else y.grad
        found.append((given[target.name], tokens_of(y.detach()), tokens_of(grad).square().sum(-1)))
    return found


def output_of(model: nn.Module, batch: Any) -> Tensor:
    """The model's output, or the logits or first tensor of what it returns."""
    made = call(model, batch)
    if isinstance(made, Tensor):
        return made
    logits = getattr(made, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    parts = list(made.values()) if isinstance(made, Mapping) else list(made) if isinstance(made, (tuple, list)) else []
    for part in parts:
        if isinstance(part, Tensor) and part.is_floating_point():
            return part
    raise ConfigurationError(
        f"the model returns {type(made).__name__}, which holds no tensor that can tell which tokens matter; give "
        "labels='improvement'"
    )


def of_classes(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of logits (…, classes) with classes drawn from them: its squared gradient is Fisher's."""
    logits = output_of(model, batch).flatten(0, -2)
    drawn = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0]
    return functional.cross_entropy(logits, drawn, reduction="sum")


def of_outputs(model: nn.Module, batch: Any) -> Tensor:
    """Outputs in a random direction: the squared gradient is, in the mean, how far an error moves them."""
    made = output_of(model, batch)
    return (made * torch.randn_like(made)).sum()


def errors(prefixes: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """``w |h(z, k) - y|²``: prefixes (learners + 1, tokens, width) -> (learners + 1, tokens)."""
    return (prefixes - y).square().sum(-1) * weight


def cheapest(wrong: Tensor, price: float, least: int) -> Tensor:
    """The k of at least ``least`` with the least ``wrong[k] + price k``: (learners + 1, tokens) -> (tokens,).

    >>> wrong = torch.tensor([[8.0, 0.5], [4.0, 0.3], [1.0, 0.2]])
    >>> cheapest(wrong, 1.0, 0).tolist(), cheapest(wrong, 3.5, 0).tolist()
    ([2, 0], [1, 0])
    """
    steps = torch.arange(least, len(wrong), dtype=wrong.dtype, device=wrong.device)
    return (wrong[least:] + price * steps[:, None]).argmin(0) + least


def stake(wrong: Tensor, price: float, least: int, *, most: float = 10.0) -> Tensor:
    """How much a token's label counts: what its worst choice would cost above its best, 1 for a token that is worth
    nothing and ``most`` at most, (tokens,).

    A class token is one of fifty, yet all that the last part's output is read from: gates that count tokens alike
    forget it. Without a bound a few tokens are all that gates learn.

    >>> stake(torch.tensor([[9.0, 0.0, 99.0], [1.0, 0.0, 0.0]]), 2.0, 0).tolist()
    [3.0, 1.0, 10.0]
    """
    steps = torch.arange(least, len(wrong), dtype=wrong.dtype, device=wrong.device)
    costs = wrong[least:] + price * steps[:, None]
    least_of_all = max(price * (len(steps) - 1), 1e-30)
    return ((costs.amax(0) - costs.amin(0)) / least_of_all).clamp(max=most)


def find_price(wrong: Sequence[Tensor], sizes: Sequence[float], least: Sequence[int], aim: float) -> float:
    """The price of a multiply-add at which the learners that :func:`cheapest` takes cost ``aim`` a token, all together.

    ``wrong``: one (learners + 1, tokens) for each part; ``sizes``: multiply-adds of one learner of it.
    """

    def spent(price: float) -> float:
        return sum(
            size * float(cheapest(w, price * size, k).double().mean())
            for w, size, k in zip(wrong, sizes, least, strict=True)
        )

    top = max(float(w.max()) / size for w, size in zip(wrong, sizes, strict=True))
    if top <= 0 or aim <= spent(top):
        return max(top, 0.0)
    low, high = top * 1e-12, top
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if spent(middle) > aim else (low, middle)
    return high


def first_that_helps_little(prefixes: Tensor, y: Tensor, improvement: float, first: int) -> Tensor:
    """The first k of at least ``first`` with ``e_{k-1} / e_k < improvement``, the last where there is none: (tokens,).

    prefixes (learners + 1, tokens, width).
    """
    wrong = (prefixes - y).norm(dim=-1).clamp_min(1e-12)
    small = wrong[:-1] / wrong[1:] < improvement  # entry k - 1: learner k helps little
    last = wrong.shape[0] - 1
    steps = torch.arange(1, last + 1, device=y.device)[:, None].expand_as(small)
    found = torch.where(small & (steps >= first), steps, torch.full_like(steps, last))
    return found.amin(0)
