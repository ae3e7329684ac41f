"""Front door of decode attention: one query per sequence over ragged contexts, dense or paged, by any backend.

All give the same numbers: ``reference`` is plain softmax, ``sdpa`` torch's kernel on padded tensors; ``lean``,
``flash-2`` (one task per sequence and key head) and ``flash-decoding`` (equal pieces of each) are three partitions of
one CPU kernel, so that they compare fairly; ``triton`` runs lean shares on a GPU. ``auto`` takes ``lean`` on a CPU and
``triton`` on a GPU where Triton is installed, else ``sdpa``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hasten.errors import ConfigurationError
from hasten.language import kernels_lean

__all__ = ["BACKENDS", "DecodeAttention", "decode"]

BACKENDS = ("auto", "reference", "sdpa", "lean", "flash-2", "flash-decoding", "triton")

_log = logging.getLogger("hasten.language")


def decode(
    query: Tensor,
    keys: Any,
    values: Any,
    lengths: Sequence[int],
    *,
    backend: str = "auto",
    scale: float | None = None,
    tile: int = 256,
    grid: int | None = None,
    return_lse: bool = False,
) -> Any:
    """Attend with one query per sequence.

    query (batch, heads, width). Dense: keys and values (batch, kv_heads, context, width). Paged: ``keys`` is a pair
    (keys, values) of (blocks, kv_heads, block_size, width) each, ``values`` the block tables (batch, blocks), int32.
    ``lengths``: tokens of each context. Returns (batch, heads, width), and (batch, heads) logarithms of the sums of
    exponentials with ``return_lse``. An empty context gives 0 and -inf.

    >>> q, k, v = torch.randn(2, 4, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    >>> torch.allclose(decode(q, k, v, [9, 4]), decode(q, k, v, [9, 4], backend="reference"), atol=1e-5)
    True
    """
    if isinstance(keys, tuple):
        (pages, contents), tables = keys, torch.as_tensor(values)
    else:  # a dense cache is a paged one with one page per sequence
        pages, contents = keys, values
        tables = torch.arange(query.shape[0], dtype=torch.int32)[:, None]
    batch, heads, width = query.shape
    kv_heads, size = pages.shape[1], pages.shape[2]
    if backend not in BACKENDS:
        raise ConfigurationError(f"backend {backend!r} is not known; choose one of {', '.join(BACKENDS)}")
    if heads % kv_heads:
        raise ConfigurationError(f"{heads} heads cannot share {kv_heads} key heads evenly; give a multiple")
    if len(lengths) != batch or min(lengths, default=0) < 0 or max(lengths, default=0) > tables.shape[1] * size:
        raise ConfigurationError(
            f"lengths {list(lengths)[:4]} do not fit {batch} sequences of at most {tables.shape[1] * size} tokens"
        )
    scale = width**-0.5 if scale is None else scale
    if backend == "auto":
        backend = "lean" if query.device.type == "cpu" else _gpu_backend()
    if backend == "triton":
        from hasten.language.lean_triton import decode as on_gpu

        place: Any = {"device": query.device, "dtype": torch.int32}
        out, logs = on_gpu(query, pages, contents, tables.to(**place), torch.tensor(list(lengths), **place),
                           scale=scale, grid=grid)  # fmt: skip
    elif backend in ("reference", "sdpa"):
        out, logs = _padded(query, pages, contents, tables, lengths, scale, plain=backend == "reference")
    else:
        out, logs = _on_cpu(query, pages, contents, tables, lengths, scale, tile, grid, backend)
    return (out, logs) if return_lse else out


def _gpu_backend() -> str:
    from hasten.language import lean_triton

    if lean_triton.triton is not None:
        return "triton"
    _log.warning("Triton is not installed: decode attention falls back to torch's kernel on padded tensors")
    return "sdpa"


def _padded(
    query: Tensor, pages: Tensor, contents: Tensor, tables: Tensor, lengths: Sequence[int], scale: float, *, plain: bool
) -> tuple[Tensor, Tensor]:
    batch, heads, width = query.shape
    _, kv_heads, size, _ = pages.shape
    most = max(1, max(lengths, default=1))
    used = tables[:, : -(-most // size)].long()

    def line(half: Tensor) -> Tensor:
        whole = half[used].transpose(1, 2).reshape(batch, kv_heads, -1, width)[:, :, :most]
        return whole.repeat_interleave(heads // kv_heads, 1)

    keys, values = line(pages), line(contents)
    seen = (torch.arange(most)[None] < torch.tensor(list(lengths))[:, None]).to(query.device)
    empty = ~seen.any(1)
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query[:, :, None].to(wide) @ keys.to(wide).transpose(-1, -2))[:, :, 0] * scale
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    logs = torch.logsumexp(scores, -1)
    if plain:
        out = (torch.softmax(scores, -1)[:, :, None] @ values.to(wide))[:, :, 0].to(query.dtype)
    else:
        mask = (seen | empty[:, None])[:, None, None]
        out = functional.scaled_dot_product_attention(query[:, :, None], keys, values, attn_mask=mask, scale=scale)
        out = out[:, :, 0]
    return torch.where(empty[:, None, None], torch.zeros_like(out), out), logs


def _on_cpu(
    query: Tensor, pages: Tensor, contents: Tensor, tables: Tensor, lengths: Sequence[int], scale: float, tile: int,
    grid: int | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    import numba

    if query.dtype not in (torch.float32, torch.bfloat16):
        raise ConfigurationError(f"the CPU kernel takes float32 and bfloat16, got {query.dtype}; use reference")
    batch, heads, width = query.shape
    kv_heads, contexts = pages.shape[1], np.asarray(lengths, np.int32)
    threads = numba.get_num_threads() if grid is None else grid
    plan = kernels_lean.Plan(contexts, kv_heads, tile, threads, whole=False)
    if backend == "flash-2":
        plan = kernels_lean.Plan.of_pieces(contexts, kv_heads, tile, 1)
    elif backend == "flash-decoding":
        plan = kernels_lean.Plan.of_pieces(contexts, kv_heads, tile, threads)
    form: Any = (lambda x: x.view(torch.uint16).numpy()) if pages.dtype == torch.bfloat16 else (lambda x: x.numpy())
    nothing = np.zeros(batch + 1, np.int32)
    out, logs = kernels_lean.attend(
        query.contiguous(), np.arange(batch + 1, dtype=np.int32), contexts,
        np.ascontiguousarray(tables.numpy(), np.int32), nothing, nothing[:0], nothing[:-1], form(pages.contiguous()),
        form(contents.contiguous()), scale=scale, plan=plan,
    )  # fmt: skip
    return out.view(batch, heads, width), torch.from_numpy(logs)


class DecodeAttention(torch.nn.Module):
    """:func:`decode` with its choices fixed.

    >>> attention = DecodeAttention(backend="lean", tile=64)
    >>> attention(torch.randn(1, 2, 16), torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16), [5]).shape
    torch.Size([1, 2, 16])
    """

    def __init__(self, backend: str = "auto", tile: int = 256, scale: float | None = None) -> None:
        super().__init__()
        if backend not in BACKENDS:
            raise ConfigurationError(f"backend {backend!r} is not known; choose one of {', '.join(BACKENDS)}")
        self.backend, self.tile, self.scale = backend, tile, scale

    def forward(self, query: Tensor, keys: Any, values: Any, lengths: Sequence[int]) -> Tensor:
        """As :func:`decode`."""
        out: Tensor = decode(query, keys, values, lengths, backend=self.backend, tile=self.tile, scale=self.scale)
        return out
