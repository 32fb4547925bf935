"""The prefill worker's end of a link over a socket, shared by tcp and shm: one lane of work in a thread, replies on the loop.

    event loop    open_writer --+                            +-- close_writer        reads GRANT, REFUSE, CREDIT, PULSE, the end
                                v                            v
    lane thread   ---- send OPEN ---- write a batch, another ... ---- send CLOSE ----      in order, one at a time

Digests, copies and sends happen in the lane, so that neither a large block nor a slow peer stops the event loop; other links have
lanes of their own. Only the first bytes of a batch may leave from the loop, while the lane has nothing to do: the peer is woken
by them while the lane is. Batches of several transfers take turns in the lane, and so do pulses: one that finds the lane busy
waits for its turn, and a second one for the same transfer is not queued behind it. How bytes get to the peer is the
`BatchWriter`'s business.

The end of a link, in this order: the lane stops (a send that waits is woken, a copy under way runs to its end), the writer lets
go of the peer's memory, then the socket is closed. So whoever sees the socket end knows that nothing is written any more.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from common.errors import HandoffError, TransferBroken
from kvtransfer.frames import HEADER_BYTES, Frame, FrameKind, decode_header
from kvtransfer.native.kernel import Outcome, Outlet
from kvtransfer.transports.base import Piece, Refusal, WriterNews
from kvtransfer.transports.lane import Lane

STALL_TIMEOUT_S = 10.0  # a peer that takes no bytes for so long is given up
PATIENCE_S = 0.05  # native code that has waited for so long asks whether its batch is still wanted
MAX_BUFFERS_PER_SEND = 512
REPLY_BUFFER_BYTES = 64 * HEADER_BYTES
_NEWS = frozenset({FrameKind.CREDIT, FrameKind.PULSE, FrameKind.TAKEN})

Result = TypeVar("Result")
Send = Callable[[Sequence[bytes | memoryview]], None]


class SocketSend:
    """What a batch is sent with, in the lane: by the interpreter when called, or by native code through `outlet`."""

    def __init__(self, sock: socket.socket, wake: int, lost: Callable[[], HandoffError | None]) -> None:
        """`wake` can be read once `lost` says why the link is gone."""
        self._sock = sock
        self._wake = wake
        self._lost = lost
        self.outlet = Outlet(sock.fileno(), wake, int(STALL_TIMEOUT_S * 1000), int(PATIENCE_S * 1000))

    def __call__(self, buffers: Sequence[bytes | memoryview]) -> None:
        """All of them. Raises TransferBroken when the link goes, is dropped, or stalls."""
        left = [memoryview(buffer) for buffer in buffers]
        first = 0  # the first buffer that is not sent in full
        poller: select.poll | None = None
        while first < len(left):
            self._check_lost()
            try:
                sent = self._sock.sendmsg(left[first : first + MAX_BUFFERS_PER_SEND])
            except (BlockingIOError, InterruptedError):
                if poller is None:
                    poller = select.poll()
                    poller.register(self._sock, select.POLLOUT)
                    poller.register(self._wake, select.POLLIN)
                if not poller.poll(STALL_TIMEOUT_S * 1000):
                    self.check(Outcome.STALLED)
                continue
            except OSError:
                self.check(Outcome.BROKEN)
            while first < len(left) and sent >= left[first].nbytes:
                sent -= left[first].nbytes
                first += 1
            if sent:
                left[first] = left[first][sent:]

    def check(self, outcome: Outcome) -> None:
        self._check_lost()
        if outcome is Outcome.STALLED:
            raise TransferBroken(f"the peer took nothing for {STALL_TIMEOUT_S:g} s")
        if outcome in (Outcome.BROKEN, Outcome.WOKEN):
            raise TransferBroken("the link to the decode worker went away")

    def _check_lost(self) -> None:
        lost = self._lost()
        if lost is not None:
            raise TransferBroken(lost.message)


class BatchWriter(Protocol):
    def prepare(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool], send: Send) -> Callable[[], list[bytes]]:
        """Runs on the event loop, while the lane may be busy with a batch before. What it returns runs in the lane, once: it
        writes pieces and announces them through `send` until done or told to stop, and returns their digests."""
        ...

    def close(self) -> None:
        """The lane is idle and stays so: let go of the peer's memory."""
        ...


