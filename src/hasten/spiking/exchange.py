"""Networks to and from NIR, the neuromorphic intermediate representation (Pedersen et al., Nature Communications 2024).

NIR states differential equations in seconds; a timestep ``dt`` turns them into steps by Euler's rule, as snnTorch does:
``decay = 1 - dt / tau``, and the input is scaled by ``r dt / tau``, here folded into the weights before the neurons.
Only chains of layers are read, and only neurons that reset to zero and leak to zero have a NIR form.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hasten.errors import ConfigurationError, MissingExtraError, ModelLoadError, UnsupportedModelError
from hasten.spiking.layers import IF, LIF, PLIF, Leak, Neuron, Synaptic
from hasten.spiking.network import SpikingNetwork

__all__ = ["from_nir", "to_nir"]

_DT = 1e-4  # seconds; what snnTorch assumes


def _library() -> Any:
    try:
        import nir
    except ImportError as error:
        raise MissingExtraError("nir", "nir", "reading and writing NIR graphs") from error
    return nir


def _full(value: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray:
    result: np.ndarray = value.detach().double().expand(shape).numpy().copy()
    return result


def _refuse(name: str, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"layer {name!r} has no NIR form: {why}")


def to_nir(network: SpikingNetwork, input_shape: tuple[int, ...], dt: float = _DT) -> Any:
    """The NIR graph of a network; ``input_shape`` is that of one sample at one step, ``dt`` the timestep in seconds.

    Raises :class:`~hasten.errors.UnsupportedModelError` that names a layer without a NIR form (a soft reset, say).
    """
    nir = _library()
    nodes: dict[str, Any] = {"input": nir.Input(input_type={"input": np.array(input_shape)})}
    x = torch.zeros(1, *input_shape)
    for name, layer in network.layers.named_children():
        shape = tuple(x.shape[1:])
        nodes[f"layer_{name}"] = _node(nir, name, layer, shape, dt)
        try:
            with torch.no_grad():
                x = layer.step(x)[0] if isinstance(layer, (Neuron, Leak)) else layer(x)
        except RuntimeError as error:
            raise ConfigurationError(
                f"input_shape {tuple(input_shape)} does not fit layer {name!r}, which is given {shape} "
                f"({str(error).splitlines()[0]}); give the shape of one sample at one step"
            ) from error
    nodes["output"] = nir.Output(output_type={"output": np.array(x.shape[1:])})
    order = list(nodes)
    return nir.NIRGraph(nodes, list(zip(order, order[1:], strict=False)))


def _node(nir: Any, name: str, layer: nn.Module, shape: tuple[int, ...], dt: float) -> Any:
    if isinstance(layer, nn.Linear):
        weight = layer.weight.detach().numpy()
        return nir.Linear(weight) if layer.bias is None else nir.Affine(weight, layer.bias.detach().numpy())
    if isinstance(layer, nn.Conv2d):
        bias = layer.bias.detach() if layer.bias is not None else torch.zeros(layer.out_channels)
        return nir.Conv2d(
            shape[-2:],
            layer.weight.detach().numpy(),
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            bias.numpy(),
        )
    if isinstance(layer, nn.AvgPool2d):
        size, stride, padding = (
            np.array((v, v) if isinstance(v, int) else v) for v in (layer.kernel_size, layer.stride, layer.padding)
        )
        return nir.AvgPool2d(size, stride, padding)
    if isinstance(layer, nn.Flatten):
        return nir.Flatten({"input": np.array(shape)}, 0, -1)
    if isinstance(layer, Leak):
        tau = dt / (1 - _full(layer.decay, shape))
        if not np.isfinite(tau).all():
            raise _refuse(name, "an integrator without a leak; use a decay below 1")
        return nir.LI(tau, tau / dt, np.zeros(shape))
    if not isinstance(layer, Neuron):
        raise _refuse(name, f"{type(layer).__name__} is not linear, convolution, average pooling, flatten or a neuron")
    if layer.reset != "zero" or layer.start:
        raise _refuse(name, "NIR neurons reset to zero and start at rest; train with reset='zero'")
    threshold = _full(layer.threshold, shape)
    if type(layer) is IF:
        return nir.IF(np.full(shape, 1 / dt), threshold)
    if type(layer) is PLIF:
        return nir.LIF(dt / _full(layer.gain, shape), np.ones(shape), np.zeros(shape), threshold)
    if type(layer) is LIF or type(layer) is Synaptic:
        tau = dt / (1 - _full(layer.decay, shape))
        if not np.isfinite(tau).all():
            raise _refuse(name, "a decay of 1 is an IF neuron")
        if type(layer) is LIF:
            return nir.LIF(tau=tau, r=tau / dt, v_leak=np.zeros(shape), v_threshold=threshold)
        kept: Any = layer.synapse
        synapse = dt / (1 - _full(kept, shape))
        return nir.CubaLIF(
            tau_syn=synapse, tau_mem=tau, r=tau / dt, v_leak=np.zeros(shape), v_threshold=threshold, w_in=synapse / dt
        )
    raise _refuse(name, f"{type(layer).__name__} has other equations than LIF, PLIF, IF and CubaLIF")


def from_nir(graph: Any, timesteps: int, dt: float = _DT) -> SpikingNetwork:
    """The network of a NIR graph, or of a file of one, that is one chain; its inputs are time-first spikes or currents
    (time, batch, …).

    Raises :class:`~hasten.errors.UnsupportedModelError` for branches, loops and nodes without a counterpart here, and
    :class:`~hasten.errors.ModelLoadError` for a file that cannot be read.
    """
    nir = _library()
    if isinstance(graph, (str, Path)):
        try:
            graph = nir.read(str(graph))
        except Exception as error:  # h5py and nir raise what a broken file meets first
            raise ModelLoadError(f"{str(graph)!r} is no NIR graph ({error}); write one with nir.write") from error
    if not isinstance(graph, nir.NIRGraph):
        raise ModelLoadError(f"{type(graph).__name__} is no NIR graph; give a nir.NIRGraph or the path of its file")
    following: dict[str, str] = {}
    for source, target in set(graph.edges):
        if source in following:
            raise UnsupportedModelError(
                f"node {source!r} feeds {following[source]!r} and {target!r}; only chains are read"
            )
        following[source] = target
    starts = [n for n, node in graph.nodes.items() if isinstance(node, nir.Input)]
    if len(starts) != 1:
        raise UnsupportedModelError(f"the graph has {len(starts)} inputs; only chains from one input are read")
    layers: list[nn.Module] = []
    name, seen = starts[0], {starts[0]}
    while (following.get(name)) is not None:
        name = following[name]
        if name in seen:
            raise UnsupportedModelError(f"node {name!r} lies on a loop; only chains are read")
        seen.add(name)
        if not isinstance(graph.nodes[name], nir.Output):
            layers += _layers(nir, name, graph.nodes[name], dt)
    return SpikingNetwork(layers, timesteps, direct=False).eval()


def _tensor(value: Any) -> torch.Tensor:
    array = np.asarray(value)
    if array.size and np.all(array == array.flat[0]):
        return torch.tensor(float(array.flat[0]))
    return torch.from_numpy(np.ascontiguousarray(array)).float()


class Gain(nn.Module):
    """Multiplies a current by what NIR states as ``r dt / tau``."""

    def __init__(self, gain: torch.Tensor) -> None:
        super().__init__()
        self.gain: torch.Tensor
        self.register_buffer("gain", gain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, …neurons)."""
        return self.gain * x


