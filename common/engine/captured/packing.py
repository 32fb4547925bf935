"""The inputs of a decode step as one block of int32 on the host, so that they reach the device by one copy.

    | token ids | positions | slots | lengths | block tables, one row after the other |
      rows        rows        rows    rows      rows * blocks of a table

A token id below zero is a placeholder: -1 - r stands for whatever the step before drew in row r, and is looked up on the device.
Rows beyond the batch are padding: token 0 at position 0 of the scratch block, which belongs to no sequence.

The block persists from step to step. A block table is written only where it differs from what the row held before; sequences keep
their rows and grow, so that is one number now and then.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from common.engine.batch import SequenceSlice
from common.engine.captured.buckets import Bucket

_FIELDS = 4  # in front of the tables


class PackedViews:
    """The same places of any tensor with the layout above."""

    def __init__(self, packed: torch.Tensor, bucket: Bucket) -> None:
        rows = bucket.rows
        fields = packed[: _FIELDS * rows].view(_FIELDS, rows)
        self.token_ids, self.positions, self.slots, self.lengths = fields.unbind()
        self.block_tables = packed[_FIELDS * rows :].view(rows, bucket.blocks)


def packed_size(bucket: Bucket) -> int:
    return bucket.rows * (_FIELDS + bucket.blocks)


class PackedRows:
    def __init__(self, bucket: Bucket, block_tokens: int, scratch_block: int, *, pinned: bool) -> None:
        self.bucket = bucket
        self.tensor = torch.zeros(packed_size(bucket), dtype=torch.int32, pin_memory=pinned)
        values: npt.NDArray[np.int32] = self.tensor.numpy()
        self._fields = values[: _FIELDS * bucket.rows].reshape(_FIELDS, bucket.rows)
        self._tables = values[_FIELDS * bucket.rows :].reshape(bucket.rows, bucket.blocks)
        self._block_tokens = block_tokens
        self._scratch_block = scratch_block
        self._known: list[list[int]] = [[] for _ in range(bucket.rows)]  # what the rows of the tables hold
        self._num_rows = bucket.rows
        self._pad(0)

    def fill(self, slices: Sequence[SequenceSlice]) -> list[int]:
        """Writes a batch of single tokens; returns the blocks that it enters, which are to be cleared first."""
        count, block_tokens = len(slices), self._block_tokens
        token_ids, positions, slots, lengths = self._fields
        starts = np.fromiter((item.start for item in slices), np.int32, count)
        token_ids[:count] = [item.token_ids[0] for item in slices]
        positions[:count] = starts
        lengths[:count] = starts + 1
        places = starts // block_tokens
        for row, item in enumerate(slices):
            self._write_table(row, item.block_table)
        own_blocks = self._tables[np.arange(count), places]
        offsets = starts % block_tokens
        slots[:count] = own_blocks * block_tokens + offsets
        self._pad(count)
        return [int(block) for block in own_blocks[offsets == 0]]

    def _write_table(self, row: int, table: Sequence[int]) -> None:
        known = self._known[row]
        table = table if isinstance(table, list) else list(table)
        same = len(known) if table[: len(known)] == known else 0
        if same == len(table):
            return
        self._tables[row, same : len(table)] = table[same:]
        self._tables[row, len(table) :] = 0
        self._known[row] = table

    def _pad(self, count: int) -> None:
        if count < self._num_rows:
            padding = slice(count, self._num_rows)
            self._fields[:, padding] = np.array([[0], [0], [self._scratch_block * self._block_tokens], [1]], dtype=np.int32)
            self._tables[padding] = 0
            self._tables[padding, 0] = self._scratch_block
            for row in range(count, self._num_rows):
                self._known[row] = [self._scratch_block]
        self._num_rows = count
