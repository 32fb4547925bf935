"""GGUF files made from tiny Hugging Face folders, by the library's writer, in the layout of llama.cpp's converter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.numpy import load_file

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
}


def make_tiny_gguf(
    folder: Path,
    path: Path,
    *,
    quantisation: GGMLQuantizationType = GGMLQuantizationType.F32,
    architecture: str = "llama",
    pre: str | None = "gpt-2",
    tokenizer_model: str = "gpt2",
    add_bos: bool = False,
    rope_factors: np.ndarray | None = None,
    drop: tuple[str, ...] = (),
    extra: dict[str, np.ndarray] | None = None,
    settings: dict[str, Any] | None = None,
    apart: dict[str, GGMLQuantizationType] | None = None,
) -> Path:
    """`folder` is one of `make_tiny_model`, float32 in one shard. Matrices are stored as `quantisation`, or as `apart` says under
    their names in the file; the rest as float32."""
    config = json.loads((folder / "config.json").read_text())
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    for key, value in (settings or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    _add_tokenizer(writer, folder, pre, tokenizer_model, add_bos)

    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in (load_file(folder / "model.safetensors") | (extra or {})).items():
        for projection, num_heads in heads.items():
            if projection in name:
                tensor = _interleaved(tensor, num_heads)
        renamed = name
        for ours, theirs in _NAMES.items():
            renamed = renamed.replace(ours, theirs)
        if renamed in drop:
            continue
        stored = (apart or {}).get(renamed, quantisation)
        if tensor.ndim == 2 and stored != GGMLQuantizationType.F32:
            writer.add_tensor(renamed, gguf.quants.quantize(tensor, stored), raw_dtype=stored)
        else:
            writer.add_tensor(renamed, tensor)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: GGUFWriter, folder: Path, pre: str | None, tokenizer_model: str, add_bos: bool) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    special = {token["content"] for token in tokenizer["added_tokens"] if token["special"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model(tokenizer_model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template(json.loads((folder / "tokenizer_config.json").read_text())["chat_template"])


def _interleaved(tensor: np.ndarray, num_heads: int) -> np.ndarray:
    """Within each head, row i of the first half is followed by row i of the second."""
    rows: list[np.ndarray] = []
    for head in np.split(tensor, num_heads):
        half = len(head) // 2
        for index in range(half):
            rows += [head[index], head[half + index]]
    return np.stack(rows)
