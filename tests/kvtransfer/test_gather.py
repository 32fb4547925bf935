from __future__ import annotations

import itertools
import random
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from common.errors import HandshakeRefused, TicketRefused
from common.types import KVLayout
from kvtransfer.gather import gather_piece, must_gather
from kvtransfer.reshard import BlockTable, Rank, ShardedLayout, Side

LAYOUT = KVLayout("m", "t", 4, 4, 2, 8, "float32", False)


def filled(sharded: ShardedLayout, rank: Rank, num_tokens: int, seed: int) -> tuple[Side, np.ndarray, np.ndarray]:
    """The side, its pool with stale values where there is no token, and the global values [layer, head, K/V, token, dim]."""
    layout = sharded.layout
    values = np.random.default_rng(seed).normal(size=(4, 4, 2, num_tokens, 2)).astype(np.float32)
    count = -(-num_tokens // layout.block_tokens)
    table = random.Random(seed).sample(range(count + 2), count)
    layers, heads = sharded.layers_of(rank.stage), sharded.heads_of(rank.shard)
    pool = np.full((count + 2, len(layers), len(heads), 2, layout.block_tokens, 2), np.nan, np.float32)
    for token in range(num_tokens):
        block, within = table[token // layout.block_tokens], token % layout.block_tokens
        pool[block, :, :, :, within] = values[layers.start : layers.stop, heads.start : heads.stop, :, token]
    return Side(sharded, rank, BlockTable(tuple(table))), pool, values


@settings(max_examples=150, deadline=None)
@given(
    block_sizes=st.tuples(*[st.sampled_from([1, 2, 3, 5, 8, 16, 24])] * 2),
    stages=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    shards=st.sampled_from([1, 2, 4, 8]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    num_tokens=st.integers(1, 40),
    seed=st.integers(0, 1 << 20),
)
def test_pieces_are_what_the_destination_would_have_computed(
    block_sizes: tuple[int, int], stages: tuple[int, int], shards: int, dtype: str, num_tokens: int, seed: int
) -> None:
    source = ShardedLayout(replace(LAYOUT, block_tokens=block_sizes[0]), 1, stages[0])
    destination = ShardedLayout(replace(LAYOUT, block_tokens=block_sizes[1], dtype=dtype), shards, stages[1])
    tokens = block_sizes[1]
    for giver, taker in itertools.product(source.ranks, destination.ranks):
        side, pool, values = filled(source, giver, num_tokens, seed)
        there = torch.from_numpy(values).to(getattr(torch, dtype))
        both = [layer for layer in source.layers_of(giver.stage) if layer in destination.layers_of(taker.stage)]
        heads = destination.heads_of(taker.shard)
        for first, end in itertools.combinations(range(both[0], both[-1] + 2) if both else (), 2):
            for block in range(-(-num_tokens // tokens)):
                expected = torch.zeros((end - first, len(heads), 2, tokens, 2), dtype=there.dtype)
                part = there[first:end, heads.start : heads.stop, :, block * tokens : (block + 1) * tokens]
                expected[:, :, :, : part.shape[3]] = part
                piece = gather_piece(
                    side, pool.data, destination, taker, logical_block=block, layers=range(first, end), num_tokens=num_tokens
                )  # fmt: skip
                assert piece.tobytes() == expected.view(torch.uint8).numpy().tobytes()


def test_what_the_source_does_not_hold_is_refused() -> None:
    whole, halves = ShardedLayout(LAYOUT), ShardedLayout(LAYOUT, 2, 2)
    side, pool, _ = filled(halves, Rank(0, 0), 20, 0)

    def gather(destination: ShardedLayout, rank: Rank, layers: range, block: int = 0, num_tokens: int = 20) -> memoryview:
        return gather_piece(
            side, pool.data, destination, rank, logical_block=block, layers=layers, num_tokens=num_tokens
        )  # fmt: skip

    gather(halves, Rank(0, 0), range(0, 2), 2)
    for destination, rank, layers in (
        (whole, Rank(0, 0), range(0, 2)),  # half of the heads
        (halves, Rank(0, 1), range(0, 2)),  # the other heads
        (halves, Rank(0, 0), range(1, 3)),  # a layer too many
        (halves, Rank(1, 0), range(2, 4)),
        (halves, Rank(0, 0), range(1, 1)),
    ):
        with pytest.raises(HandshakeRefused):
            gather(destination, rank, layers)
    for block, num_tokens, param in ((3, 20, "logical_block"), (-1, 20, "logical_block"), (3, 25, "blocks")):
        with pytest.raises(TicketRefused) as refused:
            gather(halves, Rank(0, 0), range(0, 2), block, num_tokens)
        assert refused.value.param == param


def test_whether_blocks_can_go_as_they_lie() -> None:
    assert not must_gather(ShardedLayout(LAYOUT), ShardedLayout(LAYOUT))
    assert not must_gather(ShardedLayout(LAYOUT, 2, 1), ShardedLayout(LAYOUT, 2, 3))
    for other in (replace(LAYOUT, block_tokens=16), replace(LAYOUT, dtype="float16")):
        assert must_gather(ShardedLayout(LAYOUT), ShardedLayout(other))
    assert must_gather(ShardedLayout(LAYOUT), ShardedLayout(LAYOUT, 2))
    with pytest.raises(HandshakeRefused):
        must_gather(ShardedLayout(LAYOUT), ShardedLayout(replace(LAYOUT, head_dim=4)))
