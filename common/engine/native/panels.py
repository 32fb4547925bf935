"""Weights as the native kernels read them: every matrix cut into panels, all panels in one piece of memory in order of use.

    panel     [word of the input][32 outputs]; a word is one fp32 or two neighbouring bf16 inputs, or four in 8 bits; in 8 bits
              every 64 inputs begin with a scale per output (`quantised_panels`)
    block     of matrices in blocks of 32 inputs: [block][32 scales | 32 minima | words], as `source/blocks.h` has them
    gate_up   a panel holds 16 gates, then the 16 ups that belong to them
    vectors   norms and biases in fp32, padded with zeros to 32

What is missing at the edges is zero. A step reads the memory once from start to end; large pages keep that fast. A matrix that
comes in blocks is packed some panels at a time: between the file and the panels there is no other copy of it.
"""

from __future__ import annotations

import enum
import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from common.engine.block_matrix import BlockKind, BlockMatrix, Weight
from common.engine.loader import ModelArchitecture
from common.engine.quantisation import GROUP, WeightFormat, quantise
from common.errors import EngineFailure

PANEL = 32
_ALIGNMENT_BYTES = 64
_PACKED_AT_ONCE = 64
"""Panels of blocks."""


class Held(enum.IntEnum):
    """How a matrix is held; `source/matrix.h` has the same."""

    PLAIN = 0
    GROUPS_8 = 1
    BLOCKS_8 = 2
    BLOCKS_4 = 3
    BLOCKS_4_MINIMA = 4


_HELD = {BlockKind.Q8: Held.BLOCKS_8, BlockKind.Q4: Held.BLOCKS_4, BlockKind.Q4_MINIMA: Held.BLOCKS_4_MINIMA}


@dataclass(frozen=True, slots=True)
class Panels:
    words: torch.Tensor  # int32; of a plain embedding, the embedding as it came
    held: Held


@dataclass(frozen=True, slots=True)
class LayerPanels:
    attention_norm: torch.Tensor
    qkv: Panels
    qkv_bias: torch.Tensor | None
    output: Panels
    output_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: Panels
    down: Panels


@dataclass(frozen=True, slots=True)
class ModelPanels:
    embedding: Panels | None  # a stage of a pipeline may lack it, or norm and head
    layers: tuple[LayerPanels, ...]
    final_norm: torch.Tensor | None
    head: Panels | None
    dtype: torch.dtype  # of plain matrices, and of what steps compute in

    @classmethod
    def of(
        cls,
        architecture: ModelArchitecture,
        weights: Mapping[str, Weight],
        format: WeightFormat = WeightFormat.MODEL,
        dtype: torch.dtype | None = None,
    ) -> ModelPanels:
        """Copies; the weights may go afterwards, but for a plain embedding. `dtype` is the model's; left out, its tensors'."""
        tensors = [weight for weight in weights.values() if isinstance(weight, torch.Tensor)]
        packing = _Packing(weights, format, dtype or tensors[0].dtype)
        embedding = weights.get("model.embed_tokens.weight")
        head_weight = embedding if architecture.tie_embeddings else weights.get("lm_head.weight")
        layers = tuple(_layer(packing, weights, f"model.layers.{index}.") for index in range(architecture.num_layers))
        head = None if head_weight is None else packing.pack([head_weight], of_layer=False)
        if embedding is None or isinstance(embedding, torch.Tensor):
            first = None if embedding is None else Panels(embedding, Held.PLAIN)
        else:
            first = head if embedding is head_weight else packing.pack([embedding], of_layer=False)
        return cls(first, layers, _optional_vector(weights.get("model.norm.weight")), head, packing.dtype)


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


def block_panels(matrix: BlockMatrix) -> torch.Tensor:
    """int32 [panels, blocks, words]; outputs in whole panels."""
    kind, blocks = matrix.kind, matrix.num_blocks
    stored = matrix.blocks.reshape(-1, PANEL, blocks, kind.block_bytes)
    heads, values = stored[..., : kind.head_bytes], stored[..., kind.head_bytes :]
    if kind is BlockKind.Q8:
        values = values ^ 0x80  # signed bytes + 128
    # [panel, block, scale or minimum, output, 2 bytes] and [panel, block, word, output, 4 bytes]
    heads = heads.reshape(*heads.shape[:3], -1, 2).permute(0, 2, 3, 1, 4).flatten(2)
    values = values.reshape(*values.shape[:3], -1, 4).permute(0, 2, 3, 1, 4).flatten(2)
    return torch.cat((heads, values), dim=2).view(torch.int32)


def padded_vector(vector: torch.Tensor) -> torch.Tensor:
    return F.pad(vector.float(), (0, -len(vector) % PANEL)).contiguous()


def _optional_vector(vector: Weight | None) -> torch.Tensor | None:
    return padded_vector(vector) if isinstance(vector, torch.Tensor) else None


