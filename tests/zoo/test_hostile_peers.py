"""Peers that are not what they say: on the data ports, on the calls between workers, and in front of the router."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pickle
import random
import re
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from prometheus_client import CollectorRegistry
from pydantic import ValidationError
from starlette.routing import Route

from common.config import RouterConfig, pdserve_home
from common.errors import AuthenticationFailed, HandshakeRefused, StartupError, TransferBroken
from common.rpc import connect
from common.tokenizer import Tokenizer
from common.types import KVLayout, Role
from common.wire import inference_pb2, worker_pb2
from decode_worker.server import DecodeWorker
from kvtransfer.digest import piece_digest
from kvtransfer.frames import MAX_PIECES, Frame, FrameKind, encode_table
from kvtransfer.incoming import Incoming
from kvtransfer.native.choice import piece_kernel, prepare
from kvtransfer.region import F_ADD_SEALS, F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK
from kvtransfer.ticket import derive_secret
from kvtransfer.transports.authentication import (
    LINK_VERSION,
    Hello,
    PoolShape,
    authenticate_as_prefill,
    prefill_proof,
)
from kvtransfer.transports.base import LinkCredentials, PeerName, PieceName
from prefill_worker.server import PrefillWorker
from router.console.actions import Actions
from router.console.pages import Pages
from router.http_app import build_app
from router.http_edge import OPEN_PATHS
from support.fake_cluster import fake_cluster, make_tokenizer_folder
from support.planted_links import Plants
from support.workers import TOKEN, Workers, request, running_workers
from support.zoo import (
    REMOTE,
    UNCACHED,
    Oracle,
    another_decode,
    another_prefill,
    ending,
    prompt_of,
    until,
    within,
)

DECODE = PeerName("tiny/decode/0", 1)
PREFILL = PeerName("tiny/prefill/0", 1)


POOL_BLOCKS = 4


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
        await self.send(_header(FrameKind.OPEN, nonce))
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


def _header(kind: int, nonce: bytes, count: int = 0, amount: int = 0, *, magic: bytes = b"PDKV", version: int = 3) -> bytes:
    return struct.pack("<4sHH16sII", magic, version, kind, nonce, count, amount)


def _table(*names: tuple[int, int, int], digests: Sequence[bytes] | None = None) -> bytes:
    return b"".join(
        struct.pack("<IHH16s", *name, digest) for name, digest in zip(names, digests or [bytes(16)] * len(names), strict=True)
    )


def _ready(nonce: bytes, *placed: tuple[int, int, int, int], count: int | None = None) -> bytes:
    table = b"".join(struct.pack("<IHHQ", *one) for one in placed)
    return _header(FrameKind.READY, nonce, len(placed) if count is None else count) + table


def _written(nonce: bytes, *names: tuple[int, int, int], digests: Sequence[bytes] | None = None) -> bytes:
    return _header(FrameKind.WRITTEN, nonce, len(names)) + _table(*names, digests=digests)


Forge = Callable[[bytes, KVLayout, int], bytes]
"""(nonce, layout, the kind of frame that brings the first word of data on this link) -> what is sent."""
BREAKING: dict[str, Forge] = {
    "no magic": lambda nonce, layout, data: _header(FrameKind.OPEN, nonce, magic=b"HTTP"),
    "another version": lambda nonce, layout, data: _header(FrameKind.OPEN, nonce, version=2),
    "an unknown kind": lambda nonce, layout, data: _header(99, nonce),
    "no pieces": lambda nonce, layout, data: _header(data, nonce, 0, layout.block_bytes),
    "too many pieces": lambda nonce, layout, data: _header(data, nonce, MAX_PIECES + 1, 1),
    "all the pieces there are": lambda nonce, layout, data: _header(data, nonce, 2**32 - 1, 2**32 - 1),
    "a payload without bytes": lambda nonce, layout, data: _header(FrameKind.BLOCKS, nonce, 1, 0),
    "a payload without end": lambda nonce, layout, data: _header(FrameKind.BLOCKS, nonce, 1, 2**32 - 1),
    "more payload than pieces": lambda nonce, layout, data: (
        _header(FrameKind.BLOCKS, nonce, 1, 2 * layout.block_bytes) + _table((0, 0, layout.num_layers))
    ),
    "less payload than pieces": lambda nonce, layout, data: (
        _header(FrameKind.BLOCKS, nonce, 2, layout.block_bytes) + _table((0, 0, layout.num_layers), (1, 0, layout.num_layers))
    ),
    "layers that are not there": lambda nonce, layout, data: (
        _ready(nonce, (0, 65_535, 65_535, 0))
        if data == FrameKind.READY
        else _header(data, nonce, 1, layout.block_bytes) + _table((0, 65_535, 65_535))
    ),
    "no layers": lambda nonce, layout, data: (
        _ready(nonce, (0, 0, 0, 0))
        if data == FrameKind.READY
        else _header(data, nonce, 1, layout.block_bytes) + _table((0, 0, 0))
    ),
    "digests of what is not here": lambda nonce, layout, data: _written(nonce, (0, 0, layout.num_layers)),
    "a grant": lambda nonce, layout, data: _header(FrameKind.GRANT, nonce, 0, 1000),
    "a refusal": lambda nonce, layout, data: _header(FrameKind.REFUSE, nonce, 0, 1),
    "credit": lambda nonce, layout, data: _header(FrameKind.CREDIT, nonce, 0, 2**32 - 1),
    "an amount where none is": lambda nonce, layout, data: _header(FrameKind.CLOSE, nonce, 0, 7),
    "what a decode worker took": lambda nonce, layout, data: _header(FrameKind.TAKEN, nonce, 0, 1),
    "noise": lambda nonce, layout, data: random.Random(5).randbytes(300_000),
}


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


@pytest.mark.parametrize("kind", ["tcp", "shm"])
async def test_z33_forged_frames_of_an_authenticated_peer(model_path: Path, oracle: Oracle, kind: str) -> None:
    """Z33, CVE-2026-103764. There: the transport believed address and size in a header: anybody could read and write memory.
    Ours: no address travels; what does not fit in kind, count or size ends the link before anything is allocated or read for it,
    also within a transfer that was granted; the pool stays as it is."""
    data = FrameKind.BLOCKS if kind == "tcp" else FrameKind.READY
    async with untouched(model_path, oracle) as workers:
        layout = layout_of(workers)
        blocks = tuple(range(100, 104))
        for name, forge in BREAKING.items():
            incoming = open_transfer(workers, blocks)
            async with raw(workers, kind) as peer:
                await peer.authenticate()
                await peer.send(Frame(FrameKind.OPEN, incoming.ticket.nonce).encode())
                assert await peer.receive(32), name
                await peer.send(forge(incoming.ticket.nonce, layout, data))
                await within(peer.until_hung_up())
            failure = await within(incoming.wait_failed())
            assert isinstance(failure, TransferBroken), name
            assert await within(incoming.abandon(nobody_to_ask)) == blocks
        assert workers.decode._handoff.leases().open == 0


@pytest.mark.parametrize("kind", ["tcp", "shm"])
async def test_z33_names_that_lead_nowhere(model_path: Path, oracle: Oracle, kind: str) -> None:
    """Z33, CVE-2026-103764. Ours: well-formed frames under a nonce that was never granted, of another link, or for a block that
    is not in the ticket, find no place."""
    async with untouched(model_path, oracle) as workers:
        layout = layout_of(workers)
        incoming = open_transfer(workers, (100, 101))
        whole = [PieceName(0, 0, layout.num_layers)]
        beyond = [PieceName(2**32 - 1, 0, layout.num_layers)]

        def data(nonce: bytes, names: list[PieceName]) -> bytes:
            table = encode_table(names, [bytes(16)] * len(names))
            if kind == "shm":
                return (
                    _ready(nonce, *((*name, 0) for name in names)) + Frame(FrameKind.WRITTEN, nonce, len(names)).encode() + table
                )
            return Frame(FrameKind.BLOCKS, nonce, len(names), layout.block_bytes).encode() + table + b"\xab" * layout.block_bytes

        async with raw(workers, kind) as writer, raw(workers, kind) as other:
            await writer.authenticate()
            await other.authenticate(name=PeerName("tiny/prefill/1", 1))
            nonce = incoming.ticket.nonce
            for who in (bytes(16), b"\xff" * 16):
                await writer.send(Frame(FrameKind.OPEN, who).encode() + data(who, whole) + Frame(FrameKind.CLOSE, who).encode())
                assert await writer.answer() is FrameKind.REFUSE
            assert await other.open(nonce) is FrameKind.REFUSE
            assert await writer.open(nonce) is FrameKind.GRANT
            await other.send(data(nonce, whole) + Frame(FrameKind.CLOSE, nonce).encode() + Frame(FrameKind.OPEN, nonce).encode())
            assert await other.answer() is FrameKind.REFUSE
            assert (incoming.num_blocks, incoming.transfer.writer_open) == (0, True)
            await writer.send(data(nonce, beyond))
            failure = await within(incoming.wait_failed())
            assert failure.code == "TicketRefused"
        assert await within(incoming.abandon(nobody_to_ask)) == (100, 101)


# -- offers over shm ---------------------------------------------------------------------------------------------------


def _beyond(place: Callable[[int], int]) -> Forge:
    """One piece at a place that depends on how large the forger's pool is."""
    return lambda nonce, layout, data: _ready(nonce, (0, 0, layout.num_layers, place(POOL_BLOCKS * layout.block_bytes)))


