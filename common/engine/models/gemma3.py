"""Gemma 3, text only: most layers see a window of the last tokens, every sixth sees all.

rows = embedding(tokens) * sqrt(hidden)
per layer:  rows += norm(output(attention(rope(norm(q), norm(k)), v)))        of norm(rows); keys and values go to the pool
            rows += norm(mlp(norm(rows)))
hidden = norm(rows)

Each kind of layer turns by its own rotary base. The weights of norms are stored as their distance from 1. All layers keep keys
and values of all tokens, the windowed ones as well: one layout for cache and hand-off, paid for with memory.
"""

from __future__ import annotations

from collections.abc import Callable

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
from common.engine.operations import Norm
from common.engine.step_input import StepInput


class Gemma3Layer:
    def __init__(self, index: int, architecture: ModelArchitecture, weights: dict[str, torch.Tensor], numerics: Numerics) -> None:
        def take(name: str) -> torch.Tensor:
            return weights.pop(f"model.layers.{index}.{name}.weight")

        def norm(name: str) -> Norm:
            return numerics.operations.offset_rms_norm(take(name), architecture.rms_norm_eps)

        self._operations = numerics.operations
        self._index = index
        self._num_heads = architecture.num_heads
        self._num_kv_heads = architecture.num_kv_heads
        self._head_dim = architecture.head_dim
        self.window = architecture.layer_windows[index]
        self._attention_norm = norm("input_layernorm")
        self._qkv = Linear(numerics, torch.cat([take(f"self_attn.{name}") for name in ("q_proj", "k_proj", "v_proj")]))
        self._head_norms = norm("self_attn.q_norm"), norm("self_attn.k_norm")
        self._output = SummedLinear(numerics, take("self_attn.o_proj"))
        self._attended_norm = norm("post_attention_layernorm")
        self._mlp_norm = norm("pre_feedforward_layernorm")
        self._mlp = GatedMLP(
            numerics, numerics.operations.gated_gelu, take("mlp.gate_proj"), take("mlp.up_proj"), take("mlp.down_proj")
        )
        self._fed_norm = norm("post_feedforward_layernorm")

    def __call__(
        self, rows: torch.Tensor, angles: Angles, write_index: torch.Tensor, pool: KVPool, attention: AttentionPlan
    ) -> torch.Tensor:
        """Changes `rows`."""
        attended = self._attend(self._attention_norm(rows), angles, write_index, pool, attention)
        return rows.add_(self._fed_norm(self._mlp(self._mlp_norm.add(rows, attended, self._attended_norm))))

    def _attend(
        self, rows: torch.Tensor, angles: Angles, write_index: torch.Tensor, pool: KVPool, attention: AttentionPlan
    ) -> torch.Tensor:
        heads = self._qkv(rows).view(len(rows), self._num_heads + 2 * self._num_kv_heads, self._head_dim)
        queries = self._operations.turn_and_store(
            heads, self._num_heads, angles, pool, self._index, write_index, self._head_norms
        )
        attended = attention.attend(self._index, queries, self.window)
        return self._output(attended.reshape(len(rows), -1))


class Gemma3Model:
    def __init__(
        self,
        architecture: ModelArchitecture,
        weights: dict[str, torch.Tensor],
        numerics: Numerics,
        max_model_tokens: int,
    ) -> None:
        ends = ModelEnds.take(architecture, weights)
        self._embedding = ends.embedding
        self._embedding_scale = torch.tensor(architecture.hidden_size**0.5, dtype=ends.dtype)  # rounded as rows are

        def rotary(theta: float) -> RotaryEmbedding:
            return RotaryEmbedding(architecture.head_dim, theta, architecture.rope_scaling, max_model_tokens, ends.device)

        self._global_rotary = rotary(architecture.rope_theta)
        self._local_rotary = rotary(architecture.local_rope_theta or architecture.rope_theta)
        self._layers = [Gemma3Layer(index, architecture, weights, numerics) for index in range(architecture.num_layers)]
        self._norm = None if ends.norm is None else numerics.operations.offset_rms_norm(ends.norm, architecture.rms_norm_eps)
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
            rows = F.embedding(step.tensors.token_ids, present(self._embedding)) * self._embedding_scale
        local_angles = self._local_rotary.angles(step.tensors.positions)
        global_angles = self._global_rotary.angles(step.tensors.positions)
        write_index = pool.write_index(step.tensors.slots)
        plan = attention.plan(step.tensors.block_tables, step.spans)
        for number, layer in enumerate(self._layers, start=1):
            rows = layer(rows, local_angles if layer.window else global_angles, write_index, pool, plan)
            if layer_done is not None:
                layer_done(number)
        return rows

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return present(self._head)(present(self._norm)(hidden)).float()
