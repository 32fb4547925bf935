"""The pool of a peer on this host, mapped for reading.

    p: descriptor of its pool, opened anew for reading ---- SCM_RIGHTS ---->  d: `PeerPool`, until the link ends

The descriptor lets nobody write, and the memory has seals: its size stays, so that reading it cannot fail (SIGBUS). It outlives
the peer: what is mapped is there until it is unmapped, whatever it contains by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import mmap
import os
import socket

import numpy as np

from common.errors import TransferBroken
from kvtransfer.region import F_SEAL_GROW, F_SEAL_SHRINK, use_huge_pages
from kvtransfer.transports.authentication import AUTHENTICATION_TIMEOUT_S

F_GET_SEALS = 1034
_DESCRIPTOR_FOLLOWS = b"F"


class PeerPool:
    """`close` once nothing reads it any more."""

    def __init__(self, fd: int) -> None:
        """`fd` stays the caller's. Raises TransferBroken for what is not such a pool."""
        try:
            size_bytes = os.fstat(fd).st_size
            seals = fcntl.fcntl(fd, F_GET_SEALS)
            self._mapping = mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
            self._mapping.madvise(mmap.MADV_DONTFORK)
        except (OSError, ValueError) as error:
            raise TransferBroken("the prefill worker's pool cannot be mapped") from error
        if ~seals & (F_SEAL_SHRINK | F_SEAL_GROW):
            self._mapping.close()
            raise TransferBroken("the prefill worker's pool may change its size")
        use_huge_pages(self._mapping)
        self.bytes = memoryview(self._mapping)
        self.address = int(np.frombuffer(self.bytes, np.uint8).ctypes.data)  # ctypes takes no address of what is read-only

    def close(self) -> None:
        """Idempotent. The mapping goes with the last view of it."""
        self.bytes.release()
        with contextlib.suppress(BufferError):
            self._mapping.close()


def give_pool(sock: socket.socket, fd: int) -> None:
    """To a peer that may read it. Raises TransferBroken."""
    try:
        readable = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            socket.send_fds(sock, [_DESCRIPTOR_FOLLOWS], [readable])
        finally:
            os.close(readable)
    except OSError as error:
        raise TransferBroken("the decode worker did not take the pool's descriptor") from error


async def receive_pool(sock: socket.socket) -> PeerPool:
    """What the other end gives. Raises TransferBroken."""
    fd = await _receive_descriptor(sock)
    try:
        return PeerPool(fd)
    finally:
        os.close(fd)


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
        raise TransferBroken("the prefill worker did not hand over its pool in time") from error
    finally:
        loop.remove_reader(sock)
    try:
        data, descriptors, _, _ = socket.recv_fds(sock, len(_DESCRIPTOR_FOLLOWS), 1, socket.MSG_CMSG_CLOEXEC)
    except OSError as error:
        raise TransferBroken("the link went away while the pool was handed over") from error
    if data != _DESCRIPTOR_FOLLOWS or len(descriptors) != 1:
        for descriptor in descriptors:
            os.close(descriptor)
        raise TransferBroken("the prefill worker did not hand over its pool")
    return descriptors[0]
