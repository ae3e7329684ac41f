"""Copies, the RNG rule, the choice and the share of heads, pruning: each against its absence.

Always at an equal number of list reads or at equal candidates, since the two give different answers. The rules are
judged on the generator and, where there are some, on real text vectors, whose neighbourhoods are not made of clusters.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hasten.retrieve.index.hit import SearchOptions
from hasten.retrieve.index.tune import recall_of
from hasten.studies._spann_bench import WIDE, Bench, Curve, recall_at
from hasten.studies.study import Check

__all__ = ["ablations", "choice_of_heads", "closure_rule", "pruning"]


def ablations(bench: Bench) -> Iterator[Check]:
    """Copies, the RNG rule, the choice of heads, the share of heads: at equal reads, and at equal candidates beside
    it. Each needs an index of its own, so this is the dearest part.
    """
    lines = {r: bench.curve(bench.index(_copies(r), replicas=r)) for r in (1, 4, 8, 10)}
    yield from _copies_of_rows(lines)
    yield from _limited_closure(bench, lines[8])
    yield closure_rule(bench)
    yield choice_of_heads(bench)
    yield from _share_of_heads(bench, lines[8])


def _copies(replicas: int) -> str:
    """The name of an index with so many copies."""
    return "balanced" if replicas == 8 else f"copies-{replicas}"


def _copies_of_rows(lines: dict[int, Curve]) -> Iterator[Check]:
    reads = {r: recall_at(c, 0, 8) for r, c in lines.items()}
    equal = {r: recall_at(c, 1, 600) for r, c in lines.items()}
    note = "recall with 8 list reads " + ", ".join(f"{r}: {v:.3f}" for r, v in reads.items())
    note += "; at 600 candidates " + ", ".join(f"{r}: {v:.3f}" for r, v in equal.items())
    yield Check.at_least("copies: 4 over 1, recall at equal reads", reads[4] - reads[1], 0.005, "", note)
    yield Check.at_least("copies: 8 over 4, recall at equal reads", reads[8] - reads[4], 0.002, "", note)
    yield Check.at_most("copies: 10 over 8 at equal reads (saturation)", reads[10] - reads[8], 0.005, "", note)
    note = f"one copy {equal[1]:.3f}, eight {equal[8]:.3f} at 600 candidates: the gain is in reads, not in bytes"
    yield Check.at_most("copies: 8 over 1 at equal candidates", equal[8] - equal[1], 0.01, "", note)


def _limited_closure(bench: Bench, published: Curve) -> Iterator[Check]:
    """Our limit of the closure beside the published one."""
    index = bench.index("limited", epsilon=0.3, crowding=1.8)
    limited = bench.curve(index)
    pair = recall_at(limited, 0, 8), recall_at(published, 0, 8)
    wanted = recall_at(limited, 1, 300), recall_at(published, 1, 300)
    copies = [i.describe()["built"]["replicas"] for i in (index, bench.index(_copies(8)))]
    note = "a copy at most 1.3 times as far as the nearest head: "
    note += f"8 reads {pair[0]:.4f}, without a limit {pair[1]:.4f}; "
    note += f"at 300 candidates {wanted[0]:.4f} / {wanted[1]:.4f}; copies {copies[0]:.2f} / {copies[1]:.2f}"
    yield Check.at_least("closure within 1.3: recall lost at equal reads", pair[0] - pair[1], -0.01, "", note)
    yield Check.at_least("closure within 1.3: recall won at 300 candidates", wanted[0] - wanted[1], 0.0, "", note)


def closure_rule(bench: Bench, where: str = "") -> Check:
    """Eight copies by the RNG rule against the eight nearest heads, at equal candidates."""
    rule = bench.curve(bench.index(_copies(8)))
    nearest = bench.curve(bench.index("nearest", rng_rule=False))
    pairs = {p: (recall_at(rule, 1, p), recall_at(nearest, 1, p)) for p in (300, 600, 900)}
    note = "RNG / nearest-8 at " + ", ".join(f"{p} candidates {a:.3f} / {b:.3f}" for p, (a, b) in pairs.items())
    note += f"; with 8 reads {recall_at(rule, 0, 8):.3f} / {recall_at(nearest, 0, 8):.3f}"
    name = f"RNG rule over nearest-8, recall at 900 candidates{where}"
    return Check.at_least(name, pairs[900][0] - pairs[900][1], 0.0, "", note)


def choice_of_heads(bench: Bench, where: str = "") -> Check:
    """Heads of the balanced tree against random ones, with one copy, at equal candidates."""
    balanced = bench.curve(bench.index(_copies(1), replicas=1))
    random = bench.curve(bench.index("random-1", replicas=1, heads="random"))
    pair = recall_at(balanced, 1, 320), recall_at(random, 1, 320)
    reads = recall_at(balanced, 0, 8), recall_at(random, 0, 8)
    note = f"one copy, 320 candidates: {pair[0]:.3f} / {pair[1]:.3f}; 8 reads: {reads[0]:.3f} / {reads[1]:.3f}"
    name = f"balanced over random heads, one copy, equal candidates{where}"
    return Check.at_least(name, pair[0] - pair[1], 0.005, "", note)


def _share_of_heads(bench: Bench, line: Curve) -> Iterator[Check]:
    shares = {0.12: recall_at(line, 1, 600)}
    for share in (0.04, 0.08, 0.16, 0.2):
        name = "served" if share == 0.16 else f"heads-{share}"
        shares[share] = recall_at(bench.curve(bench.index(name, head_ratio=share)), 1, 600)
    note = "recall at 600 candidates, by share of heads: "
    note += ", ".join(f"{s:.0%} {v:.3f}" for s, v in sorted(shares.items()))
    yield Check.at_least("share of heads: 16 % over 4 %, equal candidates", shares[0.16] - shares[0.04], 0.0, "", note)
    yield Check.at_most("share of heads: 20 % over 16 % (saturation)", shares[0.2] - shares[0.16], 0.01, "", note)


def pruning(bench: Bench, where: str = "generator") -> Iterator[Check]:
    """Pruning by distance against a fixed number of lists with the same mean."""
    index = bench.index(_copies(8))
    most, beam = (min(size, len(index._view.generation.counts)) for size in (64, 128))
    fixed = []
    for lists in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
        hit = index.search(bench.queries, 10, options=SearchOptions(lists=min(lists, most), epsilon=WIDE, beam=beam))
        fixed.append((float(hit.stats.lists.mean()), recall_of(hit.ids, bench.truth)))
    gains = []
    for epsilon in (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4):
        hit = index.search(bench.queries, 10, options=SearchOptions(lists=most, epsilon=epsilon, beam=beam))
        mean = float(hit.stats.lists.mean())
        base = float(np.interp(np.log(max(mean, 1.0)), np.log([f[0] for f in fixed]), [f[1] for f in fixed]))
        gains.append((recall_of(hit.ids, bench.truth) - base, epsilon, mean, base))
    note = "; ".join(f"ε {e:g}: {g:+.4f} at {m:.1f} lists (fixed {b:.3f})" for g, e, m, b in gains)
    title = f"pruning on {where}: recall over a fixed number of lists with the same mean"
    inside = [g for g in gains if 2 <= g[2] < fixed[-1][0] and g[3] < 0.99]  # one list is no choice
    if not inside:
        yield Check.unavailable(title, f"no ε prunes where recall is not full: {note}", "", "≥ 0")
        return
    yield Check.at_least(
        title,
        max(inside)[0],
        0.0,
        "",
        note + "; the best of those with two lists or more and a recall below 0.99 counts",
    )
