"""Linear layers and neurons in a row, all layers and all steps in one call: inference that holds a few steps at a time.

Samples are independent and time only carries potentials, so each thread takes its samples through all layers, a few
steps at once; what lies between two layers is a byte per spike and stays in the cache. A row of few spikes adds rows of
the weight. In a layer that met many full rows, these go through the matrix tiles of :mod:`hasten.spiking.pieces` from
then on; apart from that choice, made once, any cut of the time and of the batch gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange
from numba.cpython.unsafe.numbers import trailing_zeros
from torch import Tensor, nn

from hasten.nn.product.blocks import GROUP, PANEL
from hasten.nn.product.dispatch import array_at
from hasten.spiking import kernels, pieces
from hasten.spiking.layers import IF, LIF

__all__ = ["Chain", "chain_of"]

GATHER_BELOW = 0.12
"""share of ones of a row above which matrix tiles are faster than adding rows of the weight (measured with AMX)"""

BUSY = 0.0625
"""share of such rows from which a layer keeps its weight in the form of tiles as well"""

_SPAN_BYTES = 1 << 17  # spikes of one layer that all threads hold together
_PLAIN = -1  # no neuron behind the weight
_INPUTS, _WIDTH, _LIMIT, _RESET, _WEIGHT, _BIAS, _PACKED, _STATE, _DECAY, _THRESHOLD = range(10)


@njit(cache=True, error_model="numpy")
def _ones(row: Any) -> Any:
    """How many bytes of ``row`` (words of eight, each byte 0 or 1) are 1."""
    total = np.uint64(0)
    for word in row:
        total += (word * np.uint64(0x0101010101010101)) >> np.uint64(56)
    return np.int64(total)


@njit(cache=True, error_model="numpy")
def _add_rows(row: Any, weight: Any, index: Any, line: Any) -> None:
    """line += the rows of ``weight`` (in, out) at the ones of ``row`` (words), four at a time."""
    count, k = 0, 0
    for place in range(row.shape[0]):
        word = row[place]
        while word != 0:
            index[count] = 8 * place + (np.int64(trailing_zeros(word)) >> 3)
            word &= word - np.uint64(1)
            count += 1
    while k + 4 <= count:
        a, b, c, d = weight[index[k]], weight[index[k + 1]], weight[index[k + 2]], weight[index[k + 3]]
        for i in range(line.shape[0]):
            line[i] += (a[i] + b[i]) + (c[i] + d[i])
        k += 4
    while k < count:
        a = weight[index[k]]
        for i in range(line.shape[0]):
            line[i] += a[i]
        k += 1


@njit(cache=True, error_model="numpy")
def _fire(line: Any, state: Any, decay: Any, threshold: Any, reset: int) -> None:
    """One step of the neurons of a sample, as :func:`hasten.spiking.kernels.spike_forward` does it: line (neurons,)
    is the current and becomes the spikes."""
    one, zero = np.float32(1.0), np.float32(0.0)
    n = line.shape[0]
    if reset == 2:
        for i in range(n):
            value = decay[i] * state[i] + line[i]
            value = value - threshold[i] if state[i] > threshold[i] else value
            line[i] = one if value > threshold[i] else zero
            state[i] = value
        return
    for i in range(n):
        value = decay[i] * state[i] + line[i]
        line[i] = one if value > threshold[i] else zero
        state[i] = value
    if reset == 0:
        for i in range(n):
            state[i] = zero if line[i] > zero else state[i]
    else:
        for i in range(n):
            state[i] -= line[i] * threshold[i]


@njit(cache=True, error_model="numpy")
def _dense(source: Any, info: Any, room: Any, sums: Any) -> None:
    """The rows of ``source`` (steps, samples, words) with many ones times the weight, in order, to ``sums``.

    ``room`` is for rows in bfloat16.
    """
    inputs, half, panels = info[_INPUTS], pieces.padded(info[_INPUTS]) // 2, (info[_WIDTH] + PANEL - 1) // PANEL
    words = array_at(info[_PACKED], panels * pieces.PIECES * half * PANEL)
    packed = words.view(np.uint16).reshape(panels, pieces.PIECES * half, PANEL, 2)
    lines = pieces.lines_in(room, inputs)
    place, begin = 0, 0
    for t in range(source.shape[0]):
        for n in range(source.shape[1]):
            if _ones(source[t, n]) > info[_LIMIT]:
                pieces.fill_row(source[t, n].view(np.uint8)[:inputs], lines, place)
                place += 1
                if place == GROUP:
                    pieces.rows_times(lines, place, packed, 0, panels, sums[begin:])
                    begin, place = begin + place, 0
    pieces.rows_times(lines, place, packed, 0, panels, sums[begin:])


@njit(cache=True, error_model="numpy")
def _link(source: Any, info: Any, low: int, target: Any, room: Any, space: Any) -> int:
    """One weight and its neurons: source (steps, samples, words) -> target (steps, samples, ≥ out), the rest 0.

    The state of sample n is the one at ``low + n``; room and space are for rows with many ones. Returns their number.
    """
    steps, samples = source.shape[0], source.shape[1]
    inputs, width = info[_INPUTS], info[_WIDTH]
    weight = array_at(info[_WEIGHT], inputs * width).reshape(inputs, width)
    bias = array_at(info[_BIAS], width)
    decay, threshold = array_at(info[_DECAY], width), array_at(info[_THRESHOLD], width)
    states = array_at(info[_STATE], (low + samples) * width)
    full, taken = 0, 0
    for t in range(steps):
        for n in range(samples):
            full += 1 if _ones(source[t, n]) > info[_LIMIT] else 0
    tiled = full > 0 and info[_PACKED] != 0
    sums = space[: (full + 15) // 16 * 16 * width if tiled else 0].reshape(-1, width)
    if tiled:
        _dense(source, info, room, sums)
    line, index = np.empty(width, np.float32), np.empty(8 * source.shape[2], np.int32)
    for t in range(steps):
        for n in range(samples):
            row = source[t, n]
            many = tiled and _ones(row) > info[_LIMIT]
            for i in range(width):
                line[i] = sums[taken, i] if many else np.float32(0.0)
            if many:
                taken += 1
            else:
                _add_rows(row, weight, index, line)
            for i in range(bias.shape[0]):
                line[i] += bias[i]
            if info[_RESET] != _PLAIN:
                at = (low + n) * width
                _fire(line, states[at : at + width], decay, threshold, info[_RESET])
            out = target[t, n]
            for i in range(width):
                out[i] = line[i]
            for i in range(width, out.shape[0]):
                out[i] = 0
    return full


@njit(cache=True, error_model="numpy")
def _spikes(x: Any, begin: int, low: int, target: Any) -> int:
    """target (steps, samples, ≥ in) bytes = x != 0 from step ``begin`` and sample ``low``; how many values of x are
    neither 0 nor 1."""
    odd = 0
    for t in range(target.shape[0]):
        for n in range(target.shape[1]):
            row, to = x[begin + t, low + n], target[t, n]
            for j in range(row.shape[0]):
                value = row[j]
                to[j] = 1 if value != 0 else 0
                odd += 1 if value != 0 and value != 1 else 0
            for j in range(row.shape[0], to.shape[0]):
                to[j] = 0
    return odd


@njit(cache=True, error_model="numpy")
def _share(x: Any, table: Any, span: int, low: int, high: int, out: Any, full: Any) -> int:
    """Samples ``low`` to ``high`` of x (steps, batch, in) through all links to out (steps, batch, out); how many values
    of x are no spikes. full (links,) counts the rows with many ones."""
    steps, links, here, width, widest, odd = x.shape[0], table.shape[0], high - low, out.shape[2], 0, 0
    outputs = 0
    for k in range(links):
        widest, outputs = max(widest, (table[k, _INPUTS] + 7) // 8), max(outputs, table[k, _WIDTH])
    room = pieces.room_for(8 * widest)  # memory only where it is touched
    space = np.empty((span * here + 15) // 16 * 16 * outputs, np.float32)
    held = np.empty((2, span * here * widest), np.uint64)
    last = np.empty(span * here * width, np.float32)
    for begin in range(0, steps, span):
        count = min(span, steps - begin)
        wide = (table[0, _INPUTS] + 7) // 8
        source = held[0][: count * here * wide].reshape(count, here, wide)
        odd += _spikes(x, begin, low, source.view(np.uint8))
        for k in range(links - 1):
            wide = (table[k, _WIDTH] + 7) // 8
            target = held[(k + 1) % 2][: count * here * wide].reshape(count, here, wide)
            full[k] += _link(source, table[k], low, target.view(np.uint8), room, space)
            source = target
        final = last[: count * here * width].reshape(count, here, width)
        full[links - 1] += _link(source, table[links - 1], low, final, room, space)
        for t in range(count):
            for n in range(here):
                for i in range(width):
                    out[begin + t, low + n, i] = final[t, n, i]
    return odd


@njit(cache=True, parallel=True, error_model="numpy")
def _run(x: Any, table: Any, span: int, out: Any, full: Any, odd: Any) -> None:
    """:func:`_share` for every part of the samples; full (parts, links), odd (parts,)."""
    parts, batch = len(odd), x.shape[1]
    for part in prange(parts):
        odd[part] = _share(x, table, span, batch * part // parts, batch * (part + 1) // parts, out, full[part])


@dataclass(frozen=True)
class Link:
    """A weight, and the neurons behind it; ``place`` is theirs among the network's layers."""

    linear: nn.Linear
    neuron: IF | LIF | None
    place: int


