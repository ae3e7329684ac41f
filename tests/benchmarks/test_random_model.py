"""The model that everybody is measured on is one model."""

import numpy as np
import pytest

from hasten.language import load
from hasten.language.config import PRESETS

IDS = [20, 30, 40, 50, 17, 99]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from random_model import tiny, write_folder

    path = tmp_path_factory.mktemp("model") / "tiny"
    config = tiny(PRESETS["random-245m"])
    return path, config, write_folder(config, path)


def test_the_preset_has_245_million_parameters():
    config = PRESETS["random-245m"]
    width = config.num_heads * config.head_dim
    attention = 2 * config.hidden_size * width + 2 * config.hidden_size * config.num_kv_heads * config.head_dim
    layer = attention + 3 * config.hidden_size * config.intermediate_size + 2 * config.hidden_size
    whole = config.num_layers * layer + 2 * config.vocab_size * config.hidden_size + config.hidden_size
    assert 240e6 < whole < 250e6


def test_folder_loads_here_and_in_transformers_with_equal_logits(folder):
    import torch

    transformers = pytest.importorskip("transformers")
    path, _, _ = folder
    ours = load(path, dtype="fp32")
    peer = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        ids = torch.tensor([IDS])
        assert torch.allclose(ours.decoder.float()(ids), peer(ids).logits, atol=1e-4)
    assert ours.tokenizer.decode([259, 300]).strip() == "w259 w300"
    assert ours.tokenizer.decode([3 + ord("h"), 3 + ord("i")]) == "hi"


def test_gguf_rows_change_places_as_neighbouring_rotation_needs(folder):
    import torch
    from random_model import gguf_tensor

    _, config, _ = folder
    half, width = config.head_dim // 2, config.num_heads * config.head_dim
    weight = torch.arange(width, dtype=torch.float32)[:, None].expand(width, 2)
    name, values = gguf_tensor("model.layers.1.self_attn.q_proj.weight", weight, config)
    assert name == "blk.1.attn_q.weight"
    rows = values[:, 0].astype(int).tolist()
    assert rows[:4] == [0, half, 1, half + 1]
    assert sorted(rows) == list(range(width))
    assert gguf_tensor("model.norm.weight", torch.ones(4), config)[1].dtype == np.float32


def test_gguf_file_holds_the_same_model(folder):
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    from contenders import Hasten, LlamaCpp
    from decoder import deviation
    from random_model import gguf_path, write_gguf

    path, config, tensors = folder
    write_gguf(config, tensors, gguf_path(path, "f16"))
    theirs = LlamaCpp(str(gguf_path(path, "f16")), threads=1).logits(IDS)
    ours = Hasten(str(path), "fp32", threads=1).logits(IDS)
    assert deviation(theirs, ours) < 0.02
