"""Exact numerics: every matrix product in one fixed tile shape.

    rows    | 0 ...... 15 | 16 ..... 31 | 32 . 36 0 0 0 |      exact_tile_rows = 16; the last tile is padded with zeros

A library's matrix product picks its kernel, its blocking and its order of summation by the shape of the call, so a row's last
bits depend on how many rows share it. With one shape there is one order. Where a row stands in its tile, and what its neighbours
are, does not matter: that is measured, not promised by any library.
"""

from __future__ import annotations

import math

import torch

from common.engine.packed_matrix import Product, pack
from common.errors import ConfigError

_ROW_MULTIPLE = 8
_GELU_SLOPE, _GELU_CUBE = math.sqrt(2.0 / math.pi), 0.044715  # gelu(x) ~ x / 2 * (1 + tanh(slope * (x + cube * x^3)))


class ExactNumerics:
    exact = True
    attention = "tiled"

    def __init__(self, tile_rows: int) -> None:
        if tile_rows % _ROW_MULTIPLE:
            raise ConfigError(
                f"exact_tile_rows must be a multiple of {_ROW_MULTIPLE}: libraries treat odd rows by another kernel",
                param="engine.exact_tile_rows",
            )
        self._tile_rows = tile_rows

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

    def gated_silu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """`gate / (1 + exp(-gate)) * up` step by step: torch's silu treats the ends of an array by another formula."""
        gate, up = gate_up.chunk(2, dim=-1)
        wide = gate.float()
        return (wide / torch.neg(wide).exp_().add_(1.0)).to(up.dtype).mul_(up)

    def gated_gelu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """As above: `(1 + tanh(z)) / 2` is `1 / (1 + exp(-2 z))`."""
        gate, up = gate_up.chunk(2, dim=-1)
        wide = gate.float()
        curve = (wide * wide).mul_(_GELU_CUBE).add_(1.0).mul_(wide).mul_(-2.0 * _GELU_SLOPE)
        return (wide / curve.exp_().add_(1.0)).to(up.dtype).mul_(up)
