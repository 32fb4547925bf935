"""gRPC as pdserve uses it: one way to listen, one way to connect, one way for errors to cross.

A server is bound, authenticated, health-checked and reflected by `start_server`; a client channel from `connect` carries the
cluster token on every call. An error raised inside `typed_errors` leaves as a gRPC status plus an `ErrorDetail` trailer and is
rebuilt by `error_from_rpc` on the other side with its type. Nothing here knows what the services do.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from common.codec import error_from_wire, error_to_wire
from common.errors import (
    AuthenticationFailed,
    ClusterError,
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    Overloaded,
    PdserveError,
    RequestCancelled,
    WorkerLost,
)
from common.tracing.span import current_span
from common.wire import types_pb2

ERROR_TRAILER = "pdserve-error-bin"
_AUTHORIZATION = "authorization"
_MAX_MESSAGE_BYTES = 64 * 1024 * 1024  # prompts of a long context with logprobs; KV never rides here

_SERVER_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    # Long silent decodes must not be answered with GOAWAY too_many_pings.
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Two servers on one port would each get half of the connections, silently.
    ("grpc.so_reuseport", 0),
]
_CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    # A peer that stops without closing its socket is noticed within about two of these.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A restarted worker comes back at another address; do not sit out a long back-off on this one.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.use_local_subchannel_pool", 1),
    # Loopback and cluster addresses must never go through a proxy named in the environment.
    ("grpc.enable_http_proxy", 0),
]


class RpcServer:
    """A bound, running server. Lives from `start_server` until `stop`."""

    def __init__(self, server: grpc.aio.Server, health: HealthServicer, services: Sequence[str], address: str) -> None:
        self._server = server
        self._health = health
        self._services = ("", *services)
        self.address = address

    async def set_serving(self, serving: bool) -> None:
        """What the standard health service answers, for "" and for each service."""
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in self._services:
            await self._health.set(service, state)

    async def stop(self, grace_s: float) -> None:
        """Says NOT_SERVING, refuses new calls, lets running ones finish for `grace_s`, then cancels them."""
        await self.set_serving(False)
        await self._server.stop(grace_s)


async def start_server(
    register: Callable[[grpc.aio.Server], None],
    *,
    host: str,
    port: int = 0,
    token: str | None,
    services: Sequence[str],
) -> RpcServer:
    """Binds and starts. `token` None leaves the server open (the public face authenticates by API key instead).

    Raises ClusterError if the port is taken.
    """
    interceptors = [_RequireToken(token) if token is not None else _RefuseUnreadable()]
    server = grpc.aio.server(interceptors=interceptors, options=_SERVER_OPTIONS)
    register(server)
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection((*services, "grpc.health.v1.Health", reflection.SERVICE_NAME), server)
    try:
        bound_port = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise ClusterError(f"cannot listen on {host}:{port}: is it taken?", param="grpc_port") from error
    await server.start()
    running = RpcServer(server, health, services, f"{host}:{bound_port}")
    await running.set_serving(True)
    return running


def connect(address: str, token: str | None) -> grpc.aio.Channel:
    """A channel that connects lazily and adds the bearer token, and the trace that it is part of, to every call. Close it with
    `await channel.close()`."""
    interceptors: list[Any] = [_AddToken(token), _AddTokenToStream(token)] if token is not None else []
    return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS, interceptors=interceptors)


@asynccontextmanager
async def typed_errors(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """Around a handler's body: a PdserveError ends the call with its status and detail."""
    try:
        yield
    except PdserveError as error:
        await abort_with(context, error)


async def abort_with(context: grpc.aio.ServicerContext[Any, Any], error: PdserveError) -> None:
    """Ends the call with this error. Raises, as `context.abort` does."""
    detail = error_to_wire(error).SerializeToString()
    await context.abort(grpc.StatusCode[error.grpc_code], error.message, trailing_metadata=((ERROR_TRAILER, detail),))


def error_from_rpc(error: grpc.aio.AioRpcError) -> PdserveError:
    """The typed error behind a failed call. Without our trailer the status alone decides."""
    trailers: Iterable[tuple[str, str | bytes]] = error.trailing_metadata() or ()  # type: ignore[assignment]  # stub is wrong
    for key, value in trailers:
        if key == ERROR_TRAILER:
            try:
                return error_from_wire(types_pb2.ErrorDetail.FromString(_as_bytes(value)))
            except DecodeError:
                return EngineFailure("the peer sent an error that cannot be read")
    details = error.details() or ""
    match error.code():
        case grpc.StatusCode.UNAVAILABLE:
            return WorkerLost("the worker cannot be reached")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded("the deadline passed while waiting for a worker")
        case grpc.StatusCode.CANCELLED:
            return RequestCancelled("the call was cancelled")
        case grpc.StatusCode.UNAUTHENTICATED:
            return AuthenticationFailed("the peer refused the cluster token")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Overloaded(details or "the peer is overloaded", retry_after_s=1.0)
        case _:
            return EngineFailure(f"unexpected status {error.code().name}")


def _as_bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()


class _RequireToken(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Refuses calls without the cluster token; health checks stay open."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

        async def refuse(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            await abort_with(context, AuthenticationFailed("missing or wrong cluster token"))

        async def refuse_stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            await abort_with(context, AuthenticationFailed("missing or wrong cluster token"))

        self._refuse = grpc.unary_unary_rpc_method_handler(refuse)
        self._refuse_stream = grpc.unary_stream_rpc_method_handler(refuse_stream)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if method.startswith("/grpc.health."):
            return handler
        metadata = handler_call_details.invocation_metadata or ()
        given = b""
        for key, value in metadata:
            if key == _AUTHORIZATION:
                given = _as_bytes(value)
        if hmac.compare_digest(given, self._expected):
            return handler
        return self._refuse_stream if handler is not None and handler.response_streaming else self._refuse


class _RefuseUnreadable(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Bytes that are no message of the method's kind are the caller's mistake: INVALID_ARGUMENT, not a traceback in our log. Only
    for the public face, where strangers call, and whose methods are all coroutines."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or not str(handler_call_details.method).startswith("/pdserve."):
            return handler
        serve: Any = handler.unary_stream or handler.unary_unary  # its type is that of calls without asyncio
        parse: Any = handler.request_deserializer

        def read(data: bytes) -> Any:
            try:
                return parse(data)
            except DecodeError:
                return None

        async def serve_or_refuse(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            if request is None:
                await abort_with(
                    context, InvalidRequest("the bytes of the request are no such message, or its text is not UTF-8")
                )
            return await serve(request, context)

        wrap: Any = grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        wrapped: grpc.RpcMethodHandler[Any, Any] = wrap(
            serve_or_refuse, request_deserializer=read, response_serializer=handler.response_serializer
        )
        return wrapped


def _with_token(details: grpc.aio.ClientCallDetails, token: str) -> grpc.aio.ClientCallDetails:
    metadata = grpc.aio.Metadata(*(details.metadata or ()))
    metadata.add(_AUTHORIZATION, f"Bearer {token}")
    for key, value in current_span().headers:
        metadata.add(key, value)
    return grpc.aio.ClientCallDetails(details.method, details.timeout, metadata, details.credentials, details.wait_for_ready)


class _AddToken(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]
    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(_with_token(client_call_details, self._token), request)


class _AddTokenToStream(grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[type-arg]
    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(_with_token(client_call_details, self._token), request)


async def cancel_and_wait(task: asyncio.Task[Any]) -> None:
    """Cancels a task of ours and returns when it has ended; its own errors were reported where they arose."""
    task.cancel()
    await asyncio.wait([task])
