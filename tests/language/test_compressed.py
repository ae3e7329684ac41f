"""Folders with codes: what is written is read back to the last bit, and the runtime runs the codes themselves."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hasten.compress.quantize import Gptq, Int, PerChannel, PerGroup, Quantize
from hasten.compress.quantize.layers import QuantizedLayer
from hasten.errors import DataError, ModelLoadError, UnsupportedModelError
from hasten.language import RaggedBatch, load
from hasten.language.codes import joined
from hasten.language.compressed import CompressedReader, is_compressed, write
from hasten.language.config import DecoderConfig
from hasten.language.loading import random_model

CONFIG = DecoderConfig(
    vocab_size=96, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=96,
    max_position_embeddings=64,
)  # fmt: skip
IDS = torch.randint(0, 96, (1, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A plain folder and its decoder."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    folder.mkdir()
    decoder = random_model(CONFIG, weights=torch.float32).decoder
    (folder / "config.json").write_text(
        json.dumps(CONFIG.to_huggingface() | {"dtype": "float32", "torch_dtype": "float32"})
    )
    save_file({k: v.contiguous() for k, v in decoder.state_dict().items()}, folder / "model.safetensors")
    return folder, decoder


def written(source, technique, tmp_path, calibration=None):
    folder, decoder = source
    small = technique(decoder, calibration)
    settings = write(small, folder, tmp_path / "small")
    return small, load(tmp_path / "small", dtype="auto"), settings


@pytest.mark.parametrize("scheme", ["W8A8", "W8A16", "W4A16", "FP8_DYNAMIC", "NF4", "W3A16", "MXFP4A16"])
def test_every_scheme_comes_back(scheme, source, tmp_path):
    small, again, settings = written(source, Quantize.scheme(scheme, skip=("lm_head",), real="never"), tmp_path)
    ours = scheme in ("NF4", "W3A16", "MXFP4A16")
    assert settings["quant_method"] == ("hasten" if ours else "compressed-tensors")
    stored = {p: m.quantized() for p, m in small.named_modules() if isinstance(m, QuantizedLayer)}
    assert len(stored) == 14
    with CompressedReader(again.folder, CONFIG) as reader:
        for path, quantized in stored.items():
            found = reader.codes(f"{path}.weight", quantized.shape)
            assert torch.equal(found.dequantize(), quantized.dequantize())
        with pytest.raises(ModelLoadError, match="config.json asks"):
            reader.codes("model.layers.0.self_attn.q_proj.weight", (64, 32))
    with torch.no_grad():
        expected = small(IDS)[0]
    executor = again.executor
    logits = executor.step(RaggedBatch.build([(IDS[0].tolist(), 0, [0, 1])], logits="all"), executor.new_cache(2, 16))
    assert float((logits - expected).norm() / expected.norm()) < 0.03
    assert json.loads((again.folder / "config.json").read_text())["quantization_config"]
    assert (again.folder / "recipe.yaml").is_file()


def test_the_runtime_holds_the_codes(source, tmp_path):
    technique = Quantize(Int(4, PerGroup(1, 32)), skip=("lm_head",), steps=[Gptq()], real="never")
    _, again, _ = written(source, technique, tmp_path, [IDS])
    plain = load(source[0], dtype="bf16").executor
    assert again.executor.weight_bytes < 0.62 * plain.weight_bytes  # the output matrix keeps 8 bits
    assert load(again.folder, dtype="bf16").executor.weight_bytes == plain.weight_bytes
    packed = again.executor._layers[0].feed_forward.down.packed
    if packed is not None:
        from hasten.nn.product import int4

        with CompressedReader(again.folder, CONFIG) as reader:
            stored = reader.codes("model.layers.0.mlp.down_proj.weight", (64, 96)).dequantize()
        assert packed[0] == "int4"
        np.testing.assert_array_equal(int4.unpack(packed[1], 64, 96), stored.numpy())


def test_layers_may_differ_and_transformers_names_them(source, tmp_path):
    technique = Quantize(
        Int(4, PerGroup(1, 32)), overrides=(("*down_proj", Int(8, PerChannel(0))),), skip=("lm_head", "*.q_proj"),
        real="never",
    )  # fmt: skip
    _, again, settings = written(source, technique, tmp_path)
    targets = [e["targets"] for e in settings["config_groups"].values()]
    assert sorted(map(len, targets)) == [2, 10]
    assert "model.layers.0.self_attn.q_proj" in settings["ignore"]
    kinds = load_file(again.folder / "model.safetensors")
    assert kinds["model.layers.0.mlp.down_proj.weight_packed"].shape == (64, 24)
    assert kinds["model.layers.0.mlp.up_proj.weight_packed"].shape == (96, 8)
    assert again.executor.step(RaggedBatch.build([([1, 2], 0, [0])]), again.executor.new_cache(1)).shape == (1, 96)


def greedy(executor, prompt, count):
    """The likeliest tokens one after the other."""
    cache, tokens = executor.new_cache(2, 16), list(prompt)
    done = 0
    while len(tokens) < len(prompt) + count:
        logits = executor.step(RaggedBatch.build([(tokens[done:], done, [0, 1])]), cache)
        done = len(tokens)
        tokens.append(int(logits[0].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("scheme", ["W4A16", "W8A16"])
def test_transformers_reads_it(scheme, source, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    pytest.importorskip("loguru")
    small, again, _ = written(source, Quantize.scheme(scheme, skip=("lm_head",), real="never"), tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(again.folder, dtype=torch.float32).eval()
    prompt = IDS[0, :7].tolist()
    free = transformers.GenerationConfig(max_new_tokens=16, do_sample=False, pad_token_id=0)  # no token ends the text
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, small(IDS), atol=1e-4, rtol=1e-4)
        given = torch.tensor([prompt])
        whole = model.generate(given, attention_mask=torch.ones_like(given), generation_config=free)[0].tolist()
        theirs = model(torch.tensor([whole])).logits[0]
    assert whole[:7] == prompt
    assert len(whole) == 7 + 16
    assert len(set(whole[7:])) > 4  # one token over and over would say little
    first, second = theirs[6:-1].topk(2).values.unbind(1)
    # plain weights (a code times its scale is kept in bfloat16) and the codes themselves, in the runtime
    for dtype, allowed in (("fp32", 2e-3), ("auto", 0.03)):
        lm = load(again.folder, dtype=dtype)
        mine = lm.executor.step(RaggedBatch.build([(whole, 0, [0, 1])], logits="all"), lm.executor.new_cache(2, 16))
        gap = mine - theirs
        assert float(gap.norm() / theirs.norm()) < allowed
        clear = first - second > 2 * gap[6:-1].abs().amax(1)  # rounding cannot decide there
        assert int(clear.sum()) >= 4
        assert torch.equal(mine[6:-1].argmax(1)[clear], torch.tensor(whole[7:])[clear])
        sure = [*clear.tolist(), False].index(False)
        assert greedy(lm.executor, prompt, sure) == whole[7 : 7 + sure]
        assert sure >= 4 or dtype == "auto"


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "FP8"])
def test_transformers_reads_fp8_with_its_inputs(scheme, source, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    pytest.importorskip("loguru")
    technique = Quantize.scheme(scheme, skip=("lm_head",), real="never")
    small, again, settings = written(source, technique, tmp_path, [IDS])
    inputs = settings["config_groups"]["group_0"]["input_activations"]
    assert settings["format"] == "float-quantized"
    assert (inputs["strategy"], inputs["dynamic"]) == (("tensor", False) if scheme == "FP8" else ("token", True))
    tensors = load_file(again.folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    assert tensors[f"{name}.weight"].dtype == torch.float8_e4m3fn
    assert (f"{name}.input_scale" in tensors) is (scheme == "FP8")
    model = transformers.AutoModelForCausalLM.from_pretrained(again.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs, mine = model(IDS).logits, small(IDS)
        exact = source[1](IDS)
    # Their inputs are rounded too, or are left where the library decompresses for good: no further away than that.
    assert float((theirs - mine).norm() / mine.norm()) < 1.1 * float((mine - exact).norm() / exact.norm())
    read = dict(model.named_modules())[name].weight
    assert torch.allclose(read.float(), small.get_submodule(name).quantized().dequantize(), rtol=1e-6, atol=0)


def test_damaged_fp8_is_one_line(source, tmp_path):
    _, again, _ = written(source, Quantize.scheme("FP8_DYNAMIC", skip=("lm_head",), real="never"), tmp_path)
    tensors = load_file(again.folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    spoilt = tensors[name].view(torch.uint8).clone()
    spoilt[3, 4] = 0x7F
    for change, match in (
        ({name: spoilt.view(torch.float8_e4m3fn)}, "not finite"),
        ({f"{name}_scale": torch.ones(7, 1)}, "7 scales for 96 outputs"),
    ):
        save_file(tensors | change, again.folder / "model.safetensors")
        with pytest.raises(ModelLoadError, match=match):
            _ = load(again.folder).executor


def test_damage_and_mistakes_are_one_line(source, tmp_path):
    _, again, _ = written(source, Quantize.scheme("W4A16", skip=("lm_head",), real="never"), tmp_path)
    with pytest.raises(DataError, match="exists already"):
        write(source[1], source[0], again.folder)
    tensors = load_file(again.folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight_"
    save_file(tensors | {name + "zero_point": torch.zeros(1)}, again.folder / "model.safetensors")
    with pytest.raises(ModelLoadError, match="zero points"):
        _ = load(again.folder).executor
    tensors.pop(name + "scale")
    save_file(tensors, again.folder / "model.safetensors")
    with pytest.raises(ModelLoadError, match="up_proj"):
        _ = load(again.folder).executor
    config = json.loads((again.folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "gptq"
    (again.folder / "config.json").write_text(json.dumps(config))
    assert not is_compressed(again.folder)
    with pytest.raises(UnsupportedModelError, match="gptq"):
        load(again.folder)


def test_matrices_of_one_format_stay_codes_together():
    one, two = (Int(4, PerGroup(1, 32)).quantize(torch.randn(8, 64)) for _ in range(2))
    both = joined([one, two])
    assert torch.equal(both.dequantize(), torch.cat([one.dequantize(), two.dequantize()]))
    mixed = joined([one, Int(8, PerChannel(0)).quantize(torch.randn(8, 64)), torch.randn(8, 64)])
    assert isinstance(mixed, torch.Tensor)
    assert mixed.shape == (24, 64)
