"""Exact numerics: every matrix product in one fixed tile shape.

    rows    | 0 ...... 15 | 16 ..... 31 | 32 . 36 0 0 0 |      exact_tile_rows = 16; the last tile is padded with zeros

A library's matrix product picks its kernel, its blocking and its order of summation by the shape of the call, so a row's last
bits depend on how many rows share it. With one shape there is one order. Where a row stands in its tile, and what its neighbours
are, does not matter: that is measured, not promised by any library.
"""

from __future__ import annotations

import torch

from common.engine.operations import Operations, TorchOperations
from common.engine.packed_matrix import Product, pack
from common.errors import ConfigError

_ROW_MULTIPLE = 8


class ExactNumerics:
    exact = True

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
