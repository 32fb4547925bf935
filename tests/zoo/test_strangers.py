"""Who holds neither the cluster's secret nor a key: on the data ports, the calls between workers, and in front of the router."""

from __future__ import annotations

import asyncio
import pickle
import random
import re
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from prometheus_client import CollectorRegistry
from pydantic import ValidationError
from starlette.routing import Route

from common.config import RouterConfig
from common.errors import AuthenticationFailed, HandshakeRefused, StartupError
from common.rpc import connect
from common.tokenizer import Tokenizer
from common.types import Role
from common.wire import inference_pb2, worker_pb2
from decode_worker.server import DecodeWorker
from kvtransfer.frames import Frame, FrameKind
from kvtransfer.ticket import derive_secret
from kvtransfer.transports.authentication import LINK_VERSION, Hello, prefill_proof
from kvtransfer.transports.base import PeerName
from prefill_worker.server import PrefillWorker
from router.console.actions import Actions
from router.console.pages import Pages
from router.http_app import build_app
from router.http_edge import OPEN_PATHS
from support.fake_cluster import fake_cluster, make_tokenizer_folder
from support.hostile_peers import DECODE, PREFILL, layout_of, raw, untouched
from support.planted_links import Plants
from support.workers import TOKEN, request, running_workers
from support.zoo import UNCACHED, Oracle, another_decode, another_prefill, ending, prompt_of, within

# -- strangers on the data ports ---------------------------------------------------------------------------------------


@pytest.fixture
def bomb(tmp_path: Path) -> Bomb:
    return Bomb(tmp_path / "exploded")


class Bomb:
    """Bytes that make a file when they are unpickled."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace
        self.data = pickle.dumps(self)
        assert not self.exploded
        with pickle.loads(self.data):
            assert self.exploded, "it is a dud"
        trace.unlink()

    def __reduce__(self) -> Any:
        return open, (str(self._trace), "w")

    @property
    def exploded(self) -> bool:
        return self._trace.exists()


@pytest.mark.parametrize("kind", ["tcp", "shm"])
async def test_z33_z34_z38_strangers_learn_nothing_and_change_nothing(
    model_path: Path, oracle: Oracle, bomb: Bomb, kind: str
) -> None:
    """Z33, Z34 and Z38, CVE-2026-103764, -103765, CVE-2025-32444. There: an open socket took pickles and addresses from anybody.
    Ours: who does not prove to hold the cluster's secret, as the worker it claims to be, is hung up on; it is told nothing
    first, its bytes are compared and never interpreted, and others are served meanwhile."""
    async with untouched(model_path, oracle) as workers:
        layout = layout_of(workers)
        hello = Hello(LINK_VERSION, PREFILL, DECODE, layout.fingerprint, bytes(32)).encode()
        frame = Frame(FrameKind.OPEN, bytes(16)).encode()
        endless = struct.pack("<4sHHHQQ32s32s", b"PDLH", LINK_VERSION, 65_535, 65_535, 1, 1, bytes(32), bytes(32))
        for greeting in (
            b"\0" * 4096,
            frame * 40,
            bomb.data * 40,
            b"GET / HTTP/1.1\r\n\r\n" * 40,
            endless,
            random.Random(6).randbytes(4096),
        ):
            async with raw(workers, kind) as stranger:
                await stranger.send(greeting)
                assert await stranger.receive() == b""
        # One that knows names and layout, and not the secret; with a proof that it has seen elsewhere, or of its own making.
        for proof in (bytes(32), bomb.data[:32].ljust(32, b"\0"), prefill_proof(derive_secret("guess"), hello, bytes(32))):
            async with raw(workers, kind) as stranger:
                await stranger.send(hello)
                assert len(await stranger.receive()) == 32
                await stranger.send(proof)
                verdict = await stranger.receive()
                assert len(verdict) == 49
                assert verdict[1:17] == bytes(16), "it learned the shape of the pool"
                assert await stranger.receive() == b""
        async with raw(workers, kind) as stranger:
            with pytest.raises(HandshakeRefused, match="cluster token"):
                await stranger.authenticate("guess")
        # One that holds the secret, but is an earlier life of a worker that is here now.
        async with raw(workers, kind) as stranger:
            with pytest.raises(HandshakeRefused, match="later incarnation"):
                await stranger.authenticate(name=PeerName(PREFILL.worker_id, 0))
        # Silent ones, while an honest worker is served: after this block.
        silent = [raw(workers, kind) for _ in range(20)]
        for one in silent:
            await one.__aenter__()
        work = request(prompt_of(70, 131), max_tokens=4)
        async with another_prefill(workers, worker_id="tiny/prefill/1") as (_, ref):
            before = workers.decode._handoff._receiver.counters.links_refused.total()
            assert before >= 10
            honest = await within(workers.generate(replace(work, prompt_token_ids=tuple(prompt_of(70, 130))), prefill=[ref]))
            assert oracle.agrees(replace(work, prompt_token_ids=tuple(prompt_of(70, 130))), honest)
        for one in silent:
            await one.__aexit__(None, None, None)
        assert not bomb.exploded


# -- strangers on the calls --------------------------------------------------------------------------------------------


def methods_of(module: Any) -> list[tuple[str, bool]]:
    """Every method of every service of a proto file, and whether it streams."""
    return [
        (f"/{service.full_name}/{method.name}", method.server_streaming)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]


async def call_raw(channel: grpc.aio.Channel, path: str, streams: bool, body: bytes) -> grpc.StatusCode:
    """Any bytes to any method."""
    try:
        if streams:
            async for _ in channel.unary_stream(path)(body, timeout=60):
                continue
        else:
            await channel.unary_unary(path)(body, timeout=60)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_z34_every_call_between_workers_asks_for_the_token(model_path: Path, oracle: Oracle) -> None:
    """Z34, CVE-2026-103765. There: a metadata server let anybody register, and redirect KV to himself.
    Ours: whatever a worker serves, it serves to nobody without the cluster's token; this holds for methods yet to be written."""
    async with untouched(model_path, oracle) as workers:
        methods = methods_of(worker_pb2)
        assert len(methods) >= 8
        for ref in (workers.decode_ref, workers.prefill_refs[0]):
            for token in (None, "guess", TOKEN[:-1], ""):
                channel = connect(ref.address, token)
                for path, streams in methods:
                    assert await call_raw(channel, path, streams, b"") is grpc.StatusCode.UNAUTHENTICATED, (path, token)
                await channel.close(None)


