"""The Ray actor around the pool manager: one per cluster, detached, named `manager`.

    start -> address;  serving;  `wait_ended` returns after a shutdown and raises if the manager broke

Operators and routers talk to it over gRPC (`deploy.control`); the launcher alone uses Ray calls, to start it and to notice its
end. A manager that dies is not restarted: the launcher ends the cluster, because nobody would watch over the workers any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from common.clock import SystemClock
from common.config import RayConfig
from common.errors import ClusterError
from common.logs import configure_logging
from common.metrics import ManagerMetrics, start_metrics_server
from common.rpc import RpcServer
from deploy.autoscaler.loop import Autoscaler
from deploy.control import serve_manager
from deploy.manager_spec import ManagerSpec
from deploy.pool_manager import PoolManager
from deploy.ray_host import RayHost
from deploy.worker_host import WorkerFactory

ACTOR_NAME = "manager"
_SERVER_GRACE_S = 1.0


class ManagerActor:
    def __init__(self, spec: ManagerSpec, cluster_id: str, rooms: RayConfig, factory: WorkerFactory) -> None:
        self._spec = spec
        self._cluster_id = cluster_id
        self._rooms = rooms
        self._factory = factory
        self._manager: PoolManager | None = None
        self._server: RpcServer | None = None
        self._running: asyncio.Task[None] | None = None
        self._stop_metrics: Callable[[], None] | None = None

    def __repr__(self) -> str:
        return ACTOR_NAME

    async def start(self) -> str:
        spec = self._spec
        configure_logging(spec.logging, process=ACTOR_NAME)
        workers = RayHost(spec.cluster, self._cluster_id, self._rooms, self._factory)
        clock = SystemClock()
        self._manager = manager = PoolManager(spec, workers, clock)
        autoscaler = Autoscaler(manager, {model.config.name: model.config.autoscaling for model in spec.models}, clock)
        registry = CollectorRegistry()
        ManagerMetrics(registry, read=manager.read_pools, routers=lambda: len(manager.snapshot.routers))
        metrics_address, self._stop_metrics = start_metrics_server(registry, spec.host, cluster_token=spec.cluster_token)
        manager.metrics_served_at(metrics_address)
        self._server = await serve_manager(manager, autoscaler, host=spec.host, port=spec.port, token=spec.cluster_token)
        self._running = asyncio.create_task(_run(manager, autoscaler), name="pool manager")
        return self._server.address

    async def snapshot_after(self, version: int) -> bytes:
        """The next ClusterSnapshot, serialised."""
        if self._manager is None:
            raise ClusterError("the manager was not started")
        return (await self._manager.after(version)).SerializeToString()

    async def shut_down(self) -> None:
        if self._manager is not None:
            await self._manager.shut_down()

    async def wait_ended(self) -> None:
        if self._running is None or self._server is None:
            raise ClusterError("the manager was not started")
        await asyncio.shield(self._running)
        if self._stop_metrics is not None:
            await asyncio.to_thread(self._stop_metrics)
        await self._server.stop(_SERVER_GRACE_S)


async def _run(manager: PoolManager, autoscaler: Autoscaler) -> None:
    """Until the manager is through; raises what either of them raises."""
    async with asyncio.TaskGroup() as tasks:
        scaling = tasks.create_task(autoscaler.run(), name="autoscaler")
        await manager.run()
        scaling.cancel()
