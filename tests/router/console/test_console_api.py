"""The JSON under /admin/v1: what it says of a cluster, to whom, and how the live stream begins, goes on and ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import httpx
import pytest

from common.errors import ModelNotFound
from common.wire import registry_pb2, worker_pb2
from support.fake_cluster import MODEL, FakeCluster
from support.router_clients import http_client

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
ACT = {"x-pdserve-console": "1"}
KEYS: dict[str, Any] = {"tenants": {"ops": {"admin": True, "keys": ["root"]}, "acme": {"keys": ["plain"]}}}


def frames_of(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    async def read() -> AsyncIterator[dict[str, Any]]:
        async for line in lines:
            if line:
                assert line.startswith("data: ")
                yield json.loads(line[6:])

    return read()


@asynccontextmanager
async def watching(http: httpx.AsyncClient) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    async with http.stream("GET", "/admin/v1/live") as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = reply.aiter_lines()
        async with asyncio.timeout(120), aclosing(lines):
            yield frames_of(lines)


def with_figures(snapshot: registry_pb2.ClusterSnapshot) -> registry_pb2.ClusterSnapshot:
    """The first worker as one that has something to tell."""
    worker = snapshot.workers[0]
    worker.pid, worker.device, worker.started_s = 4711, "cpu", 1000.5
    worker.blocks_total, worker.blocks_free, worker.blocks_cached = 100, 60, 20
    worker.blocks_in_transfer, worker.blocks_arriving = 5, 8
    worker.requests_running, worker.requests_waiting = 3, 2
    worker.pace.computed_tokens, worker.pace.generated_tokens = 1000, 500
    worker.tensor_parallel, worker.pipeline_parallel = 2, 1
    worker.rank_pids.append(4712)
    worker.links.append(
        worker_pb2.LinkUse(prefill_worker_id="tiny/prefill/0", prefill_incarnation=1, transport="shm", transfers=7, bytes=4096)
    )
    snapshot.models[0].desired_prefill, snapshot.models[0].desired_decode = 1, 2
    snapshot.routers.add(router_id="r", http_address="127.0.0.1:1", grpc_address="127.0.0.1:2", pid=9)
    snapshot.events.add(sequence=1, at_s=5.0, kind="lost", worker_id="tiny/decode/0", model=MODEL, text="killed by signal 9")
    return snapshot


async def test_the_cluster_as_json(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    cluster.manager.publish(with_figures(cluster.snapshot(prefill=("tiny/prefill/0",))))
    async with asyncio.timeout(120):
        while len((found := (await http.get("/admin/v1/cluster")).json())["workers"]) < 2:
            await asyncio.sleep(0.01)
    worker = found["workers"]["tiny/decode/0"]
    assert worker["kv"] == {"total": 100, "free": 40, "cached": 20, "used": 27, "arriving": 8, "quarantined": 5}
    assert sum(count for name, count in worker["kv"].items() if name != "total") == 100
    assert (worker["role"], worker["state"], worker["incarnation"], worker["pid"]) == ("decode", "ready", 1, 4711)
    assert (worker["tensor_parallel"], worker["pipeline_parallel"], worker["rank_pids"]) == (2, 1, [4712])
    assert (worker["running"], worker["waiting"], worker["totals"]["generated"]) == (3, 2, 500)
    assert found["links"]["tiny/prefill/0 > tiny/decode/0"] == {
        "prefill": "tiny/prefill/0",
        "decode": "tiny/decode/0",
        "transport": "shm",
        "transfers": 7,
        "failures": 0,
        "bytes": 4096,
        "bytes_per_s": 0,
    }
    assert found["models"][MODEL]["desired"] == {"prefill": 1, "decode": 2}
    assert found["models"][MODEL]["ready"] == {"prefill": 1, "decode": 1}
    assert found["routers"] == {"r": {"http": "127.0.0.1:1", "grpc": "127.0.0.1:2", "pid": 9, "this": False}}
    assert found["events"][0]["text"] == "killed by signal 9"
    assert found["cluster"]["manager_connected"] is True
    assert found["cluster"]["version"] == (await http.get("/version")).json()["version"]


async def test_rates_are_what_came_between_two_snapshots(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    snapshot = with_figures(cluster.snapshot())
    cluster.manager.publish(snapshot)
    async with asyncio.timeout(120):  # or the manager would have both in one message
        while not (await http.get("/admin/v1/cluster")).json()["links"]:
            await asyncio.sleep(0.01)
    async with watching(http) as frames:
        assert (await anext(frames))["picture"]["links"]
        grown = registry_pb2.ClusterSnapshot()
        grown.CopyFrom(snapshot)
        grown.workers[0].pace.generated_tokens += 900
        grown.workers[0].links[0].bytes += 3_000_000
        cluster.manager.publish(grown)
        rates: dict[str, Any] = {}
        async for frame in frames:
            patch = frame.get("patch", {})
            rates |= patch.get("workers", {}).get("tiny/decode/0", {}).get("rates", {})
            rates |= patch.get("links", {}).get("tiny/prefill/0 > tiny/decode/0", {})
            if rates.get("generated") and rates.get("bytes_per_s"):
                break
    assert 250 < rates["generated"] <= 1800
    assert 900_000 < rates["bytes_per_s"] <= 6_000_000


async def test_requests_one_by_one_and_no_word_of_their_content(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    secret = {**CHAT, "messages": [{"role": "user", "content": "xyzzy plugh"}]}
    await http.post("/v1/chat/completions", json=secret, headers={"X-Request-Id": "mine"})
    await http.post("/v1/chat/completions", json={**CHAT, "temperature": 9}, headers={"X-Request-Id": "wrong"})
    listed = await http.get("/admin/v1/requests")
    assert [one["id"] for one in listed.json()["requests"]] == ["wrong", "mine"]
    assert [one["id"] for one in (await http.get("/admin/v1/requests?outcome=failed")).json()["requests"]] == ["wrong"]
    assert [one["id"] for one in (await http.get(f"/admin/v1/requests?outcome=ok&model={MODEL}")).json()["requests"]] == ["mine"]
    assert len((await http.get("/admin/v1/requests?limit=1")).json()["requests"]) == 1
    one = (await http.get("/admin/v1/requests/mine")).json()
    assert (one["status"], one["decode_worker"], one["prefill_worker"]) == (200, "tiny/decode/0", "tiny/prefill/0")
    assert sum(value for _, value in one["stages"]) == pytest.approx(one["ttft_ms"], abs=0.1)
    assert one["completion_tokens"] > 0
    assert (await http.get("/admin/v1/requests/nobody")).json()["error"]["code"] == "request_not_found"
    assert (await http.get("/admin/v1/requests?outcome=fine")).json()["error"]["param"] == "outcome"
    assert (await http.get("/admin/v1/requests?limit=-1")).json()["error"]["param"] == "limit"
    for path in ("/admin/v1/requests", "/admin/v1/requests/mine", "/admin/v1/cluster", "/admin/v1/series"):
        reply = await http.get(path)
        assert reply.headers["cache-control"] == "no-store"
        assert "xyzzy" not in reply.text


async def test_the_live_stream_tells_what_has_changed(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    async with watching(http) as frames:
        first = await anext(frames)
        assert first["picture"]["workers"]["tiny/decode/0"]["state"] == "ready"
        assert first["requests"] == []
        cluster.worker.hold_after = 1
        asking = asyncio.create_task(http.post("/v1/chat/completions", json=CHAT, headers={"X-Request-Id": "held"}))
        await cluster.worker.holding.wait()
        async for frame in frames:
            if [one["id"] for one in frame.get("active", [])] == ["held"]:
                break
        assert frame["patch"]["router"]["in_flight"] == {MODEL: 1}
        assert "cluster" not in frame["patch"]
        cluster.worker.released.set()
        await asking
        cluster.publish(tiny_decode_0="draining")
        ended, states = [], []
        async for frame in frames:
            ended += [one["id"] for one in frame.get("requests", [])]
            states += [worker.get("state") for worker in frame.get("patch", {}).get("workers", {}).values()]
            if ended and "draining" in states:
                break
        assert ended == ["held"]
        assert "picture" not in frame


async def test_the_stream_ends_in_an_orderly_way_when_the_router_stops(start_cluster: Any) -> None:
    async with start_cluster() as cluster, http_client(cluster) as http, watching(http) as frames:
        assert "picture" in await anext(frames)
        cluster.stop.set()
        seen = [frame async for frame in frames]
        assert seen[-1] == {"end": "the router is stopping"}
        assert cluster.task is not None
        await asyncio.wait({cluster.task}, timeout=60)
        assert cluster.task.done()


async def test_viewers_are_few_and_who_leaves_makes_room(start_cluster: Any) -> None:
    async with start_cluster(console={"max_viewers": 2}) as cluster, http_client(cluster) as http:
        async with watching(http) as one, watching(http) as other:
            await anext(one)
            await anext(other)
            refused = await http.get("/admin/v1/live")
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
            assert refused.headers["retry-after"]
        async with asyncio.timeout(120):
            while True:
                async with http.stream("GET", "/admin/v1/live") as reply:
                    if reply.status_code == 200:
                        break
                await asyncio.sleep(0.02)


async def test_the_manager_s_absence_is_told(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    await cluster.manager.stop()
    async with asyncio.timeout(120):
        while (found := (await http.get("/admin/v1/cluster")).json()["cluster"])["manager_connected"]:
            await asyncio.sleep(0.01)
    assert found["manager_away_s"] >= 0
    refused = await http.post("/admin/v1/actions/roll", json={"model": MODEL}, headers=ACT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "manager_unavailable")


# -- keys --------------------------------------------------------------------------------------------------------------

READS = (
    "/admin/v1/autoscaler",
    "/admin/v1/cluster",
    "/admin/v1/requests",
    "/admin/v1/requests/x",
    "/admin/v1/series",
    "/admin/v1/live",
)


async def test_with_keys_only_an_administrator_reads_and_acts_while_the_page_is_open(start_cluster: Any) -> None:
    async with start_cluster(**KEYS) as cluster, http_client(cluster) as http:
        for path in READS:
            assert (await http.get(path)).status_code == 401
            plain = await http.get(path, headers={"Authorization": "Bearer plain"})
            assert (plain.status_code, plain.json()["error"]["type"]) == (403, "PermissionDeniedError")
        body = {"model": MODEL, "decode": 2}
        assert (await http.post("/admin/v1/actions/scale", json=body, headers=ACT)).status_code == 401
        headers = {**ACT, "Authorization": "Bearer plain"}
        assert (await http.post("/admin/v1/actions/scale", json=body, headers=headers)).status_code == 403
        assert not cluster.manager.control.asked
        root = {"Authorization": "Bearer root", "Host": "llm.example.org"}
        assert (await http.get("/admin/v1/cluster", headers=root)).status_code == 200
        assert (await http.post("/admin/v1/actions/scale", json=body, headers={**ACT, **root})).status_code == 200
        assert (await http.get("/")).status_code == 200
        assert (await http.get("/console/app.js")).status_code == 200
        assert (await http.get("/console/nothing.js")).status_code == 401


async def test_without_keys_a_foreign_page_gets_nothing(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    rebound, foreign = {"Host": "evil.example:8000"}, {"Origin": "http://evil.example"}
    for headers in (rebound, foreign):
        for path in READS:
            assert (await http.get(path, headers=headers)).status_code == 403, (path, headers)
    body = {"model": MODEL, "decode": 0}
    for headers in ({}, {**rebound, **ACT}, {**foreign, **ACT}, {"Content-Type": "text/plain"}):
        reply = await http.post("/admin/v1/actions/scale", content=json.dumps(body), headers=headers)
        assert reply.status_code == 403, headers
    preflight = await http.options("/admin/v1/actions/scale", headers={**foreign, "Access-Control-Request-Method": "POST"})
    assert preflight.status_code >= 400
    assert not [name for name in preflight.headers if name.startswith("access-control")]
    assert not cluster.manager.control.asked


# -- actions -----------------------------------------------------------------------------------------------------------


async def test_actions_reach_the_manager_as_they_were_asked(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    control, worker = cluster.manager.control, "tiny/decode/0"

    async def act(name: str, **body: Any) -> httpx.Response:
        return await http.post(f"/admin/v1/actions/{name}", json=body, headers=ACT)

    assert (await act("scale", model=MODEL, decode=3)).json() == {"done": "scale"}
    assert control.asked[-1] == registry_pb2.ScaleRequest(model=MODEL, decode=3)
    assert not control.asked[-1].HasField("prefill")
    await act("scale", model=MODEL, prefill=0, decode=1, wait_s=2)
    assert control.asked[-1] == registry_pb2.ScaleRequest(model=MODEL, prefill=0, decode=1, wait_s=2)
    await act("drain", worker_id=worker)
    assert control.asked[-1] == registry_pb2.DrainWorkerRequest(worker_id=worker)
    await act("flip", worker_id=worker, role="prefill")
    assert (control.asked[-1].worker_id, control.asked[-1].role) == (worker, 1)
    await act("roll", model=MODEL)
    assert control.asked[-1] == registry_pb2.RollRequest(model=MODEL)
    await act("roll", model=MODEL, role="decode")
    assert control.asked[-1].role == 2
    decision = registry_pb2.AutoscalerDecision(at_s=1.0, action="grow", text="decode +1", reason="slow", performed=True)
    control.report = registry_pb2.AutoscalerReport(
        models=[registry_pb2.ModelAutoscaling(model=MODEL, mode=registry_pb2.AUTOSCALER_MODE_DRY_RUN, decisions=[decision])]
    )
    report = (await http.get("/admin/v1/autoscaler")).json()
    assert report["models"][MODEL]["mode"] == "dry_run"
    assert report["models"][MODEL]["decisions"][0]["reason"] == "slow"
    assert control.asked[-1].mode == registry_pb2.AUTOSCALER_MODE_UNSPECIFIED
    await act("autoscaler", model=MODEL, mode="on")
    assert control.asked[-1] == registry_pb2.AutoscalerRequest(model=MODEL, mode=registry_pb2.AUTOSCALER_MODE_ON)


WRONG: list[tuple[str, object, str | None]] = [
    ("scale", {"model": MODEL}, "prefill"),
    ("scale", {"model": MODEL, "decode": -1}, "decode"),
    ("scale", {"model": MODEL, "decode": "2"}, "decode"),
    ("scale", {"model": MODEL, "decode": 1, "wait": 3}, "wait"),
    ("scale", {"decode": 1}, "model"),
    ("drain", {}, "worker_id"),
    ("flip", {"worker_id": "w", "role": "both"}, "role"),
    ("roll", {"model": MODEL, "wait_s": 1e9}, "wait_s"),
    ("autoscaler", {"model": MODEL, "mode": "auto"}, "mode"),
    ("autoscaler", {"model": MODEL}, "mode"),
    ("drain", [], None),
]


async def test_what_is_wrong_with_an_action_is_named_and_nobody_hears_of_it(
    cluster: FakeCluster, http: httpx.AsyncClient
) -> None:
    for name, body, param in WRONG:
        reply = await http.post(f"/admin/v1/actions/{name}", json=body, headers=ACT)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), (name, body)
    assert not cluster.manager.control.asked


async def test_what_the_manager_refuses_is_said_as_it_said_it(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    cluster.manager.control.refuse = ModelNotFound("this cluster does not serve 'x'", param="model")
    reply = await http.post("/admin/v1/actions/roll", json={"model": "x"}, headers=ACT)
    error = reply.json()["error"]
    assert (reply.status_code, error["message"], error["param"]) == (404, "this cluster does not serve 'x'", "model")
    assert (await http.post("/admin/v1/actions/explode", json={}, headers=ACT)).status_code == 404


# -- the page's files --------------------------------------------------------------------------------------------------


async def test_files_are_served_as_what_they_are_and_not_twice(http: httpx.AsyncClient) -> None:
    page = await http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    assert "<script>" not in page.text
    assert "style=" not in page.text
    script = await http.get("/console/app.js")
    assert script.headers["content-type"].startswith("text/javascript")
    assert script.headers["x-content-type-options"] == "nosniff"
    assert script.headers["content-encoding"] == "gzip"
    plain = await http.get("/console/app.js", headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert plain.content == script.content
    again = await http.get("/console/app.js", headers={"If-None-Match": script.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert (await http.get("/console/../../http_app.py")).status_code == 404


async def test_it_can_be_switched_off(start_cluster: Any) -> None:
    async with start_cluster(console={"enabled": False}) as cluster, http_client(cluster) as http:
        for path in ("/", "/console/app.js", *READS):
            assert (await http.get(path)).status_code == 404, path
