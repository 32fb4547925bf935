"""Which part of every block travels between which two ranks, when two workers divide a model differently.

    degrees of both sides --reshard.shared--> layers x heads of each pair --> units of the two ranks' blocks, in runs

A rank's block is a row of units, one for each head of each layer that it holds. What two ranks share is a few runs of units that
follow each other on both sides: one run where both hold the same heads, else one for each layer. Both sides work this out for
themselves, and agree, or the ticket is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from common.types import KVLayout
from kvtransfer.reshard import Rank, ShardedLayout, pairs, shared
from kvtransfer.window import Run


class Degrees(NamedTuple):
    tensor_parallel: int = 1
    pipeline_parallel: int = 1

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    def place_of(self, rank: int) -> Rank:
        return Rank(*divmod(rank, self.tensor_parallel))


class Pair(NamedTuple):
    """Numbers of ranks."""

    giver: int
    taker: int


Parts = Mapping[Pair, tuple[Run, ...]]
"""What the two have in common; numbers there are of units of the taker's block, numbers here of the giver's."""


def rank_name(worker_id: str, rank: int) -> str:
    """How a rank is known to its peers, and in its tickets."""
    return worker_id if rank == 0 else f"{worker_id}/rank/{rank}"


def window_of(layout: KVLayout, degrees: Degrees, rank: int) -> KVLayout:
    """Of a rank's own blocks, where `layout` is that of the whole."""
    side, place = _sharded(layout, degrees), degrees.place_of(rank)
    return replace(layout, num_layers=len(side.layers_of(place.stage)), num_kv_heads=len(side.heads_of(place.shard)))


def in_units(layout: KVLayout) -> KVLayout:
    """The same blocks, as rows of units."""
    return replace(layout, num_layers=layout.num_layers * layout.num_kv_heads, num_kv_heads=1)


def units_of(layout: KVLayout, degrees: Degrees, rank: int, layers: tuple[int, int]) -> tuple[int, int]:
    """The units of a rank's block from the model's layer `layers[0]` up to, not including, `layers[1]`."""
    side, place = _sharded(layout, degrees), degrees.place_of(rank)
    own, heads = side.layers_of(place.stage), len(side.heads_of(place.shard))
    first, end = (min(max(layer, own.start), own.stop) - own.start for layer in layers)
    return first * heads, end * heads


def parts_of(layout: KVLayout, giving: Degrees, taking: Degrees) -> Parts:
    """Of all pairs that share anything; the first is that of both ranks 0. Raises HandshakeRefused for degrees that a model of
    this layout cannot be divided by."""
    source, destination = _sharded(layout, giving), _sharded(layout, taking)
    parts: dict[Pair, tuple[Run, ...]] = {}
    for giver, taker in pairs(source, destination):
        layers, heads = shared(source, giver, destination, taker)
        ours, theirs = source.heads_of(giver.shard), destination.heads_of(taker.shard)
        runs = []
        for layer in layers:
            there = (layer - destination.layers_of(taker.stage).start) * len(theirs) + heads.start - theirs.start
            here = (layer - source.layers_of(giver.stage).start) * len(ours) + heads.start - ours.start
            runs.append(Run(there, here, len(heads)))
        if ours == theirs:
            runs = [Run(runs[0].there, runs[0].here, len(layers) * len(heads))]
        numbers = giver.stage * giving.tensor_parallel + giver.shard, taker.stage * taking.tensor_parallel + taker.shard
        parts[Pair(*numbers)] = tuple(runs)
    return parts


def _sharded(layout: KVLayout, degrees: Degrees) -> ShardedLayout:
    plain = replace(layout, dtype=layout.values_dtype)  # who holds what does not depend on how values are stored
    return ShardedLayout(plain, *degrees)
