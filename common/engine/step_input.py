"""A scheduled batch as tensors: persistent buffers, filled in place through numpy once per step.

    slices   | A: 3 tokens | B: 1 | C: 2 |
    rows     | 0   1   2   |  3   | 4  5 |      token_ids, positions and slots have one entry per row
    tables   A -> blocks, B -> blocks, C -> blocks, each padded with the null block to the longest

A slice that enters a block, without filling it, clears the rest of that block (`entered`), see `kv_pool`.
"""

from __future__ import annotations

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
class StepInput:
    """Valid until the buffers are filled again."""

    token_ids: torch.Tensor  # [rows]
    positions: torch.Tensor  # [rows]
    slots: torch.Tensor  # [rows], where keys and values of the rows go: block * block_tokens + offset
    block_tables: torch.Tensor  # [sequences, blocks]
    spans: tuple[Span, ...]
    entered: tuple[tuple[int, int], ...]  # (block, tokens it will hold), for blocks that are entered and not filled


Filled = tuple[list[Span], list[tuple[int, int]]]
"""Spans, and blocks that are entered and not filled."""


class StepBuffers:
    """One int64 array on the host for everything, so that a step costs one copy to the device. Grows when it must."""

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        self._allocate(3 * _INITIAL_ROWS + _INITIAL_TABLE)

    def _allocate(self, size: int) -> None:
        self._values: npt.NDArray[np.int64] = np.zeros(size, dtype=np.int64)

    def fill(self, batch: ScheduledBatch) -> StepInput:
        num_rows, num_sequences = batch.num_tokens, len(batch.slices)
        width = max(num_blocks(item.start + len(item.token_ids), self._pool.layout.block_tokens) for item in batch.slices)
        size = 3 * num_rows + num_sequences * width
        if size > len(self._values):
            self._allocate(2 * size)
        fill = self._fill_single if num_rows == num_sequences else self._fill_any
        spans, entered = fill(batch, num_rows, width, size)
        device = to_device(self._values[:size], self._pool.device)
        rows_on_device = device[: 3 * num_rows].view(3, num_rows)
        return StepInput(
            token_ids=rows_on_device[0],
            positions=rows_on_device[1],
            slots=rows_on_device[2],
            block_tables=device[3 * num_rows :].view(num_sequences, width),
            spans=tuple(spans),
            entered=tuple(entered),
        )

    def _fill_single(self, batch: ScheduledBatch, num_rows: int, width: int, size: int) -> Filled:
        """Where every slice is one token: as plain numbers, for so few a call of numpy each costs more."""
        block_tokens = self._pool.layout.block_tokens
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
        self._values[:size] = [*tokens, *positions, *slots, *tables]
        return spans, entered

    def _fill_any(self, batch: ScheduledBatch, num_rows: int, width: int, size: int) -> Filled:
        block_tokens = self._pool.layout.block_tokens
        tokens, positions, slots = self._values[: 3 * num_rows].reshape(3, num_rows)
        tables = self._values[3 * num_rows : size].reshape(-1, width)
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
        return spans, entered
