from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.clock import ManualClock
from hasten.compress import kernels
from hasten.errors import ConfigurationError
from hasten.measure import Protocol
from hasten.measure.cache import cache_folder

NAMES = [k.name for k in kernels.available()]


@pytest.fixture(autouse=True)
def _fresh_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    kernels._LOADED_FROM.clear()
    monkeypatch.setattr(kernels, "busy", lambda: False)


def test_the_plain_kernels_are_always_there() -> None:
    assert {"fp32", "bf16"} <= set(NAMES)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(1, 40),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 1000),
)
def test_error_stays_within_the_stated_bound(
    name: str, outs: int, ins: int, tokens: int, dtype: torch.dtype, seed: int
) -> None:
    kernel = kernels.kernel(name)
    shape = (16 * outs, 64 * ins)
    if not kernel.supports(*shape):
        return
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator)
    x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
    before = weight.clone()
    got = kernel.run(x, kernel.pack(weight))
    assert got.dtype == dtype
    assert got.shape == (tokens, shape[0])
    assert torch.equal(weight, before)
    expected = x.float() @ weight.t()
    # Rounding the result to bf16 adds its own half unit in the last place.
    allowed = kernel.error + (2**-8 if dtype is torch.bfloat16 else 0)
    # A single row of 16 results is a small sample of an error, hence the margin.
    margin = 1.0 + 6.0 / (tokens * shape[0]) ** 0.5
    assert (got.float() - expected).norm() <= allowed * margin * expected.norm()


@pytest.mark.parametrize("name", NAMES)
def test_unpack_gives_the_weight_that_is_used(name: str) -> None:
    kernel = kernels.kernel(name)
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    packed = kernel.pack(weight)
    used = kernel.unpack(packed)
    assert used.dtype == torch.float32
    relative = (used - weight).norm() / weight.norm()
    assert relative <= kernel.error
    bits = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}[kernel.precision]
    panels = name.endswith("-panels")
    rows = 64 if panels else 32  # a panel has 64 outputs
    scales = 2 if panels else 4  # bytes for each group: a float16, or a bfloat16 and an offset
    overhead = {"int8": 4 * 32, "int4": scales * rows * 256 // max(packed.group, 1)}.get(kernel.precision, 0)
    assert packed.bytes == rows * 256 * bits // 8 + overhead


@pytest.mark.parametrize("name", NAMES)
def test_a_packed_weight_shares_nothing_with_the_given_one(name: str) -> None:
    kernel, weight, x = kernels.kernel(name), torch.randn(32, 256), torch.randn(2, 256)
    packed = kernel.pack(weight)
    before = kernel.run(x, packed)
    weight.zero_()
    assert torch.equal(kernel.run(x, packed), before)


def test_quantised_codes_match_the_slow_twin() -> None:
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(3))
    codes, scale = kernels._quantise_rows(weight)
    for row in range(16):
        step = max(abs(v) for v in weight[row].tolist()) / 127
        assert scale[row].item() == pytest.approx(step)
        for column in range(32):
            assert abs(codes[row, column].item() * step - weight[row, column].item()) <= step / 2 * 1.0001


@pytest.mark.parametrize("weight", [torch.zeros(16, 64), torch.full((16, 64), 3.0), torch.full((16, 64), -1e-20)])
def test_constant_weights_survive(weight: torch.Tensor) -> None:
    for kernel in kernels.available():
        if kernel.supports(16, 64):
            got = kernel.run(torch.ones(2, 64), kernel.pack(weight))
            assert torch.isfinite(got).all()
            assert got == pytest.approx(weight.sum(dim=1).expand(2, 16), rel=2e-2, abs=1e-6)


def test_zero_rows_of_input_survive() -> None:
    kernel = kernels.kernel("int8-dynamic") if "int8-dynamic" in NAMES else kernels.kernel("fp32")
    assert kernel.run(torch.zeros(2, 64), kernel.pack(torch.randn(16, 64))).abs().max() == 0


QUICK = Protocol(warmup=1, warmup_time=0, min_samples=2, min_time=0)


