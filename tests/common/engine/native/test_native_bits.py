"""The compiled step against itself, bit by bit: whoever shares the step, however work is cut, however many threads compute it."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.engine.native.library import Library
from common.engine.quantisation import WeightFormat
from support.step_worlds import BUSY, WAYS, Case, World, architecture, cases, in_rounds, one_by_one


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_bits_in_any_company(library: Library, dtype: torch.dtype, way: str) -> None:
    world = WAYS[way].world(dtype)
    pool = world.pool()
    model = world.native_model(library, pool)
    expected, memory = world.run(model, pool), pool.tensor.clone()
    for steps in (one_by_one(BUSY), in_rounds(BUSY)):
        assert torch.equal(world.run(model, pool, steps), expected)
        # What lies behind a sequence's end in its last block is cleared when a step enters the block, whichever step that is.
        assert torch.equal(pool.tensor, memory)


@st.composite
def families(draw: st.DrawFn) -> Case:
    """Sequences of few rows, mostly, of which many begin with blocks of an earlier one."""
    block_tokens = draw(st.sampled_from([1, 7, 16, 32, 64, 100]))
    sequences = draw(
        st.lists(st.tuples(st.integers(0, 210), st.sampled_from([1, 1, 1, 2, 5, 40])), min_size=2, max_size=12).map(tuple)
    )
    beginnings = []
    for index in range(1, len(sequences)):
        other = draw(st.integers(0, index - 1))
        most = min(sequences[index][0], sequences[other][0]) // block_tokens
        beginnings.append((index, other, draw(st.one_of(st.just(most), st.integers(0, most)))))
    kv_heads = draw(st.integers(1, 2))
    heads = kv_heads * draw(st.sampled_from([1, 3, 8, 40]))
    shape = architecture(heads=heads, kv_heads=kv_heads, head_dim=draw(st.sampled_from([10, 64])))
    return Case(shape, block_tokens, sequences, draw(st.integers(0, 1000)), tuple(beginnings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=families(), rounded_kv=st.booleans(), threads=st.integers(1, 3))
def test_who_shares_a_beginning_gets_the_same_bits_as_alone(
    library: Library, dtype: torch.dtype, case: Case, rounded_kv: bool, threads: int
) -> None:
    world = World(case, dtype, rounded_kv=rounded_kv)
    pool = world.pool()
    expected, memory = world.run(world.native_model(library, pool), pool, one_by_one(case)), pool.tensor.clone()
    assert torch.equal(world.run(world.native_model(library, pool, threads), pool), expected)
    assert torch.equal(pool.tensor, memory)


@st.composite
def cut_anyhow(draw: st.DrawFn) -> tuple[Case, list[list[tuple[int, int, int]]]]:
    """A case, and steps that compute each of its rows once: any chunks, in any company, at any place of the batch."""
    case = draw(cases())
    done = [0] * len(case.sequences)
    steps = []
    while left := [index for index, (_, rows) in enumerate(case.sequences) if done[index] < rows]:
        chosen = draw(st.lists(st.sampled_from(left), min_size=1, unique=True))
        shares = []
        for index in chosen:
            rest = case.sequences[index][1] - done[index]
            count = draw(st.one_of(st.just(1), st.integers(1, rest), st.just(rest)))
            shares.append((index, done[index], done[index] + count))
            done[index] += count
        steps.append(shares)
    return case, steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    work=cut_anyhow(),
    format=st.sampled_from([WeightFormat.MODEL, WeightFormat.INT8, WeightFormat.INT4_BLOCKS]),
    rounded_kv=st.booleans(),
    threads=st.integers(1, 2),
)
def test_a_row_is_the_same_bits_however_work_is_cut(
    library: Library,
    dtype: torch.dtype,
    work: tuple[Case, list[list[tuple[int, int, int]]]],
    format: WeightFormat,
    rounded_kv: bool,
    threads: int,
) -> None:
    """What exact mode rests on, for any shape of model."""
    case, steps = work
    world = World(case, dtype, format, rounded_kv=rounded_kv)
    pool = world.pool()
    expected, memory = world.run(world.native_model(library, pool), pool), pool.tensor.clone()
    model = world.native_model(library, pool, threads)
    assert torch.equal(world.run(model, pool, steps), expected)
    assert torch.equal(pool.tensor, memory)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_change_no_bit(library: Library, threads: int, way: str) -> None:
    world = WAYS[way].world(torch.bfloat16)
    pool = world.pool()
    expected = world.run(world.native_model(library, pool), pool)
    memory = pool.tensor.clone()
    model = world.native_model(library, pool, threads)
    for _ in range(5):
        assert torch.equal(world.run(model, pool), expected)
        assert torch.equal(pool.tensor, memory)


@pytest.mark.parametrize("way", WAYS)
def test_threads_change_no_bit_of_steps_of_few_rows(library: Library, way: str) -> None:
    """Of which each thread prepares the rows for itself: one to five at a time, of one sequence and of several."""
    world = WAYS[way].world(torch.bfloat16)
    pool = world.pool()
    expected = world.run(world.native_model(library, pool), pool)
    memory = pool.tensor.clone()
    firsts = [(index, first) for index, (_, rows) in enumerate(world.case.sequences) for first in range(rows)]
    singles = [(index, first, first + 1) for index, first in sorted(firsts, key=lambda place: place[1])]
    for most, threads in itertools.product((1, 2, 4, 5), (2, 8)):
        steps: list[list[tuple[int, int, int]]] = [[]]
        for index, first, end in singles:
            step = steps[-1]
            if len(step) == most or any(index == other for other, _, _ in step):
                steps.append([])
            steps[-1].append((index, first, end))
        assert torch.equal(world.run(world.native_model(library, pool, threads), pool, steps), expected)
        assert torch.equal(pool.tensor, memory)
    rows_of = [
        (index, first, min(first + 4, rows))
        for index, (_, rows) in enumerate(world.case.sequences)
        for first in range(0, rows, 4)
    ]
    assert torch.equal(world.run(world.native_model(library, pool, 8), pool, [[share] for share in rows_of]), expected)
    assert torch.equal(pool.tensor, memory)


def test_the_bitwise_comparison_can_fail(library: Library) -> None:
    """Torch's own arithmetic gives a row other bits when it stands alone."""
    world = World(BUSY)
    pool = world.pool()
    model = world.torch_model()
    together = world.run(model, pool, backend="fast")
    assert not torch.equal(world.run(model, pool, one_by_one(BUSY), backend="fast"), together)


def test_threads_sleep_between_steps(library: Library) -> None:
    """Counted in time on a core, which other processes do not change: three spinning threads would take three times the wait."""
    world = World(BUSY)
    pool = world.pool()
    model = world.native_model(library, pool, threads=4)
    world.run(model, pool)
    before = time.process_time()
    threading.Event().wait(0.5)
    assert time.process_time() - before < 0.2


class InTurn:
    """Another number of threads for each call."""

    most = 4

    def __init__(self) -> None:
        self._numbers = itertools.cycle((3, 1, 4, 2, 9))

    @contextmanager
    def computing(self, num_rows: int) -> Iterator[int]:
        yield next(self._numbers)


def test_the_number_of_threads_may_change_between_calls_and_changes_no_bit(library: Library) -> None:
    world = World(BUSY)
    expected = world.run(world.native_model(library, pool := world.pool()), pool)
    model = world.native_model(library, pool := world.pool(), cores=InTurn())
    for _ in range(40):
        pool.tensor.copy_(world.memory)
        assert torch.equal(world.run(model, pool), expected)
