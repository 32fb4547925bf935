"""Requests that are given up: at every edge of their way, in hundreds, and with somebody waiting behind them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from common.config import DecodeConfig, PrefillConfig
from common.errors import DeadlineExceeded, NoWorkerAvailable, PdserveError
from decode_worker.generation import Choice
from decode_worker.scheduler import DecodeScheduler
from prefill_worker.scheduler import PrefillScheduler
from support.planted_links import Plants
from support.prefill_steps import PrefillSteps
from support.workers import Workers, request, running_workers
from support.zoo import (
    BLOCK,
    ENGINE,
    REMOTE,
    UNCACHED,
    Held,
    Oracle,
    Stall,
    another_decode,
    assert_no_ghosts,
    ending,
    for_ever,
    is_free,
    prompt_of,
    until,
    within,
)

# -- a client leaves between two legs ----------------------------------------------------------------------------------


async def _before_handshake(workers: Workers, plants: Plants, leave: Callable[[], None]) -> None:
    plants.handshake = _leaving(leave, before=True)


async def _after_handshake(workers: Workers, plants: Plants, leave: Callable[[], None]) -> None:
    plants.handshake = _leaving(leave, before=False)


async def _before_run(workers: Workers, plants: Plants, leave: Callable[[], None]) -> None:
    plants.run = _leaving(leave, before=True)


async def _after_run(workers: Workers, plants: Plants, leave: Callable[[], None]) -> None:
    plants.run = _leaving(leave, before=False)


async def _verified_but_not_admitted(workers: Workers, plants: Plants, leave: Callable[[], None]) -> None:
    """The hand-off is complete; the engine, which stands still, has not heard of it."""

    async def run(call: Any, message: Any, timeout_s: float) -> Any:
        reply = await call(message, timeout_s)
        held = Held(workers.decode)
        await until(lambda: held.holding, "the engine stands still")

        async def leave_later() -> None:
            await until(held.has_mail, "the engine is told that the KV is there")
            leave()
            await until(lambda: held.has_mail(2), "and that nobody wants it any more")
            held.release()

        leaving.append(asyncio.ensure_future(leave_later()))
        return reply

    leaving: list[asyncio.Future[None]] = []
    plants.run = run


def _leaving(leave: Callable[[], None], *, before: bool) -> Any:
    async def call_and_leave(call: Any, message: Any, timeout_s: float) -> Any:
        reply = None if before else await call(message, timeout_s)
        leave()
        await asyncio.sleep(0.02 if before else 10.0)  # a cancel needs no time; one that arrives a little later goes on
        return reply if reply is not None else await call(message, timeout_s)

    return call_and_leave


EDGES = [_before_handshake, _after_handshake, _before_run, _after_run, _verified_but_not_admitted]


@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge.__name__.strip("_").replace("_", " "))
@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_z09_z31_a_client_that_leaves_between_two_legs(
    model_path: Path, oracle: Oracle, plants: Plants, transport: str, edge: Any
) -> None:
    """Z09 and Z31, vllm#50425, dynamo#13855. There: the client left when the prompt was computed and before the decode side asked
    for it; nobody told the prefill side, which kept its blocks for 480 s, or for good.
    Ours: at every edge between two legs, with leases and tickets that never run out, both pools are whole again at once."""
    async with running_workers(
        model_path, engine=UNCACHED, decode=REMOTE, transfer=for_ever(transport), prefill=PrefillConfig(chunk_tokens=32)
    ) as workers:
        call = workers.open(request(prompt_of(150, 70)))
        await edge(workers, plants, call.cancel)
        with pytest.raises(asyncio.CancelledError):
            await within(call.read())
        plants.handshake = plants.run = None
        await workers.assert_nothing_leaks()
        await assert_no_ghosts(workers)
        work = request(prompt_of(150, 71), max_tokens=6)
        assert oracle.agrees(work, await within(workers.generate(work)))
        await workers.assert_nothing_leaks()


# -- hundreds ----------------------------------------------------------------------------------------------------------

SLOTS = 8


async def _abort_hundreds(workers: Workers, count: int, longest_s: float = 0.02) -> None:
    """Each within `longest_s`, wherever it is by then."""
    chance = random.Random(72)

    async def one(number: int) -> None:
        work = request(prompt_of(chance.randrange(1, 60), number), request_id=f"a{number % 40}", max_tokens=30)
        call = workers.open(work)
        reading = asyncio.ensure_future(call.read())
        await asyncio.sleep(chance.random() * longest_s)
        call.cancel()
        await asyncio.wait({reading})
        if not reading.cancelled():
            reading.exception()

    for first in range(0, count, 2 * SLOTS):
        await asyncio.gather(*(one(number) for number in range(first, min(first + 2 * SLOTS, count))))


@pytest.mark.parametrize("guarded", [True, False], ids=["", "without the guard"])
async def test_z17_after_many_aborts_a_full_batch_is_admitted(
    model_path: Path, oracle: Oracle, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """Z17, sglang#9266. There: each abort leaked a request slot, until nothing was admitted any more.
    Ours: slots are in the ledger as blocks are: after hundreds of aborts as many requests run at once as on the first day, in a
    pool that has room for just these."""
    lost: list[int] = []
    if not guarded:
        drained = DecodeScheduler.drained

        def losing(scheduler: DecodeScheduler, blocks: Sequence[int]) -> None:
            lost.extend(blocks[:1])
            drained(scheduler, blocks[1:])

        monkeypatch.setattr(DecodeScheduler, "drained", losing)
    engine = UNCACHED.model_copy(update={"kv_pool_tokens": SLOTS * 5 * BLOCK})
    config = DecodeConfig(local_prefill="never", max_running=SLOTS, watermark_blocks=0)
    async with running_workers(model_path, engine=engine, prefill_engine=UNCACHED, decode=config) as workers:
        await _abort_hundreds(workers, 320 if guarded else 160)
        if not guarded:
            longest_s = 0.02
            while not lost:  # on a slow machine all may have been aborted before anything was on its way
                longest_s *= 2
                await _abort_hundreds(workers, 2 * SLOTS, longest_s)
            await until(lambda: not workers.decode._scheduler._generations, "all are gone")
            assert not await is_free(workers, workers.decode_ref)
            return
        await workers.assert_nothing_leaks()
        await assert_no_ghosts(workers)
        at_once: list[int] = []
        schedule = workers.decode._scheduler.schedule

        def watched() -> Any:
            plan = schedule()
            at_once.append(workers.decode._scheduler.num_running)  # those whose prompt is computed elsewhere hold a slot, too
            return plan

        workers.decode._scheduler.schedule = watched  # type: ignore[method-assign]
        work = [request(prompt_of(4 * BLOCK + 1, 80 + index), request_id=str(index), max_tokens=15) for index in range(SLOTS)]
        answers = await workers.generate_together(work)
        assert all(map(oracle.agrees, work, answers))
        assert max(at_once) == SLOTS
        assert workers.decode._scheduler.totals.preemptions == 0
        await workers.assert_nothing_leaks()


@pytest.mark.parametrize("loaded", [False, True], ids=["idle", "loaded"])
async def test_z22_no_phantom_is_left_on_the_prefill_worker(
    model_path: Path, oracle: Oracle, plants: Plants, loaded: bool
) -> None:
    """Z22, sglang#20272. There: pause and retract loops left phantom requests on the prefill side, and an empty batch crashed
    it.
    Ours: a run that is stopped, at any step, idle or beside others, is gone when it has been released; nothing to compute is no
    step."""
    async with running_workers(
        model_path, engine=UNCACHED, decode=REMOTE, prefill=PrefillConfig(chunk_tokens=8), transfer=for_ever("tcp")
    ) as workers:
        scheduler = workers.prefill[0]._scheduler
        work = request(prompt_of(1200, 90), request_id="long", max_tokens=4)
        beside = asyncio.ensure_future(workers.generate(work)) if loaded else None
        for number in range(40):
            call = workers.open(request(prompt_of(200, 91), request_id="phantom"))
            reading = asyncio.ensure_future(call.read())
            runs, submitted = len(plants.runs), scheduler.totals.submitted
            if number % 2:
                await until(lambda runs=runs: len(plants.runs) > runs, "Run is on its way")  # type: ignore[misc]
            if number % 4 == 3:
                await until(lambda submitted=submitted: scheduler.totals.submitted > submitted, "the prompt is queued")  # type: ignore[misc]
            call.cancel()
            await asyncio.wait({reading})
        if beside is not None:
            assert oracle.agrees(work, await within(beside))
        await workers.assert_nothing_leaks()
        await assert_no_ghosts(workers)
        workers.prefill[0]._loop.post(lambda: None)
        idle = scheduler.schedule()
        assert (idle.batch.slices, idle.prompts) == ((), ())


async def test_z24_a_preempted_request_is_aborted(model_path: Path, oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Z24, sglang#18701. There: aborting a retracted request leaked the KV that it had put aside.
    Ours: a request that lost its blocks holds none: aborting it between preemption and readmission leaves the ledger even, and
    those for whose sake it was preempted are right."""
    preempted: list[str] = []
    loop = asyncio.get_running_loop()
    calls: dict[str, grpc.aio.UnaryStreamCall] = {}
    preempt = DecodeScheduler._preempt

    def watched(scheduler: DecodeScheduler, choice: Choice) -> None:
        preempt(scheduler, choice)
        if not preempted:
            name = choice.generation.request.request_id.partition("#")[0]
            preempted.append(name)
            held.append(Held(workers.decode))  # before the abort that follows, and before anything is admitted
            loop.call_soon_threadsafe(calls[name].cancel)

    held: list[Held] = []
    monkeypatch.setattr(DecodeScheduler, "_preempt", watched)
    engine = UNCACHED.model_copy(update={"kv_pool_tokens": 12 * BLOCK})
    config = DecodeConfig(local_prefill="never", watermark_blocks=0)
    async with running_workers(model_path, engine=engine, prefill_engine=UNCACHED, decode=config) as workers:
        work = [request(prompt_of(3 * BLOCK, 95 + index), request_id=f"p{index}", max_tokens=60) for index in range(3)]
        start = Held(workers.decode)  # so that they want more than there is at the same time
        await until(lambda: start.holding, "the engine stands still")
        calls |= {item.request_id: workers.open(item) for item in work}
        said = {name: asyncio.ensure_future(_tokens(call)) for name, call in calls.items()}
        await until(lambda: len(workers.decode._streams._streams) == len(work), "all three have come")
        start.release()
        await until(lambda: bool(held), "somebody is preempted")
        await until(held[0].has_mail, "and aborted")
        scheduler = workers.decode._scheduler
        assert [choice.generation.request.request_id.partition("#")[0] for choice in scheduler._waiting] == preempted
        assert all(not choice.sequence.blocks for choice in scheduler._waiting)
        held[0].release()
        for item in work:
            if item.request_id in preempted:
                with pytest.raises(asyncio.CancelledError):
                    await within(said[item.request_id])
            else:
                assert await within(said[item.request_id]) == oracle.tokens(item)
        await workers.assert_nothing_leaks()
        await assert_no_ghosts(workers)


