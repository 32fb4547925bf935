"""Two processes that NIXL connects: by UCX over RDMA or NVLink where there is any, else by cma, shared memory or sockets.

    d                                                        p
    TCP socket, as in tcp                    <-------------  connect, authenticate
    window: memory of this link alone        ------------->  its address and NIXL's metadata
                                             <-- BLOCKS ---  these pieces go into the window next (their bytes do not follow)
    window <================================ one-sided write of the sources, without a copy
    window -> pool, if still wanted          <-- WRITTEN --  they are there
    digest of the pool's bytes == digest?    --- CREDIT -->  (without a nonce) so much of the window is free again

One-sided writes cannot be fenced: a peer that was stopped may go on with them much later, and "done" at its end is not proof of
anything. So a peer never gets the pool. It gets a window, a ring in which the next place follows from the pieces before; from
there this process copies, after it asked whether the piece has a place. Blocks leave quarantine at once, whatever the peer does.

The window itself is in quarantine when its link ends, until the peer hangs up (which it does after its end of NIXL is closed, or
by dying): a kernel that copies from process to process asks for an address and not for a permission, and once the window was
unmapped, the address might be somebody else's. If the peer has not hung up when the listener closes, the addresses stay reserved.

NIXL tells nobody when something has happened: it must be asked, and its own thread for that spins. Here the prefill side asks in
the link's lane, and only while a write is under way; the decode side, whose hands some lanes need, between BLOCKS and WRITTEN.
Both wait in between for longer and longer, and neither waits for ever.

On loopback UCX is told to do without sockets. Elsewhere it opens its own, which authenticate nobody: whoever reaches them can
write into the process. As with tcp, the caller vouches for the network (`KVReceiver.start`); `UCX_NET_DEVICES` and `UCX_TLS` in
the environment narrow it down.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from common.errors import HandoffError, HandshakeRefused, StartupError, TransferBroken
from common.loopback import is_loopback
from common.types import KVLayout
from kvtransfer.digest import NONCE_BYTES, piece_digest
from kvtransfer.frames import MAX_PIECES, Frame, FrameKind, encode_table
from kvtransfer.region import BlockRegion, use_huge_pages
from kvtransfer.transports.authentication import AUTHENTICATION_TIMEOUT_S, PoolShape, authenticate_as_prefill
from kvtransfer.transports.base import Landing, LinkCredentials, Listener, PeerName, Piece, SenderLink, Written
from kvtransfer.transports.listening import StreamListener
from kvtransfer.transports.nixl_agent import NixlAgent, Ring, load_nixl
from kvtransfer.transports.receiving import StreamReceiverLink
from kvtransfer.transports.sending import Send, StreamSenderLink
from kvtransfer.transports.tcp import dial, listen_on, tune

KIND = "nixl"
WINDOW_BYTES = 16 * 1024 * 1024  # of each link; at least four blocks
BATCH_BYTES = 4 * 1024 * 1024  # so much is announced, written and checked at a time: both ends work on neighbouring batches
WRITE_TIMEOUT_S = 10.0  # a batch that takes longer ends the link, at both ends
WINDOW_TIMEOUT_S = 10.0  # and so does a window that stays full
SETUP_TIMEOUT_S = 20.0  # for the decode side to prepare a window: the first use of the library is slow
MAX_PAUSE_S = 0.005  # between two looks at a write
GRACE_S = 1.0  # for peers to hang up when a listener closes
MAX_METADATA_BYTES = 64 * 1024
_OFFER = struct.Struct("<4sQQI")  # magic, address and size of the window, size of the metadata that follows
_OFFER_MAGIC = b"PDNX"
_WINDOW = bytes(NONCE_BYTES)  # CREDIT for this nonce, which no ticket has, is for the window
_RESERVED: list[mmap.mmap] = []  # windows that a peer may still write to when nobody waits for it any more


class NixlTransport:
    def can_serve(self, region: BlockRegion) -> bool:
        return not region.on_device

    async def listen(
        self, landing: Landing, credentials: LinkCredentials, region: BlockRegion, layout: KVLayout, host: str
    ) -> Listener:
        await asyncio.to_thread(load_nixl)
        sock, address = listen_on(host)
        return NixlListener(sock, address, landing, credentials, region, layout, same_host=is_loopback(host))

    async def connect(
        self,
        address: str,
        credentials: LinkCredentials,
        peer: PeerName,
        *,
        pool_blocks: int,
        layout: KVLayout,
        source: BlockRegion,
    ) -> SenderLink:
        if source.on_device:
            raise HandshakeRefused("the KV pool here is on a device", param="transports")
        try:
            await asyncio.to_thread(load_nixl)
        except StartupError as error:
            raise HandshakeRefused(error.message, param="transports") from error
        agent: NixlAgent | None = None
        sock = await dial(address)
        try:
            await authenticate_as_prefill(sock, credentials, peer, PoolShape(pool_blocks, layout.block_bytes))
            same_host = is_loopback(address.rpartition(":")[0])
            agent = await asyncio.to_thread(NixlAgent, _agent_name(credentials.name), same_host=same_host)
            window_address, window_bytes, metadata = await _receive_window(sock)
            await asyncio.to_thread(agent.meet, metadata)
            return NixlSenderLink(sock, WindowWriter(agent, window_address, Ring(window_bytes)))
        except BaseException as error:
            if agent is not None:
                agent.close()
            sock.close()
            if isinstance(error, StartupError):
                raise HandshakeRefused(error.message, param="transports") from error
            raise


# -- the decode side ---------------------------------------------------------------------------------------------------


class Window:
    """The memory that one peer writes into."""

    def __init__(self, own: PeerName, layout: KVLayout, *, same_host: bool) -> None:
        """Slow. Raises StartupError."""
        size_bytes = max(WINDOW_BYTES, 4 * layout.block_bytes)
        self.ring = Ring(size_bytes)
        self.agent = NixlAgent(_agent_name(own), same_host=same_host)
        try:
            self.mapping = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            use_huge_pages(self.mapping)
            self.bytes = memoryview(self.mapping)
            address = self.agent.register(self.bytes)
            metadata = self.agent.metadata()
        except OSError as error:
            self.agent.close()
            raise StartupError(f"no memory for a window of {size_bytes} bytes: {error.strerror}", param="transports") from error
        self.offer = _OFFER.pack(_OFFER_MAGIC, address, size_bytes, len(metadata)) + metadata

    def close(self) -> None:
        """NIXL lets go of the memory, and the memory of its contents. The addresses stay taken as long as `mapping` lives."""
        self.agent.close()
        self.mapping.madvise(mmap.MADV_DONTNEED)


class NixlReceiverLink(StreamReceiverLink):
    def __init__(
        self,
        sock: socket.socket,
        peer: PeerName,
        landing: Landing,
        layout: KVLayout,
        window: Window,
        *,
        on_end: Callable[[StreamReceiverLink], None],
    ) -> None:
        super().__init__(sock, peer, landing, layout, kind=KIND, data_kind=FrameKind.BLOCKS, on_end=on_end)
        self._data_kinds = frozenset({FrameKind.BLOCKS, FrameKind.WRITTEN})
        self.sock = sock
        self.window = window
        self._announced: tuple[bytes, list[Written]] | None = None  # nonce and pieces that are being written
        self._announced_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def end(self) -> None:
        """Reports the link as lost. The socket is closed by whoever takes care of the window."""
        if self._ended:
            return
        self._ended = True
        self._loop.remove_reader(self._sock)
        with contextlib.suppress(OSError):  # the end was at the other end
            self._sock.shutdown(socket.SHUT_WR)
        self._stop_progress()
        self._landing.link_lost(self)
        self._on_end(self)

    def _table_received(self, pieces: list[Written]) -> None:
        if self._frame.kind is FrameKind.BLOCKS:
            if self._announced is not None:
                raise TransferBroken("pieces are announced before the ones before them were written")
            self._announced = self._frame.nonce, pieces
            self._announced_s = self._loop.time()
            self._landing.writer_alive(self, self._frame.nonce)
            self._progress()
        else:
            if self._announced != (self._frame.nonce, pieces):
                raise TransferBroken("other pieces were written than were announced")
            self._announced = None
            self._stop_progress()
            self._land(self._frame.nonce, pieces)

    def _land(self, nonce: bytes, pieces: list[Written]) -> None:
        sizes = [piece.name.num_layers * self._layer_bytes for piece in pieces]
        offsets, cost_bytes = self.window.ring.take(sizes)
        if cost_bytes > self.window.ring.size_bytes:
            raise TransferBroken("more was written than the window holds")
        written: list[Written] = []
        for piece, offset, size in zip(pieces, offsets, sizes, strict=True):
            slot = self.window.bytes[offset : offset + size]
            place = self._landing.destination(self, nonce, piece.name)
            if place is None:
                written.append(piece._replace(dropped=slot))
            else:
                place[:] = slot
                written.append(piece)
        self._landing.pieces_written(self, nonce, written)
        self._say(Frame(FrameKind.CREDIT, _WINDOW, amount=cost_bytes))

    def _progress(self) -> None:
        """Where a lane needs our hands (sockets; shared memory without cma), bytes move while we are in here."""
        self._timer = None
        waited_s = self._loop.time() - self._announced_s
        if waited_s > WRITE_TIMEOUT_S:
            self._condemn()
            return
        try:
            self.window.agent.progress()
        except TransferBroken:
            self._condemn()
            return
        self._timer = self._loop.call_later(_pause_s(waited_s), self._progress)

    def _stop_progress(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class NixlListener(StreamListener):
    def __init__(
        self,
        sock: socket.socket,
        address: str,
        landing: Landing,
        credentials: LinkCredentials,
        region: BlockRegion,
        layout: KVLayout,
        *,
        same_host: bool,
    ) -> None:
        super().__init__(
            sock, address, landing, credentials, region, layout, kind=KIND, data_kind=FrameKind.BLOCKS, introduce=tune
        )
        self._same_host = same_host
        self._endings: set[asyncio.Task[Any]] = set()

    async def close(self) -> None:
        await super().close()
        if self._endings:
            _, waiting = await asyncio.wait(self._endings, timeout=GRACE_S)
            for burial in waiting:
                burial.cancel()
            if waiting:
                await asyncio.wait(waiting)

    async def _welcome(self, sock: socket.socket, peer: PeerName) -> StreamReceiverLink:
        await self._introduce(sock)
        loop = asyncio.get_running_loop()
        making = loop.create_task(asyncio.to_thread(Window, self._credentials.name, self._layout, same_host=self._same_host))
        self._endings.add(making)  # who cancels us must still wait for it
        making.add_done_callback(self._endings.discard)
        try:
            window = await asyncio.shield(making)
        except asyncio.CancelledError:
            making.add_done_callback(_close_unused)
            raise
        except StartupError as error:
            raise HandshakeRefused(error.message, param="transports") from error
        try:
            async with asyncio.timeout(AUTHENTICATION_TIMEOUT_S):
                await loop.sock_sendall(sock, window.offer)
        except (OSError, TimeoutError) as error:
            window.close()
            raise TransferBroken("the peer did not take the window") from error
        except asyncio.CancelledError:
            _RESERVED.append(window.mapping)  # the peer may have got the address, and nobody waits for its end
            raise
        return NixlReceiverLink(sock, peer, self._landing, self._layout, window, on_end=self._link_ended)

    def _link_ended(self, link: StreamReceiverLink) -> None:
        self._links.discard(link)
        if isinstance(link, NixlReceiverLink):
            burial = asyncio.get_running_loop().create_task(_bury(link.sock, link.window), name="kv-window-end")
            self._endings.add(burial)
            burial.add_done_callback(self._endings.discard)


def _close_unused(making: asyncio.Task[Window]) -> None:
    if not making.cancelled() and making.exception() is None:
        making.result().close()


async def _bury(sock: socket.socket, window: Window) -> None:
    """Returns when nobody writes into the window any more; when cancelled before, its addresses stay taken."""
    mapping = window.mapping
    try:
        await asyncio.to_thread(window.close)
        with contextlib.suppress(OSError):  # an end, too
            while await asyncio.get_running_loop().sock_recv(sock, 4096):
                pass
    except asyncio.CancelledError:
        _RESERVED.append(mapping)
        raise
    finally:
        sock.close()


# -- the prefill side --------------------------------------------------------------------------------------------------


class WindowWriter:
    """Writes batches of pieces into the peer's window. All but `room` and `wake` run in the lane."""

    def __init__(self, agent: NixlAgent, window_address: int, ring: Ring) -> None:
        self._agent = agent
        self._window_address = window_address
        self._ring = ring
        self._changed = threading.Condition()  # of the room in the ring, or of the link
        self._dropped = threading.Event()

    def prepare(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool], send: Send) -> Callable[[], list[bytes]]:
        return partial(self._write, nonce, pieces, stop, send)

    def _write(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool], send: Send) -> list[bytes]:
        digests: list[bytes] = []
        for batch in _batches(pieces):
            if stop():
                break
            batch_digests = [piece_digest(piece.source, nonce, *piece.name) for piece in batch]
            sizes = [piece.source.nbytes for piece in batch]
            offsets = self._take(sizes, stop)
            if offsets is None:
                break
            table = encode_table([piece.name for piece in batch], batch_digests)
            send([Frame(FrameKind.BLOCKS, nonce, len(batch), sum(sizes)).encode(), table])
            self._transfer([piece.source for piece in batch], offsets)
            send([Frame(FrameKind.WRITTEN, nonce, len(batch)).encode(), table])
            digests += batch_digests
        return digests

    def close(self) -> None:
        self._agent.close()

    def room(self, size_bytes: int) -> None:
        """So much of the window is free again."""
        with self._changed:
            self._ring.free_bytes += size_bytes
            self._changed.notify()

    def wake(self) -> None:
        """The link is gone: whoever waits for the peer need not."""
        self._dropped.set()
        with self._changed:
            self._changed.notify()

    def _take(self, sizes: Sequence[int], stop: Callable[[], bool]) -> list[int] | None:
        """Where the pieces go, once there is room for all of them; None if told to stop before that."""
        deadline_s = time.monotonic() + WINDOW_TIMEOUT_S
        with self._changed:
            _, cost_bytes = self._ring.places(sizes)
            while self._ring.free_bytes < cost_bytes:
                if stop():
                    return None
                if not self._changed.wait(deadline_s - time.monotonic()):
                    raise TransferBroken(f"the decode worker took nothing out of its window for {WINDOW_TIMEOUT_S:g} s")
            return self._ring.take(sizes)[0]

    def _transfer(self, sources: Sequence[memoryview], offsets: Sequence[int]) -> None:
        """Returns when the sources are in the window. When it raises, nothing reads them any more: the agent is gone."""
        try:
            done = self._agent.post(
                [(self._agent.address_of(source), source.nbytes) for source in sources],
                [self._window_address + offset for offset in offsets],
            )
            began_s = time.monotonic()
            while not done:
                waited_s = time.monotonic() - began_s
                if self._dropped.is_set():
                    raise TransferBroken("the link was dropped in the middle of a write")
                if waited_s > WRITE_TIMEOUT_S:
                    raise TransferBroken(f"a write into the decode worker's window did not end in {WRITE_TIMEOUT_S:g} s")
                self._dropped.wait(_pause_s(waited_s))
                done = self._agent.finished()
        except TransferBroken:
            self._agent.close()
            raise


