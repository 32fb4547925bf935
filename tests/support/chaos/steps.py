"""The steps of the protocol at which a worker process can be made to wait, each seen by wrapping the objects that take it.

    the process takes a step -> `Breakpoint.reached` -> if armed for it: "at step X" to the test, and the whole thread stands
    still until the test says go on (or kills the process)

A breakpoint fires once. It blocks the thread that takes the step, as if the process had been stopped exactly there: for most
steps that is the event loop, for the ones inside a write it is the link's lane. The order of the enums is that of the protocol.
"""

from __future__ import annotations

import asyncio
import enum
import json
import os
import socket
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

SETTLE_TURNS = 20  # of the event loop, until a call that was started is with gRPC's own threads
TOKENS_BEFORE_STEP = 4
_READ_TIMEOUT_S = 60.0


class DecodeStep(enum.Enum):
    """Taken by the decode worker."""

    HANDSHAKE_SENT = "handshake sent"
    """Handshake is with gRPC; its reply has not been seen."""
    TICKET_MINTED = "ticket minted"
    """The transfer is open, nobody was told."""
    RUN_CALLED = "Run called"
    """Run is with gRPC; nothing else has happened that the decode worker knows of."""
    WRITER_LET_IN = "writer let in"
    """OPEN was accepted; GRANT has not left."""
    OFFERED = "pieces offered"
    """shm: READY was read; nothing was fetched."""
    FIRST_PIECE_VERIFIED = "first piece verified"
    """One piece is in the pool with its digest."""
    HALF_VERIFIED = "half of the pieces verified"
    """Half of the blocks' layers, or more, are in the pool."""
    ALL_VERIFIED = "all pieces verified"
    """Everything is in the pool; neither CLOSE nor the seal has been looked at since."""
    WRITER_CLOSED = "writer closed"
    """CLOSE was read."""
    SEAL_RECEIVED = "seal received"
    """Run's reply is here and has not been looked at."""
    VERIFIED = "verified"
    """Blocks and seal agree; the engine has not heard of it."""
    FIRST_TOKEN = "first token emitted"
    """The first event of the stream is with gRPC."""
    SOME_TOKENS = "after some tokens"
    """So many tokens as the test says are with gRPC."""


class PrefillStep(enum.Enum):
    """Taken by the prefill worker."""

    HANDSHAKE_RECEIVED = "handshake received"
    """Nothing was done about it."""
    LINKED = "data link up"
    """The data link is authenticated; the handshake has not been answered."""
    RUN_RECEIVED = "Run received"
    """Nothing was done about it."""
    TICKET_ACCEPTED = "ticket accepted"
    """The transfer is open; OPEN has not left."""
    GRANTED = "granted"
    """GRANT was read; nothing was written."""
    FIRST_COMPUTED = "first chunk computed"
    """The engine reported final KV for the first time; it was not pushed."""
    BEFORE_FIRST_WRITE = "before the first write"
    """Pieces are about to be written."""
    MID_WRITE = "between two pieces"
    """Some pieces of the prompt were written, others not."""
    MID_PIECE = "inside a piece"
    """Half of a message's bytes are with the socket. shm: READY has left before, and the message would state what was ready."""
    AFTER_FIRST_WRITE = "after the first write"
    """A batch was written; the transfer's account does not hold it yet."""
    BEFORE_CLOSE = "before CLOSE"
    """Everything was written."""
    AFTER_CLOSE = "after CLOSE"
    """CLOSE is on its way; Run has not been answered."""
    BEFORE_REPLY = "before the reply"
    """The seal is made and has not left."""
    AFTER_REPLY = "after the reply"
    """The reply is with gRPC."""


Step = DecodeStep | PrefillStep
UNREACHABLE: dict[str, frozenset[Step]] = {
    "tcp": frozenset({DecodeStep.OFFERED}),  # there is nothing to fetch
    "nixl": frozenset({DecodeStep.OFFERED, PrefillStep.MID_PIECE}),  # one call hands all descriptors to the library
}
"""By transport: steps that do not exist there."""
AT_PIECES = frozenset({DecodeStep.OFFERED, DecodeStep.FIRST_PIECE_VERIFIED, DecodeStep.HALF_VERIFIED, DecodeStep.ALL_VERIFIED})
"""What native code does with one call: who waits for one of them has pieces fetched and looked at one by one."""


