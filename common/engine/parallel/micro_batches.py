"""A step cut into parts that follow each other through the stages of a pipeline.

    stage 0   | a | b | c |                  a step of three parts takes four turns instead of two whole steps
    stage 1       | a | b | c |

A chunk of a prompt may be cut too: when a stage comes to its second part, that stage has the keys and values of the first one.
Rows that are drawn from together stay together. Only what a part may not be is small: each part reads all weights.

Where steps follow each other without a gap (`line`), a row that begins with a token of the step before can enter when that token
is drawn. So it goes into the part that it was in, or a later one, and nobody waits for anybody else's token; into an earlier one
only if its part has become too large. All other rows fill the parts up in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from common.engine.batch import ForwardResult, ScheduledBatch, SequenceSlice, SliceResult
from common.engine.verification import num_sampled_rows

_PER_STAGE = 2
_SMALLER = 4  # parts of 16 rows by default: of 8, two stages of a small model on two cores waited for memory


@dataclass(frozen=True, slots=True)
class Part:
    batch: ScheduledBatch
    indexes: tuple[int, ...]  # of the step's slices, of which the part has a piece each


def num_micro_batches(num_tokens: int, num_stages: int, least_tokens: int, *, goes_on: bool = False) -> int:
    """Twice as many as stages leave a fifth of a long step's time idle with two stages; fewer where parts would be too small.
    A step that `goes_on` from tokens of the step before may have as many as stages though they are smaller: with fewer no stage
    could begin it before the last one has ended the other. Of a few rows only, each part would take as long as all of them."""
    if num_stages == 1:
        return 1
    parts = max(1, min(_PER_STAGE * num_stages, num_tokens // least_tokens))
    return max(parts, min(num_stages, num_tokens // max(1, least_tokens // _SMALLER))) if goes_on else parts


def cut(batch: ScheduledBatch, parts: int) -> list[ScheduledBatch]:
    """Consecutive parts of equal numbers of rows, but for one row, and for rows that are drawn from together."""
    return [part.batch for part in divide(batch, parts)]


def divide(batch: ScheduledBatch, count: int, homes: Sequence[int | None] = ()) -> list[Part]:
    """At most `count` parts. `homes` says of each slice in which part of the step before the token is drawn that it begins with;
    None if that is known."""
    num_rows = batch.num_tokens
    quotas = [num_rows * (part + 1) // count - num_rows * part // count for part in range(count)]
    loads = [0] * count
    pieces: list[list[tuple[int, SequenceSlice]]] = [[] for _ in range(count)]
    homes = homes or [None] * len(batch.slices)
    for index, (item, home) in enumerate(zip(batch.slices, homes, strict=True)):
        if home is not None:
            place = _place(min(home, count - 1), loads, quotas)
            loads[place] += len(item.token_ids)
            pieces[place].append((index, item))
    place = 0
    for index, (item, home) in enumerate(zip(batch.slices, homes, strict=True)):
        first = 0 if home is None else len(item.token_ids)
        while first < len(item.token_ids):
            while place < count - 1 and loads[place] >= quotas[place]:
                place += 1
            room = quotas[place] - loads[place] if place < count - 1 else len(item.token_ids)
            size = _size(len(item.token_ids) - first, room, num_sampled_rows(item))
            loads[place] += size
            pieces[place].append((index, _piece(item, first, size)))
            first += size
            if first < len(item.token_ids):
                place = min(place + 1, count - 1)
    in_order = [sorted(found, key=lambda piece: piece[0]) for found in pieces if found]
    return [
        Part(replace(batch, slices=tuple(item for _, item in found)), tuple(index for index, _ in found)) for found in in_order
    ]


def join(parts: Sequence[Part], results: Sequence[ForwardResult], num_slices: int) -> ForwardResult:
    """What came of the step, from what came of its parts."""
    pieces: list[list[SliceResult]] = [[] for _ in range(num_slices)]
    for part, result in zip(parts, results, strict=True):
        for index, found in zip(part.indexes, result.slices, strict=True):
            pieces[index].append(found)
    return ForwardResult(tuple(_joined(found) for found in pieces))


def _place(home: int, loads: Sequence[int], quotas: Sequence[int]) -> int:
    with_room = (place for place in range(home, len(loads)) if loads[place] < quotas[place])
    least = min(range(len(loads)), key=lambda place: loads[place])
    return next(with_room, home if loads[home] < quotas[home] + quotas[home] // 4 else least)


def _size(rest: int, room: int, num_drawn_from: int) -> int:
    """Of the next piece of a slice."""
    if rest <= room:
        return rest
    return min(room, rest - num_drawn_from) or rest


def _piece(item: SequenceSlice, first: int, size: int) -> SequenceSlice:
    end, is_last = first + size, first + size == len(item.token_ids)
    if size == len(item.token_ids):
        return item
    return replace(
        item,
        token_ids=item.token_ids[first:end],
        start=item.start + first,
        samples=item.samples if is_last else (),
        next_token_ids=item.next_token_ids[first:end],
        num_drafts=item.num_drafts if is_last else 0,
    )


def _joined(pieces: Sequence[SliceResult]) -> SliceResult:
    if len(pieces) == 1:
        return pieces[0]
    return replace(pieces[-1], prompt_logprobs=tuple(chain.from_iterable(piece.prompt_logprobs for piece in pieces)))
