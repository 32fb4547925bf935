"""The picture of the cluster that the manager shows: every worker's last report, the routers that watch, the models.

A worker's state is the manager's word (`deploy.reconcile`), its counts are its own. Each change makes a new `ClusterSnapshot`
with the next version; whoever waits in `after` wakes up. It decides nothing and talks to nobody.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from common.codec import role_to_wire
from common.types import Role, WorkerState
from common.wire.registry_pb2 import ClusterEvent, ClusterSnapshot, ModelInfo, RouterInfo
from common.wire.worker_pb2 import InfoReply
from deploy.reconcile import Phase, Pool, PoolsState, Replica

_STATE_OF_PHASE = {
    Phase.STARTING: WorkerState.STARTING,
    Phase.BACKOFF: WorkerState.STARTING,
    Phase.READY: WorkerState.READY,
    Phase.DRAINING: WorkerState.DRAINING,
    Phase.DRAINED: WorkerState.DRAINING,
    Phase.STOPPING: WorkerState.DRAINING,
    Phase.FAILED: WorkerState.FAILED,
}


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as the launcher resolved it."""

    name: str
    path: str
    created_s: int
    degrees: Mapping[Role, tuple[int, int]] = field(default_factory=dict)  # of a worker: tensor parallel, pipeline parallel
    hands_off: bool = False  # its decode workers compute no prompt


class Membership:
    def __init__(self, cluster: str, models: Sequence[ServedModel]) -> None:
        self.manager_metrics_address = ""  # shown from the next `publish` on
        self.waking = frozenset[str]()  # models that get workers when somebody asks for them; likewise
        self._cluster = cluster
        self._models = tuple(models)
        self._degrees = {Pool(model.name, role): degree for model in models for role, degree in model.degrees.items()}
        self._reports: dict[tuple[str, int], InfoReply] = {}  # by worker id and incarnation
        self._given_up: set[tuple[str, int]] = set()  # by worker id and incarnation: lost, and not gone yet
        self._known: dict[str, tuple[int, str]] = {}  # model -> (longest request, layout) as last reported
        self._served: set[Pool] = set()  # pools that had a ready worker since they were last wanted empty
        self._routers: dict[int, RouterInfo] = {}  # by watch
        self._watches = itertools.count()
        self._changed = asyncio.Event()
        self.snapshot = ClusterSnapshot(cluster=cluster)

    def report(self, info: InfoReply) -> None:
        """A worker answered. Takes effect at the next `publish`."""
        self._reports[info.worker_id, info.incarnation] = info

    def give_up(self, worker_id: str, incarnation: int) -> None:
        """This incarnation serves nobody any more, whatever its replica's phase is. Takes effect at the next `publish`."""
        self._given_up.add((worker_id, incarnation))

    def router_joined(self, router: RouterInfo) -> int:
        watch = next(self._watches)
        self._routers[watch] = router
        return watch

    def router_left(self, watch: int) -> None:
        self._routers.pop(watch, None)

    def publish(self, state: PoolsState, events: Sequence[ClusterEvent] = ()) -> None:
        """Draws the picture anew; wakes the waiting if it differs from the last."""
        current = {(one.worker_id, one.incarnation) for one in state.replicas.values()}
        self._reports = {key: info for key, info in self._reports.items() if key in current}
        self._given_up &= current
        workers = [self._worker(replica) for pool in state.pools() for replica in state.of(pool)]
        self._learn(workers)
        self._served = {
            pool for pool in state.pools() if state.desired.get(pool, 0) and (pool in self._served or state.ready(pool))
        }
        snapshot = ClusterSnapshot(
            version=self.snapshot.version,
            cluster=self._cluster,
            models=[self._model(model, state) for model in self._models],
            workers=workers,
            routers=self._routers.values(),
            manager_metrics_address=self.manager_metrics_address,
            events=events,
        )
        if snapshot != self.snapshot or snapshot.version == 0:
            snapshot.version += 1
            self.snapshot = snapshot
            self._changed.set()
            self._changed = asyncio.Event()

    async def after(self, version: int) -> ClusterSnapshot:
        """The newest snapshot as soon as there is one newer than `version`."""
        while self.snapshot.version <= version:
            await self._changed.wait()
        return self.snapshot

    def _worker(self, replica: Replica) -> InfoReply:
        info = InfoReply()
        reported = self._reports.get((replica.worker_id, replica.incarnation))
        if reported is not None:
            info.CopyFrom(reported)
        state = _STATE_OF_PHASE[replica.phase]
        if self._is_given_up(replica):
            state = WorkerState.STARTING  # the next incarnation, soon
        # A worker may know better that it takes no more requests, never that it does.
        if state is WorkerState.READY and reported is not None and reported.state == WorkerState.DRAINING:
            state = WorkerState.DRAINING
        info.worker_id, info.incarnation = replica.worker_id, replica.incarnation
        info.role, info.model = role_to_wire(replica.pool.role), replica.pool.model
        info.state, info.failure = state.value, replica.failure
        if not info.tensor_parallel:  # it has not reported yet
            info.tensor_parallel, info.pipeline_parallel = self._degrees.get(replica.pool, (1, 1))
        return info

    def _learn(self, workers: Sequence[InfoReply]) -> None:
        for model in self._models:
            ready = [one for one in workers if one.model == model.name and one.state == WorkerState.READY and one.pid]
            longest = min((one.max_model_tokens for one in ready if one.max_model_tokens), default=None)
            old_longest, old_layout = self._known.get(model.name, (0, ""))
            layouts = {one.role: one.layout_fingerprint for one in ready if one.layout_fingerprint}
            # Where the pools' layouts differ, answers are those of the decode workers.
            layout = layouts.get(role_to_wire(Role.DECODE)) or old_layout or next(iter(layouts.values()), "")
            self._known[model.name] = (longest or old_longest, layout)

    def _model(self, model: ServedModel, state: PoolsState) -> ModelInfo:
        desired, prefill, decode = state.desired, Pool(model.name, Role.PREFILL), Pool(model.name, Role.DECODE)
        needed = [pool for pool in (prefill, decode) if pool == decode or desired.get(pool, 0)]
        missing = [pool for pool in needed if not state.ready(pool)]
        gave_up = any(one.phase is Phase.FAILED for pool in missing for one in state.of(pool))
        taken = needed if model.hands_off else [decode]
        without = [pool for pool in taken if all(map(self._is_given_up, state.ready(pool)))]
        context_tokens, layout = self._known[model.name]
        return ModelInfo(
            name=model.name,
            path=model.path,
            context_tokens=context_tokens,
            created_s=model.created_s,
            desired_prefill=desired.get(prefill, 0),
            desired_decode=desired.get(decode, 0),
            layout_fingerprint=layout,
            wakes_on_demand=model.name in self.waking and bool(missing) and not gave_up,
            awaits_successor=bool(without) and not state.closing and all(self._is_succeeded(pool, state) for pool in without),
        )

    def _is_succeeded(self, pool: Pool, state: PoolsState) -> bool:
        """Of a pool that has nobody: whether somebody was there, and is followed by another."""
        coming = any(one.phase in (Phase.STARTING, Phase.BACKOFF) or self._is_given_up(one) for one in state.of(pool))
        return pool in self._served and coming

    def _is_given_up(self, replica: Replica) -> bool:
        return (replica.worker_id, replica.incarnation) in self._given_up and replica.phase is Phase.READY
