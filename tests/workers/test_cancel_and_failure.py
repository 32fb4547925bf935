"""However a request ends, nothing is left of it; whatever a prefill worker does, the tokens are right or the error is typed."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import grpc
import grpc.aio
import pytest

from common.config import DecodeConfig, EngineConfig, PrefillConfig, TransferConfig
from common.errors import (
    AuthenticationFailed,
    DeadlineExceeded,
    HandshakeRefused,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PdserveError,
    TransferBroken,
    WorkerLost,
)
from common.rpc import connect, error_from_rpc
from common.types import FinishReason, WorkerRef
from common.wire import worker_pb2, worker_pb2_grpc
from support.prefill_steps import PrefillSteps
from support.tiny_models import make_tiny_model
from support.workers import TOKEN, Answer, Workers, request, running_workers
from support.zoo import until

ENGINE = EngineConfig(dtype="float32", exact=True, kv_pool_tokens=2048)
REMOTE = DecodeConfig(local_prefill="never")
LOCAL = DecodeConfig(local_prefill="always")
AUTO = DecodeConfig(local_prefill="auto", local_prefill_tokens=0)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), seed=5)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_two_hundred_requests_with_random_cancels_leave_nothing(model_path: Path, transport: str) -> None:
    chance = random.Random(7)
    prompts = [[chance.randrange(3, 380) for _ in range(chance.randrange(1, 200))] for _ in range(12)]

    async def one(workers: Workers, number: int) -> bool:
        prompt = prompts[number % len(prompts)]
        work = request(prompt, request_id=f"r{number % 50}", max_tokens=chance.randrange(1, 25), num_choices=1 + number % 3)
        call = workers.open(work)
        events_before_cancel = chance.choice([None, None, 0, 1, 3])
        if events_before_cancel is None:
            async for _ in call:
                pass
            return True
        await asyncio.sleep(chance.random() * 0.03)
        try:
            for _ in range(events_before_cancel):
                if await call.read() is grpc.aio.EOF:
                    return True
        finally:
            call.cancel()
        return False

    async with running_workers(
        model_path, engine=ENGINE, decode=REMOTE, prefill=PrefillConfig(chunk_tokens=32), transports=(transport,)
    ) as workers:
        running: set[asyncio.Task[bool]] = set()
        outcomes: list[bool] = []
        for number in range(200):
            running.add(asyncio.ensure_future(one(workers, number)))
            if len(running) >= 12:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                outcomes += [task.result() for task in done]
        outcomes += await asyncio.gather(*running)
        assert len(outcomes) == 200
        assert 40 < sum(outcomes) < 180, "the mix of finished and cancelled requests is not one"
        await workers.assert_nothing_leaks()
        # And it still works.
        answer = await workers.generate(request(prompts[0], max_tokens=4))
        assert len(answer.tokens) == 4


async def test_cancel_stops_a_long_prefill_within_a_chunk(model_path: Path) -> None:
    """A client leaves during a long prefill with a request queued behind it: when the cancellation has arrived, at most the chunk
    that is under way is still computed of it, and the next step is the one that waited."""
    async with running_workers(
        model_path, engine=ENGINE, decode=REMOTE, prefill=PrefillConfig(chunk_tokens=4, max_running=1)
    ) as workers:
        prefill = workers.prefill[0]
        steps = PrefillSteps(prefill)
        steps.hold("long", after_steps=2)
        long_call = workers.open(request([5] * 1500, request_id="long"))
        reader = asyncio.ensure_future(long_call.read())
        await until(lambda: steps.held, "the long prompt is under way")
        behind = asyncio.ensure_future(workers.generate(request(list(range(3, 60)), request_id="short", max_tokens=2)))
        await until(lambda: steps.posted("short"), "the short one comes")
        steps.hold("long", after_steps=4)
        await until(lambda: prefill._scheduler.num_waiting == 1 and steps.held, "the short one waits behind it")
        long_call.cancel()
        await until(lambda: steps.cancelled, "the cancellation arrives")
        steps.go_on()
        answer = await behind
        assert len(answer.tokens) == 2
        assert sum("long" in step for step in steps.after_cancel) <= 1
        assert "short" in set().union(*steps.after_cancel[:2])
        with pytest.raises(asyncio.CancelledError):
            await reader
        await workers.assert_nothing_leaks()


async def run_beside_reference(model_path: Path, workers: Workers, refs: list[WorkerRef]) -> tuple[Answer, Answer]:
    prompt = list(range(3, 120))
    async with running_workers(model_path, engine=ENGINE, decode=LOCAL, num_prefill=0) as alone:
        expected = await alone.generate(request(prompt, max_tokens=10, logprobs=5))
    return await workers.generate(request(prompt, max_tokens=10, logprobs=5), prefill=refs), expected


async def test_a_dead_prefill_worker_is_not_noticed(model_path: Path) -> None:
    """The first candidate is gone, the second serves; with none left, the decode worker prefills itself."""
    async with running_workers(model_path, engine=ENGINE, decode=AUTO, num_prefill=2) as workers:
        gone = WorkerRef("tiny/prefill/9", 1, "127.0.0.1:1")
        answer, expected = await run_beside_reference(model_path, workers, [gone, *workers.prefill_refs])
        assert answer.tokens == expected.tokens
        assert answer.logprobs == expected.logprobs
        assert answer.started is not None
        assert answer.started.timings.prefill_worker == workers.prefill_refs[0].worker_id
        for worker in workers.prefill:
            await worker.stop(0.0)
        answer = await workers.generate(request(list(range(50, 150)), max_tokens=6))
        assert len(answer.tokens) == 6
        assert answer.started is not None
        assert answer.started.timings.prefill_worker == ""
        workers.prefill_refs.clear()
        await workers.assert_nothing_leaks()


async def test_a_prefill_worker_that_dies_in_the_middle_is_not_noticed(model_path: Path) -> None:
    async with running_workers(model_path, engine=ENGINE, decode=AUTO, prefill=PrefillConfig(chunk_tokens=4)) as workers:
        prompt = [(7 * index) % 370 + 3 for index in range(800)]
        answer = asyncio.ensure_future(workers.generate(request(prompt, max_tokens=6, logprobs=3)))
        while workers.prefill[0]._scheduler.totals.computed_tokens < 100:
            await asyncio.sleep(0.001)
        await workers.prefill[0].stop(0.0)
        found = await answer
        async with running_workers(
            model_path, engine=ENGINE, decode=DecodeConfig(local_prefill="always"), num_prefill=0
        ) as alone:
            expected = await alone.generate(request(prompt, max_tokens=6, logprobs=3))
        assert (found.tokens, found.logprobs) == (expected.tokens, expected.logprobs)
        workers.prefill_refs.clear()
        await workers.assert_nothing_leaks()


async def test_unequal_layouts_are_refused_by_name(model_path: Path) -> None:
    """A prefill worker that rounds its KV must not serve; without another way, the client hears why."""
    other = EngineConfig(dtype="float32", exact=True, kv_pool_tokens=2048, kv_dtype="int8")
    async with running_workers(model_path, engine=ENGINE, decode=REMOTE, prefill_engine=other) as workers:
        with pytest.raises(HandshakeRefused, match="dtype"):
            await workers.generate(request(list(range(3, 60))))
        await workers.assert_nothing_leaks()
    async with running_workers(model_path, engine=ENGINE, decode=AUTO, prefill_engine=other) as workers:
        answer, expected = await run_beside_reference(model_path, workers, workers.prefill_refs)
        assert answer.tokens == expected.tokens


async def test_bad_requests_are_refused_before_any_work(model_path: Path) -> None:
    async with running_workers(model_path, engine=ENGINE, decode=REMOTE) as workers:
        bad: list[tuple[type[PdserveError], dict[str, object]]] = [
            (ModelNotFound, {"model": "other"}),
            (InvalidRequest, {"prompt": []}),
            (InvalidRequest, {"max_tokens": 0}),
            (InvalidRequest, {"max_tokens": 5000}),
            (InvalidRequest, {"prompt": [100_000]}),
        ]
        for kind, change in bad:
            prompt = change.pop("prompt", [5, 6, 7])
            with pytest.raises(kind):
                await workers.generate(request(prompt, **change))  # type: ignore[arg-type]
        await workers.assert_nothing_leaks()


async def test_strangers_are_refused(model_path: Path) -> None:
    async with running_workers(model_path, engine=ENGINE) as workers:
        for address in (workers.decode_ref.address, workers.prefill_refs[0].address):
            for token in (None, "wrong"):
                channel = connect(address, token)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await worker_pb2_grpc.WorkerStub(channel).Info(worker_pb2.InfoRequest(), timeout=60)
                assert isinstance(error_from_rpc(caught.value), AuthenticationFailed)
                await channel.close(None)


async def test_deadlines_end_requests_and_free_them(model_path: Path) -> None:
    async with running_workers(model_path, engine=ENGINE, decode=REMOTE) as workers:
        with pytest.raises(DeadlineExceeded):
            await workers.generate(request(list(range(3, 200)), max_tokens=1500, timeout_s=0.15))
        await workers.assert_nothing_leaks()


async def test_too_many_waiting_requests_are_refused(model_path: Path) -> None:
    config = DecodeConfig(local_prefill="always", max_running=1, max_waiting=2)
    async with running_workers(model_path, engine=ENGINE, decode=config, num_prefill=0) as workers:
        work = [request([5, 6, number + 3], request_id=str(number), max_tokens=30) for number in range(12)]
        outcomes = await asyncio.gather(*(workers.generate(item) for item in work), return_exceptions=True)
        refused = [outcome for outcome in outcomes if isinstance(outcome, Overloaded)]
        served = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
        assert len(refused) + len(served) == 12
        assert refused
        assert all(error.retry_after_s for error in refused)
        assert all(answer.finish == {0: FinishReason.LENGTH} for answer in served)
        await workers.assert_nothing_leaks()


async def test_drain_lets_requests_finish_and_admits_none(model_path: Path) -> None:
    async with running_workers(model_path, engine=ENGINE) as workers:
        running = asyncio.ensure_future(workers.generate(request(list(range(3, 80)), max_tokens=60)))
        while not workers.decode._scheduler.totals.generated_tokens:
            await asyncio.sleep(0.001)
        channel = connect(workers.decode_ref.address, TOKEN)
        reply = await worker_pb2_grpc.WorkerStub(channel).Drain(worker_pb2.DrainRequest(timeout_s=20), timeout=30)
        assert reply.drained
        assert len((await running).tokens) == 60
        assert (await workers.info(workers.decode_ref.address)).state == "draining"
        with pytest.raises(PdserveError, match="draining"):
            await workers.generate(request([5, 6]))
        await channel.close(None)


async def test_a_failed_engine_fails_its_requests_and_says_so(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the end of its writing is heard of before the reason."""
    async with running_workers(model_path, engine=ENGINE, decode=REMOTE) as workers:
        runs = workers.prefill[0]._runs
        run = runs.run

        async def answering_late(message: worker_pb2.PrefillRequest) -> worker_pb2.PrefillReply:
            try:
                return await run(message)
            except PdserveError:
                await asyncio.sleep(0.05)
                raise

        monkeypatch.setattr(runs, "run", answering_late)

        def broken(batch: object) -> None:
            raise RuntimeError("planted")

        monkeypatch.setattr("threading.excepthook", lambda arguments: None)
        monkeypatch.setattr(type(workers.prefill[0]._host.engine.runner), "execute", lambda self, batch: broken(batch))
        with pytest.raises((PdserveError, WorkerLost)) as caught:
            await workers.generate(request(list(range(3, 60))))
        assert not isinstance(caught.value, (InvalidRequest, TransferBroken))
        async with asyncio.timeout(120):
            await workers.prefill[0].wait_failed()


async def test_ticket_time_bounds_a_silent_prefill_worker(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefill worker that computes nothing (its engine hangs) costs the ticket's time, not for ever; the answer is right."""
    async with running_workers(
        model_path, engine=ENGINE, decode=AUTO, transfer=TransferConfig(transports=("shm", "tcp"), ticket_ttl_s=0.4)
    ) as workers:
        monkeypatch.setattr(workers.prefill[0]._loop._core, "schedule", lambda: False)
        answer, expected = await run_beside_reference(model_path, workers, workers.prefill_refs)
        assert answer.tokens == expected.tokens
        assert answer.started is not None
        assert answer.started.timings.prefill_worker == ""
        await workers.assert_nothing_leaks()
