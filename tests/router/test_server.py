"""The life of a router: ports, registry, drain, and the process around it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from openai import APIError

from common.errors import ClusterError
from common.rpc import connect
from router import http_server
from router.http_server import bound_socket
from router.server import run
from support.fake_cluster import MODEL, TOKEN, FakeCluster, FakeManager, router_config
from support.plain_http import NO_CERTIFICATES
from support.router_clients import http_client, openai_client

BODY: dict[str, Any] = {"model": MODEL, "prompt": "hi", "max_tokens": 50}
_ENCODED = json.dumps(BODY).encode()
ASKED = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
    len(_ENCODED),
    _ENCODED,
)


async def eventually(condition: Any) -> None:
    async with asyncio.timeout(120):
        while not await condition():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("which", ["http_port", "grpc_port"])
async def test_a_taken_port_is_said_clearly(which: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ClusterError, match=str(port)):
            await run(
                router_config(**{which: port}),
                manager_address="127.0.0.1:9",
                cluster_token=TOKEN,
                stop=asyncio.Event(),
                on_ready=lambda http, grpc: None,
            )


def test_small_writes_leave_at_once() -> None:
    with bound_socket(router_config().router) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_the_router_announces_where_it_listens(cluster: FakeCluster) -> None:
    (announcement,) = cluster.manager.announced
    assert f"http://{announcement.http_address}" == cluster.http_url
    assert announcement.grpc_address == cluster.grpc_address
    assert announcement.pid == os.getpid()
    assert announcement.router_id


async def test_serving_goes_on_while_the_manager_is_away(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    port = int(cluster.manager_address.rpartition(":")[2])
    await cluster.manager.stop()
    assert (await http.post("/v1/completions", json=BODY)).status_code == 200
    successor = FakeManager()
    await successor.start(port)
    cluster.manager = successor
    successor.snapshot.version = 100
    successor.publish(cluster.snapshot({cluster.worker.worker_id: "draining"}))

    async def seen() -> bool:
        return (await http.get("/ready")).status_code == 503

    await eventually(seen)
    assert successor.announced
    assert (await http.post("/v1/completions", json=BODY)).status_code == 503


async def test_the_shortest_worker_bounds_the_context(start_cluster: Any) -> None:
    async with start_cluster(num_workers=2) as cluster, http_client(cluster) as http:
        cluster.workers[1].max_model_tokens = 64
        cluster.publish()

        async def seen() -> bool:
            return (await http.get(f"/v1/models/{MODEL}")).json()["max_model_len"] == 64

        await eventually(seen)
        reply = await http.post("/v1/completions", json={"model": MODEL, "prompt": [5] * 64})
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert "64 tokens" in reply.json()["error"]["message"]


async def test_a_model_whose_tokenizer_cannot_be_loaded_is_503(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    snapshot = cluster.snapshot()
    snapshot.models.add(name="absent", path="/nonexistent", context_tokens=10)
    cluster.manager.publish(snapshot)

    async def seen() -> bool:
        return len((await http.get("/v1/models")).json()["data"]) == 3

    await eventually(seen)
    reply = await http.post("/v1/completions", json={"model": "absent", "prompt": "x"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "no_worker_available")
    assert "nonexistent" not in reply.text
    assert (await http.post("/v1/completions", json=BODY)).status_code == 200


async def test_a_drain_lets_streams_finish_and_refuses_new_work(start_cluster: Any) -> None:
    async with start_cluster() as cluster, http_client(cluster) as http, openai_client(cluster) as openai:
        cluster.worker.hold_after = 1
        channel = connect(cluster.grpc_address, None)
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="pdserve.v1.Inference"))
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
        stream = await openai.completions.create(**BODY, stream=True)
        await cluster.worker.holding.wait()
        cluster.stop.set()
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        refused = await http.post("/v1/completions", json=BODY)  # over a new connection
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_worker_available")
        assert refused.headers["retry-after"]
        assert (await http.get("/ready")).json()["status"] == "draining"
        assert (await http.get("/health")).status_code == 200
        assert cluster.task is not None
        assert not cluster.task.done()
        cluster.worker.released.set()
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "hello there"
        watching.cancel()
        await asyncio.wait({cluster.task}, timeout=60)
        assert cluster.task.done()
        await channel.close()


async def test_who_was_let_in_just_before_the_end_is_answered(start_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its request is on its way when the router stops listening: it is told to ask somebody else."""
    monkeypatch.setattr(http_server, "_HEARD_S", 4.0)
    async with start_cluster() as cluster, http_client(cluster) as http:
        host, port = cluster.http_url.removeprefix("http://").rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        assert (await http.get("/health")).status_code == 200  # over a later connection, so the first was let in, too
        cluster.stop.set()
        with suppress(ConnectionError):  # refused, or reset if it was still in the queue
            async with asyncio.timeout(120):
                while True:
                    _, let_in = await asyncio.open_connection(host, int(port))
                    let_in.close()
        writer.write(ASKED)
        async with asyncio.timeout(120):
            assert (await reader.readline()).startswith(b"HTTP/1.1 503 ")
        writer.close()


