"""The same weights for everybody: a GGUF file's tensors in bf16, as a Hugging Face folder that every server reads.

Rounding of the file's own quantisation is undone the way its format says; nothing is quantised anew. llama.cpp serves the
file itself.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from benchmarks.llama_config import llama_config
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
        **llama_config(architecture),
        "model_type": "llama",
        "hidden_act": "silu",
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
