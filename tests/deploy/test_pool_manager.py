"""The pool manager over real gRPC, with workers that do as they are told and no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import grpc.aio
import pytest
from prometheus_client import CollectorRegistry

from common.clock import SystemClock
from common.config import DecodeConfig, LoggingConfig, ModelConfig, PrefillConfig, TransferConfig
from common.errors import ClusterError, DeadlineExceeded, ModelLoadError, ModelNotFound
from common.metrics import ManagerMetrics
from common.rpc import cancel_and_wait, connect, error_from_rpc
from common.types import Role
from common.wire.registry_pb2 import ClusterSnapshot, ScaleRequest, ShutdownRequest, StatusRequest, WatchRequest
from common.wire.registry_pb2_grpc import ControlStub, RegistryStub
from deploy.control import serve_manager
from deploy.pool_manager import HealthPolicy, ManagerSpec, ModelToServe, PoolManager
from deploy.reconcile import RestartPolicy
from support.fake_workers import FakeHost

TOKEN = "token"
PREFILL, DECODE = "m/prefill/0", "m/decode/0"
WAIT_S = 20.0


def spec_of(prefill: int = 1, decode: int = 1) -> ManagerSpec:
    model = ModelConfig(name="m", source="s", prefill=PrefillConfig(replicas=prefill), decode=DecodeConfig(replicas=decode))
    return ManagerSpec(
        cluster="c",
        models=(ModelToServe(model, "/models/m", 7, threads=1),),
        transfer=TransferConfig(),
        logging=LoggingConfig(),
        cluster_token=TOKEN,
        restarts=RestartPolicy(stable_s=60.0, first_wait_s=0.01, longest_wait_s=0.05, most_quick_failures=3),
        health=HealthPolicy(interval_s=0.02, timeout_s=0.3, most_misses=2),
    )


@dataclass
class Running:
    host: FakeHost
    manager: PoolManager
    registry: RegistryStub
    control: ControlStub
    address: str

    async def until(self, condition: Callable[[ClusterSnapshot], bool]) -> ClusterSnapshot:
        version = -1
        async with asyncio.timeout(WAIT_S):
            while True:
                snapshot = await self.manager.after(version)
                if condition(snapshot):
                    return snapshot
                version = snapshot.version

    async def until_states(self, **states: str) -> ClusterSnapshot:
        """`prefill_0="ready"` means: m/prefill/0 is ready. Nobody else may be there."""
        wanted = {f"m/{name.replace('_', '/')}": state for name, state in states.items()}
        return await self.until(lambda snapshot: states_of(snapshot) == wanted)


def states_of(snapshot: ClusterSnapshot) -> dict[str, str]:
    return {worker.worker_id: worker.state for worker in snapshot.workers}


@asynccontextmanager
async def running(spec: ManagerSpec, host: FakeHost | None = None) -> AsyncIterator[Running]:
    host = host or FakeHost()
    manager = PoolManager(spec, host, SystemClock())
    server = await serve_manager(manager, host="127.0.0.1", token=TOKEN)
    task = asyncio.create_task(manager.run())
    channel = connect(server.address, TOKEN)
    try:
        yield Running(host, manager, RegistryStub(channel), ControlStub(channel), server.address)
        async with asyncio.timeout(WAIT_S):
            await manager.shut_down()
            await task
        assert not any(worker.alive for worker in host.workers)
    finally:
        await cancel_and_wait(task)
        await channel.close(None)
        await server.stop(0)


async def test_it_starts_what_is_desired_and_announces_only_what_is_ready() -> None:
    host = FakeHost(gates={DECODE: asyncio.Event()})
    async with running(spec_of(prefill=2), host) as cluster:
        await cluster.until_states(prefill_0="ready", prefill_1="ready", decode_0="starting")
        host.gates[DECODE].set()
        snapshot = await cluster.until_states(prefill_0="ready", prefill_1="ready", decode_0="ready")
        decode = next(worker for worker in snapshot.workers if worker.worker_id == DECODE)
        assert (decode.incarnation, decode.pid, decode.blocks_total) == (1, 4711, 8)
        assert decode.address.startswith("127.0.0.1:")
        (model,) = snapshot.models
        assert (model.name, model.path, model.created_s, model.context_tokens) == ("m", "/models/m", 7, 99)
        assert (model.desired_prefill, model.desired_decode) == (2, 1)


async def test_a_dead_worker_is_restarted_with_the_same_id_and_a_new_incarnation() -> None:
    async with running(spec_of()) as cluster:
        await cluster.until_states(prefill_0="ready", decode_0="ready")
        cluster.host.latest(DECODE).die("exit 9")
        snapshot = await cluster.until(
            lambda now: any(worker.incarnation == 2 and worker.state == "ready" for worker in now.workers)
        )
        decode = next(worker for worker in snapshot.workers if worker.worker_id == DECODE)
        assert decode.failure == "exit 9"
        assert next(worker for worker in snapshot.workers if worker.worker_id == PREFILL).incarnation == 1


async def test_its_metrics_tell_desired_from_actual_workers_and_count_restarts() -> None:
    async with running(spec_of(prefill=2)) as cluster:
        registry = CollectorRegistry()
        ManagerMetrics(registry, read=cluster.manager.read_pools, routers=lambda: 3)

        def value(name: str, role: str, **labels: str) -> float | None:
            return registry.get_sample_value(name, {"model_name": "m", "role": role, **labels})

        await cluster.until_states(prefill_0="ready", prefill_1="ready", decode_0="ready")
        cluster.host.latest(DECODE).die("exit 9")
        await cluster.until(lambda now: any(worker.incarnation == 2 and worker.state == "ready" for worker in now.workers))
        assert value("pdserve_pool_desired_workers", "prefill") == 2
        assert value("pdserve_pool_workers", "prefill", phase="ready") == 2
        assert value("pdserve_pool_workers", "prefill", phase="failed") == 0
        assert value("pdserve_pool_worker_restarts_total", "prefill") == 0
        assert value("pdserve_pool_worker_restarts_total", "decode") == 1
        assert registry.get_sample_value("pdserve_routers") == 3


async def test_a_hung_worker_is_killed_before_its_successor_starts() -> None:
    async with running(spec_of()) as cluster:
        await cluster.until_states(prefill_0="ready", decode_0="ready")
        cluster.host.latest(PREFILL).answers.clear()
        await cluster.until(lambda now: any(one.incarnation == 2 and one.state == "ready" for one in now.workers))
        of_prefill = [(what, incarnation) for what, name, incarnation in cluster.host.journal if name == PREFILL]
        assert of_prefill == [("launch", 1), ("gone", 1), ("launch", 2)]


async def test_a_crash_loop_ends_in_failed_with_its_reason_until_it_is_scaled() -> None:
    host = FakeHost(start_errors={DECODE: ClusterError("no luck")})
    async with running(spec_of(), host) as cluster:
        snapshot = await cluster.until_states(prefill_0="ready", decode_0="failed")
        decode = next(worker for worker in snapshot.workers if worker.worker_id == DECODE)
        assert (decode.incarnation, decode.failure) == (3, "ClusterError: no luck")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await cluster.control.Scale(ScaleRequest(model="m", decode=1, wait_s=WAIT_S), timeout=WAIT_S)
        assert "no luck" in error_from_rpc(refused.value).message
        host.start_errors.clear()
        await cluster.control.Scale(ScaleRequest(model="m", decode=1, wait_s=WAIT_S), timeout=WAIT_S)
        await cluster.until_states(prefill_0="ready", decode_0="ready")


async def test_an_error_that_a_restart_cannot_mend_is_not_tried_again() -> None:
    host = FakeHost(start_errors={DECODE: ModelLoadError("no such file")})
    async with running(spec_of(), host) as cluster:
        snapshot = await cluster.until_states(prefill_0="ready", decode_0="failed")
        assert next(worker for worker in snapshot.workers if worker.worker_id == DECODE).incarnation == 1


async def test_scaling_down_drains_the_newest_shows_it_and_stops_it_afterwards() -> None:
    async with running(spec_of(decode=2)) as cluster:
        await cluster.until_states(prefill_0="ready", decode_0="ready", decode_1="ready")
        await cluster.control.Scale(ScaleRequest(model="m", decode=1), timeout=WAIT_S)
        await cluster.until_states(prefill_0="ready", decode_0="ready", decode_1="draining")
        leaving = cluster.host.latest("m/decode/1")
        assert leaving.alive
        with pytest.raises(grpc.aio.AioRpcError) as waited:
            await cluster.control.Scale(ScaleRequest(model="m", decode=1, wait_s=0.05), timeout=WAIT_S)
        assert isinstance(error_from_rpc(waited.value), DeadlineExceeded)
        leaving.may_drain.set()
        await cluster.until_states(prefill_0="ready", decode_0="ready")
        of_leaving = [what for what, name, _ in cluster.host.journal if name == "m/decode/1"]
        assert of_leaving == ["launch", "drain", "stop", "gone"]
        assert cluster.host.latest(DECODE).drains == 0


async def test_a_worker_that_is_no_longer_wanted_while_it_starts_is_gone() -> None:
    host = FakeHost(gates={"m/decode/1": asyncio.Event()})
    async with running(spec_of(decode=2), host) as cluster:
        await cluster.until_states(prefill_0="ready", decode_0="ready", decode_1="starting")
        await cluster.control.Scale(ScaleRequest(model="m", decode=1, wait_s=WAIT_S), timeout=WAIT_S)
        assert not host.latest("m/decode/1").alive
        assert ("drain", "m/decode/1", 1) not in host.journal


async def test_a_router_is_listed_while_it_watches_and_sees_every_change() -> None:
    async with running(spec_of()) as cluster:
        await cluster.until_states(prefill_0="ready", decode_0="ready")
        watch = cluster.registry.Watch(WatchRequest(router_id="r", http_address="h:1", grpc_address="g:1", pid=12))
        stream = aiter(watch)
        async with asyncio.timeout(WAIT_S):
            first = await anext(stream)
            assert states_of(first) == {PREFILL: "ready", DECODE: "ready"}
            assert [(router.router_id, router.pid) for router in first.routers] == [("r", 12)]
            await cluster.control.Scale(ScaleRequest(model="m", prefill=2), timeout=WAIT_S)
            versions = [first.version]
            while states_of(snapshot := await anext(stream)).get("m/prefill/1") != "ready":
                versions.append(snapshot.version)
            assert versions == sorted(set(versions))
        watch.cancel()
        await cluster.until(lambda now: not now.routers)


async def test_who_has_no_token_learns_nothing_and_changes_nothing() -> None:
    async with running(spec_of()) as cluster:
        stranger = connect(cluster.address, "guess")
        try:
            control = ControlStub(stranger)
            for call in (
                control.Status(StatusRequest(refresh=True), timeout=WAIT_S),
                control.Scale(ScaleRequest(model="m", decode=0), timeout=WAIT_S),
                control.Shutdown(ShutdownRequest(), timeout=WAIT_S),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await call
                assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
            with pytest.raises(grpc.aio.AioRpcError):
                await anext(aiter(RegistryStub(stranger).Watch(WatchRequest(router_id="spy"))))
        finally:
            await stranger.close(None)
        snapshot = await cluster.until_states(prefill_0="ready", decode_0="ready")
        assert (snapshot.models[0].desired_decode, list(snapshot.routers)) == (1, [])


async def test_shutdown_answers_when_everybody_is_gone_and_takes_no_more_orders() -> None:
    async with running(replace(spec_of(prefill=2, decode=2), stop_grace_s=1.0)) as cluster:
        await cluster.until_states(prefill_0="ready", prefill_1="ready", decode_0="ready", decode_1="ready")
        await cluster.control.Shutdown(ShutdownRequest(), timeout=WAIT_S)
        assert not any(worker.alive for worker in cluster.host.workers)
        assert sum(what == "stop" for what, _, _ in cluster.host.journal) == 4
        with pytest.raises(ClusterError):
            await cluster.manager.scale("m", {Role.DECODE: 1}, 0.0)


async def test_only_models_that_are_served_can_be_scaled() -> None:
    async with running(spec_of()) as cluster:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await cluster.control.Scale(ScaleRequest(model="other", decode=1), timeout=WAIT_S)
        assert isinstance(error_from_rpc(refused.value), ModelNotFound)
