"""Two processes on one host: the prefill worker maps the decode worker's pool and copies blocks into it.

    d                                                        p
    host, abstract Unix socket (no file)     <-------------  the same host? connect, authenticate
    the pool's descriptor (SCM_RIGHTS)       ------------->  mmap
    pool  <========= one pass over each piece ============  source blocks
    digests of what is in the pool == ?      <-- WRITTEN --  digests of the sources, many pieces in one frame

The writer cannot be fenced: d's blocks stay in quarantine until p says CLOSE or its socket ends. A process that dies loses its
mapping before its sockets, and a link that is closed unmaps first; a fork of p inherits no mapping.

What is there is announced, and checked by d, while the rest is still being copied; the first announcement is small, for d waits
for it, and the last ones are, for they are checked when nothing else is left to do. Where there is a compiled library
(`kvtransfer.native`), it copies and digests in the same pass and announces, many pieces in one call; where there is none, a large
batch is copied by two threads, the lane and a helper.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial

from common.errors import HandshakeRefused, StartupError, TransferBroken
from common.types import KVLayout
from kvtransfer.digest import piece_digest
from kvtransfer.first_touch import FirstTouch
from kvtransfer.frames import MAX_PIECES, Frame, FrameKind, encode_table
from kvtransfer.host_identity import this_host
from kvtransfer.native.choice import piece_kernel
from kvtransfer.native.writing import write_natively
from kvtransfer.region import BlockRegion, use_huge_pages
from kvtransfer.spans import address_of, columns_of
from kvtransfer.transports.authentication import AUTHENTICATION_TIMEOUT_S, PoolShape, authenticate_as_prefill
from kvtransfer.transports.base import Landing, LinkCredentials, Listener, PeerName, Piece, SenderLink
from kvtransfer.transports.listening import StreamListener
from kvtransfer.transports.sending import Send, SocketSend, StreamSenderLink
from kvtransfer.transports.unix_socket import connect_to, listen_at

KIND = "shm"
PART_BYTES = 256 * 1024  # copied at once, and digested while in a core's cache; a larger piece by itself
ANNOUNCED_SHARE = 2  # of what is left, so much is announced at once, down to a part
LEAST_ANNOUNCED_BYTES = 768 * 1024  # where many pieces take one call: whoever reads has more to do for each announcement
MAX_ANNOUNCED_BYTES = 3 * 1024 * 1024
WORTH_HELPING_BYTES = 1024 * 1024  # below it one thread is done before another one is awake
LARGE_PIECE_BYTES = 64 * 1024  # below it there is more to do for the interpreter, which has one thread at a time
_DESCRIPTOR_FOLLOWS = b"F"


class ShmTransport:
    def can_serve(self, region: BlockRegion) -> bool:
        return region.fd is not None

    async def listen(
        self, landing: Landing, credentials: LinkCredentials, region: BlockRegion, layout: KVLayout, host: str
    ) -> Listener:
        fd = region.fd
        if fd is None:
            raise StartupError("the KV pool has no descriptor: other processes cannot map it", param="transports")

        async def give_descriptor(sock: socket.socket) -> None:
            try:
                socket.send_fds(sock, [_DESCRIPTOR_FOLLOWS], [fd])
            except OSError as error:
                raise TransferBroken("the peer did not take the pool's descriptor") from error

        name = f"{this_host()}/pdserve-kv-{secrets.token_hex(16)}"
        sock = listen_at(name)
        return StreamListener(
            sock, name, landing, credentials, region, layout, kind=KIND, data_kind=FrameKind.WRITTEN, introduce=give_descriptor
        )

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
        host, _, _ = address.partition("/")
        if host != this_host():
            raise TransferBroken("the decode worker is on another host")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            await connect_to(sock, address)
            await authenticate_as_prefill(sock, credentials, peer, PoolShape(pool_blocks, layout.block_bytes))
            fd = await _receive_descriptor(sock)
            try:
                writer = MappedWriter(fd, pool_blocks * layout.block_bytes)
            finally:
                os.close(fd)
            return StreamSenderLink(sock, KIND, writer)
        except BaseException:
            sock.close()
            raise


class MappedWriter:
    """The decode worker's pool in our address space."""

    def __init__(self, fd: int, pool_bytes: int) -> None:
        if os.fstat(fd).st_size != pool_bytes:
            raise HandshakeRefused("the decode worker's pool has another size than it announced", param="pool_blocks")
        try:
            self._mapping = mmap.mmap(fd, pool_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            self._mapping.madvise(mmap.MADV_DONTFORK)
        except OSError as error:
            raise TransferBroken("the decode worker's pool cannot be mapped") from error
        use_huge_pages(self._mapping)
        self._pool_bytes = pool_bytes
        self._pool_address = address_of(memoryview(self._mapping))
        self._touching = FirstTouch(self._pool_address, pool_bytes)
        self._helper = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kv-copy-shm")

    def prepare(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool], send: Send) -> Callable[[], list[bytes]]:
        kernel = piece_kernel()
        columns = columns_of(pieces)
        sizes_bytes = columns.sizes_bytes
        if kernel is None or not isinstance(send, SocketSend) or min(sizes_bytes, default=0) < kernel.least_bytes:
            return partial(self._write_here, _Batch(nonce, pieces, stop, send)) if pieces else list
        first_bytes, end_bytes = columns.reach()
        self._check(first_bytes, end_bytes - first_bytes)
        ends = announcements(len(pieces), sizes_bytes[0])
        packed = columns.packed(self._pool_address)
        return partial(write_natively, kernel, send, FrameKind.WRITTEN, nonce, packed, sizes_bytes, ends, stop)

    def _write_here(self, batch: _Batch) -> list[bytes]:
        """Parts are taken in order, and finished once they are taken: so after a stop the first few pieces are written."""
        worth_helping = batch.piece_bytes >= LARGE_PIECE_BYTES and batch.size_bytes >= WORTH_HELPING_BYTES
        helping = self._helper.submit(batch.write, self._copy) if worth_helping else None
        try:
            batch.write(self._copy)
        finally:
            if helping is not None:
                helping.result()  # only now are the sources not read any more
        return [digest for digest in batch.digests if digest]

    def _copy(self, pieces: Sequence[Piece], nonce: bytes) -> list[bytes]:
        """The pieces' digests. Copies without the GIL."""
        for offset_bytes, address, size_bytes in _runs(pieces):  # one memcpy for each run of neighbours
            self._check(offset_bytes, size_bytes)
            ctypes.memmove(self._pool_address + offset_bytes, address, size_bytes)
        return [piece_digest(source, nonce, *name) for name, _, source in pieces]  # they are in this core's cache now

    def _check(self, offset_bytes: int, size_bytes: int) -> None:
        if not 0 <= offset_bytes <= self._pool_bytes - size_bytes:
            raise IndexError(f"{size_bytes} bytes at {offset_bytes} of a pool of {self._pool_bytes}")

    def close(self) -> None:
        self._touching.end()
        self._helper.shutdown()
        self._mapping.close()


