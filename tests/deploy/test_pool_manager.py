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
from common.config import AutoscalingConfig, DecodeConfig, LoggingConfig, ModelConfig, PrefillConfig, TransferConfig
from common.errors import ClusterError, DeadlineExceeded, InvalidRequest, ModelLoadError, ModelNotFound, WorkerLost
from common.metrics import ManagerMetrics
from common.rpc import cancel_and_wait, connect, error_from_rpc
from common.types import Role
from common.wire import registry_pb2
from common.wire.registry_pb2 import (
    AutoscalerRequest,
    ClusterSnapshot,
    DemandRequest,
    DrainWorkerRequest,
    FlipRequest,
    RollRequest,
    ScaleRequest,
    ShutdownRequest,
    StatusRequest,
    WatchRequest,
)
from common.wire.registry_pb2_grpc import ControlStub, RegistryStub
from common.wire.types_pb2 import ROLE_DECODE, ROLE_PREFILL
from common.wire.worker_pb2 import WorkerPace
from deploy.autoscaler.loop import Autoscaler
from deploy.control import serve_manager
from deploy.manager_spec import HealthPolicy, ManagerSpec, ModelToServe
from deploy.pool_manager import PoolManager
from deploy.reconcile import RestartPolicy
from support.fake_workers import FakeHost

TOKEN = "token"
PREFILL, DECODE = "m/prefill/0", "m/decode/0"
WAIT_S = 120.0


IMPATIENT = HealthPolicy(interval_s=0.02, timeout_s=0.5, most_misses=2, busy_timeout_s=WAIT_S)
"""For workers that hang. Where none does, the test's own process being slow must not look like it."""


