"""The nixl transport beyond what every transport promises (`test_transports`): over lanes with and without sockets, with peers
that stop or die in the middle of a one-sided write, as real processes."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import itertools
import json
import logging
import mmap
import os
import random
import signal
import subprocess
import sys
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.clock import SystemClock
from common.errors import HandshakeRefused, StartupError, TransferBroken, TransferTimeout
from common.types import KVLayout, WorkerRef
from kvtransfer.frames import Frame, FrameKind, encode_table
from kvtransfer.receiver import Incoming, KVReceiver
from kvtransfer.region import BlockRegion
from kvtransfer.sender import KVSender
from kvtransfer.state import HandoffState, Seal
from kvtransfer.ticket import derive_secret
from kvtransfer.transports import nixl
from kvtransfer.transports.base import PieceName, TransportOffer
from kvtransfer.transports.nixl_agent import NixlAgent, Ring, load_nixl

PEER = Path(__file__).with_name("nixl_peer.py")
ROOT = PEER.parents[2]
LAYOUT = KVLayout("model", "tokenizer", 16, 4, 32, 16, "float32", True)  # 256 KiB a block, as the peer's
POOL_BLOCKS, SOURCE_BLOCKS = 40, 64
SMALL_WINDOW_BLOCKS = 8
SECRET = derive_secret("token")
PATIENCE_S = 120.0  # far beyond what anything here takes: a hang becomes a failure
LEASE_S = 0.5
Result = TypeVar("Result")

needs_nixl = pytest.mark.skipif(importlib.util.find_spec("nixl_cu13") is None, reason="the extra nixl is not installed")


async def within(awaitable: Awaitable[Result]) -> Result:
    async with asyncio.timeout(PATIENCE_S):
        return await awaitable


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.002)


# -- the ring ----------------------------------------------------------------------------------------------------------


@given(st.data(), st.integers(8, 64))
def test_a_ring_never_gives_out_bytes_that_are_taken_and_never_gets_stuck(data: st.DataObject, size: int) -> None:
    """The oracle is a list of the intervals that are taken; what goes back first is what was taken first."""
    ours, theirs = Ring(size), Ring(size)
    taken: list[tuple[list[tuple[int, int]], int]] = []
    for _ in range(data.draw(st.integers(1, 30))):
        sizes = data.draw(st.lists(st.integers(1, size // 4), min_size=1, max_size=2))
        while ours.free_bytes < ours.places(sizes)[1]:
            assert taken, "no room although nothing is taken"
            ours.free_bytes += taken.pop(0)[1]
        offsets, cost = ours.take(sizes)
        assert theirs.take(sizes) == (offsets, cost)
        assert cost >= sum(sizes)
        intervals = [(offset, offset + length) for offset, length in zip(offsets, sizes, strict=True)]
        everything = sorted(interval for other, _ in [*taken, (intervals, cost)] for interval in other)
        assert everything[0][0] >= 0
        assert everything[-1][1] <= size
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(everything))
        taken.append((intervals, cost))


# -- the library -------------------------------------------------------------------------------------------------------


async def test_without_the_package_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl_cu13._bindings", None)
    pool = BlockRegion.create_shared(LAYOUT.block_bytes, 1)
    receiver = KVReceiver(pool, LAYOUT, "m/decode/0", 1, SECRET, SystemClock())
    with pytest.raises(StartupError, match=r"pip install pdserve\[nixl\]"):
        await receiver.start(["nixl"], "127.0.0.1")
    sender = KVSender(pool, LAYOUT, "m/prefill/0", 1, SECRET, SystemClock())
    with pytest.raises(HandshakeRefused, match=r"pip install pdserve\[nixl\]"):
        await sender.connect("m/decode/0", 1, [TransportOffer("nixl", "127.0.0.1:1")], 1)
    await sender.close()
    await receiver.close()
    pool.close()


@needs_nixl
def test_the_library_brings_no_torch_and_leaves_output_and_logging_alone() -> None:
    program = """
import logging, sys
from kvtransfer.transports.nixl_agent import NixlAgent
agent = NixlAgent("a", same_host=True)
logging.getLogger("nixl").warning("said")
agent.close()
sys.exit(f"{'torch' in sys.modules} {logging.raiseExceptions}")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stdout == ""
    assert done.stderr.split("\n")[:2] == ["said", "False True"]


