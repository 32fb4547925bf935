"""What the stages of a step have to read from memory and to compute at least: weights once, keys and values once, two operations
per product. Caches may spare reads, and kernels may do more; so this over a stage's time says how near it is to what can be had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from common.engine.batch import ScheduledBatch
from common.engine.loader import ModelArchitecture
from common.engine.verification import num_sampled_rows
from common.types import KVLayout

_MATRICES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": ("self_attn.o_proj",),
    "gate, up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


@dataclass(frozen=True, slots=True)
class Work:
    read_bytes: float
    operations: float

    def __add__(self, other: Work) -> Work:
        return Work(self.read_bytes + other.read_bytes, self.operations + other.operations)


def num_weights(architecture: ModelArchitecture) -> dict[str, int]:
    """Of the matrices of each stage, all layers together."""
    shapes = architecture.tensor_shapes()
    found = {
        stage: sum(
            shape[0] * shape[1]
            for tensor, shape in shapes.items()
            if len(shape) == 2 and any(tensor.endswith(f".{name}.weight") for name in names)
        )
        for stage, names in _MATRICES.items()
    }
    return found | {"head": architecture.vocab_size * architecture.hidden_size}


def work_of(
    batch: ScheduledBatch, architecture: ModelArchitecture, layout: KVLayout, matrix_bytes: Mapping[str, float]
) -> dict[str, Work]:
    """Of the stages that read much. `matrix_bytes` is what each of them reads of weights."""
    rows, sampled = batch.num_tokens, sum(num_sampled_rows(item) for item in batch.slices)
    found = {}
    for stage, weights in num_weights(architecture).items():
        multiplied = sampled if stage == "head" else rows
        found[stage] = Work(matrix_bytes[stage] if multiplied else 0.0, 2.0 * weights * multiplied)
    tokens = sum(item.start + len(item.token_ids) for item in batch.slices)
    kv_bytes = tokens * layout.block_bytes / layout.block_tokens
    per_pair = 4.0 * architecture.num_heads * architecture.head_dim * architecture.num_layers
    pairs = sum(len(item.token_ids) * (item.start + (len(item.token_ids) + 1) / 2) for item in batch.slices)
    found["attention"] = Work(kv_bytes, per_pair * pairs)
    return found
