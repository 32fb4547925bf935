"""Root-mean-square norm: squares are summed and rows scaled in fp32, whatever the rows' dtype."""

from __future__ import annotations

import torch


class RMSNorm:
    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        self._weight = weight
        self._epsilon = epsilon

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        wide = rows.float()
        scale = wide.square().mean(dim=-1, keepdim=True).add_(self._epsilon).rsqrt_()
        return (wide * scale).to(rows.dtype).mul_(self._weight)
