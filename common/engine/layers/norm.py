"""Root-mean-square norms: squares are summed and rows scaled in fp32, whatever the rows' dtype.

`add` is what a decoder does between two of its parts: what one part gave is added to the rows, and the next part gets their norm.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


class RMSNorm:
    """Llama's: rows are rounded once they are scaled, and then multiplied by the weight."""

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        self._weight = weight
        self._epsilon = epsilon

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return _scaled(rows, self._epsilon).to(rows.dtype).mul_(self._weight)

    def add(
        self, rows: torch.Tensor, added: torch.Tensor, first: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Adds to `rows`, in place, and returns the norm of the sum; with `first`, what is added is the norm by that one."""
        return self(rows.add_(added if first is None else first(added)))


class OffsetRMSNorm:
    """Gemma's: the weight is stored as its distance from 1; rows are multiplied by it in fp32 and rounded once."""

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        self._scale = weight.float() + 1.0
        self._epsilon = epsilon

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return _scaled(rows, self._epsilon).mul_(self._scale).to(rows.dtype)

    def add(
        self, rows: torch.Tensor, added: torch.Tensor, first: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """As `RMSNorm.add`."""
        return self(rows.add_(added if first is None else first(added)))


def _scaled(rows: torch.Tensor, epsilon: float) -> torch.Tensor:
    wide = rows.float()
    scale = wide.square().mean(dim=-1, keepdim=True).add_(epsilon).rsqrt_()
    return wide * scale
