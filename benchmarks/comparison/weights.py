"""The same weights for everybody: a GGUF file's tensors in bf16, as a Hugging Face folder that every server reads.

Rounding of the file's own quantisation is undone the way its format says; nothing is quantised anew. llama.cpp serves the
file itself.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from common.errors import ModelLoadError
from common.gguf_reader import GGUFFile
from common.gguf_tokenizer import build_backend, end_token_ids, special_tokens

_WHOLE = "generation_config.json"  # written last


def as_folder(source: Path, target: Path) -> Path:
    """The folder, made if it is not there. Raises ModelLoadError."""
    import torch
    from safetensors.torch import save_file

    from common.engine.loader import load_weights

    if (target / _WHOLE).exists():
        return target
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    architecture, weights = load_weights(source, torch.bfloat16)
    if architecture.family != "llama" or architecture.rope_scaling is not None:
        raise ModelLoadError(f"only plain models of the Llama family are written out, not {architecture.family}")
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, target / "model.safetensors", {"format": "pt"})
    file = GGUFFile(source)
    end_ids = end_token_ids(file)
    special = special_tokens(file)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
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
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": end_ids[0] if end_ids else None,
    }
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": architecture.context_tokens,
        "clean_up_tokenization_spaces": False,
        "chat_template": file.get("tokenizer.chat_template", str),
        **special,
    }
    (target / "tokenizer.json").write_text(build_backend(file).to_str())
    for name, content in (
        ("config.json", config),
        ("tokenizer_config.json", tokenizer),
        (_WHOLE, {"bos_token_id": config["bos_token_id"], "eos_token_id": list(end_ids)}),
    ):
        (target / name).write_text(json.dumps(content, indent=1))
    return target
