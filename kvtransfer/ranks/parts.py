"""Which part of every block travels between which two ranks, when two workers divide a model differently.

    degrees of both sides --reshard.shared--> layers x heads of each pair --> units of a block, in runs

Unit `layer * num_kv_heads + head` is one head of one layer. A pair that shares all heads has one run of units; one that shares
some has a run for each layer. Both sides work this out for themselves, and agree, or the ticket is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from common.types import KVLayout
from kvtransfer.reshard import ShardedLayout, pairs, shared


class Degrees(NamedTuple):
    tensor_parallel: int = 1
    pipeline_parallel: int = 1

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel


class Pair(NamedTuple):
    """Numbers of ranks."""

    giver: int
    taker: int


Parts = Mapping[Pair, tuple[int, ...]]
"""As `common.types.Ticket.part`."""


def rank_name(worker_id: str, rank: int) -> str:
    """How a rank is known to its peers, and in its tickets."""
    return worker_id if rank == 0 else f"{worker_id}/rank/{rank}"


def in_units(layout: KVLayout) -> KVLayout:
    """The same blocks, as rows of units."""
    return replace(layout, num_layers=layout.num_layers * layout.num_kv_heads, num_kv_heads=1)


def parts_of(layout: KVLayout, giving: Degrees, taking: Degrees) -> Parts:
    """Of all pairs that share anything; the first is that of both ranks 0. Raises HandshakeRefused for degrees that a model of
    this layout cannot be divided by."""
    plain = replace(layout, dtype=layout.values_dtype)  # who shares what does not depend on how values are stored
    source, destination = ShardedLayout(plain, *giving), ShardedLayout(plain, *taking)
    heads = layout.num_kv_heads
    parts: dict[Pair, tuple[int, ...]] = {}
    for giver, taker in pairs(source, destination):
        layers, of_them = shared(source, giver, destination, taker)
        if len(of_them) == heads:
            part = [layers.start * heads, len(layers) * heads]
        else:
            part = [number for layer in layers for number in (layer * heads + of_them.start, len(of_them))]
        numbers = giver.stage * giving.tensor_parallel + giver.shard, taker.stage * taking.tensor_parallel + taker.shard
        parts[Pair(*numbers)] = tuple(part)
    return parts
