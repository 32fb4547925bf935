"""Qwen 3, dense and as a mixture of experts: Llama's layers, with a norm over each head of queries and keys before they are
turned.

rows = embedding(tokens)
per layer:  rows += output(attention(rope(norm(q)), rope(norm(k)), v))        of norm(rows); keys and values go to the pool
            rows += mlp(norm(rows)), or mixture(norm(rows))
hidden = norm(rows)
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from common.engine.attention import AttentionPlan
from common.engine.kv_pool import KVPool
from common.engine.layers.gated_mlp import GatedMLP
from common.engine.layers.linear import Linear, SummedLinear
from common.engine.layers.mixture import Mixture
from common.engine.layers.rotary import Angles
from common.engine.loader import ModelArchitecture
from common.engine.models.llama import LlamaModel
from common.engine.numerics import Numerics
from common.engine.operations import Norm


class Qwen3Layer:
    def __init__(self, index: int, architecture: ModelArchitecture, weights: dict[str, torch.Tensor], numerics: Numerics) -> None:
        def take(name: str) -> torch.Tensor:
            return weights.pop(f"model.layers.{index}.{name}")

        def norm(name: str) -> Norm:
            return numerics.operations.rms_norm(take(f"{name}.weight"), architecture.rms_norm_eps)

        def feed_forward(part: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            return take(f"{part}.gate_proj.weight"), take(f"{part}.up_proj.weight"), take(f"{part}.down_proj.weight")

        projections = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        biased = architecture.attention_bias
        self._operations = numerics.operations
        self._index = index
        self._num_heads = architecture.num_heads
        self._num_kv_heads = architecture.num_kv_heads
        self._head_dim = architecture.head_dim
        self._attention_norm = norm("input_layernorm")
        self._qkv = Linear(
            numerics,
            torch.cat([take(f"{name}.weight") for name in projections]),
            torch.cat([take(f"{name}.bias") for name in projections]) if biased else None,
        )
        self._head_norms = norm("self_attn.q_norm"), norm("self_attn.k_norm")
        self._output = SummedLinear(numerics, take("self_attn.o_proj.weight"), take("self_attn.o_proj.bias") if biased else None)
        self._mlp_norm = norm("post_attention_layernorm")
        self._mlp: Callable[[torch.Tensor], torch.Tensor]
        if architecture.num_experts is None or architecture.experts_per_token is None:
            self._mlp = GatedMLP(numerics, numerics.operations.gated_silu, *feed_forward("mlp"))
        else:
            self._mlp = Mixture(
                numerics,
                take("mlp.gate.weight"),
                [feed_forward(f"mlp.experts.{expert}") for expert in range(architecture.num_experts)],
                architecture.experts_per_token,
                normalise=architecture.normalise_routing,
            )

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
        queries = self._operations.turn_and_store(
            heads, self._num_heads, angles, pool, self._index, write_index, self._head_norms
        )
        attended = attention.attend(self._index, queries)
        return self._output(attended.reshape(len(rows), -1))


class Qwen3Model(LlamaModel):
    def __init__(
        self,
        architecture: ModelArchitecture,
        weights: dict[str, torch.Tensor],
        numerics: Numerics,
        max_model_tokens: int,
    ) -> None:
        super().__init__(architecture, weights, numerics, max_model_tokens, Qwen3Layer)
