"""Small models as tables, for laws that are computed by enumeration."""

import numpy as np


class Table:
    """A law for every path of tokens, random but fixed; some with zeros."""

    def __init__(self, vocab, seed, zeros=0.3, sharp=1.0):
        self.vocab, self.seed, self.zeros, self.sharp = vocab, seed, zeros, sharp
        self.known = {}

    def __call__(self, path):
        path = tuple(path)
        if path not in self.known:
            rng = np.random.default_rng([self.seed, *[p + 1 for p in path]])
            law = rng.random(self.vocab) ** (3 * self.sharp)
            law[rng.random(self.vocab) < self.zeros] = 0.0
            if law.sum() == 0:
                law[int(rng.integers(self.vocab))] = 1.0
            self.known[path] = law / law.sum()
        return self.known[path]

    def distributions(self, head=()):
        """As a shape wants it."""
        return lambda tree, nodes: np.stack([self((*head, *(tree.tokens[i] for i in tree.path(n)))) for n in nodes])


def target_rows(target, tree, head=()):
    """The target's laws for a verification: after the root, then after each node."""
    return np.stack([target((*head, *(tree.tokens[i] for i in tree.path(n)))) for n in range(-1, len(tree))])


def law_of_two(target):
    """The law of the first two tokens."""
    return {
        (a, b): float(target(())[a] * target((a,))[b])
        for a in range(target.vocab)
        for b in range(target.vocab)
        if target(())[a] * target((a,))[b] > 0
    }


def first_two(run, draw, target):
    """The first two tokens of a process whose passes give at least one; ``run(head, draw)`` is one pass."""
    out = []
    while len(out) < 2:
        out += run(tuple(out), draw)
    return tuple(out[:2])


def same_law(found, expected, tolerance=1e-10):
    keys = set(found) | set(expected)
    return max(abs(found.get(k, 0.0) - expected.get(k, 0.0)) for k in keys) < tolerance