def _gained(gain: Any, neuron: nn.Module) -> list[nn.Module]:
    factor = _tensor(gain)
    return [neuron] if torch.allclose(factor, torch.ones_like(factor), rtol=1e-6, atol=0) else [Gain(factor), neuron]


def _layers(nir: Any, name: str, node: Any, dt: float) -> list[nn.Module]:
    if isinstance(node, (nir.Linear, nir.Affine)):
        linear = nn.Linear(node.weight.shape[1], node.weight.shape[0], bias=isinstance(node, nir.Affine))
        linear.weight = nn.Parameter(torch.tensor(np.asarray(node.weight), dtype=torch.float32))
        if isinstance(node, nir.Affine):
            linear.bias = nn.Parameter(torch.tensor(np.asarray(node.bias), dtype=torch.float32))
        return [linear]
    if isinstance(node, nir.Conv2d):
        out, per_group, *size = node.weight.shape
        conv = nn.Conv2d(
            per_group * node.groups, out, tuple(size), node.stride, _pairs(node.padding), node.dilation, node.groups
        )
        conv.weight = nn.Parameter(torch.tensor(np.asarray(node.weight), dtype=torch.float32))
        conv.bias = nn.Parameter(torch.tensor(np.asarray(node.bias), dtype=torch.float32))
        return [conv]
    if isinstance(node, nir.AvgPool2d):
        return [nn.AvgPool2d(_pairs(node.kernel_size), _pairs(node.stride), _pairs(node.padding))]
    if isinstance(node, nir.Flatten):
        return [nn.Flatten()]
    for leak in ("v_leak", "v_reset"):
        if hasattr(node, leak) and np.any(np.asarray(getattr(node, leak)) != 0):
            raise UnsupportedModelError(
                f"node {name!r} has {leak} other than 0; shift its potentials and threshold first"
            )
    if isinstance(node, nir.IF):
        return _gained(np.asarray(node.r) * dt, IF(_tensor(node.v_threshold), "zero"))
    if isinstance(node, nir.LIF):
        tau = np.asarray(node.tau, np.float64)
        return _gained(node.r * dt / tau, LIF(_tensor(1 - dt / tau), _tensor(node.v_threshold), "zero"))
    if isinstance(node, nir.LI):
        tau = np.asarray(node.tau, np.float64)
        return _gained(node.r * dt / tau, Leak(_tensor(1 - dt / tau)))
    if isinstance(node, nir.CubaLIF):
        tau, synapse = np.asarray(node.tau_mem, np.float64), np.asarray(node.tau_syn, np.float64)
        gain = node.w_in * dt / synapse * node.r * dt / tau  # both filters are linear: their gains commute
        neuron = Synaptic(
            _tensor(1 - dt / synapse), _tensor(1 - dt / tau), threshold=_tensor(node.v_threshold), reset="zero"
        )
        return _gained(gain, neuron)
    raise UnsupportedModelError(f"node {name!r} ({type(node).__name__}) has no counterpart here")


def _pairs(value: Any) -> Any:
    if isinstance(value, (str, int)):
        return value
    return tuple(int(v) for v in np.asarray(value).reshape(-1))
