"""CacheGen: KV caches as bitstreams, streamed at the level that the bandwidth allows.

"CacheGen: Fast Context Loading for Language Model Applications", Liu et al., SIGCOMM 2024, arXiv:2310.07240. The codec
is fitted to and judged on the embedded model (4 M weights, 1,000 tokens of held-out code); delays are simulated with
the KV bytes and prefill time of a 7B model over real bandwidth traces where they are at hand, else over generated ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from hasten.clock import MonotonicClock
from hasten.studies.study import Check, Scale, Study

__all__ = ["study"]


def run(scale: Scale) -> Iterator[Check]:
    """The checks of the card."""
    from hasten.language import load
    from hasten.language.kvfit import fit
    from hasten.language.kvvalues import capture

    yield from coder(scale)
    scale.progress("fitting the codec", 0.05)
    model = load("pycode-4m")
    samples, held = _texts(model, scale)
    codecs = {
        name: fit(model, samples, delta=delta, measure=False) for name, delta in (("chosen", None), ("delta", True))
    }
    scale.progress("insights", 0.3)
    caches = [capture(model, tokens) for tokens in held]
    yield from insights(model, codecs["delta"], caches, held)
    scale.progress("rate", 0.45)
    ratio = yield from rate(model, codecs, caches, held)
    scale.progress("continuations", 0.7)
    yield from continuations(model, codecs["chosen"], held, scale)
    scale.progress("delay", 0.8)
    yield from delay(scale, ratio)
    scale.progress("done", 1.0)


def coder(scale: Scale) -> Iterator[Check]:
    """The entropy coder: size against cross-entropy, the way back, both twins, and a range coder beside it."""
    from hasten.language import rans
    from hasten.language.rans_lanes import has_lanes

    rng, clock = np.random.default_rng(scale.seed), MonotonicClock()
    tokens, rows, lanes = scale.choose(quick=100, full=10_000), 16, 64
    law = rng.dirichlet(np.ones(255) * 0.3, rows * lanes).astype(np.float32) * 0.999 + np.float32(0.001 / 255)
    law /= law.sum(-1, keepdims=True)
    tables, ids = rans.Tables(rans.frequencies(law)), np.arange(rows * lanes, dtype=np.int32).reshape(rows, 1, lanes)
    ids = np.repeat(ids, 2, 1)
    plane, ideal = np.empty((rows, tokens, lanes), np.uint8), 0.0
    for row in range(rows):
        for lane in range(lanes):
            chances = law[row * lanes + lane].astype(np.float64)
            plane[row, :, lane] = rng.choice(255, tokens, p=chances / chances.sum())
            ideal -= float(np.log2(law[row * lanes + lane][plane[row, :, lane]]).sum() / 8)
    times = {}
    streams, back = (b"", b""), np.empty_like(plane)
    for name in ("compiled", "timed"):  # the first call compiles
        began = clock.now()
        streams = rans.encode(plane.copy(), 10, tables, ids)
        times[f"encode {name}"] = clock.now() - began
        began = clock.now()
        sound = rans.decode(*streams, back, 10, tables, ids)
        times[f"decode {name}"] = clock.now() - began
    wrong = int((back != plane).sum()) if sound else plane.size
    yield Check.equal("symbols that do not come back", wrong, 0, note=f"{plane.size} symbols, {rows * lanes} tables")
    size = sum(map(len, streams))
    rate = ", ".join(f"{n[:6]} {plane.size / times[n] / 1e6:.0f} million symbols/s" for n in times if "timed" in n)
    yield Check.at_most("bytes over the cross-entropy of the tables", (size - 256) / ideal, 1.005, "×", rate)
    some = plane[:, :100].copy()
    twins = [rans.encode(some.copy(), 10, tables, ids, lanes=way) for way in (False, True)] if has_lanes() else []
    if twins:
        yield Check.equal("bytes of the vector coder", "same" if twins[0] == twins[1] else "other", "same",
                          note="as of the plain twin")  # fmt: skip
    else:
        yield Check.unavailable("bytes of the vector coder", "this processor has no AVX-512")
    try:
        import constriction
    except ImportError:
        yield Check.unavailable("bytes over those of a range coder", "constriction is not installed")
        return
    models = [constriction.stream.model.Categorical(one, perfect=False) for one in law]
    began = clock.now()
    peer = constriction.stream.queue.RangeEncoder()
    for row in range(rows):
        for lane in range(lanes):
            peer.encode(some[row, :, lane].astype(np.int32), models[row * lanes + lane])
    theirs = 4 * len(peer.get_compressed())
    taken = clock.now() - began
    ours = sum(map(len, rans.encode(some.copy(), 10, tables, ids))) - 256
    rate = f"constriction, the same tables, {some.size / taken / 1e6:.0f} million symbols/s to encode"
    yield Check.at_most("bytes over those of a range coder", ours / theirs, 1.005, "×", rate)


def _texts(model: Any, scale: Scale) -> tuple[list[list[int]], list[list[int]]]:
    from hasten.language.corpus import documents

    out: dict[str, list[list[int]]] = {"validation": [], "test": []}
    length = scale.choose(quick=600, full=1000)
    for document in documents(suite=False):
        if document.split in out and len(document.text) > 6 * length:
            out[document.split].append(model.tokenizer.encode(document.text[: 8 * length])[:length])
    return out["validation"][: scale.choose(quick=5, full=10)], out["test"][: scale.choose(quick=3, full=8)]


def insights(model: Any, codec: Any, caches: list[Any], held: list[list[int]]) -> Iterator[Check]:
    """The three statistics that the design rests on."""
    from hasten.language.kvfit import anchors, straightened
    from hasten.language.kvvalues import KeysValues, perplexity

    spread: dict[str, list[float]] = {"both": [0.0, 0.0, 0.0]}
    for kv in caches:
        straight = straightened(kv, model.config)
        for name, x in (
            ("keys as cached", kv.keys),
            ("keys turned back", straight[0]),
            ("values", straight[1]),
            ("both", straight[0]),
            ("both", straight[1]),
        ):
            sums = spread.setdefault(name, [0.0, 0.0, 0.0])
            sums[0] += float((x - anchors(x, 10)).var())
            sums[1] += float((x - x.mean(1, keepdims=True)).var())
            sums[2] += float(x.var((1, 2)).mean())
    shown = ", ".join(f"{n} {a / b:.2f} (about one mean per layer {a / c:.2f})" for n, (a, b, c) in spread.items())
    yield Check.at_most(
        "variance of differences to the anchor over variance of values",
        spread["both"][0] / spread["both"][1],
        0.7,
        "×",
        f"keys turned back to position 0, values about their mean per channel; {shown}",
    )

    def bits(counts: Any) -> float:
        share = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
        return float(-(counts * np.log2(np.maximum(share, 1e-12))).sum() / counts.sum())

    layers, _, channels = codec.delta.shape
    counts = np.zeros((layers, 2, channels, 255))
    for kv in caches:
        codes, _ = codec.codes(kv, 3)
        rows = np.arange(layers * 2 * channels).reshape(layers, 2, 1, channels)
        counts += np.bincount((255 * rows + codes).reshape(-1), minlength=counts.size).reshape(counts.shape)
    fine, layer_wise, whole = bits(counts), bits(counts.sum(2)), bits(counts.sum((0, 1, 2))[None])
    yield Check(
        "bits per symbol: tables per channel, per layer, one",
        f"{fine:.2f} < {layer_wise:.2f} < {whole:.2f}",
        "bit",
        "falling",
        fine < layer_wise < whole,
    )
    losses = []
    rng = np.random.default_rng(0)
    third = max(1, layers // 3)
    for span in (slice(0, third), slice(layers - third, layers)):
        rise = []
        for kv, tokens in zip(caches, held, strict=True):
            noisy = KeysValues(kv.keys.copy(), kv.values.copy())
            for half in (noisy.keys, noisy.values):
                part = half[span]
                part += 0.7 * part.std((1, 2), keepdims=True) * rng.standard_normal(part.shape).astype(np.float32)
            rise.append(np.log(perplexity(model, tokens, noisy) / perplexity(model, tokens)))
        losses.append(float(np.mean(rise)))
    yield Check(
        "loss added by equal noise, first third of the layers and last",
        f"{losses[0]:.4f} / {losses[1]:.4f}",
        "nat",
        "first > last",
        losses[0] > losses[1],
    )


def rate(model: Any, codecs: dict[str, Any], caches: list[Any], held: list[list[int]]) -> Any:
    """Bytes at equal loss; returns bytes per value over two bytes, for the delays."""
    from hasten.language.kvvalues import perplexity

    found: dict[str, list[tuple[int, float, float]]] = {}
    for name, codec in codecs.items():
        rows = []
        for level in sorted(codec.tables):
            size, count, loss = 0, 0, []
            for kv, tokens in zip(caches, held, strict=True):
                half = len(tokens) // 2
                blob = codec.encode(kv, level)
                size, count = size + len(blob), count + 2 * kv.keys.size
                back = codec.decode(codec.encode(kv.cut(0, half), level))
                loss.append(np.log(perplexity(model, tokens, back, half) / perplexity(model, tokens, None, half)))
            rows.append((level, 8 * size / count, float(np.mean(loss))))
        found[name] = rows
    channels = caches[0].keys.shape[2]
    eight = 8 + 16 / channels  # one fp16 scale per token and layer
    good = [row for row in found["chosen"] if row[2] <= 0.01]
    best = min(good, key=lambda row: row[1]) if good else found["chosen"][-1]
    shown = "; ".join(f"level {n}: {b:.2f} bit, {loss:+.4f} nat" for n, b, loss in found["chosen"])
    yield Check.at_most(
        "bytes over 8-bit KV with per-token scales, loss ≤ 0.01 nat", best[1] / eight, 1 / 3, "×", shown
    )
    yield Check.at_most("bytes over fp32", best[1] / 32, 1 / 8, "×")
    sizes = [b for _, b, _ in found["chosen"]]
    yield Check(
        "bits rise with the level", "yes" if sizes == sorted(sizes) else "no", "", "= yes", sizes == sorted(sizes)
    )
    shown = "; ".join(f"level {n}: {b:.2f} bit, {loss:+.4f} nat" for n, b, loss in found["delta"])
    same = [d[1] / c[1] for d, c in zip(found["delta"], found["chosen"], strict=True)]
    yield Check.at_most(
        "bytes with differences everywhere over those of the chosen form",
        float(np.mean(same)),
        1.0,
        "×",
        f"published: differences are shorter; {shown}",
    )
    codec, kv = codecs["chosen"], caches[0]
    clock = MonotonicClock()
    from hasten.language.kvvalues import capture

    capture(model, held[0])
    taken: dict[str, list[float]] = {"encode": [], "decode": [], "prefill": []}
    for _ in range(6):
        began = clock.now()
        coded = codec.encode(kv, best[0])
        encoded = clock.now()
        codec.decode(coded)
        decoded = clock.now()
        capture(model, held[0])
        for name, seconds in zip(taken, np.diff([began, encoded, decoded, clock.now()]).tolist(), strict=True):
            taken[name].append(seconds)
    times = {name: float(np.median(seconds[1:])) for name, seconds in taken.items()}
    yield Check.at_most(
        "time to encode and decode over time to compute, embedded model",
        (times["encode"] + times["decode"]) / times["prefill"],
        1.0,
        "×",
        f"{kv.tokens} tokens: "
        + ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in times.items())
        + "; a model this small computes quickly",
    )
    return best[1] / 16


def continuations(model: Any, codec: Any, held: list[list[int]], scale: Scale) -> Iterator[Check]:
    """Greedy tokens behind a decoded cache against those behind the computed one."""
    from hasten.language.kvvalues import capture, write_cache
    from hasten.language.speculate.session import Session

    same = total = chosen = 0
    for tokens in held:
        line: list[list[int]] = []
        count = scale.choose(quick=24, full=64)
        for coded in (False, True):
            session = Session(model.executor, len(tokens) + 80)
            if coded:
                kv = capture(model, tokens[:-81])
                write_cache(session.cache, session.table, codec.decode(codec.encode(kv, 3)))
                session.done = len(tokens) - 81
            else:
                session.feed(tokens[:-81])
            out, token, begin = [], tokens[-81], session.done
            for _ in range(count):
                token = int(session.feed([token])[0].argmax())
                out.append(token)
            if coded:  # and what it would choose at each place of the text that the full cache gave
                session.done = begin
                logits = session.feed([tokens[-81], *line[0][:-1]], every=True)
                chosen += sum(a == b for a, b in zip(logits.argmax(1).tolist(), line[0], strict=True))
            line.append(out)
        agree = next((i for i, (a, b) in enumerate(zip(*line, strict=True)) if a != b), len(line[0]))
        same, total = same + agree, total + len(line[0])
    yield Check.at_least("greedy choices that agree on the text of the full cache, level 3", chosen / total, 0.9)
    yield Check.at_least(
        "greedy tokens before the first difference, level 3",
        same / total,
        0.9,
        "",
        f"of {total}; one near tie parts two texts for good, and a small model has many",
    )


def _links(scale: Scale) -> dict[str, Any]:
    from hasten.network import Trace

    path = scale.find("network/mahimahi_cellular.npz")
    if path is not None:
        with np.load(path) as file:
            names = list(file.files)
        found = {n: Trace.load(path, n) for n in names}
        more = scale.find("network/pensieve_bandwidth.csv.gz")
        series = list(Trace.series(more).items()) if more is not None else []
        return found | dict(series[:: scale.choose(quick=60, full=12)])
    rng = np.random.default_rng(scale.seed)
    out = {}
    for number in range(8):  # log-normal rates with memory, as cellular links have
        level = np.cumsum(rng.standard_normal(600)) * 0.15
        level -= np.linspace(level[0], level[-1], 600)
        out[f"generated {number}"] = Trace.of(np.arange(600) * 0.5, 1e6 * np.exp(level), name=f"generated {number}")
    return out


def delay(scale: Scale, ratio: float) -> Iterator[Check]:
    """Time to the first token of 9,000 tokens of context, 7B-like: 0.5 MB of KV per token, 3,000 tokens/s."""
    from hasten.language.kvstream import ChunkSizes, Controller, FixedLevel, simulate, violations

    per_token = 2 * 32 * 32 * 128 * 2.0
    sizes = {0: 1.0, 1: ratio * 0.8, 2: ratio, 3: ratio * 1.2, 8: 0.5}
    chunks = []
    for index in range(6):
        context = 1500 * index
        prefill = 1500 / 3000 * (1 + context / 12_000)
        chunks.append(ChunkSizes({k: v * 1500 * per_token for k, v in sizes.items() if k != 8}, 1500, prefill, 0.03))
    eight = [ChunkSizes({8: 0.5 * 1500 * per_token}, 1500, c.prefill, 0.01) for c in chunks]
    text = simulate(chunks, _steady(1e9), FixedLevel("text"))[-1].ready
    links = _links(scale)
    gains, over, wins = [], [], {"text": 0, "raw": 0}
    starts = np.linspace(0, 200, scale.choose(quick=4, full=20)).tolist()
    slo = 2.0
    for factor in (1, 10, 100, 1000, 10_000, 100_000):
        for link in links.values():
            scaled = link.scaled(factor)
            for start in starts:
                ours = simulate(chunks, scaled, Controller(slo), start=start)[-1].ready
                quantised = simulate(eight, scaled, FixedLevel(8), start=start)[-1].ready
                plain = simulate(chunks, scaled, FixedLevel("text"), start=start)[-1].ready
                raw = simulate(chunks, scaled, FixedLevel(0), start=start)[-1].ready
                coded = simulate(chunks, scaled, FixedLevel(2), start=start)[-1].ready
                middle = min(quantised, plain) > 1.2 * coded
                if middle:
                    gains.append(min(quantised, plain) / coded)
                fixed = min(
                    plain, raw, *(simulate(chunks, scaled, FixedLevel(n), start=start)[-1].ready for n in (1, 3)), coded
                )
                over.append(ours / max(fixed, slo))
                wins["text"] += plain < min(coded, raw)
                wins["raw"] += raw < slo
    yield Check.at_least(
        "TTFT of the better of 8-bit KV and text over coded KV, middle range",
        float(np.median(gains)),
        2.0,
        "×",
        f"{len(links)} links at 1 to 10⁵ times their bandwidth, {len(gains)} loads; published 2.7–3×",
    )
    yield Check(
        "loads where text is fastest, and where exact bytes meet 2 s",
        f"{wins['text']} / {wins['raw']}",
        "",
        "> 0",
        wins["text"] > 0 and wins["raw"] > 0,
        f"text alone takes {text:.1f} s",
    )
    yield Check.at_most(
        "TTFT of the controller over the larger of 2 s and the best fixed choice, worst load",
        max(over),
        1.1,
        "×",
        f"{sum(r > 1.1 for r in over)} of {len(over)} loads above; 99 % are below {np.quantile(over, 0.99):.3f}; the "
        "best fixed choice is known afterwards only",
    )
    middle_links = [link.scaled(300) for link in links.values()]
    slos = {
        name: violations(chunks, middle_links, p, 2.5, starts)
        for name, p in (("adaptive", Controller(2.5)), *((str(c), FixedLevel(c)) for c in (0, 1, 2, 3, "text")))
    }
    others = min(v for k, v in slos.items() if k != "adaptive")
    yield Check.at_most(
        "late loads of the controller less those of the best fixed choice",
        slos["adaptive"] - others,
        0.0,
        "",
        ", ".join(f"{k} {v:.2f}" for k, v in slos.items()) + ", objective 2.5 s",
    )


def _steady(rate: float) -> Any:
    from hasten.network import Trace

    return Trace.constant(rate)


study = Study(
    system="cachegen",
    claim="KV caches shrink 3 to 4 times beyond quantisation, and contexts load about three times sooner.",
    published={
        "bandwidth": "3.7-4.3x less than KV quantisation (abstract)",
        "delay": "2.7-3x less to fetch and process a context (abstract)",
    },
    run=run,
)
