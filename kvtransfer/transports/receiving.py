"""The decode worker's end of a link over a socket, shared by tcp and shm: accept, authenticate, read frames, report.

    accept -> authenticate -> frames: OPEN ... BLOCK|WRITTEN ... CLOSE ... -> end of the link -> landing.link_lost

A link reads on the event loop, straight into the block that the landing names, and asks anew before each read: once the landing
says "nowhere", what is still on the wire goes to scratch. At most `READS_PER_WAKEUP` reads happen before others get their turn.
A peer that breaks the rules is hung up on. If it writes into the pool by itself (shm), it is only told so, and the link counts as
lost when it has hung up in turn: before that it may still be writing.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable

from common.errors import HandoffError, TransferBroken
from kvtransfer.frames import HEADER_BYTES, Frame, FrameKind, decode
from kvtransfer.region import BlockRegion
from kvtransfer.transports.authentication import PoolShape, authenticate_as_decode
from kvtransfer.transports.base import Landing, LinkCredentials, PeerName

READS_PER_WAKEUP = 4
MAX_UNAUTHENTICATED = 64
ACCEPT_BACKOFF_S = 0.1


class StreamReceiverLink:
    def __init__(
        self,
        sock: socket.socket,
        peer: PeerName,
        landing: Landing,
        *,
        kind: str,
        data_kind: FrameKind,  # BLOCK: payload comes over the socket; WRITTEN: the peer writes into the pool
        block_bytes: int,
        on_end: Callable[[StreamReceiverLink], None],
    ) -> None:
        self.kind = kind
        self.peer = peer
        self.fences_locally = data_kind is FrameKind.BLOCK
        self._sock = sock
        self._landing = landing
        self._data_kind = data_kind
        self._block_bytes = block_bytes
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._header = memoryview(bytearray(HEADER_BYTES))
        self._scratch: memoryview | None = None
        self._frame: Frame | None = None  # the BLOCK whose payload is being read
        self._dropping = False  # that payload has nowhere to go
        self._filled = 0
        self._condemned = False
        self._ended = False
        self._loop.add_reader(sock, self._readable)

    def end(self) -> None:
        """Hangs up and reports the link as lost. Idempotent."""
        if self._ended:
            return
        self._ended = True
        self._loop.remove_reader(self._sock)
        self._sock.close()
        self._landing.link_lost(self)
        self._on_end(self)

    def _readable(self) -> None:
        for _ in range(READS_PER_WAKEUP):
            if self._ended or not self._read_once():
                return

    def _read_once(self) -> bool:
        """One receive; False when the socket has no more for now, or for ever."""
        target = self._target()
        try:
            received = self._sock.recv_into(target)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            self.end()
            return False
        if received == 0:
            self.end()
            return False
        if self._condemned:
            return True
        self._filled += received
        if received == len(target):
            try:
                self._filled_up()
            except TransferBroken:
                self._condemn()
        return True

    def _target(self) -> memoryview:
        if self._frame is None or self._condemned:
            return self._header if self._condemned else self._header[self._filled :]
        if not self._dropping:
            block = self._landing.destination(self, self._frame.nonce, self._frame.logical_block)
            if block is not None:
                return block[self._filled :]
            self._dropping = True
        if self._scratch is None:
            self._scratch = memoryview(bytearray(self._block_bytes))
        return self._scratch[self._filled :]

    def _filled_up(self) -> None:
        self._filled = 0
        frame, self._frame = self._frame, None
        if frame is not None:
            dropped = self._scratch if self._dropping else None
            self._landing.block_written(self, frame.nonce, frame.logical_block, frame.digest, dropped)
            return
        frame = decode(self._header, block_bytes=self._block_bytes)
        if frame.kind is FrameKind.OPEN:
            refusal = self._landing.writer_opened(self, frame.nonce)
            if refusal is None:
                self._reply(Frame(FrameKind.GRANT, frame.nonce))
            else:
                self._reply(Frame(FrameKind.REFUSE, frame.nonce, logical_block=refusal))
        elif frame.kind is FrameKind.CLOSE:
            self._landing.writer_closed(self, frame.nonce)
        elif frame.kind is not self._data_kind:
            raise TransferBroken(f"a {frame.kind.name} frame does not belong on a {self.kind} link")
        elif frame.kind is FrameKind.BLOCK:
            self._frame, self._dropping = frame, False
        else:
            self._landing.block_written(self, frame.nonce, frame.logical_block, frame.digest, None)

    def _reply(self, frame: Frame) -> None:
        data = frame.encode()
        try:
            sent = self._sock.send(data)
        except OSError as error:
            raise TransferBroken("the peer takes no replies") from error
        if sent != len(data):
            raise TransferBroken("the peer takes no replies")

    def _condemn(self) -> None:
        if self.fences_locally:
            self.end()
            return
        self._condemned = True
        with contextlib.suppress(OSError):  # already gone: the next read says so
            self._sock.shutdown(socket.SHUT_WR)


class StreamListener:
    """Accepts, authenticates, and keeps the links of one listening socket."""

    def __init__(
        self,
        sock: socket.socket,
        address: str,
        landing: Landing,
        credentials: LinkCredentials,
        region: BlockRegion,
        *,
        kind: str,
        data_kind: FrameKind,
        introduce: Callable[[socket.socket], Awaitable[None]],  # what follows authentication, before the first frame
    ) -> None:
        self.address = address
        self._sock = sock
        self._landing = landing
        self._credentials = credentials
        self._region = region
        self._kind = kind
        self._data_kind = data_kind
        self._introduce = introduce
        self._links: set[StreamReceiverLink] = set()
        self._greetings: set[asyncio.Task[None]] = set()
        self._unauthenticated = asyncio.Semaphore(MAX_UNAUTHENTICATED)
        self._accepting = asyncio.create_task(self._accept(), name=f"kv-accept-{kind}")

    async def close(self) -> None:
        tasks = [self._accepting, *self._greetings]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        self._sock.close()
        for link in tuple(self._links):
            link.end()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._unauthenticated.acquire()
            try:
                sock, _ = await loop.sock_accept(self._sock)
            except OSError:  # out of descriptors, or the peer was gone before we looked: neither ends the listener
                self._unauthenticated.release()
                await asyncio.sleep(ACCEPT_BACKOFF_S)
                continue
            greeting = asyncio.create_task(self._greet(sock), name=f"kv-greet-{self._kind}")
            self._greetings.add(greeting)
            greeting.add_done_callback(self._greeted)

    def _greeted(self, greeting: asyncio.Task[None]) -> None:
        self._greetings.discard(greeting)
        self._unauthenticated.release()

    async def _greet(self, sock: socket.socket) -> None:
        shape = PoolShape(self._region.num_blocks, self._region.block_bytes)
        welcome = False
        try:
            sock.setblocking(False)
            peer = await authenticate_as_decode(sock, self._credentials, shape, self._landing.admit)
            await self._introduce(sock)
            welcome = True
        except HandoffError as error:
            self._landing.link_refused(error)
            return
        finally:
            if not welcome:
                sock.close()
        link = StreamReceiverLink(
            sock,
            peer,
            self._landing,
            kind=self._kind,
            data_kind=self._data_kind,
            block_bytes=self._region.block_bytes,
            on_end=self._links.discard,
        )
        self._links.add(link)
