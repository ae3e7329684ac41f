"""Every backend gives softmax attention, on ragged, paged and grouped inputs."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from hasten.errors import ConfigurationError, MissingExtraError
from hasten.language import lean_triton
from hasten.language.attention import DecodeAttention, decode

torch.set_num_threads(1)
LENGTHS = [70, 0, 1, 33, 200]


def dense(dtype, heads=6, kv_heads=2, width=16):
    torch.manual_seed(0)
    most = max(LENGTHS)
    keys, values = torch.randn(2, len(LENGTHS), kv_heads, most, width).to(dtype)
    return torch.randn(len(LENGTHS), heads, width).to(dtype), keys, values


def paged(keys, values, size=8):
    batch, kv_heads, most, width = keys.shape
    per = most // size
    order = torch.randperm(batch * per)
    tables = order.view(batch, per).to(torch.int32)
    halves = []
    for half in (keys, values):
        pages = torch.zeros(batch * per, kv_heads, size, width, dtype=half.dtype)
        pages[order] = half.view(batch, kv_heads, per, size, width).transpose(1, 2).reshape(-1, kv_heads, size, width)
        halves.append(pages)
    return (halves[0], halves[1]), tables


@pytest.mark.parametrize("backend", ["sdpa", "lean", "flash-2", "flash-decoding", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_agree(backend, dtype):
    q, k, v = dense(dtype)
    expected, logs = decode(q, k, v, LENGTHS, backend="reference", return_lse=True)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    for keys, values in ((k, v), paged(k, v)):
        out, found = decode(q, keys, values, LENGTHS, backend=backend, return_lse=True, tile=16, grid=3)
        torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(found, logs, atol=1e-3, rtol=1e-3)
    assert out[1].abs().max() == 0
    assert found[1].max() == -torch.inf


def test_module_is_the_function_and_bad_input_is_refused():
    q, k, v = dense(torch.float32)
    assert torch.equal(DecodeAttention("lean")(q, k, v, LENGTHS), decode(q, k, v, LENGTHS, backend="lean"))
    with pytest.raises(ConfigurationError, match="backend"):
        decode(q, k, v, LENGTHS, backend="magic")
    with pytest.raises(ConfigurationError, match="lengths"):
        decode(q, k, v, [201, 0, 0, 0, 0])
    with pytest.raises(ConfigurationError, match="evenly"):
        decode(q[:, :5], k, v, LENGTHS)
    with pytest.raises(ConfigurationError, match="float32 and bfloat16"):
        decode(q.double(), k.double(), v.double(), LENGTHS, backend="lean")
    with pytest.raises(ConfigurationError):
        DecodeAttention("magic")


def test_triton_kernel():
    """On a GPU where there is one, else under Triton's interpreter (tests/conftest.py)."""
    if lean_triton.triton is None:
        q, k, v = dense(torch.float32)
        with pytest.raises(MissingExtraError, match="triton"):
            decode(q, k, v, LENGTHS, backend="triton")
        pytest.skip("Triton is not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for heads, kv_heads in ((6, 2), (4, 4)):
        q, k, v = dense(torch.float32, heads, kv_heads)
        keys, tables = paged(k, v)
        expected, logs = decode(q, keys, tables, LENGTHS, backend="reference", return_lse=True)
        for grid in (1, 3, 7, 40):
            out, found = decode(
                q.to(device), (keys[0].to(device), keys[1].to(device)), tables, LENGTHS, backend="triton", grid=grid,
                return_lse=True,
            )  # fmt: skip
            torch.testing.assert_close(out.cpu(), expected, atol=1e-3 if device == "cuda" else 2e-5, rtol=1e-3)
            np.testing.assert_allclose(found.cpu(), logs, atol=1e-3)


@pytest.mark.skipif(lean_triton.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_kernel_with_window_and_softcap(dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter multiplies no bfloat16")
    q, k, v = dense(dtype, 6, 2)
    keys, tables = paged(k, v)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    for window, cap in ((37, None), (None, 5.0), (16, 5.0)):
        out, _ = lean_triton.decode(
            q.to(device), keys[0].to(device), keys[1].to(device), torch.as_tensor(tables, dtype=torch.int32).to(device),
            lengths.to(device), grid=5, tile=16, window=window, softcap=cap,
        )  # fmt: skip
        for row, length in enumerate(LENGTHS):
            if length == 0:
                assert not out[row].any()
                continue
            low = max(0, length - window) if window else 0
            wide = k[row, :, low:length].repeat_interleave(3, 0).float()
            scores = torch.einsum("hw,htw->ht", q[row].float(), wide) * q.shape[-1] ** -0.5
            scores = scores if cap is None else cap * torch.tanh(scores / cap)
            values = v[row, :, low:length].repeat_interleave(3, 0).float()
            expected = torch.einsum("ht,htw->hw", torch.softmax(scores, -1), values)
            gap = 0.02 if dtype == torch.bfloat16 or device == "cuda" else 2e-5
            torch.testing.assert_close(out[row].cpu().float(), expected, atol=gap, rtol=gap)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hasten.language import lean_triton
kernel = lean_triton._lean_kernel
constants = dict(kv_heads=8, group=4, rows=16, width=128, wide=128, page=16, tile=64, many=16, capped=True, stages=3,
                 exact="tf32", live=4, together=8)
floats = dict.fromkeys(("logs", "states", "sums"), "*fp32") | dict.fromkeys(("scale", "cap"), "fp32")
halves = dict.fromkeys(("query", "keys", "values", "out"), "*bf16")
whole = dict.fromkeys(("table_stride", "count", "window"), "i32")
kinds = floats | halves | whole | dict.fromkeys(constants, "constexpr")
signature = {n: kinds.get(n, "*i32") for n in kernel.arg_names}
at = {(kernel.arg_names.index(k),): v for k, v in constants.items()}
made = triton.compile(ASTSource(kernel, signature, constexprs=at), target=GPUTarget("cuda", 90, 32))
print("mma" in made.asm["ptx"])
"""


@pytest.mark.skipif(lean_triton.triton is None, reason="Triton is not installed")
def test_triton_kernel_compiles_for_a_gpu_that_is_not_here():
    """The interpreter takes what the compiler refuses: names that change their type between branches."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}
    )
    assert done.stdout.strip() == "True", done.stderr[-500:]
