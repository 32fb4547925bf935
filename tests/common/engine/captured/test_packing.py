"""Packed rows against what each step should hold, worked out one sequence at a time, over random lives of sequences."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from common.engine.batch import SampleSpec, SequenceSlice
from common.engine.captured.buckets import Bucket
from common.engine.captured.packing import PackedRows, PackedViews, edits_of_rows, packed_size, settings_of_rows, step_words
from common.engine.draw_settings import settings_of
from common.engine.token_rules import RowRules

BLOCK_TOKENS, SCRATCH = 4, 99
BUCKET = Bucket(6, 8)


def check(packed: PackedRows, slices: list[SequenceSlice], num_fresh: int) -> None:
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
    entered = [item.block_table[item.start // BLOCK_TOKENS] for item in slices if item.start % BLOCK_TOKENS == 0]
    assert num_fresh == len(entered)
    assert views.fresh_blocks.tolist() == [*entered, *[SCRATCH] * (BUCKET.rows - len(entered))]


def test_each_step_holds_its_batch_and_padding_whatever_was_there_before() -> None:
    chance = random.Random(5)
    packed = PackedRows(BUCKET, BLOCK_TOKENS, SCRATCH, pinned=False)
    assert packed.tensor.numel() == packed_size(BUCKET)
    check(packed, [], 0)
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


@pytest.mark.parametrize("bucket", [Bucket(6, 8), Bucket(1, 2), Bucket(3, 4)])
def test_each_number_is_in_one_view(bucket: Bucket) -> None:
    values = torch.arange(packed_size(bucket), dtype=torch.int32)
    views = PackedViews(values, bucket)
    fields = (views.token_ids, views.positions, views.slots, views.lengths, views.fresh_blocks)
    step = torch.cat((*fields, views.block_tables.reshape(-1)))
    assert torch.equal(step, values[: step_words(bucket)])
    settings = settings_of_rows(values, bucket).view(torch.int32).reshape(-1)
    behind = torch.cat((settings, edits_of_rows(values, bucket)))
    assert torch.equal(behind, values[step_words(bucket) + step_words(bucket) % 2 :])
    assert settings.numel() == 16 * bucket.rows


def test_draws_are_packed_behind_the_step_and_leave_it_as_it_is() -> None:
    packed = PackedRows(BUCKET, BLOCK_TOKENS, SCRATCH, pinned=False)
    slices = [SequenceSlice([7], 5, [3, 4]), SequenceSlice([8], 0, [9])]
    packed.fill(slices)
    step = packed.tensor[: step_words(BUCKET)].clone()
    specs = [None, SampleSpec(1, 5, 0, 0.5, 3, 0.9, 0.0, None)]
    without = packed.fill_draws(specs, [], 100)
    rules = RowRules(banned_token_ids=np.array([4, 6]))
    used = packed.fill_draws(specs, [(1, rules)], 100)
    assert torch.equal(packed.tensor[: step_words(BUCKET)], step)
    assert torch.equal(settings_of_rows(packed.tensor, BUCKET)[1], torch.from_numpy(settings_of(specs[1:], [1]))[0])
    assert edits_of_rows(packed.tensor, BUCKET)[: used - without].tolist() == [8, 0, 8, 0, 8, 2, 0, 0, 104, 106]
    many = RowRules(banned_token_ids=np.arange(packed.tensor.numel()))
    assert packed.has_room_for([(1, rules)])
    assert not packed.has_room_for([(1, many)])
