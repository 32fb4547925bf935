"""The `config.json` by which other programs, and our loader, read a model of the Llama family. Knows no file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.engine.loader import ModelArchitecture


def llama_config(architecture: ModelArchitecture) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "num_attention_heads": architecture.num_heads,
        "num_key_value_heads": architecture.num_kv_heads,
        "head_dim": architecture.head_dim,
        "intermediate_size": architecture.ffn_size,
        "vocab_size": architecture.vocab_size,
        "rope_theta": architecture.rope_theta,
        "rms_norm_eps": architecture.rms_norm_eps,
        "max_position_embeddings": architecture.context_tokens,
        "tie_word_embeddings": architecture.tie_embeddings,
        "attention_bias": architecture.attention_bias,
    }
