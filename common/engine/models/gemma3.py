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
from common.engine.layers.linear import Linear
from common.engine.layers.rotary import RotaryEmbedding
from common.engine.loader import ModelArchitecture
from common.engine.numerics import Numerics
from common.engine.step_input import StepInput

Angles = tuple[torch.Tensor, torch.Tensor]


class Gemma3Norm:
    """Rows are scaled by the weight in fp32 and rounded once."""

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        self._scale = weight.float() + 1.0
        self._epsilon = epsilon

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        wide = rows.float()
        scale = wide.square().mean(dim=-1, keepdim=True).add_(self._epsilon).rsqrt_()
        return (wide * scale).mul_(self._scale).to(rows.dtype)


class Gemma3Layer:
    def __init__(self, index: int, architecture: ModelArchitecture, weights: dict[str, torch.Tensor], numerics: Numerics) -> None:
        def take(name: str) -> torch.Tensor:
            return weights.pop(f"model.layers.{index}.{name}.weight")

        def norm(name: str) -> Gemma3Norm:
            return Gemma3Norm(take(name), architecture.rms_norm_eps)

        self._index = index
        self._num_heads = architecture.num_heads
        self._num_kv_heads = architecture.num_kv_heads
        self._head_dim = architecture.head_dim
        self.window = architecture.layer_windows[index]
        self._attention_norm = norm("input_layernorm")
        self._qkv = Linear(numerics, torch.cat([take(f"self_attn.{name}") for name in ("q_proj", "k_proj", "v_proj")]))
        self._query_norm, self._key_norm = norm("self_attn.q_norm"), norm("self_attn.k_norm")
        self._output = Linear(numerics, take("self_attn.o_proj"))
        self._attended_norm = norm("post_attention_layernorm")
        self._mlp_norm = norm("pre_feedforward_layernorm")
        self._mlp = GatedMLP(numerics, numerics.gated_gelu, take("mlp.gate_proj"), take("mlp.up_proj"), take("mlp.down_proj"))
        self._fed_norm = norm("post_feedforward_layernorm")

    def __call__(
        self, rows: torch.Tensor, angles: Angles, write_index: torch.Tensor, pool: KVPool, attention: AttentionPlan
    ) -> torch.Tensor:
        rows = rows + self._attended_norm(self._attend(self._attention_norm(rows), angles, write_index, pool, attention))
        return rows.add_(self._fed_norm(self._mlp(self._mlp_norm(rows))))

    def _attend(
        self, rows: torch.Tensor, angles: Angles, write_index: torch.Tensor, pool: KVPool, attention: AttentionPlan
    ) -> torch.Tensor:
        heads = self._qkv(rows).view(len(rows), self._num_heads + 2 * self._num_kv_heads, self._head_dim)
        turning = self._num_heads + self._num_kv_heads
        queries, keys, values = heads[:, : self._num_heads], heads[:, self._num_heads : turning], heads[:, turning:]
        pool.write(self._index, write_index, RotaryEmbedding.turn(self._key_norm(keys), angles), values)
        attended = attention.attend(self._index, RotaryEmbedding.turn(self._query_norm(queries), angles), self.window)
        return self._output(attended.reshape(len(rows), -1))


class Gemma3Model:
    def __init__(
        self,
        architecture: ModelArchitecture,
        weights: dict[str, torch.Tensor],
        numerics: Numerics,
        max_model_tokens: int,
    ) -> None:
        self._embedding = weights.pop("model.embed_tokens.weight")
        self._embedding_scale = torch.tensor(architecture.hidden_size**0.5, dtype=self._embedding.dtype)  # rounded as rows are

        def rotary(theta: float) -> RotaryEmbedding:
            return RotaryEmbedding(
                architecture.head_dim, theta, architecture.rope_scaling, max_model_tokens, self._embedding.device
            )

        self._global_rotary = rotary(architecture.rope_theta)
        self._local_rotary = rotary(architecture.local_rope_theta or architecture.rope_theta)
        self._layers = [Gemma3Layer(index, architecture, weights, numerics) for index in range(architecture.num_layers)]
        self._norm = Gemma3Norm(weights.pop("model.norm.weight"), architecture.rms_norm_eps)
        self._head = Linear(numerics, self._embedding if architecture.tie_embeddings else weights.pop("lm_head.weight"))

    def forward(
        self,
        step: StepInput,
        pool: KVPool,
        attention: AttentionBackend,
        layer_done: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        rows = F.embedding(step.token_ids, self._embedding) * self._embedding_scale
        local_angles = self._local_rotary.angles(step.positions)
        global_angles = self._global_rotary.angles(step.positions)
        write_index = pool.write_index(step.slots)
        plan = attention.plan(step.block_tables, step.spans)
        for number, layer in enumerate(self._layers, start=1):
            rows = layer(rows, local_angles if layer.window else global_angles, write_index, pool, plan)
            if layer_done is not None:
                layer_done(number)
        return rows

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head(self._norm(hidden)).float()