@needs_nixl
def test_failures_of_the_library_are_errors_of_ours() -> None:
    agent = NixlAgent("a", same_host=True)
    with pytest.raises(TransferBroken):
        agent.meet(b"this is not metadata")
    with pytest.raises(TransferBroken):
        agent.post([(4096, 10)], [4096])
    agent.close()
    agent.close()
    with pytest.raises(TransferBroken, match="closed"):
        agent.progress()
    assert logging.raiseExceptions
    load_nixl()
    assert logging.raiseExceptions


# -- two ends in this process ------------------------------------------------------------------------------------------


@pytest.fixture(params=["same host", "sockets"])
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What UCX uses between the workers, in this process and in those that it starts."""
    pytest.importorskip("nixl_cu13")
    if request.param == "sockets":
        monkeypatch.setenv("UCX_TLS", "tcp")
        monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    return str(request.param)


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lane on which a write does not end unless the other end helps."""
    pytest.importorskip("nixl_cu13")
    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")


class Pair:
    def __init__(self) -> None:
        self.pool = BlockRegion.create_shared(LAYOUT.block_bytes, POOL_BLOCKS)
        self.source = BlockRegion.create_shared(LAYOUT.block_bytes, SOURCE_BLOCKS)
        self.source.buffer[:] = random.Random(7).randbytes(self.source.buffer.nbytes)
        self.receiver = KVReceiver(self.pool, LAYOUT, "m/decode/0", 1, SECRET, SystemClock())
        self.sender = KVSender(self.source, LAYOUT, "m/prefill/0", 1, SECRET, SystemClock())

    async def start(self) -> None:
        offers = await self.receiver.start(["nixl"], "127.0.0.1")
        assert await within(self.sender.connect("m/decode/0", 1, offers, POOL_BLOCKS)) == "nixl"
        await until(lambda: bool(self.listener._links))

    async def stop(self) -> None:
        await within(self.sender.close())
        await within(self.receiver.close())
        self.pool.close()
        self.source.close()

    @property
    def listener(self) -> nixl.NixlListener:
        listener = self.receiver._listeners[0]
        assert isinstance(listener, nixl.NixlListener)
        return listener

    @property
    def sending(self) -> nixl.NixlSenderLink:
        link = self.sender._peers["m/decode/0"].link
        assert isinstance(link, nixl.NixlSenderLink)
        return link

    @property
    def receiving(self) -> nixl.NixlReceiverLink:
        (link,) = self.listener._links
        assert isinstance(link, nixl.NixlReceiverLink)
        return link

    def offer(self, blocks: Sequence[int]) -> Incoming:
        return self.receiver.open(
            request_id="r",
            attempt=0,
            prefill=WorkerRef("m/prefill/0", 1, "unused"),
            first_block=0,
            blocks=blocks,
            num_tokens=16 * len(blocks),
            ttl_s=PATIENCE_S,
        )

    async def transfer(self, blocks: Sequence[int], sources: Sequence[int], layers_at_once: int = LAYOUT.num_layers) -> None:
        incoming = self.offer(blocks)
        outgoing = self.sender.open(incoming.ticket)
        for first in range(0, LAYOUT.num_layers, layers_at_once):
            await within(outgoing.push(list(enumerate(sources)), (first, first + layers_at_once)))
        account = await within(outgoing.finish())
        await within(incoming.complete(Seal(incoming.ticket.nonce, incoming.ticket.num_tokens, account.digests)))
        for block, source in zip(blocks, sources, strict=True):
            assert bytes(self.pool.block(block)) == bytes(self.source.block(source))


@pytest.fixture
async def pair(lane: str) -> AsyncIterator[Pair]:
    pair = Pair()
    await pair.start()
    yield pair
    await pair.stop()


@pytest.fixture
async def small(lane: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pair]:
    """With a window that is smaller than the pool."""
    monkeypatch.setattr(nixl, "WINDOW_BYTES", SMALL_WINDOW_BLOCKS * LAYOUT.block_bytes)
    pair = Pair()
    await pair.start()
    yield pair
    await pair.stop()


@pytest.fixture
async def stuck(sockets: None, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pair]:
    """A decode side that never helps: no write of the other end comes to an end."""
    monkeypatch.setattr(nixl.NixlReceiverLink, "_progress", lambda link: None)
    pair = Pair()
    await pair.start()
    yield pair
    await pair.stop()


def listening_sockets() -> set[str]:
    own = {os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.exists(entry.path)}
    lines = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
    return {fields[1] for fields in lines if fields[3] == "0A" and f"socket:[{fields[9]}]" in own}


