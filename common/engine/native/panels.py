"""Weights as the native kernels read them: every matrix cut into panels, all panels in one piece of memory in order of use.

    panel     [word of the input][32 outputs]; a word is one fp32 or two neighbouring bf16 inputs, or four in 8 bits; in 8 bits
              every 64 inputs begin with a scale per output (`quantised_panels`)
    gate_up   a panel holds 16 gates, then the 16 ups that belong to them
    vectors   norms and biases in fp32, padded with zeros to 32

What is missing at the edges is zero. A step reads the memory once from start to end; large pages keep that fast.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common.engine.loader import ModelArchitecture
from common.engine.quantisation import GROUP, WeightFormat, quantise

PANEL = 32
_ALIGNMENT_BYTES = 64

Pack = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class LayerPanels:
    attention_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    output: torch.Tensor
    output_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True, slots=True)
class ModelPanels:
    embedding: torch.Tensor | None  # [vocab, hidden], as it came; a stage of a pipeline may lack it, or norm and head
    layers: tuple[LayerPanels, ...]
    final_norm: torch.Tensor | None
    head: torch.Tensor | None
    format: WeightFormat = WeightFormat.MODEL

    @classmethod
    def of(
        cls, architecture: ModelArchitecture, weights: dict[str, torch.Tensor], format: WeightFormat = WeightFormat.MODEL
    ) -> ModelPanels:
        """Copies; the weights may go afterwards, but for the embedding."""
        pack = quantised_panels if format is WeightFormat.INT8 else to_panels
        norm, head = weights.get("model.norm.weight"), _head(architecture, weights)
        sizes = [_packed_bytes(weight) for weight in (*weights.values(), *(() if head is None else (head,)))]
        memory = _Memory(sum(sizes))
        layers = tuple(_layer(memory, weights, f"model.layers.{index}.", pack) for index in range(architecture.num_layers))
        return cls(
            embedding=weights.get("model.embed_tokens.weight"),
            layers=layers,
            final_norm=None if norm is None else padded_vector(norm),
            head=None if head is None else memory.keep(pack(head)),
            format=format,
        )


def to_panels(matrix: torch.Tensor) -> torch.Tensor:
    """[outputs, inputs] -> int32 [panels, words, 32]."""
    per_word = 4 // matrix.element_size()
    padded = F.pad(matrix, (0, -matrix.shape[1] % per_word, 0, -matrix.shape[0] % PANEL))
    words = padded.contiguous().view(torch.int32)
    return words.view(-1, PANEL, words.shape[1]).transpose(1, 2)


def quantised_panels(matrix: torch.Tensor) -> torch.Tensor:
    """[outputs, inputs] -> int32 [panels, groups, 1 + 16, 32]: a group's scales (fp32), then words of 4 weights, each + 128."""
    rounded, scales = quantise(F.pad(matrix, (0, 0, 0, -matrix.shape[0] % PANEL)))
    groups = scales.shape[1]
    words = (rounded.to(torch.int16) + 128).to(torch.uint8).view(torch.int32)  # [outputs, groups * 16]
    words = words.view(-1, PANEL, groups, GROUP // 4).permute(0, 2, 3, 1)
    return torch.cat((scales.view(torch.int32).view(-1, PANEL, groups, 1).permute(0, 2, 3, 1), words), dim=2)


def gate_up_panels(gate: torch.Tensor, up: torch.Tensor, pack: Pack) -> torch.Tensor:
    half = PANEL // 2
    both = [F.pad(matrix, (0, 0, 0, -matrix.shape[0] % half)).view(-1, half, matrix.shape[1]) for matrix in (gate, up)]
    return pack(torch.stack(both, dim=1).view(-1, gate.shape[1]))


def padded_vector(vector: torch.Tensor) -> torch.Tensor:
    return F.pad(vector.float(), (0, -len(vector) % PANEL)).contiguous()


def _layer(memory: _Memory, weights: dict[str, torch.Tensor], prefix: str, pack: Pack) -> LayerPanels:
    def take(name: str) -> torch.Tensor:
        return weights[prefix + name]

    projections = [f"self_attn.{name}_proj" for name in "qkv"]
    biased = f"{prefix}self_attn.o_proj.bias" in weights
    down = take("mlp.down_proj.weight")
    return LayerPanels(
        attention_norm=padded_vector(take("input_layernorm.weight")),
        qkv=memory.keep(pack(torch.cat([take(f"{name}.weight") for name in projections]))),
        qkv_bias=padded_vector(torch.cat([take(f"{name}.bias") for name in projections])) if biased else None,
        output=memory.keep(pack(take("self_attn.o_proj.weight"))),
        output_bias=padded_vector(take("self_attn.o_proj.bias")) if biased else None,
        mlp_norm=padded_vector(take("post_attention_layernorm.weight")),
        gate_up=memory.keep(gate_up_panels(take("mlp.gate_proj.weight"), take("mlp.up_proj.weight"), pack)),
        down=memory.keep(pack(F.pad(down, (0, -down.shape[1] % (PANEL // 2))))),
    )


def _head(architecture: ModelArchitecture, weights: dict[str, torch.Tensor]) -> torch.Tensor | None:
    return weights.get("model.embed_tokens.weight" if architecture.tie_embeddings else "lm_head.weight")


def _packed_bytes(weight: torch.Tensor) -> int:
    """At least what the panels of a tensor take: both sides rounded up, and the start aligned."""
    if weight.dim() == 1:
        return 0
    outputs, inputs = (-(-size // GROUP) * GROUP for size in weight.shape)
    return outputs * inputs * weight.element_size() + _ALIGNMENT_BYTES


class _Memory:
    """Anonymous memory on large pages, given out from front to back. Freed when the last tensor over it is."""

    def __init__(self, num_bytes: int) -> None:
        region = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            region.madvise(mmap.MADV_HUGEPAGE)
        self._words = torch.frombuffer(region, dtype=torch.int32, count=num_bytes // 4)
        self._used = 0

    def keep(self, panels: torch.Tensor) -> torch.Tensor:
        kept = self._words[self._used : self._used + panels.numel()].view(panels.shape)
        self._used += panels.numel() + -panels.numel() % (_ALIGNMENT_BYTES // 4)
        return kept.copy_(panels)
