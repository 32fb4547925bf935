"""What rank 0 tells the others, as arrays of numbers: a step, a block to be copied, blocks to be swapped, the end.

    STEP   kind | slices | groups of rows | rows kept | whether layers are watched | whether it is a part | whether it ends a step
                | per slice: tokens, start, blocks | per group: rows | tokens | block tables | rows of each group | rows kept
    COPY   kind | source | destination
    SWAP   kind | slots                                      in place of those before
    MOVE   kind | blocks in | blocks out | per block: slot, block | per block: block, slot
    STOP   kind

int32, in the byte order of the machine: the ranks of a group share one. What is drawn from the logits is no concern of the other
ranks; they are told of which rows logits are wanted, in groups that are computed one after the other, and which hidden rows.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.engine.batch import ScheduledBatch, SequenceSlice
from common.errors import EngineFailure

Ints = npt.NDArray[np.int32]


class Kind(enum.IntEnum):
    STEP = 1
    COPY = 2
    STOP = 3
    SWAP = 4
    MOVE = 5


@dataclass(frozen=True, slots=True)
class StepOrder:
    batch: ScheduledBatch  # without samples
    wanted: tuple[tuple[int, ...], ...]  # rows, in groups
    kept: tuple[int, ...] = ()  # rows whose hidden state is wanted
    watched: bool = False  # rank 0 wants to know of each layer
    is_part: bool = False  # rank 0 has cut it already
    ends_step: bool = True  # rank 0 waits for what comes of it, or for an empty message where no rows are wanted


@dataclass(frozen=True, slots=True)
class CopyOrder:
    source: int
    destination: int


@dataclass(frozen=True, slots=True)
class SwapOrder:
    num_slots: int


@dataclass(frozen=True, slots=True)
class MoveOrder:
    """Answered with an empty message once it is done."""

    brought_in: tuple[tuple[int, int], ...]  # slot, block
    put_out: tuple[tuple[int, int], ...]  # block, slot


@dataclass(frozen=True, slots=True)
class StopOrder:
    pass


Order = StepOrder | CopyOrder | SwapOrder | MoveOrder | StopOrder


def encode_step(
    batch: ScheduledBatch,
    wanted: Sequence[Sequence[int]],
    kept: Sequence[int] = (),
    *,
    watched: bool = False,
    is_part: bool = False,
    ends_step: bool = True,
) -> bytes:
    slices = [(len(item.token_ids), item.start, len(item.block_table)) for item in batch.slices]
    parts: list[Sequence[int]] = [
        (Kind.STEP, len(slices), len(wanted), len(kept), watched, is_part, ends_step),
        *slices,
        [len(rows) for rows in wanted],
    ]
    parts += [item.token_ids for item in batch.slices]
    parts += [item.block_table for item in batch.slices]
    parts += [*wanted, kept]
    return _encode(parts)


def encode_copy(source: int, destination: int) -> bytes:
    return _encode([(Kind.COPY, source, destination)])


def encode_swap(num_slots: int) -> bytes:
    return _encode([(Kind.SWAP, num_slots)])


def encode_move(brought_in: Sequence[tuple[int, int]], put_out: Sequence[tuple[int, int]]) -> bytes:
    return _encode([(Kind.MOVE, len(brought_in), len(put_out)), *brought_in, *put_out])


def encode_stop() -> bytes:
    return _encode([(Kind.STOP,)])


def decode(message: bytes | bytearray) -> Order:
    """Raises EngineFailure for what is none of these."""
    if not message or len(message) % 4:
        raise EngineFailure("a message between ranks is cut off")
    reader = _Reader(np.frombuffer(message, dtype=np.int32))
    kind, *_ = reader.take(1)
    order: Order
    match kind:
        case Kind.STEP:
            num_slices, num_groups, num_kept, watched, is_part, ends_step = reader.take(6)
            slices = [reader.take(3) for _ in range(num_slices)]
            sizes = reader.take(num_groups)
            tokens = [reader.take(count) for count, _, _ in slices]
            tables = [reader.take(count) for _, _, count in slices]
            batch = ScheduledBatch(
                tuple(SequenceSlice(ids, start, table) for (_, start, _), ids, table in zip(slices, tokens, tables, strict=True))
            )
            wanted = tuple(tuple(reader.take(size)) for size in sizes)
            order = StepOrder(batch, wanted, tuple(reader.take(num_kept)), bool(watched), bool(is_part), bool(ends_step))
        case Kind.COPY:
            order = CopyOrder(*reader.take(2))
        case Kind.SWAP:
            order = SwapOrder(*reader.take(1))
        case Kind.MOVE:
            num_in, num_out = reader.take(2)
            order = MoveOrder(reader.take_pairs(num_in), reader.take_pairs(num_out))
        case Kind.STOP:
            order = StopOrder()
        case _:
            raise EngineFailure(f"a message of the unknown kind {kind} between ranks")
    reader.expect_end()
    return order


class _Reader:
    def __init__(self, values: Ints) -> None:
        self._values = values
        self._next = 0

    def take(self, count: int) -> list[int]:
        end = self._next + count
        if not 0 <= self._next <= end <= len(self._values):
            raise EngineFailure("a message between ranks is cut off")
        taken: list[int] = self._values[self._next : end].tolist()
        self._next = end
        return taken

    def take_pairs(self, count: int) -> tuple[tuple[int, int], ...]:
        numbers = self.take(2 * count)
        return tuple(zip(numbers[::2], numbers[1::2], strict=True))

    def expect_end(self) -> None:
        if self._next != len(self._values):
            raise EngineFailure("a message between ranks is too long")


def _encode(parts: Sequence[Sequence[int]]) -> bytes:
    return np.concatenate([np.asarray(part, dtype=np.int32) for part in parts]).tobytes()
