"""Tiny Llama models with random weights, made on the spot as a Hugging Face folder.

Same arguments, same bytes. The weights are scaled so that attention is peaked and the next token depends on the whole prompt:
with small weights every model says the same and comparisons prove nothing. The tokenizer is byte-level BPE: any text
round-trips. `transformers.LlamaForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load the folder; nothing here
needs transformers or the code under test.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)  # ids 0, 1, 2; the model's end token is 2
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_MERGED_WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "for",
    "it",
    "was",
    "on",
    "are",
    "as",
    "with",
    "his",
    "they",
    "be",
    "at",
    "one",
    "have",
    "this",
    "from",
    "or",
    "had",
    "by",
    "hot",
    "word",
    "but",
    "what",
    "some",
    "we",
    "can",
    "out",
    "other",
    "were",
    "all",
    "there",
    "when",
    "up",
    "use",
    "your",
    "how",
    "said",
    "an",
    "each",
    "she",
    "which",
    "do",
    "their",
    "time",
    "if",
    "will",
    "way",
    "about",
    "many",
    "then",
    "them",
    "write",
    "would",
    "like",
    "so",
    "these",
    "her",
    "long",
    "make",
    "thing",
    "see",
    "him",
    "two",
    "has",
    "look",
    "more",
    "day",
    "could",
    "go",
    "come",
    "did",
    "number",
    "sound",
    "no",
    "most",
    "people",
]


def make_tiny_model(
    path: Path,
    seed: int = 0,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    ffn: int = 128,
    vocab: int = 384,
    context: int = 2048,
    tie_embeddings: bool = False,
    attention_bias: bool = False,
    rope_theta: float = 10_000.0,
    rope_scaling: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
) -> Path:
    """Writes config, weights, tokenizer and chat template into the folder `path` (made if missing) and returns it."""
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "tie_word_embeddings": tie_embeddings,
        "attention_bias": attention_bias,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    _write_json(path / "config.json", config)
    _write_json(path / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 2})
    tensors = _random_tensors(config, torch.Generator().manual_seed(seed))
    _write_weights(path, {name: tensor.to(dtype) for name, tensor in tensors.items()}, shards)
    make_tiny_tokenizer(vocab).save(str(path / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": TURN_END,
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": context,
    }
    _write_json(path / "tokenizer_config.json", tokenizer_config)
    return path


def make_tiny_tokenizer(vocab: int = 384) -> Tokenizer:
    """Byte-level BPE with exactly `vocab` ids: specials, 256 bytes, merges that spell common words, then unused fillers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab < len(SPECIAL_TOKENS) + len(alphabet):
        raise ValueError(f"a byte-level vocabulary needs at least {len(SPECIAL_TOKENS) + len(alphabet)} ids, got {vocab}")
    tokens = [*SPECIAL_TOKENS, *alphabet]
    merges: list[tuple[str, str]] = []
    for word in _MERGED_WORDS:
        prefix = "Ġ"  # how byte-level BPE writes a space
        for letter in word:
            if len(tokens) < vocab and prefix + letter not in tokens:
                merges.append((prefix, letter))
                tokens.append(prefix + letter)
            prefix += letter
    fillers = [f"<|unused_{index}|>" for index in range(vocab - len(tokens))]
    ids = {token: index for index, token in enumerate([*tokens, *fillers])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (*SPECIAL_TOKENS, *fillers)])
    return tokenizer


def _random_tensors(config: dict[str, Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    query_width = config["num_attention_heads"] * config["head_dim"]
    kv_width = config["num_key_value_heads"] * config["head_dim"]

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * (gain / math.sqrt(columns))

    def norm() -> torch.Tensor:
        return 1.0 + 0.2 * torch.randn(hidden, generator=generator)

    tensors = {"model.embed_tokens.weight": torch.randn(config["vocab_size"], hidden, generator=generator)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        attention = f"{prefix}.self_attn"
        tensors[f"{prefix}.input_layernorm.weight"] = norm()
        tensors[f"{attention}.q_proj.weight"] = matrix(query_width, hidden, gain=2.0)
        tensors[f"{attention}.k_proj.weight"] = matrix(kv_width, hidden, gain=2.0)
        tensors[f"{attention}.v_proj.weight"] = matrix(kv_width, hidden, gain=2.0)
        tensors[f"{attention}.o_proj.weight"] = matrix(hidden, query_width, gain=2.0)
        if config["attention_bias"]:
            for name, width in (("q_proj", query_width), ("k_proj", kv_width), ("v_proj", kv_width), ("o_proj", hidden)):
                tensors[f"{attention}.{name}.bias"] = 0.5 * torch.randn(width, generator=generator)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = norm()
        tensors[f"{prefix}.mlp.gate_proj.weight"] = matrix(ffn, hidden, gain=2.0)
        tensors[f"{prefix}.mlp.up_proj.weight"] = matrix(ffn, hidden, gain=2.0)
        tensors[f"{prefix}.mlp.down_proj.weight"] = matrix(hidden, ffn, gain=2.0)
    tensors["model.norm.weight"] = norm()
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(config["vocab_size"], hidden, gain=3.0)
    return tensors


def _write_weights(path: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file_name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        names = list(tensors)[shard::shards]
        save_file({name: tensors[name] for name in names}, path / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file_name))
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(path / "model.safetensors.index.json", {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
