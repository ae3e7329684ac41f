"""Quality at equal bits: this library's rounding beside torchao, bitsandbytes and llm-compressor, on the same weights.

Every contender gets the same float model and the same calibration text, and gives back weights; all are judged by the
same evaluation, bits per byte of held-out files for the language model and cross-entropy for the vision transformer.
Bits count scales and zero points. A peer that is not installed is named and left out; ``--peers`` adds folders to its
search path:

    pip install --target build/peers --no-deps bitsandbytes llmcompressor compressed-tensors loguru accelerate datasets
    pip install --target build/peers --no-deps multiprocess dill xxhash pyarrow pandas
    pip install --target build/peers --no-deps brevitas dependencies==2.0.1 unfoldNd
    python benchmarks/quantize.py --peers build/peers --data ../data
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from harness import Row
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from hasten.compress.quantize import (
    NF4,
    SCHEMES,
    FitRanges,
    Format,
    Gptq,
    Int,
    MiniFloat,
    Mse,
    PerChannel,
    PerGroup,
    Quantize,
)
from hasten.files import write_text
from hasten.measure import Machine

Weights = dict[str, Tensor]
_WINDOW = 512


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """What is rounded: all linear layers but one that shares its weight with the embedding."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {n: m for n, m in model.named_modules() if type(m) is nn.Linear and id(m.weight) not in embeddings}


def with_weights(model: nn.Module, weights: Weights) -> nn.Module:
    """A copy with these weights of linear layers."""
    clone = copy.deepcopy(model)
    for name, layer in linear_layers(clone).items():
        layer.weight = nn.Parameter(weights[name].float().reshape(layer.weight.shape), requires_grad=False)
    return clone


def ours(model: nn.Module, fmt: Format, inputs: list[Any], steps: tuple[Any, ...] = ()) -> tuple[Weights, float]:
    """Weights and bits of one."""
    names = linear_layers(model)
    small = Quantize(fmt, None, steps, kinds=("Linear",), real="never", skip=_tied(model))(
        model, inputs if steps else None
    )
    weights = {n: small.get_submodule(n).weight for n in names}
    bits = sum(fmt.stored_bits(tuple(m.weight.shape)) for m in names.values())
    return weights, bits / sum(m.weight.numel() for m in names.values())


def _tied(model: nn.Module) -> tuple[str, ...]:
    kept = linear_layers(model)
    return tuple(n for n, m in model.named_modules() if type(m) is nn.Linear and n not in kept)


# --- peers ------------------------------------------------------------------------------------------------------------


def torchao(
    model: nn.Module, inputs: list[Any], folder: str, *, bits: int, group: int, affine: bool
) -> tuple[Weights, float]:
    """IntxWeightOnlyConfig: the weight-only path of torchao that runs on this processor."""
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, quantize_
    from torchao.quantization.granularity import PerAxis
    from torchao.quantization.granularity import PerGroup as Group

    clone = copy.deepcopy(model)
    names = set(linear_layers(clone))
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=Group(group) if group else PerAxis(0),
        mapping_type=MappingType.ASYMMETRIC if affine else MappingType.SYMMETRIC,
        scale_dtype=torch.bfloat16 if group else torch.float32,
    )
    quantize_(clone, config, filter_fn=lambda m, n: n in names)
    weights = {n: clone.get_submodule(n).weight.dequantize() for n in names}
    inner = group or float(torch.tensor([m.weight.shape[1] for m in linear_layers(model).values()]).float().mean())
    return weights, bits + ((16 if group else 32) + (8 if affine else 0)) / inner


def bitsandbytes(model: nn.Module, inputs: list[Any], folder: str) -> tuple[Weights, float]:
    """nf4 in blocks of 64, float32 scales."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weights = {}
    for name, layer in linear_layers(model).items():
        codes, state = quantize_4bit(layer.weight.detach().float(), blocksize=64, quant_type="nf4")
        weights[name] = dequantize_4bit(codes, state)
    return weights, 4.5


def llm_compressor(model: nn.Module, inputs: list[Any], folder: str, *, group: int) -> tuple[Weights, float]:
    """GPTQ of llm-compressor, symmetric 4-bit groups; works on the transformers form of the same folder."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    args = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    modifier = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    rows = [{"input_ids": r, "attention_mask": torch.ones_like(r)} for batch in inputs for r in batch]
    oneshot(
        model=other, dataset=DataLoader(rows, batch_size=1), recipe=modifier, max_seq_length=_WINDOW,
        num_calibration_samples=len(rows),
    )  # fmt: skip
    weights = {}
    for name in linear_layers(model):
        layer = other.get_submodule(name)
        weights[name] = layer.weight.detach().float()
    return weights, 4 + 16 / group


