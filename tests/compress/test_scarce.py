"""Too little calibration data: one line that names layers, what they saw and what they need; or a refusal."""

import sys
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from hasten.cli.main import run
from hasten.compress import Int8Network, ModularDecomposition, SvdQuant, ToMLA, TruncatedSvd
from hasten.compress.quantize import (
    BiasCorrection,
    Entropy,
    FitRanges,
    Gptq,
    Int,
    Percentile,
    PerGroup,
    Quantize,
    SmoothQuant,
)
from hasten.compress.scarce import FEW, Scarcity, count_examples
from hasten.errors import ConfigurationError, DataWarning
from hasten.language import Decoder, DecoderConfig
from hasten.nn.product.instructions import has_bytes


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()


def images() -> nn.Module:
    torch.manual_seed(0)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), *head).eval()


BYTES = Int(8, observer=Entropy(bins=256))
CASES = {
    "gptq": (Quantize(Int(4), None, [Gptq()]), 64, "Gptq meets a singular second moment in 2 of 2 layers, '1' (5 rows"),
    "fitted": (Quantize(Int(4, PerGroup(1, 32)), None, [FitRanges()]), 64, "FitRanges meets a singular"),
    "static": (Quantize(Int(8), Int(8)), FEW, "static inputs take ranges over 5 examples where 20 are wanted"),
    "percentile": (Quantize(Int(8), Int(8, observer=Percentile(99.0))), FEW, "over 5 examples"),
    "entropy": (Quantize(Int(8), BYTES), FEW, "static inputs take ranges over 5"),
    "smooth": (Quantize(Int(8), None, [SmoothQuant()]), FEW, "SmoothQuant takes the largest inputs over 5"),
    "means": (Quantize(Int(8), None, [BiasCorrection()]), FEW, "BiasCorrection takes means of outputs over 5"),
    "truncated": (TruncatedSvd(0.5), 64, "TruncatedSvd meets a singular second moment in 2 of 2"),
    "svdquant": (SvdQuant(rank=4, grid=3, iterations=0), FEW, "SvdQuant takes the largest inputs over 5 examples"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_below_what_is_needed_and_none_from_there_on(case: str) -> None:
    technique, needed, said = CASES[case]
    model: Any = network()
    with pytest.warns(DataWarning) as heard:
        few: Any = technique(model, [torch.randn(2, 64), torch.randn(3, 64)])
    assert len(heard) == 1
    assert heard[0].filename == __file__  # the place that can change it
    line = str(heard[0].message)
    assert said in line
    assert line.count("too little calibration") == 1
    assert f"give {-(-needed // 5)} times as much" in line
    assert [n for n in few.report.notes if n.startswith("too little")] == [line]
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        enough: Any = technique(model, [torch.randn(needed, 64)])
    assert not any(n.startswith("too little") for n in enough.report.notes)


def test_what_several_steps_lack_is_one_line() -> None:
    technique = Quantize(Int(4), Int(8, observer=Percentile(99.9)), [SmoothQuant(), Gptq(), BiasCorrection()])
    with pytest.warns(DataWarning) as heard:
        technique(network(), [torch.randn(1, 64)])
    line = str(heard[0].message)
    assert len(heard) == 1
    assert "\n" not in line
    for said in (
        "Gptq meets", "(1 row of 64)", "Percentile chooses a loose range", "(64 values of 2000)",
        "SmoothQuant takes the largest inputs and BiasCorrection takes means of outputs and static inputs take ranges",
        "ranges over 1 example where 20",
        "with probability 50%",
    ):  # fmt: skip
        assert said in line


def test_ranges_and_systems_without_a_meaning_are_refused() -> None:
    # One value has the same histogram under every range: without the refusal the layer's inputs become 0.
    with pytest.raises(ConfigurationError, match=r"Entropy cannot choose a range in 2 of 2 layers.*64 values of 128"):
        Quantize(Int(8), Int(8, observer=Entropy()))(network(), [torch.randn(1, 64)])
    with pytest.raises(ConfigurationError, match=r"Gptq\(damp=0\) meets a singular.*or Gptq\(damp=0.01\)"):
        Quantize(Int(4), None, [Gptq(damp=0)])(network(), [torch.randn(63, 64)])


@pytest.mark.skipif(not has_bytes(), reason="this processor has no vpdpbusd")
def test_one_image_for_a_network_in_bytes() -> None:
    with pytest.warns(DataWarning, match="activations take ranges over 1 example where 20 are wanted"):
        small: Any = Int8Network(only_faster=False)(images(), [torch.rand(1, 3, 8, 8)])
    assert any(n.startswith("too little calibration") for n in small.report.notes)


def decoder() -> nn.Module:
    config = DecoderConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, num_kv_heads=2,
        head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    return Decoder(config).eval()


def test_few_tokens_for_narrower_layers() -> None:
    model = decoder()
    technique = ModularDecomposition(0.3, allocation="uniform")
    with pytest.raises(ConfigurationError, match="values and output of a head cannot be fitted in 2 of 2 layers"):
        technique(model, [torch.randint(64, (1, 15))])
    with pytest.warns(DataWarning, match=r"ModularDecomposition meets .* in 4 of 4 layers, .*\(20 tokens of 48\)"):
        technique(model, [torch.randint(64, (1, 20))])


def test_few_tokens_for_a_latent() -> None:
    model = decoder()
    with pytest.raises(ConfigurationError, match=r"latent is wider than what was seen.*\(8 tokens of 10\)"):
        ToMLA(kv_rank=10, rope_dims=16)(model, [torch.randint(64, (1, 8))])
    with pytest.warns(DataWarning, match=r"ToMLA meets .*\(20 tokens of 48\)"):
        ToMLA(kv_rank=10, rope_dims=16)(model, [torch.randint(64, (1, 20))])


def test_a_layer_that_nothing_reaches_is_factored_by_its_weights() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.used(x)
            return result

    torch.manual_seed(0)
    model = Half()
    with pytest.warns(DataWarning, match=r"in 1 of 2 layers, 'idle' \(0 rows of 16\)"):
        seen: Any = TruncatedSvd(0.4)(model, [torch.randn(64, 16)])
    unseen: Any = TruncatedSvd(0.4)(model)
    assert torch.equal(seen.idle.down, unseen.idle.down)
    assert not torch.equal(seen.used.down, unseen.used.down)


def test_examples_are_counted_whatever_a_batch_is() -> None:
    assert count_examples([torch.zeros(3, 2), {"x": torch.zeros(2, 2), "y": torch.zeros(2)}, (torch.zeros(4),)]) == 9
    assert count_examples([(torch.zeros(3, 2), torch.zeros(5)), "text"]) == 2  # one each, where it cannot be told


def test_many_layers_are_named_by_the_worst() -> None:
    scarce, notes = Scarcity(), list[str]()
    scarce.rows("X", {str(i): i for i in range(6)}, dict.fromkeys(map(str, range(6)), 5))
    with pytest.warns(DataWarning):
        scarce.tell(notes)
    assert "in 5 of 6 layers, '0' (0 rows of 5), '1' (1 of 5), '2' (2 of 5), …; give 5 times" in notes[0]


def test_the_command_line_says_it_on_one_line(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "tiny.jsonl"
    text.write_text('{"text": "def heappush(heap, item):\\n    heap.append(item)\\n    siftdown(heap, 0)\\n"}\n')
    out = tmp_path / "out"
    words = ["compress", "pycode-draft-0.7m", "--scheme", "W4A16", "--data", str(text), "--out", str(out), "--json"]
    monkeypatch.setattr(sys, "argv", ["hasten", *words])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back afterwards
    warnings.simplefilter("default")  # pytest puts the filters back
    with pytest.raises(SystemExit) as ended:
        run()
    assert not ended.value.code
    said = [line for line in capsys.readouterr().err.splitlines() if "too little calibration" in line]
    assert len(said) == 1
    assert said[0].startswith("hasten: too little calibration: Gptq meets a singular second moment in 7 of 7 layers")
