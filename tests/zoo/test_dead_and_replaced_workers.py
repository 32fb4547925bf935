"""Workers that die, are replaced, answer nothing, or answer twice; and what the others say of their own health meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.config import DecodeConfig, PrefillConfig, TransferConfig
from common.errors import (
    EngineFailure,
    HandoffError,
    HandshakeRefused,
    PdserveError,
    RequestCancelled,
    TicketRefused,
    TransferBroken,
    WorkerLost,
)
from common.rpc import connect, start_server
from common.tokenizer import Tokenizer
from common.types import WorkerRef, WorkerState
from kvtransfer.transports.base import Piece, SenderLink
from prefill_worker.handoff import PrefillHandoff, Push
from support.fake_cluster import MODEL, FakeManager, fake_cluster, make_tokenizer_folder
from support.planted_links import Plants
from support.workers import Workers, request, running_workers
from support.zoo import (
    AUTO,
    BLOCK,
    PATIENCE_S,
    REMOTE,
    UNCACHED,
    Held,
    Oracle,
    Stall,
    another_decode,
    another_prefill,
    assert_no_ghosts,
    ending,
    for_ever,
    prompt_of,
    until,
    until_free,
    within,
)

SMALL_CHUNKS = PrefillConfig(chunk_tokens=BLOCK)


async def health_of(address: str) -> int:
    """What the standard health service says."""
    channel = connect(address, None)
    try:
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=""), timeout=60)
        return int(reply.status)
    finally:
        await channel.close(None)


async def is_healthy(workers: Workers) -> bool:
    info = await workers.info(workers.decode_ref.address)
    serving = await health_of(workers.decode_ref.address) == health_pb2.HealthCheckResponse.SERVING
    return info.state == WorkerState.READY and serving and not workers.decode._host.failed


# -- killed in transfer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_z15_z19_a_prefill_worker_is_killed_in_transfer_and_comes_back(
    model_path: Path, oracle: Oracle, transport: str
) -> None:
    """Z15 and Z19, sglang#6215, #12779. There: the decode side hung on what it remembered of a dead prefill worker; its own
    health check failed with the other's death, and a healthy worker was killed.
    Ours: the request goes to the next candidate and is right; the next life of the dead one serves as a new worker; its earlier
    one is refused by name; and the decode worker is ready and healthy all the time."""
    async with running_workers(
        model_path, engine=UNCACHED, decode=REMOTE, num_prefill=2, prefill=SMALL_CHUNKS, transfer=for_ever(transport)
    ) as workers:
        old, second = workers.prefill_refs
        stall = Stall(workers.prefill[0], after_steps=3)
        work = request(prompt_of(200, 120), max_tokens=6)
        running = asyncio.ensure_future(workers.generate(work))
        await until(lambda: stall.stalled, "three chunks are computed")
        stopping = asyncio.ensure_future(workers.prefill[0].stop(0.0))
        while not running.done():
            assert await is_healthy(workers)
        answer = await within(running)
        await stopping
        assert oracle.agrees(work, answer)
        assert answer.started is not None
        assert answer.started.timings.prefill_worker == second.worker_id
        async with another_prefill(workers, incarnation=2) as (_, new):
            assert (new.worker_id, new.incarnation) == (old.worker_id, 2)
            answer = await within(workers.generate(work, prefill=[new]))
            assert oracle.agrees(work, answer)
            assert answer.started is not None
            assert answer.started.timings.prefill_worker == new.worker_id
            assert isinstance(await ending(workers, work, [old]), HandshakeRefused)
            assert await is_healthy(workers)
            assert oracle.agrees(work, await within(workers.generate(work, prefill=[old, new])))
        workers.prefill_refs.remove(old)
        await workers.assert_nothing_leaks()


@asynccontextmanager
async def in_place_of(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[WorkerRef]:
    """The first prefill worker's next life, at the very address of the last one."""
    old = workers.prefill_refs[0]
    await workers.prefill[0].stop(0.0)
    port = int(old.address.rpartition(":")[2])
    with monkeypatch.context() as patch:
        patch.setattr("common.engine.host.start_server", partial(start_server, port=port))
        async with another_prefill(workers, incarnation=2) as (_, new):
            assert new.address == old.address
            yield new