def test_measured_once_then_read_from_the_table() -> None:
    times = kernels.measure_kernels((32, 64), 2, ["fp32", "bf16"], copies_bytes=0, protocol=QUICK)
    assert set(times) == {"fp32", "bf16"}
    assert all(t > 0 for t in times.values())
    (file,) = (cache_folder() / "kernels").iterdir()
    assert json.loads(file.read_text())["32x64x2"] == times
    kernels._LOADED_FROM.clear()
    clock = ManualClock()  # would give zeros
    assert kernels.measure_kernels((32, 64), 2, ["fp32", "bf16"], clock=clock, copies_bytes=0) == times


def test_a_float32_model_pays_its_conversions() -> None:
    """The rows of a float32 model are timed as they come, in a row of the table of their own."""
    seen: list[torch.dtype] = []
    kernel = kernels.kernel("bf16")
    run = kernel.run
    try:
        object.__setattr__(kernel, "run", lambda x, p: (seen.append(x.dtype), run(x, p))[1])
        for rows in (torch.bfloat16, torch.float32):
            kernels.measure_kernels((32, 64), 3, ["fp32", "bf16"], copies_bytes=0, protocol=QUICK, inputs=rows)
            assert set(seen) == {rows}
            seen.clear()
    finally:
        object.__setattr__(kernel, "run", run)
    (file,) = (cache_folder() / "kernels").iterdir()
    assert {"32x64x3", "32x64x3xfloat32"} <= set(json.loads(file.read_text()))


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 3, 16, 60, 130])
def test_quantized_product(precision: str, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight, bias = torch.randn(32, 64, generator=generator), torch.randn(32, generator=generator)
    x = torch.randn(rows, 64, generator=generator)
    product, size = kernels.quantized_product(weight.bfloat16(), precision, bias.bfloat16())
    expected = x @ weight.t() + bias
    got = product(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() <= (0.03 if precision == "int8" else 0.16) * expected.norm()
    rows, scales = (64, 2) if f"{precision}-panels" in NAMES else (32, 4)
    assert size == {"int8": rows * 64 + 4 * 32, "int4": rows * 32 + scales * rows * 2}[precision]


def test_quantized_product_of_an_odd_shape_is_bf16() -> None:
    weight = torch.randn(10, 7)
    product, size = kernels.quantized_product(weight, "int4")
    assert size == 2 * 70
    assert torch.allclose(product(torch.ones(1, 7)), weight.sum(dim=1)[None], atol=0.05)
    with pytest.raises(ConfigurationError, match="not quantised"):
        kernels.quantized_product(weight, "bf16")


def test_a_busy_machine_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "busy", lambda: True)
    assert kernels.measure_kernels((32, 64), 2, ["fp32"], copies_bytes=0, protocol=QUICK)["fp32"] > 0
    assert not (cache_folder() / "kernels").exists()


def test_fastest_reads_the_table() -> None:
    path = kernels._table_path()
    path.parent.mkdir(parents=True)
    row = dict.fromkeys(NAMES, 5.0) | {"bf16": 1.0}
    path.write_text(json.dumps({"64x64x4": row}))
    assert kernels.fastest((64, 64), 4) == "bf16"
    assert kernels.fastest((64, 64), 4, ["fp32"]) == "fp32"
    with pytest.raises(ConfigurationError, match="no kernel in int4, int8 takes"):
        kernels.fastest((10, 10), 1, ["int8", "int4"])


@pytest.mark.parametrize("garbage", ["", "[1]", '{"64x64x4": 3}'])
def test_a_broken_table_counts_as_empty(garbage: str) -> None:
    path = kernels._table_path()
    path.parent.mkdir(parents=True)
    path.write_text(garbage)
    assert kernels.measure_kernels((32, 64), 1, ["fp32"], copies_bytes=0, protocol=QUICK)["fp32"] > 0


def test_unknown_kernel() -> None:
    with pytest.raises(ConfigurationError, match="no kernel 'x' here"):
        kernels.kernel("x")
