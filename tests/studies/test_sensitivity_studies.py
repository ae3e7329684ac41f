"""Parts of the studies of sensitivity and deep compression; whole they take minutes and are left to `hasten study`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from hasten.compress.quantize.integer import Int
from hasten.events.lightcurves import simulate
from hasten.studies import Check, Scale, load, q_bert
from hasten.studies import augmented_hessians as augmented
from hasten.studies import tiny_transient_transformer as tiny
from hasten.studies._bert import agreement, batches

QUICK = Scale(quick=True, seed=0)


@pytest.mark.parametrize("name", ["q-bert", "augmented-hessians", "tiny-transient-transformer"])
def test_they_claim_something(name: str) -> None:
    study = load(name)
    assert len(study.claim.split()) > 3
    assert study.published


@pytest.mark.parametrize("part", [q_bert.exactness, augmented.exactness, tiny.exactness])
def test_what_is_exact_holds(part: object) -> None:
    checks: Iterator[Check] = part(QUICK)  # type: ignore[operator]
    found = list(checks)
    assert found
    assert all(c.holds for c in found if c.holds is not None), [c for c in found if not c.holds]


def test_sentences_are_labelled_by_their_grammar() -> None:
    ids, labels = agreement(500, seed=0)
    again, _ = agreement(500, seed=0)
    assert torch.equal(ids, again)
    for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
        words = [w for w in row if w]
        assert words[0] == 1
        assert (words[1] >= 10) == (words[-1] >= 26) if label else (words[1] >= 10) != (words[-1] >= 26)
        assert all(18 <= w <= 21 for w in words[2:-1:2])
    assert 0.4 < labels.float().mean() < 0.6
    of = batches(ids, labels, 3, 128)
    assert torch.equal(of(1)[0][0], of(1)[0][0])
    assert not torch.equal(of(0)[0][0], of(1)[0][0])


def test_one_range_for_a_whole_layer() -> None:
    pytest.importorskip("transformers")
    net = q_bert.DigitBert(layers=2, width=16, heads=2)
    formats = dict(q_bert.layerwise(net, 2, 0, 1e-3, 0).formats)
    tops = {f.observer.top for p, f in formats.items() if "encoder" in p and isinstance(f.observer, q_bert.Shared)}
    assert len(tops) == 2
    assert len(q_bert.matrices(net)) == 12
    weight = net.get_parameter(q_bert.matrices(net)[0]).detach()
    form = formats[q_bert.matrices(net)[0]]
    assert isinstance(form, Int)
    assert float(form.fake(weight).abs().max()) <= max(tops) * 4 / 3 + 1e-6
    assert set(q_bert.embeddings(net)) >= {"rows.weight"}


def test_orders_have_equal_bytes_and_tell_every_seed() -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    net = q_bert.DigitBert(layers=1, width=16, heads=2).eval()
    data = (torch.randn(40, 8, 8), torch.arange(40) % 10, torch.randn(30, 8, 8), torch.arange(30) % 10)
    spectra = [q_bert.spectrum(QUICK, net, data)] * 2
    found = list(q_bert.orders(QUICK, [(net, net)] * 2, spectra, data, ", here"))
    assert [c.name.endswith(", here") for c in found] == [True] * 4
    for check in found:  # the same net twice: both seeds alike
        apart = check.note.rpartition("by seed ")[2].partition(" (standard error 0.0000)")[0].split(", ")
        assert len(apart) == 2
        assert apart[0] == apart[1]
        assert (check.value >= 1) == (float(apart[0]) >= 0) or abs(float(apart[0])) < 1e-4


def test_parts_of_a_network_are_rounded_one_at_a_time() -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    net = q_bert.DigitBert(layers=1, width=16, heads=2, classes=2, vocabulary=30).eval()
    found = q_bert.parts(net)
    assert {k: len(v) for k, v in found.items()} == {
        "attention": 4, "feed-forward": 2, "words": 1, "positions": 1, "embeddings": 3, "encoder": 6,
    }  # fmt: skip
    assert sorted(found["attention"] + found["feed-forward"]) == sorted(found["encoder"])
    ids, labels = agreement(40, seed=0)
    data = (ids, labels, ids, labels)
    assert q_bert.rise(net, "words", Int(16), data) == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        net.net.bert.embeddings.word_embeddings.weight.mul_(50)  # now they decide everything
    check = q_bert.modules([(net, net)] * 2, data, ("positions", "words"), q_bert.TABLES, "here")
    again = [q_bert.rise(net, part, q_bert.TABLES, data) for part in ("positions", "words")]
    assert check.value == pytest.approx(again[0] - again[1])
    assert "(480 weights)" in check.note
    assert "(1024 weights)" in check.note


def test_brightness_is_judged_by_neighbours() -> None:
    seen, kinds = simulate(150, seed=1)
    told = tiny.brightness(seen, kinds, 50)
    assert set(told) == {"mean flux", "mean flux of each band"}
    assert all(1 / 7 < v < 1 for v in told.values())
    values = kinds[:, None] + 0.1 * np.random.default_rng(0).random((len(kinds), 1))
    few = np.bincount(kinds[50:]).min()
    assert tiny._nearest(values, kinds, 50, int(few)) == 1.0  # all neighbours are of the same kind


def test_plans_of_wide_layers_run_in_their_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(shape: tuple[int, int], tokens: int, names: list[str], **knobs: object) -> dict[str, float]:
        seconds = {"fp32": 4e-6, "bf16": 3e-6, "int8": 2e-6, "int4": 1e-6}
        return {n: next(t for word, t in seconds.items() if n.startswith(word)) for n in names}

    monkeypatch.setattr("hasten.compress.kernels.measure_kernels", measured)
    monkeypatch.setattr("hasten.compress.quantize.layer_latency.measure_kernels", measured)
    net = augmented.wide_net(64, 64, 3, 0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 1, 8, 8, generator=generator)
    with torch.no_grad():
        y = net(x).argmax(1)  # so that the float model is right everywhere
    case = augmented.Case("wide", net, [(x[:64], y[:64])], (x[:100], y[:100]), (x[100:], y[100:]))
    found = {c.name: c for c in augmented.wide_latency(QUICK, case)}
    floors, faster, saved, greedy = found.values()
    assert floors.holds
    assert floors.note.count("search split 1.0000 ->") == len(augmented.FLOORS)
    assert "16 bits" in faster.note
    assert saved.threshold == "≥ 0.2169"
    assert isinstance(greedy.value, float)
    model = augmented.realised(net, {"1": 16, "3": 8, "5": 8}, 64)
    assert [getattr(model[k], "kernel_name", "kept").split("-")[0] for k in (1, 3, 5)] == ["bf16", "int8", "kept"]
