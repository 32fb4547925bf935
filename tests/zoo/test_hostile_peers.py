"""Peers that hold the cluster's secret and are not what they say: frames, offers and pools that are forged."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from common.config import pdserve_home
from common.errors import TransferBroken
from kvtransfer.digest import piece_digest
from kvtransfer.frames import MAX_PIECES, Frame, FrameKind, encode_table
from kvtransfer.native.choice import piece_kernel, prepare
from kvtransfer.region import F_SEAL_GROW, F_SEAL_SHRINK
from kvtransfer.transports.base import PeerName, PieceName
from support.hostile_peers import (
    POOL_BLOCKS,
    Forge,
    forged_header,
    forged_ready,
    forged_table,
    forged_written,
    layout_of,
    nobody_to_ask,
    open_transfer,
    pool_of,
    raw,
    sealed,
    untouched,
)
from support.zoo import Oracle, until, within

# -- frames ------------------------------------------------------------------------------------------------------------

BREAKING: dict[str, Forge] = {
    "no magic": lambda nonce, layout, data: forged_header(FrameKind.OPEN, nonce, magic=b"HTTP"),
    "another version": lambda nonce, layout, data: forged_header(FrameKind.OPEN, nonce, version=2),
    "an unknown kind": lambda nonce, layout, data: forged_header(99, nonce),
    "no pieces": lambda nonce, layout, data: forged_header(data, nonce, 0, layout.block_bytes),
    "too many pieces": lambda nonce, layout, data: forged_header(data, nonce, MAX_PIECES + 1, 1),
    "all the pieces there are": lambda nonce, layout, data: forged_header(data, nonce, 2**32 - 1, 2**32 - 1),
    "a payload without bytes": lambda nonce, layout, data: forged_header(FrameKind.BLOCKS, nonce, 1, 0),
    "a payload without end": lambda nonce, layout, data: forged_header(FrameKind.BLOCKS, nonce, 1, 2**32 - 1),
    "more payload than pieces": lambda nonce, layout, data: (
        forged_header(FrameKind.BLOCKS, nonce, 1, 2 * layout.block_bytes) + forged_table((0, 0, layout.num_layers))
    ),
    "less payload than pieces": lambda nonce, layout, data: (
        forged_header(FrameKind.BLOCKS, nonce, 2, layout.block_bytes)
        + forged_table((0, 0, layout.num_layers), (1, 0, layout.num_layers))
    ),
    "layers that are not there": lambda nonce, layout, data: (
        forged_ready(nonce, (0, 65_535, 65_535, 0))
        if data == FrameKind.READY
        else forged_header(data, nonce, 1, layout.block_bytes) + forged_table((0, 65_535, 65_535))
    ),
    "no layers": lambda nonce, layout, data: (
        forged_ready(nonce, (0, 0, 0, 0))
        if data == FrameKind.READY
        else forged_header(data, nonce, 1, layout.block_bytes) + forged_table((0, 0, 0))
    ),
    "digests of what is not here": lambda nonce, layout, data: forged_written(nonce, (0, 0, layout.num_layers)),
    "a grant": lambda nonce, layout, data: forged_header(FrameKind.GRANT, nonce, 0, 1000),
    "a refusal": lambda nonce, layout, data: forged_header(FrameKind.REFUSE, nonce, 0, 1),
    "credit": lambda nonce, layout, data: forged_header(FrameKind.CREDIT, nonce, 0, 2**32 - 1),
    "an amount where none is": lambda nonce, layout, data: forged_header(FrameKind.CLOSE, nonce, 0, 7),
    "what a decode worker took": lambda nonce, layout, data: forged_header(FrameKind.TAKEN, nonce, 0, 1),
    "noise": lambda nonce, layout, data: random.Random(5).randbytes(300_000),
}


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
                    forged_ready(nonce, *((*name, 0) for name in names))
                    + Frame(FrameKind.WRITTEN, nonce, len(names)).encode()
                    + table
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
    return lambda nonce, layout, data: forged_ready(nonce, (0, 0, layout.num_layers, place(POOL_BLOCKS * layout.block_bytes)))


OFFERS: dict[str, Forge] = {
    "behind the pool": _beyond(lambda pool_bytes: pool_bytes),
    "across its end": _beyond(lambda pool_bytes: pool_bytes - 1),
    "so far that it is in front": _beyond(lambda pool_bytes: 2**64 - 16),
    "as far as can be said": _beyond(lambda pool_bytes: 2**64 - 1),
    "in part behind the pool": lambda nonce, layout, data: forged_ready(
        nonce, (0, 0, layout.num_layers, 0), (1, 0, layout.num_layers, 2**40)
    ),
    "more than are there": lambda nonce, layout, data: (
        forged_ready(nonce, (0, 0, layout.num_layers, 0), count=2) + forged_written(nonce, (0, 0, layout.num_layers))
    ),
    "with an amount": lambda nonce, layout, data: forged_header(FrameKind.READY, nonce, 1, 5),
    "without pieces": lambda nonce, layout, data: forged_header(FrameKind.READY, nonce),
    "other pieces stated": lambda nonce, layout, data: (
        forged_ready(nonce, (0, 0, layout.num_layers, 0)) + forged_written(nonce, (1, 0, layout.num_layers))
    ),
    "more pieces stated": lambda nonce, layout, data: (
        forged_ready(nonce, (0, 0, layout.num_layers, 0))
        + forged_written(nonce, (0, 0, layout.num_layers), (1, 0, layout.num_layers))
    ),
    "in another order": lambda nonce, layout, data: (
        forged_ready(nonce, (0, 0, layout.num_layers, 0), (1, 0, layout.num_layers, 0))
        + forged_written(nonce, (1, 0, layout.num_layers), (0, 0, layout.num_layers))
    ),
    "in other parts": lambda nonce, layout, data: (
        forged_ready(nonce, (0, 0, layout.num_layers, 0)) + forged_written(nonce, (0, 0, 1))
    ),
    "for somebody else": lambda nonce, layout, data: (
        forged_ready(nonce, (0, 0, layout.num_layers, 0)) + forged_written(b"\xff" * 16, (0, 0, layout.num_layers))
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
                        "another digest": forged_ready(nonce, (*whole, block_bytes))
                        + forged_written(nonce, whole, digests=right),
                        "stated twice": forged_ready(nonce, (*whole, 0)) + 2 * forged_written(nonce, whole, digests=right),
                        "beyond the ticket": forged_ready(nonce, (2, 0, layers, 0)) + forged_written(nonce, (2, 0, layers)),
                        "in front of the ticket": forged_ready(nonce, (2**32 - 1, 0, 1, 0))
                        + forged_written(nonce, (2**32 - 1, 0, 1)),
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
                    return (
                        forged_header(FrameKind.BLOCKS, nonce, 1, block_bytes)
                        + forged_table(name, digests=digests)
                        + bytes(content)
                    )
                return forged_ready(nonce, (*name, place)) + forged_written(nonce, name, digests=digests)

            await peer.authenticate()
            assert await peer.open(nonce) is FrameKind.GRANT
            await peer.send(piece(0, first))
            await until(lambda: incoming.num_blocks == 1, "the first block is verified")
            if again == "offered after another OPEN":
                await peer.send(forged_header(FrameKind.OPEN, nonce))
            await peer.send(forged_ready(nonce, (0, 0, layers, 2 * block_bytes)))
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