@dataclass(frozen=True)
class Chain:
    """A network that :func:`chain_of` recognised."""

    links: tuple[Link, ...]
    layers: int
    """layers of the network, each of which has a place in its state"""
    tiled: list[bool]
    """which links take full rows through tiles; grows, never shrinks"""

    def run(self, x: Tensor, state: Sequence[Any] | None = None) -> tuple[Tensor, list[Any]] | None:
        """x (steps, batch, in) of spikes from ``state`` (one per layer, or None for rest) -> outputs (steps, batch,
        out) and the next state, or None where x holds anything but 0 and 1."""
        threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS, x.shape[1])  # type: ignore[attr-defined]
        numba.set_num_threads(threads)
        x = x.contiguous()
        while True:
            rows, alive, after = self._table(x.shape[1], state)
            widest = x.shape[1] * (max(row[_INPUTS] for row in rows) + 7)
            span = max(1, min(len(x), _SPAN_BYTES // widest))
            out = torch.empty(*x.shape[:2], rows[-1][_WIDTH])
            full = np.zeros((threads, len(rows)), np.int64)
            odd = np.zeros(threads, np.int64)
            _run(x.numpy(), np.array(rows, np.int64), span, out.numpy(), full, odd)
            del alive
            if odd.any():
                return None
            found = [bool(n > BUSY * len(x) * x.shape[1]) and pieces.available() for n in full.sum(0)]
            if not any(new and not old for new, old in zip(found, self.tiled, strict=True)):
                return out, after
            self.tiled[:] = [old or new for new, old in zip(found, self.tiled, strict=True)]

    def _table(self, batch: int, state: Sequence[Any] | None) -> tuple[list[list[int]], list[Any], list[Any]]:
        """Rows of the kernel's table, the arrays that they point to, and the state that it moves on."""
        rows, alive = [], []
        after: list[Any] = [None] * self.layers
        for link, tiles in zip(self.links, self.tiled, strict=True):
            weight = link.linear.weight.detach().t().contiguous().numpy()
            inputs, width = weight.shape
            bias = link.linear.bias
            arrays: list[Any] = [
                weight, bias.detach().numpy() if bias is not None else None, pieces.pack(weight) if tiles else None
            ]  # fmt: skip
            reset = _PLAIN
            if link.neuron is None:
                arrays += [None] * 3
            else:
                neuron, reset = link.neuron, kernels.RESETS[link.neuron.reset]
                held = state[link.place] if state is not None else None
                held = neuron._rest(torch.empty(1, batch, width)) if held is None else held
                potential = torch.zeros(batch, width) if held is None else held.detach().clone().contiguous()
                after[link.place] = potential
                decay = neuron.decay if isinstance(neuron, LIF) else torch.ones(())
                each = (v.detach().expand(width).contiguous().numpy() for v in (decay, neuron.threshold))
                arrays += [potential.numpy(), *each]
            alive.append(arrays)
            at = [0 if a is None else a.ctypes.data for a in arrays]
            rows.append([inputs, width, int(GATHER_BELOW * inputs), reset, *at])
        return rows, alive, after


def chain_of(layers: Iterable[nn.Module], tiled: list[bool]) -> Chain | None:
    """The chain that ``layers`` form, or None: linear layers in float32 on the CPU, each with IF or LIF neurons behind
    it (the last one need not), and layers that do nothing in inference. ``tiled`` keeps the choice of tiles."""
    links: list[Link] = []
    waiting: tuple[int, nn.Linear] | None = None
    count = 0
    for place, layer in enumerate(layers):
        count += 1
        if isinstance(layer, (nn.Identity, nn.Dropout)):
            continue
        if isinstance(layer, nn.Linear):
            if waiting is not None or (links and links[-1].neuron is None) or not _plain(layer.weight):
                return None
            waiting = (place, layer)
        elif isinstance(layer, (IF, LIF)) and type(layer) in (IF, LIF) and waiting is not None:
            if layer.threshold.dim() > 1 or not _plain(layer.threshold):
                return None
            links.append(Link(waiting[1], layer, place))
            waiting = None
        else:
            return None
    if waiting is not None:
        links.append(Link(waiting[1], None, waiting[0]))
    if len(tiled) != len(links):
        tiled[:] = [False] * len(links)
    return Chain(tuple(links), count, tiled) if links else None


def _plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu"
