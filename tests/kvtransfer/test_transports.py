"""One suite over every transport: what a link promises, whatever carries it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import pytest

import kvtransfer.incoming
import kvtransfer.outgoing
import kvtransfer.transports.fetching
from common.clock import Clock, ManualClock, SystemClock
from common.errors import (
    DigestMismatch,
    HandshakeRefused,
    IllegalTransition,
    SealMismatch,
    StartupError,
    TicketRefused,
    TransferBroken,
    TransferTimeout,
)
from common.metrics import LeaseReadings
from common.types import KVLayout, WorkerRef
from kvtransfer.digest import block_digest_of, piece_digest
from kvtransfer.frames import Frame, FrameKind
from kvtransfer.lease import LEASE_S
from kvtransfer.receiver import CREDIT_BYTES, Incoming, KVReceiver
from kvtransfer.region import BlockRegion
from kvtransfer.sender import KVSender, Outgoing, TransferAccount
from kvtransfer.state import HandoffState, Seal
from kvtransfer.ticket import derive_secret
from kvtransfer.transports import LOSSY, TRANSPORTS
from kvtransfer.transports.authentication import LINK_VERSION, Hello, Verdict, prefill_proof
from kvtransfer.transports.base import PeerName, Piece, PieceName, ReceiverLink, SenderLink, TransportOffer, Written
from support.device_pools import VisibleRegion

LAYOUT = KVLayout("model", "tokenizer", 4, 2, 32, 16, "float32", True)  # 64 KiB a block
BLOCKS = 24
SECRET = derive_secret("token")
Result = TypeVar("Result")
PATIENCE_S = 120.0  # far beyond what anything here takes: a hang becomes a failure


def region_for(kind: str) -> BlockRegion:
    if kind == "cuda_ipc":  # on a GPU if there is one
        return VisibleRegion(LAYOUT.block_bytes, BLOCKS, LAYOUT.num_layers)
    return BlockRegion.create_shared(LAYOUT.block_bytes, BLOCKS)


class Pair:
    """A decode and a prefill worker, as far as KV transfer goes."""

    def __init__(
        self, kind: str, clock: Clock | None = None, *, lease_s: float = LEASE_S, credit_bytes: int = CREDIT_BYTES
    ) -> None:
        self.kind = kind
        self.random = random.Random(kind)
        self.pool, self.source = region_for(kind), region_for(kind)
        self.source.buffer[:] = self.random.randbytes(self.source.buffer.nbytes)
        self.receiver = KVReceiver(
            self.pool, LAYOUT, "m/decode/0", 3, SECRET, clock or SystemClock(), lease_s=lease_s, credit_bytes=credit_bytes
        )
        self.sender = KVSender(self.source, LAYOUT, "m/prefill/0", 5, SECRET, SystemClock(), lease_s=lease_s)
        self.more_senders: list[KVSender] = []
        self.offers: list[TransportOffer] = []

    async def start(self) -> None:
        self.offers = await self.receiver.start([self.kind], "127.0.0.1")
        assert await self.connect(self.sender) == self.kind

    async def connect(self, sender: KVSender) -> str:
        return await sender.connect("m/decode/0", 3, self.offers, BLOCKS)

    def another_sender(self, worker_id: str, incarnation: int, secret: bytes = SECRET) -> KVSender:
        sender = KVSender(self.source, LAYOUT, worker_id, incarnation, secret, SystemClock())
        self.more_senders.append(sender)
        return sender

    async def stop(self) -> None:
        for sender in (self.sender, *self.more_senders):
            await sender.close()
            assert sender.num_open == 0
        await self.receiver.close()
        self.pool.close()
        self.source.close()

    def offer(
        self,
        blocks: Sequence[int],
        *,
        first_block: int = 0,
        worker_id: str = "m/prefill/0",
        incarnation: int = 5,
        ttl_s: float = PATIENCE_S,
    ) -> Incoming:
        return self.receiver.open(
            request_id="r",
            attempt=0,
            prefill=WorkerRef(worker_id, incarnation, "unused"),
            first_block=first_block,
            blocks=blocks,
            num_tokens=16 * (first_block + len(blocks)),
            ttl_s=ttl_s,
        )

    def link(self, sender: KVSender | None = None) -> SenderLink:
        link = (sender or self.sender)._peers["m/decode/0"].link
        assert link is not None
        return link

    async def release(self, incoming: Incoming) -> None:
        await self.sender.release([incoming.ticket.nonce])

    async def abandon(self, incoming: Incoming) -> tuple[int, ...]:
        return await within(incoming.abandon(lambda: self.release(incoming)))

    def whole(self, logical_block: int, pool_block: int, source_block: int) -> Piece:
        """What the sender makes of a whole block, for links that are driven by hand."""
        name = PieceName(logical_block, 0, LAYOUT.num_layers)
        return Piece(name, pool_block * LAYOUT.block_bytes, self.source.block(source_block))

    def digest(self, nonce: bytes, logical_block: int, source_block: int) -> bytes:
        """What a seal states of a block that was sent whole."""
        piece = piece_digest(self.source.block(source_block), nonce, logical_block, 0, LAYOUT.num_layers)
        return block_digest_of([(0, LAYOUT.num_layers, piece)])

    def snapshot(self) -> bytes:
        return bytes(self.pool.buffer)


class News:
    """A writer without a pump."""

    def __init__(self) -> None:
        self.credit_bytes: list[int] = []
        self.renewals = 0
        self.num_lent = 0

    def credited(self, size_bytes: int) -> None:
        self.credit_bytes.append(size_bytes)

    def renewed(self) -> None:
        self.renewals += 1

    def lent(self, num_pieces: int) -> None:
        self.num_lent += num_pieces

    def taken(self, num_pieces: int) -> None:
        self.num_lent -= num_pieces


async def within(awaitable: Awaitable[Result]) -> Result:
    async with asyncio.timeout(PATIENCE_S):
        return await awaitable


def seal_of(incoming: Incoming, account: TransferAccount) -> Seal:
    return Seal(incoming.ticket.nonce, incoming.ticket.num_tokens, account.digests)


async def run(incoming: Incoming, outgoing: Outgoing, blocks: Sequence[tuple[int, int]]) -> None:
    await within(outgoing.push(blocks))
    await within(incoming.complete(seal_of(incoming, await within(outgoing.finish()))))


async def push_and_finish(outgoing: Outgoing, blocks: Sequence[tuple[int, int]]) -> TransferAccount:
    await within(outgoing.push(blocks))
    return await within(outgoing.finish())


async def arrived(incoming: Incoming, num_blocks: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while incoming.num_blocks < num_blocks:  # nothing in the product needs an event for this
            await asyncio.sleep(0.001)


@pytest.fixture(params=sorted(TRANSPORTS.keys() - LOSSY))
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    if request.param == "nixl":
        pytest.importorskip("nixl_cu13")
    descriptors = len(os.listdir("/proc/self/fd"))
    pair = Pair(request.param)
    await pair.start()
    yield pair
    await pair.stop()
    await asyncio.sleep(0)
    if len(os.listdir("/proc/self/fd")) > descriptors:
        gc.collect()  # tracebacks of expected errors hold views of a region, and so its mapping
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert asyncio.all_tasks() <= {asyncio.current_task()} or all(
        not task.get_name().startswith("kv-") for task in asyncio.all_tasks()
    )


# -- what arrives ------------------------------------------------------------------------------------------------------


async def test_blocks_arrive_bit_exact_in_any_order(pair: Pair) -> None:
    for attempt in range(4):
        destination = pair.random.sample(range(BLOCKS), 10)
        sources = pair.random.sample(range(BLOCKS), 10)
        before = pair.snapshot()
        incoming = pair.offer(destination, first_block=attempt)
        outgoing = pair.sender.open(incoming.ticket)
        pushes = [(attempt + index, sources[index]) for index in range(10)]
        pair.random.shuffle(pushes)
        for start in range(0, 10, 3):
            await outgoing.push(pushes[start : start + 3])
        account = await within(outgoing.finish())
        await within(incoming.complete(seal_of(incoming, account)))
        assert account.bytes == 10 * LAYOUT.block_bytes
        for block in range(BLOCKS):
            expected = (
                bytes(pair.source.block(sources[destination.index(block)]))
                if block in destination
                else before[block * LAYOUT.block_bytes : (block + 1) * LAYOUT.block_bytes]
            )
            assert bytes(pair.pool.block(block)) == expected
        assert incoming.state is HandoffState.ACTIVE
        assert incoming.transport == pair.kind
        assert (pair.receiver.num_open, pair.sender.num_open) == (0, 0)
    assert pair.receiver.counters.bytes == 40 * LAYOUT.block_bytes
    assert pair.receiver.counters.transfers_completed == 4


async def test_nothing_to_move_needs_no_link(pair: Pair) -> None:
    incoming = pair.offer((), first_block=2)
    account = await within(pair.sender.open(incoming.ticket).finish())
    assert account.digests == {}
    await within(incoming.complete(seal_of(incoming, account)))
    assert incoming.transport == ""
    assert (pair.receiver.num_open, pair.sender.num_open) == (0, 0)


async def test_two_transfers_do_not_mix(pair: Pair) -> None:
    other = pair.another_sender("m/prefill/1", 1)
    await pair.connect(other)
    first, second, third = (
        pair.offer((0, 1, 2, 3)),
        pair.offer((4, 5, 6, 7)),
        pair.offer((8, 9), worker_id="m/prefill/1", incarnation=1),
    )
    await asyncio.gather(
        run(first, pair.sender.open(first.ticket), [(0, 0), (1, 1), (2, 2), (3, 3)]),
        run(second, pair.sender.open(second.ticket), [(3, 10), (2, 11), (1, 12), (0, 13)]),
        run(third, other.open(third.ticket), [(0, 20), (1, 21)]),
    )
    sources = [0, 1, 2, 3, 13, 12, 11, 10, 20, 21]
    assert [bytes(pair.pool.block(block)) for block in range(10)] == [bytes(pair.source.block(block)) for block in sources]


async def test_a_long_queue_makes_push_wait(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvtransfer.outgoing, "MAX_QUEUED_BYTES", 2 * LAYOUT.block_bytes)
    monkeypatch.setattr(kvtransfer.outgoing, "BATCH_BYTES", LAYOUT.block_bytes)
    incoming = pair.offer(range(BLOCKS))
    outgoing = pair.sender.open(incoming.ticket)
    for start in range(0, BLOCKS, 6):
        await within(outgoing.push([(block, block) for block in range(start, start + 6)]))
        assert outgoing._queued_bytes <= 2 * LAYOUT.block_bytes
    await within(incoming.complete(seal_of(incoming, await outgoing.finish())))
    assert pair.snapshot() == bytes(pair.source.buffer)


def random_cut(chance: random.Random) -> list[tuple[int, int]]:
    """Layers of a block in consecutive ranges."""
    borders = sorted(chance.sample(range(1, LAYOUT.num_layers), chance.randrange(LAYOUT.num_layers)))
    return list(zip([0, *borders], [*borders, LAYOUT.num_layers], strict=True))


async def test_layers_arrive_bit_exact_in_any_order(pair: Pair) -> None:
    """Each block is cut into ranges of layers in a way of its own, and the ranges come in any order."""
    for attempt in range(4):
        destination = pair.random.sample(range(BLOCKS), 8)
        sources = pair.random.sample(range(BLOCKS), 8)
        expected = bytearray(pair.snapshot())
        for block, source in zip(destination, sources, strict=True):
            expected[block * LAYOUT.block_bytes : (block + 1) * LAYOUT.block_bytes] = pair.source.block(source)
        incoming = pair.offer(destination, first_block=attempt)
        outgoing = pair.sender.open(incoming.ticket)
        pushes = [(attempt + index, sources[index], layers) for index in range(8) for layers in random_cut(pair.random)]
        pair.random.shuffle(pushes)
        for logical, source, layers in pushes:
            await outgoing.push([(logical, source)], layers)
        account = await within(outgoing.finish())
        await within(incoming.complete(seal_of(incoming, account)))
        assert account.bytes == 8 * LAYOUT.block_bytes
        assert pair.snapshot() == bytes(expected)
    assert pair.receiver.counters.bytes == 32 * LAYOUT.block_bytes
    assert pair.receiver.counters.blocks == 32


async def test_layers_that_wait_go_together(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that is behind writes fewer and larger pieces, and what arrives is the same."""
    names: list[PieceName] = []
    landed = pair.receiver.pieces_written

    def note(link: ReceiverLink, nonce: bytes, written: Sequence[Written]) -> None:
        names.extend(piece.name for piece in written)
        landed(link, nonce, written)

    monkeypatch.setattr(pair.receiver, "pieces_written", note)
    incoming = pair.offer(range(BLOCKS))
    outgoing = pair.sender.open(incoming.ticket)
    for layer in range(LAYOUT.num_layers):
        await outgoing.push([(block, block) for block in range(BLOCKS)], (layer, layer + 1))
    await within(incoming.complete(seal_of(incoming, await within(outgoing.finish()))))
    assert sorted(names) == [(block, 0, LAYOUT.num_layers) for block in range(BLOCKS)]
    assert pair.snapshot() == bytes(pair.source.buffer)


