"""GGUF files: quantised weights and their metadata in one file.

Tensors are dequantised one by one, so that loading needs the memory of the result and one tensor more. What differs from the
Hugging Face layout is undone while loading:

    llama    rows of the query and key projections are stored so that rotary pairs are neighbours, `r0 i0 r1 i1 ..`; models here
             rotate halves, `r0 r1 .. i0 i1 ..`
    gemma3   weights of norms are stored with the 1 added that the norm adds
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf.quants import dequantize

from common.engine.loader.architecture import (
    Keep,
    Llama3RopeScaling,
    ModelArchitecture,
    check_names,
    check_shape,
    windows_in_turn,
)
from common.errors import ModelLoadError
from common.gguf_reader import GGUFFile

SUPPORTED_ARCHITECTURES = ("llama", "gemma3")
_EMBEDDING, _OUTPUT, _ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
_MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_GEMMA3_LAYER_NAMES = _LAYER_NAMES | {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Which layers have a window, and their rotary base, are facts of the family that files may leave out.
_GEMMA3_PERIOD = 6
_GEMMA3_LOCAL_THETA = 10_000.0
_GEMMA3_LAYERS_OF_27B = 62  # scales its queries by another number, which GGUF files do not state


def read_weights(path: Path, dtype: torch.dtype, keep: Keep) -> tuple[ModelArchitecture, dict[str, torch.Tensor]]:
    file = GGUFFile(path)
    architecture = _architecture(file)
    shapes = architecture.tensor_shapes()
    is_llama = architecture.family == "llama"
    layer_names = _LAYER_NAMES if is_llama else _GEMMA3_LAYER_NAMES
    sources = {_hugging_face_name(name, layer_names): tensor for name, tensor in file.tensors.items() if name != _ROPE_FACTORS}
    check_names(shapes, sources)
    rows_to_reorder: dict[str, int] = {}
    if is_llama:
        rows_to_reorder = {"self_attn.q_proj": architecture.num_heads, "self_attn.k_proj": architecture.num_kv_heads}
    tensors: dict[str, torch.Tensor] = {}
    for name in shapes:
        values = _dequantize(name, sources[name])
        check_shape(name, values.shape, shapes)
        for projection, num_heads in rows_to_reorder.items():
            if projection in name:
                values = _pairs_to_halves(values, num_heads)
        if not is_llama and name.endswith("norm.weight"):
            values = values - 1.0
        # Conversion copies already, unless there is nothing to convert: then the array may still be the mapped file.
        tensor = torch.from_numpy(values if values.flags.writeable else values.copy())
        tensors.update(keep(name, tensor.to(dtype).contiguous()))
    return architecture, tensors


def read_architecture(path: Path) -> ModelArchitecture:
    return _architecture(GGUFFile(path))


def _architecture(file: GGUFFile) -> ModelArchitecture:
    kind = file.require("general.architecture", str)
    if kind not in SUPPORTED_ARCHITECTURES:
        raise ModelLoadError(
            f"{file.path.name} is of architecture {kind!r}; supported are {', '.join(SUPPORTED_ARCHITECTURES)}",
            param="general.architecture",
        )
    if _EMBEDDING not in file.tensors:
        raise ModelLoadError(f"{file.path.name} lacks tensor {_EMBEDDING}", param=_EMBEDDING)
    num_layers = file.require(f"{kind}.block_count", int)
    hidden_size = file.require(f"{kind}.embedding_length", int)
    num_heads = file.require(f"{kind}.attention.head_count", int)
    head_dim = file.get(f"{kind}.attention.key_length", int) or hidden_size // max(num_heads, 1)
    rope_theta = file.get(f"{kind}.rope.freq_base", float) or (10_000.0 if kind == "llama" else 1_000_000.0)
    _refuse_unsupported(file, kind, head_dim, num_layers)
    windows: tuple[int, ...] = ()
    local_rope_theta = None
    if kind == "gemma3":
        period = file.get("gemma3.attention.sliding_window_pattern", int) or _GEMMA3_PERIOD
        windows = windows_in_turn(num_layers, file.require("gemma3.attention.sliding_window", int), period)
        local_rope_theta = file.get("gemma3.rope.freq_base_swa", float) or _GEMMA3_LOCAL_THETA
    return ModelArchitecture(
        family=kind,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=file.get(f"{kind}.attention.head_count_kv", int) or num_heads,
        head_dim=head_dim,
        ffn_size=file.require(f"{kind}.feed_forward_length", int),
        vocab_size=int(file.tensors[_EMBEDDING].shape[-1]),  # GGUF counts dimensions from the innermost
        rope_theta=rope_theta,
        rope_scaling=_rope_scaling(file, rope_theta, head_dim),
        rms_norm_eps=file.require(f"{kind}.attention.layer_norm_rms_epsilon", float),
        context_tokens=file.require(f"{kind}.context_length", int),
        tie_embeddings=_OUTPUT not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        layer_windows=windows,
        local_rope_theta=local_rope_theta,
    )


def _refuse_unsupported(file: GGUFFile, kind: str, head_dim: int, num_layers: int) -> None:
    accepted: dict[str, tuple[Any, ...]] = {
        f"{kind}.expert_count": (None, 0),
        f"{kind}.attention.value_length": (None, head_dim),
        f"{kind}.rope.dimension_count": (None, head_dim),
    }
    if kind == "llama":
        accepted["llama.attention.sliding_window"] = (None, 0)
    elif num_layers == _GEMMA3_LAYERS_OF_27B:
        raise ModelLoadError(f"{file.path.name}: Gemma 3 27B scales its queries in a way that is not supported")
    for key, values in accepted.items():
        value = file.get(key, int)
        if value not in values:
            raise ModelLoadError(f"{file.path.name}: {key} = {value} is not supported", param=key)
    key = f"{kind}.rope.scaling.type"
    scaling = file.get(key, str)
    if scaling not in (None, "none"):
        raise ModelLoadError(f"{file.path.name}: rope scaling {scaling!r} is not supported", param=key)


def _rope_scaling(file: GGUFFile, rope_theta: float, head_dim: int) -> Llama3RopeScaling | None:
    """GGUF keeps only the outcome of Llama 3 scaling, one factor per rotary pair; find the scaling that gives these factors."""
    if _ROPE_FACTORS not in file.tensors:
        return None
    factors = _dequantize(_ROPE_FACTORS, file.tensors[_ROPE_FACTORS])
    # All Llama 3.x models differ in nothing but `factor`, and their slowest pairs are slowed by exactly that.
    scaling = Llama3RopeScaling(
        factor=float(factors.max()), low_freq_factor=1.0, high_freq_factor=4.0, original_context_tokens=8192
    )
    expected = [scaling.slowdown(rope_theta ** (-2 * pair / head_dim)) for pair in range(head_dim // 2)]
    if factors.shape != (head_dim // 2,) or not np.allclose(factors, expected, rtol=1e-4):
        raise ModelLoadError(
            f"{file.path.name}: {_ROPE_FACTORS} is not the scaling of a Llama 3.x model, which alone is supported",
            param=_ROPE_FACTORS,
        )
    return scaling


def _hugging_face_name(name: str, layer_names: Mapping[str, str]) -> str:
    """Unknown names are returned as they are, for `check_names` to refuse."""
    stem, _, suffix = name.rpartition(".")
    if stem in _MODEL_NAMES:
        return f"{_MODEL_NAMES[stem]}.{suffix}"
    block, _, part = stem.rpartition(".")
    layer = block.removeprefix("blk.")
    return f"model.layers.{layer}.{layer_names[part]}.{suffix}" if part in layer_names else name


def _dequantize(name: str, tensor: Any) -> npt.NDArray[np.float32]:
    try:
        values: npt.NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ModelLoadError(
            f"tensor {name} is quantised as {tensor.tensor_type.name}, which cannot be read", param=name
        ) from error
    return values.astype(np.float32, copy=False)


def _pairs_to_halves(values: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    by_pair = values.reshape(num_heads, -1, 2, *values.shape[1:])
    return np.ascontiguousarray(by_pair.swapaxes(1, 2)).reshape(values.shape)