class StreamSenderLink:
    def __init__(self, sock: socket.socket, kind: str, writer: BatchWriter) -> None:
        """`sock` is connected, authenticated and does not block; it and `writer` belong to the link from now on."""
        self.kind = kind
        self.lost: HandoffError | None = None
        self._sock = sock
        self._writer = writer
        self._loop = asyncio.get_running_loop()
        self._lane = Lane(f"kv-send-{kind}", self._job_failed)
        self._asking: dict[bytes, tuple[asyncio.Future[None], WriterNews]] = {}  # said OPEN, not answered
        self._news: dict[bytes, WriterNews] = {}  # of the writers that were let in
        self._pulsing: set[bytes] = set()  # their pulse waits for its turn in the lane
        self._replies = bytearray()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._send = SocketSend(sock, self._wake, lambda: self.lost)
        self._ending: asyncio.Task[None] | None = None
        self._loop.add_reader(sock, self._readable)

    async def open_writer(self, nonce: bytes, news: WriterNews) -> None:
        granted: asyncio.Future[None] = self._loop.create_future()
        self._asking[nonce] = granted, news
        try:
            await self._in_lane(lambda: self._send([Frame(FrameKind.OPEN, nonce).encode()]))
            await granted
        finally:
            self._asking.pop(nonce, None)
            if granted.done() and not granted.cancelled():
                granted.exception()  # retrieved: the send may have failed first

    async def write(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool]) -> list[bytes]:
        return await self._in_lane(self._writer.prepare(nonce, pieces, lambda: stop() or self.lost is not None, self._send))

    def pulse(self, nonce: bytes) -> None:
        if self.lost is None and nonce not in self._pulsing:
            self._pulsing.add(nonce)
            job = self._lane.start(lambda: self._send([Frame(FrameKind.PULSE, nonce).encode()]))
            job.add_done_callback(lambda _: self._pulsing.discard(nonce))

    async def close_writer(self, nonce: bytes) -> None:
        self._news.pop(nonce, None)
        if self.lost is None:
            try:
                await self._in_lane(lambda: self._send([Frame(FrameKind.CLOSE, nonce).encode()]))
            except TransferBroken:
                return  # the link is gone, and with it the writer

    def drop(self, error: HandoffError) -> None:
        if self.lost is not None:
            return
        self.lost = error
        self._loop.remove_reader(self._sock)
        os.eventfd_write(self._wake, 1)
        self._news.clear()
        for granted, _ in self._asking.values():
            if not granted.done():
                granted.set_exception(error)
        self._ending = self._loop.create_task(self._end(), name=f"kv-link-end-{self.kind}")

    async def close(self) -> None:
        self.drop(TransferBroken("the link was closed"))
        if self._ending is not None:
            await asyncio.shield(self._ending)

    async def _end(self) -> None:
        await self._lane.drained()
        self._writer.close()
        self._sock.close()
        os.close(self._wake)

    # -- the lane -----------------------------------------------------------------------------------------------------

    async def _in_lane(self, job: Callable[[], Result]) -> Result:
        if self.lost is not None:
            raise self.lost
        return await self._lane.start(job)

    def _say_ahead(self, data: bytes) -> int:
        """How many of these bytes are sent already, from the loop: none if the lane has something to do, for it may be sending.
        The rest is to be the first thing that the next job sends."""
        if self.lost is not None or not self._lane.idle:
            return 0
        try:
            return self._sock.send(data)
        except OSError:  # there is no room now; or the next job finds out what else it is
            return 0

    def _job_failed(self, error: BaseException) -> None:
        if isinstance(error, TransferBroken):
            self.drop(error)

    # -- replies ------------------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        try:
            data = self._sock.recv(REPLY_BUFFER_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self.drop(TransferBroken("the link to the decode worker went away"))
            return
        self._replies += data
        try:
            while len(self._replies) >= HEADER_BYTES:
                self._replied(decode_header(self._replies[:HEADER_BYTES], block_bytes=0))
                del self._replies[:HEADER_BYTES]
        except TransferBroken as error:
            self.drop(error)

    def _replied(self, frame: Frame) -> None:
        if frame.kind is FrameKind.GRANT or frame.kind is FrameKind.REFUSE:
            self._answered(frame)
        elif frame.kind in _NEWS:
            news = self._news.get(frame.nonce)
            if news is not None:
                news.renewed()
                if frame.kind is FrameKind.TAKEN:
                    news.taken(frame.amount)
                elif frame.amount:
                    news.credited(frame.amount)
        else:
            raise TransferBroken(f"a {frame.kind.name} frame does not come from a decode worker")

    def _answered(self, frame: Frame) -> None:
        granted, news = self._asking.get(frame.nonce, (None, None))
        if frame.kind is FrameKind.REFUSE:
            try:
                refusal = Refusal(frame.amount)
            except ValueError as error:
                raise TransferBroken(f"a refusal for the unknown reason {frame.amount}") from error
            if granted is not None and not granted.done():
                granted.set_exception(refusal.as_error())
        elif granted is not None and news is not None and not granted.done():
            self._news[frame.nonce] = news
            news.renewed()
            news.credited(frame.amount)
            granted.set_result(None)
