"""Products with codes on a GPU: there where there is one, else under Triton's interpreter."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.compress import device_codes as layout
from hasten.compress import kernels_cuda
from hasten.compress import kernels_triton as ours
from hasten.compress.kernels_triton import Tiling
from hasten.compress.quantize import FP8_E4M3, Int, MiniFloat, PerChannel, PerGroup, PerTensor
from hasten.compress.quantize.device import packed_of, readable

if ours.triton is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FORMATS = {
    "int8": Int(8, PerChannel(0)),
    "int8, one scale": Int(8, PerTensor()),
    "int8, groups, affine": Int(8, PerGroup(1, 16), symmetric=False),
    "int6": Int(6, PerChannel(0)),
    "uint8": Int(8, PerChannel(0), symmetric=False),
    "int4": Int(4, PerGroup(1, 32)),
    "int4, full range": Int(4, PerGroup(1, 64), full_range=True),
    "uint4": Int(4, PerGroup(1, 32), symmetric=False),
    "int4, rows": Int(4, PerChannel(0)),
    "fp8": FP8_E4M3.per_channel(),
    "fp8, groups": FP8_E4M3.per_group(32),
}
WAYS = {
    "row": ours.by_row,
    "tiles": lambda x, p, b: ours.by_tiles(x, p, b, Tiling(32, 32, 16)),
    "tiles, shared": lambda x, p, b: ours.by_tiles(x, p, b, Tiling(32, 32, 16, splits=3)),
    "tiles, sums scaled": lambda x, p, b: ours.by_tiles(x, p, b, Tiling(16, 16, 16, splits=2, apart=True)),
    "opened": ours.by_opening,
}


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def laid_out(fmt, weight):
    found = packed_of(fmt.quantize(weight))
    assert found is not None
    return found[1]


def gap(found, expected):
    """Norm of the difference over that of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9))


def near(found, expected, bound):
    assert gap(found, expected) < bound


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(FORMATS)), outs=st.integers(1, 70), inner=st.integers(1, 150), seed=st.integers(0, 99)
)
def test_the_layout_stands_for_the_codes(name, outs, inner, seed):
    weight = numbers(outs, inner, seed=seed)
    quantized = FORMATS[name].quantize(weight)
    precision, packed = packed_of(quantized)
    assert precision == ("fp8" if "fp8" in name else "int4" if "4" in name and inner > 0 else "int8")
    assert torch.equal(layout.opened(packed), quantized.dequantize())
    given_codes = quantized.codes.view(torch.float8_e4m3fn) if precision == "fp8" else quantized.codes
    assert torch.equal(layout.stored(packed).view(torch.uint8), given_codes.contiguous().view(torch.uint8))
    assert packed.tensors[0].shape[1] % 32 == 0


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(sorted(FORMATS)), way=st.sampled_from(sorted(WAYS)), outs=st.integers(1, 40),
    inner=st.integers(1, 140), rows=st.integers(1, 18), half=st.booleans(), biased=st.booleans(),
)  # fmt: skip
def test_every_kernel_is_the_product_with_the_opened_weight(name, way, outs, inner, rows, half, biased):
    packed = laid_out(FORMATS[name], numbers(outs, inner))
    x = numbers(rows, inner, seed=1).to(torch.bfloat16 if half else torch.float32)
    bias = numbers(outs, seed=2) if biased else None
    found = WAYS[way](x, packed, bias)
    assert found.dtype == x.dtype
    assert found.shape == (rows, outs)
    expected = x.double() @ layout.opened(packed).double().t() + (0 if bias is None else bias.double())
    assert torch.isfinite(found).all()
    # bfloat16 results and factors; a sum that cancels is judged against what was summed
    size = x.double().norm() * layout.opened(packed).double().norm() / math.sqrt(inner) + expected.norm()
    assert float((found.double() - expected).norm()) < 8e-3 * float(size)
    assert not packed.tensors[3].any(), "the counters are ready for the next launch"


