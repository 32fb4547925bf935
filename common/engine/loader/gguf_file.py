"""GGUF files: quantised weights and their metadata in one file.

Tensors are dequantised one by one, so that loading needs the memory of the result and one tensor more; or those in blocks that
the engine computes with stay as they are (`read_stored_weights`). What differs from the Hugging Face layout is undone while
loading:

    llama    rows of the query and key projections are stored so that rotary pairs are neighbours, `r0 i0 r1 i1 ..`; models here
             rotate halves, `r0 r1 .. i0 i1 ..`
    gemma3   weights of norms are stored with the 1 added that the norm adds
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from gguf.quants import dequantize

from common.engine.block_matrix import BLOCK, BlockKind, BlockMatrix, Weight
from common.engine.loader.architecture import (
    Keep,
    KeepStored,
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
_KINDS = {kind.value: kind for kind in BlockKind}
_Element = TypeVar("_Element", np.float32, np.uint8)
# Which layers have a window, and their rotary base, are facts of the family that files may leave out.
_GEMMA3_PERIOD = 6
_GEMMA3_LOCAL_THETA = 10_000.0
_GEMMA3_LAYERS_OF_27B = 62  # scales its queries by another number, which GGUF files do not state


def read_weights(path: Path, dtype: torch.dtype, keep: Keep) -> tuple[ModelArchitecture, dict[str, torch.Tensor]]:
    architecture, sources = _open(path)
    tensors: dict[str, torch.Tensor] = {}
    for name, source in sources.items():
        tensors.update(keep(name, _tensor(architecture, name, source, dtype)))
    return architecture, tensors


def read_stored_weights(path: Path, dtype: torch.dtype, keep: KeepStored) -> tuple[ModelArchitecture, dict[str, Weight]]:
    architecture, sources = _open(path)
    weights: dict[str, Weight] = {}
    for name, source in sources.items():
        stored: Weight | None = _block_matrix(architecture, name, source)
        weights.update(keep(name, _tensor(architecture, name, source, dtype) if stored is None else stored))
    return architecture, weights


def has_layers_in_blocks(path: Path) -> bool:
    """Of a file whose architecture can be read. What it lacks is found out by whoever reads its weights."""
    matrices = [tensor for name, tensor in GGUFFile(path).tensors.items() if name.startswith("blk.") and len(tensor.shape) == 2]
    return bool(matrices) and all(tensor.tensor_type.name in _KINDS for tensor in matrices)


def _open(path: Path) -> tuple[ModelArchitecture, dict[str, Any]]:
    """What the file holds, under the names of the architecture and in their order."""
    file = GGUFFile(path)
    architecture = _architecture(file)
    layer_names = _LAYER_NAMES if architecture.family == "llama" else _GEMMA3_LAYER_NAMES
    sources = {_hugging_face_name(name, layer_names): tensor for name, tensor in file.tensors.items() if name != _ROPE_FACTORS}
    shapes = architecture.tensor_shapes()
    check_names(shapes, sources)
    return architecture, {name: sources[name] for name in shapes}


def _tensor(architecture: ModelArchitecture, name: str, source: Any, dtype: torch.dtype) -> torch.Tensor:
    values = _dequantize(name, source)
    check_shape(name, values.shape, architecture.tensor_shapes())
    num_heads = _heads_to_reorder(architecture, name)
    if num_heads:
        values = _pairs_to_halves(values, num_heads)
    if architecture.family == "gemma3" and name.endswith("norm.weight"):
        values = values - 1.0
    # Conversion copies already, unless there is nothing to convert: then the array may still be the mapped file.
    tensor = torch.from_numpy(values if values.flags.writeable else values.copy())
    return tensor.to(dtype).contiguous()


def _block_matrix(architecture: ModelArchitecture, name: str, source: Any) -> BlockMatrix | None:
    """The matrix as it is stored, its rows in the order of models here; None if it is in no blocks that we compute with."""
    kind = _KINDS.get(source.tensor_type.name)
    shape = tuple(int(size) for size in reversed(source.shape))
    if kind is None or len(shape) != 2:
        return None
    check_shape(name, shape, architecture.tensor_shapes())
    data: npt.NDArray[np.uint8] = source.data
    if data.shape != (shape[0], shape[1] // BLOCK * kind.block_bytes):
        raise ModelLoadError(f"tensor {name} has {data.shape} bytes, not those of {shape} weights in {kind.value}", param=name)
    num_heads = _heads_to_reorder(architecture, name)
    if num_heads:
        data = _pairs_to_halves(data, num_heads)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nobody writes to it
        return BlockMatrix(kind, torch.from_numpy(data), shape[1])


def _heads_to_reorder(architecture: ModelArchitecture, name: str) -> int:
    if architecture.family == "llama" and "self_attn.q_proj" in name:
        return architecture.num_heads
    if architecture.family == "llama" and "self_attn.k_proj" in name:
        return architecture.num_kv_heads
    return 0


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


def _pairs_to_halves(values: npt.NDArray[_Element], num_heads: int) -> npt.NDArray[_Element]:
    by_pair = values.reshape(num_heads, -1, 2, *values.shape[1:])
    return np.ascontiguousarray(by_pair.swapaxes(1, 2)).reshape(values.shape)
