"""`Decode.ProbeLinks`: every kind of link between two real workers is tried, and what stands in the way is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.codec import worker_ref_to_wire
from common.config import DecodeConfig, EngineConfig
from common.rpc import connect
from common.types import WorkerRef
from common.wire import worker_pb2, worker_pb2_grpc
from support.tiny_models import make_tiny_model
from support.workers import TOKEN, Workers, request, running_workers

ENGINE = EngineConfig(dtype="float32", exact=True, kv_pool_tokens=1024)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), seed=5)


async def probe(workers: Workers, *refs: WorkerRef) -> list[worker_pb2.PeerReport]:
    channel = connect(workers.decode_ref.address, TOKEN)
    try:
        message = worker_pb2.ProbeLinksRequest(prefill=[worker_ref_to_wire(ref) for ref in refs])
        return list((await worker_pb2_grpc.DecodeStub(channel).ProbeLinks(message, timeout=30)).peers)
    finally:
        await channel.close(None)


async def test_each_kind_is_measured_and_the_one_in_use_is_named(model_path: Path) -> None:
    async with running_workers(model_path, engine=ENGINE, num_prefill=2, transports=("tcp",)) as workers:
        reports = await probe(workers, *workers.prefill_refs)
        assert [report.prefill_worker_id for report in reports] == [ref.worker_id for ref in workers.prefill_refs]
        for report in reports:
            assert report.transport == "tcp"
            links = {link.kind: link for link in report.links}
            assert "cuda_ipc" not in links, "a pool in host memory does not offer it"
            assert links["tcp"].configured
            assert not links["shm"].configured  # and yet it works: the operator may want to know
            for kind in ("tcp", "shm"):
                assert not links[kind].HasField("error"), links[kind].error
                assert links[kind].latency_s > 0
                assert links[kind].bytes_per_s > 0
        await workers.assert_nothing_leaks()
        answer = await workers.generate(request(list(range(3, 60)), max_tokens=3))
        assert len(answer.tokens) == 3


async def test_unequal_layouts_and_dead_workers_are_named(model_path: Path) -> None:
    other = EngineConfig(dtype="float32", exact=True, kv_pool_tokens=1024, block_tokens=24)
    async with running_workers(
        model_path, engine=ENGINE, decode=DecodeConfig(local_prefill="auto"), prefill_engine=other
    ) as workers:
        gone = WorkerRef("tiny/prefill/9", 1, "127.0.0.1:1")
        unequal, dead = await probe(workers, workers.prefill_refs[0], gone)
        assert unequal.refused.param == "block_tokens"
        assert unequal.transport == ""
        assert not unequal.links[0].HasField("error")  # the link is good; it is the pools that do not fit
        assert dead.refused.code == "WorkerLost"
        assert {link.error.code for link in dead.links} == {"WorkerLost"}
        await workers.assert_nothing_leaks()
