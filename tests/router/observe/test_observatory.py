"""What a router remembers of requests that came over real sockets, answered by workers of which the test knows everything."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc.aio
import httpx
import pytest
from prometheus_client import CollectorRegistry

from common.clock import ManualClock
from common.config import RouterConfig
from common.errors import Overloaded
from common.metrics import ObserveMetrics
from common.tracing.tracer import NoTracer
from common.types import WorkAccount
from common.wire import inference_pb2, inference_pb2_grpc
from router.observe.cost import Ledgers
from router.observe.observatory import RECORDS, SECONDS, Observatory
from router.observe.records import RequestRecord
from support.fake_cluster import MODEL
from support.router_clients import http_client

SECRET_WORDS = "the moon is made of cheese"
BODY: dict[str, Any] = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 50, "seed": 3}
WORK = WorkAccount(0.5, 0.25, 0.125, 0.0625, prefill_tokens=10, decode_tokens=5, wasted_tokens=2, cached_tokens=3)


@pytest.fixture
def observatories(monkeypatch: pytest.MonkeyPatch) -> list[Observatory]:
    """Those of the routers that the test starts."""
    made: list[Observatory] = []

    def make(*arguments: Any, **more: Any) -> Observatory:
        made.append(Observatory(*arguments, **more))
        return made[-1]

    monkeypatch.setattr("router.front.Observatory", make)
    return made


async def the_record(observatory: Observatory, request_id: str) -> RequestRecord:
    """It is there a moment after the client has seen the end."""
    async with asyncio.timeout(120):
        while (found := observatory.request(request_id)) is None:
            await asyncio.sleep(0.005)
    return found


async def value(http: httpx.AsyncClient, start: str) -> float:
    for line in (await http.get("/metrics")).text.splitlines():
        if line.startswith(start):
            return float(line.rpartition(" ")[2])
    return 0.0


async def test_a_request_is_remembered_with_where_its_time_went(start_cluster: Any, observatories: list[Observatory]) -> None:
    async with start_cluster(slo={"interactive": {"ttft_s": 10.0}}) as cluster, http_client(cluster) as http:
        cluster.worker.account = WORK
        body = {"model": MODEL, "messages": [{"role": "user", "content": SECRET_WORDS}], "max_tokens": 50}
        before_s = time.time()
        reply = await http.post("/v1/chat/completions", json=body, headers={"x-request-id": "mine"})
        usage = reply.json()["usage"]
        (observatory,) = observatories
        record = await the_record(observatory, "mine")
        assert (record.endpoint, record.model, record.status, record.error) == ("/v1/chat/completions", MODEL, 200, "")
        assert (record.band, record.slo, record.slo_met) == ("interactive", "interactive", True)
        assert (record.prompt_tokens, record.completion_tokens) == (usage["prompt_tokens"], usage["completion_tokens"])
        assert (record.cached_tokens, record.cache, record.from_cache) == (3, "ineligible", False)
        assert record.ttft_s is not None
        assert record.tpot_s is not None
        assert sum(stage.seconds for stage in record.stages) == pytest.approx(record.ttft_s)
        assert 0.0 <= record.queue_s <= record.ttft_s <= record.total_s
        assert before_s <= record.started_at_s <= time.time()
        assert (record.prefill_worker, record.decode_worker) == ("tiny/prefill/0", "tiny/decode/0")
        assert (record.transport, record.transfer_bytes) == ("shm", 4096)
        assert record.cost.parts == {"prefill": 0.5, "transfer": 0.0625, "decode": 0.25, "wasted": 0.125}
        assert not any(word in repr(observatory.requests()) for word in ("moon", "cheese", cluster.worker.answer))
        assert await value(http, f'pdserve_slo_requests_total{{model_name="{MODEL}",outcome="met",slo="interactive"}}') == 1
        assert await value(http, f'pdserve_cost_seconds_total{{model_name="{MODEL}",part="wasted"}}') == 0.125
        assert await value(http, f'pdserve_cost_tokens_total{{model_name="{MODEL}",part="decode"}}') == 5
        assert await value(http, f'pdserve_waterfall_unexplained_ratio_count{{model_name="{MODEL}"}}') == 1
        assert await value(http, f'vllm:request_prompt_tokens_sum{{model_name="{MODEL}"}}') == usage["prompt_tokens"]
        assert await value(http, f'vllm:request_generation_tokens_sum{{model_name="{MODEL}"}}') == usage["completion_tokens"]
        assert await value(http, "pdserve_router_loop_delay_seconds_count") >= 0


async def test_what_went_wrong_is_remembered_by_its_name(start_cluster: Any, observatories: list[Observatory]) -> None:
    async with start_cluster(slo={"interactive": {"ttft_s": 10.0}}) as cluster, http_client(cluster) as http:
        await http.post("/v1/completions", json={**BODY, "model": "nobody"}, headers={"x-request-id": "unknown"})
        cluster.worker.refuse = Overloaded("full", retry_after_s=1.0)
        await http.post("/v1/completions", json=BODY, headers={"x-request-id": "full"})
        (observatory,) = observatories
        unknown, full = await the_record(observatory, "unknown"), await the_record(observatory, "full")
        assert (unknown.status, unknown.error, unknown.slo_met, unknown.ttft_s) == (404, "ModelNotFound", None, None)
        assert (full.status, full.error, full.slo_met, full.model) == (429, "Overloaded", False, MODEL)
        observatory.tick()
        second = observatory.series()[-1]
        assert (second.requests, second.failed) == (2, 1)
        assert second.slo["interactive"].missed == 1
        assert await value(http, 'pdserve_slo_met_ratio{slo="interactive"}') == 0.0


async def test_a_stream_that_breaks_and_one_that_is_left(start_cluster: Any, observatories: list[Observatory]) -> None:
    async with start_cluster(migrations=0) as cluster, http_client(cluster) as http:
        cluster.worker.account = WORK
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200
        (observatory,) = observatories
        cluster.worker.fail_after = 2
        await http.post("/v1/completions", json={**BODY, "stream": True}, headers={"x-request-id": "broken"})
        broken = await the_record(observatory, "broken")
        assert (broken.status, broken.error, broken.completion_tokens) == (503, "WorkerLost", 2)
        assert broken.cost.decode_s == pytest.approx(2 * (0.25 + 0.125) / 5), "by the mean of what was told"
        cluster.worker.fail_after, cluster.worker.hold_after = None, 3
        async with http.stream(
            "POST", "/v1/completions", json={**BODY, "stream": True}, headers={"x-request-id": "left"}
        ) as reply:
            assert reply.status_code == 200
            await cluster.worker.holding.wait()
            (active,) = observatory.active()
            assert (active.request_id, active.decode_worker) == ("left", "tiny/decode/0")
        left = await the_record(observatory, "left")
        assert (left.status, left.error) == (499, "")
        assert observatory.active() == ()


async def test_tokens_count_in_the_second_in_which_they_come(start_cluster: Any, observatories: list[Observatory]) -> None:
    async with start_cluster() as cluster, http_client(cluster) as http:
        cluster.worker.hold_after = 3
        reply = asyncio.ensure_future(http.post("/v1/completions", json=BODY, headers={"x-request-id": "slow"}))
        await cluster.worker.holding.wait()
        (observatory,) = observatories
        async with asyncio.timeout(120):
            while not observatory.active() or observatory.active()[0].completion_tokens < 3:
                await asyncio.sleep(0.005)
        observatory.tick()
        first = observatory.series()[-1]
        assert (first.requests, first.in_flight) == (0, 1)
        before = sum(second.tokens for second in observatory.series())
        assert before == 3
        cluster.worker.released.set()
        usage = (await reply).json()["usage"]
        await the_record(observatory, "slow")
        observatory.tick()
        assert sum(second.tokens for second in observatory.series()) == usage["completion_tokens"]
        assert sum(second.requests for second in observatory.series()) == 1
        assert observatory.series(after_s=observatory.series()[-1].at_s) == ()


async def test_what_a_cache_gives_costs_nothing_and_saves(start_cluster: Any, observatories: list[Observatory]) -> None:
    async with start_cluster(cache={}) as cluster, http_client(cluster) as http:
        cluster.worker.account = WORK
        body = {**BODY, "temperature": 0.0}
        await http.post("/v1/completions", json=body, headers={"x-request-id": "first"})
        reply = await http.post("/v1/completions", json=body, headers={"x-request-id": "again"})
        assert reply.headers["x-cache"] == "hit-exact"
        (observatory,) = observatories
        again = await the_record(observatory, "again")
        assert (again.cache, again.from_cache, again.decode_worker) == ("hit-exact", True, "")
        assert again.cost.total_s == 0.0
        tokens = again.completion_tokens
        assert again.cost.saved_s == pytest.approx(3 * 0.5 / 10 + tokens * (0.25 + 0.125) / 5)
        assert await value(http, f'pdserve_cost_saved_seconds_total{{model_name="{MODEL}"}}') == pytest.approx(
            again.cost.saved_s + 3 * 0.5 / 10
        )


async def test_an_answer_that_two_share_is_paid_once(start_cluster: Any, observatories: list[Observatory]) -> None:
    async with start_cluster(cache={}) as cluster, http_client(cluster) as http:
        cluster.worker.account, cluster.worker.hold_after = WORK, 2
        asking = [
            asyncio.ensure_future(http.post("/v1/completions", json=BODY, headers={"x-request-id": name})) for name in ("a", "b")
        ]
        (observatory,) = observatories
        async with asyncio.timeout(120):
            while sum(active.completion_tokens for active in observatory.active()) < 4:
                await asyncio.sleep(0.005)
        cluster.worker.released.set()
        results = sorted([reply.headers["x-cache"] for reply in await asyncio.gather(*asking)])
        assert results == ["coalesced", "miss"]
        records = [await the_record(observatory, name) for name in ("a", "b")]
        (paid,) = [record for record in records if record.cache == "miss"]
        (given,) = [record for record in records if record.cache == "coalesced"]
        assert paid.cost.total_s == WORK.prefill_s + WORK.transfer_s + WORK.decode_s + WORK.wasted_s
        assert (given.cost.total_s, given.decode_worker, given.from_cache) == (0.0, "", True)
        assert given.cost.saved_s > 0
        assert await value(http, f'pdserve_cost_seconds_total{{model_name="{MODEL}",part="decode"}}') == WORK.decode_s


async def test_a_migration_is_told_with_who_took_over(start_cluster: Any, observatories: list[Observatory]) -> None:
    async with start_cluster(num_workers=2) as cluster, http_client(cluster) as http:
        for worker in cluster.workers:
            worker.hold_after = 2
        reply = asyncio.ensure_future(http.post("/v1/completions", json={**BODY, "n": 2}, headers={"x-request-id": "moved"}))
        async with asyncio.timeout(120):
            while not any(worker.holding.is_set() for worker in cluster.workers):
                await asyncio.sleep(0.005)
        lost = cluster.serving()
        (other,) = [worker for worker in cluster.workers if worker is not lost]
        other.hold_after = None
        lost.fail_after = 0
        await lost.stop()
        assert (await reply).status_code == 200
        (observatory,) = observatories
        record = await the_record(observatory, "moved")
        assert record.decode_worker == lost.worker_id
        assert record.migrated_to == (other.worker_id, other.worker_id), "each choice went on by itself"


async def test_grpc_is_seen_as_well_and_strangers_are_not(start_cluster: Any, observatories: list[Observatory]) -> None:
    async with start_cluster(api_keys=["secret-key-of-mine"]) as cluster, http_client(cluster) as http:
        assert (await http.post("/v1/completions", json=BODY, headers={"authorization": "Bearer no"})).status_code == 401
        async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            message = inference_pb2.InferenceRequest(model=MODEL, prompt="hi", request_id="over-grpc")
            async for _ in stub.Generate(message, metadata=(("authorization", "Bearer secret-key-of-mine"),)):
                continue
        (observatory,) = observatories
        record = await the_record(observatory, "over-grpc")
        assert (record.endpoint, record.status, record.model) == ("grpc/Generate", 200, MODEL)
        assert [one.request_id for one in observatory.requests()] == ["over-grpc"]
        assert observatory.active() == ()
        assert "secret" not in repr(observatory.requests())


async def test_prometheus_learns_where_to_scrape(start_cluster: Any) -> None:
    async with (
        start_cluster(tenants={"ops": {"keys": ["of-an-operator"], "admin": True}, "other": {"keys": ["of-another"]}}) as (
            cluster
        ),
        http_client(cluster) as http,
    ):
        snapshot = cluster.snapshot()
        snapshot.workers[0].metrics_address = "127.0.0.1:1234"
        snapshot.manager_metrics_address = "127.0.0.1:4321"
        snapshot.routers.add(http_address="127.0.0.1:8000")
        cluster.manager.publish(snapshot)
        async with asyncio.timeout(120):
            while len(found := (await _targets(http, "of-an-operator")).json()) < 3:
                await asyncio.sleep(0.005)
        assert {target["targets"][0]: target["labels"]["process"] for target in found} == {
            "127.0.0.1:1234": "worker",
            "127.0.0.1:8000": "router",
            "127.0.0.1:4321": "manager",
        }
        assert found[0]["labels"] == {"cluster": "test", "process": "worker", "worker": "tiny/decode/0", "role": "decode"}
        assert (await _targets(http, "of-another")).status_code == 403
        assert (await _targets(http, "nobody")).status_code == 401


async def _targets(http: httpx.AsyncClient, key: str) -> httpx.Response:
    return await http.get("/metrics/targets", headers={"authorization": f"Bearer {key}"})


def empty(clock: ManualClock) -> Observatory:
    metrics = ObserveMetrics(CollectorRegistry())
    return Observatory(RouterConfig(), lines=tuple, ledgers=Ledgers(), tracer=NoTracer(), clock=clock, metrics=metrics)


def test_memory_is_bounded_and_the_newest_comes_first() -> None:
    clock = ManualClock(1000.0)
    observatory = empty(clock)
    for number in range(RECORDS + 20):
        sighting = observatory.begin(f"id {number % (RECORDS + 10)}", "/v1/completions", clock.monotonic_s(), lambda name: "")
        clock.advance(0.25)
        observatory.end(sighting, 200, None)
    requests = observatory.requests()
    assert len(requests) == RECORDS
    assert requests[0].request_id == "id 9"
    assert observatory.request("id 9") is requests[0], "the last one with an id that came twice"
    assert observatory.request("id 20") is not None
    assert observatory.request("id 19") is None, "it had to make room"
    for _ in range(SECONDS + 5):
        clock.advance(1.0)
        observatory.tick()
    series = observatory.series()
    assert len(series) == SECONDS
    assert series[-1].at_s - series[0].at_s == SECONDS - 1
    assert all(second.length_s == 1.0 for second in series)


class Hurried(ManualClock):
    """A second and a half later at every look."""

    def monotonic_s(self) -> float:
        self.advance(1.5)
        return super().monotonic_s()


async def test_seconds_are_closed_by_themselves_and_delays_are_noticed() -> None:
    registry = CollectorRegistry()
    metrics = ObserveMetrics(registry)
    observatory = Observatory(RouterConfig(), lines=tuple, ledgers=Ledgers(), tracer=NoTracer(), clock=Hurried(), metrics=metrics)
    running = asyncio.ensure_future(observatory.run())
    try:
        async with asyncio.timeout(120):
            second = await observatory.next_second()
    finally:
        running.cancel()
        await asyncio.wait([running])
    assert second.loop_delay_s > 0
    count = registry.get_sample_value("pdserve_router_loop_delay_seconds_count")
    assert count is not None
    assert count >= len(observatory.series()) >= 1


async def test_whoever_waits_for_a_second_gets_it() -> None:
    clock = ManualClock()
    observatory = empty(clock)
    waiting = asyncio.ensure_future(observatory.next_second())
    await asyncio.sleep(0)
    clock.advance(1.5)
    observatory.tick(0.5)
    second = await waiting
    assert (second.length_s, second.loop_delay_s) == (1.5, 0.5)
