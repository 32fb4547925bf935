"""The inputs of a decode step as one block of int32 on the host, so that they reach the device by one copy.

    | token ids | positions | slots | lengths | fresh blocks | block tables, row after row | draws: settings | edits |
      rows        rows        rows    rows      rows           rows * blocks of a table      rows * 16         some

A token id below zero is a placeholder: -1 - r stands for whatever the step before drew in row r, and is looked up on the device.
Rows beyond the batch are padding: token 0 at position 0 of the scratch block, which belongs to no sequence. Fresh blocks are
those that the batch enters, which are to be cleared first; as many as `fill` says, the rest is the scratch block.

What a step does not need is at the end and stays on the host: greedy steps need no settings (`draw_settings`), and most of the
others no edits (`logit_edits`).

The block persists from step to step. A block table is written only where it differs from what the row held before; sequences keep
their rows and grow, so that is one number now and then. Settings likewise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from common.engine.batch import SampleSpec, SequenceSlice
from common.engine.captured.buckets import Bucket
from common.engine.draw_settings import NUM_SETTINGS, KeptSettings
from common.engine.logit_edits import RuledRow, edit_counts, words_for, write_edits

_FIELDS = 5  # in front of the tables
_EDIT_WORDS_OF_A_ROW = 1024
_LEAST_EDIT_WORDS, _MOST_EDIT_WORDS = 8 * 1024, 64 * 1024


class PackedViews:
    """The same places of any tensor with the layout above; of what draws need it may lack all."""

    def __init__(self, packed: torch.Tensor, bucket: Bucket) -> None:
        rows = bucket.rows
        fields = packed[: _FIELDS * rows].view(_FIELDS, rows)
        self.token_ids, self.positions, self.slots, self.lengths, self.fresh_blocks = fields.unbind()
        self.block_tables = packed[_FIELDS * rows : step_words(bucket)].view(rows, bucket.blocks)


def step_words(bucket: Bucket) -> int:
    """Of all but the draws."""
    return bucket.rows * (_FIELDS + bucket.blocks)


def settings_of_rows(packed: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    """`draw_settings` [rows, 8], int64, of an int32 tensor."""
    return packed[_settings_at(bucket) : _edits_at(bucket)].view(torch.int64).view(bucket.rows, NUM_SETTINGS)


def edits_of_rows(packed: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    return packed[_edits_at(bucket) :]


def packed_size(bucket: Bucket) -> int:
    room = min(max(bucket.rows * _EDIT_WORDS_OF_A_ROW, _LEAST_EDIT_WORDS), _MOST_EDIT_WORDS)
    return _edits_at(bucket) + room


def _settings_at(bucket: Bucket) -> int:
    return step_words(bucket) + step_words(bucket) % 2  # they are of 64 bits


def _edits_at(bucket: Bucket) -> int:
    return _settings_at(bucket) + bucket.rows * NUM_SETTINGS * 2


class PackedRows:
    def __init__(self, bucket: Bucket, block_tokens: int, scratch_block: int, *, pinned: bool) -> None:
        self.bucket = bucket
        self.tensor = torch.zeros(packed_size(bucket), dtype=torch.int32, pin_memory=pinned)
        values: npt.NDArray[np.int32] = self.tensor.numpy()
        self._fields = values[: _FIELDS * bucket.rows].reshape(_FIELDS, bucket.rows)
        self._tables = values[_FIELDS * bucket.rows : step_words(bucket)].reshape(bucket.rows, bucket.blocks)
        self._settings = KeptSettings(settings_of_rows(self.tensor, bucket).numpy())
        self._edits = values[_edits_at(bucket) :]
        self._block_tokens = block_tokens
        self._scratch_block = scratch_block
        self._known: list[list[int]] = [[] for _ in range(bucket.rows)]  # what the rows of the tables hold
        self._num_rows = bucket.rows
        self._fields[-1] = scratch_block
        self._pad(0)

    def fill(self, slices: Sequence[SequenceSlice]) -> int:
        """Writes a batch of single tokens; returns how many blocks it enters."""
        count, block_tokens = len(slices), self._block_tokens
        token_ids, positions, slots, lengths, fresh_blocks = self._fields
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
        entered = own_blocks[offsets == 0]
        fresh_blocks[: len(entered)] = entered
        fresh_blocks[len(entered) :] = self._scratch_block
        self._pad(count)
        return len(entered)

    def has_room_for(self, ruled: Sequence[RuledRow]) -> bool:
        return words_for(edit_counts(ruled)) <= len(self._edits)

    def fill_draws(self, specs: Sequence[SampleSpec | None], ruled: Sequence[RuledRow], vocab: int) -> int:
        """How each row is drawn from, and with `ruled` rows for which there is room, what is changed before; returns how many
        words the device needs of all."""
        self._settings.fill(specs)
        begin = _edits_at(self.bucket)
        return begin + write_edits(self._edits, ruled, vocab) if ruled else begin

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
            self._fields[:4, padding] = np.array([[0], [0], [self._scratch_block * self._block_tokens], [1]], dtype=np.int32)
            self._tables[padding] = 0
            self._tables[padding, 0] = self._scratch_block
            for row in range(count, self._num_rows):
                self._known[row] = [self._scratch_block]
        self._num_rows = count
