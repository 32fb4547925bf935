"""A thread beside the event loop: order, errors, and what becomes of jobs that nobody waits for."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator

import pytest

from kvtransfer.transports.lane import Lane

PATIENCE_S = 60.0


class Told:
    """A lane, and the errors that it told of."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.lane = Lane("test-lane", self.errors.append)


@pytest.fixture
async def told() -> AsyncIterator[Told]:
    told = Told()
    yield told
    await told.lane.drained()


async def test_jobs_are_done_in_order_by_one_thread_beside_the_loop(told: Told) -> None:
    threads: list[tuple[int, int]] = []
    started = [told.lane.start(lambda number=number: threads.append((number, threading.get_ident()))) for number in range(50)]
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*started)
    assert [number for number, _ in threads] == list(range(50))
    assert len({thread for _, thread in threads}) == 1
    assert threads[0][1] != threading.get_ident()


async def test_an_error_is_told_before_who_waits_and_ends_only_its_job(told: Told) -> None:
    def fails() -> None:
        raise ValueError("planted")

    failing, following = told.lane.start(fails), told.lane.start(lambda: "done")
    with pytest.raises(ValueError, match="planted"):
        async with asyncio.timeout(PATIENCE_S):
            await failing
    assert [str(error) for error in told.errors] == ["planted"]
    assert await following == "done"


async def test_a_job_that_nobody_waits_for_any_more_is_done_all_the_same(told: Told) -> None:
    """Of two that are cancelled while the first of them is at work, one fails: that is told as well."""
    begun, may_go_on, done = threading.Event(), threading.Event(), threading.Event()

    def waits() -> None:
        begun.set()
        assert may_go_on.wait(PATIENCE_S)
        done.set()

    def fails() -> None:
        raise ValueError("planted")

    tasks = [asyncio.ensure_future(told.lane.start(job)) for job in (waits, fails)]
    await asyncio.to_thread(begun.wait, PATIENCE_S)
    for task in tasks:
        task.cancel()
    assert not done.is_set()
    may_go_on.set()
    async with asyncio.timeout(PATIENCE_S):
        assert await told.lane.start(lambda: 7) == 7
    assert done.is_set()
    assert [str(error) for error in told.errors] == ["planted"]


async def test_drained_waits_for_what_was_started_and_ends_the_thread() -> None:
    told, done = Told(), list[int]()
    may_go_on = threading.Event()
    told.lane.start(lambda: may_go_on.wait(PATIENCE_S))
    told.lane.start(lambda: done.append(1))
    draining = asyncio.create_task(told.lane.drained())
    await asyncio.sleep(0.01)
    assert not draining.done()
    may_go_on.set()
    async with asyncio.timeout(PATIENCE_S):
        await draining
    assert done == [1]
    assert not any(thread.name.startswith("test-lane") for thread in threading.enumerate())


def test_a_loop_that_is_closed_first_is_no_error_of_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    may_go_on = threading.Event()

    async def start() -> threading.Thread:
        Told().lane.start(lambda: may_go_on.wait(PATIENCE_S))
        return next(thread for thread in threading.enumerate() if thread.name.startswith("test-lane"))

    thread = asyncio.run(start())
    may_go_on.set()
    gc.collect()  # a pool that nobody holds ends its thread
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert caplog.records == []


async def test_it_is_idle_once_the_loop_knows_of_the_end_of_all_jobs(told: Told) -> None:
    """Also of those that nobody waits for, and that failed."""

    def fails() -> None:
        raise ValueError("planted")

    assert told.lane.idle
    may_go_on = threading.Event()
    waiting, failing = told.lane.start(lambda: may_go_on.wait(PATIENCE_S)), told.lane.start(fails)
    waiting.cancel()
    await asyncio.sleep(0)
    assert not told.lane.idle
    may_go_on.set()
    with pytest.raises(ValueError, match="planted"):
        async with asyncio.timeout(PATIENCE_S):
            await failing
    assert told.lane.idle
