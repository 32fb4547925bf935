"""Hugging Face folders: config.json beside one model.safetensors, or many shards with an index.

Config files are data from strangers: every key is checked for type, features that would change the numbers and that no model
here implements are refused by name, and shard names cannot leave the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open

from common.engine.loader.architecture import (
    Keep,
    Llama3RopeScaling,
    ModelArchitecture,
    check_names,
    check_shape,
    windows_in_turn,
)
from common.errors import ModelLoadError

_GEMMA3, _QWEN3, _QWEN3_MOE = "Gemma3ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"
SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", _GEMMA3, _QWEN3, _QWEN3_MOE)
_GEMMA3_PERIOD = 6  # of layers, where the config does not list their kinds
_FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_Number = TypeVar("_Number", int, float)


def read_weights(folder: Path, dtype: torch.dtype, keep: Keep) -> tuple[ModelArchitecture, dict[str, torch.Tensor]]:
    architecture = read_architecture(folder)
    shapes = architecture.tensor_shapes()
    shard_of = _tensor_files(folder)
    if architecture.tie_embeddings:
        shard_of.pop("lm_head.weight", None)  # some checkpoints store the tied matrix twice
    check_names(shapes, shard_of)
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(set(shard_of.values())):
        try:
            with safe_open(shard, framework="pt") as file:
                for name in (name for name in shapes if shard_of[name] == shard):
                    tensor = file.get_tensor(name)
                    if tensor.dtype not in _FLOAT_DTYPES:
                        raise ModelLoadError(
                            f"tensor {name} is {tensor.dtype}; only 16 and 32 bit floats are supported", param=name
                        )
                    check_shape(name, tuple(tensor.shape), shapes)
                    tensors.update(keep(name, tensor.to(dtype).contiguous()))
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"cannot read {shard}: {error}") from error
    return architecture, tensors


def read_architecture(folder: Path) -> ModelArchitecture:
    config = _read_json(folder / "config.json")
    names = config.get("architectures") or []
    if not isinstance(names, list) or len(names) != 1 or names[0] not in SUPPORTED_ARCHITECTURES:
        raise ModelLoadError(
            f"{folder.name} is of architecture {names}; supported are {', '.join(SUPPORTED_ARCHITECTURES)}", param="architectures"
        )
    if names[0] == _GEMMA3:
        return _gemma3(config)
    _refuse_unsupported(config)
    is_qwen3 = names[0] in (_QWEN3, _QWEN3_MOE)
    num_experts = experts_per_token = None
    if names[0] == _QWEN3_MOE:
        named = "num_experts" if "num_experts" in config else "num_local_experts"  # older and newer configs
        num_experts, experts_per_token = _number(config, named, int), _number(config, "num_experts_per_tok", int)
    hidden_size = _number(config, "hidden_size", int)
    num_heads = _number(config, "num_attention_heads", int)
    num_kv_heads = _number(config, "num_key_value_heads", int, default=num_heads)
    # Newer configs keep everything rotary in one table, older ones spread it over two keys.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ModelLoadError("config.json: rope_scaling must be a table", param="rope_scaling")
    return ModelArchitecture(
        family="qwen3" if is_qwen3 else "llama",
        num_layers=_number(config, "num_hidden_layers", int),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_number(config, "head_dim", int, default=hidden_size // max(num_heads, 1)),
        ffn_size=_number(config, "intermediate_size" if num_experts is None else "moe_intermediate_size", int),
        vocab_size=_number(config, "vocab_size", int),
        rope_theta=_number({**config, **rope}, "rope_theta", float, default=10_000.0),
        rope_scaling=_rope_scaling(rope),
        rms_norm_eps=_number(config, "rms_norm_eps", float, default=1e-6),
        context_tokens=_number(config, "max_position_embeddings", int),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(config.get("attention_bias", False)),
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        normalise_routing=bool(config.get("norm_topk_prob", num_experts is None)),
    )


def _gemma3(config: Mapping[str, Any]) -> ModelArchitecture:
    num_layers, head_dim = _number(config, "num_hidden_layers", int), _number(config, "head_dim", int)
    _refuse(
        config,
        {
            "hidden_activation": config.get("hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh",
            "attention_bias": bool(config.get("attention_bias")),
            "query_pre_attn_scalar": config.get("query_pre_attn_scalar", head_dim) != head_dim,
            "attn_logit_softcapping": config.get("attn_logit_softcapping") is not None,
            "final_logit_softcapping": config.get("final_logit_softcapping") is not None,
            "use_bidirectional_attention": bool(config.get("use_bidirectional_attention")),
            "quantization_config": config.get("quantization_config") is not None,
        },
    )
    window = _number(config, "sliding_window", int)
    kinds = config.get("layer_types")
    if kinds is None:
        windows = windows_in_turn(num_layers, window, _number(config, "sliding_window_pattern", int, default=_GEMMA3_PERIOD))
    else:
        known = {"sliding_attention": window, "full_attention": 0}
        if not isinstance(kinds, list) or not all(isinstance(kind, str) and kind in known for kind in kinds):
            raise ModelLoadError("config.json: layer_types lists kinds of attention that are not supported", param="layer_types")
        windows = tuple(known[kind] for kind in kinds)
    # Newer configs have one rotary table per kind of layer, older ones two keys.
    tables = config.get("rope_parameters") or {}
    full = tables.get("full_attention") or {"rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {})}
    local = tables.get("sliding_attention") or {"rope_theta": config.get("rope_local_base_freq")}
    if _rope_scaling(full) is not None or _rope_scaling(local) is not None:
        raise ModelLoadError("config.json: Gemma 3 with rope scaling is not supported", param="rope_scaling")
    return ModelArchitecture(
        family="gemma3",
        num_layers=num_layers,
        hidden_size=_number(config, "hidden_size", int),
        num_heads=_number(config, "num_attention_heads", int),
        num_kv_heads=_number(config, "num_key_value_heads", int),
        head_dim=head_dim,
        ffn_size=_number(config, "intermediate_size", int),
        vocab_size=_number(config, "vocab_size", int),
        rope_theta=_number(full, "rope_theta", float, default=1_000_000.0),
        rope_scaling=None,
        rms_norm_eps=_number(config, "rms_norm_eps", float, default=1e-6),
        context_tokens=_number(config, "max_position_embeddings", int),
        tie_embeddings=bool(config.get("tie_word_embeddings", True)),
        attention_bias=False,
        layer_windows=windows,
        local_rope_theta=_number(local, "rope_theta", float, default=10_000.0),
    )


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    _refuse(
        config,
        {
            "hidden_act": config.get("hidden_act", "silu") not in ("silu", "swish"),
            "mlp_bias": bool(config.get("mlp_bias")),
            "sliding_window": config.get("sliding_window") is not None and bool(config.get("use_sliding_window", True)),
            "mlp_only_layers": bool(config.get("mlp_only_layers")),
            "decoder_sparse_step": config.get("decoder_sparse_step", 1) != 1,
            "quantization_config": config.get("quantization_config") is not None,
        },
    )


def _refuse(config: Mapping[str, Any], refused: Mapping[str, bool]) -> None:
    for key, is_refused in refused.items():
        if is_refused:
            raise ModelLoadError(f"config.json: {key} = {config[key]!r} is not supported", param=key)


def _rope_scaling(rope: Mapping[str, Any]) -> Llama3RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ModelLoadError(f"config.json: rope scaling {kind!r} is not supported, only llama3 is", param="rope_scaling")
    return Llama3RopeScaling(
        factor=_number(rope, "factor", float),
        low_freq_factor=_number(rope, "low_freq_factor", float),
        high_freq_factor=_number(rope, "high_freq_factor", float),
        original_context_tokens=_number(rope, "original_max_position_embeddings", int),
    )


def _number(table: Mapping[str, Any], key: str, kind: type[_Number], *, default: _Number | None = None) -> _Number:
    value = table.get(key)
    if value is None and default is not None:
        return default
    allowed = (int,) if kind is int else (int, float)
    if not isinstance(value, allowed) or isinstance(value, bool):
        raise ModelLoadError(f"config.json: {key} must be a number of type {kind.__name__}, got {value!r}", param=key)
    return kind(value)


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelLoadError(f"{index} has no weight_map")
        for name in weight_map.values():
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ModelLoadError(f"{index} points outside its folder: {name!r}")
        return {tensor: folder / name for tensor, name in weight_map.items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        raise ModelLoadError(
            f"{folder} holds neither model.safetensors nor model.safetensors.index.json; pickled weights are never read"
        )
    try:
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(cast("list[str]", file.keys()), single)
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"cannot read {single}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} must hold a JSON object")
    return value
