"""The manager's gRPC face: `Registry/Watch` for routers, `Control` for operators. Both are thin over `PoolManager`.

A router is in the picture for as long as its Watch stream is open.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from common.codec import role_from_wire
from common.errors import InvalidRequest
from common.rpc import RpcServer, start_server, typed_errors
from common.types import Role
from common.wire.registry_pb2 import (
    AUTOSCALER_MODE_UNSPECIFIED,
    AutoscalerReport,
    AutoscalerRequest,
    ClusterSnapshot,
    DemandReply,
    DemandRequest,
    DrainWorkerRequest,
    FlipRequest,
    RollRequest,
    RouterInfo,
    ScaleRequest,
    ShutdownReply,
    ShutdownRequest,
    StatusRequest,
    WatchRequest,
)
from common.wire.registry_pb2_grpc import (
    ControlServicer,
    RegistryServicer,
    add_ControlServicer_to_server,
    add_RegistryServicer_to_server,
)
from common.wire.types_pb2 import ROLE_UNSPECIFIED
from deploy.autoscaler.loop import MODE_FROM_WIRE, Autoscaler
from deploy.pool_manager import PoolManager

_MOST_REPLICAS = 1024
_Context = grpc.aio.ServicerContext[Any, Any]


async def serve_manager(manager: PoolManager, autoscaler: Autoscaler, *, host: str, token: str, port: int = 0) -> RpcServer:
    def register(server: grpc.aio.Server) -> None:
        add_RegistryServicer_to_server(_Registry(manager, autoscaler), server)
        add_ControlServicer_to_server(_Control(manager, autoscaler), server)

    services = ("pdserve.v1.Registry", "pdserve.v1.Control")
    return await start_server(register, host=host, port=port, token=token, services=services)


class _Registry(RegistryServicer):
    def __init__(self, manager: PoolManager, autoscaler: Autoscaler) -> None:
        self._manager = manager
        self._autoscaler = autoscaler

    async def Demand(self, request: DemandRequest, context: _Context) -> DemandReply:
        async with typed_errors(context):
            waking = self._autoscaler.demand(request.model)
        return DemandReply(waking=waking)

    async def Watch(self, request: WatchRequest, context: _Context) -> AsyncIterator[ClusterSnapshot]:
        router = RouterInfo(
            router_id=request.router_id,
            http_address=request.http_address,
            grpc_address=request.grpc_address,
            pid=request.pid,
        )
        watch = self._manager.router_joined(router)
        try:
            version = -1
            while True:
                snapshot = await self._manager.after(version)
                version = snapshot.version
                yield snapshot
        finally:
            self._manager.router_left(watch)


class _Control(ControlServicer):
    def __init__(self, manager: PoolManager, autoscaler: Autoscaler) -> None:
        self._manager = manager
        self._autoscaler = autoscaler

    async def Status(self, request: StatusRequest, context: _Context) -> ClusterSnapshot:
        return await self._manager.refresh() if request.refresh else self._manager.snapshot

    async def Scale(self, request: ScaleRequest, context: _Context) -> ClusterSnapshot:
        async with typed_errors(context):
            desired = {}
            if request.HasField("prefill"):
                desired[Role.PREFILL] = request.prefill
            if request.HasField("decode"):
                desired[Role.DECODE] = request.decode
            for role, count in desired.items():
                if count > _MOST_REPLICAS:
                    raise InvalidRequest(f"at most {_MOST_REPLICAS} {role} workers", param=role.value)
            snapshot = await self._manager.scale(request.model, desired, request.wait_s)
        return snapshot

    async def Drain(self, request: DrainWorkerRequest, context: _Context) -> ClusterSnapshot:
        async with typed_errors(context):
            snapshot = await self._manager.drain(request.worker_id, request.wait_s)
        return snapshot

    async def Flip(self, request: FlipRequest, context: _Context) -> ClusterSnapshot:
        async with typed_errors(context):
            snapshot = await self._manager.flip(request.worker_id, role_from_wire(request.role), request.wait_s)
        return snapshot

    async def Roll(self, request: RollRequest, context: _Context) -> ClusterSnapshot:
        async with typed_errors(context):
            role = role_from_wire(request.role) if request.role != ROLE_UNSPECIFIED else None
            snapshot = await self._manager.roll(request.model, role, request.wait_s)
        return snapshot

    async def Autoscaler(self, request: AutoscalerRequest, context: _Context) -> AutoscalerReport:
        async with typed_errors(context):
            if request.mode != AUTOSCALER_MODE_UNSPECIFIED:
                mode = MODE_FROM_WIRE.get(request.mode)
                if mode is None:
                    raise InvalidRequest(f"unknown mode {int(request.mode)}", param="mode")
                self._autoscaler.set_mode(request.model, mode)
            report = self._autoscaler.report(request.model)
        return report

    async def Shutdown(self, request: ShutdownRequest, context: _Context) -> ShutdownReply:
        """Answers when the last worker is gone."""
        await self._manager.shut_down()
        return ShutdownReply()