async def test_a_prompt_layer_by_layer(pair: Pair) -> None:
    """As it is computed: each layer of all blocks, then the next layer."""
    incoming = pair.offer(range(BLOCKS))
    outgoing = pair.sender.open(incoming.ticket)
    for layer in range(LAYOUT.num_layers):
        assert incoming.num_blocks == 0
        await outgoing.push([(block, block) for block in range(BLOCKS)], (layer, layer + 1))
    await within(incoming.complete(seal_of(incoming, await within(outgoing.finish()))))
    assert pair.snapshot() == bytes(pair.source.buffer)


# -- what must not pass ------------------------------------------------------------------------------------------------


def tamper(pair: Pair, monkeypatch: pytest.MonkeyPatch, at_block: int, change: Callable[[memoryview], None]) -> None:
    """Lets `change` loose on the received bytes just before they are checked: damage on the way, for any transport."""

    def damaged(piece: memoryview, nonce: bytes, logical_block: int, first_layer: int, num_layers: int) -> bytes:
        if logical_block == at_block:
            change(piece)
        return piece_digest(piece, nonce, logical_block, first_layer, num_layers)

    monkeypatch.setattr(kvtransfer.incoming, "piece_digest", damaged)
    for module in (kvtransfer.incoming, kvtransfer.transports.fetching):  # with it: `native/test_native_pieces.py`
        monkeypatch.setattr(module, "piece_kernel", lambda: None)
    monkeypatch.setattr(kvtransfer.incoming, "read_contents", lambda views: None)  # of a device: not before the damage is done


