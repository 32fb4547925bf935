"""gRPC without sockets: channels for the real stubs and the real dispatcher, servers for the real handlers, real messages.

    stub call -> request (lost? twice? late?) -> handler's task -> messages, status -> the caller, in the order of the call
    cancelling the caller, its deadline or its end -> cancels the handler, some time later
    a dead callee -> UNAVAILABLE; a silent one -> UNAVAILABLE after the keepalive time, or the caller's own deadline

`connect` has the signature of `common.rpc.connect` and takes its place (see `support.simulation.world`). The caller's process is
found through the running loop.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from common.codec import error_to_wire, ticket_from_wire
from common.errors import PdserveError
from common.rpc import ERROR_TRAILER
from common.types import Ticket
from common.wire import worker_pb2
from support.simulation.network import Network, Point, Wire
from support.simulation.virtual_loop import ProcessLoop

CONNECT_S = 0.5e-3
Send = Callable[[bytes], None]
Unary = Callable[[bytes], Awaitable[bytes]]
Stream = Callable[[bytes, Send], Awaitable[None]]


@dataclass(frozen=True)
class IssuedTicket:
    """A ticket that left a decode worker, and who owned its blocks then."""

    ticket: Ticket
    prompt: tuple[int, ...]
    generations: dict[int, int]


@dataclass(frozen=True)
class _Status:
    code: grpc.StatusCode
    details: str = ""
    trailer: bytes | None = None


_OK = _Status(grpc.StatusCode.OK)
_UNAVAILABLE = _Status(grpc.StatusCode.UNAVAILABLE, "gone")


def _error(status: _Status) -> grpc.aio.AioRpcError:
    trailers = () if status.trailer is None else ((ERROR_TRAILER, status.trailer),)
    return grpc.aio.AioRpcError(status.code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailers), details=status.details)


class SimServer:
    """What listens at one gRPC address."""

    def __init__(self, network: Network, loop: ProcessLoop, unary: dict[str, Unary], stream: dict[str, Stream]) -> None:
        self.loop = loop
        self._network = network
        self._unary = unary
        self._stream = stream
        self.handlers: dict[int, asyncio.Task[None]] = {}
        self._serial = itertools.count()

    def serve(self, call: _Call) -> None:
        """On this server's loop: a request has arrived."""
        method = call.method.rpartition("/")[2]
        serial = next(self._serial)
        self._network.time.tell(self.loop.name, f"<- {method} from {call.caller.name}")
        task = self.loop.create_task(self._handle(call, method), name=f"handler {method}")
        self.handlers[serial] = task
        deadline = self.loop.call_later(call.timeout_s, task.cancel)

        def ended(_: asyncio.Task[None]) -> None:
            deadline.cancel()
            del self.handlers[serial]

        task.add_done_callback(ended)
        call.handlers.append(task)

    async def _handle(self, call: _Call, method: str) -> None:
        try:
            if method in self._stream:
                await self._stream[method](call.request, lambda data: call.reply(data))
            else:
                call.reply(await self._unary[method](call.request))
            status = _OK
        except PdserveError as error:
            detail = error_to_wire(error).SerializeToString()
            status = _Status(grpc.StatusCode[error.grpc_code], error.message, detail)
        call.end(status)
        self._network.time.tell(self.loop.name, f"   {method}: {status.code.name} {status.details}")


class _Call:
    """One call, as both ends see it. `ended` is called at the caller's end, once."""

    def __init__(
        self,
        network: Network,
        caller: ProcessLoop,
        address: str,
        method: str,
        request: bytes,
        timeout_s: float,
        on_message: Callable[[bytes], None],
        on_status: Callable[[_Status], None],
    ) -> None:
        self.caller = caller
        self.method = method
        self.request = request
        self.timeout_s = timeout_s
        self.handlers: list[asyncio.Task[None]] = []
        self._network = network
        self._on_message, self._on_status = on_message, on_status
        self._over = False
        self._deadline = caller.call_later(timeout_s, self._finish, _Status(grpc.StatusCode.DEADLINE_EXCEEDED, "too late"))
        server = network.servers.get(address)
        self._wire: Wire | None = None
        disorder = network.disorder
        if server is None:
            caller.call_later(CONNECT_S, self._finish, _UNAVAILABLE)
            return
        self._server = server
        self._wire = wire = Wire(network, caller, server.loop, pinged=True)
        wire.on_end_a = lambda: self._finish(_UNAVAILABLE)
        wire.on_end_b = self._cancel_handlers
        self._response_lost = network.chance(disorder.response_lost)
        self._black_hole = network.chance(disorder.black_hole)
        if network.chance(disorder.request_lost):
            network.time.tell("network", f"the request {method} of {caller.name} is lost")
            wire.reset()
            return
        late_s, network.next_call_late_s = network.next_call_late_s, 0.0
        wire.delay(caller, late_s)
        wire.send(caller, server.serve, self)
        if not method.endswith("/Generate") and network.chance(disorder.duplicated):
            network.time.tell("network", f"the request {method} of {caller.name} is duplicated")
            wire.send(caller, server.serve, self)

    def cancel(self) -> None:
        self._finish(_Status(grpc.StatusCode.CANCELLED, "cancelled here"))

    # -- at the callee's end ------------------------------------------------------------------------------------------

    def reply(self, data: bytes) -> None:
        if self._wire is not None and not self._black_hole:
            if self._response_lost:
                self._network.time.tell("network", f"the response of {self.method} to {self.caller.name} is lost")
                self._wire.reset()
            else:
                self._wire.send(self._server.loop, self._received, data)

    def end(self, status: _Status) -> None:
        if self._wire is not None and not self._black_hole:
            self._wire.send(self._server.loop, self._finish, status)

    def _cancel_handlers(self) -> None:
        for task in self.handlers:
            task.cancel()

    # -- at the caller's end ------------------------------------------------------------------------------------------

    def _received(self, data: bytes) -> None:
        if not self._over:
            self._on_message(data)

    def _finish(self, status: _Status) -> None:
        if self._over:
            return
        self._over = True
        self._deadline.cancel()
        if self._wire is not None:
            self._wire.close(self.caller)  # the other end's handler, if it still runs, is cancelled by that
        self._on_status(status)


