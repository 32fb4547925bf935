"""A prefill worker that is killed or stopped in the middle of a transfer, as a real process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from common.clock import SystemClock
from common.errors import TransferBroken, TransferTimeout
from common.types import KVLayout, WorkerRef
from kvtransfer.receiver import Incoming, KVReceiver
from kvtransfer.region import BlockRegion
from kvtransfer.state import HandoffState, Seal
from kvtransfer.ticket import derive_secret
from kvtransfer.transports.base import TransportOffer

PEER = Path(__file__).with_name("prefill_peer.py")
LAYOUT = KVLayout("model", "tokenizer", 16, 4, 32, 16, "float32", True)
BLOCKS = 12
PATIENCE_S = 120.0


def source_block(index: int) -> bytes:
    return bytes([index + 1]) * LAYOUT.block_bytes


class PeerProcess:
    def __init__(self, worker_id: str, process: asyncio.subprocess.Process) -> None:
        self.worker_id = worker_id
        self.process = process

    async def tell(self, **order: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        async with asyncio.timeout(PATIENCE_S):
            return json.loads(await self.process.stdout.readline())

    async def open(self, incoming: Incoming) -> None:
        ticket = {name: value.hex() if isinstance(value, bytes) else value for name, value in asdict(incoming.ticket).items()}
        assert await self.tell(do="open", ticket=ticket) == {"ok": None}

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def end(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()


class Decode:
    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.pool = BlockRegion.create_shared(LAYOUT.block_bytes, BLOCKS)
        self.receiver = KVReceiver(self.pool, LAYOUT, "m/decode/0", 1, derive_secret("token"), SystemClock())
        self.offers: list[TransportOffer] = []
        self.peers: list[PeerProcess] = []

    async def start_peer(self, worker_id: str) -> PeerProcess:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(PEER),
            worker_id,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=PEER.parents[2],
            env={**os.environ, "PYTHONPATH": str(PEER.parents[2])},
        )
        peer = PeerProcess(worker_id, process)
        self.peers.append(peer)
        offer = self.offers[0]
        assert await peer.tell(do="connect", kind=offer.kind, address=offer.address, pool_blocks=BLOCKS) == {"ok": self.kind}
        return peer

    def offer(self, peer: PeerProcess, blocks: tuple[int, ...], ttl_s: float = PATIENCE_S) -> Incoming:
        return self.receiver.open(
            request_id="r",
            attempt=0,
            prefill=WorkerRef(peer.worker_id, 1, "unused"),
            first_block=0,
            blocks=blocks,
            num_tokens=16 * len(blocks),
            ttl_s=ttl_s,
        )

    async def whole_transfer(self, peer: PeerProcess, blocks: tuple[int, ...], first_source: int) -> None:
        incoming = self.offer(peer, blocks)
        await peer.open(incoming)
        await peer.tell(do="push", blocks=[(index, first_source + index) for index in range(len(blocks))])
        digests = (await peer.tell(do="finish"))["ok"]
        seal = Seal(incoming.ticket.nonce, 16 * len(blocks), {int(key): bytes.fromhex(value) for key, value in digests.items()})
        async with asyncio.timeout(PATIENCE_S):
            await incoming.complete(seal)

    async def half_done(self, peer: PeerProcess, ttl_s: float = PATIENCE_S) -> Incoming:
        """A transfer of four blocks, two of which have arrived."""
        incoming = self.offer(peer, (3, 4, 5, 6), ttl_s)
        await peer.open(incoming)
        await peer.tell(do="push", blocks=[(0, 0), (1, 1)])
        async with asyncio.timeout(PATIENCE_S):
            while incoming.num_blocks < 2:
                await asyncio.sleep(0.001)
        return incoming


@pytest.fixture(params=["shm", "tcp"])
async def decode(request: pytest.FixtureRequest) -> AsyncIterator[Decode]:
    decode = Decode(request.param)
    decode.offers = await decode.receiver.start([decode.kind], "127.0.0.1")
    yield decode
    for peer in decode.peers:
        await peer.end()
    await decode.receiver.close()
    decode.pool.close()


async def never_answers() -> None:
    await asyncio.sleep(PATIENCE_S)


async def test_a_killed_writer_is_noticed_and_its_blocks_come_back(decode: Decode) -> None:
    peer = await decode.start_peer("m/prefill/0")
    incoming = await decode.half_done(peer)
    peer.signal(signal.SIGKILL)
    async with asyncio.timeout(PATIENCE_S):
        assert isinstance(await incoming.wait_failed(), TransferBroken)
        await incoming.drained.wait()
        assert await incoming.abandon(never_answers) == (3, 4, 5, 6)
    assert decode.receiver.num_open == 0
    survivor = await decode.start_peer("m/prefill/1")
    await decode.whole_transfer(survivor, (3, 4, 5, 6), 40)
    assert [bytes(decode.pool.block(3 + index)) for index in range(4)] == [source_block(40 + index) for index in range(4)]


async def test_a_writer_killed_before_it_was_let_in_costs_nothing(decode: Decode) -> None:
    peer = await decode.start_peer("m/prefill/0")
    incoming = decode.offer(peer, (3, 4))
    peer.signal(signal.SIGKILL)
    await peer.process.wait()
    async with asyncio.timeout(PATIENCE_S):
        assert await incoming.abandon(never_answers) == (3, 4)


async def test_a_writer_killed_after_close_leaves_a_good_transfer(decode: Decode) -> None:
    peer = await decode.start_peer("m/prefill/0")
    incoming = decode.offer(peer, (3, 4))
    await peer.open(incoming)
    await peer.tell(do="push", blocks=[(0, 0), (1, 1)])
    digests = (await peer.tell(do="finish"))["ok"]
    peer.signal(signal.SIGKILL)
    await peer.process.wait()
    async with asyncio.timeout(PATIENCE_S):
        await incoming.complete(Seal(incoming.ticket.nonce, 32, {int(key): bytes.fromhex(digests[key]) for key in digests}))
    assert incoming.state is HandoffState.ACTIVE


async def test_a_stopped_writer_runs_out_of_time(decode: Decode) -> None:
    peer = await decode.start_peer("m/prefill/0")
    incoming = await decode.half_done(peer, ttl_s=0.5)
    peer.signal(signal.SIGSTOP)
    async with asyncio.timeout(PATIENCE_S):
        assert isinstance(await incoming.wait_failed(), TransferTimeout)
    assert decode.receiver.num_quarantined == 0


@pytest.mark.parametrize("in_the_middle_of_a_block", [False, True])
async def test_a_stopped_writer_is_fenced_and_what_comes_late_is_dropped(decode: Decode, in_the_middle_of_a_block: bool) -> None:
    """Writers that cannot be fenced: `test_transports.py`."""
    peer = await decode.start_peer("m/prefill/0")
    other = await decode.start_peer("m/prefill/1")  # now: a writer that was stopped for longer than its lease writes nothing more
    incoming = await decode.half_done(peer)
    if in_the_middle_of_a_block:
        await peer.tell(do="half", logical=2)
        async with asyncio.timeout(PATIENCE_S):
            while bytes(decode.pool.block(5)[:1]) != source_block(2)[:1]:
                await asyncio.sleep(0.001)
    peer.signal(signal.SIGSTOP)
    async with asyncio.timeout(PATIENCE_S):
        assert await incoming.abandon(never_answers) == (3, 4, 5, 6)
    await decode.whole_transfer(other, (3, 4, 5, 6), 40)  # the blocks' next owner
    peer.signal(signal.SIGCONT)
    if not in_the_middle_of_a_block:
        await peer.tell(do="push", blocks=[(2, 2), (3, 3)])  # it was not told, and goes on
        await peer.tell(do="finish")
        await decode.whole_transfer(peer, (7,), 50)  # behind the late blocks on the same link
        assert decode.receiver.counters.late_pieces == 2
    assert [bytes(decode.pool.block(3 + index)) for index in range(4)] == [source_block(40 + index) for index in range(4)]
