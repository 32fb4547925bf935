"""A scheduled batch as numbers: persistent buffers, filled in place through numpy once per step, and tensors over them.

    slices   | A: 3 tokens | B: 1 | C: 2 |
    rows     | 0   1   2   |  3   | 4  5 |      token_ids, positions and slots have one entry per row
    tables   A -> blocks, B -> blocks, C -> blocks, each padded with the null block to the longest

Native kernels read the numbers where they lie; tensors are made when they are first asked for, for behind a step, when all
caches have other contents, each of them costs as much as ten rows.

A slice that enters a block, without filling it, clears the rest of that block (`entered`), see `kv_pool`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from common.blocks import num_blocks
from common.engine.attention import Span
from common.engine.batch import ScheduledBatch
from common.engine.kv_pool import NULL_BLOCK, KVPool
from common.engine.to_device import to_device

_INITIAL_ROWS = 512
_INITIAL_TABLE = 4096


@dataclass(frozen=True, slots=True)
class StepTensors:
    token_ids: torch.Tensor  # [rows]
    positions: torch.Tensor  # [rows]
    slots: torch.Tensor  # [rows], where keys and values of the rows go: block * block_tokens + offset
    block_tables: torch.Tensor  # [sequences, blocks]


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """The same on the host, one behind the other as int64, and before the tables the first row of each sequence and their end."""

    values: npt.NDArray[np.int64]
    address: int
    num_rows: int
    num_sequences: int
    width: int  # of a table

    @classmethod
    def size(cls, num_rows: int, num_sequences: int, width: int) -> int:
        return 3 * num_rows + num_sequences + 1 + num_sequences * width

    @property
    def first_rows_at(self) -> int:
        return 3 * self.num_rows

    @property
    def tables_at(self) -> int:
        return 3 * self.num_rows + self.num_sequences + 1

    def address_of(self, place: int) -> int:
        return self.address + 8 * place

    def tensors(self, device: torch.device) -> StepTensors:
        whole = to_device(self.values, device)
        rows = whole[: 3 * self.num_rows].view(3, self.num_rows)
        return StepTensors(rows[0], rows[1], rows[2], whole[self.tables_at :].view(self.num_sequences, self.width))


class StepInput:
    """Valid until the buffers are filled again."""

    def __init__(
        self,
        make_tensors: Callable[[], StepTensors],
        *,
        spans: tuple[Span, ...] = (),
        entered: tuple[tuple[int, int], ...] = (),
        numbers: StepNumbers | None = None,
    ) -> None:
        self.spans = spans
        self.entered = entered  # (block, tokens it will hold), for blocks that are entered and not filled
        self.numbers = numbers  # None: they are on a device alone
        self._make_tensors = make_tensors
        self._tensors: StepTensors | None = None

    @property
    def tensors(self) -> StepTensors:
        if self._tensors is None:
            self._tensors = self._make_tensors()
        return self._tensors


Filled = tuple[list[Span], list[tuple[int, int]]]
"""Spans, and blocks that are entered and not filled."""


class StepBuffers:
    """One int64 array on the host for everything, so that a step costs one copy to the device. Grows when it must."""

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        self._allocate(3 * _INITIAL_ROWS + _INITIAL_TABLE)

    def _allocate(self, size: int) -> None:
        self._values: npt.NDArray[np.int64] = np.zeros(size, dtype=np.int64)
        self._address = self._values.ctypes.data

    def fill(self, batch: ScheduledBatch) -> StepInput:
        num_rows, num_sequences = batch.num_tokens, len(batch.slices)
        width = max(num_blocks(item.start + len(item.token_ids), self._pool.layout.block_tokens) for item in batch.slices)
        size = StepNumbers.size(num_rows, num_sequences, width)
        if size > len(self._values):
            self._allocate(2 * size)
        numbers = StepNumbers(self._values[:size], self._address, num_rows, num_sequences, width)
        fill = self._fill_single if num_rows == num_sequences else self._fill_any
        spans, entered = fill(batch, numbers)
        device = self._pool.device
        return StepInput(lambda: numbers.tensors(device), spans=tuple(spans), entered=tuple(entered), numbers=numbers)

    def _fill_single(self, batch: ScheduledBatch, numbers: StepNumbers) -> Filled:
        """Where every slice is one token: as plain numbers, for so few a call of numpy each costs more."""
        block_tokens, width = self._pool.layout.block_tokens, numbers.width
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        tables: list[int] = []
        spans: list[Span] = []
        entered: list[tuple[int, int]] = []
        for row, item in enumerate(batch.slices):
            place, offset = divmod(item.start, block_tokens)
            block = item.block_table[place]
            tokens.append(item.token_ids[0])
            positions.append(item.start)
            slots.append(block * block_tokens + offset)
            tables += item.block_table[: place + 1]
            tables += [NULL_BLOCK] * (width - place - 1)
            if offset == 0 and block_tokens > 1:
                entered.append((block, 1))
            spans.append(Span(row, 1, item.start))
        numbers.values[:] = [*tokens, *positions, *slots, *range(numbers.num_rows + 1), *tables]
        return spans, entered

    def _fill_any(self, batch: ScheduledBatch, numbers: StepNumbers) -> Filled:
        block_tokens, values = self._pool.layout.block_tokens, numbers.values
        tokens, positions, slots = values[: numbers.first_rows_at].reshape(3, numbers.num_rows)
        first_rows = values[numbers.first_rows_at : numbers.tables_at]
        tables = values[numbers.tables_at :].reshape(-1, numbers.width)
        tables.fill(NULL_BLOCK)
        spans: list[Span] = []
        entered: list[tuple[int, int]] = []
        row = 0
        for table, item in zip(tables, batch.slices, strict=True):
            span = Span(row, len(item.token_ids), item.start)
            used = num_blocks(span.end, block_tokens)
            table[:used] = item.block_table[:used]
            rows = slice(row, row + span.num_rows)
            tokens[rows] = item.token_ids
            positions[rows] = np.arange(span.start, span.end)
            slots[rows] = table[positions[rows] // block_tokens] * block_tokens + positions[rows] % block_tokens
            filled = span.end % block_tokens
            if filled and span.start <= span.end - filled:
                entered.append((int(table[used - 1]), filled))
            spans.append(span)
            row += span.num_rows
        first_rows[:] = [*(span.first_row for span in spans), row]
        return spans, entered
