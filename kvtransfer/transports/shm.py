"""Two processes on one host: the prefill worker maps the decode worker's pool and copies blocks into it.

    d                                                        p
    abstract Unix socket (no file)           <-------------  connect, authenticate
    the pool's descriptor (SCM_RIGHTS)       ------------->  mmap
    pool block  <==== one memcpy per block ================  source block
    digest of the pool's block == digest?    <-- WRITTEN --  digest of the source block

The writer cannot be fenced: d's blocks stay in quarantine until p says CLOSE or its socket ends. A process that dies loses its
mapping before its sockets, and a link that is closed unmaps first; a fork of p inherits no mapping.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import secrets
import socket
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from common.errors import HandshakeRefused, StartupError, TransferBroken
from kvtransfer.digest import block_digest
from kvtransfer.frames import Frame, FrameKind
from kvtransfer.region import BlockRegion, use_huge_pages
from kvtransfer.transports.authentication import AUTHENTICATION_TIMEOUT_S, PoolShape, authenticate_as_prefill
from kvtransfer.transports.base import Landing, LinkCredentials, Listener, PeerName, Piece, SenderLink
from kvtransfer.transports.receiving import StreamListener
from kvtransfer.transports.sending import Send, StreamSenderLink

KIND = "shm"
BACKLOG = 64
_DESCRIPTOR_FOLLOWS = b"F"


class ShmTransport:
    def can_serve(self, region: BlockRegion) -> bool:
        return region.fd is not None

    async def listen(self, landing: Landing, credentials: LinkCredentials, region: BlockRegion, host: str) -> Listener:
        fd = region.fd
        if fd is None:
            raise StartupError("the KV pool has no descriptor: other processes cannot map it", param="transports")

        async def give_descriptor(sock: socket.socket) -> None:
            try:
                socket.send_fds(sock, [_DESCRIPTOR_FOLLOWS], [fd])
            except OSError as error:
                raise TransferBroken("the peer did not take the pool's descriptor") from error

        name = f"pdserve-kv-{secrets.token_hex(16)}"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.bind("\0" + name)
            sock.listen(BACKLOG)
        except OSError as error:
            sock.close()
            raise StartupError(f"no Unix socket for KV transfer: {error.strerror}", param="transports") from error
        return StreamListener(
            sock, name, landing, credentials, region, kind=KIND, data_kind=FrameKind.WRITTEN, introduce=give_descriptor
        )

    async def connect(
        self, address: str, credentials: LinkCredentials, peer: PeerName, *, pool_blocks: int, block_bytes: int
    ) -> SenderLink:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            try:
                async with asyncio.timeout(AUTHENTICATION_TIMEOUT_S):
                    await asyncio.get_running_loop().sock_connect(sock, "\0" + address)
            except (OSError, ValueError) as error:
                raise TransferBroken("no decode worker on this host listens at the offered address") from error
            await authenticate_as_prefill(sock, credentials, peer, PoolShape(pool_blocks, block_bytes))
            fd = await _receive_descriptor(sock)
            try:
                writer = MappedWriter(fd, pool_blocks, block_bytes)
            finally:
                os.close(fd)
            return StreamSenderLink(sock, KIND, writer, block_bytes=block_bytes)
        except BaseException:
            sock.close()
            raise


class MappedWriter:
    """The decode worker's pool in our address space."""

    def __init__(self, fd: int, pool_blocks: int, block_bytes: int) -> None:
        if os.fstat(fd).st_size != pool_blocks * block_bytes:
            raise HandshakeRefused("the decode worker's pool has another size than it announced", param="pool_blocks")
        try:
            self._mapping = mmap.mmap(fd, pool_blocks * block_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            self._mapping.madvise(mmap.MADV_DONTFORK)
        except OSError as error:
            raise TransferBroken("the decode worker's pool cannot be mapped") from error
        use_huge_pages(self._mapping)
        self._pool: npt.NDArray[np.uint8] = np.frombuffer(self._mapping, dtype=np.uint8)
        self._block_bytes = block_bytes

    def write(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool], send: Send) -> list[bytes]:
        digests: list[bytes] = []
        for piece in pieces:
            if stop():
                break
            digest = block_digest(piece.source, nonce, piece.logical_block)
            start = piece.destination_block * self._block_bytes
            # copyto lets go of the GIL; it raises if the sizes differ.
            np.copyto(self._pool[start : start + self._block_bytes], np.frombuffer(piece.source, dtype=np.uint8))
            send([Frame(FrameKind.WRITTEN, nonce, piece.logical_block, digest=digest).encode()])
            digests.append(digest)
        return digests

    def close(self) -> None:
        del self._pool
        self._mapping.close()


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
