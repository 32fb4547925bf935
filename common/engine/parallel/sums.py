"""The sum over the shards of a stage: everybody gets all partial sums and adds them in the order of the shards.

    shard 0   p0 ----->  p0 + p1 + p2        fp32, from left to right, the same on every shard
    shard 1   p1 ----->  p0 + p1 + p2
    shard 2   p2 ----->  p0 + p1 + p2

One order, whatever the number of rows: a row's sum does not depend on its batch. With few shards, as there are KV heads, sending
all to all costs no more steps than any other way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from common.engine.numerics import ExpertsProduct, Numerics
from common.engine.packed_matrix import Product
from common.engine.parallel.links import Link, swap


class Sum(Protocol):
    """Adds up what the shards of a stage have. A collective: all of them call it, in the same order, with equal shapes."""

    def __call__(self, partial: torch.Tensor) -> torch.Tensor: ...


class SocketSum:
    def __init__(self, shard: int, others: Sequence[Link]) -> None:
        """`others` are the links to the other shards, in their order."""
        self._shard = shard
        self._others = tuple(others)

    def __call__(self, partial: torch.Tensor) -> torch.Tensor:
        mine = partial.contiguous()
        theirs = [torch.empty_like(mine) for _ in self._others]
        into = {link: as_bytes(tensor) for link, tensor in zip(self._others, theirs, strict=True)}
        swap(self._others, as_bytes(mine), into)
        theirs.insert(self._shard, mine)
        return add_in_order(theirs, partial.dtype)


def add_in_order(parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Their sum from left to right, in fp32, rounded once."""
    total = parts[0].float()
    if total is parts[0]:
        total = total.clone()  # of fp32, `float` is no copy
    for part in parts[1:]:
        total.add_(part)
    return total.to(dtype)


class SharedNumerics:
    """The arithmetic of one shard: as `base` does it, and sums over all."""

    def __init__(self, base: Numerics, add_up: Sum) -> None:
        self.exact = base.exact
        self.weight_format = base.weight_format
        self.operations = base.operations
        self._base = base
        self._add_up = add_up

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        return self._base.linear(weight, bias)

    def summed_linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        partial = self._base.linear(weight, bias)
        return lambda rows: self._add_up(partial(rows))

    def plain_linear(self, weight: torch.Tensor) -> Product:
        return self._base.plain_linear(weight)

    def experts(self, gate_up: torch.Tensor, down: torch.Tensor) -> ExpertsProduct:
        return self._base.experts(gate_up, down)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Of a contiguous tensor on the CPU; shares its memory."""
    flat: npt.NDArray[np.uint8] = tensor.detach().view(-1).view(torch.uint8).numpy()
    return flat.data
