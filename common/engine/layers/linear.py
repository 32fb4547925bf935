"""Matrix products with weights in `[out, in]` layout; `Numerics` decides how they are carried out.

Where several processes divide a layer, a `Linear` has some of the outputs, and a `SummedLinear` some of the inputs of its matrix:
its result is the sum over the processes. So the one that reads heads or inner activations is always a `SummedLinear`.
"""

from __future__ import annotations

import torch

from common.engine.numerics import Numerics


class Linear:
    def __init__(self, numerics: Numerics, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._product = numerics.linear(weight, bias)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return self._product(rows)


class SummedLinear:
    def __init__(self, numerics: Numerics, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._product = numerics.summed_linear(weight, bias)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return self._product(rows)


class PlainLinear:
    """The same for a matrix that is never rounded, without a bias."""

    def __init__(self, numerics: Numerics, weight: torch.Tensor) -> None:
        self._product = numerics.plain_linear(weight)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return self._product(rows)
