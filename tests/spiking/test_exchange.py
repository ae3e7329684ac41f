"""NIR graphs: there and back, and the numbers of another library's reading."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hasten.errors import ConfigurationError, ModelLoadError, UnsupportedModelError
from hasten.spiking import IF, LIF, PLIF, Leak, SpikingNetwork, Synaptic, from_nir, to_nir

nir = pytest.importorskip("nir")
pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> SpikingNetwork:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(1, 3, 3, padding=1, bias=False), LIF(0.9, 0.3, "zero"), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(27, 10), Synaptic(0.7, 0.8, threshold=0.4, reset="zero"), nn.Linear(10, 8, bias=False),
        IF(0.5, "zero"), nn.Linear(8, 4, bias=False), Leak(0.95),
    ]  # fmt: skip
    return SpikingNetwork(layers, 12, direct=False).eval()


def test_there_and_back(tmp_path) -> None:  # type: ignore[no-untyped-def]
    net, x = network(), (torch.rand(12, 2, 1, 6, 6) < 0.4).float()
    graph = to_nir(net, (1, 6, 6))
    nir.write(tmp_path / "net.nir", graph)
    again = from_nir(nir.read(tmp_path / "net.nir"), 12)
    expected = net.outputs(x)
    torch.testing.assert_close(again.outputs(x), expected, atol=1e-4, rtol=1e-4)
    assert expected.abs().sum() > 0


def reference_lif(x: np.ndarray, node, dt: float) -> np.ndarray:  # type: ignore[no-untyped-def, type-arg]
    """Euler's rule on the equation that NIR states, and a reset to zero above the threshold."""
    v, out = np.zeros(x.shape[1:]), []
    for now in x:
        v = v + dt / node.tau * (node.v_leak - v + node.r * now)
        z = v > node.v_threshold
        v = np.where(z, node.v_reset, v)
        out.append(z.astype(float))
    return np.stack(out)


def test_lif_is_eulers_rule_of_the_stated_equation() -> None:
    tau, r = np.array([0.002, 0.004, 0.01]), np.array([5.0, 10.0, 30.0])
    node = nir.LIF(tau=tau, r=r, v_leak=np.zeros(3), v_threshold=np.array([0.5, 1.0, 0.7]))
    nodes = {"in": nir.Input({"input": np.array([3])}), "n": node, "out": nir.Output({"output": np.array([3])})}
    net = from_nir(nir.NIRGraph(nodes, [("in", "n"), ("n", "out")]), 60, dt=1e-3)
    x = np.random.default_rng(0).random((60, 2, 3))
    ours = net.outputs(torch.from_numpy(x).float()).numpy()
    assert np.array_equal(ours, reference_lif(x, node, 1e-3))
    assert 0 < ours.mean() < 1


def test_the_usual_reading_of_a_leaky_neuron() -> None:
    """dt 1e-4, r = tau / dt: decay 1 - dt / tau and no gain, as snnTorch reads and writes it."""
    tau = np.full(4, 1e-3)
    node = nir.LIF(tau=tau, r=tau / 1e-4, v_leak=np.zeros(4), v_threshold=np.ones(4))
    nodes = {"in": nir.Input({"input": np.array([4])}), "n": node, "out": nir.Output({"output": np.array([4])})}
    net = from_nir(nir.NIRGraph(nodes, [("in", "n"), ("n", "out")]), 5)
    (layer,) = net.layers
    assert layer.decay.item() == pytest.approx(0.9)
    assert layer.reset == "zero"