@pytest.mark.parametrize("name", ["int8", "int4", "uint4", "fp8"])
@pytest.mark.parametrize("rows", [1, 18])
def test_whole_numbers_come_out_exactly(name, rows):
    """With scales of one, whole inputs and a float32 result nothing rounds, whatever is split."""
    fmt = FORMATS[name]
    quantized = fmt.quantize(numbers(48, 96))
    ones = torch.ones_like(quantized.scales)
    codes = quantized.codes
    if name == "fp8":  # 1, 2, … 16 with both signs
        codes = torch.tensor([2.0 ** (i % 5) * (-1) ** i for i in range(96)]).to(torch.float8_e4m3fn).view(torch.uint8)
        codes = codes.expand(48, 96).contiguous().to(DEVICE)
    packed = packed_of(type(quantized)(codes, ones, quantized.zeros, fmt))[1]
    x = torch.randint(-8, 9, (rows, 96), generator=torch.Generator().manual_seed(rows)).float().to(DEVICE)
    expected = (x.double() @ layout.opened(packed).double().t()).float()
    bias = torch.arange(48, device=DEVICE).float()
    assert torch.equal(ours.by_row(x, packed, bias), expected + bias)
    for cut in (None, Tiling(32, 32, 16, splits=1), Tiling(16, 32, 16, splits=3)):
        assert torch.equal(ours.by_tiles(x, packed, bias, cut), expected + bias)


