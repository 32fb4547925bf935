"""How the engine's arithmetic is carried out: a property of the runner that layers ask, not a case in any model.

    fast    shapes as they come; the last bits of a row depend on how many rows share the call
    exact   fixed shapes; a row's bits depend on that row alone (`common.engine.exact`)

A `Numerics` decides the operations whose result could depend on a row's company: matrix products, the activation, and, by
naming an attention backend, attention. What is left (embedding, norms, rotary embedding, residual sums) is the same code in
both: per-row reductions over a fixed width and correctly rounded elementwise operations, which tests hold to bitwise equality.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from common.engine.packed_matrix import Product, pack


class Numerics(Protocol):
    @property
    def exact(self) -> bool:
        """Whether results are bitwise independent of batch, chunks and prefix hits."""
        ...

    @property
    def attention(self) -> str:
        """The attention backend that goes with it (`common.engine.attention`)."""
        ...

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """Prepares `rows [n, in] @ weight [out, in]^T + bias [out]`; called once per matrix, when the model is built."""
        ...

    def gated_silu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """`silu(gate) * up` of rows `[n, gate | up]`."""
        ...

    def gated_gelu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """`gelu(gate) * up` of rows `[n, gate | up]`, gelu in its approximation by tanh."""
        ...


class FastNumerics:
    exact = False
    attention = "fast"

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        return pack(weight, bias)

    def gated_silu(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def gated_gelu(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh").mul_(up)
