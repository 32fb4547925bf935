"""Our blocks for a peer whose blocks are cut otherwise: other block size, other dtype.

    a prompt's blocks here  --covering-->  those that hold one block of the peer's  --make-->  a piece of it, in staging memory

Everything that travels is in the peer's layout, so links, frames, digests and the receiver know nothing of it. Pieces are made
shortly before it is their turn to be written, off the event loop; until then the source blocks must stay as they are, as without
recutting. Staging memory is lent for one batch, which may be made while another is written, and kept for the next ones: some
links register memory, and do that once for each.

One per peer. It does not know tickets, links or transfers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from common.blocks import num_blocks
from common.errors import HandoffError, HandshakeRefused, TicketRefused
from common.types import KVLayout
from kvtransfer.gather import Elsewhere, gather_piece, must_gather
from kvtransfer.region import BlockRegion
from kvtransfer.reshard import BlockTable, Rank, ShardedLayout, Side, check_reshardable
from kvtransfer.transports.base import Piece, PieceName
from kvtransfer.window import PeerWindow

STAGING_BYTES = 4 * 1024 * 1024  # made and written at a time; a larger piece by itself
_WHOLE = Rank(0, 0)


class Cut(NamedTuple):
    """A piece that is to be made."""

    name: PieceName
    destination_offset_bytes: int
    size_bytes: int
    table: BlockTable  # the blocks here that hold its tokens


class Made(NamedTuple):
    """A batch of pieces, in memory that is lent."""

    pieces: list[Piece]
    staging: memoryview


class Recutting:
    def __init__(self, region: BlockRegion, ours: KVLayout, theirs: KVLayout, window: PeerWindow | None = None) -> None:
        """`window`: the peer's blocks hold other layers; then the number of ours is theirs, and the region says how large a block
        is. Raises HandshakeRefused if there is no way from one layout to the other."""
        self.layout = theirs
        self._window = window
        self._region = region
        self._source, self._destination = ShardedLayout(ours), ShardedLayout(theirs)
        self.staging_bytes = max(STAGING_BYTES, theirs.block_bytes)  # so much is made at once
        self._idle: list[memoryview] = []

    def covering(self, logical_block: int, blocks: Sequence[int], num_tokens: int) -> BlockTable:
        """Of a prompt's blocks here those that hold its block `logical_block` there. Raises TicketRefused if they are not all
        there."""
        here, there = self._source.layout.block_tokens, self._destination.layout.block_tokens
        first_token, end_token = logical_block * there, min((logical_block + 1) * there, num_tokens)
        first, end = first_token // here, num_blocks(end_token, here)
        if not 0 <= first_token < end_token or end > len(blocks):
            raise TicketRefused(f"the prompt's blocks do not hold all of block {logical_block}", param="logical_block")
        return BlockTable(tuple(blocks[first:end]), first)

    def size_bytes(self, name: PieceName) -> int:
        return name.num_layers * self._destination.layer_bytes_of(_WHOLE)

    async def make(self, cuts: Sequence[Cut], num_tokens: int) -> Made:
        """The pieces, of a prompt of `num_tokens` tokens; `give_back` once they are written. Raises HandoffError for a value that
        the peer's dtype does not have. Not to be cancelled: the thread would go on reading."""
        staging = self._idle.pop() if self._idle else memoryview(bytearray(self.staging_bytes))
        try:
            return Made(await asyncio.to_thread(self._make, cuts, num_tokens, staging), staging)
        except HandoffError:
            self._idle.append(staging)
            raise

    def give_back(self, made: Made) -> None:
        self._idle.append(made.staging)

    def _make(self, cuts: Sequence[Cut], num_tokens: int, staging: memoryview) -> list[Piece]:
        pieces: list[Piece] = []
        used_bytes = 0
        for (logical_block, first_layer, num_layers), offset_bytes, _, table in cuts:
            layers = range(first_layer, first_layer + num_layers)
            piece = gather_piece(
                Side(self._source, _WHOLE, table),
                self._region.buffer,
                self._destination,
                _WHOLE,
                logical_block=logical_block,
                layers=layers,
                num_tokens=num_tokens,
                into=staging[used_bytes:],
                elsewhere=self._elsewhere(layers),
            )
            used_bytes += piece.nbytes
            pieces.append(Piece(PieceName(logical_block, first_layer, num_layers), offset_bytes, piece))
        return pieces

    def _elsewhere(self, layers: range) -> Elsewhere | None:
        if self._window is None:
            return None
        return Elsewhere(self._window.here(layers.start, layers.stop) - layers.start, self._region.block_bytes)


def recutting_for(region: BlockRegion, ours: KVLayout, theirs: KVLayout, window: PeerWindow | None = None) -> Recutting | None:
    """None if blocks go as they are. Raises HandshakeRefused if the two layouts cannot be brought together, or not from there."""
    if window is not None:
        ours = replace(ours, num_layers=theirs.num_layers)
    check_reshardable(ours, theirs)
    if ours == theirs or not must_gather(ShardedLayout(ours), ShardedLayout(theirs)):
        return None
    if region.on_device:
        differing = "block_tokens" if ours.block_tokens != theirs.block_tokens else "dtype"
        raise HandshakeRefused(f"{differing} differs, and KV on a device goes as it is", param=differing)
    return Recutting(region, ours, theirs, window)
