"""All timesteps of a neuron layer in one pass: numba kernels over (time, neurons), forward and backward.

Written step by step, a layer is some ten passes over its state per step, and a call for each; here a block of neurons
stays in the first-level cache while the time runs, and memory sees each input and each output once. Only the potential
before the reset is kept for the backward pass: spikes and the potential after the reset follow from it.
:mod:`hasten.spiking.neuron` holds the same equations as plain steps; they are the tests' truth.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

__all__ = [
    "RESETS",
    "adaptive_backward",
    "adaptive_forward",
    "gate_backward",
    "gate_forward",
    "leak_backward",
    "leak_forward",
    "spike_backward",
    "spike_forward",
]

RESETS = {"zero": 0, "subtract": 1, "late": 2}
"""codes of :data:`hasten.spiking.neuron.Reset`"""

_BLOCK = 512  # neurons that run through the time together: their state fits the first-level cache
_ROWS = 16  # rows that a thread takes at once where there is no time


@njit(cache=True, inline="always")
def _spread(source: Any, begin: int, out: Any) -> None:
    """Fill ``out`` from a scalar (one element) or from the block that begins at ``begin``."""
    if source.shape[0] == 1:
        out[:] = source[0]
    else:
        out[:] = source[begin : begin + out.shape[0]]


@njit(cache=True)
def _slope(kind: int, width: float, x: Any, theta: Any, out: Any) -> None:
    """Surrogate derivative at ``x - theta``; codes and formulas are those of :mod:`hasten.spiking.surrogate`."""
    one = x.dtype.type(1.0)
    w = x.dtype.type(width)
    if kind == 0:  # arctan
        half, scale = x.dtype.type(0.5 * width), x.dtype.type(0.5 * np.pi * width)
        for i in range(x.shape[0]):
            z = scale * (x[i] - theta[i])
            out[i] = half / (one + z * z)
    elif kind == 1:  # fast sigmoid
        for i in range(x.shape[0]):
            z = one + w * abs(x[i] - theta[i])
            out[i] = one / (z * z)
    elif kind == 2:  # triangle
        for i in range(x.shape[0]):
            out[i] = w * max(x.dtype.type(0.0), one - abs(x[i] - theta[i]) / theta[i]) / theta[i]
    elif kind == 3:  # boxcar
        half = x.dtype.type(0.5)
        for i in range(x.shape[0]):
            out[i] = w if abs(x[i] - theta[i]) * w < half else x.dtype.type(0.0)
    elif kind == 4:  # sigmoid
        for i in range(x.shape[0]):
            z = one / (one + np.exp(-w * (x[i] - theta[i])))
            out[i] = w * z * (one - z)
    else:  # gaussian
        scale = x.dtype.type(width / np.sqrt(np.pi))
        for i in range(x.shape[0]):
            z = w * (x[i] - theta[i])
            out[i] = scale * np.exp(-z * z)


@njit(cache=True, parallel=True, error_model="numpy")
def spike_forward(x: Any, start: Any, decay: Any, threshold: Any, reset: int, pre: Any, spikes: Any, last: Any) -> None:
    """x (time, neurons), start (neurons,) -> pre and spikes (time, neurons), last (neurons,): the state after.

    decay and threshold: (1,) or (neurons,). ``pre`` is None where no gradient will be asked for: the branch is decided
    when numba compiles, so one source gives both kernels.
    """
    steps, neurons = x.shape
    for block in prange((neurons + _BLOCK - 1) // _BLOCK):
        a = block * _BLOCK
        b = min(neurons, a + _BLOCK)
        state, leak, theta = np.empty(b - a, x.dtype), np.empty(b - a, x.dtype), np.empty(b - a, x.dtype)
        _spread(decay, a, leak)
        _spread(threshold, a, theta)
        zero, one = x.dtype.type(0.0), x.dtype.type(1.0)
        state[:] = start[a:b]
        for t in range(steps):
            row, s = x[t, a:b], spikes[t, a:b]
            u = s if pre is None else pre[t, a:b]
            if reset == 0:
                for i in range(b - a):
                    value = leak[i] * state[i] + row[i]
                    fired = value > theta[i]
                    if pre is not None:
                        u[i] = value
                    s[i] = one if fired else zero
                    state[i] = zero if fired else value
            elif reset == 1:
                for i in range(b - a):
                    value = leak[i] * state[i] + row[i]
                    fired = value > theta[i]
                    if pre is not None:
                        u[i] = value
                    s[i] = one if fired else zero
                    state[i] = value - theta[i] if fired else value
            else:
                for i in range(b - a):
                    value = leak[i] * state[i] + row[i]
                    value = value - theta[i] if state[i] > theta[i] else value
                    if pre is not None:
                        u[i] = value
                    s[i] = one if value > theta[i] else zero
                    state[i] = value
        last[a:b] = state


@njit(cache=True, parallel=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
def gate_forward(x: Any, threshold: float, signed: bool, epsilon: float, scale: Any, out: Any) -> None:
    """Spikes without a state of rows over their root mean square; x and out (rows, neurons), scale (rows,).

    ``scale = 1 / sqrt(mean x² + epsilon)``; 1 where ``scale x`` is above the threshold, with ``signed`` also -1 below
    its negative.
    """
    rows, count = x.shape
    zero, one = x.dtype.type(0.0), x.dtype.type(1.0)
    theta = x.dtype.type(threshold)
    other = one if signed else zero
    for r in prange(rows):
        total = zero
        for i in range(count):
            total += x[r, i] * x[r, i]
        by = one / np.sqrt(total / x.dtype.type(count) + x.dtype.type(epsilon))
        scale[r] = by
        for i in range(count):
            value = by * x[r, i]
            out[r, i] = (one if value > theta else zero) - (other if value < -theta else zero)


@njit(cache=True, parallel=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
def gate_backward(
    gout: Any, x: Any, scale: Any, threshold: float, signed: bool, kind: int, width: float, gx: Any
) -> None:
    """Gradient of :func:`gate_forward`: the bumps of both thresholds, then through the root mean square."""
    rows, count = x.shape
    blocks = (rows + _ROWS - 1) // _ROWS
    for block in prange(blocks):
        theta, slope, other = np.empty(count, x.dtype), np.empty(count, x.dtype), np.empty(count, x.dtype)
        value = np.empty(count, x.dtype)
        theta[:] = x.dtype.type(threshold)
        for r in range(block * _ROWS, min(rows, (block + 1) * _ROWS)):
            by = scale[r]
            for i in range(count):
                value[i] = by * x[r, i]
            _slope(kind, width, value, theta, slope)
            if signed:
                for i in range(count):
                    gx[r, i] = -value[i]
                _slope(kind, width, gx[r], theta, other)
                for i in range(count):
                    slope[i] += other[i]
            along = x.dtype.type(0.0)
            for i in range(count):
                slope[i] *= gout[r, i]
                along += slope[i] * value[i]
            along /= x.dtype.type(count)
            for i in range(count):
                gx[r, i] = by * (slope[i] - along * value[i])


@njit(cache=True, parallel=True, error_model="numpy")
def spike_backward(
    gspikes: Any, glast: Any, pre: Any, start: Any, decay: Any, threshold: Any, reset: int, detach: bool,
    kind: int, width: float, gx: Any, gstart: Any, gdecay: Any, gthreshold: Any,
) -> None:  # fmt: skip
    """Gradients of :func:`spike_forward`; gdecay and gthreshold are per neuron and summed over time.

    ``detach``: no gradient through the spike of the reset.
    """
    steps, neurons = pre.shape
    for block in prange((neurons + _BLOCK - 1) // _BLOCK):
        a = block * _BLOCK
        b = min(neurons, a + _BLOCK)
        n = b - a
        leak, theta = np.empty(n, pre.dtype), np.empty(n, pre.dtype)
        carry, later, slope = np.empty(n, pre.dtype), np.zeros(n, pre.dtype), np.empty(n, pre.dtype)
        dleak, dtheta = np.zeros(n, pre.dtype), np.zeros(n, pre.dtype)
        _spread(decay, a, leak)
        _spread(threshold, a, theta)
        carry[:] = glast[a:b]  # gradient of the state after step t
        zero = pre.dtype.type(0.0)
        through = pre.dtype.type(0.0 if detach else 1.0)
        for t in range(steps - 1, -1, -1):
            u, gs, out = pre[t, a:b], gspikes[t, a:b], gx[t, a:b]
            before = pre[t - 1, a:b] if t > 0 else start[a:b]
            _slope(kind, width, u, theta, slope)
            first = t == 0  # the state before the first step is given as it is, after its reset
            if reset == 0:
                for i in range(n):
                    fired = u[i] > theta[i]
                    gsurrogate = (gs[i] - through * carry[i] * u[i]) * slope[i]
                    gu = gsurrogate + (zero if fired else carry[i])
                    w = before[i] if first or before[i] <= theta[i] else zero
                    out[i] = gu
                    dleak[i] += gu * w
                    dtheta[i] -= gsurrogate
                    carry[i] = leak[i] * gu
            elif reset == 1:
                for i in range(n):
                    fired = u[i] > theta[i]
                    gsurrogate = (gs[i] - through * carry[i] * theta[i]) * slope[i]
                    gu = gsurrogate + carry[i]
                    w = before[i] if first or before[i] <= theta[i] else before[i] - theta[i]
                    out[i] = gu
                    dleak[i] += gu * w
                    dtheta[i] -= gsurrogate + (carry[i] if fired else zero)
                    carry[i] = leak[i] * gu
            else:
                for i in range(n):
                    fired = u[i] > theta[i]
                    gsurrogate = (gs[i] - through * later[i] * theta[i]) * slope[i]
                    gu = gsurrogate + carry[i]
                    out[i] = gu
                    dleak[i] += gu * before[i]
                    dtheta[i] -= gsurrogate + (later[i] if fired else zero)
                    carry[i] = leak[i] * gu
                    later[i] = gu
        if reset == 2:  # the first step took off the threshold where the given state was above it
            _slope(kind, width, start[a:b], theta, slope)
            for i in range(n):
                gsurrogate = -through * later[i] * theta[i] * slope[i]
                carry[i] += gsurrogate
                dtheta[i] -= gsurrogate + (later[i] if start[a + i] > theta[i] else zero)
        gstart[a:b] = carry
        gdecay[a:b] = dleak
        gthreshold[a:b] = dtheta


@njit(cache=True, parallel=True, error_model="numpy")
def leak_forward(x: Any, start: Any, decay: Any, out: Any) -> None:
    """``out[t] = decay out[t-1] + x[t]``, (time, neurons): a filter, or a neuron that never fires."""
    steps, neurons = x.shape
    for block in prange((neurons + _BLOCK - 1) // _BLOCK):
        a = block * _BLOCK
        b = min(neurons, a + _BLOCK)
        state, leak = np.empty(b - a, x.dtype), np.empty(b - a, x.dtype)
        _spread(decay, a, leak)
        state[:] = start[a:b]
        for t in range(steps):
            row, y = x[t, a:b], out[t, a:b]
            for i in range(b - a):
                value = leak[i] * state[i] + row[i]
                y[i] = value
                state[i] = value


@njit(cache=True, parallel=True, error_model="numpy")
def leak_backward(gout: Any, out: Any, start: Any, decay: Any, gx: Any, gstart: Any, gdecay: Any) -> None:
    """Gradients of :func:`leak_forward`."""
    steps, neurons = out.shape
    for block in prange((neurons + _BLOCK - 1) // _BLOCK):
        a = block * _BLOCK
        b = min(neurons, a + _BLOCK)
        n = b - a
        leak, carry, dleak = np.empty(n, out.dtype), np.zeros(n, out.dtype), np.zeros(n, out.dtype)
        _spread(decay, a, leak)
        for t in range(steps - 1, -1, -1):
            before = out[t - 1, a:b] if t > 0 else start[a:b]
            g, gi = gout[t, a:b], gx[t, a:b]
            for i in range(n):
                value = g[i] + carry[i]
                gi[i] = value
                dleak[i] += value * before[i]
                carry[i] = leak[i] * value
        gstart[a:b] = carry
        gdecay[a:b] = dleak


@njit(cache=True, parallel=True, error_model="numpy")
def adaptive_forward(
    x: Any, start: Any, raised: Any, decay: Any, threshold: Any, recovery: Any, jump: Any, reset: int,
    pre: Any, theta: Any, spikes: Any, last: Any, last_raised: Any,
) -> None:  # fmt: skip
    """A threshold that rises with each spike and recovers: ``theta[t] = threshold + jump b[t]``.

    ``b[t] = recovery b[t-1] + s[t-1]``; ``raised`` (neurons,) is the state b of the step to come.
    """
    steps, neurons = x.shape
    for block in prange((neurons + _BLOCK - 1) // _BLOCK):
        a = block * _BLOCK
        b = min(neurons, a + _BLOCK)
        n = b - a
        state, leak, level = np.empty(n, x.dtype), np.empty(n, x.dtype), np.empty(n, x.dtype)
        trace, rho, kappa = np.empty(n, x.dtype), np.empty(n, x.dtype), np.empty(n, x.dtype)
        _spread(decay, a, leak)
        _spread(threshold, a, level)
        _spread(recovery, a, rho)
        _spread(jump, a, kappa)
        zero, one = x.dtype.type(0.0), x.dtype.type(1.0)
        state[:] = start[a:b]
        trace[:] = raised[a:b]
        for t in range(steps):
            row, u, s, th = x[t, a:b], pre[t, a:b], spikes[t, a:b], theta[t, a:b]
            for i in range(n):
                value = leak[i] * state[i] + row[i]
                bound = level[i] + kappa[i] * trace[i]
                fired = one if value > bound else zero
                u[i], th[i], s[i] = value, bound, fired
                state[i] = value * (one - fired) if reset == 0 else value - bound * fired
                trace[i] = rho[i] * trace[i] + fired
        last[a:b] = state
        last_raised[a:b] = trace


@njit(cache=True, parallel=True, error_model="numpy")
def adaptive_backward(
    gspikes: Any, glast: Any, graised: Any, pre: Any, theta: Any, start: Any, decay: Any, threshold: Any,
    recovery: Any, jump: Any, reset: int, detach: bool, kind: int, width: float,
    gx: Any, gstart: Any, gtrace: Any, gdecay: Any, gthreshold: Any, grecovery: Any, gjump: Any,
) -> None:  # fmt: skip
    """Gradients of :func:`adaptive_forward`. The trace b follows from theta, threshold and jump (not zero)."""
    steps, neurons = pre.shape
    for block in prange((neurons + _BLOCK - 1) // _BLOCK):
        a = block * _BLOCK
        b = min(neurons, a + _BLOCK)
        n = b - a
        leak, level = np.empty(n, pre.dtype), np.empty(n, pre.dtype)
        rho, kappa = np.empty(n, pre.dtype), np.empty(n, pre.dtype)
        carry, up, slope = np.empty(n, pre.dtype), np.empty(n, pre.dtype), np.empty(n, pre.dtype)
        dleak, dlevel = np.zeros(n, pre.dtype), np.zeros(n, pre.dtype)
        drho, dkappa = np.zeros(n, pre.dtype), np.zeros(n, pre.dtype)
        _spread(decay, a, leak)
        _spread(threshold, a, level)
        _spread(recovery, a, rho)
        _spread(jump, a, kappa)
        carry[:] = glast[a:b]
        up[:] = graised[a:b]  # gradient of the trace of step t + 1
        zero, one = pre.dtype.type(0.0), pre.dtype.type(1.0)
        through = pre.dtype.type(0.0 if detach else 1.0)
        for t in range(steps - 1, -1, -1):
            u, th, gs, out = pre[t, a:b], theta[t, a:b], gspikes[t, a:b], gx[t, a:b]
            _slope(kind, width, u, th, slope)
            for i in range(n):
                fired = one if u[i] > th[i] else zero
                trace = (th[i] - level[i]) / kappa[i]
                if t > 0:
                    seen, bound = pre[t - 1, a + i], theta[t - 1, a + i]
                    shot = one if seen > bound else zero
                    w = seen * (one - shot) if reset == 0 else seen - bound * shot
                else:
                    w = start[a + i]
                taken = u[i] if reset == 0 else th[i]
                gsurrogate = (gs[i] + up[i] - through * carry[i] * taken) * slope[i]
                gu = gsurrogate + (carry[i] * (one - fired) if reset == 0 else carry[i])
                gth = -gsurrogate - (zero if reset == 0 else carry[i] * fired)
                out[i] = gu
                dleak[i] += gu * w
                dlevel[i] += gth
                dkappa[i] += gth * trace
                drho[i] += up[i] * trace
                carry[i] = leak[i] * gu
                up[i] = rho[i] * up[i] + kappa[i] * gth
        gstart[a:b] = carry
        gtrace[a:b] = up
        gdecay[a:b] = dleak
        gthreshold[a:b] = dlevel
        grecovery[a:b] = drho
        gjump[a:b] = dkappa
