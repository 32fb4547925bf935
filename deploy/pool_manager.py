"""The pool manager: holds the desired state, performs what `deploy.reconcile` decides, and watches the workers.

    news (ready, drained, lost, scaled, time) -> decide -> Start | Drain | Stop | Flip -> one task each -> news

A worker is lost when its process ends, when it says that it failed, or when it misses several health checks in a row; it is
killed before its next incarnation starts, so that two never live. Draining and stopping go through the worker first and through
the process if it does not answer in time. A flip hands the process of one worker on to the next: the life of the first ends
without an end of its process. Every change of the state leaves its events. The manager knows neither Ray (`deploy.worker_host`)
nor who asks (`deploy.control`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import grpc.aio

from common.clock import Clock
from common.config import LoggingConfig, ModelConfig, TracingConfig, TransferConfig
from common.errors import (
    ClusterError,
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    ModelLoadError,
    ModelNotFound,
    PdserveError,
    WorkerLost,
)
from common.logs import get_logger
from common.metrics import PoolReadings
from common.rpc import cancel_and_wait, connect, error_from_rpc
from common.types import Role, WorkerRef
from common.wire.registry_pb2 import ClusterSnapshot, RouterInfo
from common.wire.worker_pb2 import DrainRequest, InfoReply, InfoRequest
from common.wire.worker_pb2_grpc import WorkerStub
from common.worker import WorkerSpec
from deploy.events import EventLog, Happening, changes
from deploy.membership import Membership, ServedModel
from deploy.reconcile import (
    Action,
    Drain,
    Flip,
    Loss,
    Phase,
    Pool,
    PoolsState,
    Replica,
    RestartPolicy,
    Start,
    Stop,
    became_drained,
    became_ready,
    close,
    decide,
    flip,
    lost,
    replace_workers,
    set_desired,
    wake_at_s,
)
from deploy.worker_host import WorkerHost, WorkerProcess

log = get_logger(__name__)

_STOP_MARGIN_S = 2.0  # beyond the grace, before a worker that was asked to stop is killed
_PERMANENT = (ConfigError, ModelLoadError)  # the same start would fail again


@dataclass(frozen=True, slots=True)
class HealthPolicy:
    interval_s: float = 0.5
    # Generous: on a machine with few cores a healthy worker's event loop can be kept waiting for seconds.
    timeout_s: float = 3.0
    most_misses: int = 3


@dataclass(frozen=True)
class ModelToServe:
    config: ModelConfig
    path: str
    created_s: int
    threads: int


@dataclass(frozen=True)
class ManagerSpec:
    """Everything the manager is told when it starts. Written by the launcher."""

    cluster: str
    models: tuple[ModelToServe, ...]
    transfer: TransferConfig
    logging: LoggingConfig
    cluster_token: str = field(repr=False)
    tracing: TracingConfig = field(default_factory=TracingConfig)
    host: str = "127.0.0.1"  # the manager's ports bind here, and the workers', unless the network is trusted
    port: int = 0  # of the manager's gRPC server
    trusted_network: bool = False  # workers bind to the address of their own node
    restarts: RestartPolicy = field(default_factory=RestartPolicy)
    health: HealthPolicy = field(default_factory=HealthPolicy)
    start_timeout_s: float = 900.0
    drain_timeout_s: float = 60.0
    stop_grace_s: float = 5.0


@dataclass(slots=True)
class _Worker:
    """One incarnation, from launch to end."""

    worker_id: str
    incarnation: int
    process: WorkerProcess
    ref: WorkerRef | None = None
    channel: grpc.aio.Channel | None = None
    handed_on: asyncio.Event = field(default_factory=asyncio.Event)  # its process belongs to another worker now


class PoolManager:
    """`run` works until `shut_down` has been called and every worker is gone."""

    def __init__(self, spec: ManagerSpec, host: WorkerHost, clock: Clock) -> None:
        self._spec = spec
        self._host = host
        self._clock = clock
        self._models = {model.config.name: model for model in spec.models}
        desired = {}
        for model in spec.models:
            desired[Pool(model.config.name, Role.PREFILL)] = model.config.prefill.replicas
            desired[Pool(model.config.name, Role.DECODE)] = model.config.decode.replicas
        self._state = PoolsState(desired=desired)
        self._membership = Membership(
            spec.cluster, [ServedModel(model.config.name, model.path, model.created_s) for model in spec.models]
        )
        self._events = EventLog(clock)
        self._workers: dict[str, _Worker] = {}
        self._launching: dict[str, asyncio.Future[WorkerProcess]] = {}
        self._num_expected = 0
        self._expecting = asyncio.Lock()
        self._news = asyncio.Event()
        self._closed = asyncio.Event()

    @property
    def snapshot(self) -> ClusterSnapshot:
        return self._membership.snapshot

    def read_pools(self) -> list[PoolReadings]:
        """For metrics; from any thread: the state is replaced as a whole, never changed."""
        state = self._state
        readings = []
        for pool in state.pools():
            phases = dict.fromkeys((phase.value for phase in Phase), 0)
            for replica in state.of(pool):
                phases[replica.phase.value] += 1
            starts = [count for worker_id, count in state.incarnations.items() if worker_id.startswith(pool.worker_prefix)]
            readings.append(
                PoolReadings(
                    model=pool.model,
                    role=pool.role.value,
                    desired=state.desired.get(pool, 0),
                    phases=phases,
                    restarts=sum(starts) - len(starts),
                )
            )
        return readings

    def metrics_served_at(self, address: str) -> None:
        """Where operators find this process's metrics; part of the picture from now on."""
        self._membership.manager_metrics_address = address

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    self._news.clear()
                    state, actions = decide(self._state, self._clock.monotonic_s())
                    self._enter(state)
                    for action in actions:
                        tasks.create_task(self._perform(action), name=f"{type(action).__name__} {action.worker_id}")
                    if sum(state.desired.values()) != self._num_expected:
                        self._num_expected = sum(state.desired.values())
                        tasks.create_task(self._expect(), name="expect workers")
                    self.publish()
                    if self._state.closing and not self._state.replicas:
                        break
                    await self._wait_for_news()
        finally:
            self._closed.set()

    async def after(self, version: int) -> ClusterSnapshot:
        """The newest snapshot as soon as there is one newer than `version`."""
        return await self._membership.after(version)

    async def scale(self, model: str, desired: Mapping[Role, int], wait_s: float) -> ClusterSnapshot:
        """Changes how many workers there should be; with `wait_s`, returns when it is so. Raises ModelNotFound,
        DeadlineExceeded, or ClusterError when a worker was given up."""
        self._check_model(model)
        pools = {Pool(model, role): count for role, count in desired.items()}
        self._tell(lambda state: set_desired(state, pools))
        return await self._reach(list(pools), wait_s, f"{model} has not reached the wanted scale")

    async def drain(self, worker_id: str, wait_s: float) -> ClusterSnapshot:
        """Has one worker replaced. Raises as `scale`; InvalidRequest if it is not one that is ready."""
        replica = self._ready_replica(worker_id)
        self._tell(lambda state: replace_workers(state, [worker_id]))
        return await self._reach([replica.pool], wait_s, f"{worker_id} is not replaced")

    async def flip(self, worker_id: str, role: Role, wait_s: float) -> ClusterSnapshot:
        """Makes a ready worker one of the other role. Raises as `drain`; InvalidRequest also if nobody could serve after it."""
        replica = self._ready_replica(worker_id)
        source, target = replica.pool, Pool(replica.pool.model, role)
        if source == target:
            raise InvalidRequest(f"{worker_id} is a {role.value} worker", param="role")
        self._check_may_leave(source)
        self._tell(lambda state: flip(state, worker_id, target))
        return await self._reach([source, target], wait_s, f"{worker_id} is no {role.value} worker")

    async def roll(self, model: str, role: Role | None, wait_s: float) -> ClusterSnapshot:
        """Replaces all workers of a model, or of one role. Raises as `scale`."""
        self._check_model(model)
        pools = [Pool(model, one) for one in Role if role in (None, one)]
        worker_ids = [one.worker_id for pool in pools for one in self._state.ready(pool)]
        self._events.add([Happening("rolled", model, text=f"{len(worker_ids)} workers, one by one in each pool")])
        self._tell(lambda state: replace_workers(state, worker_ids))
        return await self._reach(pools, wait_s, f"{model} is not rolled")

    def tell_decision(self, model: str, text: str) -> None:
        """For the autoscaler: what it decided is an event like others."""
        self._events.add([Happening("decision", model, text=text)])
        self.publish()

    @property
    def pools(self) -> PoolsState:
        return self._state

    def wakes(self, models: Iterable[str]) -> None:
        """These models get workers when somebody asks for them; part of the picture from now on."""
        self._membership.waking = frozenset(models)
        self.publish()

    def publish(self) -> None:
        self._membership.publish(self._state, self._events.latest())

    def _check_model(self, model: str) -> None:
        if model not in self._models:
            raise ModelNotFound(f"this cluster does not serve {model!r}", param="model")
        if self._state.closing:
            raise ClusterError("the cluster is shutting down")

    def _ready_replica(self, worker_id: str) -> Replica:
        if self._state.closing:
            raise ClusterError("the cluster is shutting down")
        replica = self._state.replicas.get(worker_id)
        if replica is None:
            raise InvalidRequest(f"there is no worker {worker_id!r}", param="worker_id")
        if replica.phase is not Phase.READY:
            raise InvalidRequest(f"{worker_id} is not ready but {replica.phase.value}", param="worker_id")
        return replica

    def _check_may_leave(self, pool: Pool) -> None:
        """Raises InvalidRequest if the model could not serve without one ready worker of this pool."""
        needed = pool.role is Role.DECODE or self._models[pool.model].config.decode.local_prefill == "never"
        if needed and len(self._state.ready(pool)) < 2:
            raise InvalidRequest(f"it is the last {pool.role.value} worker of {pool.model} that is ready", param="worker_id")

    async def _reach(self, pools: Sequence[Pool], wait_s: float, otherwise: str) -> ClusterSnapshot:
        """Waits until the pools are as desired, if that is wanted."""
        self.publish()
        if wait_s > 0:
            try:
                async with asyncio.timeout(wait_s):
                    await self._until_settled(pools)
            except TimeoutError as error:
                raise DeadlineExceeded(f"{otherwise} after {wait_s:g} s") from error
        return self.snapshot

    async def refresh(self) -> ClusterSnapshot:
        """Asks every worker now."""
        checks = [asyncio.create_task(self._answers(worker)) for worker in self._workers.values() if worker.ref is not None]
        if checks:
            await asyncio.wait(checks)  # not gather: a check whose worker is buried meanwhile ends cancelled
        self.publish()
        return self.snapshot

    async def shut_down(self) -> None:
        """Stops every worker; returns when none is left. Idempotent."""
        self._tell(close)
        await self._closed.wait()

    def router_joined(self, router: RouterInfo) -> int:
        watch = self._membership.router_joined(router)
        self.publish()
        return watch

    def router_left(self, watch: int) -> None:
        self._membership.router_left(watch)
        self.publish()

    def _tell(self, change: Callable[[PoolsState], PoolsState]) -> None:
        self._enter(change(self._state))
        self._news.set()

    def _enter(self, state: PoolsState) -> None:
        self._events.add(changes(self._state, state))
        self._state = state

    async def _wait_for_news(self) -> None:
        wake_s = wake_at_s(self._state)
        timeout_s = None if wake_s is None else max(0.0, wake_s - self._clock.monotonic_s())
        try:
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        except TimeoutError:
            return  # a back-off is over: that is news as well

    async def _until_settled(self, pools: Sequence[Pool]) -> None:
        version = -1
        while True:
            for pool in pools:
                for replica in self._state.of(pool):
                    if replica.phase is Phase.FAILED:
                        raise ClusterError(f"{replica.worker_id} was given up: {replica.failure}")
            if all(self._state.settled(pool) for pool in pools):
                return
            version = (await self._membership.after(version)).version

    async def _expect(self) -> None:
        async with self._expecting:  # the last word is the latest figure
            await self._host.expect(self._num_expected)

    async def _perform(self, action: Action) -> None:
        match action:
            case Start():
                await self._live(action, None)
            case Flip():
                await self._live(action.successor, action)
            case Drain():
                await self._drain(action)
            case Stop():
                await self._stop(action)

    async def _live(self, start: Start, inherited: Flip | None) -> None:
        """A worker's whole life, in a new process or in that of the worker it follows. Ends when its process is gone, and tells
        why, or belongs to another worker."""
        worker_id, incarnation = start.worker_id, start.incarnation
        log.info("worker starting", worker=worker_id, incarnation=incarnation)
        permanent = False
        worker: _Worker | None = None
        try:
            spec = self._worker_spec(start)
            process = await self._launch(spec) if inherited is None else self._take_over(inherited)
            worker = self._workers[worker_id] = _Worker(worker_id, incarnation, process)
            if self._state.replicas[worker_id].phase is not Phase.STARTING:
                raise WorkerLost("stopped before it started")  # `_stop` came too early to find a process
            async with asyncio.timeout(self._spec.start_timeout_s):
                worker.ref = await (process.start() if inherited is None else process.become(spec))
            worker.channel = connect(worker.ref.address, self._spec.cluster_token)
            await self._answers(worker)
            self._tell(lambda state: became_ready(state, worker_id, incarnation, self._clock.monotonic_s()))
            log.info("worker ready", worker=worker_id, incarnation=incarnation, address=worker.ref.address)
            reason = await self._watch(worker)
            if not worker.handed_on.is_set():
                self._give_up(start, reason)
        except TimeoutError:
            reason = f"did not start within {self._spec.start_timeout_s:g} s"
        except PdserveError as error:
            reason, permanent = f"{error.code}: {error.message}", isinstance(error, _PERMANENT)
        finally:
            if worker is not None:
                await self._bury(worker)
        if worker is not None and worker.handed_on.is_set():
            log.info("worker flipped", worker=worker_id, incarnation=incarnation)
            return
        log.info("worker gone", worker=worker_id, incarnation=incarnation, reason=reason)
        loss = Loss(worker_id, incarnation, reason, permanent)
        self._tell(lambda state: lost(state, loss, self._clock.monotonic_s(), self._spec.restarts))

    def _give_up(self, start: Start, reason: str) -> None:
        """Nobody is to be sent there while it is being buried, which takes time if its host is not heard any more."""
        if self._state.replicas[start.worker_id].phase is Phase.READY:  # nobody asked it to end
            log.warning("worker given up", worker=start.worker_id, incarnation=start.incarnation, reason=reason)
        self._membership.give_up(start.worker_id, start.incarnation)
        self.publish()

    async def _launch(self, spec: WorkerSpec) -> WorkerProcess:
        """May wait long for room; `_stop` ends the wait."""
        launching = self._launching[spec.worker_id] = asyncio.ensure_future(self._host.launch(spec))
        try:
            await asyncio.wait({launching})
            if launching.cancelled():
                raise WorkerLost("stopped before it started")
            return launching.result()
        finally:
            launching.cancel()
            del self._launching[spec.worker_id]

    def _take_over(self, flip: Flip) -> WorkerProcess:
        """The process of a worker, which has none from now on. Raises WorkerLost."""
        worker = self._current(flip)
        if worker is None:
            raise WorkerLost("the process ended before it was another worker's")
        worker.handed_on.set()
        del self._workers[worker.worker_id]
        return worker.process

    async def _bury(self, worker: _Worker) -> None:
        if not worker.handed_on.is_set():
            await self._kill(worker)
        if worker.channel is not None:
            await worker.channel.close(None)
        if self._workers.get(worker.worker_id) is worker:
            del self._workers[worker.worker_id]

    async def _kill(self, worker: _Worker) -> None:
        """Returns when it is dead, for two incarnations must never live. A process that the kernel does not let go of, as on a
        machine that swaps, is asked again and holds up nobody but its successor."""
        while True:
            try:
                return await worker.process.kill()
            except ClusterError as error:  # it has waited
                log.error("worker cannot be killed yet", worker=worker.worker_id, reason=error.message)

    async def _watch(self, worker: _Worker) -> str:
        """Returns why the worker must be given up."""
        policy = self._spec.health
        ended = asyncio.create_task(worker.process.ended())
        handed_on = asyncio.create_task(worker.handed_on.wait())
        try:
            misses = 0
            while misses < policy.most_misses:
                await asyncio.wait({ended, handed_on}, timeout=policy.interval_s, return_when=asyncio.FIRST_COMPLETED)
                if handed_on.done():
                    return "handed on"
                if ended.done():
                    return ended.result()
                misses = 0 if await self._answers(worker) else misses + 1
                self.publish()
            return f"hung: missed {misses} health checks of {policy.timeout_s:g} s"
        finally:
            await cancel_and_wait(handed_on)
            await cancel_and_wait(ended)

    async def _answers(self, worker: _Worker) -> bool:
        """One health check; its report goes into the picture."""
        if worker.channel is None or worker.ref is None:
            return False
        try:
            info: InfoReply = await WorkerStub(worker.channel).Info(InfoRequest(), timeout=self._spec.health.timeout_s)
        except grpc.aio.AioRpcError as error:
            log.debug("no answer", worker=worker.worker_id, error=error_from_rpc(error).code)
            return False
        if (info.worker_id, info.incarnation) != (worker.worker_id, worker.incarnation):
            return False  # somebody else took over the port of a process that is gone
        info.address = worker.ref.address
        self._membership.report(info)
        return True

    async def _drain(self, drain: Drain) -> None:
        worker = self._current(drain)
        if worker is not None and worker.channel is not None:
            timeout_s = self._spec.drain_timeout_s
            try:
                reply = await WorkerStub(worker.channel).Drain(
                    DrainRequest(timeout_s=timeout_s), timeout=timeout_s + _STOP_MARGIN_S
                )
                log.info("worker drained", worker=drain.worker_id, complete=reply.drained)
            except grpc.aio.AioRpcError as error:
                log.warning("worker did not drain", worker=drain.worker_id, error=error_from_rpc(error).code)
        self._tell(lambda state: became_drained(state, drain.worker_id, drain.incarnation))

    async def _stop(self, stop: Stop) -> None:
        """The end itself is seen, and told, by `_live`."""
        worker = self._current(stop)
        if worker is None:
            launching = self._launching.get(stop.worker_id)
            if launching is not None:
                launching.cancel()
            return
        if worker.ref is not None:
            try:
                async with asyncio.timeout(self._spec.stop_grace_s + _STOP_MARGIN_S):
                    await worker.process.stop(self._spec.stop_grace_s)
            except (TimeoutError, PdserveError) as error:
                log.warning("worker did not stop by itself", worker=stop.worker_id, error=type(error).__name__)
        await worker.process.kill()

    def _current(self, action: Drain | Stop | Flip) -> _Worker | None:
        worker = self._workers.get(action.worker_id)
        return worker if worker is not None and worker.incarnation == action.incarnation else None

    def _worker_spec(self, start: Start) -> WorkerSpec:
        model = self._models[start.pool.model]
        return WorkerSpec(
            worker_id=start.worker_id,
            incarnation=start.incarnation,
            role=start.pool.role,
            model=model.config,
            model_path=model.path,
            transfer=self._spec.transfer,
            cluster_token=self._spec.cluster_token,
            host=self._spec.host,
            trusted_network=self._spec.trusted_network,
            threads=model.threads,
            logging=self._spec.logging,
            tracing=self._spec.tracing,
        )
