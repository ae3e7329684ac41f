"""Four bits with a branch: exact where it claims to be, better than smoothing where outliers are."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hasten.compress import exportable
from hasten.compress.lowrank.absorb import absorb, activation_traffic, error_bound, smoothing
from hasten.compress.lowrank.fourbit import SvdQuantLinear, pack_codes, set_execution, unpack_codes
from hasten.compress.lowrank.svdquant import SvdQuant, add_lora, load_svdquant, save_svdquant
from hasten.compress.quantize import Int, PerGroup
from hasten.errors import ConfigurationError, DataError
from hasten.testing.technique_kit import TechniqueKit

torch.set_num_threads(1)


def outlier_layer(size=128, rows=300, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(rows, size, generator=g), torch.randn(size, size, generator=g) / size**0.5
    x[:, torch.randperm(size, generator=g)[:3]] *= 30
    w[:, torch.randperm(size, generator=g)[:2]] *= 4
    return w, x


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 10_000))
def test_packing_round_trips(rows, pairs, seed):
    codes = torch.randint(-8, 8, (rows, 2 * pairs), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    assert torch.equal(unpack_codes(pack_codes(codes)), codes)
    assert pack_codes(codes).numel() * 2 == codes.numel()


def test_full_rank_leaves_rounding_only():
    w, x = outlier_layer(64)
    assert absorb(w, x, rank=64, dtype=torch.float32, grid=3).error <= 1e-5


def test_smoothing_alone_changes_nothing():
    w, x = outlier_layer()
    vector = smoothing(x, w, 0.5)
    expected = x @ w.T
    assert ((x / vector) @ (w * vector).T - expected).norm() <= 1e-5 * expected.norm()
    assert torch.equal(vector, vector.to(torch.bfloat16).float())


def test_residual_is_the_tail():
    w, x = outlier_layer()
    made = absorb(w, x, rank=16, grid=0, dtype=torch.float32)
    tail = torch.linalg.svdvals(w.double())[16:].square().sum().sqrt()
    gap = (w.double() - made.up.double() @ made.down.double()).norm()
    assert abs(float(gap - tail)) <= 1e-6 * float(tail)


def test_each_step_helps_where_outliers_are():
    w, x = outlier_layer()
    naive = absorb(w, x, rank=0, grid=0).error
    smooth = absorb(w, x, rank=0).error
    ranks = [absorb(w, x, rank=r).error for r in (4, 8, 16, 32)]
    assert smooth <= 0.5 * naive
    assert ranks[-1] <= 0.5 * smooth
    assert ranks == sorted(ranks, reverse=True)
    again = absorb(w, x, rank=16, iterations=10)
    assert again.error <= ranks[2]
    assert absorb(w, x, rank=16, iterations=10, use_gptq=True).error <= again.error


def test_the_bound_holds():
    w, x = outlier_layer()
    fmt = Int(4, PerGroup(1, 64))
    wq, xq = fmt.fake(w), fmt.fake(x)
    assert float((x @ w.T - xq @ wq.T).norm()) <= error_bound(x, w, xq, wq)


def quantised(layer, x, **knobs):
    return SvdQuant(**{"rank": 8, "grid": 3, "iterations": 2, **knobs})(nn.Sequential(layer), [x])[0]


def test_exact_execution_is_integer_arithmetic():
    """Against sums of products of integers, group by group, in float64."""
    w, x = outlier_layer()
    layer = nn.Linear(128, 128)
    layer.weight.data = w
    new = quantised(layer, x, shift=False)
    rows = x[:7]
    smoothed = rows / new.smooth.float()
    q = Int(4, PerGroup(1, 64)).quantize(smoothed)
    codes = unpack_codes(new.codes)
    expected = (smoothed.double() @ new.down.double().T) @ new.up.double().T + layer.bias.detach().double()
    for g in range(2):
        part = slice(64 * g, 64 * g + 64)
        products = torch._int_mm(q.codes[:, part].repeat(3, 1)[:20], codes[:, part].t().contiguous())[:7].double()
        expected += products * q.scales[:, g : g + 1].double() * new.scales[:, g].double()
    torch.testing.assert_close(new(rows).double(), expected, atol=2e-4, rtol=1e-4)


def test_fast_execution_is_close_and_fuses_without_a_difference(monkeypatch):
    monkeypatch.setattr("hasten.compress.kernels.fastest", lambda shape, tokens, precisions: "int8-dynamic")
    w, x = outlier_layer()
    layer = nn.Linear(128, 128)
    layer.weight.data = w
    new = quantised(layer, x)
    fast = set_execution(copy.deepcopy(new), "fast")
    expected = layer(x)
    errors = [float((m(x) - expected).norm() / expected.norm()) for m in (new, fast)]
    assert errors[1] < errors[0] + 0.01
    torch.testing.assert_close(fast(x), fast.unfused(x), atol=0.3, rtol=0.05)
    with pytest.raises(ConfigurationError, match="exact or fast"):
        set_execution(new, "slow")


def test_adapters_are_exact():
    w, x = outlier_layer()
    model = nn.Sequential(nn.Linear(128, 128))
    model[0].weight.data = w
    small = SvdQuant(rank=8, grid=3, iterations=1, branch="float32")(model, [x])
    a, b = torch.randn(4, 128) * 0.1, torch.randn(128, 4) * 0.1
    wide = add_lora(small, {"0.lora_A.weight": a, "0.lora_B.weight": b}, scale=0.8)
    assert wide[0].rank == 12
    assert torch.equal(wide[0].codes, small[0].codes)
    gap = wide[0].effective_weight() - small[0].effective_weight() - 0.8 * b.double() @ a.double()
    assert float(gap.abs().max()) <= 1e-6
    with pytest.raises(ConfigurationError, match="no such linear layer"):
        add_lora(small, {"1.lora_A.weight": a, "1.lora_B.weight": b})
    with pytest.raises(ConfigurationError, match="another model"):
        add_lora(small, {"0.lora_A.weight": a[:, :64], "0.lora_B.weight": b})


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(32, 64)

    def forward(self, x):
        return self.o(self.q(x)[..., :32] * self.k(x))


def test_layers_of_one_input_share_the_down_projection(tmp_path):
    torch.manual_seed(0)
    model, x = Shared(), torch.randn(50, 64)
    small = SvdQuant(rank=8, group=32, grid=3, iterations=1)(model, [x, x * 2])
    assert small.q.down is small.k.down
    assert small.q.smooth is small.k.smooth
    assert small.o.down is not small.q.down
    apart = SvdQuant(rank=8, group=32, grid=3, iterations=1, share=False)(model, [x])
    assert small.report.bytes_after < apart.report.bytes_after
    save_svdquant(small, tmp_path)
    again = load_svdquant(Shared(), tmp_path)
    assert torch.equal(again(x), small.eval()(x))
    assert again.q.down.data_ptr() == again.k.down.data_ptr()
    stored = (tmp_path / "model.safetensors").stat().st_size
    assert stored < small.report.bytes_after + 4 * 160 + 4096  # biases and the header
    with pytest.raises(DataError, match="do not fit"):
        load_svdquant(nn.Sequential(nn.Linear(64, 64)), tmp_path)


def test_size_of_a_wide_layer_on_disk(tmp_path):
    layer = SvdQuantLinear(in_features=3072, out_features=3072, rank=32)
    save_svdquant(nn.Sequential(layer), tmp_path)
    assert 2 * 3072**2 / (tmp_path / "model.safetensors").stat().st_size >= 3.4
    assert layer.overhead == 32 * 6144 / 3072**2
    assert activation_traffic(3072, 3072, fused=False) >= 2 * activation_traffic(3072, 3072, fused=True)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"rank": 64}, "0 is 64 x 64: rank 64"),
        ({"rank": 4, "group": 48}, "0 has 64 inputs"),
        ({"rank": 4, "gptq": True, "rows": 8}, "calibration gave 8 rows"),
    ],
)
def test_layers_that_do_not_fit_are_named(knobs, words):
    with pytest.raises(ConfigurationError, match=words):
        SvdQuant(**knobs)(nn.Sequential(nn.Linear(64, 64)), [torch.randn(20, 64)])


def test_bad_numbers_are_named():
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(DataError, match="calibration input 0 holds NaN"):
        SvdQuant(rank=4)(model, [torch.full((20, 64), float("nan"))])
    broken = nn.Sequential(nn.Threshold(1e9, float("nan")), nn.Linear(64, 64))
    with pytest.raises(DataError, match="input of 1"):  # made by the model itself
        SvdQuant(rank=4)(broken, [torch.randn(20, 64)])
    model[0].weight.data[0, 0] = float("inf")
    with pytest.raises(ConfigurationError, match="layer '0': its weight holds NaN or infinity"):
        SvdQuant(rank=4)(model, [torch.randn(20, 64)])


@pytest.mark.parametrize("knobs", [{"rank": -1}, {"bits": 8}, {"group": 3}, {"branch": "x"}, {"rows": 0}])
def test_bad_knobs(knobs):
    with pytest.raises(ConfigurationError):
        SvdQuant(**knobs)


def test_zero_points_help_behind_gelu():
    torch.manual_seed(0)
    x = nn.functional.gelu(torch.randn(400, 64))
    w = torch.randn(64, 64)
    assert absorb(w, x, rank=4, grid=3, shift=True).error < absorb(w, x, rank=4, grid=3).error


def test_plain_form_has_the_same_numbers():
    for shift in (False, True):
        layer, x = nn.Linear(64, 64), nn.functional.gelu(torch.randn(50, 64))
        new = quantised(layer, x, shift=shift)
        torch.testing.assert_close(exportable(nn.Sequential(new))(x), new(x), atol=1e-4, rtol=1e-4)


def test_floats_of_four_bits(tmp_path):
    torch.manual_seed(0)
    w, x = outlier_layer(64)
    model = nn.Sequential(nn.Linear(64, 64))
    model[0].weight.data = w
    small = SvdQuant(rank=8, group=16, format="nvfp4", grid=5, iterations=3)(model, [x])
    made = absorb(w, x, rank=8, form="nvfp4", group=16, grid=5, iterations=3)
    torch.testing.assert_close(small[0].residual(), made.residual, atol=0, rtol=0)
    naive = absorb(w, x, rank=0, form="nvfp4", group=16, grid=0)
    assert small.report.layers[0].error < 0.5 * naive.error
    assert small[0].codes.numel() == 64 * 32
    assert small[0].scales.dtype == torch.float8_e4m3fn
    save_svdquant(small, tmp_path)
    again = load_svdquant(model, tmp_path)
    assert torch.equal(again(x), small.eval()(x))
    torch.testing.assert_close(exportable(small)(x), small(x), atol=1e-4, rtol=1e-4)
    wide = add_lora(small, {"0.lora_A.weight": torch.randn(2, 64), "0.lora_B.weight": torch.randn(64, 2)})
    assert torch.equal(wide[0].residual(), small[0].residual())
    with pytest.raises(ConfigurationError, match="group=16"):
        SvdQuant(format="nvfp4")


class TestKit(TechniqueKit):
    technique = SvdQuant(rank=8, group=32, grid=5, iterations=3)
    keeps = {"sqnr": 15.0}

    def test_same_input_same_result(self, parts):
        model, example, new = parts
        again = self.technique(model, [example])
        with torch.inference_mode():
            assert torch.equal(new(example), again(example))