def brevitas(model: nn.Module, inputs: list[Any], folder: str, *, e: int, m: int) -> tuple[Weights, float]:
    """A small float per output channel, scale from the extremes."""
    import brevitas.nn as quantised
    from brevitas.quant.experimental.float import Fp8e4m3WeightPerChannelFloat

    weights = {}
    for name, layer in linear_layers(model).items():
        other = quantised.QuantLinear(
            layer.in_features, layer.out_features, bias=False, weight_quant=Fp8e4m3WeightPerChannelFloat,
            weight_bit_width=1 + e + m, weight_exponent_bit_width=e, weight_mantissa_bit_width=m,
            weight_exponent_bias=2 ** (e - 1) - 1,
        )  # fmt: skip
        other.weight.data.copy_(layer.weight.detach())
        weights[name] = other.quant_weight().value.detach()
    inner = float(torch.tensor([m.weight.shape[1] for m in linear_layers(model).values()]).float().mean())
    return weights, 1 + e + m + 32 / inner


PEERS: dict[str, Callable[..., tuple[Weights, float]]] = {
    "torchao": torchao,
    "bitsandbytes": bitsandbytes,
    "llm-compressor": llm_compressor,
    "brevitas": brevitas,
}


def ask(
    peer: str, model: nn.Module, inputs: list[Any], folder: str, extra: list[str], **knobs: Any
) -> tuple[Weights, float] | str:
    """Run the peer in a process of its own; what it gave, or why it gave nothing."""
    with tempfile.TemporaryDirectory() as place:
        given, taken = Path(place) / "given.pt", Path(place) / "taken.pt"
        torch.save({"model": model, "inputs": inputs, "folder": folder, "peer": peer, "knobs": knobs}, given)
        paths = [*extra, *sys.path[1:], os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "HF_HUB_OFFLINE": "1"}
        run = subprocess.run(
            [sys.executable, __file__, "--worker", str(given), str(taken)],
            capture_output=True,
            text=True,
            env=environment,
        )
        if run.returncode:
            last = [x for x in run.stderr.strip().splitlines() if x.strip()][-1:] or ["it wrote nothing"]
            return last[0][:160]
        result = torch.load(taken, weights_only=True)
    return result["weights"], float(result["bits"])


def worker(given: str, taken: str) -> None:
    """The peer's process."""
    told = torch.load(given, weights_only=False)
    weights, bits = PEERS[told["peer"]](told["model"], told["inputs"], told["folder"], **told["knobs"])
    torch.save({"weights": {n: w.detach().float().cpu() for n, w in weights.items()}, "bits": bits}, taken)


# --- what is judged ---------------------------------------------------------------------------------------------------


def language(windows: int, limit: int) -> tuple[nn.Module, list[Any], str, Callable[[nn.Module], float]]:
    """The embedded model, calibration windows of training files, and bits per byte of held-out files (less is
    better)."""
    from hasten.language import load
    from hasten.language.corpus import documents
    from hasten.language.loading import model_folder
    from hasten.language.pycode import MARKS, held_out
    from hasten.train import bits_per_byte

    loaded = load("pycode-4m")
    model = copy.deepcopy(loaded.decoder).float().eval()
    from tokenizers import Tokenizer

    folder = str(model_folder("pycode-4m"))
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    docs = documents()
    ids, size = held_out(tokenizer, docs, "test", limit=limit)
    text = [e.ids for e in tokenizer.encode_batch([d.text for d in docs if d.split == "train" and d.library])]
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(0)).tolist()
    stream = [t for i in order for t in [MARKS.end, *text[i]]][: windows * _WINDOW]
    inputs = list(torch.tensor(stream).view(-1, _WINDOW).split(8))

    def score(small: nn.Module) -> float:
        with torch.inference_mode():
            return bits_per_byte(small, ids, size, start=MARKS.end)

    return model, inputs, folder, score


def _train(x: Tensor, y: Tensor, *, epochs: int, checkpoint: Path) -> dict[str, Tensor]:
    """Weights of the transformer."""
    from hasten.studies._vision_models import VisionTransformer, train

    torch.manual_seed(0)
    return train(VisionTransformer(x.shape[-1], 2, 64, 2, 4), x, y, epochs=epochs).state_dict()


