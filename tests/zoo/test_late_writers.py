"""Writers that go on writing when nobody waits for them any more, and readers of the blocks' next owner.

Over tcp and shm the decode worker alone writes into its pool, and shuts out a writer at once. Where it cannot (cuda_ipc; here
inproc, whose writers copy into the pool by themselves), blocks wait for the end of their writer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from common.config import PrefillConfig, TransferConfig
from common.errors import HandoffError, TicketRefused, TransferBroken, TransferTimeout, WorkerLost
from kvtransfer.incoming import Incoming
from kvtransfer.receiver import KVReceiver
from kvtransfer.transports.base import Piece, SenderLink
from kvtransfer.transports.receiving import StreamReceiverLink
from support.planted_links import Plants
from support.workers import Workers, request, running_workers, transfer_over
from support.zoo import (
    AUTO,
    BLOCK,
    ENGINE,
    REMOTE,
    UNCACHED,
    Oracle,
    Stall,
    assert_no_ghosts,
    ending,
    for_ever,
    prompt_of,
    until,
    until_free,
    within,
)

ONE_BLOCK_CHUNKS = PrefillConfig(chunk_tokens=BLOCK, layer_groups=1)
# Room for one such request (6 blocks of prompt, 3 of answer), not for two.
TIGHT = UNCACHED.model_copy(update={"kv_pool_tokens": 9 * BLOCK})
PROMPT_TOKENS, NEW_TOKENS = 6 * BLOCK, 40


class LateWriter:
    """Writes the first blocks of one request's prompt, then waits, whatever it is told, and writes the rest when it may. Its
    CLOSE and the end of its link come after that, as with a copy that is under way."""

    def __init__(self, plants: Plants) -> None:
        self._plants = plants
        self._nonce: bytes | None = None
        self.waits = asyncio.Event()
        self.may_go_on = asyncio.Event()
        self.through = asyncio.Event()
        plants.write = self

    async def __aenter__(self) -> LateWriter:
        return self

    async def __aexit__(self, *failure: object) -> None:
        """Workers cannot be stopped while it waits."""
        self.may_go_on.set()

    async def __call__(self, link: SenderLink, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool]) -> list[bytes]:
        if self._nonce is None:
            self._nonce = nonce
        if nonce != self._nonce or pieces[-1].name.logical_block < 3:
            return await link.write(nonce, pieces, stop)
        self._plants.busy.add(nonce)
        self.waits.set()
        await self.may_go_on.wait()
        try:
            return await link.write(nonce, pieces, lambda: False)
        finally:
            self.through.set()
            self._plants.let_end()


def _open_again(receiver: Any, **arguments: Any) -> Incoming:
    """As `KVReceiver.open` would be if it did not know which blocks have a writer."""
    known, receiver._incoming = receiver._incoming, {}
    try:
        incoming = _OPEN(receiver, **arguments)
    finally:
        known.update(receiver._incoming)
        receiver._incoming = known
    return incoming


_OPEN = KVReceiver.open


@pytest.mark.parametrize(
    ("transport", "guarded"),
    [("tcp", True), ("shm", True), ("inproc", True), ("inproc", False)],
    ids=["tcp", "shm", "inproc", "inproc, without the guard"],
)
async def test_z21_late_bytes_of_a_cancelled_request(
    model_path: Path, oracle: Oracle, plants: Plants, monkeypatch: pytest.MonkeyPatch, transport: str, guarded: bool
) -> None:
    """Z21, sglang#24527. There: the decode side freed pages while a late writer wrote; the next request's KV was overwritten.
    Ours: a block is not free while an authorised writer may touch it. A is cancelled in transfer, B wants the same blocks at
    once: over tcp and shm the writer is fenced, and what it sends or offers finds no place; over inproc B waits until the
    writer has stopped; B is right."""
    if not guarded:

        async def free_at_once(incoming: Incoming, release: Any, **limits: Any) -> tuple[int, ...]:
            incoming.transfer.cancel()
            incoming._stop_timers()
            return incoming.ticket.blocks

        monkeypatch.setattr(Incoming, "abandon", free_at_once)
        monkeypatch.setattr("kvtransfer.receiver.KVReceiver.open", _open_again)
    config = for_ever(transport)
    async with (
        running_workers(
            model_path,
            engine=TIGHT,
            prefill_engine=UNCACHED,
            decode=REMOTE.model_copy(update={"watermark_blocks": 0}),
            prefill=ONE_BLOCK_CHUNKS,
            transfer=config,
        ) as workers,
        LateWriter(plants) as writer,
    ):
        a = workers.open(request(prompt_of(PROMPT_TOKENS, 50), request_id="a", max_tokens=NEW_TOKENS))
        await within(writer.waits.wait())
        a.cancel()
        work = request(prompt_of(PROMPT_TOKENS, 51), request_id="b", max_tokens=NEW_TOKENS)
        b = asyncio.ensure_future(workers.generate(work))
        scheduler = workers.decode._scheduler
        if transport == "inproc" and guarded:
            await until(lambda: scheduler.num_waiting == 1, "B waits for blocks")
            assert (await workers.info(workers.decode_ref.address)).blocks_in_transfer == 6
            assert len(plants.runs) == 1
        else:
            await until(lambda: scheduler.totals.generated_tokens > 2, "B decodes in A's blocks")
            assert set(plants.runs[0].ticket.blocks) & set(plants.runs[1].ticket.blocks)
        writer.may_go_on.set()
        answer = await within(b)
        assert writer.through.is_set()
        assert oracle.agrees(work, answer) is guarded
        if guarded:
            await workers.assert_nothing_leaks()
            await assert_no_ghosts(workers)


@pytest.mark.parametrize("transport", ["shm", "tcp", "inproc"])
async def test_z08_a_prefill_worker_that_stays_silent(model_path: Path, oracle: Oracle, plants: Plants, transport: str) -> None:
    """Z08, vllm#46283. There: the decode side's blocks of an aborted load were never freed if the prefill side said nothing.
    Ours: what frees them is the fence or the end of the writer's link, not its goodwill: over tcp and shm at once, over inproc
    when the writer lets go; until then others are served, and then the pool is whole."""

    async def unheard(call: Any, message: Any, timeout_s: float) -> Any:
        raise WorkerLost("planted: no answer")

    plants.release = unheard
    async with (
        running_workers(
            model_path, engine=UNCACHED, decode=REMOTE, num_prefill=2, prefill=ONE_BLOCK_CHUNKS, transfer=for_ever(transport)
        ) as workers,
        LateWriter(plants) as writer,
    ):
        call = workers.open(request(prompt_of(PROMPT_TOKENS, 52)))
        await within(writer.waits.wait())
        call.cancel()
        work = request(prompt_of(PROMPT_TOKENS, 53), max_tokens=6)
        answer = await within(workers.generate(work, prefill=workers.prefill_refs[1:]))
        assert oracle.agrees(work, answer)
        if transport != "inproc":
            await until_free(workers, workers.decode_ref)
            assert not writer.through.is_set()
        else:
            # The worker gives an answer's blocks back with the step after its last.
            async with asyncio.timeout(120):
                while (info := await workers.info(workers.decode_ref.address)).requests_running:
                    await asyncio.sleep(0.005)
            assert (info.blocks_in_transfer, info.leases_open) == (6, 1)
        writer.may_go_on.set()
        await within(writer.through.wait())
        plants.write = None
        await workers.assert_nothing_leaks()
        await assert_no_ghosts(workers)
        assert oracle.agrees(work, await within(workers.generate(work)))


@pytest.mark.parametrize("late", ["bytes", "reply"])
async def test_z16_a_second_attempt_is_not_touched_by_the_first(
    model_path: Path, oracle: Oracle, plants: Plants, late: str
) -> None:
    """Z16, sglang#6857. There: a request that was queued again met a receiver that was at "success" from its first attempt.
    Ours: each attempt has a nonce, blocks and a receiver of its own; bytes, replies and releases of the first one do nothing to
    the second, which goes to its end."""
    held: list[asyncio.Future[Any]] = []
    answered = asyncio.Event()

    async def hold_first(call: Any, message: Any, timeout_s: float) -> Any:
        if len(plants.runs) > 1:
            reply = await call(message, timeout_s)
            answered.set()
            if held:  # the first attempt's reply arrives together with the second's
                await asyncio.wait(held)
            return reply
        held.append(asyncio.ensure_future(call(message, timeout_s)))
        await asyncio.wait({held[0]}, timeout=0.2)
        raise WorkerLost("planted: the call broke")

    plants.run = hold_first
    async with (
        running_workers(
            model_path,
            engine=ENGINE,
            decode=REMOTE,
            num_prefill=2,
            prefill=ONE_BLOCK_CHUNKS,
            transfer=for_ever("tcp"),
        ) as workers,
        LateWriter(plants) as writer,
    ):
        if late == "reply":
            plants.write = None
        work = request(prompt_of(PROMPT_TOKENS, 54), max_tokens=NEW_TOKENS)
        if late == "bytes":
            running = asyncio.ensure_future(workers.generate(work))
            await until(lambda: workers.decode._scheduler.totals.generated_tokens > 0 or answered.is_set(), "the second attempt")
            writer.may_go_on.set()
            held[0].cancel()
            await asyncio.wait({held[0]})
            held.clear()
            answer = await within(running)
            await within(writer.through.wait())
        else:
            answer = await within(workers.generate(work))
            assert held[0].done()
        first, second = plants.runs
        assert (first.ticket.attempt, second.ticket.attempt) == (1, 2)
        assert first.ticket.nonce != second.ticket.nonce
        assert oracle.agrees(work, answer)
        plants.write = None
        await workers.assert_nothing_leaks()
        again = await workers.generate(work)
        assert again.started is not None
        assert again.started.cached_tokens == PROMPT_TOKENS - BLOCK
        assert oracle.agrees(work, again)


# -- leases ------------------------------------------------------------------------------------------------------------

BRIEF_S = 1.0


def brief(transport: str) -> TransferConfig:
    return transfer_over(transport, lease_s=BRIEF_S, ticket_ttl_s=300.0)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_z05_a_decode_worker_that_gives_no_sign_is_given_up_and_hears_of_it(
    model_path: Path, oracle: Oracle, plants: Plants, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """Z05, vllm#21570. There: the prefill side timed out and freed its blocks; the decode side, queued, read them all the same.
    Ours: when its lease is over the prefill worker reads and writes no more and gives its blocks back; the decode worker is told,
    uses nothing of what had arrived, and computes the prompt itself."""
    monkeypatch.setattr(StreamReceiverLink, "pulse", lambda link, nonce: None)
    async with running_workers(
        model_path, engine=ENGINE, decode=AUTO, prefill=ONE_BLOCK_CHUNKS, transfer=brief(transport)
    ) as workers:
        stall = Stall(workers.prefill[0], after_steps=3)
        work = request(prompt_of(PROMPT_TOKENS, 55), max_tokens=6)
        running = asyncio.ensure_future(workers.generate(work))
        await until(lambda: stall.stalled, "half of the prompt is computed")
        await until_free(workers, workers.prefill_refs[0], BRIEF_S + 5.0)
        answer = await within(running)
        assert oracle.agrees(work, answer)
        assert answer.started is not None
        assert (answer.started.timings.prefill_worker, answer.started.cached_tokens) == ("", 0)
        stall.release()
        await workers.assert_nothing_leaks()
        assert workers.prefill[0]._scheduler.totals.computed_tokens == 3 * BLOCK


@pytest.mark.parametrize("transport", ["shm", "tcp", "inproc"])
async def test_z05_a_prefill_worker_whose_lease_is_over_may_not_write(
    model_path: Path, oracle: Oracle, plants: Plants, transport: str
) -> None:
    """Z05, vllm#21570. The other way round: the decode worker gives up a writer that it does not hear, which hears nothing of
    that either, and goes on later. Ours: its bytes reach nothing, the blocks' next owner is right, and it ends in a typed
    error."""
    calls: list[asyncio.Future[Any]] = []

    async def deaf(call: Any, message: Any, timeout_s: float) -> Any:
        if calls:
            return await call(message, timeout_s)
        calls.append(asyncio.ensure_future(call(message, timeout_s)))
        return await asyncio.shield(calls[0])

    async def unheard(call: Any, message: Any, timeout_s: float) -> Any:
        raise WorkerLost("planted: no answer")

    plants.run, plants.release, plants.mute = deaf, unheard, True
    async with running_workers(
        model_path,
        engine=TIGHT,
        prefill_engine=UNCACHED,
        decode=AUTO.model_copy(update={"watermark_blocks": 0}),
        prefill=ONE_BLOCK_CHUNKS,
        transfer=brief(transport),
    ) as workers:
        stall = Stall(workers.prefill[0], after_steps=3)
        work = request(prompt_of(PROMPT_TOKENS, 56), max_tokens=NEW_TOKENS)
        answer = await within(workers.generate(work))  # computed here after the lease, in the same few blocks
        assert oracle.agrees(work, answer)
        plants.mute = False
        running = asyncio.ensure_future(workers.generate(work, prefill=[]))
        await until(lambda: workers.decode._scheduler.totals.generated_tokens > NEW_TOKENS + 2, "the next owner decodes")
        stall.release()
        with pytest.raises(HandoffError):
            await within(calls[0])
        assert oracle.agrees(work, await within(running))
        await workers.assert_nothing_leaks()


async def test_z05_a_ticket_whose_time_is_over_admits_nobody(model_path: Path, oracle: Oracle, plants: Plants) -> None:
    """Z05, vllm#21570. Ours: a Run that was queued on its way for longer than its ticket lives is refused, by the clock of the
    worker that owns the blocks, although it is new to the prefill worker."""
    late: list[asyncio.Future[Any]] = []

    async def queued(call: Any, message: Any, timeout_s: float) -> Any:
        async def later() -> Any:
            await asyncio.sleep(0.6)
            return await call(message, 10.0)

        late.append(asyncio.ensure_future(later()))
        return await asyncio.shield(late[0])

    config = TransferConfig(transports=("shm",), ticket_ttl_s=0.3)
    async with running_workers(model_path, engine=UNCACHED, decode=REMOTE, transfer=config) as workers:
        plants.run = queued
        assert isinstance(await ending(workers, request(prompt_of(70, 57))), TransferTimeout)
        await until_free(workers, workers.decode_ref)
        before = bytes(workers.decode._host.engine.pool.buffer)
        with pytest.raises(TicketRefused):
            await within(late[0])
        assert bytes(workers.decode._host.engine.pool.buffer) == before
        await workers.assert_nothing_leaks()


# -- time that is not silence ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queue", ["prefill", "decode"])
async def test_tokenspeed_1427_a_queue_is_not_silence(model_path: Path, oracle: Oracle, plants: Plants, queue: str) -> None:
    """lightseekorg/tokenspeed#1427. There: the prefill side's deadline measured how long the decode side was queued; 14 of 64
    requests failed.
    Ours: a lease measures liveness: requests that wait for several leases, before or after their ticket was given, are served
    remotely at the first attempt."""
    await _busy(model_path, oracle, plants, queue, mute=False)


async def test_tokenspeed_1427_without_pulses_the_queue_would_fail(model_path: Path, oracle: Oracle, plants: Plants) -> None:
    """tokenspeed#1427, without the guard: when pulses get lost, those that wait longest fail."""
    with pytest.raises(AssertionError, match="was given up"):
        await _busy(model_path, oracle, plants, "prefill", mute=True)


