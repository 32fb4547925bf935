"""The pool manager: takes orders, holds the desired state, and has done what `deploy.reconcile` decides.

    news (ready, drained, lost, ordered, time) -> decide -> Start | Drain | Stop | Flip -> one task each (`deploy.worker_lives`)

Every change of the state leaves its events (`deploy.pool_board`). The manager knows neither Ray nor who asks (`deploy.control`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from common.clock import Clock
from common.errors import ClusterError, DeadlineExceeded, InvalidRequest, ModelNotFound
from common.metrics import PoolReadings
from common.types import Role
from common.wire.registry_pb2 import ClusterSnapshot, RouterInfo
from deploy.events import Happening
from deploy.manager_spec import ManagerSpec
from deploy.membership import Membership, ServedModel
from deploy.pool_board import PoolBoard
from deploy.reconcile import (
    Phase,
    Pool,
    PoolsState,
    Replica,
    close,
    decide,
    flip,
    replace_workers,
    set_desired,
    wake_at_s,
)
from deploy.worker_host import WorkerHost
from deploy.worker_lives import WorkerLives


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What the host is told of workers to come, and who is there: after a flip it may have to ask for something else."""

    ranks: tuple[int, ...] = ()
    ready: frozenset[str] = frozenset()

    @staticmethod
    def of(spec: ManagerSpec, state: PoolsState) -> _Wanted:
        ranks = tuple(spec.num_ranks(pool) for pool, count in state.desired.items() for _ in range(count))
        return _Wanted(ranks, frozenset(one.worker_id for pool in state.pools() for one in state.ready(pool)))


