"""What a model is, as numbers: the shape that weights, KV layout and attention are built from.

Read once from a model file's header, checked, and never changed. `tensor_shapes` states which tensors such a model has; loaders
hold the files against it, so that a model definition can trust its dictionary blindly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TypeVar

import torch

from common.engine.block_matrix import Weight
from common.errors import ModelLoadError

_Held = TypeVar("_Held", torch.Tensor, Weight)


Keep = Callable[[str, torch.Tensor], Mapping[str, torch.Tensor]]
"""What is held of a tensor, under which names; what it returns must not hold on to the rest."""
KeepStored = Callable[[str, Weight], Mapping[str, Weight]]


def keep_all(name: str, tensor: _Held) -> Mapping[str, _Held]:
    return {name: tensor}


def keep_only(*names: str) -> Keep:
    def keep(name: str, tensor: _Held) -> Mapping[str, _Held]:
        return {name: tensor} if name in names else {}

    return keep


@dataclass(frozen=True, slots=True)
class Llama3RopeScaling:
    """Llama 3.x stretches its context by slowing low rotary frequencies down, smoothly between two wavelengths."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_tokens: int

    def slowdown(self, inverse_frequency: float) -> float:
        """The number (from 1 to `factor`) by which one inverse rotary frequency is divided."""
        wavelength_tokens = 2 * math.pi / inverse_frequency
        turns = self.original_context_tokens / wavelength_tokens
        if turns < self.low_freq_factor:
            return self.factor
        if turns > self.high_freq_factor:
            return 1.0
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return 1.0 / ((1.0 - smooth) / self.factor + smooth)


@dataclass(frozen=True, slots=True)
class ModelArchitecture:
    """A decoder. Written by the loaders."""

    family: str  # "llama", "gemma3", "qwen3"; selects the model definition
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int  # rows of the embedding; may exceed the tokenizer's vocabulary
    rope_theta: float
    rope_scaling: Llama3RopeScaling | None
    rms_norm_eps: float
    context_tokens: int
    tie_embeddings: bool
    attention_bias: bool
    layer_windows: tuple[
        int, ...
    ] = ()  # per layer: how many tokens, itself among them, a token sees; 0 = all. () = all in all layers
    local_rope_theta: float | None = None  # of the layers with a window
    num_experts: int | None = None  # of a layer, each of `ffn_size`; None: one feed-forward part for all tokens
    experts_per_token: int | None = None
    normalise_routing: bool = True  # the weights of a token's experts add up to 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and not (value > 0 and math.isfinite(value)):
                raise ModelLoadError(f"the model states {field.name} = {value}, which must be positive", param=field.name)
        if self.layer_windows and (len(self.layer_windows) != self.num_layers or min(self.layer_windows) < 0):
            raise ModelLoadError(f"the model states windows for {len(self.layer_windows)} layers", param="layer_windows")
        if self.num_heads % self.num_kv_heads:
            raise ModelLoadError(
                f"the model states {self.num_heads} heads, not a multiple of its {self.num_kv_heads} KV heads",
                param="num_kv_heads",
            )
        if (self.num_experts is None) != (self.experts_per_token is None) or (self.experts_per_token or 0) > (
            self.num_experts or 0
        ):
            raise ModelLoadError(
                f"the model states {self.experts_per_token} experts per token of {self.num_experts}", param="experts_per_token"
            )
        if self.head_dim % 2:
            raise ModelLoadError(f"the model states head_dim = {self.head_dim}; rotary embedding needs pairs", param="head_dim")

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model under its Hugging Face name: `[out, in]` for matrices, `[n]` for norms and biases."""
        query_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        hidden, ffn = self.hidden_size, self.ffn_size
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            attention = {"q_proj": (query_width, hidden), "k_proj": (kv_width, hidden), "v_proj": (kv_width, hidden)}
            attention["o_proj"] = (hidden, query_width)
            for name, shape in attention.items():
                shapes[f"{prefix}.self_attn.{name}.weight"] = shape
                if self.attention_bias:
                    shapes[f"{prefix}.self_attn.{name}.bias"] = shape[:1]
            parts = ["mlp"] if self.num_experts is None else [f"mlp.experts.{expert}" for expert in range(self.num_experts)]
            for part in parts:
                shapes[f"{prefix}.{part}.gate_proj.weight"] = (ffn, hidden)
                shapes[f"{prefix}.{part}.up_proj.weight"] = (ffn, hidden)
                shapes[f"{prefix}.{part}.down_proj.weight"] = (hidden, ffn)
            if self.num_experts is not None:
                shapes[f"{prefix}.mlp.gate.weight"] = (self.num_experts, hidden)
            shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
            shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
            if self.family == "gemma3":
                shapes[f"{prefix}.pre_feedforward_layernorm.weight"] = (hidden,)
                shapes[f"{prefix}.post_feedforward_layernorm.weight"] = (hidden,)
            if self.family in ("gemma3", "qwen3"):
                shapes[f"{prefix}.self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[f"{prefix}.self_attn.k_norm.weight"] = (self.head_dim,)
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes


def windows_in_turn(num_layers: int, window: int, period: int) -> tuple[int, ...]:
    """The layers of Gemma 3: of each `period` the last sees all, the others the last `window` tokens."""
    return tuple(0 if layer % period == period - 1 else window for layer in range(num_layers))


def check_names(expected: Iterable[str], found: Iterable[str]) -> None:
    """Refuses a file that lacks tensors of its architecture or holds tensors that would be silently ignored."""
    expected, found = set(expected), set(found)
    for problem, names in (("lacks", expected - found), ("holds unknown", found - expected)):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ModelLoadError(f"the model file {problem} tensors: {shown}", param=min(names))


def check_shape(name: str, found: tuple[int, ...], expected: Mapping[str, tuple[int, ...]]) -> None:
    if found != expected[name]:
        raise ModelLoadError(f"tensor {name} has shape {found}, its architecture needs {expected[name]}", param=name)
