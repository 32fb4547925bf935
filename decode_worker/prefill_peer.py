"""A prefill worker as the decode worker's hand-off sees it: four calls, each with a deadline, each ending in a typed error.

`GrpcPrefillPeer` is the one of production; a simulation brings its own. It knows the messages, not what they are about.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import grpc.aio

from common.rpc import connect, error_from_rpc
from common.types import WorkerRef
from common.wire import worker_pb2, worker_pb2_grpc


class PrefillPeer(Protocol):
    """Calls may be cancelled; the peer then stops what it does for them. All raise PdserveError."""

    async def handshake(self, message: worker_pb2.HandshakeRequest, timeout_s: float) -> worker_pb2.HandshakeReply: ...

    async def run(self, message: worker_pb2.PrefillRequest, timeout_s: float) -> worker_pb2.PrefillReply: ...

    async def release(self, message: worker_pb2.ReleaseRequest, timeout_s: float) -> worker_pb2.ReleaseReply: ...

    async def push_probe(self, message: worker_pb2.PushProbeRequest, timeout_s: float) -> worker_pb2.PushProbeReply: ...

    async def close(self) -> None: ...


ConnectPrefill = Callable[[WorkerRef], PrefillPeer]


class GrpcPrefillPeer:
    """Connects when it is first needed, and again when the connection was lost."""

    def __init__(self, ref: WorkerRef, cluster_token: str) -> None:
        self._channel = connect(ref.address, cluster_token)
        self._stub = worker_pb2_grpc.PrefillStub(self._channel)

    async def handshake(self, message: worker_pb2.HandshakeRequest, timeout_s: float) -> worker_pb2.HandshakeReply:
        try:
            reply: worker_pb2.HandshakeReply = await self._stub.Handshake(message, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        return reply

    async def run(self, message: worker_pb2.PrefillRequest, timeout_s: float) -> worker_pb2.PrefillReply:
        try:
            reply: worker_pb2.PrefillReply = await self._stub.Run(message, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        return reply

    async def release(self, message: worker_pb2.ReleaseRequest, timeout_s: float) -> worker_pb2.ReleaseReply:
        try:
            reply: worker_pb2.ReleaseReply = await self._stub.Release(message, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        return reply

    async def push_probe(self, message: worker_pb2.PushProbeRequest, timeout_s: float) -> worker_pb2.PushProbeReply:
        try:
            reply: worker_pb2.PushProbeReply = await self._stub.PushProbe(message, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        return reply

    async def close(self) -> None:
        await self._channel.close(None)