@pytest.mark.parametrize("policy", [REMOTE, AUTO], ids=["fails", "is computed here"])
async def test_z26_a_prefill_worker_is_replaced_behind_its_address(
    model_path: Path, oracle: Oracle, monkeypatch: pytest.MonkeyPatch, policy: DecodeConfig
) -> None:
    """Z26, sglang#33789. There: a prefill worker was replaced behind a stable address, and the decode side stayed with the
    process that was gone.
    Ours: a worker is its id and its incarnation, not its address: who is asked for the old one gets a typed error and is not
    used; the new one is used as soon as it is named."""
    async with running_workers(model_path, engine=UNCACHED, decode=policy, transfer=for_ever()) as workers:
        work = request(prompt_of(100, 121), max_tokens=6)
        assert oracle.agrees(work, await workers.generate(work))
        old = workers.prefill_refs[0]
        async with in_place_of(workers, monkeypatch) as new:
            for _ in range(2):  # with the handshake of old, and without
                found = await ending(workers, work, [old])
                if policy is AUTO:
                    assert oracle.agrees(work, found)  # type: ignore[arg-type]
                else:
                    assert isinstance(found, (HandshakeRefused, TicketRefused, WorkerLost))
            answer = await within(workers.generate(work, prefill=[new]))
            assert oracle.agrees(work, answer)
            assert answer.started is not None
            assert answer.started.timings.prefill_worker == new.worker_id
            assert await is_healthy(workers)
        workers.prefill_refs.clear()
        await workers.assert_nothing_leaks()


async def test_z26_a_run_that_is_under_way_when_its_worker_is_replaced(model_path: Path, oracle: Oracle, plants: Plants) -> None:
    """Z26, sglang#33789. There: what was under way with the old process was never ended.
    Ours: a request whose prefill worker has stopped answering, and is replaced while it waits, goes on elsewhere or ends in a
    typed error; the decode worker lives."""
    async with running_workers(
        model_path, engine=UNCACHED, decode=REMOTE, num_prefill=2, prefill=SMALL_CHUNKS, transfer=for_ever("tcp")
    ) as workers:
        stall = Stall(workers.prefill[0], after_steps=3)
        work = request(prompt_of(200, 122), request_id="under way", max_tokens=6)
        running = asyncio.ensure_future(workers.generate(work))
        await until(lambda: stall.stalled, "three chunks are computed")
        async with another_prefill(workers, incarnation=2) as (_, new):
            other = request(prompt_of(100, 123), request_id="next", max_tokens=6)
            assert oracle.agrees(other, await within(workers.generate(other, prefill=[new])))
            assert await is_healthy(workers)
            assert oracle.agrees(work, await within(running))
            stall.release()
            await workers.assert_nothing_leaks()
            await assert_no_ghosts(workers)


# -- the other leg hears of it -----------------------------------------------------------------------------------------

Fail = Callable[[Workers, Plants, pytest.MonkeyPatch], None]


def _raising(error: Exception) -> Any:
    async def fail(*arguments: Any) -> Any:
        raise error

    return fail


def _refusing(error: Exception) -> Any:
    def fail(*arguments: Any) -> Any:
        raise error

    return fail


def _handshake(workers: Workers, plants: Plants, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PrefillHandoff, "handshake", _raising(EngineFailure("planted")))


def _at_the_door(workers: Workers, plants: Plants, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PrefillHandoff, "begin", _refusing(TicketRefused("planted")))


def _as_if_cancelled(workers: Workers, plants: Plants, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PrefillHandoff, "begin", _refusing(RequestCancelled("planted")))


