"""A peer that is not what it says: a socket to a data port of a real decode worker, forged frames and pools to send over it, and
the pool that must not change meanwhile."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from common.types import KVLayout
from kvtransfer.frames import FrameKind
from kvtransfer.incoming import Incoming
from kvtransfer.region import F_ADD_SEALS, F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK
from kvtransfer.ticket import derive_secret
from kvtransfer.transports.authentication import PoolShape, authenticate_as_prefill
from kvtransfer.transports.base import LinkCredentials, PeerName
from support.workers import TOKEN, Workers, request, running_workers
from support.zoo import REMOTE, UNCACHED, Oracle, prompt_of, within

DECODE = PeerName("tiny/decode/0", 1)
PREFILL = PeerName("tiny/prefill/0", 1)
POOL_BLOCKS = 4  # of what a peer hands over as its pool


class Raw:
    """A socket to a data port of the decode worker, and what one may do with it. Over shm it brings a pool of its own, of
    `POOL_BLOCKS` blocks, each with bytes unlike the others'."""

    def __init__(self, sock: socket.socket, workers: Workers) -> None:
        self.sock = sock
        self._workers = workers
        block_bytes = layout_of(workers).block_bytes
        self.pool = memoryview(b"".join(bytes([0xA0 + number]) * block_bytes for number in range(POOL_BLOCKS)))

    async def send(self, data: bytes) -> None:
        """As much as the other end takes: it may hang up at any byte."""
        try:
            await within(asyncio.get_running_loop().sock_sendall(self.sock, data))
        except (BrokenPipeError, ConnectionResetError):
            return

    async def receive(self, size: int = 65_536) -> bytes:
        try:
            return await within(asyncio.get_running_loop().sock_recv(self.sock, size))
        except ConnectionResetError:
            return b""

    async def until_hung_up(self) -> None:
        while await self.receive():
            continue

    async def introduce(self, token: str = TOKEN, name: PeerName = PREFILL) -> None:
        layout = layout_of(self._workers)
        credentials = LinkCredentials(name, layout.fingerprint, derive_secret(token))
        shape = PoolShape(self._workers.decode._handoff._region.num_blocks, layout.block_bytes)
        await authenticate_as_prefill(self.sock, credentials, DECODE, shape)

    async def authenticate(self, token: str = TOKEN, name: PeerName = PREFILL) -> None:
        await self.introduce(token, name)
        if self.sock.family == socket.AF_UNIX:
            fd = sealed(self.pool)
            socket.send_fds(self.sock, [b"F"], [fd])
            os.close(fd)

    async def open(self, nonce: bytes) -> FrameKind:
        """Asks to be let in; the answer."""
        await self.send(forged_header(FrameKind.OPEN, nonce))
        return await self.answer()

    async def answer(self) -> FrameKind:
        """The next one that is not about what was offered."""
        while (kind := struct.unpack("<4sHH16sII", await self.receive(32))[2]) == FrameKind.TAKEN:
            continue
        return FrameKind(kind)


def sealed(content: bytes | memoryview, seals: int = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) -> int:
    """A descriptor of memory with this content."""
    fd = os.memfd_create("forged", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    if seals:
        fcntl.fcntl(fd, F_ADD_SEALS, seals)
    return fd


def layout_of(workers: Workers) -> KVLayout:
    return workers.decode._host.engine.layout


def pool_of(workers: Workers, but: Sequence[int] = ()) -> bytes:
    pool, block_bytes = bytearray(workers.decode._host.engine.pool.buffer), layout_of(workers).block_bytes
    for block in but:
        pool[block * block_bytes : (block + 1) * block_bytes] = bytes(block_bytes)
    return bytes(pool)


@asynccontextmanager
async def raw(workers: Workers, kind: str) -> AsyncIterator[Raw]:
    (address,) = [offer.address for offer in workers.decode._handoff._offers if offer.kind == kind]
    if kind == "shm":
        sock, where = socket.socket(socket.AF_UNIX), "\0" + address
    else:
        host, _, port = address.rpartition(":")
        sock, where = socket.socket(), (host, int(port))  # type: ignore[assignment]
    with sock:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, where)
        yield Raw(sock, workers)


@asynccontextmanager
async def untouched(model_path: Path, oracle: Oracle, but: Sequence[int] = ()) -> AsyncIterator[Workers]:
    """Workers over both kinds of link; afterwards not a byte of the pool has changed, `but` of these blocks, and they serve as
    before."""
    async with running_workers(model_path, engine=UNCACHED, decode=REMOTE) as workers:
        work = request(prompt_of(70, 130), max_tokens=4)
        assert oracle.agrees(work, await workers.generate(work))
        await workers.assert_nothing_leaks()  # the step after an answer's last writes as well
        before = pool_of(workers, but)
        yield workers
        assert pool_of(workers, but) == before
        assert oracle.agrees(work, await within(workers.generate(work)))
        await workers.assert_nothing_leaks()


# -- frames ------------------------------------------------------------------------------------------------------------


def forged_header(kind: int, nonce: bytes, count: int = 0, amount: int = 0, *, magic: bytes = b"PDKV", version: int = 3) -> bytes:
    return struct.pack("<4sHH16sII", magic, version, kind, nonce, count, amount)


def forged_table(*names: tuple[int, int, int], digests: Sequence[bytes] | None = None) -> bytes:
    return b"".join(
        struct.pack("<IHH16s", *name, digest) for name, digest in zip(names, digests or [bytes(16)] * len(names), strict=True)
    )


def forged_ready(nonce: bytes, *placed: tuple[int, int, int, int], count: int | None = None) -> bytes:
    table = b"".join(struct.pack("<IHHQ", *one) for one in placed)
    return forged_header(FrameKind.READY, nonce, len(placed) if count is None else count) + table


def forged_written(nonce: bytes, *names: tuple[int, int, int], digests: Sequence[bytes] | None = None) -> bytes:
    return forged_header(FrameKind.WRITTEN, nonce, len(names)) + forged_table(*names, digests=digests)


Forge = Callable[[bytes, KVLayout, int], bytes]
"""(nonce, layout, the kind of frame that brings the first word of data on this link) -> what is sent."""


def open_transfer(workers: Workers, blocks: tuple[int, ...]) -> Incoming:
    """Blocks that the engine does not use now."""
    return workers.decode._handoff._receiver.open(
        request_id="forged",
        attempt=1,
        prefill=workers.prefill_refs[0],
        first_block=0,
        blocks=blocks,
        num_tokens=16 * len(blocks),
        ttl_s=60.0,
    )


async def nobody_to_ask() -> None:
    return
