"""The Llama family: Llama 2 and 3, SmolLM2, Mistral without a sliding window, TinyLlama.

rows = embedding(tokens)
per layer:  rows += output(attention(rope(qkv(norm(rows)))))        keys and values go to the pool on the way
            rows += mlp(norm(rows))
hidden = norm(rows)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F

from common.engine.attention import AttentionBackend, AttentionPlan
from common.engine.kv_pool import KVPool
from common.engine.layers.gated_mlp import GatedMLP
from common.engine.layers.linear import Linear, PlainLinear, SummedLinear
from common.engine.layers.rotary import Angles, RotaryEmbedding
from common.engine.loader import ModelArchitecture
from common.engine.models.ends import ModelEnds, present
from common.engine.numerics import Numerics
from common.engine.step_input import StepInput


class LlamaLayer:
    def __init__(self, index: int, architecture: ModelArchitecture, weights: dict[str, torch.Tensor], numerics: Numerics) -> None:
        def take(name: str) -> torch.Tensor:
            return weights.pop(f"model.layers.{index}.{name}")

        def take_bias(name: str) -> torch.Tensor | None:
            return take(name) if architecture.attention_bias else None

        projections = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        biases = [bias for name in projections if (bias := take_bias(f"{name}.bias")) is not None]
        self._operations = numerics.operations
        self._index = index
        self._num_heads = architecture.num_heads
        self._num_kv_heads = architecture.num_kv_heads
        self._head_dim = architecture.head_dim
        self._attention_norm = self._operations.rms_norm(take("input_layernorm.weight"), architecture.rms_norm_eps)
        self._qkv = Linear(
            numerics, torch.cat([take(f"{name}.weight") for name in projections]), torch.cat(biases) if biases else None
        )
        self._output = SummedLinear(numerics, take("self_attn.o_proj.weight"), take_bias("self_attn.o_proj.bias"))
        self._mlp_norm = self._operations.rms_norm(take("post_attention_layernorm.weight"), architecture.rms_norm_eps)
        feed_forward = [take(f"mlp.{name}.weight") for name in ("gate_proj", "up_proj", "down_proj")]
        self._mlp = GatedMLP(numerics, numerics.operations.gated_silu, *feed_forward)

    def __call__(
        self, rows: torch.Tensor, angles: Angles, write_index: torch.Tensor, pool: KVPool, attention: AttentionPlan
    ) -> torch.Tensor:
        """Changes `rows`."""
        attended = self._attend(self._attention_norm(rows), angles, write_index, pool, attention)
        return rows.add_(self._mlp(self._mlp_norm.add(rows, attended)))

    def _attend(
        self, rows: torch.Tensor, angles: Angles, write_index: torch.Tensor, pool: KVPool, attention: AttentionPlan
    ) -> torch.Tensor:
        heads = self._qkv(rows).view(len(rows), self._num_heads + 2 * self._num_kv_heads, self._head_dim)
        queries = self._operations.turn_and_store(heads, self._num_heads, angles, pool, self._index, write_index)
        attended = attention.attend(self._index, queries)
        return self._output(attended.reshape(len(rows), -1))


class DecoderLayer(Protocol):
    def __call__(
        self, rows: torch.Tensor, angles: Angles, write_index: torch.Tensor, pool: KVPool, attention: AttentionPlan
    ) -> torch.Tensor:
        """Changes `rows`."""
        ...


MakeLayer = Callable[[int, ModelArchitecture, dict[str, torch.Tensor], Numerics], DecoderLayer]


class LlamaModel:
    def __init__(
        self,
        architecture: ModelArchitecture,
        weights: dict[str, torch.Tensor],
        numerics: Numerics,
        max_model_tokens: int,
        layer: MakeLayer | None = None,
    ) -> None:
        """`layer` makes the layers of a family that differs in nothing else."""
        make_layer = layer or LlamaLayer
        ends = ModelEnds.take(architecture, weights)
        self._embedding = ends.embedding
        self._rotary = RotaryEmbedding(
            architecture.head_dim,
            architecture.rope_theta,
            architecture.rope_scaling,
            max_model_tokens,
            ends.device,
        )
        self._layers = [make_layer(index, architecture, weights, numerics) for index in range(architecture.num_layers)]
        self._norm = None if ends.norm is None else numerics.operations.rms_norm(ends.norm, architecture.rms_norm_eps)
        self._head = None if ends.head is None else PlainLinear(numerics, ends.head)

    def forward(
        self,
        step: StepInput,
        pool: KVPool,
        attention: AttentionBackend,
        layer_done: Callable[[int], None] | None = None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if rows is None:
            rows = F.embedding(step.tensors.token_ids, present(self._embedding))
        angles = self._rotary.angles(step.tensors.positions)
        write_index = pool.write_index(step.tensors.slots)
        plan = attention.plan(step.tensors.block_tables, step.spans)
        for number, layer in enumerate(self._layers, start=1):
            rows = layer(rows, angles, write_index, pool, plan)
            if layer_done is not None:
                layer_done(number)
        return rows

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        # The last norm is per row as well: rows that need no logits do not pay for it.
        return present(self._head)(present(self._norm)(hidden)).float()
