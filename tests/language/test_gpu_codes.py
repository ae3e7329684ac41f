"""Compressed language models on a GPU: there where there is one, else its kernels run under Triton's interpreter."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from hasten.compress.device_codes import opened
from hasten.compress.kernels_cuda import lay_out_at, product
from hasten.compress.quantize import Quantize
from hasten.compress.quantize.base import Quantized
from hasten.compress.quantize.device import packed_of, readable
from hasten.errors import ConfigurationError, MissingExtraError
from hasten.language import executor as executors
from hasten.language import kernels_triton, load
from hasten.language import linear as linears
from hasten.language.codes import moved
from hasten.language.compressed import CompressedReader, write
from hasten.language.config import DecoderConfig
from hasten.language.gpu import GpuSteps
from hasten.language.linear import PackedLinear, pack
from hasten.language.loading import random_model
from hasten.language.ragged import RaggedBatch

if not kernels_triton.available():
    pytest.skip("Triton is not installed", allow_module_level=True)

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
CONFIG = DecoderConfig(
    vocab_size=96, hidden_size=64, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=96,
    max_position_embeddings=128,
)  # fmt: skip
IDS = torch.randint(0, 96, (20,), generator=torch.Generator().manual_seed(0)).tolist()
SCHEMES = ("W8A16", "W4A16", "FP8_DYNAMIC", "W3A16", "NF4")
ROUNDED = {"int8": 0.04, "int4": 0.03, "fp8": 0.12, "FP8_DYNAMIC": 0.12}
"""relative error of logits where kernels may round activations as well (a GPU measures which are quicker)"""


def as_on_a_gpu(weight, precision, *, bias=None, deterministic=False, rounds=None):
    """What :func:`pack` does with a tensor of a GPU."""
    rounds = not isinstance(weight, Quantized) if rounds is None else rounds
    if isinstance(weight, Quantized):
        found = packed_of(weight)
        if found is None:
            return as_on_a_gpu(weight.dequantize(), "fp32", bias=bias)
        precision, packed = found
    elif precision in ("int8", "int4", "fp8"):
        packed = lay_out_at(weight, precision)
    else:
        weight = weight.float()
        return PackedLinear(
            lambda x: torch.nn.functional.linear(x, weight, bias), *weight.shape[::-1], 4 * weight.numel()
        )
    run, size = product(packed, precision, bias, rounds=rounds)
    return PackedLinear(run, packed.shape[1], packed.shape[0], size)


@pytest.fixture
def gpu(monkeypatch):
    """Makes an executor that runs the GPU's operations, of a model or a folder."""

    def make(given, dtype="auto"):
        if CUDA:
            if isinstance(given, DecoderConfig):
                return random_model(given, dtype=dtype, weights=torch.float32, device="cuda").executor
            return load(given, dtype=dtype, device="cuda").executor
        with monkeypatch.context() as patched:
            patched.setattr(executors, "_operations_of", lambda device: kernels_triton)
            patched.setattr(executors, "pack", as_on_a_gpu)
            patched.setattr(executors.Executor, "_runs_bytes", lambda self, matrix: True)
            patched.setattr(executors.Executor, "_embedding", lambda self, weight: lambda t: weight[t].float())
            # the interpreter takes bfloat16 for integers, so activations are float32
            patched.setattr(executors, "best_precision", lambda device: "fp32")
            if isinstance(given, DecoderConfig):
                made = random_model(given, dtype=dtype, weights=torch.float32).executor
            else:
                made = load(given, dtype=dtype).executor
            made.dtype = torch.float32
            made._stack = None
            made._gpu = GpuSteps(made)
        return made

    return make


def logits_of(executor, ids=IDS):
    cache = executor.new_cache(4, 16)
    first = executor.step(RaggedBatch.build([(ids[:-2], 0, [2, 0, 1])], logits="all"), cache)
    more = [
        executor.step(RaggedBatch.build([([t], len(ids) - 2 + i, [2, 0, 1])]), cache) for i, t in enumerate(ids[-2:])
    ]
    return torch.cat([first, *more]).float().cpu()