async def test_z34_rogue_workers_are_not_let_in(model_path: Path, oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Z34, CVE-2026-103765. Ours: a decode worker without the cluster's token gets no KV from anybody, and a prefill worker
    without it gets no ticket; the honest ones go on."""
    async with untouched(model_path, oracle) as workers:
        async with another_prefill(workers, worker_id="tiny/prefill/1", cluster_token="rogue") as (rogue, ref):
            found = await ending(workers, request(prompt_of(70, 132)), [ref])
            assert isinstance(found, AuthenticationFailed)
            assert rogue._scheduler.totals.computed_tokens == 0
        computed = workers.prefill[0]._scheduler.totals.computed_tokens
        workers.decode._spec, honest = replace(workers.decode._spec, cluster_token="rogue"), workers.decode._spec
        monkeypatch.setattr("support.zoo.TOKEN", "rogue")
        async with another_decode(workers, "tiny/decode/9") as theirs:
            workers.decode._spec = honest
            assert isinstance(await ending(theirs, request(prompt_of(70, 133))), AuthenticationFailed)
        assert workers.prefill[0]._scheduler.totals.computed_tokens == computed
        assert set(workers.prefill[0]._handoff._sender._peers) == {"tiny/decode/0"}


async def test_z36_z38_pickles_are_bytes(model_path: Path, oracle: Oracle, plants: Plants, bomb: Bomb) -> None:
    """Z36 and Z38, CVE-2026-105192, CVE-2025-32444. There: what came over the wire was unpickled, and so was run.
    Ours: no port unpickles anything, from strangers or from those who hold the token: on the calls it is no message, or a field's
    value; on the data ports it is no frame, or the content of a block whose digest is wrong. (That no such code exists is
    the business of tests/test_unsafe_primitives.py.)"""
    async with untouched(model_path, oracle) as workers:
        for ref in (workers.decode_ref, workers.prefill_refs[0]):
            host, _, port = ref.address.rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(bomb.data * 50)
            writer.write_eof()
            await within(reader.read(-1))
            writer.close()
            await writer.wait_closed()
            channel = connect(ref.address, TOKEN)
            for path, streams in methods_of(worker_pb2):
                if "Drain" not in path:  # which takes any bytes for "now"
                    assert await call_raw(channel, path, streams, bomb.data) is not grpc.StatusCode.OK, path
            await channel.close(None)
        for kind in ("tcp", "shm"):
            async with raw(workers, kind) as peer:
                await peer.authenticate()
                await peer.send(bomb.data * 50)
                await within(peer.until_hung_up())
        text = bomb.data.decode("latin-1")
        work = replace(request(prompt_of(70, 130), max_tokens=4), request_id=text, cache_salt=text)
        assert oracle.agrees(work, await within(workers.generate(work)))
        assert plants.runs[-1].request.cache_salt == text
        assert not bomb.exploded


# -- doors to the outside ----------------------------------------------------------------------------------------------

ROUTES = {
    "/v1/chat/completions": {"POST"},
    "/v1/completions": {"POST"},
    "/v1/models": {"GET"},
    "/v1/models/{model_id:path}": {"GET"},
    "/v1/cache/feedback": {"POST"},
    "/v1/cache/invalidate": {"POST"},
    "/v1/route/explain": {"POST"},
    "/tokenize": {"POST"},
    "/detokenize": {"POST"},
    "/tokenizer_info": {"GET"},
    "/health": {"GET"},
    "/ready": {"GET"},
    "/version": {"GET"},
    "/metrics": {"GET"},
    "/metrics/targets": {"GET"},
    "/admin/v1/cluster": {"GET"},
    "/admin/v1/requests": {"GET"},
    "/admin/v1/requests/{request_id:path}": {"GET"},
    "/admin/v1/series": {"GET"},
    "/admin/v1/autoscaler": {"GET"},
    "/admin/v1/live": {"GET"},
    "/admin/v1/actions/scale": {"POST"},
    "/admin/v1/actions/drain": {"POST"},
    "/admin/v1/actions/flip": {"POST"},
    "/admin/v1/actions/roll": {"POST"},
    "/admin/v1/actions/autoscaler": {"POST"},
}


@pytest.fixture(scope="module")
def router_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer_folder(tmp_path_factory.mktemp("router") / "tiny")


async def test_z14_z37_every_route_is_known_and_asks_for_a_key(router_model: Path) -> None:
    """Z14 and Z37, vllm#58144, CVE-2026-107204. There: one route among many answered without a key; another one ran scripts.
    Ours: the routes are these, the console's files, and no others; each asks for a key unless it is one of four that say nothing
    of anybody, or one of those files; so does every method of the gRPC face."""
    pages, actions = Pages(), Actions(manager_address="", cluster_token="")
    console: Any = SimpleNamespace(pages=pages, actions=actions)
    edge: Any = build_app(None, CollectorRegistry(), console)  # type: ignore[arg-type]
    found = {route.path: route.methods for route in edge._app.routes if isinstance(route, Route)}
    assert len(found) == len(edge._app.routes)
    assert {path: methods - {"HEAD"} for path, methods in found.items()} == {
        **ROUTES,
        **{path: {"GET"} for path in pages.paths},
    }
    assert set(ROUTES) > OPEN_PATHS == {"/health", "/ready", "/version", "/metrics"}
    async with fake_cluster(Tokenizer.load(router_model), router_model, api_keys=("key",)) as cluster:
        async with httpx.AsyncClient(base_url=cluster.http_url, trust_env=False) as client:
            for path, methods in found.items():
                for method in (*methods, "HEAD", "OPTIONS", "PUT", "DELETE"):
                    reply = await client.request(method, re.sub(r"\{.*\}", "tiny", path), content=b"{}")
                    assert (reply.status_code == 401) is (path not in OPEN_PATHS | pages.paths), (method, path)
            for path in (
                "/invocations",
                "/run_script",
                "/v1/models/../metrics/x",
                "//v1/models",
                "/V1/MODELS",
                "/health/x",
                "/console/",
                "/admin/v1/x",
            ):
                assert (await client.post(path, content=b"{}")).status_code == 401, path
        channel = connect(cluster.grpc_address, None)
        for path, streams in methods_of(inference_pb2):
            assert await call_raw(channel, path, streams, b"") is grpc.StatusCode.UNAUTHENTICATED, path
        await channel.close(None)
        assert not cluster.worker.requests


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
async def test_z35_nothing_listens_to_everybody_by_accident(model_path: Path, host: str) -> None:
    """Z35, CVE-2026-106037. There: the store's REST port was open on 0.0.0.0, without authentication.
    Ours: off loopback the router does not start without keys, a worker does not start at all, and a pool is not offered unless
    somebody says that the network can be trusted."""
    for field in ("http_host", "grpc_host"):
        with pytest.raises(ValidationError, match="needs api_keys"):
            RouterConfig.model_validate({field: host})
    async with running_workers(model_path, engine=UNCACHED, num_prefill=0) as workers:
        with pytest.raises(StartupError) as refused:
            await workers.decode._handoff._receiver.start(["tcp"], host)
        assert refused.value.param == "host"
        for kind, role in ((DecodeWorker, Role.DECODE), (PrefillWorker, Role.PREFILL)):
            exposed = kind(replace(workers.decode._spec, worker_id=f"tiny/{role}/8", role=role, host=host))
            with pytest.raises(StartupError) as refused:
                await exposed.start()
            assert refused.value.param == "host"