@pytest.mark.parametrize("layers_at_once", [16, 4, 1])
async def test_blocks_and_layers_arrive_bit_exact(pair: Pair, layers_at_once: int) -> None:
    rng = random.Random(layers_at_once)
    for _ in range(3):  # more than the window holds, in all
        await pair.transfer(rng.sample(range(POOL_BLOCKS), 38), rng.sample(range(SOURCE_BLOCKS), 38), layers_at_once)


async def test_on_loopback_nixl_opens_no_socket_unless_told_to(pair: Pair, lane: str) -> None:
    assert pair.receiving.fences_locally
    others = listening_sockets() - {f"0100007F:{int(pair.listener.address.rpartition(':')[2]):04X}"}
    assert bool(others) is (lane == "sockets")
    assert all(address.startswith("0100007F:") for address in others)


async def test_as_between_two_hosts_ucx_chooses_among_all_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nixl_cu13")
    monkeypatch.setattr(nixl, "is_loopback", lambda host: False)
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    pair = Pair()
    await pair.start()
    assert len(listening_sockets()) > 1
    await pair.transfer(range(POOL_BLOCKS), range(POOL_BLOCKS))
    pair.sending.drop(TransferBroken("pulled"))
    await until(lambda: not pair.listener._links and not pair.listener._endings)
    await pair.transfer(range(4), range(10, 14))
    await pair.stop()


async def test_a_write_that_does_not_end_ends_the_link_and_frees_the_sources(
    stuck: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nixl, "WRITE_TIMEOUT_S", 0.3)
    write = nixl.WindowWriter._write
    let_go: list[bool] = []

    def watched(writer: nixl.WindowWriter, *arguments: Any) -> list[bytes]:
        try:
            return write(writer, *arguments)
        finally:
            let_go.append(writer._agent._agent is None)  # of the sources, before anybody takes them for free

    monkeypatch.setattr(nixl.WindowWriter, "_write", watched)
    incoming = stuck.offer(range(8))
    outgoing = stuck.sender.open(incoming.ticket)
    await within(outgoing.push([(block, block) for block in range(8)]))
    window = stuck.receiving.window
    with pytest.raises(TransferBroken, match="did not end"):
        await within(outgoing.finish())
    assert let_go == [True]
    assert isinstance(await within(incoming.wait_failed()), TransferBroken)
    assert await within(incoming.abandon(never)) == tuple(range(8))
    await until(lambda: not stuck.listener._endings)
    assert window.agent._agent is None
    assert not any(stuck.pool.buffer)


async def test_a_dropped_link_does_not_wait_for_its_write(stuck: Pair) -> None:
    incoming = stuck.offer(range(8))
    outgoing = stuck.sender.open(incoming.ticket)
    await within(outgoing.push([(block, block) for block in range(8)]))
    link = stuck.sending
    await until(lambda: link._window._agent._transfer != 0)
    link.drop(TransferBroken("pulled"))
    async with asyncio.timeout(nixl.WRITE_TIMEOUT_S / 2):
        with pytest.raises(TransferBroken):
            await outgoing.finish()
        await link.close()
    assert link._window._agent._agent is None
    assert await within(incoming.abandon(never)) == tuple(range(8))