OFFERS: dict[str, Forge] = {
    "behind the pool": _beyond(lambda pool_bytes: pool_bytes),
    "across its end": _beyond(lambda pool_bytes: pool_bytes - 1),
    "so far that it is in front": _beyond(lambda pool_bytes: 2**64 - 16),
    "as far as can be said": _beyond(lambda pool_bytes: 2**64 - 1),
    "in part behind the pool": lambda nonce, layout, data: _ready(
        nonce, (0, 0, layout.num_layers, 0), (1, 0, layout.num_layers, 2**40)
    ),
    "more than are there": lambda nonce, layout, data: (
        _ready(nonce, (0, 0, layout.num_layers, 0), count=2) + _written(nonce, (0, 0, layout.num_layers))
    ),
    "with an amount": lambda nonce, layout, data: _header(FrameKind.READY, nonce, 1, 5),
    "without pieces": lambda nonce, layout, data: _header(FrameKind.READY, nonce),
    "other pieces stated": lambda nonce, layout, data: (
        _ready(nonce, (0, 0, layout.num_layers, 0)) + _written(nonce, (1, 0, layout.num_layers))
    ),
    "more pieces stated": lambda nonce, layout, data: (
        _ready(nonce, (0, 0, layout.num_layers, 0)) + _written(nonce, (0, 0, layout.num_layers), (1, 0, layout.num_layers))
    ),
    "in another order": lambda nonce, layout, data: (
        _ready(nonce, (0, 0, layout.num_layers, 0), (1, 0, layout.num_layers, 0))
        + _written(nonce, (1, 0, layout.num_layers), (0, 0, layout.num_layers))
    ),
    "in other parts": lambda nonce, layout, data: _ready(nonce, (0, 0, layout.num_layers, 0)) + _written(nonce, (0, 0, 1)),
    "for somebody else": lambda nonce, layout, data: (
        _ready(nonce, (0, 0, layout.num_layers, 0)) + _written(b"\xff" * 16, (0, 0, layout.num_layers))
    ),
}


