from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from hasten.compress import AdaptiveComputation, FusedNetwork, Recipe, sqnr
from hasten.compress.fused import FusedModule, run
from hasten.compress.fused.values import Buffer, Value, contiguous, merged, viewed
from hasten.errors import ConfigurationError
from hasten.events.t2 import T2, T2Config
from hasten.nn.product import float32
from hasten.nn.product.instructions import has_bfloat16, has_bytes
from hasten.studies._vision_models import VisionTransformer
from hasten.testing import TechniqueKit

pytestmark = pytest.mark.skipif(not has_bytes(), reason="needs registers of 512 bits")


class TestFloat32(TechniqueKit):
    technique = FusedNetwork(only_faster=False)
    keeps = {"sqnr": 100.0}


class TestBytes(TechniqueKit):
    technique = FusedNetwork("int8", only_faster=False)
    keeps = {"sqnr": 25.0}


@pytest.mark.skipif(not has_bfloat16(), reason="needs vdpbf16ps")
class TestBfloat16(TechniqueKit):
    technique = FusedNetwork("bf16", only_faster=False)
    keeps = {"sqnr": 30.0}


class _Does(nn.Module):
    """One function, behind a product so that what it reads is computed."""

    def __init__(self, function: Callable[..., Tensor], width: int = 24) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


