"""Every backend gives softmax attention, on ragged, paged and grouped inputs."""

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


def test_triton_kernel_under_the_interpreter():
    """Set TRITON_INTERPRET=1 where Triton is installed and there is no GPU; a GPU needs nothing."""
    import os

    if lean_triton.triton is None:
        q, k, v = dense(torch.float32)
        with pytest.raises(MissingExtraError, match="triton"):
            decode(q, k, v, LENGTHS, backend="triton")
        pytest.skip("Triton is not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and TRITON_INTERPRET is not set")
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
