"""Who has what of a model: pure arithmetic over an architecture and the degrees.

    stage    consecutive layers; when they do not divide evenly the first stages have one more
    shard    consecutive KV heads with the query heads that read them (again the first have one more: 9 heads in 3 groups on 2
             shards are 6 and 3), columns of the feed-forward part, rows of the head
    ends     the embedding is on all shards of the first stage, the last norm on all of the last

Heads of one KV head stay together, so that every KV head has one writer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from common.config import ParallelConfig
from common.engine.block_matrix import BlockMatrix, Weight
from common.engine.loader import ModelArchitecture
from common.engine.quantisation import GROUP
from common.errors import ConfigError
from common.types import KVLayout

Held = TypeVar("Held", torch.Tensor, Weight)
_UNIT = GROUP
"""Columns are divided in units of so many where there are enough: whole groups of 8-bit weights, whole panels."""


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's, in numbers of the whole model."""

    rank: int
    stage: int
    shard: int
    layers: range
    kv_heads: range
    heads: range
    ffn: range
    vocab: range  # of the head's outputs
    is_first: bool  # stage of the pipeline
    is_last: bool

    def has_whole_groups(self, head_dim: int) -> bool:
        """Whether all its inputs begin with a group of 8-bit weights."""
        return self.heads.start * head_dim % GROUP == 0 and self.ffn.start % GROUP == 0

    def architecture(self, whole: ModelArchitecture) -> ModelArchitecture:
        """The model that this rank builds. Its head, if any, is a tensor of its own."""
        return replace(
            whole,
            num_layers=len(self.layers),
            num_heads=len(self.heads),
            num_kv_heads=len(self.kv_heads),
            ffn_size=len(self.ffn),
            tie_embeddings=False,
            layer_windows=whole.layer_windows[self.layers.start : self.layers.stop],
        )

    def layout(self, whole: KVLayout) -> KVLayout:
        """Of its own blocks."""
        return replace(whole, num_layers=len(self.layers), num_kv_heads=len(self.kv_heads))

    def keep(self, whole: ModelArchitecture, name: str, tensor: Held) -> Mapping[str, Held]:
        """What this rank holds of a tensor of the model, under the names that its own model looks for."""
        if name == "model.embed_tokens.weight":
            kept = {name: tensor} if self.is_first else {}
            if self.is_last and whole.tie_embeddings:
                kept["lm_head.weight"] = _rows(tensor, self.vocab)
            return kept
        if name == "lm_head.weight":
            return {name: _rows(tensor, self.vocab)} if self.is_last else {}
        if name == "model.norm.weight":
            return {name: tensor} if self.is_last else {}
        prefix, index, rest = name.removeprefix("model.").split(".", 2)
        if int(index) not in self.layers:
            return {}
        return {f"model.{prefix}.{int(index) - self.layers.start}.{rest}": self._of_layer(whole, rest, tensor)}

    def _of_layer(self, whole: ModelArchitecture, name: str, tensor: Held) -> Held:
        def wide(heads: range) -> range:
            return range(heads.start * whole.head_dim, heads.stop * whole.head_dim)

        match name.split("."):
            case ["self_attn", "q_proj", _]:
                return _rows(tensor, wide(self.heads))
            case ["self_attn", "k_proj" | "v_proj", _]:
                return _rows(tensor, wide(self.kv_heads))
            case ["self_attn", "o_proj", "weight"]:
                return _columns(tensor, wide(self.heads))
            case ["self_attn", "o_proj", "bias"]:
                if self.shard == 0 or isinstance(tensor, BlockMatrix):  # a bias is a vector
                    return tensor
                return torch.zeros_like(tensor)  # it is added once
            case ["mlp", "gate_proj" | "up_proj", _]:
                return _rows(tensor, self.ffn)
            case ["mlp", "down_proj", _]:
                return _columns(tensor, self.ffn)
        return tensor  # norms


def shares_of(architecture: ModelArchitecture, parallel: ParallelConfig) -> tuple[Share, ...]:
    """By rank. Raises ConfigError if there is not something for every rank."""
    shards, stages = parallel.tensor_parallel, parallel.pipeline_parallel
    if stages > architecture.num_layers:
        raise ConfigError(f"{architecture.num_layers} layers do not fill {stages} stages", param="pipeline_parallel")
    if shards > architecture.num_kv_heads:
        raise ConfigError(
            f"the model has {architecture.num_kv_heads} KV heads: they cannot be divided by {shards}", param="tensor_parallel"
        )
    if shards > 1 and architecture.num_experts is not None:
        raise ConfigError("the layers of a mixture of experts are not divided, only its stages", param="tensor_parallel")
    if shards > min(architecture.ffn_size, architecture.vocab_size):
        raise ConfigError(f"the model is too narrow to be divided by {shards}", param="tensor_parallel")
    group = architecture.num_heads // architecture.num_kv_heads
    shares = []
    for stage in range(stages):
        for shard in range(shards):
            kv_heads = divide(architecture.num_kv_heads, shards, shard)
            shares.append(
                Share(
                    rank=stage * shards + shard,
                    stage=stage,
                    shard=shard,
                    layers=divide(architecture.num_layers, stages, stage),
                    kv_heads=kv_heads,
                    heads=range(kv_heads.start * group, kv_heads.stop * group),
                    ffn=_divide_columns(architecture.ffn_size, shards, shard),
                    vocab=_divide_columns(architecture.vocab_size, shards, shard),
                    is_first=stage == 0,
                    is_last=stage == stages - 1,
                )
            )
    return tuple(shares)


def divide(total: int, parts: int, index: int) -> range:
    """Part `index` of consecutive equal parts; the first ones have one more where it does not come out even."""
    fewest, longer = divmod(total, parts)
    first = index * fewest + min(index, longer)
    return range(first, first + fewest + (index < longer))


def _divide_columns(total: int, parts: int, index: int) -> range:
    if total < parts * _UNIT:
        return divide(total, parts, index)
    units = divide(-(-total // _UNIT), parts, index)
    return range(units.start * _UNIT, min(units.stop * _UNIT, total))


def _rows(tensor: Held, kept: range) -> Held:
    return tensor.rows(kept) if isinstance(tensor, BlockMatrix) else tensor[kept.start : kept.stop].clone()


def _columns(tensor: Held, kept: range) -> Held:
    return tensor.columns(kept) if isinstance(tensor, BlockMatrix) else tensor[:, kept.start : kept.stop].clone()
