"""Workers as Ray actors of the manager's: one actor, one process, one incarnation.

Ray places and starts the process and tells when it is gone. It never restarts one (`max_restarts=0`): a new incarnation is the
pool manager's decision. However the manager ends, Ray ends its actors, wherever they run. Ray calls an actor dead as soon as it
decided to kill it, while a process that hangs may live on: on the manager's own node a process is also held by its pidfd, on
others by a keeper (`deploy.node_keeper`).

A host that is not heard any more can neither be asked nor killed. Its workers are then taken for gone after a moment: what bears
their incarnation is refused everywhere, and the order to end them stays with Ray, which delivers it when the host is heard again.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import ray
from ray.actor import ActorHandle
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from common.config import RayConfig
from common.errors import ClusterError, EngineFailure, PdserveError, WorkerLost
from common.logs import get_logger
from common.rpc import cancel_and_wait
from common.types import WorkerRef
from common.worker import WorkerSpec
from deploy.activity import Activity, observe
from deploy.node_keeper import NodeKeeper
from deploy.nodes import gpus_of, nodes_of, resources_of, slots_of, threads_of_slot
from deploy.process_watch import ProcessWatch
from deploy.ray_environment import actor_environment, namespace_of
from deploy.slots import Place, SlotBook
from deploy.worker_actor import WorkerActor
from deploy.worker_host import WorkerFactory, WorkerProcess

T = TypeVar("T")
log = get_logger(__name__)

_KILL_PATIENCE_S = 1.0
_KILL_TIMEOUT_S = 30.0
_UNHEARD_S = 3.0  # longest wait for a keeper's word, beyond the patience
_MOST_REASON_CHARACTERS = 300
_ENDED = "the process ended: it was killed, perhaps for want of memory, or crashed"
# What whole paragraphs of Ray's come to.
_SIGNS = {
    "its node has died": "Ray on its host is gone",
    "connection error code 2": "it was killed, perhaps for want of memory, or crashed",
}


async def answer(reference: Awaitable[T]) -> T:
    """The result of a Ray call, with our errors: the remote's own typed error, WorkerLost, or EngineFailure."""
    try:
        return await reference
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, PdserveError):
            raise cause from None
        raise EngineFailure(_short(f"{type(cause).__name__}: {cause}")) from error
    except RayActorError as error:
        raise WorkerLost(_short(f"the process ended: {_cause_of_death(str(error))}")) from error


class RayHost:
    def __init__(self, cluster: str, cluster_id: str, rooms: RayConfig, factory: WorkerFactory) -> None:
        self._namespace = namespace_of(cluster)
        self._cluster_id = cluster_id
        self._rooms = rooms
        self._factory = factory
        self._node_id = ray.get_runtime_context().get_node_id()
        self._keepers: dict[str, ActorHandle] = {}  # by node
        self._book = SlotBook()

    async def launch(self, spec: WorkerSpec) -> WorkerProcess:
        nodes = nodes_of(await asyncio.to_thread(ray.nodes)) if self._rooms.slots else []
        place = self._book.take(spec.role, spec.parallel.num_ranks, slots_of(nodes))
        if self._rooms.slots and spec.model.engine.threads is None:
            spec = replace(spec, threads=threads_of_slot(nodes, place.slot))
        process: WorkerProcess | None = None
        try:
            process = await self._launch(spec, place)
        finally:
            if process is None:
                place.leave()
        return process

    async def _launch(self, spec: WorkerSpec, place: Place) -> WorkerProcess:
        options = {
            "name": f"{spec.worker_id}#{spec.incarnation}",
            "namespace": self._namespace,
            # The other ranks are children of this process, on its node.
            "num_cpus": self._rooms.num_cpus_per_worker * spec.parallel.num_ranks,
            "num_gpus": gpus_of(spec.model.engine.device, spec.parallel.num_ranks),
            "resources": resources_of(place.slot, slots=self._rooms.slots),
            "max_restarts": 0,
            "max_task_retries": 0,
            "runtime_env": actor_environment(self._cluster_id, threads=spec.threads),
        }
        actor: ActorHandle | None = None
        placed = False
        try:
            actor = cast(ActorHandle, ray.remote(WorkerActor).options(**options).remote(spec, self._factory))
            async with asyncio.timeout(self._rooms.room_timeout_s):
                pid, started, node_id = await answer(cast(Awaitable[tuple[int, int, str]], actor.describe.remote()))
            placed = True
        except (RayError, ValueError) as error:
            raise ClusterError(_short(f"Ray did not start {spec.worker_id}: {error}")) from error
        except TimeoutError as error:
            what = f"free {place.slot} slot" if self._rooms.slots else "room"
            if spec.parallel.num_ranks > 1:
                what += f" on one host for all {spec.parallel.num_ranks} ranks"  # they inherit their sockets
                what += " and a GPU for each" if options["num_gpus"] else ""
            raise ClusterError(f"Ray found no {what} for {spec.worker_id} within {self._rooms.room_timeout_s:g} s") from error
        finally:
            if actor is not None and not placed:
                ray.kill(actor)
        if node_id == self._node_id:
            return _LocalProcess(actor, place, ProcessWatch.of(pid))
        return _RemoteProcess(actor, place, pid, started, self._keeper(node_id))

    def _keeper(self, node_id: str) -> ActorHandle:
        keeper = self._keepers.get(node_id)
        if keeper is None:
            keeper = self._keepers[node_id] = cast(
                ActorHandle,
                ray.remote(NodeKeeper)
                .options(
                    num_cpus=0,
                    max_restarts=-1,
                    max_task_retries=-1,  # an order that cannot be delivered stays until the host is heard again, or is dead
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
                    runtime_env=actor_environment(self._cluster_id, threads=1),
                )
                .remote(node_id),
            )
        return keeper

    async def expect(self, ranks: Sequence[int]) -> None:
        # Each request replaces the one before, of whoever made it: in a Ray cluster that others use too, it is for the
        # autoscaler of one pdserve cluster alone. A worker that waits for a slot is a request of its own.
        cpus = self._rooms.num_cpus_per_worker
        if cpus > 0 and not self._rooms.slots:
            bundles = [{"CPU": cpus * num_ranks} for num_ranks in self._book.asked_ranks(ranks)]
            await asyncio.to_thread(request_resources, bundles=bundles)


