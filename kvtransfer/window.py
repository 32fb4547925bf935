"""How a peer's blocks lie in ours, where each of the two holds some layers of a whole, under numbers of its own.

    theirs   | 0 | 1 | 2 | 3 |          runs (there 0, here 2, 1), (there 2, here 5, 2): what is theirs and ours
               |       |   |            a ticket's part, and every piece, bears their numbers
    ours     ..| 2 |..| 5 | 6 |..

A layer is whatever a block is a row of; where heads are dealt out, it is one head of a layer of the model (`kvtransfer.ranks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from common.errors import TicketRefused
from common.types import KVLayout


class Run(NamedTuple):
    """Layers that follow each other on both sides."""

    there: int
    here: int
    num_layers: int


@dataclass(frozen=True, slots=True)
class PeerWindow:
    layout: KVLayout  # of the peer's blocks
    runs: tuple[Run, ...]  # in order of their numbers there

    def here(self, first: int, end: int) -> int:
        """The number here of their layer `first`, from which on they follow each other up to, not including, `end`. Raises
        TicketRefused if they do not, or are not ours."""
        for run in self.runs:
            if run.there <= first and end <= run.there + run.num_layers:
                return run.here + first - run.there
        raise TicketRefused(f"layers from {first} to {end} of the peer's blocks are not held here", param="part")


def part_of(runs: Sequence[Run]) -> tuple[int, ...]:
    """As `common.types.Ticket.part`."""
    return tuple(number for run in runs for number in (run.there, run.num_layers))