def _by_a_bug(workers: Workers, plants: Plants, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Push, "computed", _raising(RuntimeError("planted")))


def _computing(workers: Workers, plants: Plants, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(workers.prefill[0]._scheduler, "complete", _refusing(RuntimeError("planted")))


def _pushing(workers: Workers, plants: Plants, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Push, "computed", _raising(TransferBroken("planted")))


def _writing(workers: Workers, plants: Plants, patch: pytest.MonkeyPatch) -> None:
    plants.write = _raising(TransferBroken("planted"))


def _linked(workers: Workers, plants: Plants, patch: pytest.MonkeyPatch) -> None:
    async def cut(link: SenderLink, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool]) -> list[bytes]:
        link.drop(TransferBroken("planted"))
        return await link.write(nonce, pieces, stop)

    plants.write = cut


def _finishing(workers: Workers, plants: Plants, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Push, "finish", _raising(TransferBroken("planted")))


def _stopping(workers: Workers, plants: Plants, patch: pytest.MonkeyPatch) -> None:
    async def stop_and_wait(call: Any, message: Any, timeout_s: float) -> Any:
        stopping = asyncio.ensure_future(workers.prefill[0].stop(0.0))
        try:
            return await call(message, timeout_s)
        finally:
            await stopping

    plants.run = stop_and_wait


FAILURES: dict[str, Fail] = {
    "at the handshake": _handshake,
    "at the door": _at_the_door,
    "as if cancelled": _as_if_cancelled,
    "by a bug": _by_a_bug,
    "computing": _computing,
    "pushing": _pushing,
    "writing": _writing,
    "when its link is cut": _linked,
    "finishing": _finishing,
    "by being stopped": _stopping,
}