class _ActorProcess:
    def __init__(self, actor: ActorHandle, place: Place) -> None:
        self._actor = actor
        self._place = place
        self._killed = False

    async def start(self) -> WorkerRef:
        return await answer(cast(Awaitable[WorkerRef], self._actor.start.remote()))

    async def ended(self) -> str:
        try:
            return await answer(cast(Awaitable[str], self._actor.wait_failed.remote()))
        except PdserveError as error:
            return error.message

    async def become(self, spec: WorkerSpec) -> WorkerRef:
        self._place.becomes(spec.role, spec.parallel.num_ranks)
        return await answer(cast(Awaitable[WorkerRef], self._actor.become.remote(spec)))

    async def stop(self, grace_s: float) -> None:
        await answer(cast(Awaitable[None], self._actor.stop.remote(grace_s)))

    def _kill_actor(self) -> bool:
        """Whether it was the first time. NOTE: ray.kill asks the process itself; a stopped or hung one does not hear it."""
        first, self._killed = not self._killed, True
        if first:
            ray.kill(self._actor)
        return first


class _LocalProcess(_ActorProcess):
    """On the manager's own node."""

    def __init__(self, actor: ActorHandle, place: Place, watch: ProcessWatch | None) -> None:
        super().__init__(actor, place)
        self._watch = watch  # None: it was gone before we looked

    async def ended(self) -> str:
        """By Ray, who also knows of an engine that failed, or by the kernel, who says the end of a process at once."""
        if self._watch is None:
            return await super().ended()
        return await _first(super().ended(), self._watch.wait(None))

    async def activity(self, span_s: float) -> Activity:
        return Activity.GONE if self._watch is None else await observe(self._watch.pid, span_s)

    async def kill(self) -> None:
        if self._watch is None:
            self._kill_actor()
            self._place.leave()
            return
        # One that hears Ray is given the time to end as Ray expects, or Ray would report a crash.
        if self._kill_actor() and not await self._watch.wait(_KILL_PATIENCE_S):
            self._watch.send(signal.SIGKILL)
        if not await self._watch.wait(_KILL_TIMEOUT_S):
            raise ClusterError(f"process {self._watch.pid} does not die")
        self._watch.close()
        self._place.leave()


class _RemoteProcess(_ActorProcess):
    """On another node."""

    def __init__(self, actor: ActorHandle, place: Place, pid: int, started: int, keeper: ActorHandle) -> None:
        super().__init__(actor, place)
        self._pid, self._started = pid, started
        self._keeper = keeper
        self._ending: asyncio.Task[bool] | None = None
        self._outliving: asyncio.Task[bool] | None = None  # one for all workers that the process is, one after the other

    async def ended(self) -> str:
        if self._outliving is None:
            self._outliving = asyncio.create_task(self._outlive(), name=f"outlive {self._pid}")
        return await _first(super().ended(), asyncio.shield(self._outliving))

    async def _outlive(self) -> bool:
        """Whether the process is known to be gone: not if its keeper is gone, too."""
        try:
            await answer(cast(Awaitable[None], self._keeper.outlive.remote(self._pid, self._started)))
        except (PdserveError, RayError):
            return False
        return True

    async def activity(self, span_s: float) -> Activity:
        try:
            return await answer(cast(Awaitable[Activity], self._keeper.observe.remote(self._pid, span_s)))
        except (PdserveError, RayError):
            return Activity.UNHEARD

    async def kill(self) -> None:
        """Also returns when its host has not been heard for a moment; the order stays."""
        self._kill_actor()
        if self._ending is None:
            self._ending = asyncio.create_task(self._end(), name=f"end {self._pid}")
        done, _ = await asyncio.wait({self._ending}, timeout=_KILL_PATIENCE_S + _UNHEARD_S)
        if not done:
            log.warning("a host is not heard: its worker is taken for gone", pid=self._pid)
        elif not self._ending.result():
            raise ClusterError(f"process {self._pid} does not die")
        self._place.leave()

    async def _end(self) -> bool:
        try:
            return await answer(cast(Awaitable[bool], self._keeper.end.remote(self._pid, self._started, _KILL_PATIENCE_S)))
        except (PdserveError, RayError):
            return True  # the keeper is dead for good: so is its node


async def _first(told: Coroutine[Any, Any, str], gone: Awaitable[bool]) -> str:
    """Why a worker ended, from whoever knows first."""
    telling, going = asyncio.ensure_future(told), asyncio.ensure_future(gone)
    try:
        await asyncio.wait({telling, going}, return_when=asyncio.FIRST_COMPLETED)
        if not telling.done() and going.result():
            return _ENDED
        return await telling
    finally:
        await cancel_and_wait(telling)
        await cancel_and_wait(going)


def _cause_of_death(told: str) -> str:
    for sign, meaning in _SIGNS.items():
        if sign in told:
            return meaning
    _, _, cause = told.partition("The actor is dead because ")  # before it: ids of Ray's
    return cause or told


def _short(text: Any) -> str:
    """One line of bounded length: Ray's messages run over many."""
    line = " ".join(str(text).split())
    return line if len(line) <= _MOST_REASON_CHARACTERS else line[: _MOST_REASON_CHARACTERS - 3] + "..."
