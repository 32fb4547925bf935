"""KV at a byte a value over real sockets: what arrives is what the codes mean, and nothing else passes for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest

from common.clock import SystemClock
from common.errors import DigestMismatch, HandoffError, HandshakeRefused, StartupError, TransferBroken
from common.types import KVLayout, WorkerRef
from kvtransfer.frames import Frame, FrameKind, encode_table
from kvtransfer.incoming import Incoming
from kvtransfer.receiver import KVReceiver
from kvtransfer.region import BlockRegion
from kvtransfer.sender import KVSender
from kvtransfer.state import HandoffState, Seal
from kvtransfer.ticket import derive_secret
from kvtransfer.transports import tcp_coded
from kvtransfer.transports.base import PieceName, TransportOffer
from kvtransfer.transports.tcp_coded import KINDS
from kvtransfer.wire_dtype import WireFormat, decode, encode

LAYOUT = KVLayout("model", "tokenizer", 3, 2, 8, 16, "float32", False)
BLOCKS = 12
SECRET = derive_secret("token")
PATIENCE_S = 120.0


class Pair:
    def __init__(self, kind: str) -> None:
        self.wire = WireFormat(KINDS[kind], LAYOUT)
        self.pool, self.source = (BlockRegion.create_shared(LAYOUT.block_bytes, BLOCKS) for _ in range(2))
        values = np.random.default_rng(3).normal(0, 3, self.source.buffer.nbytes // 4).astype(np.float32)
        self.source.buffer[:] = values.tobytes()
        self.receiver = KVReceiver(self.pool, LAYOUT, "d", 1, SECRET, SystemClock())
        self.sender = KVSender(self.source, LAYOUT, "p", 1, SECRET, SystemClock())
        self.kind = kind

    async def start(self) -> None:
        offers = await self.receiver.start([self.kind], "127.0.0.1")
        assert await self.sender.connect("d", 1, offers, BLOCKS) == self.kind

    async def stop(self) -> None:
        await self.sender.close()
        await self.receiver.close()
        self.pool.close()
        self.source.close()

    def offer(self, blocks: tuple[int, ...]) -> Incoming:
        return self.receiver.open(
            request_id="r",
            attempt=0,
            prefill=WorkerRef("p", 1, ""),
            first_block=0,
            blocks=blocks,
            num_tokens=16 * len(blocks),
            ttl_s=PATIENCE_S,
        )

    def meant(self, source_block: int) -> bytes:
        """What the codes of a block mean: layers are coded one by one, so it does not matter in which pieces they travel."""
        return decode(encode(self.source.block(source_block), self.wire), self.wire)


@pytest.fixture(params=sorted(KINDS))
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    pair = Pair(request.param)
    await pair.start()
    yield pair
    await pair.stop()


async def test_what_arrives_is_what_the_codes_mean(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_coded, "FRAME_BYTES", 3 * pair.wire.layer_bytes)
    incoming = pair.offer((7, 3, 9, 1))
    outgoing = pair.sender.open(incoming.ticket)
    async with asyncio.timeout(PATIENCE_S):
        for layers in ((0, 2), (2, 3)):
            await outgoing.push([(0, 2), (1, 3), (2, 4), (3, 5)], layers)
        account = await outgoing.finish()
        await incoming.complete(Seal(incoming.ticket.nonce, incoming.ticket.num_tokens, account.digests))
    assert account.bytes == 4 * LAYOUT.block_bytes
    for source, destination in ((2, 7), (3, 3), (4, 9), (5, 1)):
        assert bytes(pair.pool.block(destination)) == pair.meant(source)
        assert pair.meant(source) != bytes(pair.source.block(source)), "nothing was lost: nothing was coded"
    assert bytes(pair.pool.block(0)) == bytes(LAYOUT.block_bytes)


@pytest.mark.parametrize("where", ["a code", "a scale", "the pool"])
async def test_a_flipped_bit_is_noticed(pair: Pair, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    incoming = pair.offer((7, 3))
    landed = pair.receiver.pieces_written

    def coded_and_spoiled(block: memoryview, wire: WireFormat) -> bytes:
        coded = bytearray(encode(block, wire))
        spoiled.append(bytes(coded))
        coded[5 if where == "a code" else -2] ^= 1
        return bytes(coded)

    spoiled: list[bytes] = []
    if where == "the pool":

        def landing(link, nonce, written) -> None:  # type: ignore[no-untyped-def]
            if written[0].name.logical_block == 1:
                pair.pool.block(3)[100] ^= 1
            landed(link, nonce, written)

        monkeypatch.setattr(pair.receiver, "pieces_written", landing)
    else:  # on the way: the digest is of what was meant
        monkeypatch.setattr(tcp_coded, "encode", coded_and_spoiled)
        honest = tcp_coded.decode
        monkeypatch.setattr(tcp_coded, "decode", lambda data, wire: honest(spoiled.pop() if spoiled else data, wire))
    outgoing = pair.sender.open(incoming.ticket)
    await outgoing.push([(0, 2), (1, 3)])
    async with asyncio.timeout(PATIENCE_S):
        assert isinstance(await incoming.wait_failed(), DigestMismatch)
        await outgoing.abort()
        assert await incoming.abandon(lambda: pair.sender.release([incoming.ticket.nonce])) == (7, 3)


async def test_a_value_without_a_code_ends_the_transfer(pair: Pair) -> None:
    pair.source.block(3)[8:12] = np.float32(np.nan).tobytes()
    incoming = pair.offer((7, 3))
    outgoing = pair.sender.open(incoming.ticket)
    await outgoing.push([(0, 2), (1, 3)])
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(HandoffError, match="finite"):
            await outgoing.finish()
        assert await incoming.abandon(lambda: pair.sender.release([incoming.ticket.nonce])) == (7, 3)


async def test_codes_that_nobody_makes_end_the_link(pair: Pair) -> None:
    incoming = pair.offer((7,))
    outgoing = pair.sender.open(incoming.ticket)
    link = pair.sender._peers["d"].link
    assert link is not None
    async with asyncio.timeout(PATIENCE_S):
        while incoming.state is not HandoffState.STREAMING:
            await asyncio.sleep(0.001)
        payload = b"\x80" * (2 * pair.wire.layer_bytes) if pair.kind == "tcp_int8" else b"\x7f" * (2 * pair.wire.layer_bytes)
        frame = Frame(FrameKind.BLOCKS, incoming.ticket.nonce, 1, len(payload)).encode()
        link._send([frame + encode_table([PieceName(0, 0, 2)], [bytes(16)]), payload])  # type: ignore[attr-defined]
        assert isinstance(await incoming.wait_failed(), TransferBroken)
        await outgoing.abort()
        assert await incoming.abandon(lambda: asyncio.sleep(0)) == (7,)


async def test_what_is_not_wanted_any_more_goes_nowhere(pair: Pair) -> None:
    incoming = pair.offer((7, 3))
    outgoing = pair.sender.open(incoming.ticket)
    async with asyncio.timeout(PATIENCE_S):
        while incoming.state is not HandoffState.STREAMING:
            await asyncio.sleep(0.001)
        giving_up = asyncio.create_task(incoming.abandon(lambda: pair.sender.release([incoming.ticket.nonce])))
        await outgoing.push([(0, 2), (1, 3)])
        assert await giving_up == (7, 3)
        await outgoing.abort()
    assert bytes(pair.pool.buffer) == bytes(pair.pool.buffer.nbytes)


@pytest.mark.parametrize("kind", sorted(KINDS))
async def test_exact_kv_is_refused_on_both_sides(kind: str) -> None:
    exact = replace(LAYOUT, exact=True)
    region = BlockRegion.create_shared(exact.block_bytes, 2)
    receiver = KVReceiver(region, exact, "d", 1, SECRET, SystemClock())
    with pytest.raises(StartupError, match="exact"):
        await receiver.start([kind], "127.0.0.1")
    sender = KVSender(region, exact, "p", 1, SECRET, SystemClock())
    with pytest.raises(HandshakeRefused) as refused:
        await sender.connect("d", 1, [TransportOffer(kind, "127.0.0.1:1")], 2)
    assert refused.value.param == "exact"
    await sender.close()
    await receiver.close()
    region.close()
