"""Compressed models live on: copies, pickles, files and state dicts compute the same bit for bit, or say why not."""

import copy
import io
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.compress import (
    Clustering,
    FusedNetwork,
    Int8Network,
    MagnitudePruning,
    PackedLinear,
    SvdQuant,
    TruncatedSvd,
    WeightPrecision,
    kernels,
)
from hasten.compress.packed import from_plain, to_plain
from hasten.compress.quantize import FP8_E4M3, Int, PerChannel, PerTensor, Quantize, store
from hasten.errors import ConfigurationError
from hasten.nn.product.instructions import has_bytes

Make = Callable[[], nn.Module]


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval()


def convolutional(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    head = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8))
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), *head).eval()


def rows() -> Tensor:
    return torch.randn(70, 64, generator=torch.Generator().manual_seed(7))


def images() -> Tensor:
    return torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(7))


BYTES = Int(8, PerTensor(), symmetric=False)
SVD = {"rank": 8, "grid": 3, "iterations": 1}
CASES: dict[str, tuple[Any, Any, Any]] = {
    **{s: (mlp, Quantize.scheme(s, real="always"), rows) for s in ("W8A8", "W8A16", "W4A16", "W4A8", "NF4", "NVFP4")},
    "static": (mlp, Quantize(Int(8, PerChannel(0)), BYTES, real="always"), rows),
    "floats": (mlp, Quantize(FP8_E4M3.per_channel(), real="never"), rows),
    "svdquant": (mlp, SvdQuant(group=32, **SVD), rows),
    "svdquant-fast": (mlp, SvdQuant(group=32, execution="fast", **SVD), rows),
    "svdquant-nvfp4": (mlp, SvdQuant(group=16, format="nvfp4", **SVD), rows),
    "low-rank": (mlp, TruncatedSvd(0.5), rows),
    "clusters": (mlp, Clustering(), rows),
    "pruned": (mlp, MagnitudePruning(0.5), rows),
    "convolution": (convolutional, Quantize(Int(4), Int(8), real="never"), images),
}
CALLS: dict[str, tuple[Any, Any, Any]] = {
    f"one-call-{p}": (mlp, FusedNetwork(p, only_faster=False), rows) for p in ("fp32", "bf16", "int8")
}
WHOLE: dict[str, tuple[Any, Any, Any]] = {"bytes": (convolutional, Int8Network(only_faster=False), images)}


@pytest.fixture(autouse=True)
def _unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which kernel is faster does not matter here."""
    monkeypatch.setattr(kernels, "measure_kernels", lambda shape, tokens, names, **_: dict.fromkeys(names, 1.0))


def made_by(case: str) -> tuple[Any, Any, Any]:
    if (case in WHOLE or case in CALLS) and not has_bytes():
        pytest.skip("this processor has no vpdpbusd")
    return (CASES | CALLS | WHOLE)[case]


def stored(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("case", [*CASES, *CALLS, *WHOLE])
def test_copies_pickles_and_files(case: str) -> None:
    make, technique, inputs = made_by(case)
    model, x = technique(make(0), [inputs()]), inputs()
    with torch.inference_mode():
        expected = model(x)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), stored(model)):
            assert torch.equal(again(x), expected)
            assert again.report.layers == model.report.layers
            assert again.training == model.training
        twice = pickle.loads(pickle.dumps(copy.deepcopy(stored(model))))
        assert torch.equal(twice(x), expected)


@pytest.mark.parametrize("case", [*CASES, *CALLS])
def test_a_state_dict_carries_all_that_is_computed(case: str) -> None:
    make, technique, inputs = made_by(case)
    x = inputs()
    one, other = (technique(make(seed), [x]) for seed in (0, 1))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    with torch.inference_mode():
        assert not torch.equal(other(x), one(x))  # and whatever a layer keeps for later calls is there
        assert all(isinstance(t, Tensor) for t in one.state_dict().values())
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(other(x), one(x))


@pytest.mark.parametrize("name", [k.name for k in kernels.available()])
def test_every_kernel_of_the_table(name: str) -> None:
    layer = PackedLinear.of(nn.Linear(256, 64), name)
    x = torch.randn(5, 256)
    with torch.inference_mode():
        expected = layer(x)
        for again in (pickle.loads(pickle.dumps(layer)), stored(layer), copy.deepcopy(layer)):
            assert torch.equal(again(x), expected)


def test_a_layout_of_another_processor_is_refused() -> None:
    """The bytes of a packed layer mean something else there; reading them would give numbers without a sense."""
    held = to_plain(PackedLinear.of(nn.Linear(64, 64), "int4-g32").packed, "int4-g32")
    about = json.loads(bytes(held["about"].tolist()))
    held["about"] = torch.tensor(list(json.dumps({**about, "layout": "ABACUS"}).encode()), dtype=torch.uint8)
    with pytest.raises(ConfigurationError, match="packed by int4-g32 for ABACUS and cannot be read here"):
        from_plain(held)


def test_a_state_of_another_kernel_or_of_none_is_refused() -> None:
    one, other = (PackedLinear.of(nn.Linear(64, 64), name) for name in ("int8-weight", "int4-g32"))
    with pytest.raises(ConfigurationError, match="for int8-weight was given to a layer of 64 x 64 that runs int4-g32"):
        other.load_state_dict(one.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*packed.about"):
        other.load_state_dict({"bias": torch.zeros(64)})


@pytest.mark.skipif(not has_bytes(), reason="this processor has no vpdpbusd")
def test_a_network_in_bytes_has_no_state_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Int8Network(only_faster=False)(convolutional(0), [images()])
    with pytest.raises(ConfigurationError, match="has no state_dict.*torch.save"):
        small.state_dict()
    content = pickle.dumps(small)
    monkeypatch.setattr("hasten.compress.int8.network.has_bytes", lambda: False)
    with pytest.raises(ConfigurationError, match="runs on processors with vpdpbusd"):
        pickle.loads(content)


def test_what_the_format_of_codes_does_not_take(tmp_path: Any) -> None:
    small = WeightPrecision("int8", only_faster=False)(mlp(0))
    with pytest.raises(ConfigurationError, match=r"PackedLinear is packed for this machine.*torch\.save"):
        store.save(small, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not has_bytes(), reason="this processor has no vpdpbusd")
def test_a_network_in_one_call_on_another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    small = FusedNetwork(only_faster=False)(mlp(0), [rows()])
    content = pickle.dumps(small)
    monkeypatch.setattr("hasten.compress.fused.network.has_bytes", lambda: False)
    with pytest.raises(ConfigurationError, match="fused network cannot run here: .*vpdpbusd; run the model"):
        pickle.loads(content)


@pytest.mark.skipif(not has_bytes(), reason="this processor has no vpdpbusd")
def test_weights_of_a_network_in_one_call_are_its_own() -> None:
    """Copies share what was made of the weights until one is given others; what does not fit is named."""
    x = rows()
    one, other = (FusedNetwork(only_faster=False)(mlp(seed), [x]) for seed in (0, 1))
    twin = copy.deepcopy(one)
    with torch.inference_mode():
        before = one(x)
        one.load_state_dict(other.state_dict())
        assert torch.equal(one(x), other(x))
        assert torch.equal(twin(x[:, None]).flatten(1), before)  # a shape that it meets for the first time
    with pytest.raises(RuntimeError, match=r"Missing key.*model\.0\.weight.*\n.*Unexpected key.*model\.5\.weight"):
        one.load_state_dict({"model.5.weight": torch.zeros(1)})