async def test_who_waits_to_be_let_in_at_the_end_is_answered(start_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have connected and asked, and nobody accepted them before the port closes: they are told to ask somebody else."""
    waiting: list[socket.socket] = []
    shut_down = http_server._Server.shutdown

    async def connect_and_shut_down(self: http_server._Server, sockets: list[socket.socket] | None = None) -> None:
        for _ in range(20):  # the loop does not turn in between
            waiting.append(socket.create_connection((host, int(port)), timeout=60))
            waiting[-1].sendall(ASKED)
        await shut_down(self, sockets)

    monkeypatch.setattr(http_server._Server, "shutdown", connect_and_shut_down)
    async with start_cluster() as cluster:
        host, port = cluster.http_url.removeprefix("http://").rsplit(":", 1)
        cluster.stop.set()
        await asyncio.wait({cluster.task}, timeout=120)
        assert len(waiting) == 20
        for connection in waiting:
            with connection:
                assert connection.recv(4096).startswith(b"HTTP/1.1 503 ")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, int(port)), timeout=60)


async def test_what_is_not_done_after_the_grace_ends_in_one_typed_error(start_cluster: Any) -> None:
    async with start_cluster(drain_grace_s=0.05) as cluster, openai_client(cluster) as openai, http_client(cluster) as http:
        cluster.worker.hold_after = 1
        stream = await openai.completions.create(**BODY, stream=True)
        whole = asyncio.create_task(http.post("/v1/completions", json=BODY))
        while len(cluster.worker.requests) < 2:
            await asyncio.sleep(0.005)
        cluster.stop.set()
        with pytest.raises(APIError, match="shutting down"):
            _ = [chunk async for chunk in stream]
        assert (await whole).status_code == 503
        assert cluster.task is not None
        await asyncio.wait({cluster.task}, timeout=60)
        assert cluster.task.done()
        await cluster.worker.cancelled.wait()


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    file = tmp_path / "cluster.yaml"
    file.write_text(json.dumps(router_config().model_dump(mode="json", exclude_defaults=True)))
    return file


async def start_process(config_file: Path, manager: str, *more: str, token: str = TOKEN) -> asyncio.subprocess.Process:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PDSERVE_")}
    if token:
        environment["PDSERVE_CLUSTER_TOKEN"] = token
    arguments = ["-m", "router", "--config", str(config_file), "--manager", manager, *more]
    return await asyncio.create_subprocess_exec(
        sys.executable, *arguments, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )


async def test_the_process_serves_and_ends_on_a_signal(cluster: FakeCluster, config_file: Path) -> None:
    process = await start_process(config_file, cluster.manager_address, "--set", "router.max_choices=2")
    try:
        async with asyncio.timeout(120):
            while len(cluster.manager.announced) < 2:
                await asyncio.sleep(0.01)
        announcement = cluster.manager.announced[1]
        assert announcement.pid == process.pid
        async with httpx.AsyncClient(
            base_url=f"http://{announcement.http_address}", trust_env=False, verify=NO_CERTIFICATES
        ) as client:

            async def served() -> bool:
                return (await client.post("/v1/completions", json=BODY)).status_code == 200

            await eventually(served)
            assert (await client.post("/v1/completions", json={**BODY, "n": 3})).status_code == 400
        process.send_signal(signal.SIGTERM)
        _, errors = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 0, errors.decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


@pytest.mark.parametrize(
    ("more", "token", "status", "told"),
    [
        (("--set", "router.nonsense=1"), TOKEN, 1, "nonsense"),
        ((), "", 2, "PDSERVE_CLUSTER_TOKEN"),
    ],
)
async def test_the_process_says_what_is_wrong(
    config_file: Path, more: tuple[str, ...], token: str, status: int, told: str
) -> None:
    process = await start_process(config_file, "127.0.0.1:9", *more, token=token)
    _, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == status
    assert told in errors.decode()
    assert "Traceback" not in errors.decode()