def _gates_and_ups(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Rows in turns: 16 of one, 16 of the other."""
    half = PANEL // 2
    both = [F.pad(matrix, (0, 0, 0, -matrix.shape[0] % half)).view(-1, half, matrix.shape[1]) for matrix in (gate, up)]
    return torch.stack(both, dim=1).view(-1, gate.shape[1])


def _layer(packing: _Packing, weights: Mapping[str, Weight], prefix: str) -> LayerPanels:
    def take(name: str) -> Weight:
        return weights[prefix + name]

    def vector(*names: str) -> torch.Tensor | None:
        found = [part for name in names if isinstance(part := weights.get(prefix + name), torch.Tensor)]
        return padded_vector(torch.cat(found)) if found else None

    def norm(name: str) -> torch.Tensor:
        found = vector(name)
        if found is None:
            raise EngineFailure(f"{prefix}{name} is no vector")
        return found

    projections = [f"self_attn.{name}_proj" for name in "qkv"]
    down = take("mlp.down_proj.weight")
    if isinstance(down, torch.Tensor):
        down = F.pad(down, (0, -down.shape[1] % (PANEL // 2)))
    return LayerPanels(
        attention_norm=norm("input_layernorm.weight"),
        qkv=packing.pack([take(f"{name}.weight") for name in projections]),
        qkv_bias=vector(*(f"{name}.bias" for name in projections)),
        output=packing.pack([take("self_attn.o_proj.weight")]),
        output_bias=vector("self_attn.o_proj.bias"),
        mlp_norm=norm("post_attention_layernorm.weight"),
        gate_up=packing.pack([take("mlp.gate_proj.weight"), take("mlp.up_proj.weight")], in_turns=True),
        down=packing.pack([down]),
    )


class _Packing:
    """What becomes of the matrices of a model, one after the other, in one piece of memory."""

    def __init__(self, weights: Mapping[str, Weight], format: WeightFormat, dtype: torch.dtype) -> None:
        self._format = format
        self.dtype = dtype
        tied = weights.get("model.embed_tokens.weight")  # perhaps the head as well
        shapes = [weight.shape for weight in (*weights.values(), tied) if weight is not None]
        self._memory = _Memory(sum(_most_bytes(shape[0], shape[1], dtype) for shape in shapes if len(shape) == 2))

    def pack(self, parts: Sequence[Weight], *, in_turns: bool = False, of_layer: bool = True) -> Panels:
        """Parts stand below each other, or in turns."""
        blocks = [part for part in parts if isinstance(part, BlockMatrix)]
        if self._format is WeightFormat.INT4_BLOCKS and of_layer and not blocks:
            blocks = [BlockMatrix.rounded(part) for part in parts if isinstance(part, torch.Tensor)]
        if len(blocks) == len(parts):
            same = _of_one_kind(blocks)
            if same is not None:
                return self._pack_blocks(same, in_turns)
        matrices = [part.dequantised().to(self.dtype) if isinstance(part, BlockMatrix) else part for part in parts]
        joined = _gates_and_ups(*matrices) if in_turns else torch.cat(matrices) if len(matrices) > 1 else matrices[0]
        if self._format in (WeightFormat.INT8, WeightFormat.INT4_BLOCKS):
            return Panels(self._memory.keep(quantised_panels(joined)), Held.GROUPS_8)
        return Panels(self._memory.keep(to_panels(joined)), Held.PLAIN)

    def _pack_blocks(self, parts: Sequence[BlockMatrix], in_turns: bool) -> Panels:
        first = parts[0]
        rows = _gates_and_ups(*(part.blocks for part in parts)) if in_turns else first.blocks
        matrix = replace(first, blocks=rows) if in_turns or len(parts) == 1 else BlockMatrix.joined(parts)
        panels = -(-len(matrix.blocks) // PANEL)
        words = PANEL * first.num_blocks * first.kind.block_bytes // 4
        kept = self._memory.take(panels, words)
        for begin in range(0, panels, _PACKED_AT_ONCE):
            some = matrix.blocks[begin * PANEL : (begin + _PACKED_AT_ONCE) * PANEL]
            some = F.pad(some, (0, 0, 0, -len(some) % PANEL))
            kept[begin : begin + _PACKED_AT_ONCE] = block_panels(replace(matrix, blocks=some)).flatten(1)
        return Panels(kept, _HELD[first.kind])


def _of_one_kind(parts: Sequence[BlockMatrix]) -> Sequence[BlockMatrix] | None:
    """The same weights in one kind of block, if there is one that holds them all exactly."""
    kinds = {part.kind for part in parts}
    if len(kinds) == 1:
        return parts
    return None if BlockKind.Q4_MINIMA in kinds else [part.wider_in_file() for part in parts]


def _most_bytes(num_outputs: int, num_inputs: int, dtype: torch.dtype) -> int:
    """At least what the panels of a matrix take: both sides rounded up, the start aligned. What is not used is not touched."""
    outputs, inputs = (-(-size // GROUP) * GROUP for size in (num_outputs, num_inputs))
    return outputs * inputs * max(dtype.itemsize, 2) + _ALIGNMENT_BYTES


class _Memory:
    """Anonymous memory on large pages, given out from front to back. Freed when the last tensor over it is."""

    def __init__(self, num_bytes: int) -> None:
        region = mmap.mmap(-1, max(num_bytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            region.madvise(mmap.MADV_HUGEPAGE)
        self._words = torch.frombuffer(region, dtype=torch.int32, count=num_bytes // 4)
        self._used = 0

    def take(self, *shape: int) -> torch.Tensor:
        size = math.prod(shape)
        taken = self._words[self._used : self._used + size].view(shape)
        self._used += size + -size % (_ALIGNMENT_BYTES // 4)
        return taken

    def keep(self, panels: torch.Tensor) -> torch.Tensor:
        return self.take(*panels.shape).copy_(panels)
