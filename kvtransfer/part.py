"""A part of a block: some of its layers, in runs. What one ticket allows where several writers fill the same blocks.

    part (0, 2, 4, 1)    layers 0, 1 and 4          ()    all of them

Parts of tickets that are open for the same blocks at the same time have no layer in common. A layer is whatever a block is a row
of; where heads are dealt out, it is one head of a layer of the model (`kvtransfer.ranks`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from common.errors import TicketRefused


def check_part(part: Sequence[int], num_layers: int) -> None:
    """Raises TicketRefused unless the runs are of such a block, in order, and apart."""
    if len(part) % 2:
        raise TicketRefused("a part is made of pairs", param="part")
    end = 0
    for first, count in zip(part[::2], part[1::2], strict=True):
        if first < end or count < 1 or first + count > num_layers:
            raise TicketRefused(f"{count} layers from {first} on are no part of a block with {num_layers}", param="part")
        end = first + count


def mask_of(part: Sequence[int], num_layers: int) -> int:
    """A bit for each layer."""
    if not part:
        return (1 << num_layers) - 1
    return sum((1 << first + count) - (1 << first) for first, count in zip(part[::2], part[1::2], strict=True))


def runs_within(part: Sequence[int], first: int, end: int) -> Iterator[tuple[int, int]]:
    """What the layers from `first` up to, not including, `end` have of the part, as such pairs, in order."""
    if not part:
        yield first, end
        return
    for run_first, count in zip(part[::2], part[1::2], strict=True):
        begin, stop = max(first, run_first), min(end, run_first + count)
        if begin < stop:
            yield begin, stop