async def _busy(model_path: Path, oracle: Oracle, plants: Plants, queue: str, *, mute: bool) -> None:
    count, step_s = 8, 0.2
    plants.mute = mute
    small = UNCACHED.model_copy(update={"kv_pool_tokens": 10 * BLOCK}) if queue == "decode" else UNCACHED
    config = TransferConfig(transports=("tcp",), lease_s=BRIEF_S)
    async with running_workers(
        model_path,
        engine=small,
        prefill_engine=UNCACHED,
        decode=REMOTE,
        prefill=PrefillConfig(max_running=1),
        transfer=config,
    ) as workers:
        _slow_down(workers, step_s)
        work = [request(prompt_of(3 * BLOCK - 5, 60 + index), request_id=f"q{index}", max_tokens=3) for index in range(count)]
        found = await asyncio.gather(*(ending(workers, item) for item in work))
        for item, answer in zip(work, found, strict=True):
            assert not isinstance(answer, (TransferTimeout, TransferBroken)), "a request that waited was given up"
            assert oracle.agrees(item, answer)  # type: ignore[arg-type]
        assert len(plants.runs) == count
        await workers.assert_nothing_leaks()


def _slow_down(workers: Workers, step_s: float) -> None:
    core: Any = workers.prefill[0]._loop._core
    compute = core.compute

    def slowly(hand_over: Callable[[], None]) -> None:
        time.sleep(step_s)
        compute(hand_over)

    core.compute = slowly
