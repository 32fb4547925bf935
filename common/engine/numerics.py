"""How the engine's arithmetic is carried out: a property of the runner that layers ask, not a case in any model.

    fast    shapes as they come; the last bits of a row depend on how many rows share the call
    exact   fixed shapes; a row's bits depend on that row alone (`common.engine.exact`)

A `Numerics` decides how matrix products are carried out, whose result could depend on a row's company, and it holds the
`Operations` for all else. Embedding and residual sums are the same code in all: correctly rounded elementwise operations.
"""

from __future__ import annotations

from typing import Protocol

import torch

from common.engine.operations import Operations, TorchOperations
from common.engine.packed_matrix import Product, pack


class Numerics(Protocol):
    @property
    def exact(self) -> bool:
        """Whether results are bitwise independent of batch, chunks and prefix hits."""
        ...

    @property
    def operations(self) -> Operations:
        """Norms, heads, activations, attention, draws: everything but matrix products."""
        ...

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """Prepares `rows [n, in] @ weight [out, in]^T + bias [out]`; called once per matrix, when the model is built."""
        ...


class FastNumerics:
    exact = False

    def __init__(self, operations: Operations | None = None) -> None:
        """With torch's operations, unless others are given."""
        self.operations = TorchOperations.fast() if operations is None else operations

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        return pack(weight, bias)