class NixlSenderLink(StreamSenderLink):
    def __init__(self, sock: socket.socket, writer: WindowWriter) -> None:
        super().__init__(sock, KIND, writer)
        self._window = writer

    def drop(self, error: HandoffError) -> None:
        super().drop(error)
        self._window.wake()

    def _replied(self, frame: Frame) -> None:
        if frame.kind is FrameKind.CREDIT and frame.nonce == _WINDOW:
            self._window.room(frame.amount)
        else:
            super()._replied(frame)


def _pause_s(waited_s: float) -> float:
    """Until the next look at a write that has been waited for so long: it is noticed late by an eighth of its time at most."""
    return min(waited_s / 8, MAX_PAUSE_S)


def _batches(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Pieces in their order, `BATCH_BYTES` or `MAX_PIECES` at a time; a larger piece goes alone."""
    batch: list[Piece] = []
    batch_bytes = 0
    for piece in pieces:
        if batch and (batch_bytes + piece.source.nbytes > BATCH_BYTES or len(batch) == MAX_PIECES):
            yield batch
            batch, batch_bytes = [], 0
        batch.append(piece)
        batch_bytes += piece.source.nbytes
    if batch:
        yield batch


async def _receive_window(sock: socket.socket) -> tuple[int, int, bytes]:
    """Address and size of the window that the decode side made for us, and what NIXL must know of it."""
    try:
        async with asyncio.timeout(SETUP_TIMEOUT_S):
            magic, address, size_bytes, metadata_bytes = _OFFER.unpack(await _receive(sock, _OFFER.size))
            if magic != _OFFER_MAGIC or not size_bytes or not 0 < metadata_bytes <= MAX_METADATA_BYTES:
                raise TransferBroken("the decode worker did not offer a window")
            return address, size_bytes, await _receive(sock, metadata_bytes)
    except TimeoutError as error:
        raise TransferBroken("the decode worker did not offer a window in time") from error
    except OSError as error:
        raise TransferBroken("the link went away while the window was offered") from error


async def _receive(sock: socket.socket, size: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = bytearray()
    while len(data) < size:
        part = await loop.sock_recv(sock, size - len(data))
        if not part:
            raise TransferBroken("the decode worker hung up while the window was offered")
        data += part
    return bytes(data)


def _agent_name(own: PeerName) -> str:
    """Of one end of one link, never of another."""
    return f"{own.worker_id}#{own.incarnation}-{secrets.token_hex(8)}"
