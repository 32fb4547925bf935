"""Workers as detached Ray actors: one actor, one process, one incarnation.

Ray places and starts the process and tells when it is gone. It never restarts one (`max_restarts=0`): a new incarnation is the
pool manager's decision. On the manager's own node a process is also held by its pidfd, because Ray calls an actor dead as
soon as it decided to kill it, while a process that hangs may live on.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable
from typing import Any, TypeVar, cast

import ray
from ray.actor import ActorHandle
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayActorError, RayError, RayTaskError

from common.errors import ClusterError, EngineFailure, PdserveError, WorkerLost
from common.types import WorkerRef
from common.worker import WorkerSpec
from deploy.process_watch import ProcessWatch
from deploy.ray_environment import actor_environment, namespace_of
from deploy.worker_actor import WorkerActor
from deploy.worker_host import WorkerFactory, WorkerProcess

T = TypeVar("T")

_LAUNCH_TIMEOUT_S = 120.0  # placing an actor and starting an interpreter on a busy machine
_KILL_PATIENCE_S = 1.0
_KILL_TIMEOUT_S = 30.0
_MOST_REASON_CHARACTERS = 300


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
        _, _, cause_of_death = str(error).partition("The actor is dead because ")  # before it: ids of Ray's
        raise WorkerLost(_short(f"the process ended: {cause_of_death or error}")) from error


class RayHost:
    def __init__(self, cluster: str, cluster_id: str, num_cpus: float, factory: WorkerFactory) -> None:
        self._namespace = namespace_of(cluster)
        self._cluster_id = cluster_id
        self._num_cpus = num_cpus
        self._factory = factory
        self._node_id = ray.get_runtime_context().get_node_id()

    async def launch(self, spec: WorkerSpec) -> WorkerProcess:
        options = {
            "name": f"{spec.worker_id}#{spec.incarnation}",
            "namespace": self._namespace,
            "lifetime": "detached",
            "num_cpus": self._num_cpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "runtime_env": actor_environment(self._cluster_id, threads=spec.threads),
        }
        actor: ActorHandle | None = None
        try:
            actor = cast(ActorHandle, ray.remote(WorkerActor).options(**options).remote(spec, self._factory))
            async with asyncio.timeout(_LAUNCH_TIMEOUT_S):
                pid, node_id = await answer(cast(Awaitable[tuple[int, str]], actor.describe.remote()))
        except (RayError, ValueError) as error:
            raise ClusterError(_short(f"Ray did not start {spec.worker_id}: {error}")) from error
        except TimeoutError as error:
            ray.kill(actor)
            raise ClusterError(f"Ray found no room for {spec.worker_id} within {_LAUNCH_TIMEOUT_S:g} s") from error
        return _ActorProcess(actor, ProcessWatch.of(pid) if node_id == self._node_id else None)

    async def expect(self, num_workers: int) -> None:
        # Each request replaces the one before, of whoever made it: in a Ray cluster that others use too, it is for the
        # autoscaler of one pdserve cluster alone.
        if self._num_cpus > 0:
            await asyncio.to_thread(request_resources, bundles=[{"CPU": self._num_cpus}] * num_workers)


class _ActorProcess:
    def __init__(self, actor: ActorHandle, local: ProcessWatch | None) -> None:
        self._actor = actor
        self._local = local
        self._killed = False

    async def start(self) -> WorkerRef:
        return await answer(cast(Awaitable[WorkerRef], self._actor.start.remote()))

    async def ended(self) -> str:
        try:
            return await answer(cast(Awaitable[str], self._actor.wait_failed.remote()))
        except PdserveError as error:
            return error.message

    async def become(self, spec: WorkerSpec) -> WorkerRef:
        return await answer(cast(Awaitable[WorkerRef], self._actor.become.remote(spec)))

    async def stop(self, grace_s: float) -> None:
        await answer(cast(Awaitable[None], self._actor.stop.remote(grace_s)))

    async def kill(self) -> None:
        if not self._killed:
            self._killed = True
            ray.kill(self._actor)
            # NOTE: ray.kill asks the process itself; a stopped or hung one does not hear it. One that does is given the time to
            # end as Ray expects, or Ray would report a crash.
            if self._local is not None and not await self._local.wait(_KILL_PATIENCE_S):
                self._local.send(signal.SIGKILL)
        await self._gone()

    async def _gone(self) -> None:
        if self._local is None:
            await self.ended()  # of a process elsewhere we know what Ray knows
        elif await self._local.wait(_KILL_TIMEOUT_S):
            self._local.close()
        else:
            raise ClusterError(f"process {self._local.pid} does not die")


def _short(text: Any) -> str:
    """One line of bounded length: Ray's messages run over many."""
    line = " ".join(str(text).split())
    return line if len(line) <= _MOST_REASON_CHARACTERS else line[: _MOST_REASON_CHARACTERS - 3] + "..."