async def test_a_full_window_makes_the_writer_wait(small: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """As slow as a decode side can be: it gives nothing of the window back until it is told to."""
    held: list[Frame] = []
    say = nixl.NixlReceiverLink._say

    def hold(link: nixl.NixlReceiverLink, frame: Frame) -> None:
        if frame.kind is FrameKind.CREDIT and frame.nonce == bytes(16):
            held.append(frame)
        else:
            say(link, frame)

    monkeypatch.setattr(nixl.NixlReceiverLink, "_say", hold)
    monkeypatch.setattr(nixl, "BATCH_BYTES", LAYOUT.block_bytes)
    incoming = small.offer(range(POOL_BLOCKS))
    outgoing = small.sender.open(incoming.ticket)
    await within(outgoing.push([(block, block) for block in range(POOL_BLOCKS)]))
    await until(lambda: incoming.num_blocks == SMALL_WINDOW_BLOCKS)
    await asyncio.sleep(0.1)
    for verified in range(SMALL_WINDOW_BLOCKS, POOL_BLOCKS):
        assert incoming.num_blocks == len(held) == verified
        say(small.receiving, held[verified - SMALL_WINDOW_BLOCKS])
        await until(lambda: incoming.num_blocks > verified)  # noqa: B023
    account = await within(outgoing.finish())
    await within(incoming.complete(Seal(incoming.ticket.nonce, incoming.ticket.num_tokens, account.digests)))
    assert bytes(small.pool.buffer) == bytes(small.source.buffer[: small.pool.buffer.nbytes])


async def test_a_window_that_stays_full_ends_the_link(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl, "WINDOW_TIMEOUT_S", 0.2)
    pair.sending._window._ring.free_bytes = 0
    incoming = pair.offer((0,))
    outgoing = pair.sender.open(incoming.ticket)
    await within(outgoing.push([(0, 0)]))
    with pytest.raises(TransferBroken, match="took nothing out of its window"):
        await within(outgoing.finish())
    assert await within(incoming.abandon(never)) == (0,)


async def test_fifty_links_leave_nothing_behind(lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))  # else it grows by itself
    made: list[weakref.ref[object]] = []

    def remember(kind: type[NixlAgent] | type[nixl.Window]) -> None:
        create = kind.__init__

        def create_and_remember(made_one: Any, *arguments: Any, **named: Any) -> None:
            made.append(weakref.ref(made_one))
            create(made_one, *arguments, **named)

        monkeypatch.setattr(kind, "__init__", create_and_remember)

    def held() -> tuple[int, int, int]:
        gc.collect()
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), resident_pages * mmap.PAGESIZE

    remember(NixlAgent)
    remember(nixl.Window)
    pool = BlockRegion.create_shared(LAYOUT.block_bytes, POOL_BLOCKS)
    receiver = KVReceiver(pool, LAYOUT, "m/decode/0", 1, SECRET, SystemClock())
    offers = await receiver.start(["nixl"], "127.0.0.1")
    listener = receiver._listeners[0]
    assert isinstance(listener, nixl.NixlListener)
    source = BlockRegion.create_shared(LAYOUT.block_bytes, POOL_BLOCKS)
    source.buffer[:] = bytes(source.buffer.nbytes)

    async def one_link(worker_id: str) -> None:
        sender = KVSender(source, LAYOUT, worker_id, 1, SECRET, SystemClock())
        await within(sender.connect("m/decode/0", 1, offers, POOL_BLOCKS))
        incoming = receiver.open(
            request_id="r",
            attempt=0,
            prefill=WorkerRef(worker_id, 1, "unused"),
            first_block=0,
            blocks=range(16),
            num_tokens=16 * 16,
            ttl_s=PATIENCE_S,
        )
        outgoing = sender.open(incoming.ticket)
        await within(outgoing.push([(block, block) for block in range(16)]))
        account = await within(outgoing.finish())
        await within(incoming.complete(Seal(incoming.ticket.nonce, incoming.ticket.num_tokens, account.digests)))
        await within(sender.close())
        await until(lambda: not listener._links and not listener._endings)

    for turn in range(4):
        await one_link(f"m/prefill/{turn}")
    before = held()
    for turn in range(4, 54):
        await one_link(f"m/prefill/{turn}")
    descriptors, threads, resident_bytes = held()
    assert len(made) == 3 * 54
    assert not [reference for reference in made if reference() is not None]
    assert (descriptors, threads) == before[:2]
    assert resident_bytes < before[2] + 4 * nixl.WINDOW_BYTES  # what was written into the windows is more than three times that
    await receiver.close()
    pool.close()
    source.close()


@pytest.mark.parametrize("wrong", ["not announced", "announced twice", "others", "another nonce", "too much"])
async def test_a_peer_that_breaks_the_rules_loses_its_link(small: Pair, wrong: str) -> None:
    incoming = small.offer((5, 6))
    nonce = incoming.ticket.nonce
    outgoing = small.sender.open(incoming.ticket)
    await until(lambda: outgoing._credit_bytes > 0)

    def frame(kind: FrameKind, layers: int = LAYOUT.num_layers, count: int = 1, nonce: bytes = nonce) -> bytes:
        size_bytes = count * layers * LAYOUT.block_bytes // LAYOUT.num_layers
        table = encode_table([PieceName(block, 0, layers) for block in range(count)], [bytes(16)] * count)
        return Frame(kind, nonce, count, size_bytes if kind is FrameKind.BLOCKS else 0).encode() + table

    blocks, written = FrameKind.BLOCKS, FrameKind.WRITTEN
    data = {
        "not announced": frame(written),
        "announced twice": frame(blocks) + frame(blocks),
        "others": frame(blocks) + frame(written, layers=8),
        "another nonce": frame(blocks) + frame(written, nonce=bytes(16)),
        "too much": frame(blocks, count=SMALL_WINDOW_BLOCKS + 1) + frame(written, count=SMALL_WINDOW_BLOCKS + 1),
    }[wrong]
    link = small.sending
    await within(link._in_lane(lambda: link._send([data])))
    assert isinstance(await within(incoming.wait_failed()), TransferBroken)
    assert await within(incoming.abandon(never)) == (5, 6)
    await until(lambda: link.lost is not None)
    assert not any(small.pool.buffer)
    await outgoing.abort()
    await small.transfer((5, 6), (1, 2))  # over a new link


