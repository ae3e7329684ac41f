"""Writes the model of the speed benchmarks: a Llama of 245 M parameters with random weights.

One folder that transformers and hasten load (config.json, bf16 safetensors, a tokenizer of dummy words), and for
llama.cpp the same weights as GGUF: f16 written here, q8_0 and q4_0 made from it by llama.cpp's own quantiser with its
own default recipe. llama.cpp rotates neighbouring entries where the folder rotates halves, so rows of the query and key
matrices change places on the way.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from harness import MODEL

from hasten.language.config import PRESETS, DecoderConfig

QUANTISED = ("q8_0", "q4_0")
_FILE_TYPES = {"q8_0": 7, "q4_0": 2}  # llama_ftype of llama.h


def tiny(config: DecoderConfig) -> DecoderConfig:
    """A model of the same kind that is quick to try the scripts with."""
    return replace(config, hidden_size=256, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=512)


def gguf_path(folder: Path, kind: str) -> Path:
    """The GGUF file that belongs to a model folder."""
    return folder.with_name(f"{folder.name}.{kind}.gguf")


def words(size: int) -> list[str]:
    """A vocabulary: three marks, 256 bytes, then numbered words."""
    return ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *(f"▁w{i}" for i in range(259, size))]


def write_folder(config: DecoderConfig, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Write the Hugging Face folder; returns the tensors by name."""
    from safetensors.torch import save_file

    from hasten.language import random_model

    folder.mkdir(parents=True, exist_ok=True)
    state = random_model(config, seed=seed).decoder.state_dict()
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    temporary = folder / "model.safetensors.part"
    save_file(tensors, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / "model.safetensors")
    names = words(config.vocab_size)
    added = [
        {"id": i, "content": names[i], "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i in range(3)
    ]
    replaced = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [replaced, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "byte_fallback": True,
            "vocab": {w: i for i, w in enumerate(names)},
            "merges": [],
        },
    }
    documents: dict[str, Any] = {
        "config.json": config.to_huggingface(),
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
        },
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    return tensors


_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def gguf_tensor(name: str, tensor: Any, config: DecoderConfig) -> tuple[str, np.ndarray]:
    """Name and values of one tensor in a GGUF file."""
    values = tensor.float().numpy()
    stem = name.removesuffix(".weight")
    heads = {"self_attn.q_proj": config.num_heads, "self_attn.k_proj": config.num_kv_heads}
    if not stem.startswith("model.layers."):
        return f"{_NAMES[stem]}.weight", values.astype(np.float32 if values.ndim == 1 else np.float16)
    _, _, layer, kind = stem.split(".", 3)
    if kind in heads:  # (heads, 2, half) -> (heads, half, 2): halves become neighbours
        count = heads[kind]
        values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
    return f"blk.{layer}.{_NAMES[kind]}.weight", values.astype(np.float32 if values.ndim == 1 else np.float16)


def write_gguf(config: DecoderConfig, tensors: dict[str, Any], path: Path) -> None:
    """Write the f16 file for llama.cpp; needs the package ``gguf``."""
    import gguf

    temporary = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(temporary, "llama")
    writer.add_name(path.stem)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    names = words(config.vocab_size)
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list(names)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(259, len(names))])
    writer.add_token_types(
        [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256, *[kinds.NORMAL] * (len(names) - 259)]
    )
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    for name, tensor in tensors.items():
        writer.add_tensor(*gguf_tensor(name, tensor, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(temporary, path)


def quantise(source: Path, path: Path, kind: str, threads: int) -> None:
    """Let llama.cpp make ``path`` from the f16 file."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = _FILE_TYPES[kind]
    params.nthread = threads
    temporary = path.with_name(path.name + ".part")
    status = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(temporary), params)
    if status:
        raise SystemExit(f"llama.cpp could not quantise {source} to {kind} (status {status})")
    os.replace(temporary, path)


def write(folder: Path, config: DecoderConfig, seed: int = 0, threads: int = 2) -> None:
    """Write everything that the installed packages allow; says what it wrote and what it could not."""
    tensors = write_folder(config, folder, seed)
    count = sum(t.numel() for t in tensors.values())
    print(f"{folder}: {count / 1e6:.1f} M parameters, bf16")
    if find_spec("gguf") is None:
        print("no GGUF: the package gguf is not installed")
        return
    source = gguf_path(folder, "f16")
    write_gguf(config, tensors, source)
    print(f"{source}: {source.stat().st_size / 2**20:.0f} MiB")
    if find_spec("llama_cpp") is None:
        print(
            f"no {' and '.join(QUANTISED)}: the package llama-cpp-python, whose quantiser makes them, is not installed"
        )
        return
    for kind in QUANTISED:
        path = gguf_path(folder, kind)
        quantise(source, path, kind, threads)
        print(f"{path}: {path.stat().st_size / 2**20:.0f} MiB")


def ensure(folder: Path, threads: int = 2) -> None:
    """Write the model if it is not there, or if a peer's files are missing that could be made."""
    wanted = [folder / "config.json"]
    if find_spec("gguf") is not None:
        wanted.append(gguf_path(folder, "f16"))
        if find_spec("llama_cpp") is not None:
            wanted += [gguf_path(folder, kind) for kind in QUANTISED]
    if all(path.is_file() for path in wanted):
        return
    if folder != MODEL and wanted[0].is_file():
        raise SystemExit(f"{folder} lacks files of the peers; write it anew with random_model.py --out {folder}")
    write(folder, PRESETS["random-245m"], threads=threads)


def main() -> None:
    """Write the model and its GGUF files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=MODEL, help=f"folder to write (default {MODEL})")
    parser.add_argument("--tiny", action="store_true", help="two narrow layers, to try the scripts with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    config = PRESETS["random-245m"]
    if options.tiny:
        config = tiny(config)
    write(options.out, config, options.seed, options.threads)


if __name__ == "__main__":
    main()
