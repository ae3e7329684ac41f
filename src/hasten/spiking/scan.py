"""A neuron layer over all its timesteps: ``scan(x, state, parameters) -> (spikes, state)``, x (time, batch, …).

On the CPU one fused kernel runs the time, forward and backward, in float32 or float64 (half precision is widened,
since a potential that leaks needs its bits); other devices, and programs that are exported or compiled, take the plain
steps of :mod:`hasten.spiking.neuron`. Both give the same spikes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import torch
from torch import Tensor

from hasten.errors import ConfigurationError
from hasten.spiking import kernels
from hasten.spiking.neuron import (
    AdaptiveParameters,
    AdaptiveState,
    AlphaParameters,
    AlphaState,
    LIFParameters,
    SynapticParameters,
    SynapticState,
    adaptive_step,
    leak_step,
    lif_step,
)
from hasten.spiking.surrogate import Surrogate, spike

__all__ = ["adaptive_scan", "alpha_scan", "fused", "gate", "leak_scan", "lif_scan", "loop", "synaptic_scan"]

GATE_EPSILON = 1e-3
"""of a mean square: below it a layer is silent"""


def fused(x: Tensor) -> bool:
    """Whether the kernels take ``x``."""
    plain = torch.compiler.is_compiling() or torch.compiler.is_exporting()
    return not plain and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.numel() > 0


def _wide(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


def loop(step: Callable[[Tensor, Any], tuple[Tensor, Any]], x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """The obvious version: ``step(x[t], state)`` for each t; results stacked."""
    results = []
    for now in x.unbind(0):
        result, state = step(now, state)
        results.append(result)
    return torch.stack(results), state


def _flat(value: Tensor | float, x: Tensor) -> Tensor:
    """A parameter as the kernels take it: one number, or one per neuron of ``x`` (time, …)."""
    if not isinstance(value, Tensor):
        return torch.full((1,), value, dtype=x.dtype)
    value = value.to(x.dtype)
    if value.numel() == 1:
        return value.reshape(1)
    return value.expand(x.shape[1:]).reshape(-1)


def _start(state: Tensor | None, x: Tensor) -> Tensor:
    if state is None:
        return torch.zeros(x.shape[1:], dtype=x.dtype, device=x.device)
    if state.shape != x.shape[1:]:
        raise ConfigurationError(f"a state of shape {tuple(state.shape)} does not fit inputs of {tuple(x.shape[1:])}")
    return state.to(x.dtype)


def _array(x: Tensor) -> Any:
    return x.detach().contiguous().numpy()


def _threads() -> None:
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]


def _rows(x: Tensor) -> Any:
    return _array(x).reshape(x.shape[0], -1)


def _sized(gradient: Tensor, parameter: Tensor) -> Tensor:
    return gradient.sum().reshape(1) if parameter.numel() == 1 else gradient


class _LIF(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, start: Tensor, decay: Tensor, threshold: Tensor, p: LIFParameters) -> Any:
        _threads()
        pre, spikes, last = torch.empty_like(x), torch.empty_like(x), torch.empty_like(start)
        reset = kernels.RESETS[p.reset]
        kernels.spike_forward(
            _rows(x), _array(start).reshape(-1), _array(decay), _array(threshold), reset,
            _rows(pre), _rows(spikes), last.numpy().reshape(-1),
        )  # fmt: skip
        ctx.save_for_backward(pre, start, decay, threshold)
        ctx.parameters = p
        return spikes, last

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        _threads()
        pre, start, decay, threshold = ctx.saved_tensors
        p: LIFParameters = ctx.parameters
        gx, gstart = torch.empty_like(pre), torch.empty_like(start)
        gdecay, gthreshold = (torch.empty(start.numel(), dtype=pre.dtype) for _ in range(2))
        kernels.spike_backward(
            _rows(gradients[0]), _array(gradients[1]).reshape(-1), _rows(pre), _array(start).reshape(-1),
            _array(decay), _array(threshold), kernels.RESETS[p.reset], p.detach, p.surrogate.code, p.surrogate.width,
            _rows(gx), gstart.numpy().reshape(-1), gdecay.numpy(), gthreshold.numpy(),
        )  # fmt: skip
        return gx, gstart, _sized(gdecay, decay), _sized(gthreshold, threshold), None


def lif_scan(x: Tensor, state: Tensor | None, parameters: LIFParameters) -> tuple[Tensor, Tensor]:
    """Leaky neurons over time; x (time, batch, …), state (batch, …) or None for rest -> spikes like x, next state.

    >>> spikes, state = lif_scan(torch.full((3, 1), 0.6), None, LIFParameters(decay=1.0))
    >>> spikes.flatten().tolist(), round(state.item(), 4)
    ([0.0, 1.0, 0.0], 0.8)
    """
    if _wide(x):
        spikes, last = lif_scan(x.float(), state, parameters)
        return spikes.to(x.dtype), last
    start = _start(state, x)
    if not fused(x):
        return loop(lambda now, v: lif_step(now, v, parameters), x, start)
    x, start = x.contiguous(), start.contiguous()
    decay, threshold = _flat(parameters.decay, x), _flat(parameters.threshold, x)
    if not torch.is_grad_enabled():
        _threads()
        spikes, last = torch.empty_like(x), torch.empty_like(start)
        kernels.spike_forward(
            _rows(x), _array(start).reshape(-1), _array(decay), _array(threshold), kernels.RESETS[parameters.reset],
            None, _rows(spikes), last.numpy().reshape(-1),
        )  # fmt: skip
        return spikes, last
    return _LIF.apply(x, start, decay, threshold, parameters)  # type: ignore[no-any-return, no-untyped-call]


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: float, surrogate: Surrogate, signed: bool) -> Tensor:
        _threads()
        out, scale = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=x.dtype)
        flat, into = (_array(v).reshape(-1, x.shape[-1]) for v in (x, out))
        kernels.gate_forward(flat, threshold, signed, GATE_EPSILON, scale.numpy().reshape(-1), into)
        ctx.save_for_backward(x, scale)
        ctx.rule = (threshold, signed, surrogate.code, surrogate.width)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        _threads()
        x, scale = ctx.saved_tensors
        gx = torch.empty_like(x)
        gout, flat, into = (_array(v).reshape(-1, x.shape[-1]) for v in (gradients[0], x, gx))
        kernels.gate_backward(gout, flat, scale.numpy().reshape(-1), *ctx.rule, into)
        return gx, None, None, None


def gate(x: Tensor, threshold: float, surrogate: Surrogate, signed: bool = False) -> Tensor:
    """Spikes without a state: x (…, neurons) over the root mean square of its neurons -> 1 above the threshold, else 0.

    ``signed``: also -1 below the negative threshold, the spikes of a second population.

    >>> gate(torch.tensor([-2.0, 0.1, 2.0]), 0.5, Surrogate(), signed=True).tolist()
    [-1.0, 0.0, 1.0]
    """
    x = x.float() if _wide(x) else x
    if fused(x):
        return _Gate.apply(x.contiguous(), threshold, surrogate, signed)  # type: ignore[no-any-return, no-untyped-call]
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + GATE_EPSILON)
    on = spike(x, threshold, surrogate)
    return on - spike(-x, threshold, surrogate) if signed else on


class _Leak(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, start: Tensor, decay: Tensor) -> Tensor:
        _threads()
        out = torch.empty_like(x)
        kernels.leak_forward(_rows(x), _array(start).reshape(-1), _array(decay), _rows(out))
        ctx.save_for_backward(out, start, decay)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        _threads()
        out, start, decay = ctx.saved_tensors
        gx, gstart = torch.empty_like(out), torch.empty_like(start)
        gdecay = torch.empty(start.numel(), dtype=out.dtype)
        kernels.leak_backward(
            _rows(gradients[0]), _rows(out), _array(start).reshape(-1), _array(decay),
            _rows(gx), gstart.numpy().reshape(-1), gdecay.numpy(),
        )  # fmt: skip
        return gx, gstart, _sized(gdecay, decay)


def leak_scan(x: Tensor, state: Tensor | None, decay: Tensor | float) -> tuple[Tensor, Tensor]:
    """``u[t] = decay u[t-1] + x[t]`` for all t; x (time, batch, …) -> potentials like x, and the last one."""
    if _wide(x):
        x = x.float()
    start = _start(state, x)
    if not fused(x):
        return loop(lambda now, v: leak_step(now, v, decay), x, start)
    x, start = x.contiguous(), start.contiguous()
    out: Tensor = _Leak.apply(x, start, _flat(decay, x))  # type: ignore[no-untyped-call]
    return out, out[-1]


def synaptic_scan(
    x: Tensor, state: SynapticState | None, parameters: SynapticParameters
) -> tuple[Tensor, SynapticState]:
    """Current-based neurons over time: a filter, then leaky neurons."""
    current, last = leak_scan(x, state.current if state is not None else None, parameters.synapse)
    spikes, potential = lif_scan(current, state.potential if state is not None else None, parameters.membrane)
    return spikes, SynapticState(potential, last)


def alpha_scan(x: Tensor, state: AlphaState | None, parameters: AlphaParameters) -> tuple[Tensor, AlphaState]:
    """Neurons with an alpha synapse over time: a filter twice, then leaky neurons."""
    rise, last = leak_scan(parameters.gain * x, state.rise if state is not None else None, parameters.synapse)
    current, final = leak_scan(rise, state.current if state is not None else None, parameters.synapse)
    spikes, potential = lif_scan(current, state.potential if state is not None else None, parameters.membrane)
    return spikes, AlphaState(potential, last, final)


class _Adaptive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, start: Tensor, raised: Tensor, decay: Tensor, threshold: Tensor, recovery: Tensor,
        jump: Tensor, p: LIFParameters,
    ) -> Any:  # fmt: skip
        _threads()
        pre, theta, spikes = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
        last, trace = torch.empty_like(start), torch.empty_like(start)
        kernels.adaptive_forward(
            _rows(x), _array(start).reshape(-1), _array(raised).reshape(-1), _array(decay), _array(threshold),
            _array(recovery), _array(jump), kernels.RESETS[p.reset],
            _rows(pre), _rows(theta), _rows(spikes), last.numpy().reshape(-1), trace.numpy().reshape(-1),
        )  # fmt: skip
        ctx.save_for_backward(pre, theta, start, decay, threshold, recovery, jump)
        ctx.parameters = p
        return spikes, last, trace

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        _threads()
        pre, theta, start, decay, threshold, recovery, jump = ctx.saved_tensors
        p: LIFParameters = ctx.parameters
        gx, gstart, gtrace = torch.empty_like(pre), torch.empty_like(start), torch.empty_like(start)
        parts = [torch.empty(start.numel(), dtype=pre.dtype) for _ in range(4)]
        kernels.adaptive_backward(
            _rows(gradients[0]), _array(gradients[1]).reshape(-1), _array(gradients[2]).reshape(-1), _rows(pre),
            _rows(theta), _array(start).reshape(-1), _array(decay), _array(threshold), _array(recovery), _array(jump),
            kernels.RESETS[p.reset], p.detach, p.surrogate.code, p.surrogate.width,
            _rows(gx), gstart.numpy().reshape(-1), gtrace.numpy().reshape(-1), *(g.numpy() for g in parts),
        )  # fmt: skip
        sized = [_sized(g, p) for g, p in zip(parts, (decay, threshold, recovery, jump), strict=True)]
        return gx, gstart, gtrace, *sized, None


def adaptive_scan(
    x: Tensor, state: AdaptiveState | None, parameters: AdaptiveParameters
) -> tuple[Tensor, AdaptiveState]:
    """Neurons with a threshold that adapts, over time; x (time, batch, …)."""
    if _wide(x):
        spikes, after = adaptive_scan(x.float(), state, parameters)
        return spikes.to(x.dtype), after
    start = _start(state.potential if state is not None else None, x)
    raised = _start(state.trace if state is not None else None, x)
    if not fused(x):
        return loop(lambda now, s: adaptive_step(now, s, parameters), x, AdaptiveState(start, raised))
    p = parameters.membrane
    flat = [_flat(v, x) for v in (p.decay, p.threshold, parameters.recovery, parameters.jump)]
    spikes, last, trace = _Adaptive.apply(x.contiguous(), start.contiguous(), raised.contiguous(), *flat, p)  # type: ignore[no-untyped-call]
    return spikes, AdaptiveState(last, trace)
