"""A flight by itself: its source is a list that the test grows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress

import pytest

from common.clock import SystemClock
from common.errors import DeadlineExceeded, EngineFailure, PdserveError, WorkerLost
from common.tokenizer import Tokenizer
from common.types import FinishReason, Request, TokenChunk
from router.cache.entry import Recording
from router.cache.flight import Flight
from router.cache.shown import Shown
from router.dispatch import DispatchEvent
from router.validate import ValidCall
from support.cache_calls import Calls

TOKENS = (5, 6, 7, 8)


class Source:
    """Gives one token per `go`, and ends as told."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.steps = asyncio.Semaphore(0)
        self.failure = failure
        self.closed = asyncio.Event()
        self.asked = 0
        self.lane = ""

    async def generate(self, request: Request) -> AsyncGenerator[DispatchEvent, None]:
        self.asked += 1
        try:
            for index, token in enumerate(TOKENS):
                await self.steps.acquire()
                if self.failure is not None and index == 2:
                    raise self.failure
                last = index == len(TOKENS) - 1
                yield DispatchEvent((TokenChunk(0, (token,), finish_reason=FinishReason.LENGTH if last else None),))
        finally:
            self.closed.set()

    def go(self, steps: int = len(TOKENS)) -> None:
        for _ in range(steps):
            self.steps.release()


StartFlight = Callable[[Source], Flight]


@pytest.fixture
async def call(calls: Calls) -> ValidCall:
    return await calls.completion({"prompt": "x", "temperature": 0})


def fly(call: ValidCall, source: Source, kept: list[Recording], left: list[Flight]) -> Flight:
    recording = Recording(call, 0, with_text=False)
    return Flight(call.requests[0], source, recording, clock=SystemClock(), on_complete=kept.append, on_leave=left.append)


def soon() -> float:
    return SystemClock().monotonic_s() + 20


async def heard(flight: Flight) -> list[int]:
    async with aclosing(flight.listen(soon())) as events:
        return [token async for event in events for chunk in event.chunks for token in chunk.token_ids]


async def test_everybody_hears_everything_and_a_slow_listener_holds_up_nobody(call: ValidCall) -> None:
    source, kept = Source(), list[Recording]()
    flight = fly(call, source, kept, [])
    slow = flight.listen(soon())
    source.go(1)
    assert (await anext(slow)).chunks[0].token_ids == TOKENS[:1]  # and it reads no further for now
    quick = [asyncio.create_task(heard(flight)) for _ in range(3)]
    source.go(3)
    assert await asyncio.gather(*quick) == [list(TOKENS)] * 3
    assert len(kept) == 1
    assert kept[0].entry(0).choices[0].tokens == list(TOKENS)
    assert await heard(flight) == list(TOKENS)
    assert [chunk.token_ids for chunk in [event.chunks[0] async for event in slow]] == [(token,) for token in TOKENS[1:]]
    assert source.asked == 1
    await slow.aclose()


async def test_the_last_to_leave_ends_it_and_nobody_may_join(call: ValidCall) -> None:
    source, kept, left = Source(), list[Recording](), list[Flight]()
    flight = fly(call, source, kept, left)
    source.go(2)
    one, other = flight.listen(soon()), flight.listen(soon())
    await anext(one)
    await anext(other)
    await one.aclose()
    assert not left
    assert not source.closed.is_set()
    await other.aclose()
    assert left[0] is flight
    assert source.closed.is_set()
    assert flight.ended
    assert not kept


async def test_a_listener_that_is_cancelled_leaves(call: ValidCall) -> None:
    source = Source()
    flight = fly(call, source, [], [])
    task = asyncio.create_task(heard(flight))
    source.go(1)
    await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()
    assert source.closed.is_set()


@pytest.mark.parametrize("failure", [WorkerLost("gone"), EngineFailure("broken")])
async def test_a_failure_is_everybodys_own(call: ValidCall, failure: PdserveError) -> None:
    source, kept = Source(failure), list[Recording]()
    flight = fly(call, source, kept, [])
    tasks = [asyncio.create_task(heard(flight)) for _ in range(3)]
    source.go()
    raised = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(error) for error in raised] == [type(failure)] * 3
    assert len(set(map(id, raised))) == 3
    assert not kept


async def test_a_bug_in_the_source_reaches_the_listeners(call: ValidCall) -> None:
    source = Source(ZeroDivisionError())
    flight = fly(call, source, [], [])
    source.go()
    with pytest.raises(ZeroDivisionError):
        await heard(flight)


async def test_a_listener_has_its_own_deadline(call: ValidCall) -> None:
    source = Source()
    flight = fly(call, source, [], [])
    patient = asyncio.create_task(heard(flight))
    await asyncio.sleep(0)
    with pytest.raises(DeadlineExceeded):
        async with aclosing(flight.listen(SystemClock().monotonic_s())) as events:
            await anext(events)
    source.go()
    assert await patient == list(TOKENS)


async def test_a_source_that_stops_early_is_an_error(call: ValidCall) -> None:
    class Short(Source):
        async def generate(self, request: Request) -> AsyncGenerator[DispatchEvent, None]:
            yield DispatchEvent((TokenChunk(0, (5,)),))

    with pytest.raises(EngineFailure):
        await heard(fly(call, Short(), [], []))


async def test_a_closed_flight_tells_its_listeners(call: ValidCall, tokenizer: Tokenizer) -> None:
    flight = fly(call, Source(), [], [])
    task = asyncio.create_task(heard(flight))
    await asyncio.sleep(0)
    await flight.close()
    with pytest.raises(PdserveError, match="shutting down"):
        await task


def test_what_was_shown_is_not_shown_again() -> None:
    shown = Shown()
    for chunk in (TokenChunk(0, (1, 2)), TokenChunk(1, (9,)), TokenChunk(0, (3,))):
        assert shown.rest_of(DispatchEvent((chunk,))).chunks == (chunk,)
    shown.rewind()
    again = [
        TokenChunk(0, (1,)),
        TokenChunk(0, (2, 3, 4)),
        TokenChunk(1, (9, 8), finish_reason=FinishReason.STOP, stop_token_id=2),
    ]
    rests = [shown.rest_of(DispatchEvent((chunk,))).chunks for chunk in again]
    assert rests == [(), (TokenChunk(0, (4,)),), (TokenChunk(1, (8,), finish_reason=FinishReason.STOP, stop_token_id=2),)]
    end = TokenChunk(0, (), finish_reason=FinishReason.STOP, stop_token_id=2)
    assert shown.rest_of(DispatchEvent((end,))).chunks == (end,)
    shown.rewind()
    assert shown.rest_of(DispatchEvent((TokenChunk(0, (1, 2, 3, 4)), end))).chunks == ()
    assert shown.num_tokens == 6


@pytest.mark.parametrize("chunk", [TokenChunk(0, (1, 5)), TokenChunk(0, (1,), finish_reason=FinishReason.STOP)])
def test_another_answer_is_not_spliced_on(chunk: TokenChunk) -> None:
    shown = Shown()
    shown.rest_of(DispatchEvent((TokenChunk(0, (1, 2, 3)),)))
    shown.rewind()
    with pytest.raises(WorkerLost):
        shown.rest_of(DispatchEvent((chunk,)))
