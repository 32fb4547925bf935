"""A decode worker that is killed or stopped in the middle of a transfer, as a real process: the prefill worker lets go of it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from common.clock import SystemClock
from common.errors import HandoffError, TransferBroken, TransferTimeout
from common.types import KVLayout, Ticket
from kvtransfer.region import BlockRegion
from kvtransfer.sender import KVSender, Outgoing
from kvtransfer.ticket import derive_secret
from kvtransfer.transports import sending
from kvtransfer.transports.base import TransportOffer

PEER = Path(__file__).with_name("decode_peer.py")
LAYOUT = KVLayout("model", "tokenizer", 16, 4, 32, 16, "float32", True)
POOL_BLOCKS = 64
LEASE_S = 1.5  # pulses come every second
PATIENCE_S = 120.0


class DecodeProcess:
    def __init__(self, worker_id: str, process: asyncio.subprocess.Process) -> None:
        self.worker_id = worker_id
        self.process = process

    async def tell(self, **order: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        async with asyncio.timeout(PATIENCE_S):
            return json.loads(await self.process.stdout.readline())["ok"]

    async def end(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()


class Prefill:
    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.source = BlockRegion.create_shared(LAYOUT.block_bytes, POOL_BLOCKS)
        for block in range(POOL_BLOCKS):
            self.source.block(block)[:] = bytes([block + 1]) * LAYOUT.block_bytes
        self.sender = KVSender(self.source, LAYOUT, "m/prefill/0", 1, derive_secret("token"), SystemClock(), lease_s=LEASE_S)
        self.decodes: list[DecodeProcess] = []

    async def start_decode(self, worker_id: str) -> DecodeProcess:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(PEER),
            worker_id,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=PEER.parents[2],
            env={**os.environ, "PYTHONPATH": str(PEER.parents[2])},
        )
        decode = DecodeProcess(worker_id, process)
        self.decodes.append(decode)
        offer = TransportOffer(self.kind, await decode.tell(do="start", kind=self.kind))
        async with asyncio.timeout(PATIENCE_S):
            assert await self.sender.connect(worker_id, 1, [offer], POOL_BLOCKS) == self.kind
        return decode

    async def ticket(self, decode: DecodeProcess, num_blocks: int) -> Ticket:
        values = await decode.tell(do="open", prefill="m/prefill/0", blocks=list(range(num_blocks)), ttl_s=PATIENCE_S)
        for name in ("nonce", "layout_fingerprint", "mac"):
            values[name] = bytes.fromhex(values[name])
        return Ticket(**{**values, "blocks": tuple(values["blocks"]), "part": tuple(values["part"])})

    async def half_done(self, decode: DecodeProcess) -> Outgoing:
        outgoing = self.sender.open(await self.ticket(decode, POOL_BLOCKS))
        await outgoing.push([(0, 0), (1, 1)])
        async with asyncio.timeout(PATIENCE_S):
            while await decode.tell(do="verified") < 2:
                await asyncio.sleep(0.001)
        return outgoing

    async def whole_transfer(self, decode: DecodeProcess) -> None:
        outgoing = self.sender.open(await self.ticket(decode, 4))
        for layers in ((0, 5), (5, 16)):
            await outgoing.push([(block, 40 + block) for block in range(4)], layers)
        async with asyncio.timeout(PATIENCE_S):
            account = await outgoing.finish()
        digests = {logical: digest.hex() for logical, digest in account.digests.items()}
        first_bytes = await decode.tell(do="complete", num_tokens=64, digests=digests)
        assert first_bytes == [(bytes([41 + block]) * 8).hex() for block in range(4)]


@pytest.fixture(params=["shm", "tcp"])
async def prefill(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Prefill]:
    monkeypatch.setattr(sending, "STALL_TIMEOUT_S", 1000.0)  # it is not what frees the sources
    prefill = Prefill(request.param)
    yield prefill
    await prefill.sender.close()
    for decode in prefill.decodes:
        await decode.end()
    prefill.source.close()


async def ended(outgoing: Outgoing) -> HandoffError:
    """Nothing is read any more: why."""
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.wait({outgoing._pump})
    with pytest.raises(HandoffError) as failure:
        await outgoing.finish()
    return failure.value


ALL_BUT_TWO = [(block, block) for block in range(2, POOL_BLOCKS)]


async def test_a_killed_decode_worker_frees_the_sources(prefill: Prefill) -> None:
    decode = await prefill.start_decode("m/decode/0")
    outgoing = await prefill.half_done(decode)
    decode.process.kill()
    assert isinstance(await ended(outgoing), TransferBroken)
    assert prefill.sender.num_open == 0


@pytest.mark.parametrize("much_to_write", [True, False])
async def test_a_stopped_decode_worker_frees_the_sources_when_its_lease_is_over(prefill: Prefill, much_to_write: bool) -> None:
    """Over tcp the writer is stuck in the middle of a frame: no answer to be waited for may hold the sources."""
    stopped, other = await prefill.start_decode("m/decode/0"), await prefill.start_decode("m/decode/1")
    outgoing = await prefill.half_done(stopped)
    stopped.process.send_signal(signal.SIGSTOP)
    if much_to_write:
        await outgoing.push(ALL_BUT_TWO)  # 15 MiB, more than the sockets hold
    await prefill.whole_transfer(other)  # meanwhile others are served
    assert isinstance(await ended(outgoing), TransferTimeout)
    assert prefill.sender.num_open == 0
    await prefill.whole_transfer(other)


async def test_a_decode_worker_that_never_answers_is_not_waited_for(prefill: Prefill) -> None:
    stopped = await prefill.start_decode("m/decode/0")
    ticket = await prefill.ticket(stopped, 2)
    stopped.process.send_signal(signal.SIGSTOP)
    outgoing = prefill.sender.open(ticket)
    await outgoing.push([(0, 0), (1, 1)])
    assert isinstance(await ended(outgoing), TransferTimeout)
    assert prefill.sender.num_open == 0


async def test_a_write_that_is_stuck_can_be_aborted(prefill: Prefill) -> None:
    stopped, other = await prefill.start_decode("m/decode/0"), await prefill.start_decode("m/decode/1")
    outgoing = await prefill.half_done(stopped)
    stopped.process.send_signal(signal.SIGSTOP)
    await outgoing.push(ALL_BUT_TWO)
    await asyncio.sleep(0.1)
    async with asyncio.timeout(PATIENCE_S):
        await outgoing.abort()
    assert isinstance(await ended(outgoing), TransferBroken)
    assert prefill.sender.num_open == 0
    await prefill.whole_transfer(other)


async def test_a_decode_worker_that_goes_on_after_its_lease_finds_its_transfer_over(prefill: Prefill) -> None:
    decode = await prefill.start_decode("m/decode/0")
    outgoing = await prefill.half_done(decode)
    decode.process.send_signal(signal.SIGSTOP)
    await outgoing.push(ALL_BUT_TWO[:4])
    assert isinstance(await ended(outgoing), TransferTimeout)
    decode.process.send_signal(signal.SIGCONT)
    assert await decode.tell(do="failed") in ("TransferBroken", "TransferTimeout")
    assert await decode.tell(do="abandon") == list(range(POOL_BLOCKS))
    await prefill.whole_transfer(decode)