def far(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "model"
    folder.mkdir()
    decoder = random_model(CONFIG, weights=torch.float32).decoder
    (folder / "config.json").write_text(
        json.dumps(CONFIG.to_huggingface() | {"dtype": "float32", "torch_dtype": "float32"})
    )
    save_file({k: v.contiguous() for k, v in decoder.state_dict().items()}, folder / "model.safetensors")
    return folder, decoder


@pytest.mark.parametrize("precision", ["int8", "int4", "fp8"])
def test_a_plain_model_at_fewer_bits(precision, gpu):
    """As the decoder with the weights that the codes stand for."""
    executor = gpu(CONFIG, precision)
    decoder = random_model(CONFIG, weights=torch.float32).decoder
    state = {n: t.detach().clone() for n, t in decoder.state_dict().items()}
    for name, tensor in decoder.state_dict().items():
        if name.endswith("_proj.weight"):
            tensor.copy_(opened(lay_out_at(state[name], precision)))
    with torch.no_grad():
        expected = decoder(torch.tensor([IDS]))[0]
    found = logits_of(executor)
    assert far(found, expected) < ROUNDED[precision]
    plain = random_model(CONFIG, weights=torch.float32, dtype="bf16").executor
    layers = executor.weight_bytes - executor._head.num_bytes
    wanted = {"int8": 0.6, "fp8": 0.6, "int4": 0.45}[precision]
    assert layers < wanted * (plain.weight_bytes - plain._head.num_bytes)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_folders_run_as_they_are_stored(scheme, source, gpu, tmp_path, caplog):
    folder, decoder = source
    small = Quantize.scheme(scheme, skip=("lm_head",), real="never")(decoder)
    write(small, folder, tmp_path / "small")
    with caplog.at_level(logging.WARNING, "hasten.language"):
        executor = gpu(tmp_path / "small")
    with torch.no_grad():
        expected = replace_inputs(small)(torch.tensor([IDS]))[0]
    assert far(logits_of(executor), expected) < ROUNDED.get(scheme, 0.03)
    size = executor._layers[0].feed_forward.down.num_bytes
    if scheme == "NF4":
        assert size >= 2 * 64 * 96
        if CUDA:
            assert caplog.text.count("no kernel") == 1, "one line for all matrices of a format"
    else:
        assert size < 64 * 96 * 1.6
        assert "no kernel" not in caplog.text


def replace_inputs(small):
    """The codes alone: a GPU reads activations as they are."""
    for module in small.modules():
        if getattr(module, "activation", None) is not None:
            module.activation = None
    return small


@pytest.mark.skipif(not CUDA, reason="graphs need a GPU")
@pytest.mark.parametrize("precision", ["int8", "int4", "fp8"])
def test_graphs_replay_codes(precision, gpu):
    executor = gpu(replace(CONFIG, num_layers=3), precision)
    cache, plain = executor.new_cache(80, 8), executor.new_cache(80, 8)
    for half in (cache.keys, cache.values, plain.keys, plain.values):
        half.normal_(generator=torch.Generator("cuda").manual_seed(5))
    for count in (1, 3, 17, 40, 1):
        chunks = [([IDS[i % 20]], 7 * i % 16, [2 * i, 2 * i + 1]) for i in range(count)]
        batch = RaggedBatch.build(chunks)
        replayed = executor.step(batch, cache)
        executor._gpu.captures = False
        launched = executor.step(batch, plain)
        executor._gpu.captures = True
        # padding may take other kernels
        assert far(replayed, launched) < max(0.02, ROUNDED[precision])
        for half, other in ((cache.keys, plain.keys), (cache.values, plain.values)):
            if precision == "int4":
                torch.testing.assert_close(half.float(), other.float(), atol=0.06, rtol=0.06)
            assert far(half.float(), other.float()) < ROUNDED[precision]


@pytest.mark.skipif(not CUDA, reason="compares a GPU with the CPU")
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_embedded_model_says_the_same_as_on_the_cpu(precision):
    """Where rounding cannot decide, the likeliest token is the same."""
    on_gpu, on_cpu = (load("pycode-4m", dtype=precision, device=d) for d in ("cuda", "cpu"))
    ids = on_cpu.tokenizer.encode("def add(left, right):\n    return left + right\n\n\ndef mul(")
    mine, theirs = logits_of(on_gpu.executor, ids), logits_of(on_cpu.executor, ids)
    assert far(mine, theirs) < 0.1
    first, second = theirs.topk(2).values.unbind(1)
    clear = first - second > 2 * (mine - theirs).abs().amax(1)
    assert int(clear.sum()) >= 5
    assert torch.equal(mine.argmax(1)[clear], theirs.argmax(1)[clear])


@pytest.mark.parametrize(("scheme", "expected"), [("W8A8", True), ("FP8_DYNAMIC", True), ("W8A16", False)])
def test_folders_say_whether_inputs_are_rounded(scheme, expected, source, tmp_path):
    folder, decoder = source
    small = Quantize.scheme(scheme, skip=("lm_head",), real="never")(decoder)
    write(small, folder, tmp_path / "small")
    with CompressedReader(tmp_path / "small", CONFIG) as reader:
        assert reader.rounds_inputs is expected


def test_what_is_slower_than_bfloat16_is_said_in_a_line(gpu, caplog):
    executor = gpu(CONFIG, "int8")
    executor._times = {1: (1.0, 1.5), 512: (2.0, 1.5)}
    caplog.clear()
    with caplog.at_level(logging.WARNING, "hasten.language"):
        executor._say_what_is_slower()
        assert "against bfloat16: 1.50x with 1 rows, 0.75x with 512 rows" in caplog.text
        caplog.clear()
        executor._times = {1: (1.0, 1.5)}
        executor._say_what_is_slower()
        assert not caplog.records


def test_what_cannot_run_is_said_in_a_line(monkeypatch):
    weight = torch.randn(8, 32, device=DEVICE)
    from hasten.compress import kernels_triton as products

    monkeypatch.setattr(products, "triton", None)
    with pytest.raises(MissingExtraError, match="int8 on a GPU needs the package 'triton'"):
        lay_out_at(weight, "int8")
    with pytest.raises(ConfigurationError, match="fp8 runs on a GPU"):
        pack(torch.randn(8, 32), "fp8")
    if not CUDA:
        with pytest.raises(ConfigurationError, match="no CUDA device"):
            load("pycode-4m", device="cuda", dtype="int8")


def test_codes_move_between_devices():
    from hasten.compress.quantize import Int, PerGroup

    weight = Int(4, PerGroup(1, 32), symmetric=False).quantize(torch.randn(8, 64))
    there = moved(weight, torch.device(DEVICE))
    assert there.codes.device.type == DEVICE
    assert torch.equal(there.dequantize().cpu(), weight.dequantize())
    assert readable(there)
    assert linears.runs_as_stored(there, torch.device("cpu")) is False