@pytest.mark.parametrize("position", [0, LAYOUT.block_bytes // 2, LAYOUT.block_bytes - 1])
async def test_one_flipped_bit_is_noticed(pair: Pair, monkeypatch: pytest.MonkeyPatch, position: int) -> None:
    def flip(block: memoryview) -> None:
        block[position] ^= 1

    tamper(pair, monkeypatch, 2, flip)
    incoming = pair.offer((5, 6, 7, 8))
    outgoing = pair.sender.open(incoming.ticket)
    await outgoing.push([(block, block) for block in range(4)])
    account = await within(outgoing.finish())
    with pytest.raises(DigestMismatch):
        await within(incoming.complete(seal_of(incoming, account)))
    assert isinstance(await within(incoming.wait_failed()), DigestMismatch)
    assert await pair.abandon(incoming) == (5, 6, 7, 8)
    assert pair.receiver.counters.failures == {"DigestMismatch": 1}
    assert pair.receiver.num_open == 0


@pytest.mark.parametrize("layer", [0, 2])
async def test_one_flipped_bit_in_one_layer_is_noticed(pair: Pair, monkeypatch: pytest.MonkeyPatch, layer: int) -> None:
    def damaged(piece: memoryview, nonce: bytes, logical_block: int, first_layer: int, num_layers: int) -> bytes:
        if logical_block == 1 and first_layer <= layer < first_layer + num_layers:  # layers that waited may come as one piece
            piece[7 + (layer - first_layer) * LAYOUT.block_bytes // LAYOUT.num_layers] ^= 0x10
        return piece_digest(piece, nonce, logical_block, first_layer, num_layers)

    monkeypatch.setattr(kvtransfer.incoming, "piece_digest", damaged)
    for module in (kvtransfer.incoming, kvtransfer.transports.fetching):  # with it: `native/test_native_pieces.py`
        monkeypatch.setattr(module, "piece_kernel", lambda: None)
    monkeypatch.setattr(kvtransfer.incoming, "read_contents", lambda views: None)
    incoming = pair.offer((5, 6))
    outgoing = pair.sender.open(incoming.ticket)
    for first in range(LAYOUT.num_layers):
        await outgoing.push([(0, 0), (1, 1)], (first, first + 1))
    with pytest.raises((DigestMismatch, TransferBroken)):  # over tcp the writer may hear that nobody listens any more
        await within(incoming.complete(seal_of(incoming, await within(outgoing.finish()))))
    assert isinstance(await within(incoming.wait_failed()), DigestMismatch)
    await pair.abandon(incoming)


async def test_layers_of_another_place_are_noticed(pair: Pair) -> None:
    """The bytes of one layer arrive intact under the name of another one."""
    incoming = pair.offer((5,))
    nonce, layer_bytes = incoming.ticket.nonce, LAYOUT.block_bytes // LAYOUT.num_layers
    link = pair.link()
    await within(link.open_writer(nonce, News()))
    block = pair.source.block(0)
    layers = [block[start : start + layer_bytes] for start in range(0, LAYOUT.block_bytes, layer_bytes)]
    honest = [(layer, 1, piece_digest(layers[layer], nonce, 0, layer, 1)) for layer in range(LAYOUT.num_layers)]
    layers[1], layers[2] = layers[2], layers[1]
    start = 5 * LAYOUT.block_bytes
    pieces = [Piece(PieceName(0, layer, 1), start + layer * layer_bytes, layers[layer]) for layer in range(LAYOUT.num_layers)]
    await within(link.write(nonce, pieces, lambda: False))
    await within(link.close_writer(nonce))
    with pytest.raises(SealMismatch):
        await within(incoming.complete(Seal(nonce, 16, {0: block_digest_of(honest)})))
    await pair.abandon(incoming)


@pytest.mark.parametrize("layers", [(0, 0), (2, 1), (-1, 2), (3, 5), (4, 5)])
async def test_layers_that_no_block_has_are_not_pushed(pair: Pair, layers: tuple[int, int]) -> None:
    incoming = pair.offer((5,))
    outgoing = pair.sender.open(incoming.ticket)
    with pytest.raises(TicketRefused) as refused:
        await outgoing.push([(0, 0)], layers)
    assert refused.value.param == "layers"
    await run(incoming, outgoing, [(0, 0)])


@pytest.mark.parametrize("again", [(0, 2), (1, 2), (1, 4), (0, 4)])
async def test_a_layer_is_pushed_once(pair: Pair, again: tuple[int, int]) -> None:
    incoming = pair.offer((5,))
    outgoing = pair.sender.open(incoming.ticket)
    await outgoing.push([(0, 0)], (0, 2))
    with pytest.raises(TicketRefused):
        await outgoing.push([(0, 1)], again)
    await outgoing.push([(0, 0)], (2, 4))
    await within(incoming.complete(seal_of(incoming, await within(outgoing.finish()))))
    assert bytes(pair.pool.block(5)) == bytes(pair.source.block(0))


async def test_a_writer_that_sends_a_layer_twice_is_noticed(pair: Pair) -> None:
    incoming = pair.offer((5,))
    nonce, half_bytes = incoming.ticket.nonce, LAYOUT.block_bytes // 2
    link = pair.link()
    await within(link.open_writer(nonce, News()))
    start = 5 * LAYOUT.block_bytes
    first = Piece(PieceName(0, 0, 2), start, pair.source.block(0)[:half_bytes])
    again = Piece(PieceName(0, 1, 2), start + half_bytes // 2, pair.source.block(1)[:half_bytes])
    await within(link.write(nonce, [first], lambda: False))
    await within(link.write(nonce, [first], lambda: False))  # the same once more is no harm
    await within(link.write(nonce, [again], lambda: False))
    assert isinstance(await within(incoming.wait_failed()), DigestMismatch)
    await within(link.close_writer(nonce))
    if link.kind == "tcp":  # the piece had no place
        assert bytes(pair.pool.block(5)[:half_bytes]) == bytes(pair.source.block(0)[:half_bytes])
    await pair.abandon(incoming)


async def test_an_account_without_all_layers_is_not_given(pair: Pair) -> None:
    incoming = pair.offer((5, 6))
    outgoing = pair.sender.open(incoming.ticket)
    await outgoing.push([(0, 0)])
    await outgoing.push([(1, 1)], (0, 3))
    await arrived(incoming, 1)
    with pytest.raises(SealMismatch, match="1 of the ticket's 2 blocks"):
        await within(outgoing.finish())
    assert isinstance(await within(incoming.wait_failed()), TransferBroken)
    await pair.abandon(incoming)


async def test_swapped_blocks_are_noticed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each digest is right for the place it was meant for; the bytes went to each other's place."""
    other = bytes(pair.source.block(1))
    tamper(pair, monkeypatch, 0, lambda block: block.__setitem__(slice(None), other))
    incoming = pair.offer((5, 6))
    outgoing = pair.sender.open(incoming.ticket)
    await outgoing.push([(0, 0), (1, 1)])
    account = await within(outgoing.finish())
    with pytest.raises(DigestMismatch):
        await within(incoming.complete(seal_of(incoming, account)))
    await pair.abandon(incoming)


async def test_blocks_that_claim_each_others_number_are_noticed(pair: Pair) -> None:
    incoming = pair.offer((5, 6))
    nonce = incoming.ticket.nonce
    link = pair.link()
    await within(link.open_writer(nonce, News()))
    # Block 1's bytes arrive intact, under the number and in the place of block 0, and the other way round.
    pieces = [pair.whole(0, 5, 1), pair.whole(1, 6, 0)]
    await within(link.write(nonce, pieces, lambda: False))
    await within(link.close_writer(nonce))
    honest = {logical: pair.digest(nonce, logical, logical) for logical in (0, 1)}
    with pytest.raises(SealMismatch):
        await within(incoming.complete(Seal(nonce, 32, honest)))
    await pair.abandon(incoming)


async def test_bytes_of_another_request_are_noticed(pair: Pair) -> None:
    """The sender digests one block, and another one lands: what a source that is freed too early looks like."""
    incoming = pair.offer((5,))
    link = pair.link()
    await within(link.open_writer(incoming.ticket.nonce, News()))
    digests = await within(link.write(incoming.ticket.nonce, [pair.whole(0, 5, 0)], lambda: False))
    await within(link.close_writer(incoming.ticket.nonce))
    other = pair.digest(incoming.ticket.nonce, 0, 1)
    assert digests == [piece_digest(pair.source.block(0), incoming.ticket.nonce, 0, 0, LAYOUT.num_layers)]
    with pytest.raises(SealMismatch):
        await within(incoming.complete(Seal(incoming.ticket.nonce, 16, {0: other})))
    await pair.abandon(incoming)


@pytest.mark.parametrize("wrong", ["tokens", "nonce", "missing", "extra"])
async def test_a_seal_that_does_not_add_up_is_refused(pair: Pair, wrong: str) -> None:
    incoming = pair.offer((5, 6))
    outgoing = pair.sender.open(incoming.ticket)
    await outgoing.push([(0, 0), (1, 1)])
    seal = seal_of(incoming, await within(outgoing.finish()))
    seal = {
        "tokens": replace(seal, num_tokens=1),
        "nonce": replace(seal, nonce=bytes(16)),
        "missing": replace(seal, digests={0: seal.digests[0]}),
        "extra": replace(seal, digests={**seal.digests, 2: seal.digests[0]}),
    }[wrong]
    with pytest.raises(SealMismatch):
        await within(incoming.complete(seal))
    assert await pair.abandon(incoming) == (5, 6)


async def test_an_unfinished_account_is_not_given(pair: Pair) -> None:
    incoming = pair.offer((5, 6))
    outgoing = pair.sender.open(incoming.ticket)
    await outgoing.push([(0, 0)])
    await arrived(incoming, 1)
    with pytest.raises(SealMismatch):
        await within(outgoing.finish())
    assert isinstance(await within(incoming.wait_failed()), TransferBroken)
    await pair.abandon(incoming)
    assert pair.sender.num_open == 0


async def test_a_used_ticket_is_refused_on_both_sides(pair: Pair) -> None:
    incoming = pair.offer((5,))
    await run(incoming, pair.sender.open(incoming.ticket), [(0, 0)])
    before = pair.snapshot()
    with pytest.raises(TicketRefused):
        pair.sender.open(incoming.ticket)
    pair.sender._spent.clear()  # a sender that has forgotten
    replayed = pair.sender.open(incoming.ticket)
    await replayed.push([(0, 9)])
    with pytest.raises(TicketRefused):
        await within(replayed.finish())
    assert pair.snapshot() == before


async def test_one_nonce_admits_one_writer(pair: Pair) -> None:
    incoming = pair.offer((5,))
    link = pair.link()
    await within(link.open_writer(incoming.ticket.nonce, News()))
    with pytest.raises(TicketRefused):
        await within(link.open_writer(incoming.ticket.nonce, News()))
    await within(link.close_writer(incoming.ticket.nonce))
    await pair.abandon(incoming)


async def test_a_ticket_is_for_one_worker_only(pair: Pair) -> None:
    other = pair.another_sender("m/prefill/1", 1)
    await pair.connect(other)
    incoming = pair.offer((5,))
    with pytest.raises(TicketRefused):
        other.open(incoming.ticket)
    with pytest.raises(TicketRefused):  # and a worker that does not ask itself is asked
        await within(pair.link(other).open_writer(incoming.ticket.nonce, News()))
    assert incoming.state is HandoffState.OFFERED
    await run(incoming, pair.sender.open(incoming.ticket), [(0, 0)])


async def test_nobody_else_writes_under_an_open_ticket(pair: Pair) -> None:
    other = pair.another_sender("m/prefill/1", 1)
    await pair.connect(other)
    incoming = pair.offer((5, 6))
    nonce = incoming.ticket.nonce
    outgoing = pair.sender.open(incoming.ticket)
    await outgoing.push([(0, 0)])
    await arrived(incoming, 1)
    if pair.kind in ("tcp", "nixl"):  # where the writer needs our help to reach the pool
        before = pair.snapshot()
        await within(pair.link(other).write(nonce, [pair.whole(1, 6, 3)], lambda: False))
        await within(pair.link(other).close_writer(nonce))
        await outgoing.push([(1, 1)])
        assert pair.snapshot()[: 6 * LAYOUT.block_bytes] == before[: 6 * LAYOUT.block_bytes]
    else:
        await within(pair.link(other).close_writer(nonce))
        await outgoing.push([(1, 1)])
    await within(incoming.complete(seal_of(incoming, await outgoing.finish())))
    assert bytes(pair.pool.block(6)) == bytes(pair.source.block(1))


async def test_a_block_outside_the_ticket_is_refused_on_both_sides(pair: Pair) -> None:
    incoming = pair.offer((5, 6), first_block=3)
    outgoing = pair.sender.open(incoming.ticket)
    for logical in (2, 5, -1, 1 << 40):
        with pytest.raises(TicketRefused):
            await outgoing.push([(logical, 0)])
    with pytest.raises(IndexError):
        await outgoing.push([(3, BLOCKS)])
    await outgoing.push([(3, 0)])
    with pytest.raises(TicketRefused):
        await outgoing.push([(3, 1)])
    await arrived(incoming, 1)
    outside = [block for block in range(BLOCKS) if block not in (5, 6)]
    before = [bytes(pair.pool.block(block)) for block in outside]
    # A sender that does not check either: the number in the frame finds no place.
    await within(pair.link().write(incoming.ticket.nonce, [pair.whole(5, 6, 1)], lambda: False))
    assert isinstance(await within(incoming.wait_failed()), TicketRefused)
    assert [bytes(pair.pool.block(block)) for block in outside] == before
    await outgoing.abort()
    await pair.abandon(incoming)


# -- credit ------------------------------------------------------------------------------------------------------------

WINDOW_BLOCKS = 4


@pytest.fixture(params=sorted(TRANSPORTS.keys() - LOSSY))
async def tight(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    """A receiver that lets little be on its way."""
    pair = Pair(request.param, credit_bytes=WINDOW_BLOCKS * LAYOUT.block_bytes)
    await pair.start()
    yield pair
    await pair.stop()


async def test_a_large_transfer_goes_through_a_small_window(tight: Pair) -> None:
    for layers in ([None], [(0, 1), (1, 4)]):
        tight.pool.buffer[:] = bytes(tight.pool.buffer.nbytes)
        incoming = tight.offer(range(BLOCKS))
        outgoing = tight.sender.open(incoming.ticket)
        for part in layers:
            await within(outgoing.push([(block, block) for block in range(BLOCKS)], part))
        await within(incoming.complete(seal_of(incoming, await within(outgoing.finish()))))
        assert tight.snapshot() == bytes(tight.source.buffer)


async def test_credit_is_the_receipt(tight: Pair) -> None:
    """What was granted at first and what came back add up to the window and all that was verified."""
    incoming = tight.offer(range(6))
    link, nonce, news = tight.link(), incoming.ticket.nonce, News()
    await within(link.open_writer(nonce, news))
    assert news.credit_bytes == [WINDOW_BLOCKS * LAYOUT.block_bytes]
    for block in range(6):
        await within(link.write(nonce, [tight.whole(block, block, block)], lambda: False))
    async with asyncio.timeout(PATIENCE_S):
        while sum(news.credit_bytes) < (WINDOW_BLOCKS + 6) * LAYOUT.block_bytes:
            await asyncio.sleep(0.001)
    assert incoming.num_blocks == 6
    await within(link.close_writer(nonce))
    await tight.abandon(incoming)
    assert sum(news.credit_bytes) == (WINDOW_BLOCKS + 6) * LAYOUT.block_bytes


async def test_a_receiver_that_does_not_verify_stops_the_writer_and_nobody_else(
    tight: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    give = Incoming._return_credit
    held = tight.offer(range(12))
    monkeypatch.setattr(Incoming, "_return_credit", lambda incoming: None if incoming is held else give(incoming))
    stopped = tight.sender.open(held.ticket)
    await stopped.push([(block, block) for block in range(12)])
    await arrived(held, WINDOW_BLOCKS)
    other = tight.another_sender("m/prefill/1", 1)
    await tight.connect(other)
    for first in (12, 18):  # on the same link, and on another one
        following = tight.offer(
            range(first, first + 6),
            worker_id="m/prefill/0" if first == 12 else "m/prefill/1",
            incarnation=5 if first == 12 else 1,
        )
        outgoing = (tight.sender if first == 12 else other).open(following.ticket)
        await run(following, outgoing, [(block, first + block) for block in range(6)])
    assert held.num_blocks == WINDOW_BLOCKS
    assert bytes(tight.pool.buffer[WINDOW_BLOCKS * LAYOUT.block_bytes : 12 * LAYOUT.block_bytes]) == bytes(8 * LAYOUT.block_bytes)
    monkeypatch.undo()
    held._return_credit()  # it goes on where it stood
    await within(held.complete(seal_of(held, await within(stopped.finish()))))
    assert tight.snapshot() == bytes(tight.source.buffer)


async def test_a_writer_without_credit_can_be_stopped(tight: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Incoming, "_return_credit", lambda incoming: None)
    incoming = tight.offer(range(12))
    outgoing = tight.sender.open(incoming.ticket)
    await outgoing.push([(block, block) for block in range(12)])
    await arrived(incoming, WINDOW_BLOCKS)
    finishing = asyncio.create_task(outgoing.finish())
    assert await tight.abandon(incoming) == tuple(range(12))
    await within(outgoing.abort())
    with pytest.raises(TransferBroken):
        await within(finishing)
    assert (tight.receiver.num_open, tight.sender.num_open) == (0, 0)


async def test_a_writer_that_ignores_its_credit_is_shut_out(tight: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Incoming, "_return_credit", lambda incoming: None)
    incoming = tight.offer(range(12))
    link, nonce = tight.link(), incoming.ticket.nonce
    await within(link.open_writer(nonce, News()))
    await within(link.write(nonce, [tight.whole(block, block, block) for block in range(WINDOW_BLOCKS + 1)], lambda: False))
    assert isinstance(await within(incoming.wait_failed()), TransferBroken)
    await within(link.close_writer(nonce))
    await tight.abandon(incoming)


# -- leases ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=sorted(TRANSPORTS.keys() - LOSSY))
async def brief(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    """Both sides believe in each other for half a second."""
    pair = Pair(request.param, lease_s=0.5)
    await pair.start()
    yield pair
    await pair.stop()


@pytest.mark.parametrize("kind", sorted(TRANSPORTS.keys() - LOSSY))
async def test_pulses_keep_a_transfer_that_waits_for_its_computation(kind: str) -> None:
    pair = Pair(kind, lease_s=1.5)
    await pair.start()
    incoming = pair.offer((5, 6))
    outgoing = pair.sender.open(incoming.ticket)
    await outgoing.push([(0, 0)])
    await asyncio.sleep(3.5)  # two leases and more
    assert incoming.state is HandoffState.STREAMING
    await run(incoming, outgoing, [(1, 1)])
    await pair.stop()


async def test_a_writer_that_gives_no_sign_is_given_up(brief: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = brief.offer((5, 6))
    outgoing = brief.sender.open(silent.ticket)
    monkeypatch.setattr(brief.link(), "pulse", lambda nonce: None)
    await outgoing.push([(0, 0)])
    await arrived(silent, 1)
    assert silent.link is not None
    fenced = silent.link.fences_locally
    assert isinstance(await within(silent.wait_failed()), TransferTimeout)
    assert brief.receiver.num_quarantined == (0 if fenced else 1)
    leases = brief.receiver.leases()
    assert (leases.open, leases.expired, leases.quarantined) == (1, 1, 0 if fenced else 1)
    assert leases.oldest_s >= 0.5
    assert (leases.quarantined_oldest_s >= 0.5) is not fenced
    await within(outgoing.abort())
    assert await brief.abandon(silent) == (5, 6)
    assert brief.receiver.leases() == LeaseReadings(expired=1)


async def test_a_decode_worker_that_gives_no_sign_is_given_up(brief: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    incoming = brief.offer((5, 6))
    outgoing = brief.sender.open(incoming.ticket)
    await outgoing.push([(0, 0)])
    await arrived(incoming, 1)
    monkeypatch.setattr(incoming, "_say_alive", lambda: None)
    incoming._stop_timers()
    assert brief.sender.leases().open == 1
    await within(asyncio.wait({outgoing._pump}))  # nothing is read any more
    assert brief.sender.num_open == 0
    assert brief.sender.leases() == LeaseReadings(expired=1)
    for call in (outgoing.push([(1, 1)]), outgoing.finish()):
        with pytest.raises(TransferTimeout):
            await within(call)
    await brief.abandon(incoming)


async def test_a_transfer_that_is_not_wanted_any_more_is_not_renewed(brief: Pair) -> None:
    """Even if nobody asks the prefill worker to stop, it hears no more of this transfer, and stops by itself."""
    incoming = brief.offer((5, 6))
    outgoing = brief.sender.open(incoming.ticket)
    await outgoing.push([(0, 0)])
    await arrived(incoming, 1)

    async def lost_on_the_way() -> None:
        raise TransferBroken("no answer")

    assert await within(incoming.abandon(lost_on_the_way, timeout_s=0.01)) == (5, 6)
    await within(asyncio.wait({outgoing._pump}))
    with pytest.raises(TransferTimeout):
        await push_and_finish(outgoing, [(1, 1)])


async def test_signs_for_others_are_of_no_interest(brief: Pair) -> None:
    incoming = brief.offer((5,))
    link = brief.link()
    link.pulse(bytes(16))
    outgoing = brief.sender.open(incoming.ticket)
    await outgoing.push([(0, 0)])
    await arrived(incoming, 1)
    assert incoming.link is not None
    incoming.link.pulse(bytes(16))
    incoming.link.credit(bytes(16), 1000)
    await within(incoming.complete(seal_of(incoming, await within(outgoing.finish()))))


# -- giving up ---------------------------------------------------------------------------------------------------------


async def test_cancel_in_the_middle_leaves_no_writer(pair: Pair) -> None:
    incoming = pair.offer((5, 6, 7, 8))
    outgoing = pair.sender.open(incoming.ticket)
    await outgoing.push([(0, 0), (1, 1)])
    await arrived(incoming, 2)
    assert await pair.abandon(incoming) == (5, 6, 7, 8)
    assert incoming.state is HandoffState.FREE
    pair.pool.buffer[:] = bytes(pair.pool.buffer.nbytes)  # the blocks' next owner
    await asyncio.wait([asyncio.ensure_future(outgoing.push([(2, 2), (3, 3)]))])
    await within(outgoing.abort())
    following = pair.offer((9,))
    await run(following, pair.sender.open(following.ticket), [(0, 9)])  # the link is in order and has carried everything before
    assert bytes(pair.pool.buffer[: 9 * LAYOUT.block_bytes]) == bytes(9 * LAYOUT.block_bytes)
    assert (pair.receiver.num_open, pair.sender.num_open) == (0, 0)
    assert pair.receiver.counters.transfers_cancelled == 1


async def test_a_complete_transfer_may_still_be_given_up(pair: Pair) -> None:
    incoming = pair.offer((5,))
    await run(incoming, pair.sender.open(incoming.ticket), [(0, 0)])
    assert await pair.abandon(incoming) == (5,)
    assert pair.receiver.num_open == 0


async def test_a_ticket_that_was_abandoned_before_its_writer_came(pair: Pair) -> None:
    incoming = pair.offer((5,))

    async def not_needed() -> None:
        raise AssertionError("nobody was let in: nobody is to be asked")

    assert await within(incoming.abandon(not_needed)) == (5,)
    outgoing = pair.sender.open(incoming.ticket)
    with pytest.raises(TicketRefused):
        await push_and_finish(outgoing, [(0, 0)])
    assert bytes(pair.pool.block(5)) == bytes(LAYOUT.block_bytes)


async def test_a_release_may_come_before_its_ticket(pair: Pair) -> None:
    incoming = pair.offer((5,))
    await pair.release(incoming)
    await pair.release(incoming)
    with pytest.raises(TicketRefused):
        pair.sender.open(incoming.ticket)
    await pair.abandon(incoming)


async def test_a_writer_that_gives_up_is_noticed(pair: Pair) -> None:
    incoming = pair.offer((5, 6))
    outgoing = pair.sender.open(incoming.ticket)
    await outgoing.push([(0, 0)])
    await arrived(incoming, 1)
    await within(outgoing.abort())
    await within(outgoing.abort())
    assert isinstance(await within(incoming.wait_failed()), TransferBroken)
    assert incoming.drained.is_set()
    for call in (outgoing.push([(1, 1)]), outgoing.finish()):
        with pytest.raises(TransferBroken):
            await within(call)
    assert await pair.abandon(incoming) == (5, 6)


async def test_cancelling_who_waits_leaves_things_in_order(pair: Pair) -> None:
    incoming = pair.offer((5, 6))
    outgoing = pair.sender.open(incoming.ticket)
    await outgoing.push([(0, 0), (1, 1)])
    waiting = asyncio.create_task(outgoing.finish())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})
    account = await within(outgoing.finish())  # once more
    completing = asyncio.create_task(incoming.complete(Seal(bytes(16), 32, account.digests)))
    completing.cancel()
    await asyncio.wait({completing})
    await within(incoming.complete(seal_of(incoming, account)))
    assert pair.sender.num_open == 0


async def test_an_abort_that_is_cancelled_goes_on(pair: Pair) -> None:
    incoming = pair.offer(range(BLOCKS))
    outgoing = pair.sender.open(incoming.ticket)
    await outgoing.push([(block, block) for block in range(BLOCKS)])
    aborting = asyncio.create_task(outgoing.abort())
    await asyncio.sleep(0)
    aborting.cancel()
    await asyncio.wait({aborting})
    await within(asyncio.wait({outgoing._pump}))
    assert pair.sender.num_open == 0
    assert len(await pair.abandon(incoming)) == BLOCKS


async def test_time_runs_out_on_both_sides(pair: Pair) -> None:
    incoming = pair.offer((5, 6), ttl_s=0.05)
    outgoing = pair.sender.open(incoming.ticket)
    await outgoing.push([(0, 0)])
    # Whose clock strikes first is open: the other side then hears of it instead.
    assert isinstance(await within(incoming.wait_failed()), TransferTimeout | TransferBroken)
    await within(asyncio.wait({outgoing._pump}))
    with pytest.raises((TransferTimeout, TransferBroken)):
        await outgoing.finish()
    assert await pair.abandon(incoming) == (5, 6)


async def test_an_expired_ticket_lets_nobody_in(pair: Pair) -> None:
    clock = ManualClock()
    slow = Pair(pair.kind, clock)
    await slow.start()
    incoming = slow.offer((5,), ttl_s=30.0)
    clock.advance(30.0)
    outgoing = slow.sender.open(incoming.ticket)
    with pytest.raises(TicketRefused, match="expired"):
        await push_and_finish(outgoing, [(0, 0)])
    await slow.abandon(incoming)
    await slow.stop()


async def test_a_block_in_transfer_is_not_offered_again(pair: Pair) -> None:
    incoming = pair.offer((5, 6))
    with pytest.raises(IllegalTransition):
        pair.offer((7, 6))
    await pair.abandon(incoming)
    await pair.abandon(pair.offer((7, 6)))


# -- links -------------------------------------------------------------------------------------------------------------


async def test_a_lost_link_ends_its_transfers_and_is_replaced(pair: Pair) -> None:
    incoming = pair.offer((5, 6))
    outgoing = pair.sender.open(incoming.ticket)
    await outgoing.push([(0, 0)])
    await arrived(incoming, 1)
    lost = pair.link()
    lost.drop(TransferBroken("pulled"))
    assert isinstance(await within(incoming.wait_failed()), TransferBroken)
    with pytest.raises(TransferBroken):
        await push_and_finish(outgoing, [(1, 1)])
    assert await pair.abandon(incoming) == (5, 6)
    following = pair.offer((5, 6))
    await run(following, pair.sender.open(following.ticket), [(0, 2), (1, 3)])
    assert pair.link() is not lost


async def test_a_decode_worker_that_goes_away_is_noticed(pair: Pair) -> None:
    incoming = pair.offer((5, 6))
    outgoing = pair.sender.open(incoming.ticket)
    await outgoing.push([(0, 0)])
    await arrived(incoming, 1)
    await pair.receiver.close()
    assert incoming.drained.is_set()
    # A socket takes bytes for a peer that has just gone: over tcp the writer may finish and never know.
    with contextlib.suppress(TransferBroken) if pair.kind == "tcp" else pytest.raises(TransferBroken):
        await push_and_finish(outgoing, [(1, 1)])
    with pytest.raises(TransferBroken):
        pair.offer((5,))
    with pytest.raises((TransferBroken, HandshakeRefused)):
        await within(pair.connect(pair.another_sender("m/prefill/1", 1)))
    await pair.abandon(incoming)


async def test_connecting_again_keeps_the_link(pair: Pair) -> None:
    link = pair.link()
    assert await pair.connect(pair.sender) == pair.kind
    assert pair.link() is link


@pytest.mark.parametrize(
    ("worker_id", "incarnation", "param"),
    [("m/decode/1", 3, "worker_id"), ("m/decode/0", 2, "incarnation"), ("m/decode/0", 4, "incarnation")],
)
async def test_somebody_else_at_the_address_is_noticed(pair: Pair, worker_id: str, incarnation: int, param: str) -> None:
    stranger = pair.another_sender("m/prefill/1", 1)
    with pytest.raises(HandshakeRefused) as refused:
        await within(stranger.connect(worker_id, incarnation, pair.offers, BLOCKS))
    assert refused.value.param == param


async def test_another_secret_is_refused(pair: Pair) -> None:
    with pytest.raises(HandshakeRefused) as refused:
        await within(pair.connect(pair.another_sender("m/prefill/1", 1, derive_secret("stolen?"))))
    assert refused.value.param == "cluster_token"
    assert pair.receiver.counters.links_refused == {"cluster_token": 1}


async def test_another_layout_is_refused(pair: Pair) -> None:
    sender = KVSender(pair.source, replace(LAYOUT, exact=False), "m/prefill/1", 1, SECRET, SystemClock())
    pair.more_senders.append(sender)
    with pytest.raises(HandshakeRefused) as refused:
        await within(pair.connect(sender))
    assert refused.value.param == "layout_fingerprint"


async def test_another_pool_size_is_refused(pair: Pair) -> None:
    with pytest.raises(HandshakeRefused) as refused:
        await within(pair.another_sender("m/prefill/1", 1).connect("m/decode/0", 3, pair.offers, BLOCKS + 1))
    assert refused.value.param == "pool_blocks"


async def test_an_earlier_life_of_a_prefill_worker_is_refused(pair: Pair) -> None:
    await pair.connect(pair.another_sender("m/prefill/0", 6))
    with pytest.raises(HandshakeRefused) as refused:
        await within(pair.connect(pair.another_sender("m/prefill/0", 4)))
    assert refused.value.param == "incarnation"


async def test_an_earlier_life_of_a_decode_worker_is_refused(pair: Pair) -> None:
    with pytest.raises(HandshakeRefused):
        await within(pair.sender.connect("m/decode/0", 2, pair.offers, BLOCKS))
    incoming = pair.offer((5,))
    await run(incoming, pair.sender.open(incoming.ticket), [(0, 0)])


async def test_the_next_life_of_a_decode_worker_replaces_it(pair: Pair) -> None:
    incoming = pair.offer((5, 6))
    outgoing = pair.sender.open(incoming.ticket)
    await outgoing.push([(0, 0)])
    reborn = KVReceiver(pair.pool, LAYOUT, "m/decode/0", 4, SECRET, SystemClock())
    offers = await reborn.start([pair.kind], "127.0.0.1")
    await within(pair.sender.connect("m/decode/0", 4, offers, BLOCKS))
    with pytest.raises(TransferBroken):
        await push_and_finish(outgoing, [(1, 1)])
    with pytest.raises(TicketRefused) as refused:
        pair.sender.open(incoming.ticket)
    assert refused.value.param == "decode_incarnation"
    await pair.abandon(incoming)
    await reborn.close()


async def test_the_first_offer_that_works_is_taken(pair: Pair) -> None:
    offers = [
        TransportOffer("carrier-pigeon", "roof"),
        TransportOffer("shm", "pdserve-kv-nobody"),
        TransportOffer("tcp", "127.0.0.1:1"),
        TransportOffer("tcp", "nonsense"),
        *pair.offers,
    ]
    sender = pair.another_sender("m/prefill/1", 1)
    assert await within(sender.connect("m/decode/0", 3, offers, BLOCKS)) == pair.kind
    with pytest.raises(HandshakeRefused if pair.kind == "cuda_ipc" else TransferBroken):  # a pool on a device has no other way
        await within(pair.another_sender("m/prefill/2", 1).connect("m/decode/0", 3, offers[:-1], BLOCKS))
    with pytest.raises(HandshakeRefused):
        await within(pair.another_sender("m/prefill/3", 1).connect("m/decode/0", 3, [], BLOCKS))


# -- strangers at the door (only real sockets have one) ------------------------------------------------------------------


def dial(offer: TransportOffer) -> socket.socket:
    if offer.kind == "shm":
        sock = socket.socket(socket.AF_UNIX)
        sock.connect("\0" + offer.address)
    else:
        host, port = offer.address.split(":")
        sock = socket.create_connection((host, int(port)))
    sock.settimeout(PATIENCE_S)
    return sock


@pytest.fixture(params=["shm", "tcp", "nixl"])
async def door(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    if request.param == "nixl":
        pytest.importorskip("nixl_cu13")
    pair = Pair(request.param)
    await pair.start()
    yield pair
    await pair.stop()


@pytest.mark.parametrize(
    "greeting",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + bytes(200),
        bytes(400),
        b"\xff" * 400,
        Frame(FrameKind.OPEN, bytes(16)).encode() * 10,
        b"PDLH\x01\x00\xff\xff\xff\xff" + bytes(400),
    ],
)
async def test_noise_gets_no_answer_but_the_end(door: Pair, greeting: bytes) -> None:
    with dial(door.offers[0]) as sock:
        sock.sendall(greeting)
        with contextlib.suppress(ConnectionResetError):  # an end, too: with our noise unread
            assert await asyncio.to_thread(sock.recv, 1) == b""
    incoming = door.offer((5,))
    await run(incoming, door.sender.open(incoming.ticket), [(0, 0)])


async def test_a_silent_peer_is_hung_up_on(door: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtransfer.transports.authentication.AUTHENTICATION_TIMEOUT_S", 0.05)
    with dial(door.offers[0]) as sock:
        assert await asyncio.to_thread(sock.recv, 1) == b""


async def test_a_recorded_greeting_is_of_no_use(door: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays the byte stream of a successful authentication: the challenge is a new one, so the proof is wrong."""
    recorded: list[bytes] = []
    loop = asyncio.get_running_loop()
    send = loop.sock_sendall

    async def record(sock: socket.socket, data: bytes) -> None:
        recorded.append(bytes(data))
        await send(sock, data)

    monkeypatch.setattr(loop, "sock_sendall", record)
    await door.connect(door.another_sender("m/prefill/1", 1))
    monkeypatch.undo()
    hello, _, proof, *_ = recorded
    with dial(door.offers[0]) as sock:
        sock.sendall(hello)
        assert len(await asyncio.to_thread(sock.recv, 1000)) == 32
        sock.sendall(proof)
        verdict = await asyncio.to_thread(sock.recv, 1000)
        assert verdict[0] != 0
        assert verdict[-32:] == bytes(32)
        assert await asyncio.to_thread(sock.recv, 1) == b""
    assert door.receiver.counters.links_refused == {"cluster_token": 1}


@pytest.mark.parametrize("version", [0, LINK_VERSION - 1, LINK_VERSION + 1])
async def test_another_version_of_the_link_is_refused(door: Pair, version: int) -> None:
    hello = Hello(version, PeerName("m/prefill/1", 1), PeerName("m/decode/0", 3), LAYOUT.fingerprint, bytes(32)).encode()
    with dial(door.offers[0]) as sock:
        sock.sendall(hello)
        challenge = await asyncio.to_thread(sock.recv, 1000)
        sock.sendall(prefill_proof(SECRET, hello, challenge))
        assert (await asyncio.to_thread(sock.recv, 1000))[0] == Verdict.WRONG_VERSION
        assert await asyncio.to_thread(sock.recv, 1) == b""
    assert door.receiver.counters.links_refused == {"version": 1}


@pytest.mark.parametrize(
    "frame",
    [
        Frame(FrameKind.GRANT, bytes(16)),
        Frame(FrameKind.CREDIT, bytes(16), 0, 5),
        Frame(FrameKind.BLOCKS, bytes(16), 1, 1 << 31),
        Frame(FrameKind.BLOCKS, bytes(16), 1, 0),
        Frame(FrameKind.BLOCKS, bytes(16), 0, LAYOUT.block_bytes),
        Frame(FrameKind.WRITTEN, bytes(16), 1 << 31, 0),
        Frame(FrameKind.READY, bytes(16), 1 << 31, 0),
        Frame(FrameKind.TAKEN, bytes(16), 0, 1),
        Frame(FrameKind.CLOSE, bytes(16), 0, 5),
        Frame(FrameKind.PULSE, bytes(16), 1, 0),
    ],
)
async def test_a_peer_that_breaks_the_rules_loses_its_link(door: Pair, frame: Frame) -> None:
    incoming = door.offer((5,))
    link = door.link()
    await within(link.open_writer(incoming.ticket.nonce, News()))
    await within(link._in_lane(lambda: link._send([frame.encode()])))
    assert isinstance(await within(incoming.wait_failed()), TransferBroken)
    assert await door.abandon(incoming) == (5,)
    following = door.offer((5,))
    await run(following, door.sender.open(following.ticket), [(0, 0)])


async def test_data_frames_of_another_transport_are_refused(door: Pair) -> None:
    if door.kind == "shm":
        pytest.skip("all kinds of frames belong there")
    incoming = door.offer((5,))
    link = door.link()
    await within(link.open_writer(incoming.ticket.nonce, News()))
    frame = Frame(FrameKind.READY, incoming.ticket.nonce, 1)
    await within(link._in_lane(lambda: link._send([frame.encode()])))
    assert isinstance(await within(incoming.wait_failed()), TransferBroken)
    await door.abandon(incoming)


async def test_without_trust_in_the_network_only_loopback_is_served() -> None:
    pool = BlockRegion.create_shared(LAYOUT.block_bytes, 1)
    receiver = KVReceiver(pool, LAYOUT, "m/decode/0", 1, SECRET, SystemClock())
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(StartupError):
            await receiver.start(["tcp"], host)
    await receiver.start(["tcp"], "0.0.0.0", trusted_network=True)
    await receiver.close()
    pool.close()


async def test_a_pool_without_a_descriptor_is_not_lent() -> None:
    """Nobody could map it: the next offer is taken."""
    pool, source = (BlockRegion(memoryview(bytearray(LAYOUT.block_bytes)), LAYOUT.block_bytes, 1) for _ in range(2))
    receiver = KVReceiver(pool, LAYOUT, "m/decode/0", 1, SECRET, SystemClock())
    sender = KVSender(source, LAYOUT, "m/prefill/0", 1, SECRET, SystemClock())
    offers = await receiver.start(["shm", "tcp"], "127.0.0.1")
    with pytest.raises(HandshakeRefused, match="descriptor"):
        await within(sender.connect("m/decode/0", 1, offers[:1], 1))
    assert await within(sender.connect("m/decode/0", 1, offers, 1)) == "tcp"
    await sender.close()
    await receiver.close()
