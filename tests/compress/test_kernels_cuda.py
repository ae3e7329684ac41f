"""Kernels of a GPU in the table, in modules and in techniques; most of it needs one."""

import copy
import json

import pytest
import torch
from torch import nn

from hasten.compress import WeightPrecision, kernels, kernels_cuda
from hasten.compress import device_codes as layout
from hasten.compress import kernels_triton as ours
from hasten.compress.precision import PackedLinear
from hasten.compress.quantize import FP8_E4M3, Int, PerChannel, PerGroup, PerToken, Quantize
from hasten.compress.quantize.layers import ActivationQuantizer, IntegerLinear
from hasten.compress.quantize.products import byte_product
from hasten.compress.quantize.realise import KernelLinear, candidates
from hasten.errors import ConfigurationError
from hasten.measure import Protocol
from hasten.measure.cache import cache_folder

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
QUICK = Protocol(warmup=1, warmup_time=0.0, min_samples=2, min_time=0.0)
LINES = {"int8": 0.01, "int4": 0.13, "fp8": 0.04}


def randn(*shape, seed=0, device="cuda"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def test_a_device_that_is_not_here_is_named():
    for call in (
        kernels.available,
        lambda d: kernels.kernel("bf16", d),
        lambda d: kernels.fastest((64, 64), 1, device=d),
    ):
        with pytest.raises(ConfigurationError, match="device 'cuda:7' is not here; this machine has cpu"):
            call("cuda:7")
    packed = PackedLinear.of(nn.Linear(32, 16), "fp32")
    with pytest.raises(ConfigurationError, match="packed on cpu was given an input on meta"):
        packed(torch.zeros(1, 32, device="meta"))


@pytest.mark.parametrize("rows", [1, 9, 40])
def test_byte_products(rows):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, weight = (torch.randint(-127, 128, s, dtype=torch.int8, device=device) for s in ((rows, 37), (13, 37)))
    expected = (x.double() @ weight.double().t()).int()
    assert torch.equal(byte_product(x, weight), expected)


@needs_gpu
def test_all_of_ours_work_here_and_torch_has_some():
    names = {k.name for k in kernels.available("cuda")}
    print(sorted(names))
    assert {"fp32", "bf16", "int8-row", "int8-tiles", "int8-opened", "int8-bytes"} <= names
    assert {f"int4-g{g}-{how}" for g in kernels_cuda.GROUP_SIZES for how in ("row", "tiles", "opened")} <= names
    if torch.cuda.get_device_capability() >= (8, 9):
        assert {"fp8-row", "fp8-tiles", "fp8-opened"} <= names
    if torch.cuda.get_device_capability() == (9, 0):
        assert {"int8-dynamic", "fp8-dynamic", "int4-g128-torch"} <= names


@needs_gpu
def test_errors_stay_within_the_stated_bounds():
    shape = (200, 384)
    weight = randn(*shape)
    cases = [(1, torch.bfloat16), (17, torch.bfloat16), (17, torch.float32), (130, torch.bfloat16)]
    for kernel in kernels.available("cuda"):
        if not kernel.supports(*shape) or kernel.group in (64, 128):
            continue
        packed = kernel.pack(weight)
        assert packed.device.type == "cuda"
        assert float((kernel.unpack(packed) - weight).norm() / weight.norm()) <= kernel.error
        for rows, dtype in cases:
            x = randn(rows, shape[1], seed=rows).to(dtype)
            expected = x.float() @ weight.t()
            found = kernel.run(x, packed)
            assert found.dtype == dtype
            gap = float((found.float() - expected).norm() / expected.norm())
            assert gap <= kernel.error + 4e-3, (kernel.name, rows, dtype)


@needs_gpu
@pytest.mark.parametrize("precision", kernels_cuda.PRECISIONS)
def test_cuts_do_not_change_a_product(precision):
    """Every split and tile, many times: a race between programs would show as a moving error."""
    packed = kernels_cuda.lay_out_at(randn(272, 2080), precision)
    weight = layout.opened(packed)
    for rows in (1, 16, 40):
        x = randn(rows, 2080, seed=rows).bfloat16()
        expected = x.float() @ weight.t()
        wide = 32 if precision == "int4" else 64
        for splits in (1, 2, 5, 8):
            cut = ours.Tiling(64, wide, 16, splits)
            first = ours.by_tiles(x, packed, None, cut)
            assert float((first.float() - expected).norm() / expected.norm()) < 5e-3
            for _ in range(20):
                assert torch.equal(ours.by_tiles(x, packed, None, cut), first)
        assert not packed.tensors[3].any()


@needs_gpu
def test_the_table_of_a_gpu_is_filed_under_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    kernels._LOADED_FROM.clear()
    names = ["bf16", "int8-row", "int8-tiles"]
    times = kernels.measure_kernels((256, 512), 1, names, protocol=QUICK, device="cuda")
    assert set(times) == set(names)
    assert all(0 < t < 1e-2 for t in times.values())
    (file,) = (cache_folder() / "kernels").iterdir()
    assert torch.__version__ in file.name
    assert json.loads(file.read_text())["256x512x1"] == times
    table = {"256x512x1": dict.fromkeys((k.name for k in kernels.available("cuda")), 1.0) | {"int8-tiles": 0.5}}
    file.write_text(json.dumps(table))
    kernels._LOADED_FROM.clear()
    assert kernels.fastest((256, 512), 1, device="cuda") == "int8-tiles"
    assert kernels.fastest((256, 512), 1, ["bf16"], device="cuda") == "bf16"
    kernels._LOADED_FROM.clear()


@needs_gpu
@pytest.mark.parametrize("precision", kernels_cuda.PRECISIONS)
def test_a_product_can_be_captured(precision):
    weight, bias = randn(320, 512), randn(320, seed=1)
    product, _ = kernels.quantized_product(weight, precision, bias)
    x = randn(3, 512, seed=2).bfloat16()
    for _ in range(2):
        product(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = product(x)
    for seed in (3, 4):
        x.copy_(randn(3, 512, seed=seed))
        graph.replay()
        expected = x.float() @ weight.t() + bias
        assert float((out.float() - expected).norm() / expected.norm()) < LINES[precision] + 0.02


@needs_gpu
@pytest.mark.parametrize("format", ["int8", "int4", "fp8", "bf16"])
def test_weight_precision_stays_on_the_gpu(format, tmp_path, monkeypatch):
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 96)).cuda().eval()
    small = WeightPrecision(format, only_faster=False, tokens=4)(model, [randn(4, 256)])
    assert len(small.report.touched) == 2
    for rows in (1, 4, 200):
        x = randn(rows, 256, seed=rows)
        with torch.inference_mode():
            found, expected = small(x), model(x)
        assert found.device.type == "cuda"
        assert float((found - expected).norm() / expected.norm()) < 0.2
    assert copy.deepcopy(small)(x).shape == (200, 96)
    assert small[0].plain().weight.shape == (512, 256)