def test_bytes_times_bytes_are_exact_sums():
    packed = layout.int8_rows(numbers(40, 70))
    x = numbers(9, 70, seed=3)
    codes, steps = ours.round_rows(x, packed.tensors[0].shape[1], torch.int8)
    top = x.abs().amax(1)
    torch.testing.assert_close(steps, top / 127)
    assert torch.equal(codes[:, :70].float(), torch.round(x / steps[:, None]))
    assert not codes[:, 70:].any()
    sums = codes.double() @ packed.tensors[0].double().t()
    expected = sums * packed.tensors[1].double().t() * steps.double()[:, None]
    torch.testing.assert_close(ours.by_bytes(x, packed), expected.float(), atol=1e-6, rtol=1e-6)


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 5), inner=st.integers(1, 90), seed=st.integers(0, 99), scale=st.sampled_from([1e-6, 1, 1e4]))
def test_rows_are_rounded_to_nearest(rows, inner, seed, scale):
    x = numbers(rows, inner, seed=seed) * scale
    line = -(-inner // 32) * 32
    formats = [(torch.int8, 127), (torch.float8_e4m3fn, 448)]
    if DEVICE.type == "cpu":  # the interpreter loses the carry of a mantissa into its exponent
        del formats[1]
    for dtype, top in formats:
        codes, steps = ours.round_rows(x, line, dtype, rows + 3)
        assert codes.shape == (rows + 3, line)
        back = codes.float()[:rows, :inner] * steps[:rows, None]
        bound = steps[:rows, None] * 0.501 if top == 127 else x.abs() / 16 * 1.01 + steps[:rows, None] * 2e-3
        assert bool(((back - x).abs() <= bound).all())
        assert not codes[rows:].float().any()


def test_float8_times_float8():
    """Of codes that are powers of two nothing rounds, and sums are few bits wide."""
    line = 2.0 ** (torch.arange(70, device=DEVICE) % 3).float()
    weight = line * torch.tensor([(-1.0) ** i * (i + 1) for i in range(32)], device=DEVICE)[:, None]
    packed = layout.float8_rows(weight)
    x = 2.0 ** torch.arange(9, device=DEVICE).float()[:, None] * torch.ones(70, device=DEVICE)
    expected = x @ weight.t()
    assert bool((expected.abs() > 100).all())
    torch.testing.assert_close(ours.by_bytes(x, packed), expected, rtol=2e-3, atol=0.0)


def test_zeros_and_empty_batches():
    packed = layout.int4_groups(torch.zeros(20, 64, device=DEVICE))
    x = numbers(3, 64)
    for run in (ours.by_row, ours.by_tiles, ours.by_opening):
        assert not run(x, packed).any()
        assert run(x[:0], packed).shape == (0, 20)
    assert not ours.by_bytes(torch.zeros(2, 64, device=DEVICE), layout.int8_rows(numbers(20, 64))).any()


def test_a_strided_input_is_read_where_it_lies():
    packed = layout.int8_rows(numbers(24, 64))
    wide = numbers(6, 200)
    for x in (wide[:, 100:164], wide[::2, :64], numbers(64, 6).t()):
        for run in (ours.by_row, ours.by_tiles):
            assert gap(run(x, packed), x @ layout.opened(packed).t()) < 5e-3


def test_int4_has_the_codes_of_the_cpu():
    """A group's largest entry is -8 on both, and scales are float16."""
    from hasten.nn.product import int4

    weight = numbers(64, 96).cpu()
    packed = layout.int4_groups(weight)
    same = torch.from_numpy(int4.unpack(int4.pack(weight.numpy()), 64, 96))
    assert (layout.opened(packed) - same).abs().max() <= weight.abs().max() / 8 * 1e-3 + 1e-9 or (
        # a tie between halves may fall to either side after the reciprocal
        ((layout.opened(packed) - same).abs() > 1e-6).float().mean() < 1e-3
    )


def test_what_no_kernel_reads_is_said():
    weight = numbers(32, 64)
    refused = (Int(8, PerChannel(1)), Int(12, PerChannel(0)), Int(8, PerGroup(1, 24)), MiniFloat(2, 1).per_group(32))
    for fmt in refused:
        quantized = fmt.quantize(weight)
        assert not readable(quantized)
        assert packed_of(quantized) is None
    for fmt in FORMATS.values():
        assert readable(fmt.quantize(weight))


@pytest.mark.parametrize("precision", kernels_cuda.PRECISIONS)
def test_a_product_chooses_by_its_rows(precision):
    weight, bias = numbers(40, 64), numbers(40, seed=5)
    packed = kernels_cuda.lay_out_at(weight, precision)
    run, size = kernels_cuda.product(packed, precision, bias)
    assert size == packed.bytes
    for rows in (1, 2, 20, 300):
        x = numbers(rows, 64, seed=rows).bfloat16()
        near(run(x), x.float() @ layout.opened(packed).t() + bias, 6e-3)
    near(layout.opened(packed), weight, {"int8": 0.01, "int4": 0.12, "fp8": 0.04}[precision])


def test_rows_are_rounded_only_where_that_is_asked_for():
    weight = numbers(40, 64)
    packed = kernels_cuda.lay_out_at(weight, "int8")
    x = numbers(300, 64, seed=9)
    exact = x @ layout.opened(packed).t()
    if DEVICE.type == "cpu":
        assert kernels_cuda.choices(packed, "int8")[256] == "opened"
        assert kernels_cuda.choices(packed, "int8", rounds=True)[256] == "bytes"
    near(kernels_cuda.product(packed, "int8")[0](x), exact, 5e-3)
    rounded = kernels_cuda.product(packed, "int8", rounds=True)[0](x)
    near(rounded, exact, 1.5e-2)
    grouped = layout.int8_rows(weight, 16)
    near(
        kernels_cuda.product(grouped, "int8", rounds=DEVICE.type == "cuda")[0](x), x @ layout.opened(grouped).t(), 5e-3
    )


@pytest.mark.parametrize("rows", [9, 40, 70])
def test_cuts_of_byte_products_give_the_same(rows):
    packed, bias = layout.int8_rows(numbers(40, 70)), numbers(40, seed=2)
    x = numbers(rows, 70, seed=3)
    found = ours.by_bytes(x, packed, bias)
    assert torch.equal(found, ours.by_bytes(x, packed, bias, Tiling(32, 32, 16)))
    torch.testing.assert_close(found, ours.by_bytes(x, packed) + bias)


def test_byte_products_of_many_programs_have_three_stages():
    """Two programs fit on a multiprocessor with four stages; where more are waiting, a third one counts for more."""
    processors = ours._processors(DEVICE)
    few = layout.int8_rows(torch.zeros(64 * 2 * processors, 32, device=DEVICE))
    many = layout.int8_rows(torch.zeros(64 * 2 * processors + 1, 32, device=DEVICE))
    assert [ours.cut_of_bytes(128, p).stages for p in (few, many)] == [4, 3]
    assert ours.cut_of_bytes(129, few).stages == 3
    assert ours.cut_of_bytes(64, few) == ours.cut_of_bytes(64, many)


def test_halves_for_tens_of_rows_are_cut_by_how_many_outputs_there_are():
    processors = ours._processors(DEVICE)
    blocks = []
    for outs in (64 * processors, 64 * processors + 1):
        packed = layout.int4_groups(torch.zeros(outs, 64, device=DEVICE))
        blocks.append(ours.tiling(64, packed).block)
    assert blocks == [64, 128]


@pytest.mark.parametrize("precision", kernels_cuda.PRECISIONS)
def test_cuts_fit_what_they_cut(precision):
    """Counters exist for each tile, every program has work, and parts stay smaller than codes."""
    for outs, inner in ((8, 16), (1536, 1024), (4096, 4096), (300, 11008)):
        packed = kernels_cuda.lay_out_at(torch.zeros(outs, inner, device=DEVICE), precision)
        held = layout.codes_in(packed)
        for rows in (1, 2, 16, 17, 64, 65, 512, 5000):
            cut = ours.tiling(rows, packed)
            assert cut.width & (cut.width - 1) == 0
            assert cut.many & (cut.many - 1) == 0
            tiles = -(-outs // cut.block) * -(-rows // cut.many)
            assert cut.splits == 1 or tiles <= held.counters.numel()
            steps = -(-held.codes.shape[1] // cut.width)
            assert cut.splits <= steps


NAMES = ["int8-row", "int8-tiles", "int8-opened", "int8-bytes", "int4-g64-tiles", "fp8-row", "fp8-tiles"]


@pytest.mark.parametrize("name", NAMES)
def test_entries_of_the_table_hold_their_bound(name):
    kernel = next(k for k in kernels_cuda.cuda_kernels() if k.name == name)
    weight = numbers(32, 128)
    before = weight.clone()
    packed = kernel.pack(weight)
    assert torch.equal(weight, before)
    near(kernel.unpack(packed), weight, kernel.error)
    for rows in (1, 6):
        x = numbers(rows, 128, seed=rows)
        near(kernel.run(x, packed), x @ weight.t(), kernel.error * 1.5)


COMPILE = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import torch
from hasten.compress import device_codes as layout
from hasten.compress import kernels_triton as ours

HALF, WHOLE = "*bf16", "i32"
KINDS = dict(steps_of="*fp32", steps="*fp32", x=HALF,
             bias=HALF, out=HALF, scales="*fp16", zeros="*fp32", scratch="*fp32", counters="*i32",
             rows=WHOLE, outs=WHOLE, inner=WHOLE, line=WHOLE, groups=WHOLE, x_stride=WHOLE, splits=WHOLE)


def made(kernel, codes, given=HALF, options=None, **constants):
    kinds = KINDS | {"codes": codes, "x": given}
    if kernel is ours._round_kernel:
        kinds["out"] = codes
    if kernel is ours._byte_kernel:
        kinds["scales"] = "*fp32"
    signature = {n: "constexpr" if n in constants else kinds[n] for n in kernel.arg_names}
    at = {(kernel.arg_names.index(k),): v for k, v in constants.items()}
    source = ASTSource(kernel, signature, constexprs=at, attrs=aligned(kernel, constants))
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert result.metadata.shared <= 227 * 1024, (kernel, constants, result.metadata.shared)
    return result.asm["ptx"]


def aligned(kernel, constants):
    # addresses and strides are multiples of 16, as a launch finds out
    rest = ("rows", "groups", "splits")
    names = [n for n in kernel.arg_names if n not in constants and n not in rest]
    return {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in names}


for codes, group in (("*i8", 0), ("*u8", 32), ("*fp8e4nv", 0)):
    shared = dict(group=group, four=codes == "*u8", affine=group > 0, biased=True, even=False, fast=True)
    made(ours._row_kernel, codes, block=8, width=256, stages=3, **shared)
    ptx = made(ours._tile_kernel, codes, block=64, width=64, many=16, shared=True, apart=False, kind=tl.bfloat16,
               floats=codes == "*fp8e4nv", **shared)
    print("mma" in ptx, ("prmt" in ptx) >= (codes == "*u8"))
for rows, outs in ((16, 64), (64, 64), (512, 64), (512, 4096)):
    cut = ours.cut_of_bytes(rows, layout.int8_rows(torch.zeros(outs, 32)))
    ptx = made(ours._byte_kernel, "*i8", "*i8", dict(num_warps=cut.warps, num_stages=cut.stages), block=cut.block,
               width=cut.width, many=cut.many, biased=True, even=True, floats=False)
    floats = made(ours._byte_kernel, "*fp8e4nv", "*fp8e4nv", dict(num_warps=cut.warps, num_stages=cut.stages),
                  block=cut.block, width=cut.width, many=cut.many, biased=True, even=False, floats=True)
    print("s8.s8" in ptx and "e4m3.e4m3" in floats)
for codes, whole in (("*i8", True), ("*fp8e4nv", False)):
    made(ours._round_kernel, codes, width=8192, top=127.0, whole=whole, once=True, options=dict(num_warps=8))
"""


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu_that_is_not_here():
    """The interpreter takes what the compiler refuses, and other instructions open halves of bytes there."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}
    )
    assert done.stdout.split() == ["True"] * 10, done.stderr[-800:]
