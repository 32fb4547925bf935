"""A pool that is handed to a peer for reading: what it is for, and what is refused."""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import socket
from collections.abc import Iterator

import pytest

from common.errors import TransferBroken
from kvtransfer.region import F_ADD_SEALS, F_SEAL_SHRINK, BlockRegion
from kvtransfer.transports import peer_pool
from kvtransfer.transports.peer_pool import PeerPool, give_pool, receive_pool

SIZE_BYTES = 4 * mmap.PAGESIZE


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    near.setblocking(False)
    far.setblocking(False)
    yield near, far
    near.close()
    far.close()


@pytest.fixture
def region() -> Iterator[BlockRegion]:
    region = BlockRegion.create_shared(mmap.PAGESIZE, 4)
    yield region
    region.close()


async def test_what_is_written_here_is_read_there(sockets: tuple[socket.socket, socket.socket], region: BlockRegion) -> None:
    near, far = sockets
    assert region.fd is not None
    give_pool(near, region.fd)
    near.send(b"next")
    pool = await receive_pool(far)
    region.buffer[5:8] = b"abc"
    assert (bytes(pool.bytes[5:8]), pool.bytes.nbytes) == (b"abc", SIZE_BYTES)
    assert far.recv(10) == b"next", "what follows is somebody else's"
    region.close()
    assert bytes(pool.bytes[5:8]) == b"abc", "it outlives its owner"
    pool.close()
    pool.close()


async def test_a_view_keeps_the_memory(sockets: tuple[socket.socket, socket.socket], region: BlockRegion) -> None:
    assert region.fd is not None
    give_pool(sockets[0], region.fd)
    region.buffer[0] = 7
    pool = await receive_pool(sockets[1])
    view = pool.bytes[:10]
    pool.close()
    assert view[0] == 7


async def test_the_peer_cannot_write(sockets: tuple[socket.socket, socket.socket], region: BlockRegion) -> None:
    near, far = sockets
    assert region.fd is not None
    give_pool(near, region.fd)
    _, (fd,), _, _ = socket.recv_fds(far, 1, 1)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, SIZE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(fd, b"x")
    pool = PeerPool(fd)
    assert pool.bytes.readonly
    pool.close()
    os.close(fd)


def _unsealed() -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE_BYTES)
    return fd


def _may_grow() -> int:
    fd = _unsealed()
    fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)
    return fd


def _empty() -> int:
    return os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def _pipe() -> int:
    reading, writing = os.pipe()
    os.close(writing)
    return reading


def _file() -> int:
    return os.open("/proc/self/exe", os.O_RDONLY | os.O_CLOEXEC)


@pytest.mark.parametrize("make", [_unsealed, _may_grow, _empty, _pipe, _file])
async def test_other_descriptors_are_refused(sockets: tuple[socket.socket, socket.socket], make: object) -> None:
    """Of memory that can shrink, whoever reads it may die."""
    near, far = sockets
    assert callable(make)
    fd = make()
    socket.send_fds(near, [b"F"], [fd])
    os.close(fd)
    descriptors_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(TransferBroken):
        await receive_pool(far)
    assert len(os.listdir("/proc/self/fd")) == descriptors_before


async def test_no_descriptor_and_the_end_are_refused(sockets: tuple[socket.socket, socket.socket]) -> None:
    near, far = sockets
    near.send(b"F")
    with pytest.raises(TransferBroken):
        await receive_pool(far)
    near.close()
    with pytest.raises(TransferBroken):
        await receive_pool(far)


async def test_another_greeting_is_refused_and_its_descriptor_closed(
    sockets: tuple[socket.socket, socket.socket], region: BlockRegion
) -> None:
    near, far = sockets
    assert region.fd is not None
    socket.send_fds(near, [b"G"], [region.fd])
    descriptors_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(TransferBroken):
        await receive_pool(far)
    assert len(os.listdir("/proc/self/fd")) == descriptors_before


async def test_who_gives_nothing_is_not_waited_for(
    sockets: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_pool, "AUTHENTICATION_TIMEOUT_S", 0.01)
    with pytest.raises(TransferBroken, match="in time"):
        async with asyncio.timeout(60):
            await receive_pool(sockets[1])