class SimChannel:
    """A `grpc.aio.Channel` as far as stubs and `router.links` use one."""

    def __init__(self, address: str) -> None:
        self.loop: ProcessLoop = asyncio.get_running_loop()  # type: ignore[assignment]
        self.network: Network = self.loop.host.network
        self.address = address
        self._state = grpc.ChannelConnectivity.IDLE
        self._changed = asyncio.Event()

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        if try_to_connect and self._state is grpc.ChannelConnectivity.IDLE:
            self._enter(grpc.ChannelConnectivity.CONNECTING)
            server = self.network.servers.get(self.address)
            if server is None:
                self.loop.call_later(CONNECT_S, self._enter, grpc.ChannelConnectivity.TRANSIENT_FAILURE)
            else:
                wire = Wire(self.network, self.loop, server.loop, pinged=True)
                wire.on_end_a = lambda: self._enter(grpc.ChannelConnectivity.TRANSIENT_FAILURE)

                def greet() -> None:
                    wire.send(server.loop, self._connected, wire)

                wire.send(self.loop, greet)
        return self._state

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        while self._state is last_observed_state:
            await self._changed.wait()

    def _connected(self, wire: Wire) -> None:
        wire.close(self.loop)  # a call has a wire of its own
        self._enter(grpc.ChannelConnectivity.READY)

    def _enter(self, state: grpc.ChannelConnectivity) -> None:
        self._state = state
        self._changed.set()
        self._changed = asyncio.Event()

    async def close(self, grace: float | None = None) -> None:
        self._enter(grpc.ChannelConnectivity.SHUTDOWN)

    def unary_unary(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None, _registered_method: bool = False
    ) -> Any:
        async def call(message: Any, *, timeout: float) -> Any:
            data = request_serializer(message)
            self._note(method, message)
            answers: list[bytes] = []
            done: asyncio.Future[_Status] = self.loop.create_future()
            running = _Call(self.network, self.loop, self.address, method, data, timeout, answers.append, done.set_result)
            try:
                status = await asyncio.shield(done)
            finally:
                running.cancel()
            if status.code is not grpc.StatusCode.OK or not answers:
                raise _error(status)
            return response_deserializer(answers[0])

        return call

    def unary_stream(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None, _registered_method: bool = False
    ) -> Any:
        def call(message: Any, *, timeout: float) -> SimStreamCall:
            return SimStreamCall(self, method, request_serializer(message), response_deserializer, timeout)

        return call

    def _note(self, method: str, message: Any) -> None:
        if not method.endswith("/Run"):
            return
        self.network.point(Point.RUN_SENT, self.loop)
        assert isinstance(message, worker_pb2.PrefillRequest)
        ticket = ticket_from_wire(message.ticket)
        memory = self.loop.host.memory
        self.network.witness.tickets[ticket.nonce] = IssuedTicket(
            ticket, tuple(message.request.prompt_token_ids), {block: memory.generation[block] for block in ticket.blocks}
        )


class SimStreamCall:
    """What `stub.Generate(...)` returns."""

    def __init__(self, channel: SimChannel, method: str, data: bytes, deserialise: Any, timeout_s: float) -> None:
        self._deserialise = deserialise
        self._news: asyncio.Queue[bytes | _Status] = asyncio.Queue()
        self._call = _Call(
            channel.network, channel.loop, channel.address, method, data, timeout_s, self._news.put_nowait, self._news.put_nowait
        )

    def cancel(self) -> None:
        self._call.cancel()

    def __aiter__(self) -> SimStreamCall:
        return self

    async def __anext__(self) -> Any:
        try:
            news = await self._news.get()
        except asyncio.CancelledError:
            self._call.cancel()
            raise
        if isinstance(news, bytes):
            return self._deserialise(news)
        if news.code is grpc.StatusCode.OK:
            raise StopAsyncIteration
        if news.code is grpc.StatusCode.CANCELLED:
            raise asyncio.CancelledError
        raise _error(news)


def connect(address: str, token: str | None) -> Any:
    return SimChannel(address)
