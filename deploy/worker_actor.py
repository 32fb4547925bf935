"""The Ray actor around one worker: its process, and nothing of its work.

    describe -> start -> (serving; `wait_failed` is pending) -> stop -> killed by the manager
                             become (another worker, over the same engine) -> serving ...

What differs from node to node is found here: the address to listen on, and where the weights are, which are fetched if they
are not there. Ray runs every method of it on one event loop in this process; the worker's gRPC server and data endpoints live on
that loop. Ray calls carry control only; an actor that lost its engine is reported by `wait_failed` and then killed from outside.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace

import ray

from common.errors import EngineFailure
from common.logs import configure_logging
from common.model_store import pull
from common.types import WorkerRef
from common.worker import LoadedModel, WorkerServer, WorkerSpec
from deploy.cluster_state import started_at
from deploy.worker_host import WorkerFactory


class WorkerActor:
    def __init__(self, spec: WorkerSpec, factory: WorkerFactory) -> None:
        self._spec = spec
        self._factory = factory
        self._server: WorkerServer | None = None
        self._replaced = asyncio.Event()

    def __repr__(self) -> str:
        return self._spec.worker_id  # Ray puts it before each line that it forwards

    async def describe(self) -> tuple[int, int, str]:
        """Pid of this process, when it was started, and its Ray node."""
        pid = os.getpid()
        return pid, started_at(pid) or 0, ray.get_runtime_context().get_node_id()

    async def start(self) -> WorkerRef:
        return await self._serve(None)

    async def become(self, spec: WorkerSpec) -> WorkerRef:
        if self._server is None:
            raise EngineFailure("the worker was not started")
        kept = await self._server.retire()
        self._replaced.set()
        self._replaced = asyncio.Event()
        self._spec = spec
        return await self._serve(kept)

    async def wait_failed(self) -> str:
        if self._server is None:
            raise EngineFailure("the worker was not started")
        failed = asyncio.ensure_future(self._server.wait_failed())
        replaced = asyncio.ensure_future(self._replaced.wait())
        try:
            await asyncio.wait({failed, replaced}, return_when=asyncio.FIRST_COMPLETED)
            return f"the engine failed: {failed.result()}" if failed.done() else "another worker took its place"
        finally:
            failed.cancel()
            replaced.cancel()

    async def _serve(self, kept: LoadedModel | None) -> WorkerRef:
        """Raises a StartupError."""
        spec = self._spec
        configure_logging(spec.logging, process=f"{spec.worker_id}#{spec.incarnation}")
        files = await asyncio.to_thread(pull, spec.model.source)
        host = ray.util.get_node_ip_address() if spec.trusted_network else spec.host
        self._server = self._factory(replace(spec, model_path=str(files.path), host=host), kept)
        return await self._server.start()

    async def stop(self, grace_s: float) -> None:
        if self._server is not None:
            await self._server.stop(grace_s)
