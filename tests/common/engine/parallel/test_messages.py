"""What rank 0 tells the others: whole and unchanged, or refused; and steps in parts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.engine.batch import SampleSpec, ScheduledBatch, SequenceSlice
from common.engine.parallel.messages import (
    CopyOrder,
    MoveOrder,
    StepOrder,
    StopOrder,
    SwapOrder,
    decode,
    encode_copy,
    encode_move,
    encode_step,
    encode_stop,
    encode_swap,
)
from common.engine.parallel.micro_batches import cut, num_micro_batches
from common.errors import EngineFailure

ids = st.integers(0, 2**31 - 1)
SAMPLE = SampleSpec(position=0, seed=0, choice=0, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, logprobs=None)
slices = st.builds(
    SequenceSlice,
    token_ids=st.lists(ids, min_size=1, max_size=20),
    start=st.integers(0, 100_000),
    block_table=st.lists(ids, max_size=20),
    samples=st.sampled_from([(), (SAMPLE,)]),
)
batches = st.lists(slices, min_size=1, max_size=6).map(lambda found: ScheduledBatch(tuple(found)))
groups = st.lists(st.lists(st.integers(0, 1000), max_size=5), max_size=4)


def told(batch: ScheduledBatch) -> list[tuple[list[int], int, list[int]]]:
    return [(list(item.token_ids), item.start, list(item.block_table)) for item in batch.slices]


@given(batch=batches, wanted=groups, watched=st.booleans())
def test_a_step_arrives_as_it_was(batch: ScheduledBatch, wanted: list[list[int]], watched: bool) -> None:
    order = decode(encode_step(batch, wanted, watched=watched))
    assert isinstance(order, StepOrder)
    assert told(order.batch) == told(batch)
    assert [list(rows) for rows in order.wanted] == wanted
    assert order.watched is watched


def test_the_other_messages() -> None:
    assert decode(encode_copy(7, 9)) == CopyOrder(7, 9)
    assert decode(encode_swap(5)) == SwapOrder(5)
    assert decode(encode_stop()) == StopOrder()


pairs = st.lists(st.tuples(ids, ids), max_size=9)


@given(brought_in=pairs, put_out=pairs, cut_at=st.integers(0, 10_000))
def test_moves_arrive_as_they_were_or_not_at_all(
    brought_in: list[tuple[int, int]], put_out: list[tuple[int, int]], cut_at: int
) -> None:
    message = encode_move(brought_in, put_out)
    assert decode(message) == MoveOrder(tuple(brought_in), tuple(put_out))
    with pytest.raises(EngineFailure):
        decode(message[: cut_at % len(message)])
    with pytest.raises(EngineFailure):
        decode(np.array([5, -1, 0], dtype=np.int32).tobytes())


@given(batch=batches, wanted=groups, cut_at=st.integers(0, 10_000), more=st.integers(1, 9))
def test_what_is_cut_off_or_too_long_is_refused(batch: ScheduledBatch, wanted: list[list[int]], cut_at: int, more: int) -> None:
    whole = encode_step(batch, wanted)
    for broken in (whole[: cut_at % len(whole)], whole + bytes(more)):
        with pytest.raises(EngineFailure):
            decode(broken)


@given(numbers=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=40))
def test_noise_is_refused_or_a_message(numbers: list[int]) -> None:
    message = np.array(numbers, dtype=np.int32).tobytes()
    try:
        decode(message)
    except EngineFailure:
        return


@given(batch=batches, parts=st.integers(1, 9))
def test_parts_of_a_step_are_the_step(batch: ScheduledBatch, parts: int) -> None:
    parts = min(parts, batch.num_tokens)
    found = cut(batch, parts)
    sizes = [part.num_tokens for part in found]
    assert len(found) == parts
    assert max(sizes) - min(sizes) <= 1
    rows = [
        (token, item.start + offset, tuple(item.block_table))
        for item in batch.slices
        for offset, token in enumerate(item.token_ids)
    ]
    assert rows == [
        (token, item.start + offset, tuple(item.block_table))
        for part in found
        for item in part.slices
        for offset, token in enumerate(item.token_ids)
    ]


@given(tokens=st.integers(1, 10_000), stages=st.integers(1, 8), least=st.integers(1, 600))
def test_parts_are_not_too_small_nor_too_many(tokens: int, stages: int, least: int) -> None:
    count = num_micro_batches(tokens, stages, least)
    assert 1 <= count <= max(1, 2 * stages)
    assert count == 1 or tokens // count >= least
    assert stages > 1 or count == 1
