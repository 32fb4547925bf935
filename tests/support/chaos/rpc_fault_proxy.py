"""A gRPC server that passes every call on, byte for byte, to one target, and loses, doubles or delays those that a plan names.

    caller --- any unary-request method ---> proxy ---> target
           <-- responses, trailers, status --      <---

It knows no message: requests and responses are bytes; metadata, deadlines, trailers, statuses and cancellation are passed on.
Only `rewrite` may look inside, e.g. to put another proxy into the addresses that travel in a Handshake. What "lost" means to the
caller is one of two things, and both are tried: its connection breaks at once (UNAVAILABLE), or it never hears anything again.
"""

from __future__ import annotations

import asyncio
import enum
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
DELAY_S = 0.25  # ten times what a call of these tests takes, and more
LATE_S = 0.3  # after the caller has given up


class RpcFault(enum.Enum):
    REQUEST_LOST = "request lost"
    """It never arrives; the caller hears that the connection broke."""
    RESPONSE_LOST = "response lost"
    """It is executed; the caller hears that the connection broke."""
    REQUEST_VANISHES = "request vanishes"
    """It never arrives; the caller hears nothing."""
    RESPONSE_VANISHES = "response vanishes"
    """It is executed, and goes on when the caller gives up, of which it hears nothing either; the caller hears nothing."""
    DUPLICATED = "duplicated"
    """It arrives twice at the same time; the caller gets the answer to the first."""
    REPEATED = "repeated later"
    """It arrives again after it was answered."""
    DELAYED = "10x delayed"
    LATE = "late"
    """It arrives after the caller has given up."""


Plan = Callable[[str, bytes], RpcFault | None]
"""(method, request) -> what happens to this call. The method is the last part of its path."""
Rewrite = Callable[[str, bytes], bytes]


class RpcFaultProxy(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """Lives from `start` to `close`."""

    def __init__(self, target: str, *, rewrite: Rewrite | None = None) -> None:
        self.plan: Plan | None = None
        self.injected: Counter[tuple[str, RpcFault]] = Counter()
        self.address = ""
        self._rewrite = rewrite
        self._channel = grpc.aio.insecure_channel(
            target,
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.enable_http_proxy", 0),
                ("grpc.initial_reconnect_backoff_ms", 50),
                ("grpc.max_reconnect_backoff_ms", 200),
            ],
        )
        self._server = grpc.aio.server(options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.so_reuseport", 0)])
        self._extra: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        self._server.add_generic_rpc_handlers((self,))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        return self.address

    async def close(self) -> None:
        for task in tuple(self._extra):
            task.cancel()
        if self._extra:
            await asyncio.wait(self._extra)
        await self._server.stop(0)
        await self._channel.close(None)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        path = str(handler_call_details.method)

        async def handle(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> AsyncIterator[bytes]:
            async for response in self._pass(path, request, context):
                yield response

        # On the wire a call with one response is a stream of one.
        return grpc.unary_stream_rpc_method_handler(handle)

    async def _pass(self, path: str, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> AsyncIterator[bytes]:
        method = path.rpartition("/")[2]
        fault = None if self.plan is None else self.plan(method, request)
        if fault is not None:
            self.injected[method, fault] += 1
        if self._rewrite is not None:
            request = self._rewrite(method, request)
        metadata = _passed_on(context)
        match fault:
            case RpcFault.REQUEST_LOST:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset")
            case RpcFault.REQUEST_VANISHES:
                await asyncio.Event().wait()  # until the caller gives up
            case RpcFault.RESPONSE_VANISHES:
                self._spawn(self._deliver(path, request, metadata))
                await asyncio.Event().wait()
            case RpcFault.LATE:
                try:
                    await asyncio.Event().wait()
                finally:
                    self._spawn(self._deliver_later(path, request, metadata))
            case RpcFault.DELAYED:
                await asyncio.sleep(DELAY_S)
            case RpcFault.DUPLICATED:
                self._spawn(self._deliver(path, request, metadata))
            case _:
                pass
        call = self._channel.unary_stream(path)(request, metadata=metadata, timeout=context.time_remaining())
        try:
            async for response in call:
                if fault is RpcFault.RESPONSE_LOST:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset")
                yield response
            context.set_trailing_metadata(tuple(await call.trailing_metadata() or ()))  # type: ignore[arg-type]
        except grpc.aio.AioRpcError as error:
            if fault is RpcFault.RESPONSE_LOST:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset")
            await context.abort(error.code(), error.details() or "", tuple(error.trailing_metadata() or ()))
        finally:
            call.cancel()  # no effect on one that has ended
            if fault is RpcFault.REPEATED:
                self._spawn(self._deliver(path, request, metadata))

    async def _deliver_later(self, path: str, request: bytes, metadata: tuple[Any, ...]) -> None:
        await asyncio.sleep(LATE_S)
        await self._deliver(path, request, metadata)

    async def _deliver(self, path: str, request: bytes, metadata: tuple[Any, ...]) -> None:
        """A copy that nobody waits for."""
        call = self._channel.unary_stream(path)(request, metadata=metadata, timeout=10.0)
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError:
            return

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._extra.add(task)
        task.add_done_callback(self._extra.discard)


def _passed_on(context: grpc.aio.ServicerContext[bytes, bytes]) -> tuple[Any, ...]:
    given = context.invocation_metadata() or ()
    return tuple((key, value) for key, value in given if not key.startswith((":", "grpc-")) and key != "user-agent")