def spec_of(prefill: int = 1, decode: int = 1, autoscaling: AutoscalingConfig | None = None) -> ManagerSpec:
    model = ModelConfig(
        name="m",
        source="s",
        prefill=PrefillConfig(replicas=prefill),
        decode=DecodeConfig(replicas=decode),
        autoscaling=autoscaling or AutoscalingConfig(),
    )
    return ManagerSpec(
        cluster="c",
        models=(ModelToServe(model, "/models/m", 7, threads=1),),
        transfer=TransferConfig(),
        logging=LoggingConfig(),
        cluster_token=TOKEN,
        restarts=RestartPolicy(stable_s=60.0, first_wait_s=0.01, longest_wait_s=0.05, most_failed_starts=3),
        health=HealthPolicy(interval_s=0.02, timeout_s=WAIT_S, most_misses=2),
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
    autoscaler = Autoscaler(manager, {one.config.name: one.config.autoscaling for one in spec.models}, SystemClock())
    server = await serve_manager(manager, autoscaler, host="127.0.0.1", token=TOKEN)
    task = asyncio.create_task(manager.run())
    scaling = asyncio.create_task(autoscaler.run())
    channel = connect(server.address, TOKEN)
    try:
        yield Running(host, manager, RegistryStub(channel), ControlStub(channel), server.address)
        async with asyncio.timeout(WAIT_S):
            await manager.shut_down()
            await task
        assert not any(worker.alive for worker in host.workers)
    finally:
        await cancel_and_wait(scaling)
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


@pytest.mark.parametrize(("threads", "shared"), [(None, "/run/cores"), (3, "")])
async def test_workers_share_the_cores_unless_their_threads_are_configured(threads: int | None, shared: str) -> None:
    spec = replace(spec_of(), cores_file="/run/cores")
    (model,) = spec.models
    engine = model.config.engine.model_copy(update={"threads": threads})
    spec = replace(spec, models=(replace(model, config=model.config.model_copy(update={"engine": engine})),))
    async with running(spec) as cluster:
        await cluster.until_states(prefill_0="ready", decode_0="ready")
        assert {worker.spec.cores_file for worker in cluster.host.workers} == {shared}


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
    async with running(replace(spec_of(), health=IMPATIENT)) as cluster:
        await cluster.until_states(prefill_0="ready", decode_0="ready")
        cluster.host.latest(PREFILL).answers.clear()
        await cluster.until(lambda now: any(one.incarnation == 2 and one.state == "ready" for one in now.workers))
        of_prefill = [(what, incarnation) for what, name, incarnation in cluster.host.journal if name == PREFILL]
        assert of_prefill == [("launch", 1), ("gone", 1), ("launch", 2)]


async def test_a_worker_that_is_given_up_gets_nothing_more_while_it_is_being_buried() -> None:
    """Which takes seconds when its host is not heard any more."""
    async with running(replace(spec_of(), health=IMPATIENT)) as cluster:
        await cluster.until_states(prefill_0="ready", decode_0="ready")
        cluster.host.may_bury.clear()
        cluster.host.latest(DECODE).answers.clear()
        snapshot = await cluster.until_states(prefill_0="ready", decode_0="starting")
        assert [one.incarnation for one in snapshot.workers if one.worker_id == DECODE] == [1]
        cluster.host.may_bury.set()
        snapshot = await cluster.until_states(prefill_0="ready", decode_0="ready")
        assert [one.incarnation for one in snapshot.workers if one.worker_id == DECODE] == [2]


async def test_a_process_that_does_not_die_holds_up_its_successor_and_nobody_else() -> None:
    async with running(spec_of()) as cluster:
        await cluster.until_states(prefill_0="ready", decode_0="ready")
        cluster.host.undying = 3
        cluster.host.latest(DECODE).die("exit 9")
        await cluster.until_states(prefill_0="ready", decode_0="starting")
        await cluster.until_states(prefill_0="ready", decode_0="ready")
        assert cluster.host.undying == 0
        assert [worker.spec.incarnation for worker in cluster.host.workers if worker.spec.worker_id == DECODE] == [1, 2]


async def test_a_worker_for_which_there_is_no_room_can_be_taken_back() -> None:
    async with running(spec_of()) as cluster:
        await cluster.until_states(prefill_0="ready", decode_0="ready")
        cluster.host.may_launch.clear()
        await cluster.control.Scale(ScaleRequest(model="m", decode=2), timeout=WAIT_S)
        await cluster.until_states(prefill_0="ready", decode_0="ready", decode_1="starting")
        await cluster.control.Scale(ScaleRequest(model="m", decode=1, wait_s=WAIT_S), timeout=WAIT_S)
        await cluster.until_states(prefill_0="ready", decode_0="ready")
        assert len(cluster.host.workers) == 2


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


def kinds(snapshot: ClusterSnapshot, worker_id: str) -> list[str]:
    return [event.kind for event in snapshot.events if event.worker_id == worker_id]


async def test_a_drained_worker_serves_until_its_successor_does() -> None:
    host = FakeHost()
    async with running(spec_of(), host) as cluster:
        await cluster.until_states(prefill_0="ready", decode_0="ready")
        host.gates["m/decode/1"] = asyncio.Event()
        await cluster.control.Drain(DrainWorkerRequest(worker_id=DECODE), timeout=WAIT_S)
        await cluster.until_states(prefill_0="ready", decode_0="ready", decode_1="starting")
        assert host.latest(DECODE).drains == 0
        host.gates["m/decode/1"].set()
        await cluster.until_states(prefill_0="ready", decode_0="draining", decode_1="ready")
        host.latest(DECODE).may_drain.set()
        snapshot = await cluster.until_states(prefill_0="ready", decode_1="ready")
        assert snapshot.models[0].desired_decode == 1
        assert kinds(snapshot, DECODE) == ["started", "ready", "draining", "drained", "stopped"]
        (draining,) = [event for event in snapshot.events if event.kind == "draining"]
        assert (draining.worker_id, draining.model, draining.text) == (DECODE, "m", "to be replaced")
        assert [event.sequence for event in snapshot.events] == list(range(1, len(snapshot.events) + 1))


async def test_a_flipped_worker_keeps_its_process_under_another_name() -> None:
    host = FakeHost(drains_at_once=True)
    async with running(spec_of(prefill=2), host) as cluster:
        await cluster.until_states(prefill_0="ready", prefill_1="ready", decode_0="ready")
        process = host.latest("m/prefill/1")
        snapshot = await cluster.control.Flip(
            FlipRequest(worker_id="m/prefill/1", role=ROLE_DECODE, wait_s=WAIT_S), timeout=WAIT_S
        )
        assert states_of(snapshot) == {PREFILL: "ready", DECODE: "ready", "m/decode/1": "ready"}
        assert (snapshot.models[0].desired_prefill, snapshot.models[0].desired_decode) == (1, 2)
        assert host.latest("m/decode/1") is process
        assert len(host.workers) == 3
        assert kinds(snapshot, "m/decode/1") == ["flipped", "ready"]
        # The next one in its old place is another incarnation, in a process of its own.
        snapshot = await cluster.control.Scale(ScaleRequest(model="m", prefill=2, wait_s=WAIT_S), timeout=WAIT_S)
        back = next(worker for worker in snapshot.workers if worker.worker_id == "m/prefill/1")
        assert (back.incarnation, len(host.workers)) == (2, 4)
        # And what was flipped dies like any other.
        process.die("exit 9")
        snapshot = await cluster.until(lambda now: "restarted" in kinds(now, "m/decode/1"))
        await cluster.until_states(prefill_0="ready", prefill_1="ready", decode_0="ready", decode_1="ready")
        assert host.latest("m/decode/1") is not process


async def test_a_flip_that_fails_costs_the_process_and_ends_in_the_wanted_role() -> None:
    host = FakeHost(drains_at_once=True, flip_errors={"m/decode/1": WorkerLost("3 blocks may still be written to")})
    async with running(spec_of(prefill=2), host) as cluster:
        await cluster.until_states(prefill_0="ready", prefill_1="ready", decode_0="ready")
        process = host.latest("m/prefill/1")
        snapshot = await cluster.control.Flip(
            FlipRequest(worker_id="m/prefill/1", role=ROLE_DECODE, wait_s=WAIT_S), timeout=WAIT_S
        )
        assert states_of(snapshot) == {PREFILL: "ready", DECODE: "ready", "m/decode/1": "ready"}
        assert not process.alive
        assert host.latest("m/decode/1") is not process
        assert kinds(snapshot, "m/decode/1") == ["flipped", "lost", "restarted", "ready"]


async def test_the_last_decode_worker_is_not_flipped_and_wrong_names_are_refused() -> None:
    async with running(spec_of()) as cluster:
        await cluster.until_states(prefill_0="ready", decode_0="ready")
        for call, param in (
            (cluster.control.Flip(FlipRequest(worker_id=DECODE, role=ROLE_PREFILL), timeout=WAIT_S), "worker_id"),
            (cluster.control.Flip(FlipRequest(worker_id=DECODE, role=ROLE_DECODE), timeout=WAIT_S), "role"),
            (cluster.control.Flip(FlipRequest(worker_id=DECODE), timeout=WAIT_S), "role"),
            (cluster.control.Drain(DrainWorkerRequest(worker_id="m/decode/7"), timeout=WAIT_S), "worker_id"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            error = error_from_rpc(refused.value)
            assert isinstance(error, InvalidRequest)
            assert error.param == param
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await cluster.control.Roll(RollRequest(model="other"), timeout=WAIT_S)
        assert isinstance(error_from_rpc(unknown.value), ModelNotFound)
        await cluster.until_states(prefill_0="ready", decode_0="ready")


async def test_a_roll_replaces_every_worker_and_there_is_always_one_who_serves() -> None:
    host = FakeHost(drains_at_once=True)
    async with running(spec_of(prefill=1, decode=2), host) as cluster:
        await cluster.until_states(prefill_0="ready", decode_0="ready", decode_1="ready")
        before = {id(worker) for worker in host.workers}
        rolled = asyncio.ensure_future(cluster.control.Roll(RollRequest(model="m", wait_s=WAIT_S), timeout=WAIT_S))
        fewest: dict[int, int] = {}
        version = cluster.manager.snapshot.version
        while not rolled.done():
            snapshot = await cluster.manager.after(version)
            version = snapshot.version
            for role in (ROLE_PREFILL, ROLE_DECODE):
                ready = sum(worker.role == role and worker.state == "ready" for worker in snapshot.workers)
                fewest[role] = min(fewest.get(role, 99), ready)
            if "rolled" in [event.kind for event in snapshot.events] and not any(
                id(worker) in before and worker.alive for worker in host.workers
            ):
                break
        snapshot = await rolled
        assert not any(id(worker) in before for worker in host.workers if worker.alive)
        assert sum(worker.state == "ready" for worker in snapshot.workers) == len(snapshot.workers) == 3
        assert fewest == {ROLE_PREFILL: 1, ROLE_DECODE: 2}


ON = {"mode": "on", "upscale_delay_s": 0.0, "flip_delay_s": 0.0, "cooldown_s": 0.0, "interval_s": 0.05}


async def test_the_autoscaler_lends_an_idle_worker_and_says_why() -> None:
    pools = {"prefill": {"max_replicas": 3}, "decode": {"max_replicas": 3}}
    autoscaling = AutoscalingConfig.model_validate({**ON, **pools, "mode": "dry-run"})
    host = FakeHost(drains_at_once=True)
    async with running(spec_of(prefill=2, decode=1, autoscaling=autoscaling), host) as cluster:
        await cluster.until_states(prefill_0="ready", prefill_1="ready", decode_0="ready")
        host.latest(DECODE).pace = WorkerPace(queue_age_s=7.0)
        async with asyncio.timeout(WAIT_S):
            while True:
                report = await cluster.control.Autoscaler(AutoscalerRequest(model="m"))
                wanted = [one for one in report.models[0].decisions if one.action != "none"]  # it may have looked before us
                if wanted:
                    break
                await cluster.manager.after(cluster.manager.snapshot.version)
        first = wanted[0]
        assert (first.action, first.performed, first.prefill_after, first.decode_after) == ("flip", False, 1, 2)
        assert "waited 7.00 s" in first.reason
        assert report.models[0].decode.pressure == 2.0
        assert cluster.manager.snapshot.models[0].desired_decode == 1
        await cluster.control.Autoscaler(AutoscalerRequest(model="m", mode=registry_pb2.AUTOSCALER_MODE_ON))
        snapshot = await cluster.until(lambda now: states_of(now).get("m/decode/1") == "ready")
        assert (snapshot.models[0].desired_prefill, snapshot.models[0].desired_decode) == (1, 2)
        assert any(event.kind == "decision" and "becomes a decode worker" in event.text for event in snapshot.events)


async def test_an_unused_model_sleeps_and_wakes_when_it_is_asked_for() -> None:
    pools = {"prefill": {"min_replicas": 0}, "decode": {"min_replicas": 0}}
    autoscaling = AutoscalingConfig.model_validate({**ON, **pools, "idle_s": 0.2})
    host = FakeHost(drains_at_once=True)
    async with running(spec_of(autoscaling=autoscaling), host) as cluster:
        asleep = await cluster.until(lambda now: not now.workers and now.models[0].desired_decode == 0)
        assert asleep.models[0].wakes_on_demand
        assert asleep.models[0].context_tokens == 99
        for worker in host.workers:
            assert not worker.alive
        reply = await cluster.registry.Demand(DemandRequest(model="m"), timeout=WAIT_S)
        assert reply.waking
        awake = await cluster.until(lambda now: set(states_of(now).values()) == {"ready"} and len(now.workers) == 2)
        assert not awake.models[0].wakes_on_demand
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await cluster.registry.Demand(DemandRequest(model="other"), timeout=WAIT_S)
        assert isinstance(error_from_rpc(unknown.value), ModelNotFound)


async def test_a_model_that_may_not_sleep_is_not_woken() -> None:
    async with running(spec_of()) as cluster:
        await cluster.control.Scale(ScaleRequest(model="m", prefill=0, decode=0, wait_s=WAIT_S), timeout=WAIT_S)
        assert not (await cluster.registry.Demand(DemandRequest(model="m"), timeout=WAIT_S)).waking
        assert not cluster.manager.snapshot.models[0].wakes_on_demand
        assert not cluster.manager.snapshot.workers


async def test_ranks_are_announced_to_the_host_and_shown_before_a_worker_says_so() -> None:
    model = ModelConfig(name="m", source="s", prefill=PrefillConfig(tensor_parallel=2), decode=DecodeConfig(pipeline_parallel=3))
    spec = replace(spec_of(), models=(ModelToServe(model, "/models/m", 7, threads=1),))
    host = FakeHost(gates={DECODE: asyncio.Event()})
    async with running(spec, host) as cluster:
        snapshot = await cluster.until_states(prefill_0="ready", decode_0="starting")
        (decode,) = [worker for worker in snapshot.workers if worker.worker_id == DECODE]
        assert (decode.tensor_parallel, decode.pipeline_parallel) == (1, 3)
        host.gates[DECODE].set()
        await cluster.until_states(prefill_0="ready", decode_0="ready")
        assert host.expected[-1] == [2, 3]
        await cluster.manager.scale("m", {Role.PREFILL: 2}, WAIT_S)
        assert host.expected[-1] == [2, 2, 3]