def vision(data: Path | None) -> tuple[nn.Module, list[Any], str, Callable[[nn.Module], float]]:
    """A trained vision transformer and its cross-entropy on held-out images (less is better).

    Not the share of wrong answers: of some thousand images its standard error is ten times what the formats differ by.
    """
    from hasten.spiking.checkpoint import trained
    from hasten.studies import Scale
    from hasten.studies import _quantization as part
    from hasten.studies._vision_models import VisionTransformer, classify

    scale = Scale(data=data)
    images = part.fashion(scale) or part.digits_of(scale)
    assert images is not None, "give --data, or install scikit-learn"
    model = VisionTransformer(images[0].shape[-1], 2, 64, 2, 4)  # widths that every peer's groups divide
    state = trained("benchmark-transformer", _train, {"epochs": 5}, {"x": images[0], "y": images[1]})
    model.load_state_dict(state)
    held = list(zip(images[2].split(500), images[3].split(500), strict=True))

    def score(small: nn.Module) -> float:
        with torch.inference_mode():
            return sum(float(classify(small, b)) * len(b[1]) for b in held) / len(images[3])

    return model, part.batches(images, 512), "", score


class Reordered(nn.Module):
    """A linear layer that reads its inputs in another order; the same function."""

    def __init__(self, layer: nn.Linear, order: Tensor) -> None:
        super().__init__()
        self.register_buffer("order", order)
        self.linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.linear.weight = nn.Parameter(layer.weight.detach()[:, order], requires_grad=False)
        self.linear.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """-> what the layer gives."""
        result: Tensor = self.linear(x[..., self.order])
        return result


