"""What was pushed of a ticket's blocks: each layer of each once, and none that the ticket is not for.

    (logical block, source block) pairs, layers  --checked in full, noted down-->  spans, or cuts of blocks that have to be made

A push that is refused leaves no trace. Does not know when what was pushed is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

from common.errors import TicketRefused
from common.types import Ticket
from kvtransfer.part import mask_of, runs_within
from kvtransfer.recutting import Cut, Recutting
from kvtransfer.region import BlockRegion
from kvtransfer.spans import Span
from kvtransfer.transports.base import PieceName
from kvtransfer.window import PeerWindow


class Pushes:
    """Of one transfer."""

    def __init__(self, ticket: Ticket, region: BlockRegion, num_layers: int, window: PeerWindow | None) -> None:
        """`num_layers`: of the blocks in `region`. `window`: the peer's blocks hold other layers; pushes bear their numbers."""
        self.num_layers = num_layers if window is None else window.layout.num_layers
        self._ticket = ticket
        self._region = region
        self._layer_bytes = region.block_bytes // num_layers
        self._window = window
        self._all_layers = mask_of(ticket.part, self.num_layers)  # that the ticket is for
        self._pushed: dict[int, int] = {}  # logical block -> a bit for each layer

    @property
    def num_missing(self) -> int:
        """Blocks of which not all layers were pushed."""
        return len(self._ticket.blocks) - sum(layers == self._all_layers for layers in self._pushed.values())

    def spans(self, blocks: Sequence[tuple[int, int]], first: int, end: int) -> list[Span]:
        """Raises TicketRefused for what may not be pushed, IndexError for a source that is not there."""
        region, ticket, window = self._region, self._ticket, self._window
        logical_blocks = [logical for logical, _ in blocks]
        pushed = self._check_new(logical_blocks, first, end)
        self._check_sources([source for _, source in blocks])
        layer_bytes, block_bytes, first_block, blocks_there = (
            self._layer_bytes,
            region.block_bytes,
            ticket.first_block,
            ticket.blocks,
        )
        block_bytes_there = block_bytes if window is None else window.layout.block_bytes
        spans: list[Span] = []
        for run_first, run_end in runs_within(ticket.part, first, end):
            here_bytes = (run_first if window is None else window.here(run_first, run_end)) * layer_bytes
            there_bytes = run_first * layer_bytes
            sources_bytes = [source * block_bytes + here_bytes for _, source in blocks]
            destinations_bytes = [
                blocks_there[logical - first_block] * block_bytes_there + there_bytes for logical in logical_blocks
            ]
            size_bytes = (run_end - run_first) * layer_bytes
            spans.append(Span(run_first, run_end - run_first, size_bytes, logical_blocks, sources_bytes, destinations_bytes))
        self._pushed.update(pushed)
        return spans

    def cuts(self, recutting: Recutting, logical: range, blocks: Sequence[int], first: int, end: int) -> list[Cut]:
        """Likewise, of blocks that are made of `blocks`, which are all of the prompt's here."""
        ticket, block_bytes = self._ticket, recutting.layout.block_bytes
        pushed = self._check_new(logical, first, end)
        runs = tuple(runs_within(ticket.part, first, end))
        cuts: list[Cut] = []
        for number in logical:
            table = recutting.covering(number, blocks, ticket.num_tokens)
            self._check_sources(table.blocks)
            for run_first, run_end in runs:
                name = PieceName(number, run_first, run_end - run_first)
                size_bytes = recutting.size_bytes(name)
                start_bytes = run_first * (size_bytes // name.num_layers)
                offset_bytes = ticket.blocks[number - ticket.first_block] * block_bytes + start_bytes
                cuts.append(Cut(name, offset_bytes, size_bytes, table))
        self._pushed.update(pushed)
        return cuts

    def _check_sources(self, blocks: Sequence[int]) -> None:
        if min(blocks) < 0 or max(blocks) >= self._region.num_blocks:
            outside = next(block for block in blocks if not 0 <= block < self._region.num_blocks)
            raise IndexError(f"block {outside} of {self._region.num_blocks}")

    def _check_new(self, logical_blocks: Sequence[int], first: int, end: int) -> dict[int, int]:
        """What is pushed of each of these blocks once these layers are."""
        if not 0 <= first < end <= self.num_layers:
            raise TicketRefused(f"layers from {first} to {end} of blocks with {self.num_layers}", param="layers")
        layers = (1 << end) - (1 << first) & self._all_layers
        first_block, num_destinations = self._ticket.first_block, len(self._ticket.blocks)
        outside = [logical for logical in logical_blocks if not 0 <= logical - first_block < num_destinations]
        if outside:
            raise TicketRefused(f"logical block {outside[0]} is not in the ticket", param="logical_block")
        befores = set(map(self._pushed.get, logical_blocks, repeat(0)))  # as a rule one, for layers come in the same order
        distinct = len(set(logical_blocks)) == len(logical_blocks)
        if not distinct or any(before & layers for before in befores):
            raise TicketRefused("a logical block was pushed twice", param="logical_block")
        if len(befores) == 1:
            return dict.fromkeys(logical_blocks, befores.pop() | layers)
        return {logical: self._pushed.get(logical, 0) | layers for logical in logical_blocks}
