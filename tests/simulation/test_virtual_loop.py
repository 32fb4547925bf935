"""The event loop of the simulation keeps asyncio's promises, and its own: virtual time, seeded order, pauses, sudden death."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from random import Random
from typing import Any

import pytest

from support.simulation.virtual_loop import Deadlock, OutOfTime, ProcessLoop, VirtualTime


def start(loop: ProcessLoop, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    task: asyncio.Task[Any] = loop.call(loop.create_task, work)
    return task


def finish(time: VirtualTime, *tasks: asyncio.Task[Any], until_s: float = 100.0) -> list[Any]:
    time.run(lambda: all(task.done() for task in tasks), until_s=until_s, what="the tasks")
    return [task.result() for task in tasks]


@pytest.fixture
def time() -> VirtualTime:
    return VirtualTime(Random(1))


def test_callbacks_run_in_the_order_in_which_they_became_ready(time: VirtualTime) -> None:
    loop = ProcessLoop(time, "a", 1)
    seen: list[int] = []
    for number in range(20):
        loop.call_soon(seen.append, number)
    time.run(lambda: len(seen) == 20, until_s=1.0, what="all")
    assert seen == list(range(20))


def test_timers_fire_in_order_and_never_early(time: VirtualTime) -> None:
    loop = ProcessLoop(time, "a", 1, offset_s=500.0, rate=1.001)
    seen: list[tuple[float, float]] = []
    for delay_s in (0.3, 0.1, 0.2, 0.1):
        due_s = loop.time() + delay_s
        loop.call_later(delay_s, lambda due_s=due_s: seen.append((due_s, loop.time())))
    loop.call_later(0.15, seen.clear).cancel()
    time.run(lambda: len(seen) == 4, until_s=1.0, what="all")
    assert [due_s for due_s, _ in seen] == sorted(due_s for due_s, _ in seen)
    assert all(0.0 <= fired_s - due_s < 0.001 for due_s, fired_s in seen)


def test_what_asyncio_offers_works(time: VirtualTime) -> None:
    loop = ProcessLoop(time, "a", 1)

    async def work() -> list[object]:
        queue: asyncio.Queue[int] = asyncio.Queue()
        lock, event = asyncio.Lock(), asyncio.Event()

        async def produce() -> None:
            for number in range(3):
                await asyncio.sleep(1.0)
                async with lock:
                    queue.put_nowait(number)
            event.set()

        got: list[object] = []
        async with asyncio.TaskGroup() as group:
            group.create_task(produce())
            got += [await queue.get() for _ in range(3)]
        await event.wait()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2.0):
                await asyncio.Event().wait()
        got += await asyncio.gather(asyncio.sleep(0.5, "x"), asyncio.sleep(0.1, "y"))
        got.append(asyncio.get_running_loop() is loop)
        return got

    (result,) = finish(time, start(loop, work()))
    assert result == [0, 1, 2, "x", "y", True]
    assert 5.5 < time.now_s < 5.6


def test_clocks_of_two_processes_differ(time: VirtualTime) -> None:
    fast, slow = ProcessLoop(time, "f", 1, offset_s=10.0, rate=2.0), ProcessLoop(time, "s", 2, offset_s=-3.0, rate=1.0)
    ends: dict[str, float] = {}

    async def sleep(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        ends[name] = time.now_s

    finish(time, start(fast, sleep("fast", 4.0)), start(slow, sleep("slow", 4.0)))
    assert ends["fast"] == pytest.approx(2.0, abs=0.001)
    assert ends["slow"] == pytest.approx(4.0, abs=0.001)


def test_waiting_for_what_cannot_happen_is_a_deadlock_and_for_what_takes_too_long_is_late(time: VirtualTime) -> None:
    loop = ProcessLoop(time, "a", 1)

    async def wait_for_ever() -> None:
        await asyncio.Event().wait()

    task = start(loop, wait_for_ever())
    with pytest.raises(Deadlock):
        finish(time, task)
    loop.call_later(50.0, task.cancel)
    with pytest.raises(OutOfTime):
        finish(time, task, until_s=20.0)
    loop.bury()
    assert task.cancelled()


def test_a_paused_process_does_nothing_and_loses_nothing(time: VirtualTime) -> None:
    loop, other = ProcessLoop(time, "a", 1), ProcessLoop(time, "b", 2)
    seen: list[tuple[str, float]] = []

    async def tick() -> None:
        for _ in range(3):
            await asyncio.sleep(1.0)
            seen.append(("tick", time.now_s))

    task = start(loop, tick())
    time.at(1.5, loop.pause)
    time.at(1.6, loop.call_soon, lambda: seen.append(("message", time.now_s)))
    time.at(8.0, loop.resume)
    finish(time, task, start(other, asyncio.sleep(9.9)))
    assert [name for name, _ in seen] == ["tick", "message", "tick", "tick"]
    assert [round(at_s) for _, at_s in seen] == [1, 8, 8, 9]


def test_a_killed_process_runs_no_cleanup_before_the_end_of_the_simulation(time: VirtualTime) -> None:
    loop, other = ProcessLoop(time, "a", 1), ProcessLoop(time, "b", 2)
    seen: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(5.0)
        finally:
            await asyncio.sleep(1.0)  # in the afterlife: cancelled again
            seen.append("never")

    task = start(loop, work())
    time.at(1.0, loop.kill)
    finish(time, start(other, asyncio.sleep(50.0)))
    assert (task.done(), seen) == (False, [])
    loop.bury()
    assert (task.done(), seen, loop.complaints) == (True, [], [])


def test_who_does_not_end_when_cancelled_is_reported(time: VirtualTime) -> None:
    loop = ProcessLoop(time, "a", 1)

    async def stubborn() -> None:
        while not enough:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                continue

    enough: list[int] = []
    task = start(loop, stubborn())
    time.at(0.1, lambda: None)
    time.run(lambda: time.now_s >= 0.1, until_s=1.0, what="a while")
    loop.bury()
    assert any("does not end when cancelled" in complaint for complaint in loop.complaints)
    enough.append(1)
    loop.bury()
    assert task.done()


def test_an_exception_that_nobody_looks_at_is_noted(time: VirtualTime) -> None:
    loop = ProcessLoop(time, "a", 1)

    async def fail() -> None:
        raise ValueError("lost")

    task = start(loop, fail())
    time.run(task.done, until_s=1.0, what="the end")
    del task
    assert any("lost" in complaint for complaint in loop.complaints)


def interleaving(seed: int) -> tuple[list[str], int]:
    time = VirtualTime(Random(seed))
    order: list[str] = []

    async def work(name: str) -> None:
        for _ in range(5):
            order.append(name)
            await asyncio.sleep(0.001)

    finish(time, *(start(ProcessLoop(time, name, number), work(name)) for number, name in enumerate("abc")))
    return order, time.history


def test_the_seed_decides_the_order_between_processes_and_nothing_else_does() -> None:
    assert interleaving(7) == interleaving(7)
    runs = [interleaving(seed) for seed in range(30)]
    assert len({tuple(order) for order, _ in runs}) > 10
    assert len({history for _, history in runs}) == 30