def step_named(role: str, value: str) -> Step:
    return DecodeStep(value) if role == "decode" else PrefillStep(value)


class Breakpoint:
    """One per worker process. `reached` may be called from any thread."""

    def __init__(self, halts: socket.socket) -> None:
        self._halts = halts
        self._lock = threading.Lock()
        self._step: Step | None = None
        self._request_id = ""
        self.num_tokens = TOKENS_BEFORE_STEP  # of SOME_TOKENS

    def arm(self, step: Step, request_id: str, num_tokens: int = TOKENS_BEFORE_STEP) -> None:
        """For the next time that this request ("": any) takes the step, or that it is taken for no request in particular."""
        self._step, self._request_id, self.num_tokens = step, request_id, num_tokens

    def disarm(self) -> None:
        self._step = None

    def awaits(self, step: Step) -> bool:
        return self._step is step

    def reached(self, step: Step, request_id: str | None = None) -> None:
        if self._step is not step:
            return
        with self._lock:
            meant = not self._request_id or request_id is None or request_id.partition("#")[0] == self._request_id
            if self._step is not step or not meant:
                return
            self._step = None
            self._halts.sendall(json.dumps({"step": step.value}).encode() + b"\n")
            if not self._halts.recv(1):
                os._exit(1)  # the test is gone


def _wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    setattr(owner, name, make(getattr(owner, name)))


async def _settle() -> None:
    for _ in range(SETTLE_TURNS):
        await asyncio.sleep(0)


