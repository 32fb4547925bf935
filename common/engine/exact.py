"""Exact numerics: every matrix product in one fixed tile shape.

    rows    | 0 ...... 15 | 16 ..... 31 | 32 . 36 0 0 0 |      exact_tile_rows = 16; the last tile is padded with zeros

A library's matrix product picks its kernel, its blocking and its order of summation by the shape of the call, so a row's last
bits depend on how many rows share it. With one shape there is one order. Where a row stands in its tile, and what its neighbours
are, does not matter: that is measured, not promised by any library. On a GPU the product is a kernel of ours, in which it follows
from the order of summation (`triton_kernels.gemm_exact`), and `exact_tile_rows` says nothing.
"""

from __future__ import annotations

import torch

from common.engine.numerics import ExpertsProduct, experts_in_turn
from common.engine.operations import Operations, TorchOperations
from common.engine.packed_matrix import Product, pack
from common.engine.quantisation import WeightFormat
from common.errors import ConfigError

_ROW_MULTIPLE = 8


class ExactNumerics:
    exact = True
    weight_format = WeightFormat.MODEL

    def __init__(self, tile_rows: int, operations: Operations | None = None) -> None:
        """With torch's operations, unless others are given; they must not let a row's bits depend on its batch."""
        if tile_rows % _ROW_MULTIPLE:
            raise ConfigError(
                f"exact_tile_rows must be a multiple of {_ROW_MULTIPLE}: libraries treat odd rows by another kernel",
                param="engine.exact_tile_rows",
            )
        self._tile_rows = tile_rows
        self.operations = TorchOperations.exact() if operations is None else operations

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        if weight.device.type == "cuda":
            from common.engine.triton_kernels.gemm_exact import exact_linear

            return lambda rows: exact_linear(rows, weight, bias)
        product, num_outputs = pack(weight, bias), weight.shape[0]

        def tiled(rows: torch.Tensor) -> torch.Tensor:
            count, tile = len(rows), self._tile_rows
            padded = -(-count // tile) * tile
            source = rows
            if padded != count or not rows.is_contiguous():
                source = rows.new_zeros(padded, rows.shape[1])
                source[:count] = rows
            output = rows.new_empty(padded, num_outputs)
            for start in range(0, padded, tile):
                output[start : start + tile] = product(source[start : start + tile])
            return output[:count]

        return tiled

    def summed_linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        return self.linear(weight, bias)

    def plain_linear(self, weight: torch.Tensor) -> Product:
        return self.linear(weight, None)

    def experts(self, gate_up: torch.Tensor, down: torch.Tensor) -> ExpertsProduct:
        return experts_in_turn(self, gate_up, down)
