"""The feed-forward part: `down(activation(gate(x)) * up(x))`, gate and up as one matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch

from common.engine.layers.linear import Linear, SummedLinear
from common.engine.numerics import Numerics


class GatedMLP:
    def __init__(
        self,
        numerics: Numerics,
        gated: Callable[[torch.Tensor], torch.Tensor],  # one of those of `numerics`
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
    ) -> None:
        self._gated = gated
        self._gate_up = Linear(numerics, torch.cat((gate, up)))
        self._down = SummedLinear(numerics, down)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return self._down(self._gated(self._gate_up(rows)))