@pytest.fixture(params=["native", "interpreted"])
def fetching(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who fetches."""
    if request.param == "interpreted":
        monkeypatch.setattr("kvtransfer.transports.fetching.piece_kernel", lambda: None)
    else:
        prepare(pdserve_home() / "kernels", lambda _: None)
        if piece_kernel() is None:
            pytest.skip("no native code on this machine")
    return str(request.param)


async def test_z33_offers_that_are_none(model_path: Path, oracle: Oracle, fetching: str) -> None:
    """Z33, CVE-2026-103764. Ours: over shm an offset into the sender's own pool travels. One that is not in it, and digests of
    anything but what was offered, end the link; nothing is written but blocks of the ticket."""
    blocks = tuple(range(100, 104))
    async with untouched(model_path, oracle, but=blocks) as workers:
        layout = layout_of(workers)
        for name, forge in OFFERS.items():
            incoming = open_transfer(workers, blocks)
            async with raw(workers, "shm") as peer:
                await peer.authenticate()
                assert await peer.open(incoming.ticket.nonce) is FrameKind.GRANT
                await peer.send(forge(incoming.ticket.nonce, layout, FrameKind.READY))
                await within(peer.until_hung_up())
            failure = await within(incoming.wait_failed())
            assert isinstance(failure, TransferBroken), name
            assert incoming.num_blocks == 0, name
            assert await within(incoming.abandon(nobody_to_ask)) == blocks


async def test_z33_what_was_stated_wrongly_is_not_used(model_path: Path, oracle: Oracle, fetching: str) -> None:
    """Z33, CVE-2026-103764. Ours: a digest that the fetched bytes do not have fails the transfer, whenever and however often it
    is stated; and names that are not in the ticket are fetched for nobody."""
    blocks = (100, 101)
    async with untouched(model_path, oracle, but=blocks) as workers:
        layers, block_bytes = layout_of(workers).num_layers, layout_of(workers).block_bytes
        whole = (0, 0, layers)
        for case in ("another digest", "stated twice", "beyond the ticket", "in front of the ticket"):
            incoming = open_transfer(workers, blocks)
            nonce = incoming.ticket.nonce
            async with raw(workers, "shm") as peer:
                await peer.authenticate()
                assert await peer.open(nonce) is FrameKind.GRANT
                right = [piece_digest(peer.pool[:block_bytes], nonce, *whole)]
                await peer.send(
                    {
                        "another digest": _ready(nonce, (*whole, block_bytes)) + _written(nonce, whole, digests=right),
                        "stated twice": _ready(nonce, (*whole, 0)) + 2 * _written(nonce, whole, digests=right),
                        "beyond the ticket": _ready(nonce, (2, 0, layers, 0)) + _written(nonce, (2, 0, layers)),
                        "in front of the ticket": _ready(nonce, (2**32 - 1, 0, 1, 0)) + _written(nonce, (2**32 - 1, 0, 1)),
                    }[case]
                )
                failure = await within(incoming.wait_failed())
                expected = {"another digest": "DigestMismatch", "stated twice": "TransferBroken"}.get(case, "TicketRefused")
                assert failure.code == expected, case
            assert await within(incoming.abandon(nobody_to_ask)) == blocks


@pytest.mark.parametrize("first", ["offered", "sent"])
@pytest.mark.parametrize("again", ["offered", "offered after another OPEN"])
@pytest.mark.parametrize("rest", ["offered", "sent"])
async def test_z33_what_was_verified_is_not_fetched_again(
    model_path: Path, oracle: Oracle, fetching: str, first: str, again: str, rest: str
) -> None:
    """Z33, CVE-2026-103764. Ours: a piece that was verified stays as it is, whatever is offered in its name later, by whichever
    way the first bytes and the rest of the transfer come: a complete transfer has the bytes whose digests were stated."""
    blocks = (100, 101)
    async with untouched(model_path, oracle, but=blocks) as workers:
        layers, block_bytes = layout_of(workers).num_layers, layout_of(workers).block_bytes
        incoming = open_transfer(workers, blocks)
        nonce = incoming.ticket.nonce
        async with raw(workers, "shm") as peer:

            def piece(number: int, how: str) -> bytes:
                name, place = (number, 0, layers), number * block_bytes
                content = peer.pool[place : place + block_bytes]
                digests = [piece_digest(content, nonce, *name)]
                if how == "sent":
                    return _header(FrameKind.BLOCKS, nonce, 1, block_bytes) + _table(name, digests=digests) + bytes(content)
                return _ready(nonce, (*name, place)) + _written(nonce, name, digests=digests)

            await peer.authenticate()
            assert await peer.open(nonce) is FrameKind.GRANT
            await peer.send(piece(0, first))
            await until(lambda: incoming.num_blocks == 1, "the first block is verified")
            if again == "offered after another OPEN":
                await peer.send(_header(FrameKind.OPEN, nonce))
            await peer.send(_ready(nonce, (0, 0, layers, 2 * block_bytes)))
            await peer.send(piece(1, rest))
            await until(lambda: incoming.num_blocks == 2 or incoming.transfer.error is not None, "all is here, or it failed")
            found = pool_of(workers)[100 * block_bytes : 102 * block_bytes]
            assert incoming.transfer.error is not None or found == peer.pool[: 2 * block_bytes]
        assert await within(incoming.abandon(nobody_to_ask)) == blocks


def held_here() -> list[str]:
    """What this process has descriptors and mappings of."""
    links = [entry for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]  # not that of the listing itself
    return [*map(os.readlink, links), *Path("/proc/self/maps").read_text().splitlines()]


async def test_z33_pools_that_are_none(model_path: Path, oracle: Oracle, tmp_path: Path) -> None:
    """Z33, CVE-2026-103764. Ours: what is handed over as a pool is mapped if it is memory whose size stays; whoever hands over
    anything else, or nothing, is hung up on, and no descriptor of it stays here."""
    file = tmp_path / "forged"
    file.write_bytes(bytes(65_536))

    def opened(path: str, flags: int = os.O_RDONLY) -> int:
        return os.open(path, flags | os.O_CLOEXEC)

    def of_a_socket() -> int:
        one, other = socket.socketpair()
        other.close()
        return one.detach()

    forged: dict[str, Callable[[], int]] = {
        "a file": lambda: opened(str(file), os.O_RDWR),
        "a device": lambda: opened("/dev/zero"),
        "a folder": lambda: opened(str(tmp_path)),
        "a socket": of_a_socket,
        "no seals": lambda: sealed(bytes(65_536), seals=0),
        "may shrink": lambda: sealed(bytes(65_536), seals=F_SEAL_GROW),
        "may grow": lambda: sealed(bytes(65_536), seals=F_SEAL_SHRINK),
        "nothing in it": lambda: sealed(b""),
    }
    async with untouched(model_path, oracle) as workers:
        counters = workers.decode._handoff._receiver.counters
        refused = counters.links_refused.total()
        for make in forged.values():
            async with raw(workers, "shm") as peer:
                await peer.introduce()
                fd = make()
                socket.send_fds(peer.sock, [b"F"], [fd])
                os.close(fd)
                await within(peer.until_hung_up())
        for said, number in ((b"F", 0), (b"X", 1)):
            async with raw(workers, "shm") as peer:
                await peer.introduce()
                fds = [sealed(bytes(65_536)) for _ in range(number)]
                socket.send_fds(peer.sock, [said], fds)
                for fd in fds:
                    os.close(fd)
                await within(peer.until_hung_up())
        assert counters.links_refused.total() == refused + len(forged) + 2
        assert not any("forged" in name for name in held_here())


# -- strangers on the data ports ---------------------------------------------------------------------------------------


@pytest.fixture
def bomb(tmp_path: Path) -> Bomb:
    return Bomb(tmp_path / "exploded")


class Bomb:
    """Bytes that make a file when they are unpickled."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace
        self.data = pickle.dumps(self)
        assert not self.exploded
        with pickle.loads(self.data):
            assert self.exploded, "it is a dud"
        trace.unlink()

    def __reduce__(self) -> Any:
        return open, (str(self._trace), "w")

    @property
    def exploded(self) -> bool:
        return self._trace.exists()


@pytest.mark.parametrize("kind", ["tcp", "shm"])
async def test_z33_z34_z38_strangers_learn_nothing_and_change_nothing(
    model_path: Path, oracle: Oracle, bomb: Bomb, kind: str
) -> None:
    """Z33, Z34 and Z38, CVE-2026-103764, -103765, CVE-2025-32444. There: an open socket took pickles and addresses from anybody.
    Ours: who does not prove to hold the cluster's secret, as the worker it claims to be, is hung up on; it is told nothing
    first, its bytes are compared and never interpreted, and others are served meanwhile."""
    async with untouched(model_path, oracle) as workers:
        layout = layout_of(workers)
        hello = Hello(LINK_VERSION, PREFILL, DECODE, layout.fingerprint, bytes(32)).encode()
        frame = Frame(FrameKind.OPEN, bytes(16)).encode()
        endless = struct.pack("<4sHHHQQ32s32s", b"PDLH", LINK_VERSION, 65_535, 65_535, 1, 1, bytes(32), bytes(32))
        for greeting in (
            b"\0" * 4096,
            frame * 40,
            bomb.data * 40,
            b"GET / HTTP/1.1\r\n\r\n" * 40,
            endless,
            random.Random(6).randbytes(4096),
        ):
            async with raw(workers, kind) as stranger:
                await stranger.send(greeting)
                assert await stranger.receive() == b""
        # One that knows names and layout, and not the secret; with a proof that it has seen elsewhere, or of its own making.
        for proof in (bytes(32), bomb.data[:32].ljust(32, b"\0"), prefill_proof(derive_secret("guess"), hello, bytes(32))):
            async with raw(workers, kind) as stranger:
                await stranger.send(hello)
                assert len(await stranger.receive()) == 32
                await stranger.send(proof)
                verdict = await stranger.receive()
                assert len(verdict) == 49
                assert verdict[1:17] == bytes(16), "it learned the shape of the pool"
                assert await stranger.receive() == b""
        async with raw(workers, kind) as stranger:
            with pytest.raises(HandshakeRefused, match="cluster token"):
                await stranger.authenticate("guess")
        # One that holds the secret, but is an earlier life of a worker that is here now.
        async with raw(workers, kind) as stranger:
            with pytest.raises(HandshakeRefused, match="later incarnation"):
                await stranger.authenticate(name=PeerName(PREFILL.worker_id, 0))
        # Silent ones, while an honest worker is served: after this block.
        silent = [raw(workers, kind) for _ in range(20)]
        for one in silent:
            await one.__aenter__()
        work = request(prompt_of(70, 131), max_tokens=4)
        async with another_prefill(workers, worker_id="tiny/prefill/1") as (_, ref):
            before = workers.decode._handoff._receiver.counters.links_refused.total()
            assert before >= 10
            honest = await within(workers.generate(replace(work, prompt_token_ids=tuple(prompt_of(70, 130))), prefill=[ref]))
            assert oracle.agrees(replace(work, prompt_token_ids=tuple(prompt_of(70, 130))), honest)
        for one in silent:
            await one.__aexit__(None, None, None)
        assert not bomb.exploded


# -- strangers on the calls --------------------------------------------------------------------------------------------


def methods_of(module: Any) -> list[tuple[str, bool]]:
    """Every method of every service of a proto file, and whether it streams."""
    return [
        (f"/{service.full_name}/{method.name}", method.server_streaming)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]


async def call_raw(channel: grpc.aio.Channel, path: str, streams: bool, body: bytes) -> grpc.StatusCode:
    """Any bytes to any method."""
    try:
        if streams:
            async for _ in channel.unary_stream(path)(body, timeout=60):
                continue
        else:
            await channel.unary_unary(path)(body, timeout=60)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_z34_every_call_between_workers_asks_for_the_token(model_path: Path, oracle: Oracle) -> None:
    """Z34, CVE-2026-103765. There: a metadata server let anybody register, and redirect KV to himself.
    Ours: whatever a worker serves, it serves to nobody without the cluster's token; this holds for methods yet to be written."""
    async with untouched(model_path, oracle) as workers:
        methods = methods_of(worker_pb2)
        assert len(methods) >= 8
        for ref in (workers.decode_ref, workers.prefill_refs[0]):
            for token in (None, "guess", TOKEN[:-1], ""):
                channel = connect(ref.address, token)
                for path, streams in methods:
                    assert await call_raw(channel, path, streams, b"") is grpc.StatusCode.UNAUTHENTICATED, (path, token)
                await channel.close(None)


async def test_z34_rogue_workers_are_not_let_in(model_path: Path, oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Z34, CVE-2026-103765. Ours: a decode worker without the cluster's token gets no KV from anybody, and a prefill worker
    without it gets no ticket; the honest ones go on."""
    async with untouched(model_path, oracle) as workers:
        async with another_prefill(workers, worker_id="tiny/prefill/1", cluster_token="rogue") as (rogue, ref):
            found = await ending(workers, request(prompt_of(70, 132)), [ref])
            assert isinstance(found, AuthenticationFailed)
            assert rogue._scheduler.totals.computed_tokens == 0
        computed = workers.prefill[0]._scheduler.totals.computed_tokens
        workers.decode._spec, honest = replace(workers.decode._spec, cluster_token="rogue"), workers.decode._spec
        monkeypatch.setattr("support.zoo.TOKEN", "rogue")
        async with another_decode(workers, "tiny/decode/9") as theirs:
            workers.decode._spec = honest
            assert isinstance(await ending(theirs, request(prompt_of(70, 133))), AuthenticationFailed)
        assert workers.prefill[0]._scheduler.totals.computed_tokens == computed
        assert set(workers.prefill[0]._handoff._sender._peers) == {"tiny/decode/0"}


async def test_z36_z38_pickles_are_bytes(model_path: Path, oracle: Oracle, plants: Plants, bomb: Bomb) -> None:
    """Z36 and Z38, CVE-2026-105192, CVE-2025-32444. There: what came over the wire was unpickled, and so was run.
    Ours: no port unpickles anything, from strangers or from those who hold the token: on the calls it is no message, or a field's
    value; on the data ports it is no frame, or the content of a block whose digest is wrong. (That no such code exists is
    the business of tests/test_unsafe_primitives.py.)"""
    async with untouched(model_path, oracle) as workers:
        for ref in (workers.decode_ref, workers.prefill_refs[0]):
            host, _, port = ref.address.rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(bomb.data * 50)
            writer.write_eof()
            await within(reader.read(-1))
            writer.close()
            await writer.wait_closed()
            channel = connect(ref.address, TOKEN)
            for path, streams in methods_of(worker_pb2):
                if "Drain" not in path:  # which takes any bytes for "now"
                    assert await call_raw(channel, path, streams, bomb.data) is not grpc.StatusCode.OK, path
            await channel.close(None)
        for kind in ("tcp", "shm"):
            async with raw(workers, kind) as peer:
                await peer.authenticate()
                await peer.send(bomb.data * 50)
                await within(peer.until_hung_up())
        text = bomb.data.decode("latin-1")
        work = replace(request(prompt_of(70, 130), max_tokens=4), request_id=text, cache_salt=text)
        assert oracle.agrees(work, await within(workers.generate(work)))
        assert plants.runs[-1].request.cache_salt == text
        assert not bomb.exploded


# -- doors to the outside ----------------------------------------------------------------------------------------------

ROUTES = {
    "/v1/chat/completions": {"POST"},
    "/v1/completions": {"POST"},
    "/v1/models": {"GET"},
    "/v1/models/{model_id:path}": {"GET"},
    "/v1/cache/feedback": {"POST"},
    "/v1/cache/invalidate": {"POST"},
    "/v1/route/explain": {"POST"},
    "/tokenize": {"POST"},
    "/detokenize": {"POST"},
    "/tokenizer_info": {"GET"},
    "/health": {"GET"},
    "/ready": {"GET"},
    "/version": {"GET"},
    "/metrics": {"GET"},
    "/metrics/targets": {"GET"},
    "/admin/v1/cluster": {"GET"},
    "/admin/v1/requests": {"GET"},
    "/admin/v1/requests/{request_id:path}": {"GET"},
    "/admin/v1/series": {"GET"},
    "/admin/v1/autoscaler": {"GET"},
    "/admin/v1/live": {"GET"},
    "/admin/v1/actions/scale": {"POST"},
    "/admin/v1/actions/drain": {"POST"},
    "/admin/v1/actions/flip": {"POST"},
    "/admin/v1/actions/roll": {"POST"},
    "/admin/v1/actions/autoscaler": {"POST"},
}


@pytest.fixture(scope="module")
def router_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer_folder(tmp_path_factory.mktemp("router") / "tiny")


async def test_z14_z37_every_route_is_known_and_asks_for_a_key(router_model: Path) -> None:
    """Z14 and Z37, vllm#58144, CVE-2026-107204. There: one route among many answered without a key; another one ran scripts.
    Ours: the routes are these, the console's files, and no others; each asks for a key unless it is one of four that say nothing
    of anybody, or one of those files; so does every method of the gRPC face."""
    pages, actions = Pages(), Actions(manager_address="", cluster_token="")
    console: Any = SimpleNamespace(pages=pages, actions=actions)
    edge: Any = build_app(None, CollectorRegistry(), console)  # type: ignore[arg-type]
    found = {route.path: route.methods for route in edge._app.routes if isinstance(route, Route)}
    assert len(found) == len(edge._app.routes)
    assert {path: methods - {"HEAD"} for path, methods in found.items()} == {
        **ROUTES,
        **{path: {"GET"} for path in pages.paths},
    }
    assert set(ROUTES) > OPEN_PATHS == {"/health", "/ready", "/version", "/metrics"}
    async with fake_cluster(Tokenizer.load(router_model), router_model, api_keys=("key",)) as cluster:
        async with httpx.AsyncClient(base_url=cluster.http_url, trust_env=False) as client:
            for path, methods in found.items():
                for method in (*methods, "HEAD", "OPTIONS", "PUT", "DELETE"):
                    reply = await client.request(method, re.sub(r"\{.*\}", "tiny", path), content=b"{}")
                    assert (reply.status_code == 401) is (path not in OPEN_PATHS | pages.paths), (method, path)
            for path in (
                "/invocations",
                "/run_script",
                "/v1/models/../metrics/x",
                "//v1/models",
                "/V1/MODELS",
                "/health/x",
                "/console/",
                "/admin/v1/x",
            ):
                assert (await client.post(path, content=b"{}")).status_code == 401, path
        channel = connect(cluster.grpc_address, None)
        for path, streams in methods_of(inference_pb2):
            assert await call_raw(channel, path, streams, b"") is grpc.StatusCode.UNAUTHENTICATED, path
        await channel.close(None)
        assert not cluster.worker.requests


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
async def test_z35_nothing_listens_to_everybody_by_accident(model_path: Path, host: str) -> None:
    """Z35, CVE-2026-106037. There: the store's REST port was open on 0.0.0.0, without authentication.
    Ours: off loopback the router does not start without keys, a worker does not start at all, and a pool is not offered unless
    somebody says that the network can be trusted."""
    for field in ("http_host", "grpc_host"):
        with pytest.raises(ValidationError, match="needs api_keys"):
            RouterConfig.model_validate({field: host})
    async with running_workers(model_path, engine=UNCACHED, num_prefill=0) as workers:
        with pytest.raises(StartupError) as refused:
            await workers.decode._handoff._receiver.start(["tcp"], host)
        assert refused.value.param == "host"
        for kind, role in ((DecodeWorker, Role.DECODE), (PrefillWorker, Role.PREFILL)):
            exposed = kind(replace(workers.decode._spec, worker_id=f"tiny/{role}/8", role=role, host=host))
            with pytest.raises(StartupError) as refused:
                await exposed.start()
            assert refused.value.param == "host"
