"""Tiny Gemma 3 models with random weights, made by transformers, whose Gemma is the oracle; and the same as a GGUF file.

Weights are scaled up from transformers' own beginning, so that attention is peaked and norms differ from 1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from safetensors.numpy import load_file

from support.tiny_models import make_tiny_tokenizer

WINDOW = 24
_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers.": "blk.",
}


def make_tiny_gemma(path: Path, seed: int = 0, *, layers: int = 7, kv_heads: int = 1, dtype: torch.dtype = torch.float32) -> Path:
    """Writes config, weights and tokenizer into the folder `path`; its sixth layer sees all, the others `WINDOW` tokens."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        num_hidden_layers=layers,
        hidden_size=48,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=16,
        query_pre_attn_scalar=16,
        intermediate_size=96,
        vocab_size=384,
        max_position_embeddings=2048,
        sliding_window=WINDOW,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = Gemma3ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * (0.25 if "embed" in name else 2.0 / parameter.shape[-1] ** 0.5))
    model.to(dtype).save_pretrained(path)
    make_tiny_tokenizer(384).save(str(path / "tokenizer.json"))
    return path


def make_tiny_gemma_gguf(folder: Path, path: Path, *, settings: dict[str, Any] | None = None) -> Path:
    """In the layout of llama.cpp's converter: norms with their 1, no transposed rows."""
    config = json.loads((folder / "config.json").read_text())
    writer = GGUFWriter(path, "gemma3")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_sliding_window(config["sliding_window"])
    for key, value in (settings or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith("norm.weight"):
            tensor = tensor + np.float32(1)
        for ours, theirs in _GGUF_NAMES.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gemma_oracle(folder: Path) -> torch.nn.Module:
    from transformers import Gemma3ForCausalLM

    return Gemma3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
