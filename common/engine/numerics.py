"""How the engine's arithmetic is carried out: a property of the runner that layers ask, not a case in any model.

    fast    shapes as they come; the last bits of a row depend on how many rows share the call
    exact   fixed shapes; a row's bits depend on that row alone (`common.engine.exact`)

A `Numerics` decides how matrix products are carried out, whose result could depend on a row's company, and it holds the
`Operations` for all else. Embedding and residual sums are the same code in all: correctly rounded elementwise operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from common.engine.operations import Operations, TorchOperations
from common.engine.packed_matrix import Product, pack
from common.engine.quantisation import WeightFormat

ExpertsProduct = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""`(rows [n, hidden], expert ids [n, k], their weights [n, k]) -> [n, hidden]`: the sum of the k weighted answers of a row."""


class Numerics(Protocol):
    @property
    def exact(self) -> bool:
        """Whether results are bitwise independent of batch, chunks and prefix hits."""
        ...

    @property
    def weight_format(self) -> WeightFormat:
        """What `linear` makes of a matrix by itself; weights in another format are rounded before."""
        ...

    @property
    def operations(self) -> Operations:
        """Norms, heads, activations, attention, draws: everything but matrix products."""
        ...

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """Prepares `rows [n, in] @ weight [out, in]^T + bias [out]`; called once per matrix, when the model is built."""
        ...

    def summed_linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """The same for a matrix of whose inputs this process may hold only some: the result is the sum over all that do."""
        ...

    def plain_linear(self, weight: torch.Tensor) -> Product:
        """As `linear`, for a matrix that stays in the model's own type whatever the others are held in: what gives logits, and
        what chooses experts."""
        ...

    def experts(self, gate_up: torch.Tensor, down: torch.Tensor) -> ExpertsProduct:
        """Prepares the experts of a layer: `gate_up` [experts, 2 * ffn, hidden], `down` [experts, hidden, ffn]."""
        ...


class FastNumerics:
    exact = False
    weight_format = WeightFormat.MODEL

    def __init__(self, operations: Operations | None = None) -> None:
        """With torch's operations, unless others are given."""
        self.operations = TorchOperations.fast() if operations is None else operations

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        return pack(weight, bias)

    def summed_linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        return self.linear(weight, bias)

    def plain_linear(self, weight: torch.Tensor) -> Product:
        return pack(weight, None)

    def experts(self, gate_up: torch.Tensor, down: torch.Tensor) -> ExpertsProduct:
        return experts_in_turn(self, gate_up, down)


def experts_in_turn(numerics: Numerics, gate_up: torch.Tensor, down: torch.Tensor) -> ExpertsProduct:
    """Each expert computes the rows that chose it; a row's answers are added up in the order of its choice, whoever else is
    there. Looks on the host who was chosen, so it is for CPUs, and for GPUs only where nothing better is to be had."""
    products = [
        (numerics.linear(first, None), numerics.linear(second, None)) for first, second in zip(gate_up, down, strict=True)
    ]

    def compute(rows: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        answers = rows.new_empty(*expert_ids.shape, rows.shape[1])
        for expert in expert_ids.unique().tolist():
            row, place = (expert_ids == expert).nonzero(as_tuple=True)
            first, second = products[expert]
            answers[row, place] = second(numerics.operations.gated_silu(first(rows[row])))
        return weighted_sum(answers, weights)

    return compute


def weighted_sum(answers: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`[n, k, hidden]` times `[n, k]`, added up place after place in fp32: elementwise, so a row's bits are its own."""
    total = answers[:, 0].float() * weights[:, 0, None]
    for place in range(1, answers.shape[1]):
        total.add_(answers[:, place].float() * weights[:, place, None])
    return total.to(answers.dtype)