def watch_decode(breakpoint_: Breakpoint) -> None:
    """In a decode worker's process, before the worker is made."""
    from decode_worker.feeds import Feeds
    from decode_worker.prefill_peer import GrpcPrefillPeer
    from decode_worker.streams import DecodeStreams
    from kvtransfer.incoming import Incoming
    from kvtransfer.receiver import KVReceiver
    from kvtransfer.state import Arrival, IncomingTransfer
    from kvtransfer.transports.fetching import FetchingLink

    reached = breakpoint_.reached
    requests: dict[bytes, str] = {}  # by nonce

    def calling(step: DecodeStep) -> Callable[[Any], Any]:
        def make(original: Any) -> Any:
            async def call(self: Any, message: Any, timeout_s: float) -> Any:
                if not breakpoint_.awaits(step):
                    return await original(self, message, timeout_s)
                under_way = asyncio.ensure_future(original(self, message, timeout_s))
                try:
                    await _settle()
                    reached(step, message.request.request_id if step is DecodeStep.RUN_CALLED else None)
                    return await under_way
                finally:
                    under_way.cancel()

            return call

        return make

    _wrap(GrpcPrefillPeer, "handshake", calling(DecodeStep.HANDSHAKE_SENT))
    _wrap(GrpcPrefillPeer, "run", calling(DecodeStep.RUN_CALLED))

    def make_open(original: Any) -> Any:
        def open_(self: Any, **arguments: Any) -> Any:
            incoming = original(self, **arguments)
            requests[incoming.ticket.nonce] = incoming.ticket.request_id
            reached(DecodeStep.TICKET_MINTED, incoming.ticket.request_id)
            return incoming

        return open_

    _wrap(KVReceiver, "open", make_open)

    def make_let_in(original: Any) -> Any:
        def let_in(self: Any, *arguments: Any) -> Any:
            answer = original(self, *arguments)
            reached(DecodeStep.WRITER_LET_IN, self.ticket.request_id)
            return answer

        return let_in

    _wrap(Incoming, "let_in", make_let_in)

    def make_fetch(original: Any) -> Any:
        def fetch(self: Any, placed: Any) -> None:
            reached(DecodeStep.OFFERED, requests.get(self._frame.nonce, ""))
            original(self, placed)

        return fetch

    _wrap(FetchingLink, "_fetch", make_fetch)

    def make_arrived(original: Any) -> Any:
        def arrived(self: Any, name: Any, digest: bytes, ok: bool) -> Any:
            arrival = original(self, name, digest, ok)
            if arrival is Arrival.VERIFIED:
                request_id = self.ticket.request_id
                reached(DecodeStep.FIRST_PIECE_VERIFIED, request_id)
                if 2 * len(self.verified) >= len(self.expected):
                    reached(DecodeStep.HALF_VERIFIED, request_id)
                if self.complete:
                    reached(DecodeStep.ALL_VERIFIED, request_id)
            return arrival

        return arrived

    _wrap(IncomingTransfer, "piece_arrived", make_arrived)

    def make_arrived_at_once(original: Any) -> Any:
        """Where a step between pieces is waited for, they are taken one by one."""

        def arrived(self: Any, *arguments: Any) -> Any:
            return not any(map(breakpoint_.awaits, AT_PIECES)) and original(self, *arguments)

        return arrived

    _wrap(IncomingTransfer, "pieces_arrived", make_arrived_at_once)

    def make_closed(original: Any) -> Any:
        def writer_closed(self: Any) -> None:
            was_open = self.writer_open
            original(self)
            if was_open:
                reached(DecodeStep.WRITER_CLOSED, self.ticket.request_id)

        return writer_closed

    _wrap(IncomingTransfer, "writer_closed", make_closed)

    def make_complete(original: Any) -> Any:
        async def complete(self: Any, seal: Any) -> None:
            reached(DecodeStep.SEAL_RECEIVED, self.ticket.request_id)
            await original(self, seal)
            reached(DecodeStep.VERIFIED, self.ticket.request_id)

        return complete

    _wrap(Incoming, "complete", make_complete)

    class Told:
        """What a request's outputs have said so far."""

        def __init__(self, request: Any) -> None:
            self._request = request
            self._first = True
            self._num_tokens = 0  # of the first choice

        def left(self, output: Any) -> None:
            self._num_tokens += sum(len(chunk.token_ids) for chunk in output.chunks if chunk.choice == self._request.first_choice)
            if self._first:
                reached(DecodeStep.FIRST_TOKEN, self._request.request_id)
                self._first = False
            if self._num_tokens >= breakpoint_.num_tokens:
                reached(DecodeStep.SOME_TOKENS, self._request.request_id)

    def make_generate(original: Any) -> Any:
        async def generate(self: Any, request: Any, *placing: Any) -> AsyncGenerator[Any, None]:
            told = Told(request)
            async with aclosing(original(self, request, *placing)) as outputs:
                async for output in outputs:
                    yield output  # when this goes on, the event is with gRPC
                    told.left(output)

        return generate

    given: list[tuple[Told, Any]] = []  # to lanes, in a step that was not flushed yet

    def make_run(original: Any) -> Any:
        async def run(self: Any, request: Any, candidates: Any, give: Any, *placing: Any) -> None:
            told = Told(request)

            def giving(output: Any) -> None:
                give(output)
                given.append((told, output))

            await original(self, request, candidates, giving, *placing)

        return run

    def make_flush(original: Any) -> Any:
        def flush(self: Any) -> None:
            original(self)  # now the step's events are with the socket
            leaving = tuple(given)
            given.clear()
            for told, output in leaving:
                told.left(output)

        return flush

    _wrap(DecodeStreams, "generate", make_generate)
    _wrap(DecodeStreams, "run", make_run)
    _wrap(Feeds, "flush", make_flush)


