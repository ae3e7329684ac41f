"""Verification: which guessed tokens stand. The one place where that is decided.

Two exact rules. *Coupled* (``accept``): the model's own choice at a position is a function of its logits and of the
number that belongs to (seed, position); a guess stands if it equals that choice. Every token is the one that plain
decoding gives, sampled or greedy, whatever the guesses, so no use of a guess can bias the output. *Rejection*
(``verify_tree``): accept ``y`` drawn from ``q`` with probability ``min(1, t[y]/q[y])``, else go on with
``t = norm(max(t - q, 0))`` (Leviathan et al. 2023, arXiv:2211.17192; several candidates without replacement: SpecInfer,
arXiv:2305.09781). The output has law ``t``; where guesses are drawn, not chosen, it accepts as many as any rule can.
Invariant of the second: which guesses are offered must not depend on tokens already drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ConfigurationError
from hasten.language.speculate.law import Draw, chance
from hasten.language.speculate.tree import TokenTree

__all__ = [
    "accept", "accept_chain", "accept_path", "expected_accepted", "expected_length", "probabilities", "verify_chain",
    "verify_tree",
]  # fmt: skip

Distribution = NDArray[np.float64]


def accept_chain(proposed: Sequence[int], chosen: Sequence[int]) -> int:
    """How many of ``proposed`` (k,) equal the model's own choices ``chosen`` (k + 1,), from the first on.

    >>> accept_chain([4, 5, 6], [4, 5, 9, 1])
    2
    """
    count = 0
    for guess, own in zip(proposed, chosen, strict=False):
        if guess != own:
            break
        count += 1
    return count


def accept(tree: TokenTree, chosen: Sequence[int]) -> tuple[list[int], int]:
    """The coupled rule on a tree: nodes that stand, and the model's choice after the last of them.

    ``chosen`` (nodes + 1,): the model's own choice after the last known token, then after each node.

    >>> tree = TokenTree.chain([4, 5]); _ = tree.add(7, parent=0)
    >>> accept(tree, [4, 7, 0, 8])
    ([0, 2], 8)
    """
    if len(chosen) != len(tree) + 1:
        raise ConfigurationError(f"{len(chosen)} choices for a tree of {len(tree)} nodes; give one more than nodes")
    path = accept_path(tree.tokens, tree.parents, chosen)
    return path, int(chosen[path[-1] + 1] if path else chosen[0])


def accept_path(tokens: Sequence[int], parents: Sequence[int], chosen: Sequence[int]) -> list[int]:
    """:func:`accept` on plain lists: the nodes that stand. Parents come before children.

    >>> accept_path([4, 5, 7], [-1, 0, 0], [4, 7, 0, 8])
    [0, 2]
    """
    node, path = -1, []
    for at, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        if parent == node and token == chosen[node + 1]:
            node = at
            path.append(at)
    return path


def _rest(target: Distribution, drawn_from: Distribution) -> Distribution:
    left = np.maximum(target - drawn_from, 0.0)
    mass = left.sum()
    # Without mass target and draft are equal, and a rejection had probability zero up to rounding.
    return left / mass if mass > 0 else target


def verify_tree(tree: TokenTree, target: Distribution, draw: Draw) -> tuple[list[int], int]:
    """The rejection rule: nodes that stand, and the token after them.

    ``target`` (nodes + 1, vocabulary): the model's distribution after the last known token, then after each node. A
    node without residual was chosen without chance: it is accepted with the target's probability of its token.
    """
    if target.shape[0] != len(tree) + 1:
        raise ConfigurationError(f"{target.shape[0]} distributions for {len(tree)} nodes; give one more than nodes")
    node = -1
    path: list[int] = []
    while True:
        t = target[node + 1]
        for child in tree.children(node):
            token, q = tree.tokens[child], tree.residuals[child]
            if q is None:
                q = np.zeros_like(t)
                q[token] = 1.0
            if chance(draw, float(t[token] / q[token])):
                path.append(child)
                node = child
                break
            t = _rest(t, q)
        else:
            return path, draw(t)


def expected_accepted(tree: TokenTree, target: Distribution) -> float:
    """How many nodes :func:`verify_tree` keeps on average over its draws.

    >>> law = np.array([[0.5, 0.5], [0.25, 0.75]])
    >>> expected_accepted(TokenTree.chain([1], [np.array([0.0, 1.0])]), law)
    0.5
    """
    below: dict[int, list[int]] = {}
    for node, parent in enumerate(tree.parents):
        below.setdefault(parent, []).append(node)
    reached = np.zeros(len(tree) + 1)  # the last entry is that of -1
    reached[-1] = 1.0
    for node in (-1, *range(len(tree))):
        left, t = float(reached[node]), target[node + 1]
        for child in below.get(node, []):
            token, q = tree.tokens[child], tree.residuals[child]
            if q is None:
                q = np.zeros_like(t)
                q[token] = 1.0
            stands = min(1.0, float(t[token] / q[token]))
            reached[child] = left * stands
            left *= 1.0 - stands
            t = _rest(t, q)
    return float(reached[:-1].sum())


def verify_chain(
    proposed: Sequence[int], drafts: Sequence[Distribution | None], target: Distribution, draw: Draw
) -> tuple[int, int]:
    """The rejection rule on one continuation: how many stand, and the token after them.

    ``drafts``: the distribution that each token was drawn from; ``target`` (tokens + 1, vocabulary).
    """
    path, token = verify_tree(TokenTree.chain(proposed, list(drafts)), target, draw)
    return len(path), token


def expected_length(alpha: float, count: int) -> float:
    """Tokens that a pass keeps when each of ``count`` guesses is accepted with ``alpha``: (1 - α^(k+1)) / (1 - α).

    >>> expected_length(0.5, 1), expected_length(1.0, 3), expected_length(0.3, 0)
    (1.5, 4.0, 1.0)
    """
    return count + 1.0 if alpha >= 1.0 else (1.0 - alpha ** (count + 1)) / (1.0 - alpha)


def probabilities(logits: Any, *, temperature: float, top_p: float = 1.0, top_k: int = 0) -> Distribution:
    """Rows of logits as the distributions that are sampled from: (rows, vocabulary) -> the same, float64.

    Temperature 0 gives all mass to the likeliest token. Both sides of a verification must use the same cut.
    """
    values = np.atleast_2d(np.asarray(logits, dtype=np.float64))
    if temperature <= 1e-5:
        out = np.zeros_like(values)
        out[np.arange(len(values)), values.argmax(-1)] = 1.0
        return out
    scaled = values / temperature
    out = np.exp(scaled - scaled.max(-1, keepdims=True))
    out /= out.sum(-1, keepdims=True)
    if top_k > 0 or top_p < 1.0:
        order = np.argsort(-out, axis=-1, kind="stable")
        ranked = np.take_along_axis(out, order, -1)
        keep = np.cumsum(ranked, -1) - ranked < top_p
        if top_k > 0:
            keep[:, top_k:] = False
        kept = np.zeros_like(out, dtype=bool)
        np.put_along_axis(kept, order, keep, -1)
        out = np.where(kept, out, 0.0)
        out /= out.sum(-1, keepdims=True)
    return out