async def _tokens(call: grpc.aio.UnaryStreamCall) -> list[int]:
    return [token async for event in call for chunk in event.chunks for token in chunk.token_ids]


# -- a long prefill that nobody wants any more --------------------------------------------------------------------------


@pytest.mark.parametrize("guarded", [True, False], ids=["", "without the guard"])
async def test_z30_a_long_prefill_stops_within_a_chunk(
    model_path: Path, oracle: Oracle, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """Z30, dynamo#13691. There: prefill ran on after the client had left, and a short request waited for up to 54 s behind it.
    Ours: when the cancellation has reached the prefill worker, at most one chunk of the abandoned prompt is still computed, and
    the next step is the one that waited."""
    if not guarded:
        for guard in ("give_up", "stop", "release"):
            monkeypatch.setattr(PrefillScheduler, guard, lambda scheduler, request_id: None)
    config = PrefillConfig(chunk_tokens=4, max_running=1)
    async with running_workers(model_path, engine=UNCACHED, decode=REMOTE, prefill=config, transfer=for_ever()) as workers:
        steps = PrefillSteps(workers.prefill[0])
        steps.hold("long", after_steps=2)
        long = workers.open(request([5] * 1900, request_id="long"))
        reading = asyncio.ensure_future(long.read())
        await until(lambda: steps.held, "the long prompt is under way")
        work = request(prompt_of(30, 96), request_id="short", max_tokens=2)
        behind = asyncio.ensure_future(workers.generate(work))
        await until(lambda: steps.posted("short"), "the short one comes")
        steps.hold("long", after_steps=4)
        await until(lambda: workers.prefill[0]._scheduler.num_waiting == 1 and steps.held, "the short one waits behind it")
        long.cancel()
        await until(lambda: steps.cancelled, "the cancellation arrives")
        steps.go_on()
        if not guarded:
            await until(lambda: len(steps.after_cancel) > 10, "the engine goes on")
            assert sum("long" in step for step in steps.after_cancel) > 1
            behind.cancel()
            await asyncio.wait({behind, reading})
            return
        assert oracle.agrees(work, await within(behind))
        with pytest.raises(asyncio.CancelledError):
            await reading
        after = steps.after_cancel
        assert sum("long" in step for step in after) <= 1
        assert "short" in after[0] | after[1]
        await workers.assert_nothing_leaks()
        await assert_no_ghosts(workers)


# -- an abort is not an answer -----------------------------------------------------------------------------------------


async def _deadline(workers: Workers) -> None:
    return


async def _stop(workers: Workers) -> None:
    await workers.decode.stop(0.0)


async def _drain(workers: Workers) -> None:
    await workers.decode._host.drain(0.0)
    await workers.decode._host._rpc.stop(0.0)


@pytest.mark.parametrize("end", [_deadline, _stop, _drain], ids=["its time is over", "the worker stops", "the worker is drained"])
async def test_sglang_33507_an_abort_in_transfer_is_no_success(model_path: Path, end: Any) -> None:
    """sglang#33507. There: a request that was aborted in transfer ended with the finish reason "length" and status 200.
    Ours: what ends a request from outside is an error of its own type; no finish reason is ever made up, and no token."""
    async with (
        running_workers(model_path, engine=ENGINE, decode=REMOTE, prefill=PrefillConfig(chunk_tokens=BLOCK)) as first,
        another_decode(first, "tiny/decode/1") as workers,
    ):
        stall = Stall(workers.prefill[0], after_steps=3)
        call = workers.open(request(prompt_of(800, 97), timeout_s=0.6 if end is _deadline else 60.0))
        events: list[Any] = []

        async def read() -> None:
            async for event in call:
                events.append(event)

        reading = asyncio.ensure_future(read())
        await until(lambda: stall.stalled, "three chunks are computed")
        await end(workers)
        with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)) as ended:
            await within(reading)
        assert not events
        if end is _deadline:
            assert isinstance(ended.value, grpc.aio.AioRpcError)
            assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        stall.release()
        await first.assert_nothing_leaks()
        assert not isinstance(
            await ending(first, request(prompt_of(50, 98))), (PdserveError, DeadlineExceeded, NoWorkerAvailable)
        )
