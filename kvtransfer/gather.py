"""A piece of a destination's block, made from source blocks that are cut otherwise: other block size, other dtype, more heads.

    source blocks of 16   |      0      |      1      |      2   ..|          of 24 tokens, layers [first, end)
    destination block 1                     |==== one contiguous piece ====|

For a sender that lets the receiver be as it is: what goes over the link is always a range of layers of a whole destination block,
in the destination's order, so that tickets, frames and digests know nothing of resharding. Tokens after the prompt's end are
zeros. A piece is a copy: once it is made, the source blocks may change. This module does not know links or queues.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from common.errors import HandshakeRefused, TicketRefused
from kvtransfer.reshard import BlockTable, Rank, ShardedLayout, Side, check_reshardable, execute, plan_copies


def must_gather(source: ShardedLayout, destination: ShardedLayout) -> bool:
    """False if every range of layers of a source block is one of the destination's block as it lies. Raises HandshakeRefused."""
    check_reshardable(source.layout, destination.layout)
    return (source.layout.block_tokens, source.layout.dtype, _dealt(source)) != (
        destination.layout.block_tokens,
        destination.layout.dtype,
        _dealt(destination),
    )


def _dealt(side: ShardedLayout) -> list[range]:
    return [side.heads_of(shard) for shard in range(side.tensor_parallel)]


class Elsewhere(NamedTuple):
    """Source blocks whose layers have other numbers than the destination's."""

    shift_layers: int  # from a number there to the one here
    block_bytes: int  # of the source


def gather_piece(
    source: Side,
    pool: memoryview,
    destination: ShardedLayout,
    rank: Rank,
    *,
    logical_block: int,
    layers: range,
    num_tokens: int,
    into: memoryview | None = None,
    elsewhere: Elsewhere | None = None,
) -> memoryview:
    """Layers (of the model) of the destination rank's block `logical_block`, for a prompt of `num_tokens` tokens; in new memory,
    or at the start of `into`. With `elsewhere` the source's layers are looked for there, and it holds them.

    Raises TicketRefused if the block is not one of the prompt, or its tokens are not all in the source's table; HandshakeRefused
    if the source rank does not hold all heads and layers of the piece; HandoffError for a value that does not fit the dtype.
    """
    block_tokens = destination.layout.block_tokens
    first_token, end_token = logical_block * block_tokens, min((logical_block + 1) * block_tokens, num_tokens)
    if not 0 <= first_token < end_token:
        raise TicketRefused(f"{num_tokens} tokens have no block {logical_block}", param="logical_block")
    there = Side(destination, rank, BlockTable((0,), logical_block))
    plan = plan_copies(source, there, first_token=first_token, num_tokens=end_token, layers=layers)
    num_heads, layer_bytes = len(destination.heads_of(rank.shard)), destination.layer_bytes_of(rank)
    wanted = len(layers) * num_heads * 2 * (end_token - first_token) * destination.layout.head_dim
    if not wanted or plan.num_values != wanted:
        raise HandshakeRefused("the source rank does not hold all of the piece", param="tensor_parallel")
    before_bytes = (layers.start - destination.layers_of(rank.stage).start) * layer_bytes
    piece_bytes = len(layers) * layer_bytes
    piece = memoryview(bytearray(piece_bytes)) if into is None else into[:piece_bytes]
    if into is not None and end_token - first_token < block_tokens:
        piece[:] = bytes(piece_bytes)
    shift_bytes = 0 if elsewhere is None else elsewhere.shift_layers * source.sharded.layer_bytes_of(source.rank)
    moved = (
        replace(
            item,
            source_offset_bytes=item.source_offset_bytes + shift_bytes,
            destination_offset_bytes=item.destination_offset_bytes - before_bytes,
        )
        for item in plan.strided
    )
    plan = replace(plan, destination_block_bytes=piece.nbytes, strided=tuple(moved))
    execute(plan if elsewhere is None else replace(plan, source_block_bytes=elsewhere.block_bytes), pool, piece)
    return piece
