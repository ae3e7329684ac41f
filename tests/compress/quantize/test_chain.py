"""What reaches a layer is the same with and without the blocks below it."""

import pytest
import torch
from torch import nn

from hasten.compress.quantize import Gptq, Int, PerGroup, Quantize
from hasten.compress.quantize.chain import BlockChain, blocks_of
from hasten.compress.quantize.passes import Calibration


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x, shift, gate=None):
        return x + self.down(torch.relu(self.up(x + shift)))


class Stack(nn.Module):
    """Blocks that feed each other, or, ``crossed``, read the input as well."""

    def __init__(self, crossed=False, width=32):
        super().__init__()
        self.start = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.crossed = crossed

    def forward(self, x):
        h = self.start(x)
        for block in self.blocks:
            h = block(h, 0.1, gate=None)
            if self.crossed:
                h = h + x
        return h


@pytest.mark.parametrize("crossed", [False, True])
def test_the_same_inputs_as_whole_runs(crossed):
    torch.manual_seed(0)
    model, data = Stack(crossed).eval(), [torch.randn(3, 5, 32) for _ in range(3)]
    calibration = Calibration(data)
    runs = []
    model.start.register_forward_hook(lambda *_: runs.append(1))
    for path in ("blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "blocks.2.down"):
        whole = list(calibration.inputs_of(model, path))
        if path == "blocks.0.up":
            runs.clear()
            chained = calibration.in_order(model)
            chained.__enter__()
        before = len(runs)
        again = list(calibration.inputs_of(model, path))
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
        assert len(runs) - before <= (3 if crossed or path == "blocks.0.up" else 1)
    chained.__exit__(None, None, None)


def test_gptq_gives_the_same_codes(monkeypatch):
    torch.manual_seed(0)
    model, data = Stack().eval(), [torch.randn(2, 16, 32) for _ in range(2)]
    technique = Quantize(Int(3, PerGroup(1, 16)), steps=[Gptq()], real="never")
    fast = technique(model, data)
    monkeypatch.setattr(BlockChain, "inputs_of", lambda self, path: None)
    slow = technique(model, data)
    x = torch.randn(1, 4, 32)
    assert torch.equal(fast(x), slow(x))


def test_the_list_of_blocks():
    assert blocks_of(Stack()) == ("blocks", 3)
    assert blocks_of(nn.Sequential(nn.Linear(2, 2))) is None