@needs_gpu
@pytest.mark.parametrize(
    ("weight", "activation", "kernel"),
    [
        (Int(8, PerChannel(0)), None, "int8-tiles"),
        (Int(8, PerChannel(0), symmetric=False), None, "int8-tiles"),
        (Int(8, PerChannel(0)), Int(8, PerToken(), dynamic=True), "int8-bytes"),
        (Int(8, PerChannel(0)), Int(8, PerToken(), dynamic=True), "int8"),
        (Int(4, PerGroup(1, 64)), None, "int4-g64-tiles"),
        (Int(4, PerGroup(1, 32), symmetric=False), None, "int4-g32-row"),
        (FP8_E4M3.per_channel(), None, "fp8-tiles"),
        (FP8_E4M3.per_channel(), "token", "fp8-dynamic"),
        (FP8_E4M3.per_channel(), "token", "fp8-bytes"),
    ],
)
def test_simulated_layers_become_real_on_the_gpu(weight, activation, kernel):
    from dataclasses import replace

    if activation == "token":
        activation = replace(FP8_E4M3, granularity=PerToken(), dynamic=True)
    model = nn.Sequential(nn.Linear(256, 128)).cuda().eval()
    assert kernel in candidates(weight, activation, (128, 256), "cuda")
    simulated = Quantize(weight=weight, activation=activation, real="never")(model)
    from hasten.compress.quantize.realise import realise

    real = realise(simulated[0], kernel)
    again, stored = real.quantized(), simulated[0].quantized()
    assert torch.equal(again.dequantize(), stored.dequantize())
    assert isinstance(real, IntegerLinear if kernel == "int8" else KernelLinear)
    for rows in (1, 7, 40):
        x = randn(rows, 256, seed=rows)
        with torch.inference_mode():
            found, expected = real(x), simulated(x)
        assert float((found - expected).norm() / expected.norm()) < 8e-3
    whole = Quantize(weight=weight, activation=activation, real="always")(model)
    assert " on " in whole.report.layers[0].action


def test_integer_layers_pad_what_cuda_wants():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = nn.Linear(36, 20).to(device)
    weight = Int(8, PerChannel(0)).quantize(layer.weight)
    real = IntegerLinear(weight, None, ActivationQuantizer(Int(8, PerToken(), dynamic=True)))
    x = randn(3, 36, device=device)
    expected = x @ layer.weight.t()
    assert float(((real(x) - expected).norm() / expected.norm()).detach()) < 0.02