Copy = Callable[[Sequence[Piece], bytes], list[bytes]]


class _Batch:
    """Pieces that one or two threads copy, a part at a time, and announce."""

    def __init__(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool], send: Send) -> None:
        self.piece_bytes = pieces[0].source.nbytes  # most pieces of a batch are alike
        self.size_bytes = self.piece_bytes * len(pieces)
        self.digests = [b""] * len(pieces)  # of those that were written
        self._nonce = nonce
        self._pieces = pieces
        self._stop = stop
        self._send = send
        self._part = min(max(PART_BYTES // self.piece_bytes, 1), MAX_PIECES)  # pieces that are copied at once
        # A step of it is one for the interpreter: no two threads get the same.
        self._starts = iter(range(0, len(pieces), self._part))
        self._announcing = threading.Lock()

    def write(self, copy: Copy) -> None:
        """Until nothing is left to take."""
        mine: list[int] = []  # written and not announced
        while not self._stop() and (start := next(self._starts, None)) is not None:
            written = copy(self._pieces[start : start + self._part], self._nonce)
            for index, digest in enumerate(written, start):
                self.digests[index] = digest
                mine.append(index)
            if len(mine) >= self._worth_announcing(start) or len(mine) + self._part > MAX_PIECES:
                self._announce(mine)
                mine.clear()
        if mine:
            self._announce(mine)

    def _worth_announcing(self, start: int) -> int:
        """Pieces, when the part at `start` was the last one that was taken. Whoever reads waits for the first."""
        return _worth_announcing(len(self._pieces) - start if start else 0, self._part, self.piece_bytes)

    def _announce(self, indexes: Sequence[int]) -> None:
        names, digests = [self._pieces[index].name for index in indexes], [self.digests[index] for index in indexes]
        with self._announcing:
            self._send([Frame(FrameKind.WRITTEN, self._nonce, count=len(indexes)).encode() + encode_table(names, digests)])


@lru_cache(maxsize=256)
def announcements(num_pieces: int, piece_bytes: int) -> tuple[int, ...]:
    """Before which pieces an announcement is made, the last one's included, where one thread copies."""
    part = max(LEAST_ANNOUNCED_BYTES // piece_bytes, 1)
    ends: list[int] = []
    while (done := ends[-1] if ends else 0) < num_pieces:
        pieces = min(max(_worth_announcing(num_pieces - done if done else 0, part, piece_bytes), 1), MAX_PIECES)
        ends.append(min(done + pieces, num_pieces))
    return tuple(ends)


def _worth_announcing(pieces_left: int, part: int, piece_bytes: int) -> int:
    """Pieces, where so many are left to write; 0: nothing was announced."""
    return min(max(pieces_left // ANNOUNCED_SHARE, part), MAX_ANNOUNCED_BYTES // piece_bytes)


def _runs(pieces: Sequence[Piece]) -> list[tuple[int, int, int]]:
    """Pieces that are neighbours in the source and in the pool, as one: offset in the pool, address of the source, bytes."""
    runs: list[tuple[int, int, int]] = []
    offset_after = address_after = -1
    for _, offset_bytes, source in pieces:
        address, size_bytes = address_of(source), source.nbytes
        if offset_bytes == offset_after and address == address_after:
            first_offset, first_address, run_bytes = runs.pop()
            runs.append((first_offset, first_address, run_bytes + size_bytes))
        else:
            runs.append((offset_bytes, address, size_bytes))
        offset_after, address_after = offset_bytes + size_bytes, address + size_bytes
    return runs


async def _receive_descriptor(sock: socket.socket) -> int:
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()

    def arrived() -> None:
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(sock, arrived)
    try:
        async with asyncio.timeout(AUTHENTICATION_TIMEOUT_S):
            await readable
    except TimeoutError as error:
        raise TransferBroken("the decode worker did not hand over its pool in time") from error
    finally:
        loop.remove_reader(sock)
    try:
        data, descriptors, _, _ = socket.recv_fds(sock, len(_DESCRIPTOR_FOLLOWS), 1, socket.MSG_CMSG_CLOEXEC)
    except OSError as error:
        raise TransferBroken("the link went away while the pool was handed over") from error
    if data != _DESCRIPTOR_FOLLOWS or len(descriptors) != 1:
        for descriptor in descriptors:
            os.close(descriptor)
        raise TransferBroken("the decode worker did not hand over its pool")
    return descriptors[0]
