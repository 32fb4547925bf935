"""Tiny Qwen 3 models, dense and as mixtures of experts, with random weights, written by transformers itself.

The weights are scaled up as in `tiny_models`: attention and routing are peaked, so that comparisons can fail.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}


def make_tiny_qwen3(path: Path, *, experts: int = 0, normalise: bool = True, seed: int = 0) -> Path:
    """A folder as transformers saves it; with `experts`, of which each token chooses three."""
    torch.manual_seed(seed)
    if experts:
        model: Any = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **SIZES, moe_intermediate_size=40, num_experts=experts, num_experts_per_tok=3, norm_topk_prob=normalise
            )
        )
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 2.0 / parameter.shape[-1] ** 0.5 if "embed" not in name else 1.0)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return path


def qwen3_oracle(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