# -- peers as processes ------------------------------------------------------------------------------------------------


async def never() -> None:
    await asyncio.sleep(PATIENCE_S)


def source_block(index: int) -> bytes:
    return bytes([index + 1]) * LAYOUT.block_bytes


class PeerProcess:
    def __init__(self, worker_id: str, process: asyncio.subprocess.Process) -> None:
        self.worker_id = worker_id
        self.process = process

    async def say(self, **order: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        await self.process.stdin.drain()

    async def answer(self) -> Any:
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            while True:
                line = await self.process.stdout.readline()
                assert line, "the peer is gone"
                if line.startswith(b"{"):  # UCX writes its complaints to the same place
                    return json.loads(line)

    async def tell(self, **order: Any) -> Any:
        await self.say(**order)
        return await self.answer()

    async def open(self, incoming: Incoming) -> None:
        ticket = {name: value.hex() if isinstance(value, bytes) else value for name, value in asdict(incoming.ticket).items()}
        assert await self.tell(do="open", ticket=ticket) == {"ok": None}

    async def stopped(self) -> None:
        """Returns when the process has stopped itself."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        await until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")

    async def end(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()


class Decode:
    def __init__(self) -> None:
        self.pool = BlockRegion.create_shared(LAYOUT.block_bytes, POOL_BLOCKS)
        self.receiver = KVReceiver(self.pool, LAYOUT, "m/decode/0", 1, SECRET, SystemClock(), lease_s=LEASE_S)
        self.offers: list[TransportOffer] = []
        self.peers: list[PeerProcess] = []

    @property
    def listener(self) -> nixl.NixlListener:
        listener = self.receiver._listeners[0]
        assert isinstance(listener, nixl.NixlListener)
        return listener

    async def start_peer(self, worker_id: str) -> PeerProcess:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(PEER),
            worker_id,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        peer = PeerProcess(worker_id, process)
        self.peers.append(peer)
        offer = self.offers[0]
        order = {"kind": offer.kind, "address": offer.address, "pool_blocks": POOL_BLOCKS}
        assert await peer.tell(do="connect", **order) == {"ok": "nixl"}
        return peer

    def offer(self, peer: PeerProcess, blocks: Sequence[int]) -> Incoming:
        return self.receiver.open(
            request_id="r",
            attempt=0,
            prefill=WorkerRef(peer.worker_id, 1, "unused"),
            first_block=0,
            blocks=blocks,
            num_tokens=16 * len(blocks),
            ttl_s=PATIENCE_S,
        )

    async def whole_transfer(self, peer: PeerProcess, blocks: Sequence[int], first_source: int) -> None:
        incoming = self.offer(peer, blocks)
        await peer.open(incoming)
        await peer.tell(do="push", blocks=[(index, first_source + index) for index in range(len(blocks))])
        digests = (await peer.tell(do="finish"))["ok"]
        seal = Seal(incoming.ticket.nonce, 16 * len(blocks), {int(key): bytes.fromhex(value) for key, value in digests.items()})
        await within(incoming.complete(seal))
        self.check(blocks, first_source)

    def check(self, blocks: Sequence[int], first_source: int) -> None:
        assert [bytes(self.pool.block(block)) for block in blocks] == [
            source_block(first_source + index) for index in range(len(blocks))
        ]

    async def trapped(self, peer: PeerProcess, blocks: Sequence[int], where: str, number: signal.Signals) -> Incoming:
        """A transfer of which two blocks have arrived, and in whose next write the peer meets its trap."""
        incoming = self.offer(peer, blocks)
        await peer.open(incoming)
        await peer.tell(do="push", blocks=[(0, 0), (1, 1)])
        await until(lambda: incoming.num_blocks == 2)
        await peer.tell(do="trap", where=where, signal=int(number))
        await peer.say(do="push", blocks=[(index, index) for index in range(2, len(blocks))])
        return incoming


@pytest.fixture
async def decode(lane: str) -> AsyncIterator[Decode]:
    decode = Decode()
    decode.offers = await decode.receiver.start(["nixl"], "127.0.0.1")
    yield decode
    for peer in decode.peers:
        await peer.end()
    await within(decode.receiver.close())
    decode.pool.close()


def skip_what_cannot_be(lane: str, where: str) -> None:
    if lane == "same host" and where == "within":
        pytest.skip("without sockets a write is done when it was posted")


BLOCKS = tuple(range(3, 33))


@pytest.mark.parametrize("where", ["before", "within", "after"])
async def test_a_peer_killed_in_a_write_is_noticed_and_its_blocks_come_back(decode: Decode, lane: str, where: str) -> None:
    skip_what_cannot_be(lane, where)
    peer = await decode.start_peer("m/prefill/0")
    incoming = await decode.trapped(peer, BLOCKS, where, signal.SIGKILL)
    assert isinstance(await within(incoming.wait_failed()), TransferBroken)
    assert await within(incoming.abandon(never)) == BLOCKS
    assert decode.receiver.num_open == 0
    await until(lambda: not decode.listener._endings)  # it has hung up by dying: its window is gone, too
    again = await decode.start_peer("m/prefill/0")  # of the same name, as after a restart
    await decode.whole_transfer(again, BLOCKS, 20)


@pytest.mark.parametrize("where", ["before", "within", "after"])
async def test_late_bytes_of_a_stopped_peer_do_not_reach_the_pool(
    decode: Decode, lane: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_what_cannot_be(lane, where)
    peer = await decode.start_peer("m/prefill/0")
    incoming = await decode.trapped(peer, BLOCKS, where, signal.SIGSTOP)
    await peer.stopped()
    (link,) = decode.listener._links
    assert isinstance(link, nixl.NixlReceiverLink)
    mapping = link.window.mapping
    assert isinstance(await within(incoming.wait_failed()), TransferTimeout)  # the lease
    assert await within(incoming.abandon(never)) == BLOCKS
    assert (decode.receiver.num_open, decode.receiver.num_quarantined) == (0, 0)
    other = await decode.start_peer("m/prefill/1")
    await decode.whole_transfer(other, BLOCKS, 30)  # the blocks' next owner
    monkeypatch.setattr(nixl, "WRITE_TIMEOUT_S", 0.0)
    await until(lambda: link._ended)  # a write that takes so long has lost its link
    monkeypatch.setattr(nixl, "WRITE_TIMEOUT_S", PATIENCE_S)
    assert len(decode.listener._endings) == 1  # but not the window
    peer.process.send_signal(signal.SIGCONT)
    await peer.answer()
    finished = await peer.tell(do="finish")
    assert "error" in finished or where == "after"  # that one may have said all before it hears that nobody listens
    await until(lambda: not decode.listener._endings)
    late = mapping[2 * LAYOUT.block_bytes : 3 * LAYOUT.block_bytes]
    assert (late == source_block(2)) is (lane == "same host" and where == "before")  # this one came after the link's end
    decode.check(BLOCKS, 30)
    await decode.whole_transfer(peer, BLOCKS, 10)  # over a new link


async def test_a_listener_does_not_wait_for_a_stopped_peer_and_keeps_its_window(
    decode: Decode, lane: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nixl, "GRACE_S", 0.2)
    monkeypatch.setattr(nixl, "_RESERVED", [])
    peer = await decode.start_peer("m/prefill/0")
    incoming = await decode.trapped(peer, BLOCKS, "before", signal.SIGSTOP)
    await peer.stopped()
    (link,) = decode.listener._links
    assert isinstance(link, nixl.NixlReceiverLink)
    await within(decode.receiver.close())
    assert incoming.drained.is_set()
    assert link.window.mapping in nixl._RESERVED
    before = bytes(decode.pool.buffer)
    peer.process.send_signal(signal.SIGCONT)
    await peer.answer()
    assert "error" in await peer.tell(do="finish")
    assert bytes(decode.pool.buffer) == before
    assert incoming.state is HandoffState.DRAINED
