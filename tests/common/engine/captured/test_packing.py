"""Packed rows against what each step should hold, worked out one sequence at a time, over random lives of sequences."""

from __future__ import annotations

import random

import torch

from common.engine.batch import SequenceSlice
from common.engine.captured.buckets import Bucket
from common.engine.captured.packing import PackedRows, PackedViews, packed_size

BLOCK_TOKENS, SCRATCH = 4, 99
BUCKET = Bucket(6, 8)


def check(packed: PackedRows, slices: list[SequenceSlice], entered: list[int]) -> None:
    views = PackedViews(packed.tensor, BUCKET)
    for row in range(BUCKET.rows):
        token_id, position, slot, length = (
            int(part[row]) for part in (views.token_ids, views.positions, views.slots, views.lengths)
        )
        table = views.block_tables[row].tolist()
        if row < len(slices):
            item = slices[row]
            assert (token_id, position, length) == (item.token_ids[0], item.start, item.start + 1)
            assert slot == item.block_table[item.start // BLOCK_TOKENS] * BLOCK_TOKENS + item.start % BLOCK_TOKENS
            assert table == [*item.block_table, *[0] * (BUCKET.blocks - len(item.block_table))]
        else:
            assert (token_id, position, slot, length) == (0, 0, SCRATCH * BLOCK_TOKENS, 1)
            assert table == [SCRATCH, *[0] * (BUCKET.blocks - 1)]
    assert entered == [item.block_table[item.start // BLOCK_TOKENS] for item in slices if item.start % BLOCK_TOKENS == 0]


def test_each_step_holds_its_batch_and_padding_whatever_was_there_before() -> None:
    chance = random.Random(5)
    packed = PackedRows(BUCKET, BLOCK_TOKENS, SCRATCH, pinned=False)
    assert packed.tensor.numel() == packed_size(BUCKET)
    check(packed, [], [])
    running: list[tuple[int, list[int]]] = []  # tokens in KV, blocks
    for _ in range(400):
        if chance.random() < 0.2 and len(running) < BUCKET.rows:
            length = chance.randrange(20)
            running.insert(
                chance.randrange(len(running) + 1), (length, [chance.randrange(1, 90) for _ in range(length // BLOCK_TOKENS + 1)])
            )
        if chance.random() < 0.15 and running:
            running.pop(chance.randrange(len(running)))
        if chance.random() < 0.1 and running:  # preempted and computed again: other blocks for the same tokens
            row = chance.randrange(len(running))
            running[row] = (running[row][0], [chance.randrange(1, 90) for _ in running[row][1]])
        running = [
            (length, blocks if length // BLOCK_TOKENS < len(blocks) else [*blocks, chance.randrange(1, 90)])
            for length, blocks in running
            if length // BLOCK_TOKENS < BUCKET.blocks
        ]
        slices = [SequenceSlice([chance.randrange(-6, 500)], length, list(blocks)) for length, blocks in running]
        check(packed, slices, packed.fill(slices))
        running = [(length + 1, blocks) for length, blocks in running]


def test_views_of_another_tensor_are_the_same_places() -> None:
    values = torch.arange(packed_size(BUCKET))
    views = PackedViews(values, BUCKET)
    assert torch.equal(
        torch.cat((views.token_ids, views.positions, views.slots, views.lengths, views.block_tables.reshape(-1))), values
    )
