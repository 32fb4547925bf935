"""A worker changes its role and keeps what it has loaded: the same tokens before and after, and its prefix cache goes with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import grpc.aio
import pytest

from common.config import DecodeConfig, EngineConfig, PrefillConfig
from common.errors import WorkerLost
from common.rpc import connect
from common.types import Role
from common.worker import LoadedModel, WorkerServer
from decode_worker.server import DecodeWorker
from prefill_worker.server import PrefillWorker
from support.tiny_models import make_tiny_model
from support.workers import TOKEN, Workers, request, running_workers

ENGINE = EngineConfig(dtype="float32", exact=True, kv_pool_tokens=4096)
PROMPT = [11 + 7 * (position % 31) for position in range(150)]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), seed=5)


async def become(worker: PrefillWorker | DecodeWorker, role: Role, index: int) -> WorkerServer:
    """The other worker in its place, as the process that hosts them does it."""
    kept: LoadedModel = await worker.retire()
    spec = replace(worker._spec, worker_id=f"tiny/{role.value}/{index}", incarnation=1, role=role)
    return DecodeWorker(spec, kept) if role is Role.DECODE else PrefillWorker(spec, kept)


@pytest.mark.parametrize("ranks", [1, 2])
async def test_a_prefill_worker_that_becomes_a_decode_worker_serves_the_same_from_its_cache(model_path: Path, ranks: int) -> None:
    async with running_workers(
        model_path,
        engine=ENGINE,
        num_prefill=2,
        prefill=PrefillConfig(tensor_parallel=ranks),
        decode=DecodeConfig(tensor_parallel=ranks, local_prefill="never", preemption="swap"),
    ) as workers:
        expected = await workers.generate(request(PROMPT, request_id="a"), prefill=workers.prefill_refs[1:])
        weights = workers.prefill[1]._host.engine.runner
        pids = (await workers.info(workers.prefill_refs[1].address)).rank_pids
        assert len(pids) == ranks - 1
        flipped = await become(workers.prefill.pop(), Role.DECODE, 1)
        assert isinstance(flipped, DecodeWorker)
        ref = await flipped.start()
        channel: grpc.aio.Channel = connect(ref.address, TOKEN)
        try:
            assert flipped._host.engine.runner is weights
            assert (await workers.info(ref.address)).rank_pids == pids
            there = Workers(flipped, workers.prefill, ref, workers.prefill_refs[:1], channel)
            again = await there.generate(request(PROMPT, request_id="b"))
            assert again.tokens == expected.tokens
            assert again.started is not None
            assert again.started.cached_tokens >= 144  # computed there when it was a prefill worker
            fresh = await there.generate(request(PROMPT[40:], request_id="c"))  # handed over by the other prefill worker
            assert fresh.started is not None
            assert fresh.started.timings.prefill_worker == "tiny/prefill/0"
            assert fresh.tokens == (await workers.generate(request(PROMPT[40:], request_id="d"))).tokens
            await there.assert_nothing_leaks()
        finally:
            await channel.close(None)
            await flipped.stop(0.0)


async def test_a_decode_worker_that_becomes_a_prefill_worker_hands_over(model_path: Path) -> None:
    async with running_workers(model_path, engine=ENGINE) as workers:
        expected = await workers.generate(request(PROMPT, request_id="a"))
        other = DecodeWorker(replace(workers.decode._spec, worker_id="tiny/decode/1"))
        ref = await other.start()
        channel = connect(ref.address, TOKEN)
        there = Workers(other, workers.prefill, ref, workers.prefill_refs, channel)
        assert (await there.generate(request(PROMPT, request_id="b"))).tokens == expected.tokens
        await channel.close(None)
        flipped = await become(other, Role.PREFILL, 1)
        prefill_ref = await flipped.start()
        try:
            answer = await workers.generate(request(PROMPT[1:], request_id="c"), prefill=[prefill_ref])
            assert answer.started is not None
            assert answer.started.timings.prefill_worker == "tiny/prefill/1"
            assert answer.tokens == (await workers.generate(request(PROMPT[1:], request_id="d"))).tokens
            await workers.assert_nothing_leaks()
        finally:
            await flipped.stop(0.0)


async def test_memory_that_somebody_may_still_use_is_not_handed_on(model_path: Path) -> None:
    async with running_workers(model_path, engine=ENGINE) as workers:
        other = DecodeWorker(replace(workers.decode._spec, worker_id="tiny/decode/1"))
        await other.start()
        blocks = other._host.engine.blocks
        blocks.quarantine(blocks.allocate(2))
        with pytest.raises(WorkerLost, match="2 may still be written to"):
            await other.retire()
        other._loaded.close()
