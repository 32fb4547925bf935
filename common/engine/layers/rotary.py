"""Rotary position embedding in the Hugging Face layout: dimension i turns with dimension i + head_dim / 2.

Angles are computed once, for every position that the engine serves; rows are turned in fp32. Frequencies and angles are rounded
to fp32 as the implementations are that models are trained and published with. More exact angles are a different model: in fp64
they move SmolLM2's logits by 1e-3 at position 2,000, ten times what all other arithmetic does.
"""

from __future__ import annotations

import torch

from common.engine.loader import Llama3RopeScaling


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

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines for rows at these positions; once per step, for all layers."""
        return self.cosines.index_select(0, positions)[:, None], self.sines.index_select(0, positions)[:, None]

    @staticmethod
    def turn(heads: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Turns `[rows, heads, head_dim]`."""
        cosines, sines = angles
        first, second = heads.float().chunk(2, dim=-1)
        turned = torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)
        return turned.to(heads.dtype)
