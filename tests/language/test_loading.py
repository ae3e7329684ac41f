"""Folders that cannot be used are named, and the embedded models are what their card says."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from hasten.errors import ConfigurationError, ModelLoadError, UnsupportedModelError
from hasten.language.config import DecoderConfig
from hasten.language.decoder import Decoder
from hasten.language.loading import EMBEDDED, load, model_folder
from hasten.language.pycode import write_folder

CONFIG = DecoderConfig(61, 16, 2, 2, 1, 8, 24, max_position_embeddings=64)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    write_folder(Decoder(CONFIG), tmp_path)
    return tmp_path


def test_round_trip(folder):
    assert load(folder).config == CONFIG
    assert load(folder).decoder(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 61)


def test_sharded_weights(folder):
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    for number, part in enumerate((names[:5], names[5:])):
        save_file({n: state[n] for n in part}, folder / f"model-{number}.safetensors")
    index = {n: f"model-{int(n not in names[:5])}.safetensors" for n in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "model.safetensors").unlink()
    assert load(folder).decoder is not None
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"model-1\.safetensors is named by the index but missing"):
        load(folder).executor  # noqa: B018


def broken(folder, change):
    path = folder / "model.safetensors"
    if change == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif change == "garbage":
        path.write_bytes(struct.pack("<Q", 1 << 40) + b"x" * 64)
    elif change == "lacks":
        state = load_file(path)
        del state["model.layers.1.mlp.up_proj.weight"]
        save_file(state, path)
    elif change == "nan":
        state = load_file(path)
        state["model.layers.0.self_attn.o_proj.weight"][0, 0] = float("nan")
        save_file(state, path)
    elif change == "shape":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 32}))
    elif change == "gone":
        path.unlink()
    elif change == "json":
        (folder / "config.json").write_text("{")
    elif change == "no config":
        (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("truncated", "corrupt or truncated"),
        ("garbage", "corrupt or truncated"),
        ("lacks", r"lack model\.layers\.1\.mlp\.up_proj\.weight"),
        ("nan", "not finite"),
        ("shape", r"has shape \(24, 16\), config\.json asks for \(32, 16\)"),
        ("gone", r"no \*\.safetensors"),
        ("json", "cannot be read as JSON"),
        ("no config", r"no config\.json"),
    ],
)
def test_bad_folders_are_named(folder, change, says):
    broken(folder, change)
    with pytest.raises(ModelLoadError, match=says) as caught:
        load(folder).executor  # noqa: B018
    assert "\n" not in str(caught.value)


def test_unknown_architecture_lists_the_known(folder):
    (folder / "config.json").write_text(json.dumps({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}))
    with pytest.raises(UnsupportedModelError, match=r"MambaForCausalLM.*LlamaForCausalLM"):
        load(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_scaling", {"type": "dynamic", "factor": 2}),
        ("hidden_act", "relu"),
        ("quantization_config", {"quant_method": "gptq"}),
    ],
)
def test_a_field_that_is_not_understood_is_refused(folder, field, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(UnsupportedModelError):
        load(folder)


def test_names_and_devices(tmp_path):
    with pytest.raises(ModelLoadError, match="pycode-4m"):
        load("no-such-model")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigurationError, match="no CUDA device"):
            load("pycode-4m", device="cuda")
    with pytest.raises(ConfigurationError, match="has 1024"):
        load("pycode-4m", context=4096)


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_models_load_in_transformers_with_equal_logits(name):
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(model_folder(name), dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder(name))
    lm = load(name, dtype="fp32")
    text = "def mean(values):\n    return sum(values) / len(values)\n"
    ids = tokenizer(text)["input_ids"]
    assert ids == lm.tokenizer.encode(text)
    with torch.no_grad():
        wanted = peer(torch.tensor([ids])).logits
        torch.testing.assert_close(lm.decoder.float()(torch.tensor([ids])), wanted, atol=1e-4, rtol=1e-4)


def test_embedded_models_are_small():
    size = sum(f.stat().st_size for name in EMBEDDED for f in model_folder(name).iterdir())
    assert size < 10 * 2**20


def test_reading_a_decoder_does_not_import_the_compiler():
    import subprocess
    import sys

    program = (
        "import sys; from hasten.language import load; load('pycode-draft-0.7m').decoder; print(sorted(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "'torch'" in ran.stdout
    assert "torch._dynamo" not in ran.stdout
