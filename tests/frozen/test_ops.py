"""Operations over arrays against torch's own, by the names of the program."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from hasten.frozen.ops import OPERATIONS

X = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
W = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(1))
Q = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("name", "args", "wanted"),
    [
        ("conv2d", (X, W, None, 2, 1, 1, 2), functional.conv2d(X, W, None, 2, 1, 1, 2)),
        ("conv2d", (X, W, None, [1, 2], [2, 1], [2, 1], 2),
         functional.conv2d(X, W, None, (1, 2), (2, 1), (2, 1), 2)),
        ("conv1d", (X[:, :, 0], W[:, :, 0], None, 1, "same", 1, 2),
         functional.conv1d(X[:, :, 0], W[:, :, 0], padding="same", groups=2)),
        ("max_pool2d", (X, 3, 2, 1), functional.max_pool2d(X, 3, 2, 1)),
        ("avg_pool2d", (X, 2), functional.avg_pool2d(X, 2)),
        ("adaptive_avg_pool2d", (X, [3, 5]), functional.adaptive_avg_pool2d(X, (3, 5))),
        ("scaled_dot_product_attention", (Q, Q, Q, None, 0.0, True),
         functional.scaled_dot_product_attention(Q, Q, Q, is_causal=True)),
        ("gelu", (X,), functional.gelu(X)),
        ("gelu", (X, "tanh"), functional.gelu(X, approximate="tanh")),
        ("log_softmax", (X, 1), functional.log_softmax(X, 1)),
        ("layer_norm", (X, [8], None, None, 1e-5), functional.layer_norm(X, (8,))),
        ("slice", (X, 1, 1, 9223372036854775807, 2), X[:, 1::2]),
        ("flatten", (X, 1, 2), X.flatten(1, 2)),
        ("unflatten", (X, 1, [2, 2]), X.unflatten(1, (2, 2))),
        ("squeeze", (X[:1], 0), X[0]),
        ("expand", (X[:1], [3, -1, 8, 8]), X[:1].expand(3, -1, 8, 8)),
        ("clamp", (X, -0.5, 0.5), X.clamp(-0.5, 0.5)),
        ("amax", (X, [1], True), X.amax(1, True)),
        ("addmm", (X[0, 0, 0], X[0, 0], X[0, 1]), torch.addmm(X[0, 0, 0], X[0, 0], X[0, 1])),
        ("sigmoid", (X,), torch.sigmoid(X)),
        ("hardtanh", (X,), functional.hardtanh(X)),
        ("select", (X, 1, 2), X.select(1, 2)),
    ],
)  # fmt: skip
def test_each_is_what_torch_computes(name: str, args: tuple[Any, ...], wanted: torch.Tensor) -> None:
    given = [a.numpy() if isinstance(a, torch.Tensor) else a for a in args]
    before = [a.copy() if isinstance(a, np.ndarray) else a for a in given]
    found = OPERATIONS[name](*given)
    assert np.allclose(found, wanted.numpy(), atol=2e-6)
    assert all(np.array_equal(a, b) for a, b in zip(given, before, strict=True)), "an argument was changed"


def test_parts_and_masks() -> None:
    x = X[:, :, 0, 0].numpy()
    for found, wanted in (
        (OPERATIONS["split"](x, 3, 1), torch.from_numpy(x).split(3, 1)),
        (OPERATIONS["split_with_sizes"](x, [1, 3], 1), torch.from_numpy(x).split([1, 3], 1)),
        (OPERATIONS["chunk"](x, 2, 1), torch.from_numpy(x).chunk(2, 1)),
        (OPERATIONS["unbind"](x, 1), torch.from_numpy(x).unbind(1)),
    ):
        assert all(np.array_equal(a, b.numpy()) for a, b in zip(found, wanted, strict=True))
    mask = torch.rand(5, 5) > 0.3
    mask.fill_diagonal_(True)
    found = OPERATIONS["scaled_dot_product_attention"](Q.numpy(), Q.numpy(), Q.numpy(), mask.numpy())
    assert np.allclose(found, functional.scaled_dot_product_attention(Q, Q, Q, mask).numpy(), atol=1e-6)
    table = np.arange(12.0).reshape(4, 3)
    assert np.array_equal(OPERATIONS["embedding"](table, np.array([[1, 3]])), table[[[1, 3]]])
    assert OPERATIONS["arange"](2.0, 5).dtype == np.float32
    assert OPERATIONS["to"](table, "int64").dtype == np.int64
    norm = OPERATIONS["batch_norm"](X.numpy(), None, None, np.zeros(4), np.ones(4), False, 0.1, 1e-5)
    assert np.allclose(norm, X.numpy() / np.sqrt(1 + 1e-5), atol=1e-6)


@pytest.mark.parametrize("size", [0.1, 1.0, 30.0, 1000.0])
def test_attention_is_safe_for_small_and_large_scores(size: float) -> None:
    q, k, v = (torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(n)) for n in range(3))
    q = q * size
    added = torch.randn(5, 5, generator=torch.Generator().manual_seed(3)) * size
    attention = OPERATIONS["scaled_dot_product_attention"]
    # Views in another order of axes, as an exported model hands them over.
    turned = [t.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3).numpy() for t in (q, k, v)]
    assert np.allclose(attention(*turned), functional.scaled_dot_product_attention(q, k, v).numpy(), atol=1e-5)
    for mask in (added, added > 0):
        mask.fill_diagonal_(1)
        wanted = functional.scaled_dot_product_attention(q, k, v, mask).numpy()
        assert np.allclose(attention(*turned, mask.numpy()), wanted, atol=1e-5)
