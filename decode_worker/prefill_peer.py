"""A prefill worker as the decode worker's hand-off sees it: four calls, each with a deadline, each ending in a typed error.

`GrpcPrefillPeer` is the one of production; a simulation brings its own. It knows the messages, not what they are about.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import grpc.aio

from common.errors import WorkerLost
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
Reply = TypeVar("Reply")


class GrpcPrefillPeer:
    """Connects when it is first needed, and again when the connection was lost."""

    def __init__(self, ref: WorkerRef, cluster_token: str) -> None:
        self._channel = connect(ref.address, cluster_token)
        self._stub = worker_pb2_grpc.PrefillStub(self._channel)

    async def handshake(self, message: worker_pb2.HandshakeRequest, timeout_s: float) -> worker_pb2.HandshakeReply:
        return await _answer(self._stub.Handshake(message, timeout=timeout_s))

    async def run(self, message: worker_pb2.PrefillRequest, timeout_s: float) -> worker_pb2.PrefillReply:
        return await _answer(self._stub.Run(message, timeout=timeout_s))

    async def release(self, message: worker_pb2.ReleaseRequest, timeout_s: float) -> worker_pb2.ReleaseReply:
        return await _answer(self._stub.Release(message, timeout=timeout_s))

    async def push_probe(self, message: worker_pb2.PushProbeRequest, timeout_s: float) -> worker_pb2.PushProbeReply:
        return await _answer(self._stub.PushProbe(message, timeout=timeout_s))

    async def close(self) -> None:
        await self._channel.close(None)


async def _answer(call: Awaitable[Reply]) -> Reply:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # Nobody cancelled this task: the channel was closed under the call, because a later incarnation took over.
        raise WorkerLost("the prefill worker was replaced") from None