@pytest.mark.parametrize("kind", ["lif", "parametric", "synaptic", "convolution"])
def test_snntorch_reads_the_same_spikes(kind: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Its own importer, where it is installed; it flattens without a batch, so samples go one by one."""
    importer = pytest.importorskip("snntorch.import_nir")
    torch.manual_seed(0)
    kinds = {
        "lif": [nn.Linear(20, 30), LIF(0.9, 0.3, "zero"), nn.Linear(30, 12, bias=False), LIF(0.8, 0.2, "zero")],
        "parametric": [nn.Linear(20, 30), PLIF(3.0, 0.2, "zero"), nn.Linear(30, 8)],
        "synaptic": [nn.Linear(20, 30), Synaptic(0.7, 0.8, threshold=0.4, reset="zero"), nn.Linear(30, 8)],
        "convolution": [nn.Conv2d(1, 3, 3, padding=1, bias=False), LIF(0.9, 0.2, "zero"), nn.AvgPool2d(2),
                        nn.Flatten(), nn.Linear(27, 10), LIF(0.95, 0.3, "zero")],
    }  # fmt: skip
    net = SpikingNetwork(kinds[kind], 25, direct=False).eval()
    shape = (1, 6, 6) if kind == "convolution" else (20,)
    x = (torch.rand(25, 1, *shape) < 0.4).float()
    nir.write(tmp_path / "net.nir", to_nir(net, shape))
    theirs, state, outs = importer.import_from_nir(nir.read(tmp_path / "net.nir")), None, []
    with torch.no_grad():
        for now in x[:, 0]:
            out, state = theirs(now, state) if state is not None else theirs(now)
            outs.append(out[0] if isinstance(out, tuple) else out)
        ours = net.outputs(x)
    torch.testing.assert_close(torch.stack(outs).reshape(ours.shape), ours, atol=1e-5, rtol=1e-5)
    assert ours.abs().sum() > 0


@pytest.mark.parametrize("kind", ["Leaky", "Synaptic"])
def test_we_read_what_snntorch_writes(kind: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Its own network, its own exporter, a file, our reading: the numbers of its own run."""
    snn = pytest.importorskip("snntorch")
    exporter, utils = pytest.importorskip("snntorch.export_nir"), pytest.importorskip("snntorch.utils")
    torch.manual_seed(0)
    decays = {"Leaky": {"beta": 0.9}, "Synaptic": {"alpha": 0.7, "beta": 0.8}}[kind]
    each = {name: torch.full((30,), value) for name, value in {**decays, "threshold": 0.3}.items()}
    neurons = getattr(snn, kind)(**each, reset_mechanism="zero", reset_delay=False, init_hidden=True)
    theirs = nn.Sequential(nn.Linear(20, 30), neurons, nn.Linear(30, 8))
    nir.write(tmp_path / "net.nir", exporter.export_to_nir(theirs, torch.rand(20)))
    x = (torch.rand(25, 4, 20) < 0.4).float()
    utils.reset(theirs)
    with torch.no_grad():
        expected = torch.stack([theirs(now) for now in x])
        ours = from_nir(tmp_path / "net.nir", 25).outputs(x)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert expected.abs().sum() > 0


def test_shapes_and_files_that_do_not_fit_are_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    net = SpikingNetwork([nn.Linear(5, 2), LIF(0.9, reset="zero")], 3, direct=False)
    with pytest.raises(ConfigurationError, match=r"input_shape \(7,\) does not fit layer '0'"):
        to_nir(net, (7,))
    with pytest.raises(ModelLoadError, match="no NIR graph"):
        from_nir(tmp_path / "absent.nir", 3)
    with pytest.raises(ModelLoadError, match="Linear is no NIR graph"):
        from_nir(nn.Linear(2, 2), 3)


def test_what_has_no_form_is_named() -> None:
    soft = SpikingNetwork([nn.Linear(2, 2), LIF(0.9, reset="subtract")], 3, direct=False)
    with pytest.raises(UnsupportedModelError, match="'1'.*reset to zero"):
        to_nir(soft, (2,))
    with pytest.raises(UnsupportedModelError, match="'1'.*Tanh"):
        to_nir(SpikingNetwork([nn.Linear(2, 2), nn.Tanh(), IF(reset="zero")], 3, direct=False), (2,))
    shape = {"input": np.array([2])}
    nodes = {"a": nir.Input(shape), "b": nir.Linear(np.eye(2)), "c": nir.Linear(np.eye(2)),
             "d": nir.Output({"output": np.array([2])})}  # fmt: skip
    branch = nir.NIRGraph(nodes, [("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")])
    with pytest.raises(UnsupportedModelError, match="only chains"):
        from_nir(branch, 3)
    leaky = nir.LIF(tau=np.ones(2), r=np.ones(2), v_leak=np.ones(2), v_threshold=np.ones(2))
    graph = nir.NIRGraph({"a": nir.Input(shape), "b": leaky, "d": nodes["d"]}, [("a", "b"), ("b", "d")])
    with pytest.raises(UnsupportedModelError, match="v_leak"):
        from_nir(graph, 3)
