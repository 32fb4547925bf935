"""Numerics of a GPU: cuBLAS for matrices in their own type, kernels of ours for those of 8 and 4 bits and for experts.

What it decides is fixed by shapes, so a step can be captured.
"""

from __future__ import annotations

import torch

from common.engine.numerics import ExpertsProduct, FastNumerics
from common.engine.operations import Operations
from common.engine.packed_matrix import Product
from common.engine.quantisation import WeightFormat, rounded_matrix
from common.engine.triton_kernels.products import experts_product, rounded_product


class GpuNumerics(FastNumerics):
    def __init__(self, weight_format: WeightFormat, operations: Operations) -> None:
        super().__init__(operations)
        self.weight_format = weight_format

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        return rounded_product(weight, bias, self.weight_format)

    def experts(self, gate_up: torch.Tensor, down: torch.Tensor) -> ExpertsProduct:
        """In the model's type: rounded, where weights are to be rounded, and then held as floats."""
        if self.weight_format is not WeightFormat.MODEL:
            for matrices in (gate_up, down):
                for expert in matrices:
                    expert.copy_(rounded_matrix(expert, self.weight_format))
        return experts_product(gate_up, down)
