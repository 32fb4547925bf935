"""Weight matrices in blocks of 32 inputs with a scale each, held as the bytes of a GGUF file hold them.

    kind        a block's bytes                                                        weight
    Q8          scale | 32 bytes, signed                                                scale * byte
    Q4          scale | 16 bytes: inputs 0-15 in the low halves, 16-31 in the high      scale * (half - 8)
    Q4_MINIMA   scale | minimum | likewise                                              scale * half + minimum

Scales and minima are in half precision. Such a matrix comes from a file, where it is a view of the mapped bytes, or is made of
other weights (`rounded`, which is what `engine.weights: int4` is on a CPU). Rows are outputs, so they are taken, joined and put
in another order without a look into them; columns are taken by whole blocks.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from common.errors import EngineFailure

BLOCK = 32
_SHRINKS = (1.0, 0.95, 0.9, 0.85)
"""Of a block's range: a few values at the ends may be cut off if the others gain more by it."""


_ROUNDED_AT_ONCE = 1 << 18
"""Weights."""


class BlockKind(enum.Enum):
    Q8 = "Q8_0"
    Q4 = "Q4_0"
    Q4_MINIMA = "Q4_1"

    @property
    def bits(self) -> int:
        return 8 if self is BlockKind.Q8 else 4

    @property
    def head_bytes(self) -> int:
        """Scale, and minimum if there is one."""
        return 4 if self is BlockKind.Q4_MINIMA else 2

    @property
    def block_bytes(self) -> int:
        return self.head_bytes + BLOCK * self.bits // 8


@dataclass(frozen=True, slots=True)
class BlockMatrix:
    kind: BlockKind
    blocks: torch.Tensor  # uint8 [outputs, bytes of all blocks of an output]
    num_inputs: int

    @classmethod
    def rounded(cls, matrix: torch.Tensor) -> BlockMatrix:
        """[outputs, inputs] in 4 bits with minima; of a few ranges for each block, the one with the least squared error. Some
        rows at a time, for what it takes on the way is many times the result."""
        at_once = max(1, _ROUNDED_AT_ONCE // max(matrix.shape[1], 1))
        return cls.joined([cls._rounded_rows(rows) for rows in matrix.split(at_once)])

    @classmethod
    def _rounded_rows(cls, matrix: torch.Tensor) -> BlockMatrix:
        values = F.pad(matrix.float(), (0, -matrix.shape[1] % BLOCK)).view(-1, BLOCK)
        lowest, highest = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
        best = torch.full_like(lowest, torch.inf)
        halves = torch.empty_like(values)
        heads = torch.empty(len(values), 2, dtype=torch.float16)
        for shrink in _SHRINKS:
            cut = (highest - lowest) * ((1 - shrink) / 2)
            minima = (lowest + cut).half()
            scales = ((highest - lowest) * (shrink / 15)).half()
            inverse = torch.where(scales > 0, 1 / scales.float(), torch.zeros_like(lowest))
            rounded = ((values - minima.float()) * inverse).round().clamp(0, 15)
            error = (rounded * scales.float() + minima.float() - values).square().sum(dim=1, keepdim=True)
            better = error < best
            best = torch.where(better, error, best)
            halves = torch.where(better, rounded, halves)
            heads = torch.where(better, torch.cat((scales, minima), dim=1), heads)
        if not torch.isfinite(best).all():
            raise EngineFailure("weights that are not finite, or too large for half precision, cannot be held in 4 bits")
        words = halves.to(torch.uint8)
        packed = torch.cat((heads.contiguous().view(torch.uint8), words[:, :16] | words[:, 16:] << 4), dim=1)
        return cls(BlockKind.Q4_MINIMA, packed.view(len(matrix), -1), matrix.shape[1])

    @classmethod
    def joined(cls, parts: Sequence[BlockMatrix]) -> BlockMatrix:
        """One below the other. They have to be of one kind."""
        return replace(parts[0], blocks=torch.cat([part.blocks for part in parts]))

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.blocks), self.num_inputs

    @property
    def num_blocks(self) -> int:
        """Of a row."""
        return self.blocks.shape[1] // self.kind.block_bytes

    def rows(self, kept: range) -> BlockMatrix:
        return replace(self, blocks=self.blocks[kept.start : kept.stop].clone())

    def columns(self, kept: range) -> BlockMatrix:
        """Raises EngineFailure if they are not whole blocks."""
        if kept.start % BLOCK or (kept.stop % BLOCK and kept.stop != self.num_inputs):
            raise EngineFailure(f"inputs {kept.start} to {kept.stop} are not whole blocks of {BLOCK} weights")
        size = self.kind.block_bytes
        blocks = self.blocks[:, kept.start // BLOCK * size : -(-kept.stop // BLOCK) * size]
        return replace(self, blocks=blocks.clone(), num_inputs=len(kept))

    def wider_in_file(self) -> BlockMatrix:
        """The same weights as Q8, where that is exact: of Q4. Raises EngineFailure elsewhere."""
        if self.kind is BlockKind.Q8:
            return self
        if self.kind is BlockKind.Q4_MINIMA:
            raise EngineFailure("weights with minima have no exact form in 8 bits")
        heads, values = self._split()
        wide = torch.cat((heads, (values.to(torch.int16) - 8).to(torch.int8).view(torch.uint8)), dim=1)
        return replace(self, kind=BlockKind.Q8, blocks=wide.view(len(self.blocks), -1))

    def dequantised(self) -> torch.Tensor:
        """fp32 [outputs, inputs]; these are the weights."""
        heads, values = self._split()
        scales = heads.contiguous().view(torch.float16).float()
        match self.kind:
            case BlockKind.Q8:
                weights = values.view(torch.int8).float() * scales
            case BlockKind.Q4:
                weights = (values.float() - 8) * scales
            case BlockKind.Q4_MINIMA:
                weights = values.float() * scales[:, :1] + scales[:, 1:]
        return weights.view(len(self.blocks), -1)[:, : self.num_inputs].contiguous()

    def _split(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Heads, and values of 8 bits as they are stored: two of uint8 [blocks of all rows, ...]."""
        blocks = self.blocks.reshape(-1, self.kind.block_bytes)
        heads, words = blocks[:, : self.kind.head_bytes], blocks[:, self.kind.head_bytes :]
        return heads, words.contiguous() if self.kind is BlockKind.Q8 else torch.cat((words & 15, words >> 4), dim=1)


Weight = torch.Tensor | BlockMatrix
"""A tensor of a model, in whatever form it is held."""


def in_full(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    return weight.dequantised().to(dtype) if isinstance(weight, BlockMatrix) else weight