class _Of(nn.Module):
    """A function of the input itself."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def _hand_written(x: Tensor) -> Tensor:
    q, k, v = x.view(len(x), -1, 2, 12).transpose(1, 2).split(4, -1)
    return ((q @ k.transpose(-1, -2)) / 2).softmax(-1) @ v


def _attention(causal: bool = False, mask: Any = None, shared: int = 1, width: int = 4) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        q = x[..., :16].unflatten(-1, (-1, width)).transpose(1, 2)
        k = q[:, ::shared] * 0.5 + 0.1
        v = torch.relu(k)
        mixed = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=shared > 1)
        return mixed.transpose(1, 2).flatten(2)

    return run


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu, "gelu": functional.gelu, "gelu tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "exp": torch.exp, "erf": torch.erf,
    "sqrt": lambda x: torch.sqrt(x.abs()), "rsqrt": lambda x: torch.rsqrt(x.square() + 1), "neg": lambda x: -x,
    "log": lambda x: torch.log(x.abs() + 1), "sin": torch.sin, "cos": torch.cos, "reciprocal": lambda x: 1 / (2 + x**2),
    "add": lambda x: x + x[:, :1], "sub": lambda x: torch.sub(x, x[..., :1], alpha=2), "mul": lambda x: x * 3.0,
    "div": lambda x: x / (x.square() + 1), "clamp": lambda x: x.clamp(-0.2, 0.3), "relu6": functional.relu6,
    "maximum": lambda x: torch.maximum(x, -x), "pow": lambda x: x.pow(2) + (x.abs() + 1).pow(0.5),
    "mean": lambda x: x.mean(1), "mean all": lambda x: x.mean((1, 2)), "sum": lambda x: x.sum(-1, keepdim=True),
    "amax": lambda x: x.amax(2), "softmax": lambda x: x.softmax(-1), "softmax over time": lambda x: x.softmax(1),
    "layer norm": lambda x: functional.layer_norm(x, (24,)), "rms norm": lambda x: functional.rms_norm(x, (24,)),
    "layer norm of two": lambda x: functional.layer_norm(x, tuple(x.shape[1:])),
    "transpose": lambda x: x.transpose(1, 2), "transposed, then all": lambda x: torch.relu(x.transpose(1, 2)) * 2,
    "permute": lambda x: x.unflatten(-1, (2, 3, 4)).permute(0, 4, 1, 3, 2).flatten(1), "select": lambda x: x[:, 2],
    "slice": lambda x: x[:, 1::2, 3:20], "chunk": lambda x: torch.cat([c + 1 for c in x.chunk(3, -1)], 1),
    "unbind": lambda x: x.unflatten(-1, (2, 12)).unbind(2)[1], "stack": lambda x: torch.stack([x, -x], 2),
    "cat": lambda x: torch.cat([x, x[:, :1] * 2], 1), "expand": lambda x: x[:, :1].expand(-1, 5, -1) + x[:, :1],
    "unsqueeze": lambda x: x[:, None].squeeze(1), "hand-written attention": _hand_written,
    "attention": _attention(), "causal": _attention(causal=True), "shared keys": _attention(shared=2),
    "wide heads": _attention(width=16), "masked": _attention(mask=torch.ones(6, 6).tril().bool()),
    "added mask": _attention(mask=torch.randn(6, 6, generator=torch.Generator().manual_seed(3))),
    "matmul": lambda x: x @ x.transpose(1, 2), "pooled": lambda x: functional.adaptive_avg_pool1d(x, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_operation_is_that_of_torch(name: str) -> None:
    torch.manual_seed(0)
    model, x = _Does(FUNCTIONS[name]).eval(), torch.randn(3, 6, 24)
    with torch.inference_mode():
        made = FusedModule(model, "fp32")(x)
        expected = model(x)
    assert made.shape == expected.shape
    torch.testing.assert_close(made, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(6, 8, 1), (2, 6, 9)),
        (nn.Conv1d(6, 8, 3, stride=2, dilation=2), (2, 6, 15)),
        (nn.Conv2d(3, 8, 4, stride=4), (2, 3, 12, 8)),
        (nn.Conv1d(6, 8, 5, padding=2), (2, 6, 9)),
        (nn.Conv2d(3, 8, 3, padding=(2, 1), stride=2, dilation=2), (2, 3, 9, 8)),
        (nn.Conv2d(3, 8, (3, 4), padding="same"), (2, 3, 5, 7)),
        (nn.Sequential(nn.ConstantPad1d((4, -1), 0.5), nn.Conv1d(6, 8, 5)), (2, 6, 9)),
        (nn.MaxPool2d(3, 2, padding=1), (2, 3, 9, 8)),
        (nn.Sequential(nn.MaxPool2d(3, 2, ceil_mode=True), nn.AvgPool2d(2, padding=1)), (2, 3, 9, 8)),
        (nn.Sequential(nn.MaxPool1d(3, 1, padding=1), nn.AvgPool1d(2)), (2, 3, 9)),
        (
            nn.Sequential(
                nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5),
            ),
            (3, 3, 8, 8),
        ),
        (nn.Sequential(nn.Conv2d(3, 8, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)), (2, 3, 5, 7)),
        (nn.Sequential(nn.Linear(70, 130, bias=False), nn.LayerNorm(130), nn.Linear(130, 1)), (5, 70)),
    ],
)  # fmt: skip
def test_a_layer_is_that_of_torch(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    x = torch.randn(shape)
    with torch.inference_mode():
        torch.testing.assert_close(FusedModule(layer.eval(), "fp32")(x), layer(x), rtol=2e-5, atol=2e-6)


def _transformers() -> list[tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    return [
        (VisionTransformer(size=8, patch=2, width=32, depth=2).eval(), torch.rand(5, 1, 8, 8)),
        (T2(T2Config(bands=6, classes=7)).eval(), torch.rand(5, 40, 6)),
        (nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval(), torch.rand(5, 9, 32)),
    ]


@pytest.mark.parametrize("number", range(3))
def test_a_transformer_in_one_call(number: int) -> None:
    model, x = _transformers()[number]
    with torch.inference_mode():
        fused = FusedModule(model, "fp32")
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
        one_by_one = torch.cat([fused(one) for one in x.split(1)])
    assert torch.equal(one_by_one, fused(x))  # a sample's bits do not depend on its neighbours


def test_threads_share_a_batch() -> None:
    model, x = _transformers()[0]
    fused, before = FusedModule(model, "int8"), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = fused(x)
        torch.set_num_threads(3)
        assert torch.equal(fused(x), alone)
    finally:
        torch.set_num_threads(before)


def test_another_shape_is_another_program() -> None:
    model, x = _transformers()[1]
    fused = FusedModule(model, "fp32")
    with torch.inference_mode():
        for length in (40, 25, 40):
            torch.testing.assert_close(fused(x[:, :length]), model(x[:, :length]), rtol=1e-4, atol=1e-5)
    assert len(fused._programs) == 2


def test_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.linear(x) * y[:, None]

    model, inputs = Two().eval(), (torch.rand(3, 5, 8), torch.rand(3, 4))
    with torch.inference_mode():
        torch.testing.assert_close(FusedModule(model, "fp32")(*inputs), model(*inputs))


class _Text(nn.Module):
    """Words and their places looked up, a layer of attention, two results by name."""

    def __init__(self, words: int = 50) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, 16, padding_idx=0), nn.Embedding(9, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        hidden = self.layer(self.words(ids) + self.places(torch.arange(ids.shape[1]))).mean(1)
        return {"logits": self.head(hidden), "hidden": hidden}


def test_words_that_are_looked_up() -> None:
    torch.manual_seed(0)
    model, ids = _Text().eval(), torch.randint(50, (5, 7))
    ids[0, 0], ids[0, 1] = 0, 49
    fused, before = FusedModule(model, "fp32"), torch.get_num_threads()
    with torch.inference_mode():
        expected = model(ids)
        for given in (ids, ids.int(), ids.T.contiguous().T):
            made = fused(given)
            assert list(made) == ["logits", "hidden"]
            for name, value in made.items():
                torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
        try:
            torch.set_num_threads(3)
            assert torch.equal(fused(ids)["logits"], made["logits"])
        finally:
            torch.set_num_threads(before)
        assert fused(ids[:0])["logits"].shape == (0, 3)
    for bad, held in ((ids + 1, 50), (-ids, -49)):
        with pytest.raises(ConfigurationError, match=f"input 0 holds {held}; give whole numbers from 0 to 49"):
            fused(bad)
    new: Any = FusedNetwork("int8", only_faster=False)(model, [ids])
    assert isinstance(new, FusedModule)
    assert new.report.measured["sqnr"] > 20


def test_a_look_up_costs_its_lines_once_for_all_threads_and_shapes() -> None:
    """A table of words may be larger than all else, and an arena belongs to a thread."""
    fused = FusedModule(_Text(5000).eval(), "fp32")
    programs = [fused.program(torch.zeros(2, length, dtype=torch.long)) for length in (5, 7)]
    assert all(4 * p.size < 5000 * 16 for p in programs)
    first, second = (p.table[p.table[:, 0] == run.LOOKUP][0, 4] for p in programs)
    assert first == second
    assert 5000 * 16 * 4 < fused.packed_bytes < 5000 * 16 * 4 + 60_000


def test_whole_numbers_on_their_way() -> None:
    """Cut, turned, with others beside them, and as numbers."""

    class Ways(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.linear = nn.Embedding(12, 4), nn.Embedding(9, 4), nn.Linear(4, 4)

        def forward(self, ids: Tensor, x: Tensor) -> tuple[Any, ...]:
            turned = self.first(ids[:, ::2].transpose(1, 2).flatten(1)) + x
            return turned, (self.second(ids[:, 1, 0]), ids.float() / 3), [self.linear(x)]

    torch.manual_seed(0)
    model, inputs = Ways().eval(), (torch.randint(9, (3, 4, 3)), torch.rand(3, 6, 4))
    fused = FusedModule(model, "fp32")
    with torch.inference_mode():
        torch.testing.assert_close(fused(*inputs), model(*inputs))
    with pytest.raises(ConfigurationError, match="input 0 holds 9; give whole numbers from 0 to 8"):
        fused(torch.full_like(inputs[0], 9), inputs[1])  # in the first table, and not in the second


@pytest.mark.parametrize(
    ("model", "example", "why"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), torch.rand(1, 4, 8, 8), "a convolution in 2 groups"),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), torch.rand(1, 3, 8, 8), "a border that is reflect"),
        (nn.AvgPool1d(3, padding=1, count_include_pad=False), torch.rand(1, 3, 8), "a mean that counts by the place"),
        (nn.Sequential(nn.Linear(4, 4), nn.LogSigmoid()), torch.rand(1, 4), "log_sigmoid"),
        (_Of(lambda x: x + 1), torch.tensor([[1, 2]]), "add gives torch.int64"),
        (_Of(lambda x: (x * 0.5, x)), torch.tensor([[1, 2]]), "a result (x) is no tensor of float32 made of the"),
        (_Of(lambda x: x * 2), torch.rand(1, 2) > 0.5, "not all tensors of float32 or whole numbers"),
        (_Of(lambda x: x * 2), torch.rand(1, 2).double(), "not all tensors of float32"),
        (_Of(lambda x: (x * 2, torch.ones(1, 2))), torch.rand(1, 2), "(ones) depends on no input"),
        (_Does(lambda x: x - x.mean(0), 4), torch.rand(4, 4), "may depend on each other"),
        (_Does(lambda x: x.argmax(-1), 4), torch.rand(2, 4), "argmax"),
        (_Does(lambda x: (x, None), 4), torch.rand(2, 4), "a result (None) is no tensor"),  # type: ignore[arg-type,return-value]
    ],
)
def test_what_cannot_be_lowered_is_named_and_kept(model: nn.Module, example: Tensor, why: str) -> None:
    new: Any = FusedNetwork(only_faster=False)(model.eval(), [example])
    assert not new.report.touched
    assert why in new.report.notes[0]
    assert type(new) is type(model)


def test_a_slower_call_keeps_the_model() -> None:
    from hasten.clock import ManualClock

    clock = ManualClock()

    class Plain(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            clock.advance(1.0)
            return super().forward(x)

    class Slow(FusedModule):
        def forward(self, *inputs: Tensor) -> Tensor:
            clock.advance(2.0)
            return super().forward(*inputs)

    import hasten.compress.fused.technique as made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, "FusedModule", Slow)
        new: Any = FusedNetwork()(Plain(8, 8).eval(), [torch.rand(1, 8)], clock=clock)
    assert not new.report.touched
    assert "one call would take 2.00× the time" in new.report.notes[0]


def test_bad_knobs_and_inputs() -> None:
    with pytest.raises(ConfigurationError, match="fp64"):
        FusedNetwork("fp64")
    with pytest.raises(ConfigurationError, match="give calibration"):
        FusedNetwork()(nn.Linear(4, 4))
    broken = nn.Linear(4, 4)
    broken.weight.data[0, 0] = math.nan
    with pytest.raises(ConfigurationError, match="weight holds NaN"):
        FusedNetwork()(broken, [torch.rand(1, 4)])
    fused = FusedModule(nn.Linear(4, 4).eval(), "fp32")
    with pytest.raises(ConfigurationError, match="begin with one batch"):
        fused(torch.tensor(1.0))
    with pytest.raises(ConfigurationError, match="cannot be run in one call"):
        fused(torch.rand(1, 5))
    with pytest.raises(ConfigurationError, match=r"an input is torch.float64 on cpu, and .* takes float32"):
        fused(torch.rand(1, 4).double())


def test_it_follows_low_rank_factors() -> None:
    from hasten.compress import TruncatedSvd

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval(), torch.randn(4, 64)
    recipe = Recipe((TruncatedSvd(ratio=0.5), FusedNetwork("int8", only_faster=False)))
    made, plan = recipe.apply(model, [x])
    again, _ = Recipe(Recipe.from_yaml(recipe.to_yaml()).techniques, plan).apply(model, [x])
    assert isinstance(made, FusedModule)
    with torch.inference_mode():
        low, _ = Recipe(recipe.techniques[:1]).apply(model, [x])
        assert sqnr(low(x), made(x)) > 25
        assert torch.equal(made(x), again(x))


@pytest.mark.parametrize(("precision", "quality"), [("fp32", 100.0), ("bf16", 35.0), ("int8", 25.0)])
def test_gates_and_learners_in_one_call(precision: str, quality: float) -> None:
    """Of three layers: one whose gate chooses, one that always runs a learner, one of a fixed number."""
    if precision == "bf16" and not has_bfloat16():
        pytest.skip("needs vdpbf16ps")
    torch.manual_seed(0)
    layers = [
        AdaptiveComputation(width=24, learners=3, size=10, least=least, activation=name)
        for least, name in ((0, "gelu"), (1, "identity"), (0, "silu"))
    ]
    for layer in layers[:2]:
        layer.fixed = None
        nn.init.normal_(layer.out)
        nn.init.normal_(layer.gate[-1].weight, std=3.0)  # type: ignore[arg-type]
    layers[2].fixed = 2
    model, x = nn.Sequential(nn.Linear(24, 24), *layers).eval(), torch.randn(3, 300, 24)
    fused = FusedModule(model, precision)
    with torch.inference_mode():
        made, expected = fused(x), model(x)
    assert len(layers[0].last.unique()) > 1  # type: ignore[union-attr]
    assert int(layers[1].last.min()) == 1  # type: ignore[union-attr]
    with torch.inference_mode():
        assert sqnr(fused.plain()(x), made) > quality - 10
    if precision == "fp32":  # in others a gate may be asked about other numbers
        assert sqnr(expected, made) > quality
    assert {m.rpartition(".")[0] for m in fused.matrices.names if "gate" in m} == {
        f"{i}.gate.{j}" for i in (1, 2) for j in (0, 2, 4)
    }
    new: Any = FusedNetwork(precision, only_faster=False)(model, [x[:1]])
    assert {r.layer: r.action for r in new.report.layers}["1"] == precision


# ---- values ----------------------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_views_are_those_of_torch(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4)))
    order = data.draw(st.permutations(range(len(shape))))
    base = torch.arange(math.prod(shape)).view(shape).permute(*order)
    factors = [f for n in base.shape for f in ([2, 2] if n == 4 and data.draw(st.booleans()) else [n])]
    joined: list[int] = []
    for f in factors:
        if joined and data.draw(st.booleans()):
            joined[-1] *= f
        else:
            joined.append(f)
    found = viewed(Value(Buffer(base.numel()), tuple(base.shape), base.stride()), tuple(joined))
    try:
        expected = base.view(joined)
    except RuntimeError:
        expected = None
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert torch.equal(torch.as_strided(base, joined, found.strides), expected)


@given(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_a_merged_loop_meets_the_same_numbers(sizes: list[int], random: Any) -> None:
    plain = contiguous(tuple(sizes))
    other = tuple(0 if random.random() < 0.3 else s for s in plain)
    fewer, strides = merged(tuple(sizes), [plain, other])

    def met(shape: tuple[int, ...], steps: tuple[int, ...]) -> list[int]:
        places = np.indices(shape).reshape(len(shape), -1).T
        return [int(v) for v in places @ np.array(steps)]

    assert len(fewer) <= len(sizes)
    assert met(fewer, strides[0]) == met(tuple(sizes), plain)
    assert met(fewer, strides[1]) == met(tuple(sizes), other)


@pytest.mark.parametrize(
    ("rows", "ins", "outs"), [(1, 1, 1), (7, 33, 64), (13, 128, 70), (17, 5, 32), (9, 40, 97), (10, 3, 80)]
)
def test_a_product_in_float32(rows: int, ins: int, outs: int) -> None:
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.standard_normal(s).astype(np.float32) for s in ((rows, ins), (outs, ins), (outs,)))
    packed, out = float32.pack(weight), np.empty((rows, outs), np.float32)
    float32.multiply_rows(
        x.ctypes.data, x.strides[0], rows, ins, packed.ctypes.data, bias, np.empty(rows * 64, np.float32), out
    )
    np.testing.assert_allclose(out, x @ weight.T + bias, rtol=1e-5, atol=1e-5)
    assert np.array_equal(float32.unpack(packed, outs), weight)