def reordered(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """The same function, the inputs of each linear layer in an order that is drawn.

    Which inputs share a scale depends on the order, and with it every rounding. A single rounding of a small model is
    worth little: its loss differs from order to order by more than formats differ. The mean over orders is what a way
    of rounding costs.
    """
    clone = copy.deepcopy(model)
    for name, layer in linear_layers(clone).items():
        order = torch.randperm(layer.in_features, generator=generator)
        parent, _, leaf = name.rpartition(".")
        setattr(clone.get_submodule(parent), leaf, Reordered(layer, order))
    return clone.eval()


def in_many_orders(
    what: str, model: nn.Module, inputs: list[Any], score: Callable[[nn.Module], float], orders: int, extra: list[str]
) -> list[Row]:
    """int4 in groups of 32 with a zero point, the mean over orders of the inputs, for ways of ours and torchao."""
    generator = torch.Generator().manual_seed(0)
    every = [reordered(model, generator) for _ in range(orders)]
    fmt = Int(4, PerGroup(1, 32), symmetric=False, observer=Mse())
    ways: dict[str, tuple[Any, ...]] = {
        "nearest, no data": (), "nearest, ranges fitted to data": (FitRanges(),), "GPTQ": (Gptq(),)
    }  # fmt: skip
    reply = ask("torchao", nn.ModuleList(every), [], "", extra, bits=4, group=32, affine=True)
    theirs: Tensor | None = None
    if not isinstance(reply, str):
        parts: list[Weights] = [{} for _ in every]
        for path, weight in reply[0].items():
            number, _, name = path.partition(".")
            parts[int(number)][name] = weight
        scores = [score(with_weights(m, w)) for m, w in zip(every, parts, strict=True)]
        theirs = torch.tensor(scores, dtype=torch.float64)
    rows = []
    for way, steps in ways.items():
        scores = [score(with_weights(m, ours(m, fmt, inputs, steps)[0])) for m in every]
        mine = torch.tensor(scores, dtype=torch.float64)
        name = f"{what}: int4 g32, {way}, mean of {orders} orders of inputs"
        if theirs is None:
            rows.append(Row(name, "torchao", ours=float(mine.mean()), note=f"not here: {reply}"))
            continue
        apart = mine - theirs
        half = 2.13 * float(apart.std()) / orders**0.5  # Student's t for 16
        note = f"ours - theirs {float(apart.mean()):+.5f} ± {half:.5f}; spread {mine.std():.4f} and {theirs.std():.4f}"
        rows.append(
            Row(name, "torchao", float(mine.mean()), float(theirs.mean()), "", float(theirs.mean() / mine.mean()),
                at_least=0.999, note=note)
        )  # fmt: skip
    return rows


def pairs(quick: bool) -> list[tuple[str, Format, tuple[Any, ...], str, dict[str, Any]]]:
    """(what, our format, our steps, peer, its knobs), at no more bits than the peer."""
    int4 = Int(4, PerGroup(1, 32), symmetric=False, observer=Mse())
    preset = SCHEMES["W4A16"][0]  # with GPTQ: what hasten compress does by default where there is text
    int3 = Int(3, PerGroup(1, 32), symmetric=False, observer=Mse())
    found: list[tuple[str, Format, tuple[Any, ...], str, dict[str, Any]]] = [
        ("int8 per channel, nearest", Int(8, PerChannel(0)), (), "torchao", {"bits": 8, "group": 0, "affine": False}),
        ("int4 g32, nearest, no data", int4, (), "torchao", {"bits": 4, "group": 32, "affine": True}),
        ("int4 g32, nearest, ranges fitted to data", int4, (FitRanges(),), "torchao",
         {"bits": 4, "group": 32, "affine": True}),
        ("int4 g32, ours with GPTQ", int4, (Gptq(),), "torchao", {"bits": 4, "group": 32, "affine": True}),
        ("int3 g32, ours with GPTQ", int3, (Gptq(),), "torchao", {"bits": 3, "group": 32, "affine": True}),
        ("nf4 g64, nearest, no data", NF4, (), "bitsandbytes", {}),
        ("nf4 g64, nearest, ranges fitted to data", NF4, (FitRanges(),), "bitsandbytes", {}),
        ("e2m1 per channel, nearest", MiniFloat(2, 1).per_channel(), (), "brevitas", {"e": 2, "m": 1}),
        ("nf4 g64, ours with GPTQ", NF4, (Gptq(),), "bitsandbytes", {}),
        ("int4 g32 symmetric, both GPTQ (W4A16 --data)", preset, (Gptq(),), "llm-compressor", {"group": 32}),
    ]  # fmt: skip
    return [row for row in found if not quick or not ("int3" in row[0] or "nf4 g64, ours" in row[0])]


def main() -> None:
    """Rows for both models; a JSON file where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of public data sets (Fashion-MNIST)")
    parser.add_argument("--peers", action="append", default=[], help="a folder with peers' packages; may be repeated")
    parser.add_argument("--quick", action="store_true", help="fewer rows and less text")
    parser.add_argument("--orders", type=int, default=16, help="orders of inputs over which int4 is averaged; 0: none")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    parser.add_argument("--worker", nargs=2, metavar=("GIVEN", "TAKEN"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(*options.worker)
        return
    rows: list[Row] = []
    told = Console(stderr=True)
    setups = {
        "pycode-4m, bits per byte": language(16 if options.quick else 64, 30_000 if options.quick else 120_000),
        "vision transformer, cross-entropy": vision(options.data),
    }
    for what, (model, inputs, folder, score) in setups.items():
        whole = score(model)
        rows.append(Row(f"{what}: float32", ours=whole, note="the model as it is"))
        asked: dict[str, tuple[Weights, float] | str] = {}
        for name, fmt, steps, peer, knobs in pairs(options.quick):
            told.print(f"{what}: {name}, {peer}")
            if peer == "llm-compressor" and not folder:
                continue
            weights, bits = ours(model, fmt, inputs, steps)
            mine = score(with_weights(model, weights))
            key = json.dumps([peer, knobs])
            if key not in asked:
                asked[key] = ask(peer, model, inputs, folder, options.peers, **knobs)
            reply = asked[key]
            if isinstance(reply, str):
                rows.append(Row(f"{what}: {name}", peer, ours=mine, note=f"not here: {reply}"))
                continue
            theirs = score(with_weights(model, reply[0]))
            note = f"{bits:.2f} against {reply[1]:.2f} bits"
            rows.append(Row(f"{what}: {name}", peer, mine, theirs, "", theirs / mine, at_least=0.999, note=note))
        if options.orders and what.startswith("vision"):
            told.print(f"{what}: other orders of inputs")
            rows += in_many_orders(what, model, inputs, score, options.orders, options.peers)
    show(rows)
    if options.output:
        write_text(
            options.output, json.dumps({"machine": Machine.detect().to_json(), "rows": [asdict(r) for r in rows]})
        )


def show(rows: list[Row]) -> None:
    """The table."""
    table = Table("what", "peer", "ours", "theirs", "theirs / ours", "bits or reason", "verdict")
    for r in rows:
        cells = ["" if v is None else f"{v:.4f}" for v in (r.ours, r.theirs, r.score)]
        table.add_row(r.what, r.peer, *cells, r.note, r.verdict if r.score is not None else "")
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
