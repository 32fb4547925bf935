"""Where workers run, as the pool manager sees it: something that launches a `WorkerSpec` and hands back a process.

    launch(spec) -> WorkerProcess: start() -> WorkerRef ... ended() ... stop(grace_s) | kill()
                                               become(spec) -> WorkerRef ... ended() ...

`deploy.ray_host` is the one in production (an actor per worker); tests bring their own. The manager calls everything here from
one event loop. What kind of worker a role means is looked up in `build_worker`, inside the worker's own process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from common.types import Role, WorkerRef
from common.worker import LoadedModel, WorkerServer, WorkerSpec
from deploy.activity import Activity

WorkerFactory = Callable[[WorkerSpec, LoadedModel | None], WorkerServer]


class WorkerProcess(Protocol):
    async def start(self) -> WorkerRef:
        """Once. Returns when the worker can serve; raises its StartupError, or WorkerLost if the process ended."""
        ...

    async def ended(self) -> str:
        """Waits until the worker can serve no more or its process is gone; says why. May be called more than once."""
        ...

    async def activity(self, span_s: float) -> Activity:
        """What its process does, watched for so long. Waits longer for a host that is not heard; the caller bounds it."""
        ...

    async def become(self, spec: WorkerSpec) -> WorkerRef:
        """Ends the worker and starts another one in the same process, over what is loaded there. What still runs is cancelled.
        If it raises (WorkerLost, StartupError), nobody serves in the process any more."""
        ...

    async def stop(self, grace_s: float) -> None:
        """Asks the worker to end its requests within `grace_s`; raises WorkerLost if the process ended before it answered."""
        ...

    async def kill(self) -> None:
        """Returns when the process is gone for good. Idempotent."""
        ...


class WorkerHost(Protocol):
    async def launch(self, spec: WorkerSpec) -> WorkerProcess:
        """Makes the process; the worker in it has not started yet. Raises ClusterError."""
        ...

    async def expect(self, ranks: Sequence[int]) -> None:
        """These workers there will be in all, each of so many processes: the host may fetch machines for them ahead of the
        launches, or let some go."""
        ...


def build_worker(spec: WorkerSpec, kept: LoadedModel | None = None) -> WorkerServer:
    """The engines are imported here, in the worker's process, and nowhere else in `deploy`."""
    match spec.role:
        case Role.PREFILL:
            from prefill_worker.server import PrefillWorker

            return PrefillWorker(spec, kept)
        case Role.DECODE:
            from decode_worker.server import DecodeWorker

            return DecodeWorker(spec, kept)