class PoolManager:
    """`run` works until `shut_down` has been called and every worker is gone."""

    def __init__(self, spec: ManagerSpec, host: WorkerHost, clock: Clock) -> None:
        self._spec = spec
        self._host = host
        self._clock = clock
        self._models = {model.config.name: model for model in spec.models}
        served = [
            ServedModel(
                model.config.name,
                model.path,
                model.created_s,
                model.degrees,
                hands_off=model.config.decode.hands_off,
            )
            for model in spec.models
        ]
        self._board = PoolBoard(PoolsState(desired=spec.desired), Membership(spec.cluster, served), clock)
        self._lives = WorkerLives(spec, host, self._board, clock)
        self._wanted = _Wanted()
        self._expecting = asyncio.Lock()
        self._closed = asyncio.Event()

    @property
    def snapshot(self) -> ClusterSnapshot:
        return self._board.snapshot

    def read_pools(self) -> list[PoolReadings]:
        """For metrics; from any thread: the state is replaced as a whole, never changed."""
        state = self._board.state
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
        self._board.membership.manager_metrics_address = address

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    self._board.news.clear()
                    state, actions = decide(self._board.state, self._clock.monotonic_s())
                    self._board.enter(state)
                    for action in actions:
                        tasks.create_task(self._lives.perform(action), name=f"{type(action).__name__} {action.worker_id}")
                    if (wanted := _Wanted.of(self._spec, state)) != self._wanted:
                        self._wanted = wanted
                        tasks.create_task(self._expect(), name="expect workers")
                    self.publish()
                    if self._board.state.closing and not self._board.state.replicas:
                        break
                    await self._wait_for_news()
        finally:
            self._closed.set()

    async def after(self, version: int) -> ClusterSnapshot:
        """The newest snapshot as soon as there is one newer than `version`."""
        return await self._board.membership.after(version)

    async def scale(self, model: str, desired: Mapping[Role, int], wait_s: float) -> ClusterSnapshot:
        """Changes how many workers there should be; with `wait_s`, returns when it is so. Raises ModelNotFound,
        DeadlineExceeded, or ClusterError when a worker was given up."""
        self._check_model(model)
        pools = {Pool(model, role): count for role, count in desired.items()}
        self._board.tell(lambda state: set_desired(state, pools))
        return await self._reach(list(pools), wait_s, f"{model} has not reached the wanted scale")

    async def drain(self, worker_id: str, wait_s: float) -> ClusterSnapshot:
        """Has one worker replaced. Raises as `scale`; InvalidRequest if it is not one that is ready."""
        replica = self._ready_replica(worker_id)
        self._board.tell(lambda state: replace_workers(state, [worker_id]))
        return await self._reach([replica.pool], wait_s, f"{worker_id} is not replaced")

    async def flip(self, worker_id: str, role: Role, wait_s: float) -> ClusterSnapshot:
        """Makes a ready worker one of the other role. Raises as `drain`; InvalidRequest also if nobody could serve after it."""
        replica = self._ready_replica(worker_id)
        source, target = replica.pool, Pool(replica.pool.model, role)
        if source == target:
            raise InvalidRequest(f"{worker_id} is a {role.value} worker", param="role")
        self._check_may_leave(source)
        self._board.tell(lambda state: flip(state, worker_id, target))
        return await self._reach([source, target], wait_s, f"{worker_id} is no {role.value} worker")

    async def roll(self, model: str, role: Role | None, wait_s: float) -> ClusterSnapshot:
        """Replaces all workers of a model, or of one role. Raises as `scale`."""
        self._check_model(model)
        pools = [Pool(model, one) for one in Role if role in (None, one)]
        worker_ids = [one.worker_id for pool in pools for one in self._board.state.ready(pool)]
        self._board.note(Happening("rolled", model, text=f"{len(worker_ids)} workers, one by one in each pool"))
        self._board.tell(lambda state: replace_workers(state, worker_ids))
        return await self._reach(pools, wait_s, f"{model} is not rolled")

    def tell_decision(self, model: str, text: str) -> None:
        """For the autoscaler: what it decided is an event like others."""
        self._board.note(Happening("decision", model, text=text))
        self.publish()

    @property
    def pools(self) -> PoolsState:
        return self._board.state

    def wakes(self, models: Iterable[str]) -> None:
        """These models get workers when somebody asks for them; part of the picture from now on."""
        self._board.membership.waking = frozenset(models)
        self.publish()

    def publish(self) -> None:
        self._board.publish()

    def _check_model(self, model: str) -> None:
        if model not in self._models:
            raise ModelNotFound(f"this cluster does not serve {model!r}", param="model")
        if self._board.state.closing:
            raise ClusterError("the cluster is shutting down")

    def _ready_replica(self, worker_id: str) -> Replica:
        if self._board.state.closing:
            raise ClusterError("the cluster is shutting down")
        replica = self._board.state.replicas.get(worker_id)
        if replica is None:
            raise InvalidRequest(f"there is no worker {worker_id!r}", param="worker_id")
        if replica.phase is not Phase.READY:
            raise InvalidRequest(f"{worker_id} is not ready but {replica.phase.value}", param="worker_id")
        return replica

    def _check_may_leave(self, pool: Pool) -> None:
        """Raises InvalidRequest if the model could not serve without one ready worker of this pool."""
        needed = pool.role is Role.DECODE or self._models[pool.model].config.decode.hands_off
        if needed and len(self._board.state.ready(pool)) < 2:
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
        await self._lives.ask_all()
        self.publish()
        return self.snapshot

    async def shut_down(self) -> None:
        """Stops every worker; returns when none is left. Idempotent."""
        self._board.tell(close)
        await self._closed.wait()

    def router_joined(self, router: RouterInfo) -> int:
        watch = self._board.membership.router_joined(router)
        self.publish()
        return watch

    def router_left(self, watch: int) -> None:
        self._board.membership.router_left(watch)
        self.publish()

    async def _wait_for_news(self) -> None:
        wake_s = wake_at_s(self._board.state)
        timeout_s = None if wake_s is None else max(0.0, wake_s - self._clock.monotonic_s())
        try:
            async with asyncio.timeout(timeout_s):
                await self._board.news.wait()
        except TimeoutError:
            return  # a back-off is over: that is news as well

    async def _until_settled(self, pools: Sequence[Pool]) -> None:
        version = -1
        while True:
            for pool in pools:
                for replica in self._board.state.of(pool):
                    if replica.phase is Phase.FAILED:
                        raise ClusterError(f"{replica.worker_id} was given up: {replica.failure}")
            if all(self._board.state.settled(pool) for pool in pools):
                return
            version = (await self._board.membership.after(version)).version

    async def _expect(self) -> None:
        async with self._expecting:  # the last word is the latest figure
            await self._host.expect(self._wanted.ranks)
