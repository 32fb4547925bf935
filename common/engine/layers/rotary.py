"""Rotary position embedding in the Hugging Face layout: dimension i turns with dimension i + head_dim / 2.

Angles are computed once, for every position that the engine serves; rows are turned in fp32. Frequencies and angles are rounded
to fp32 as the implementations are that models are trained and published with. More exact angles are a different model: in fp64
they move SmolLM2's logits by 1e-3 at position 2,000, ten times what all other arithmetic does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from common.engine.kv_pool import KVPool
from common.engine.loader import Llama3RopeScaling

Angles = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of rows, each [rows, 1, head_dim / 2], fp32."""
HeadNorms = tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]


class RotaryEmbedding:
    def __init__(
        self,
        head_dim: int,
        theta: float,
        scaling: Llama3RopeScaling | None,
        num_positions: int,
        device: torch.device,
    ) -> None:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        frequencies = 1.0 / theta**exponents
        if scaling is not None:
            frequencies = torch.tensor([frequency / scaling.slowdown(frequency) for frequency in frequencies.tolist()])
        angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
        self.cosines = angles.cos().to(device)  # [positions, head_dim / 2]
        self.sines = angles.sin().to(device)

    def angles(self, positions: torch.Tensor) -> Angles:
        """Cosines and sines for rows at these positions; once per step, for all layers."""
        return self.cosines.index_select(0, positions)[:, None], self.sines.index_select(0, positions)[:, None]

    @staticmethod
    def turn(heads: torch.Tensor, angles: Angles) -> torch.Tensor:
        """Turns `[rows, heads, head_dim]`."""
        cosines, sines = angles
        first, second = heads.float().chunk(2, dim=-1)
        turned = torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)
        return turned.to(heads.dtype)


def turn_and_store(
    heads: torch.Tensor,
    num_heads: int,
    angles: Angles,
    pool: KVPool,
    layer: int,
    write_index: torch.Tensor,
    norms: HeadNorms | None = None,
) -> torch.Tensor:
    """Of heads `[rows, queries | keys | values, head_dim]`, norms (if there are any: of queries, of keys) and turns queries and
    keys, stores keys and values at a `KVPool.write_index`, and returns the queries."""
    num_kv_heads = (heads.shape[1] - num_heads) // 2
    values = heads[:, num_heads + num_kv_heads :]
    if norms is None:
        turned = RotaryEmbedding.turn(heads[:, : num_heads + num_kv_heads], angles)
        queries, keys = turned[:, :num_heads], turned[:, num_heads:]
    else:
        query_norm, key_norm = norms
        keys = RotaryEmbedding.turn(key_norm(heads[:, num_heads : num_heads + num_kv_heads]), angles)
        queries = RotaryEmbedding.turn(query_norm(heads[:, :num_heads]), angles)
    pool.write(layer, write_index, keys, values)
    return queries
