"""Which bytes go where when the two sides cut the KV differently: by heads (TP), by layers (PP), by tokens (block size); dtype.

    source side                                                      destination side
    rank (stage, shard): blocks [layer][kv_head][K,V][token][dim]    rank (stage, shard): blocks of the same order, other extents
              \\                                                        /
               plan_copies(source rank, destination rank, tokens) -> CopyPlan -> execute(plan, source pool, destination pool)

How a side is cut. Stage s of the pipeline holds consecutive layers; when they do not divide evenly the first stages hold one
more. Shard t holds consecutive KV heads, the first shards one more where that does not come out even; when there are more shards
than heads, consecutive shards hold copies of one head. Every
destination rank needs all it holds, copies of a head too; it gets each from exactly one source rank. Which of several owners of
a head serves: they take turns over the destination's ranks in order, so that of a head's owners in one stage none serves two
ranks more than another. `turn` shifts who begins; a number that differs by request spreads what one request alone cannot.

What a plan costs, in contiguous copies, per pair of blocks that share tokens (a copy never spans two blocks):

    both blocks whole and equal in tokens, ranks hold the same heads      1
    the same, but other heads                                             one a layer; 1 if there is one layer
    other block sizes, or a block partly filled                           one a (layer, head, K or V)

No smaller number is possible. Copies that repeat at fixed distances are kept as one `StridedCopy`; `CopyPlan.copies` unrolls
them. Plans are values. With unequal dtypes a copy converts. What cannot be compared is refused before anything is planned.

This module knows neither links, nor tickets, nor who owns a block; layers are numbered over the whole model throughout.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.blocks import EXACT_TILE_TOKENS, exact_tile_blocks, num_blocks
from common.errors import HandshakeRefused, TicketRefused
from common.types import KVLayout
from kvtransfer.float_bits import BITS, convert

# What computes exactly has a digest of its own for that: to say so by the name of what was chosen is of more help.
_MUST_BE_EQUAL = ("exact", "model_digest", "tokenizer_digest", "num_layers", "num_kv_heads", "head_dim")


@dataclass(frozen=True, slots=True, order=True)
class Rank:
    stage: int  # of the pipeline
    shard: int  # of the tensors


@dataclass(frozen=True, slots=True)
class ShardedLayout:
    """One side: the layout of the whole model there, and how ranks divide it. One that exists makes sense (HandshakeRefused)."""

    layout: KVLayout
    tensor_parallel: int = 1
    pipeline_parallel: int = 1

    def __post_init__(self) -> None:
        for field in ("num_layers", "num_kv_heads", "head_dim", "block_tokens"):
            if getattr(self.layout, field) < 1:
                raise HandshakeRefused(f"a layout with {field} {getattr(self.layout, field)}", param=field)
        if self.layout.dtype not in BITS:
            raise HandshakeRefused(f"KV of dtype {self.layout.dtype!r} is unknown here", param="dtype")
        if not 1 <= self.pipeline_parallel <= self.layout.num_layers:
            raise HandshakeRefused(
                f"{self.layout.num_layers} layers do not fill {self.pipeline_parallel} stages", param="pipeline_parallel"
            )
        heads, shards = self.layout.num_kv_heads, self.tensor_parallel
        if shards < 1 or (shards > heads and shards % heads):
            raise HandshakeRefused(f"{heads} KV heads cannot be shared evenly by {shards} shards", param="tensor_parallel")

    @property
    def ranks(self) -> tuple[Rank, ...]:
        return tuple(Rank(stage, shard) for stage in range(self.pipeline_parallel) for shard in range(self.tensor_parallel))

    @property
    def replicas(self) -> int:
        """How many shards hold the same head."""
        return max(1, self.tensor_parallel // self.layout.num_kv_heads)

    @property
    def run_bytes(self) -> int:
        """The tokens of one (layer, head, K or V) of a block."""
        return self.layout.block_tokens * self.layout.head_dim * self.layout.dtype_bytes

    def layer_bytes_of(self, rank: Rank) -> int:
        """One layer of a rank's block."""
        return len(self.heads_of(rank.shard)) * 2 * self.run_bytes

    def layers_of(self, stage: int) -> range:
        return _divided(self.layout.num_layers, self.pipeline_parallel, stage)

    def heads_of(self, shard: int) -> range:
        return _divided(self.layout.num_kv_heads, self.tensor_parallel // self.replicas, shard // self.replicas)

    def block_bytes_of(self, rank: Rank) -> int:
        return len(self.layers_of(rank.stage)) * self.layer_bytes_of(rank)


@dataclass(frozen=True, slots=True)
class BlockTable:
    """Where a prompt lies in a rank's pool: its logical block `first_block + i` is block `blocks[i]`. Raises TicketRefused."""

    blocks: tuple[int, ...]
    first_block: int = 0

    def __post_init__(self) -> None:
        if self.first_block < 0:
            raise TicketRefused(f"a table from block {self.first_block} on", param="first_block")
        if min(self.blocks, default=0) < 0 or len(set(self.blocks)) != len(self.blocks):
            raise TicketRefused("a block table names a block twice, or one that cannot be", param="blocks")

    def covers(self, first_block: int, end_block: int) -> bool:
        return self.first_block <= first_block and end_block <= self.first_block + len(self.blocks)

    def __getitem__(self, logical_block: int) -> int:
        return self.blocks[logical_block - self.first_block]


@dataclass(frozen=True, slots=True)
class Side:
    """One rank of one side, and where the prompt lies in its pool."""

    sharded: ShardedLayout
    rank: Rank
    table: BlockTable

    def __post_init__(self) -> None:
        stages, shards = self.sharded.pipeline_parallel, self.sharded.tensor_parallel
        if not (0 <= self.rank.stage < stages and 0 <= self.rank.shard < shards):
            raise HandshakeRefused(f"rank {self.rank} of {stages} stages with {shards} shards", param="rank")

    def offset_bytes(self, layer: int, head: int, token: int) -> int:
        """Where in the block that holds it the K row of a token of the prompt begins; its V row is one run later."""
        layout = self.sharded.layout
        layer_here = layer - self.sharded.layers_of(self.rank.stage).start
        head_here = head - self.sharded.heads_of(self.rank.shard).start
        row_bytes = layout.head_dim * layout.dtype_bytes
        run = (layer_here * len(self.sharded.heads_of(self.rank.shard)) + head_here) * 2
        return run * self.sharded.run_bytes + token % layout.block_tokens * row_bytes


@dataclass(frozen=True, slots=True)
class Copy:
    """Contiguous on both sides. The two sizes differ if the dtypes do. Offsets count from the start of the block."""

    source_block: int
    source_offset_bytes: int
    source_size_bytes: int
    destination_block: int
    destination_offset_bytes: int
    destination_size_bytes: int


@dataclass(frozen=True, slots=True)
class Loop:
    count: int
    source_stride_bytes: int
    destination_stride_bytes: int


@dataclass(frozen=True, slots=True)
class StridedCopy:
    """A copy of `num_values` values, and the same again at the places that the loops, outermost first, step through."""

    source_block: int
    source_offset_bytes: int
    destination_block: int
    destination_offset_bytes: int
    num_values: int
    loops: tuple[Loop, ...]

    @property
    def num_copies(self) -> int:
        return math.prod(loop.count for loop in self.loops)


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """What one source rank gives one destination rank. Blocks are indices of the ranks' pools."""

    source_dtype: str
    destination_dtype: str
    source_block_bytes: int
    destination_block_bytes: int
    strided: tuple[StridedCopy, ...]

    @property
    def num_copies(self) -> int:
        return sum(item.num_copies for item in self.strided)

    @property
    def num_values(self) -> int:
        return sum(item.num_copies * item.num_values for item in self.strided)

    def copies(self) -> Iterator[Copy]:
        """One by one, for who must name each range (a descriptor of a network card)."""
        source_size = BITS[self.source_dtype].itemsize
        destination_size = BITS[self.destination_dtype].itemsize
        for item in self.strided:
            for steps in itertools.product(*(range(loop.count) for loop in item.loops)):
                moves = tuple(zip(steps, item.loops, strict=True))
                yield Copy(
                    item.source_block,
                    item.source_offset_bytes + sum(step * loop.source_stride_bytes for step, loop in moves),
                    item.num_values * source_size,
                    item.destination_block,
                    item.destination_offset_bytes + sum(step * loop.destination_stride_bytes for step, loop in moves),
                    item.num_values * destination_size,
                )


def check_reshardable(source: KVLayout, destination: KVLayout) -> None:
    """Raises HandshakeRefused with the first field in which the two may not differ. Block size and dtype may."""
    if source == destination:
        return  # whatever is in such blocks, it need not be understood
    for field in _MUST_BE_EQUAL:
        ours, theirs = getattr(source, field), getattr(destination, field)
        if ours != theirs:
            raise HandshakeRefused(f"{field} differs: {ours!r} at the source, {theirs!r} at the destination", param=field)
    for dtype in (source.dtype, destination.dtype):
        if dtype not in BITS:
            raise HandshakeRefused(f"there is no conversion for KV of dtype {dtype!r}", param="dtype")
    if source.exact and source.dtype != destination.dtype:
        raise HandshakeRefused(
            f"dtype differs: {source.dtype} at the source, {destination.dtype} at the destination, which would compute other"
            " bits: exact KV is not converted",
            param="dtype",
        )
    if source.exact and _exact_tile_tokens(source) != _exact_tile_tokens(destination):
        raise HandshakeRefused(
            f"block_tokens differs: {source.block_tokens} at the source, {destination.block_tokens} at the destination; exact"
            f" attention walks over both in the same tiles only if both divide {EXACT_TILE_TOKENS}",
            param="block_tokens",
        )


def _exact_tile_tokens(layout: KVLayout) -> int:
    return exact_tile_blocks(layout.block_tokens) * layout.block_tokens


def pairs(source: ShardedLayout, destination: ShardedLayout, *, turn: int = 0) -> tuple[tuple[Rank, Rank], ...]:
    """The (source rank, destination rank) between which anything is copied, for whatever tokens."""
    check_reshardable(source.layout, destination.layout)
    return tuple(
        (giver, taker)
        for giver in source.ranks
        for taker in destination.ranks
        if all(shared(source, giver, destination, taker, turn=turn))
    )


def shared(source: ShardedLayout, giver: Rank, destination: ShardedLayout, taker: Rank, *, turn: int = 0) -> tuple[range, range]:
    """The layers and the heads of the model that `taker` gets from `giver`; if either is empty, nothing."""
    return _shared_layers(source, giver, destination, taker), _shared_heads(source, giver, destination, taker, turn)


def plan_copies(
    source: Side,
    destination: Side,
    *,
    first_token: int,
    num_tokens: int,
    layers: range | None = None,
    turn: int = 0,
) -> CopyPlan:
    """All that `source` gives `destination` of the tokens `first_token .. num_tokens - 1`; maybe nothing. Pure.

    `layers`, of the whole model, are those whose KV is there; None = all. Plans for disjoint ranges of layers, or of tokens, are
    disjoint, and together they are the plan for the union: what a layer-wise push may copy when the source has computed the
    layers [first, end) is the plan for `range(first, end)`.
    Raises HandshakeRefused for layouts that cannot be brought together, TicketRefused for tables that do not hold the tokens.
    """
    check_reshardable(source.sharded.layout, destination.sharded.layout)
    _check_tokens(source, destination, first_token, num_tokens)
    common_layers, heads = shared(source.sharded, source.rank, destination.sharded, destination.rank, turn=turn)
    if layers is not None:
        if layers.step != 1 or not 0 <= layers.start <= layers.stop <= source.sharded.layout.num_layers:
            raise HandshakeRefused(f"{layers} are not layers of the model", param="layers")
        common_layers = _intersection(common_layers, layers)
    strided: list[StridedCopy] = []
    if common_layers and heads:
        loops = _loops(source, destination, len(common_layers), len(heads))
        merged: dict[int, tuple[int, tuple[Loop, ...]]] = {}
        for source_block, destination_block, tokens in _overlaps(source, destination, first_token, num_tokens):
            if len(tokens) not in merged:
                merged[len(tokens)] = _merge(source.sharded.layout, destination.sharded.layout, len(tokens), loops)
            num_values, outer_loops = merged[len(tokens)]
            strided.append(
                StridedCopy(
                    source.table[source_block],
                    source.offset_bytes(common_layers.start, heads.start, tokens.start),
                    destination.table[destination_block],
                    destination.offset_bytes(common_layers.start, heads.start, tokens.start),
                    num_values,
                    outer_loops,
                )
            )
    return CopyPlan(
        source.sharded.layout.dtype,
        destination.sharded.layout.dtype,
        source.sharded.block_bytes_of(source.rank),
        destination.sharded.block_bytes_of(destination.rank),
        tuple(strided),
    )


def execute(plan: CopyPlan, source: memoryview, destination: memoryview) -> None:
    """Applies a plan to the two ranks' pools, blocks from offset 0. Bytes outside the plan are left alone.

    Raises TicketRefused for a block outside a pool, before anything is written; HandoffError for a value that the destination's
    dtype cannot hold, and then part of the plan is done.
    """
    source_blocks = source.nbytes // plan.source_block_bytes
    destination_blocks = destination.nbytes // plan.destination_block_bytes
    for item in plan.strided:
        if item.source_block >= source_blocks or item.destination_block >= destination_blocks:
            raise TicketRefused("a plan names a block outside the pool", param="blocks")
    source_type, destination_type = BITS[plan.source_dtype], BITS[plan.destination_dtype]
    for item in plan.strided:
        shape = (*(loop.count for loop in item.loops), item.num_values)
        taken: npt.NDArray[Any] = np.ndarray(
            shape,
            source_type,
            source,
            item.source_block * plan.source_block_bytes + item.source_offset_bytes,
            (*(loop.source_stride_bytes for loop in item.loops), source_type.itemsize),
        )
        given: npt.NDArray[Any] = np.ndarray(
            shape,
            destination_type,
            destination,
            item.destination_block * plan.destination_block_bytes + item.destination_offset_bytes,
            (*(loop.destination_stride_bytes for loop in item.loops), destination_type.itemsize),
        )
        given[...] = convert(taken, plan.source_dtype, plan.destination_dtype)


def _divided(total: int, parts: int, index: int) -> range:
    fewest, longer = divmod(total, parts)
    first = index * fewest + min(index, longer)
    return range(first, first + fewest + (index < longer))


# -- who shares what ------------------------------------------------------------------------------------------------------


def _intersection(one: range, other: range) -> range:
    first = max(one.start, other.start)
    return range(first, max(first, min(one.stop, other.stop)))


def _shared_layers(source: ShardedLayout, giver: Rank, destination: ShardedLayout, taker: Rank) -> range:
    return _intersection(source.layers_of(giver.stage), destination.layers_of(taker.stage))


def _shared_heads(source: ShardedLayout, giver: Rank, destination: ShardedLayout, taker: Rank, turn: int) -> range:
    """The heads that the taker gets from this giver: none if it is another owner's turn."""
    # The ranks that want one head from one stage have consecutive numbers here: counting them off is even.
    number = taker.stage * destination.replicas + taker.shard % destination.replicas
    if giver.shard % source.replicas != (number + turn) % source.replicas:
        return range(0)
    return _intersection(source.heads_of(giver.shard), destination.heads_of(taker.shard))


def _check_tokens(source: Side, destination: Side, first_token: int, num_tokens: int) -> None:
    if not 0 <= first_token <= num_tokens:
        raise TicketRefused(f"tokens from {first_token} on, of {num_tokens}", param="first_token")
    for side in (source, destination):
        block_tokens = side.sharded.layout.block_tokens
        if first_token < num_tokens and not side.table.covers(first_token // block_tokens, num_blocks(num_tokens, block_tokens)):
            raise TicketRefused(f"a block table does not hold the tokens {first_token} to {num_tokens}", param="blocks")


# -- geometry of one pair -------------------------------------------------------------------------------------------------


def _overlaps(source: Side, destination: Side, first_token: int, num_tokens: int) -> Iterator[tuple[int, int, range]]:
    """(source logical block, destination logical block, the tokens of the prompt that lie in both), in order."""
    source_tokens, destination_tokens = source.sharded.layout.block_tokens, destination.sharded.layout.block_tokens
    token = first_token
    while token < num_tokens:
        source_block, destination_block = token // source_tokens, token // destination_tokens
        end = min((source_block + 1) * source_tokens, (destination_block + 1) * destination_tokens, num_tokens)
        yield source_block, destination_block, range(token, end)
        token = end


def _loops(source: Side, destination: Side, num_layers: int, num_heads: int) -> tuple[Loop, ...]:
    """Over layers, heads, and K and V."""
    here, there = source.sharded.run_bytes, destination.sharded.run_bytes
    return (
        Loop(num_layers, source.sharded.layer_bytes_of(source.rank), destination.sharded.layer_bytes_of(destination.rank)),
        Loop(num_heads, 2 * here, 2 * there),
        Loop(2, here, there),
    )


def _merge(source: KVLayout, destination: KVLayout, num_tokens: int, loops: tuple[Loop, ...]) -> tuple[int, tuple[Loop, ...]]:
    """Values in one contiguous copy of that many tokens, and the loops that remain, once neighbours on both sides are one."""
    num_values = num_tokens * source.head_dim
    kept: list[Loop] = []  # innermost first
    for loop in reversed(loops):
        strides = (loop.source_stride_bytes, loop.destination_stride_bytes)
        inner = kept[-1] if kept else None
        if loop.count == 1:
            continue
        if inner is None and strides == (num_values * source.dtype_bytes, num_values * destination.dtype_bytes):
            num_values *= loop.count
        elif inner and strides == (inner.count * inner.source_stride_bytes, inner.count * inner.destination_stride_bytes):
            kept[-1] = Loop(inner.count * loop.count, inner.source_stride_bytes, inner.destination_stride_bytes)
        else:
            kept.append(loop)
    return num_values, tuple(reversed(kept))
