"""One contender of ``spiking.py``, in a process and perhaps an environment of its own; it needs torch and its own
library.

Reads ``[command, arguments]`` as JSON lines, answers with ``{"result": …}`` or ``{"absent": reason}``. Every kind
builds the same network (700-512-512-20, leaky neurons, soft reset, arctan surrogate) with the same weights and inputs.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings

warnings.filterwarnings("ignore")
DECAY, WIDTHS = 0.9, (700, 512, 512, 20)
QUIET_STDOUT = os.dup(1)  # libraries may print; the protocol keeps the real one
os.dup2(2, 1)


def say(document: dict) -> None:
    os.write(QUIET_STDOUT, (json.dumps(document) + "\n").encode())


class Absent(Exception):
    """This contender cannot take part."""


def weights() -> list:
    import torch

    g = torch.Generator().manual_seed(0)
    pairs = zip(WIDTHS, WIDTHS[1:], strict=False)
    return [torch.randn(b, a, generator=g) * gain / a**0.5 for (a, b), gain in zip(pairs, (3.0, 1.5, 1.5), strict=True)]


def inputs(steps: int, batch: int, rate: float):
    import torch

    g = torch.Generator().manual_seed(1)
    x = (torch.rand(steps, batch, WIDTHS[0], generator=g) < rate).float()
    return x, torch.randint(0, WIDTHS[-1], (batch,), generator=g)


def linears(module) -> list:
    import torch
    from torch import nn

    layers = [nn.Linear(a, b, bias=False) for a, b in zip(WIDTHS, WIDTHS[1:], strict=False)]
    for layer, w in zip(layers, weights(), strict=True):
        layer.weight = nn.Parameter(w.clone() if isinstance(w, torch.Tensor) else w)
    return layers


def hasten_network(reset: str = "subtract"):
    import torch
    from torch import nn

    from hasten.spiking import LIF, SpikeLinear, SpikingNetwork

    layers = []
    for w in weights():
        layer = SpikeLinear(w.shape[1], w.shape[0])
        with torch.no_grad():
            layer.weight.copy_(w)
        layers += [layer, LIF(DECAY, 1.0, reset, "arctan")]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = SpikingNetwork(layers, 100, direct=False)

        def forward(self, x):
            return self.network.outputs(x, len(x))

    return Net()


def snntorch_network():
    try:
        import snntorch as snn
        from snntorch import surrogate
    except ImportError as error:
        raise Absent(f"snntorch is not installed in this environment ({error})") from error
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linears = nn.ModuleList(linears(nn))
            self.neurons = nn.ModuleList(
                snn.Leaky(beta=DECAY, threshold=1.0, spike_grad=surrogate.atan(alpha=2.0)) for _ in self.linears
            )

        def forward(self, x):
            states, out = [n.init_leaky() for n in self.neurons], []
            for now in x:
                for i, (linear, neuron) in enumerate(zip(self.linears, self.neurons, strict=True)):
                    now, states[i] = neuron(linear(now), states[i])
                out.append(now)
            return torch.stack(out)

    return Net()


def spikingjelly_network():
    try:
        from spikingjelly.activation_based import functional, neuron, surrogate
    except ImportError as error:
        raise Absent(f"spikingjelly cannot be imported in this environment ({error})") from error
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList()
            for linear in linears(nn):
                self.layers += [
                    linear,
                    neuron.LIFNode(
                        tau=1 / (1 - DECAY), decay_input=False, v_threshold=1.0, v_reset=None,
                        surrogate_function=surrogate.ATan(alpha=2.0), detach_reset=True, step_mode="m",
                    ),
                ]  # fmt: skip

        def forward(self, x):
            functional.reset_net(self)
            for layer in self.layers:
                x = layer(x)
            return x

    return Net()


KINDS = {
    "hasten": hasten_network,
    "hasten-late": lambda: hasten_network("late"),
    "snntorch": snntorch_network,
    "spikingjelly": spikingjelly_network,
}


def peak(run) -> int:
    """Bytes by which the first call lifts the largest size that this process ever had."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def main() -> None:
    kind, options = sys.argv[1], json.loads(sys.argv[2])
    import torch

    torch.set_num_threads(options["threads"])
    os.environ.setdefault("NUMBA_NUM_THREADS", str(options["threads"]))
    try:
        net = KINDS[kind]()
    except Absent as reason:
        say({"absent": str(reason)})
        return
    x, y = inputs(options["steps"], options["batch"], options["rate"])
    optimiser = torch.optim.Adam(net.parameters(), lr=0.0)  # the work of a step, and weights that stay comparable

    def infer():
        with torch.inference_mode():
            return net(x)

    def train():
        loss = torch.nn.functional.cross_entropy(net(x).mean(0), y)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        return loss

    runs = {"infer": infer, "train": train}
    say({"result": {"torch": torch.__version__, "kind": kind}})
    for line in sys.stdin:
        command, arguments = json.loads(line)
        if command == "facts":
            spikes = infer()
            train()
            first = next(net.parameters()).grad
            loss = float(train().detach())
            say({"result": {"rate": float(spikes.mean()), "spikes": float(spikes.sum()), "loss": loss,
                            "gradient": float(first.norm())}})  # fmt: skip
        elif command == "memory":
            with torch.inference_mode():  # compiled code and thread pools are not the network's memory
                net(x[:2, :1])
            small = torch.nn.functional.cross_entropy(net(x[:2, :1]).mean(0), y[:1])
            small.backward()
            say({"result": peak(runs[arguments["what"]])})
        else:
            repeats = arguments.get("repeats", 1)
            begin = time.perf_counter()
            for _ in range(repeats):
                runs[command]()
            say({"result": (time.perf_counter() - begin) / repeats})


if __name__ == "__main__":
    main()