@pytest.mark.parametrize("stage", FAILURES)
async def test_z18_a_prefill_worker_that_fails_is_not_waited_for(
    model_path: Path, oracle: Oracle, plants: Plants, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Z18, sglang#9726. There: the prefill side failed, the decode side was not aborted and waited for 10 minutes.
    Ours: at whatever stage it fails, the other leg hears of it: with leases and tickets that never run out the request ends at
    once in a typed error, or is computed here and right. (The other direction is Z07.)"""
    monkeypatch.setattr("threading.excepthook", lambda arguments: None)
    for policy in (REMOTE, AUTO):
        async with running_workers(
            model_path, engine=UNCACHED, decode=policy, prefill=SMALL_CHUNKS, transfer=for_ever("tcp")
        ) as workers:
            with monkeypatch.context() as patch:
                FAILURES[stage](workers, plants, patch)
                work = request(prompt_of(100, 124), max_tokens=6)
                found = await ending(workers, work)
                if policy is AUTO:
                    assert oracle.agrees(work, found)  # type: ignore[arg-type]
                else:
                    assert isinstance(found, PdserveError)
                await until_free(workers, workers.decode_ref)
                assert await is_healthy(workers)
                plants.write = plants.run = None


# -- health ------------------------------------------------------------------------------------------------------------


async def test_z25_a_worker_whose_engine_is_dead_says_so(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Z25, sglang#32652. There: the decode side's control path was dead and health said 200.
    Ours: a worker whose engine thread has ended is "failed" for its manager, refuses requests with a typed error instead of
    taking them in, and its process is told to end."""
    monkeypatch.setattr("threading.excepthook", lambda arguments: None)
    async with running_workers(model_path, engine=UNCACHED, decode=REMOTE) as workers:
        assert await is_healthy(workers)
        for worker, ref in ((workers.decode, workers.decode_ref), (workers.prefill[0], workers.prefill_refs[0])):
            worker._loop.post(_refusing(RuntimeError("planted")))
            await within(worker.wait_failed())
            assert (await workers.info(ref.address)).state == WorkerState.FAILED
        assert isinstance(await ending(workers, request(prompt_of(50, 125))), PdserveError)


@pytest.mark.parametrize("role", ["decode", "prefill"])
async def test_z25_the_health_service_says_so_too(model_path: Path, monkeypatch: pytest.MonkeyPatch, role: str) -> None:
    """Z25, sglang#32652. Ours: who asks the standard health service hears the same."""
    monkeypatch.setattr("threading.excepthook", lambda arguments: None)
    async with running_workers(model_path, engine=UNCACHED, decode=REMOTE) as workers:
        worker = workers.decode if role == "decode" else workers.prefill[0]
        worker._loop.post(_refusing(RuntimeError("planted")))
        await within(worker.wait_failed())
        address = (workers.decode_ref if role == "decode" else workers.prefill_refs[0]).address
        assert await health_of(address) == health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.mark.parametrize("role", ["decode", "prefill"])
async def test_z25_an_engine_that_hangs_is_noticed(model_path: Path, role: str) -> None:
    """Z25, sglang#32652. There: what did the work stood still, raised nothing, and health said 200.
    Ours: an engine thread that gives no sign is a failed engine: the worker says so, ends what it serves with a typed error, and
    is told to end. The watch is set short only when the thread hangs already, so nothing here depends on how fast it is."""
    async with running_workers(model_path, engine=UNCACHED, decode=REMOTE) as workers:
        worker = workers.decode if role == "decode" else workers.prefill[0]
        ref = workers.decode_ref if role == "decode" else workers.prefill_refs[0]
        assert await is_healthy(workers)
        hanging, go_on = threading.Event(), threading.Event()

        def hang() -> None:
            hanging.set()
            go_on.wait(PATIENCE_S)

        try:
            worker._loop.post(hang)
            assert await asyncio.to_thread(hanging.wait, PATIENCE_S)
            worker._host.watch_engine(worker._loop.sign, worker._engine_failed, hang_s=0.05)
            await within(worker.wait_failed())
            assert (await workers.info(ref.address)).state == WorkerState.FAILED
            assert isinstance(await ending(workers, request(prompt_of(50, 127))), PdserveError)
        finally:
            go_on.set()


@pytest.fixture(scope="module")
def router_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer_folder(tmp_path_factory.mktemp("router") / "tiny")


@pytest.mark.parametrize("status", [None, "CANCELLED", "INTERNAL", "UNIMPLEMENTED"], ids=str)
async def test_z25_a_router_whose_watch_ends_watches_again(
    router_model: Path, monkeypatch: pytest.MonkeyPatch, status: str | None
) -> None:
    """Z25, sglang#32652. There: one control task was dead and everything looked alive.
    Ours: however the manager ends the router's watch, the router comes back and sees what has changed meanwhile."""
    broken = asyncio.Event()
    watch = FakeManager.Watch

    async def breaking(manager: FakeManager, message: Any, context: Any) -> None:
        if broken.is_set():
            await watch(manager, message, context)
            return
        manager.announced.append(message)
        await context.write(manager.snapshot)
        await broken.wait()
        if status is not None:
            await context.abort(grpc.StatusCode[status], "planted")

    monkeypatch.setattr(FakeManager, "Watch", breaking)
    async with fake_cluster(Tokenizer.load(router_model), router_model) as cluster:
        broken.set()
        cluster.publish(tiny_decode_0="draining")
        await cluster.until_seen()
        cluster.publish()
        await cluster.until_seen()
        async with httpx.AsyncClient(base_url=cluster.http_url, trust_env=False) as client:
            assert (await client.get("/ready")).status_code == 200
            body = {"model": MODEL, "prompt": "hi", "max_tokens": 4}
            assert (await client.post("/v1/completions", json=body)).status_code == 200


# -- the same request twice --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fate", ["goes on", "is cancelled"])
async def test_z28_a_request_that_is_dispatched_again_while_the_first_still_lives(
    model_path: Path, oracle: Oracle, plants: Plants, fate: str
) -> None:
    """Z28, dynamo#11647. There: a request that was dispatched again after a stall met its own old booking.
    Ours: an id names a request for its client; what workers keep is kept per attempt: the stalled one and its successor, at two
    decode workers and one prefill worker, or at the same, do not know each other."""
    async with (
        running_workers(model_path, engine=UNCACHED, decode=REMOTE, prefill=SMALL_CHUNKS, transfer=for_ever("tcp")) as first,
        another_decode(first, "tiny/decode/1") as second,
    ):
        work = request(prompt_of(100, 126), request_id="twice", max_tokens=30)
        stall = Stall(first.decode, after_steps=3)
        call = first.open(work)
        said = asyncio.ensure_future(_tokens(call))
        await until(lambda: first.decode._scheduler.totals.generated_tokens > 0 and stall.stalled, "the first one decodes")
        held = Held(first.decode)
        await until(lambda: held.holding, "it is stalled, and deaf")
        stall.release()
        assert oracle.agrees(work, await within(second.generate(work)))
        again = asyncio.ensure_future(first.generate(work))  # and back to the stalled one
        await until(held.has_mail, "it arrives")
        if fate == "is cancelled":
            call.cancel()
        held.release()
        assert oracle.agrees(work, await within(again))
        if fate == "is cancelled":
            with pytest.raises(asyncio.CancelledError):
                await within(said)
        else:
            assert await within(said) == oracle.tokens(work)
        assert len({run.ticket.nonce for run in plants.runs}) == 3
        for workers in (first, second):
            await workers.assert_nothing_leaks()
            await assert_no_ghosts(workers)


async def _tokens(call: grpc.aio.UnaryStreamCall) -> list[int]:
    return [token async for event in call for chunk in event.chunks for token in chunk.token_ids]


# -- nobody there, or somebody else ------------------------------------------------------------------------------------


@asynccontextmanager
async def _address_of(who: str, workers: Workers) -> AsyncIterator[str]:
    if who == "another service":
        yield workers.decode_ref.address  # a gRPC server of this cluster, without this method
        return
    if who == "nobody":
        yield "127.0.0.1:1"
        return
    taken: list[asyncio.StreamWriter] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken.append(writer)
        if who == "something else":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok" * 3)

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in taken:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
        await server.wait_closed()


@pytest.mark.parametrize("who", ["another service", "nobody", "silence", "something else"])
async def test_z29_a_call_that_nobody_handles_ends(model_path: Path, oracle: Oracle, who: str) -> None:
    """Z29, dynamo#13088. There: 36 of 1,536 requests went to a worker without a handler and never ended.
    Ours: every call has a deadline and every answer a meaning: each of many at once ends in a typed error, or is served by the
    next candidate, or here, and is right."""
    config = TransferConfig(handshake_timeout_s=0.5)
    count = 3 if who == "silence" else 24
    async with running_workers(model_path, engine=UNCACHED, decode=REMOTE, transfer=config) as workers:
        await workers.generate(request(prompt_of(40, 127)))  # so that the handshake with the good one is made
        async with _address_of(who, workers) as address:
            wrong = WorkerRef("tiny/prefill/9", 1, address)
            work = [request(prompt_of(40 + index, 127), request_id=f"n{index}", max_tokens=3) for index in range(count)]
            found = await asyncio.gather(*(ending(workers, item, [wrong]) for item in work))
            assert all(isinstance(item, PdserveError) for item in found)
            assert not any(isinstance(item, HandoffError) for item in found)
            assert oracle.agrees(work[0], await within(workers.generate(work[0], prefill=[wrong, *workers.prefill_refs])))
            workers.decode._scheduler._config = AUTO
            assert oracle.agrees(work[1], await within(workers.generate(work[1], prefill=[wrong])))
            assert await is_healthy(workers)
        await workers.assert_nothing_leaks()


async def test_z29_those_who_wait_for_a_silent_worker_wait_together(model_path: Path, plants: Plants) -> None:
    """Z29, dynamo#13088. Ours: the budget for the first contact with a worker is one for all who wait for it: with many requests
    on their way to one that says nothing, the last one does not wait many times as long as the first."""
    tries: list[float] = []

    async def counted(call: Any, message: Any, timeout_s: float) -> Any:
        tries.append(timeout_s)
        return await call(message, timeout_s)

    plants.handshake = counted
    config = TransferConfig(handshake_timeout_s=0.3)
    async with running_workers(model_path, engine=UNCACHED, decode=REMOTE, transfer=config) as workers:
        async with _address_of("silence", workers) as address:
            wrong = WorkerRef("tiny/prefill/9", 1, address)
            work = [request(prompt_of(40, 128), request_id=f"w{index}") for index in range(4)]
            found = await asyncio.gather(*(ending(workers, item, [wrong]) for item in work))
            assert all(isinstance(item, PdserveError) for item in found)
        await workers.assert_nothing_leaks()
        assert len(tries) < len(work)


async def test_z29_a_first_contact_ends_with_the_last_who_waits_for_it(model_path: Path, oracle: Oracle, plants: Plants) -> None:
    """Z29, dynamo#13088. Ours: while one still waits, the first contact goes on; when the last one has left it is given up, and
    the next one begins anew; and a worker that is stopped does not wait for it."""
    tries: list[str] = []

    async def noted(call: Any, message: Any, timeout_s: float) -> Any:
        tries.append("begun")
        try:
            return await call(message, timeout_s)
        except asyncio.CancelledError:
            tries.append("given up")
            raise

    plants.handshake = noted
    config = TransferConfig(handshake_timeout_s=60.0)
    async with (
        running_workers(model_path, engine=UNCACHED, decode=REMOTE, transfer=config) as workers,
        _address_of("silence", workers) as address,
    ):
        wrong = WorkerRef("tiny/prefill/9", 1, address)
        peers = workers.decode._handoff._links.known
        calls = [workers.open(request(prompt_of(40, 129), request_id=f"w{index}"), prefill=[wrong]) for index in range(2)]
        await until(lambda: wrong.worker_id in peers and peers[wrong.worker_id].num_waiting == 2, "both wait")
        calls[0].cancel()
        await until(lambda: peers[wrong.worker_id].num_waiting == 1, "one has left")
        assert tries == ["begun"]
        calls[1].cancel()
        await until(lambda: tries == ["begun", "given up"], "nobody waits any more")
        work = request(prompt_of(40, 129), max_tokens=3)
        assert oracle.agrees(work, await within(workers.generate(work)))
        await workers.assert_nothing_leaks()
        again = asyncio.ensure_future(ending(workers, request(prompt_of(40, 129), request_id="again"), [wrong]))
        await until(lambda: tries[-1] == "begun" and peers[wrong.worker_id].num_waiting == 1, "another tries it")
        await within(workers.decode.stop(0.0))
        assert isinstance(await again, PdserveError)
        assert tries[-1] == "given up"


async def test_z18_a_hand_off_that_is_given_up_is_reported(model_path: Path, plants: Plants) -> None:
    """Z18, sglang#9726. Ours: a hand-off whose task is cancelled while its request lives is lost: the request hears of it."""
    async with running_workers(
        model_path, engine=UNCACHED, decode=REMOTE, prefill=SMALL_CHUNKS, transfer=for_ever("tcp")
    ) as workers:
        stall = Stall(workers.prefill[0], after_steps=2)
        running = asyncio.ensure_future(ending(workers, request(prompt_of(100, 133))))
        await until(lambda: stall.stalled, "it is under way")
        (stream,) = workers.decode._streams._streams.values()
        assert stream.fetch is not None
        stream.fetch.cancel()
        assert isinstance(await within(running), WorkerLost)
        stall.release()
        await workers.assert_nothing_leaks()
        await assert_no_ghosts(workers)