def watch_prefill(breakpoint_: Breakpoint, requests: dict[bytes, str]) -> None:
    """In a prefill worker's process, before the worker is made. The steps of a link are taken in `fault_transport`; `requests`
    is filled with the request of each nonce."""
    from kvtransfer.frames import HEADER_BYTES, FrameKind, decode_header
    from kvtransfer.sender import KVSender
    from kvtransfer.transports import offer, tcp
    from kvtransfer.transports.sending import SocketSend, StreamSenderLink
    from kvtransfer.transports.shm import LendingSenderLink
    from prefill_worker.handoff import PrefillHandoff, Push
    from prefill_worker.runs import PrefillRuns
    from prefill_worker.server import PrefillWorker

    reached = breakpoint_.reached

    def make_handshake(original: Any) -> Any:
        async def handshake(self: Any, message: Any) -> Any:
            reached(PrefillStep.HANDSHAKE_RECEIVED)
            reply = await original(self, message)
            reached(PrefillStep.LINKED)
            return reply

        return handshake

    _wrap(PrefillHandoff, "handshake", make_handshake)

    def make_run(original: Any) -> Any:
        async def run(self: Any, message: Any) -> Any:
            request_id = message.request.request_id
            reached(PrefillStep.RUN_RECEIVED, request_id)
            reply = await original(self, message)
            reached(PrefillStep.BEFORE_REPLY, request_id)
            return reply

        return run

    _wrap(PrefillRuns, "run", make_run)

    def make_serve(original: Any) -> Any:
        async def serve(self: Any, request: Any, context: Any) -> Any:
            reply = await original(self, request, context)
            if breakpoint_.awaits(PrefillStep.AFTER_REPLY):
                loop = asyncio.get_running_loop()

                async def later() -> None:
                    await _settle()
                    reached(PrefillStep.AFTER_REPLY, request.request.request_id)

                task = loop.create_task(later())
                task.add_done_callback(lambda task: task.result())
            return reply

        return serve

    _wrap(PrefillWorker, "Run", make_serve)

    def make_open(original: Any) -> Any:
        def open_(self: Any, ticket: Any) -> Any:
            requests[ticket.nonce] = ticket.request_id
            outgoing = original(self, ticket)
            reached(PrefillStep.TICKET_ACCEPTED, ticket.request_id)
            return outgoing

        return open_

    _wrap(KVSender, "open", make_open)

    def make_computed(original: Any) -> Any:
        async def computed(self: Any, *arguments: Any) -> None:
            reached(PrefillStep.FIRST_COMPUTED, self._ticket.request_id)
            await original(self, *arguments)

        return computed

    _wrap(Push, "computed", make_computed)

    def make_send(original: Any) -> Any:
        def send(self: Any, buffers: Any) -> None:
            request_id = _lane.request_id
            if request_id is None or not breakpoint_.awaits(PrefillStep.MID_PIECE):
                original(self, buffers)
                return
            data = b"".join(bytes(buffer) for buffer in buffers)
            if decode_header(data[:HEADER_BYTES], block_bytes=len(data)).kind is FrameKind.READY:
                original(self, [data])
                return
            half = len(data) // 2
            original(self, [data[:half]])
            reached(PrefillStep.MID_PIECE, request_id)
            original(self, [data[half:]])

        return send

    _wrap(SocketSend, "__call__", make_send)

    def make_write_natively(original: Any) -> Any:
        """What is inside a native call has no step: it writes to a pair of sockets; what comes out of them has one."""

        def write_natively(kernel: Any, send: Any, *arguments: Any) -> Any:
            if _lane.request_id is None or not breakpoint_.awaits(PrefillStep.MID_PIECE):
                return original(kernel, send, *arguments)
            with ThreadPoolExecutor(1) as reader:
                near, far = socket.socketpair()
                with far:
                    with near:
                        written = reader.submit(far.makefile("rb").read)
                        digests = original(kernel, _Elsewhere(send, near), *arguments)
                    send([written.result(_READ_TIMEOUT_S)])
            return digests

        return write_natively

    for writing in (offer, tcp):
        _wrap(writing, "write_natively", make_write_natively)

    def make_in_lane(original: Any) -> Any:
        async def in_lane(self: Any, job: Any) -> Any:
            request_id = _writing_for.get()

            def marked() -> Any:
                _lane.request_id = request_id
                return job()

            return await original(self, marked)

        return in_lane

    _wrap(StreamSenderLink, "_in_lane", make_in_lane)

    def make_write(original: Any) -> Any:
        async def write(self: Any, nonce: bytes, pieces: Any, stop: Any) -> Any:
            token = _writing_for.set(requests.get(nonce, ""))
            try:
                return await original(self, nonce, pieces, stop)
            finally:
                _writing_for.reset(token)

        return write

    for link in (StreamSenderLink, LendingSenderLink):
        _wrap(link, "write", make_write)


class _Elsewhere:
    """Sends to `near` what was meant for the link."""

    def __init__(self, send: Any, near: socket.socket) -> None:
        self.outlet = send.outlet._replace(socket=near.fileno())
        self.check = send.check


_writing_for: ContextVar[str | None] = ContextVar("writing_for", default=None)


class _Lane(threading.local):
    """What the link's lane is sending right now: pieces of this request, or None: OPEN, CLOSE or a pulse."""

    request_id: str | None = None


_lane = _Lane()
