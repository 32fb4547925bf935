"""Blocks of one size and dtype become blocks of another on their way over real links, and nothing else changes.

The oracle is a prompt's KV as one array [token][layer][head][K,V][dim]; where its values belong in a pool is written out here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from common.clock import SystemClock
from common.errors import DigestMismatch, HandoffError, HandshakeRefused, IllegalTransition, TicketRefused
from common.types import KVLayout, WorkerRef
from kvtransfer import recutting
from kvtransfer.incoming import Incoming
from kvtransfer.outgoing import Outgoing
from kvtransfer.receiver import KVReceiver
from kvtransfer.recutting import Cut, Made, Recutting, recutting_for
from kvtransfer.region import BlockRegion
from kvtransfer.sender import KVSender
from kvtransfer.state import Seal
from kvtransfer.ticket import derive_secret
from kvtransfer.transports.base import Piece, SenderLink
from support.device_pools import HostMemory, VisibleRegion

LAYOUT = KVLayout("model", "tokenizer", 3, 2, 4, 16, "float32", True)
SECRET = derive_secret("token")
PATIENCE_S = 120.0
POOL_TOKENS = 256
PROMPT_TOKENS = 77


def prompt_kv(num_tokens: int) -> np.ndarray:
    """Values that bfloat16 and float16 hold exactly, so that a conversion can be told from a mistake."""
    shape = (num_tokens, LAYOUT.num_layers, LAYOUT.num_kv_heads, 2, LAYOUT.head_dim)
    return np.random.default_rng(4).integers(-120, 120, shape).astype(np.float32)


def as_bytes(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "bfloat16":
        return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype(dtype).tobytes()


def block_of(kv: np.ndarray, layout: KVLayout, logical_block: int) -> bytes:
    """A block of the prompt, zeros behind its last token."""
    tokens = kv[logical_block * layout.block_tokens : (logical_block + 1) * layout.block_tokens]
    block = np.zeros((layout.num_layers, layout.num_kv_heads, 2, layout.block_tokens, layout.head_dim), np.float32)
    block[:, :, :, : len(tokens)] = tokens.transpose(1, 2, 3, 0, 4)
    return as_bytes(block, layout.dtype)


class Pair:
    def __init__(self, kind: str, here: KVLayout, there: KVLayout) -> None:
        self.kind, self.here, self.there = kind, here, there
        self.source = BlockRegion.create_shared(here.block_bytes, POOL_TOKENS // here.block_tokens)
        self.source.buffer[:] = b"\x5a" * self.source.buffer.nbytes  # what other requests left there
        self.pool = BlockRegion.create_shared(there.block_bytes, POOL_TOKENS // there.block_tokens)
        self.receiver = KVReceiver(self.pool, there, "d", 1, SECRET, SystemClock())
        self.sender = KVSender(self.source, here, "p", 1, SECRET, SystemClock())
        self.kv = prompt_kv(PROMPT_TOKENS)
        self.blocks = tuple(reversed(range(-(-PROMPT_TOKENS // here.block_tokens))))
        for logical, block in enumerate(self.blocks):
            self.source.block(block)[:] = block_of(self.kv, here, logical)

    async def start(self) -> None:
        offers = await self.receiver.start([self.kind], "127.0.0.1")
        assert await self.sender.connect("d", 1, offers, self.pool.num_blocks, self.there) == self.kind

    def offer(self, first_block: int) -> Incoming:
        num_blocks = -(-PROMPT_TOKENS // self.there.block_tokens)
        return self.receiver.open(
            request_id="r",
            attempt=0,
            prefill=WorkerRef("p", 1, "unused"),
            first_block=first_block,
            blocks=tuple(range(1, 1 + num_blocks - first_block)),
            num_tokens=PROMPT_TOKENS,
            ttl_s=PATIENCE_S,
        )

    async def stop(self) -> None:
        await self.sender.close()
        await self.receiver.close()
        self.pool.close()
        self.source.close()


@pytest.fixture
async def pairs() -> AsyncIterator[list[Pair]]:
    made: list[Pair] = []
    yield made
    for pair in made:
        await pair.stop()


async def started(pairs: list[Pair], kind: str, here: KVLayout, there: KVLayout) -> Pair:
    pairs.append(Pair(kind, here, there))
    await pairs[-1].start()
    return pairs[-1]


@pytest.mark.parametrize(
    ("here", "there", "dtypes", "kind", "first_block"),
    [
        (16, 32, ("float32", "float32"), "shm", 0),
        (16, 32, ("float32", "float32"), "tcp", 1),
        (32, 16, ("float32", "float32"), "inproc", 1),
        (64, 8, ("float32", "float32"), "inproc", 0),
        (8, 24, ("float32", "bfloat16"), "inproc", 1),
        (16, 16, ("bfloat16", "float32"), "tcp", 0),
        (16, 64, ("float16", "bfloat16"), "inproc", 0),
    ],
)
async def test_a_prompt_arrives_in_the_receivers_blocks(
    pairs: list[Pair],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    first_block: int,
    here: int,
    there: int,
    dtypes: tuple[str, str],
) -> None:
    monkeypatch.setattr(recutting, "STAGING_BYTES", 1)  # as little at a time as there can be
    layout = replace(LAYOUT, exact=False)
    pair = await started(
        pairs,
        kind,
        replace(layout, block_tokens=here, dtype=dtypes[0]),
        replace(layout, block_tokens=there, dtype=dtypes[1]),
    )
    untouched = bytes(pair.pool.block(0))
    incoming = pair.offer(first_block)
    outgoing = pair.sender.open(incoming.ticket)
    end_block = first_block + len(incoming.ticket.blocks)
    async with asyncio.timeout(PATIENCE_S):
        for layers in ((0, 2), (2, 3)):
            await outgoing.push_prompt(range(first_block, end_block - 1), pair.blocks, layers)
        await outgoing.push_prompt(range(end_block - 1, end_block), pair.blocks)
        account = await outgoing.finish()
        await incoming.complete(Seal(incoming.ticket.nonce, PROMPT_TOKENS, account.digests))
    assert account.bytes == len(incoming.ticket.blocks) * pair.there.block_bytes
    for index, block in enumerate(incoming.ticket.blocks):
        assert bytes(pair.pool.block(block)) == block_of(pair.kv, pair.there, first_block + index), index
    assert bytes(pair.pool.block(0)) == untouched


async def test_a_batch_is_made_while_the_one_before_it_is_written(pairs: list[Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recutting, "STAGING_BYTES", 1)  # a block is a batch
    pair = await started(pairs, "inproc", LAYOUT, replace(LAYOUT, block_tokens=32))
    incoming = pair.offer(0)
    num_batches = len(incoming.ticket.blocks)
    make, write = Recutting.make, Outgoing._write
    begun = [asyncio.Event() for _ in range(num_batches)]
    num_written = 0

    async def make_and_tell(self: Recutting, *batch: Any) -> Made:
        next(event for event in begun if not event.is_set()).set()
        return await make(self, *batch)

    async def write_behind(self: Outgoing, link: SenderLink, pieces: Sequence[Piece]) -> None:
        nonlocal num_written
        num_written += 1
        await begun[min(num_written, num_batches - 1)].wait()  # the next one
        await write(self, link, pieces)

    monkeypatch.setattr(Recutting, "make", make_and_tell)
    monkeypatch.setattr(Outgoing, "_write", write_behind)
    outgoing = pair.sender.open(incoming.ticket)
    async with asyncio.timeout(PATIENCE_S):
        await outgoing.push_prompt(range(num_batches), pair.blocks)
        account = await outgoing.finish()
        await incoming.complete(Seal(incoming.ticket.nonce, PROMPT_TOKENS, account.digests))
    assert num_written == num_batches > 2
    assert [bytes(pair.pool.block(block)) for block in incoming.ticket.blocks] == [
        block_of(pair.kv, pair.there, index) for index in range(num_batches)
    ]


async def test_a_bit_that_is_lost_after_the_cutting_is_noticed(pairs: list[Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    pair = await started(pairs, "inproc", LAYOUT, replace(LAYOUT, block_tokens=32))
    incoming = pair.offer(0)
    landing = pair.receiver.pieces_written

    def spoil(link, nonce, written) -> None:  # type: ignore[no-untyped-def]
        if 1 in [piece.name.logical_block for piece in written]:
            pair.pool.block(2)[1000] ^= 1
        landing(link, nonce, written)

    monkeypatch.setattr(pair.receiver, "pieces_written", spoil)
    outgoing = pair.sender.open(incoming.ticket)
    await outgoing.push_prompt(range(len(incoming.ticket.blocks)), pair.blocks)
    async with asyncio.timeout(PATIENCE_S):
        assert isinstance(await incoming.wait_failed(), DigestMismatch)
    await outgoing.abort()
    assert await incoming.abandon(lambda: pair.sender.release([incoming.ticket.nonce])) == incoming.ticket.blocks


async def test_a_value_that_the_other_dtype_does_not_have_ends_the_transfer(pairs: list[Pair]) -> None:
    layout = replace(LAYOUT, exact=False)
    pair = await started(pairs, "shm", layout, replace(layout, dtype="float16"))
    pair.source.block(pair.blocks[1])[:4] = np.float32(1e6).tobytes()
    incoming = pair.offer(0)
    outgoing = pair.sender.open(incoming.ticket)
    await outgoing.push_prompt(range(len(incoming.ticket.blocks)), pair.blocks)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(HandoffError, match="float16"):
            await outgoing.finish()
        assert await incoming.abandon(lambda: pair.sender.release([incoming.ticket.nonce])) == incoming.ticket.blocks


async def test_what_cannot_be_pushed_leaves_no_trace(pairs: list[Pair]) -> None:
    pair = await started(pairs, "inproc", LAYOUT, replace(LAYOUT, block_tokens=32))
    incoming = pair.offer(1)
    outgoing = pair.sender.open(incoming.ticket)
    with pytest.raises(IllegalTransition):
        await outgoing.push([(1, pair.blocks[1])])  # as they lie here they mean nothing there
    for logical, blocks, param in (
        (range(2), pair.blocks, "logical_block"),  # block 0 was not asked for
        (range(1, 4), pair.blocks, "logical_block"),  # there is no block 3
        (range(1, 3), pair.blocks[:3], "logical_block"),  # its tokens are not all here
    ):
        with pytest.raises(TicketRefused) as refused:
            await outgoing.push_prompt(logical, blocks)
        assert refused.value.param == param
    with pytest.raises(IndexError):
        await outgoing.push_prompt(range(1, 3), (0, 1, 2, 3, 999))
    await outgoing.push_prompt(range(1, 3), pair.blocks)
    async with asyncio.timeout(PATIENCE_S):
        account = await outgoing.finish()
        await incoming.complete(Seal(incoming.ticket.nonce, PROMPT_TOKENS, account.digests))


async def test_equal_blocks_go_as_they_lie(pairs: list[Pair]) -> None:
    pair = await started(pairs, "inproc", LAYOUT, LAYOUT)
    incoming = pair.offer(0)
    outgoing = pair.sender.open(incoming.ticket)
    assert outgoing.block_tokens is None
    await outgoing.push_prompt(range(len(incoming.ticket.blocks)), pair.blocks)
    assert not any(isinstance(queued, Cut) for queued in outgoing._queue)
    async with asyncio.timeout(PATIENCE_S):
        account = await outgoing.finish()
        await incoming.complete(Seal(incoming.ticket.nonce, PROMPT_TOKENS, account.digests))
    assert bytes(pair.pool.block(2)) == block_of(pair.kv, LAYOUT, 1)


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("model_digest", {"model_digest": "another"}),
        ("num_layers", {"num_layers": 4}),
        ("exact", {"exact": False}),
        ("dtype", {"dtype": "bfloat16"}),  # exact numerics promise bits
        ("block_tokens", {"block_tokens": 24}),  # exact attention walks in other tiles
    ],
)
async def test_a_peer_to_whose_layout_there_is_no_way_is_refused_by_name(field: str, other: dict[str, object]) -> None:
    source = BlockRegion.create_shared(LAYOUT.block_bytes, 4)
    sender = KVSender(source, LAYOUT, "p", 1, SECRET, SystemClock())
    with pytest.raises(HandshakeRefused) as refused:
        await sender.connect("d", 1, [], 4, replace(LAYOUT, **other))  # type: ignore[arg-type]
    assert refused.value.param == field
    await sender.close()
    source.close()


async def test_one_incarnation_has_one_layout(pairs: list[Pair]) -> None:
    pair = await started(pairs, "inproc", LAYOUT, replace(LAYOUT, block_tokens=32))
    with pytest.raises(HandshakeRefused) as refused:
        await pair.sender.connect("d", 1, [], pair.pool.num_blocks, replace(LAYOUT, block_tokens=64))
    assert refused.value.param == "layout"


def test_kv_on_a_device_goes_as_it_is() -> None:
    region = VisibleRegion(LAYOUT.block_bytes, 4)
    assert isinstance(region.memory, HostMemory)
    assert recutting_for(region, LAYOUT, LAYOUT) is None
    with pytest.raises(HandshakeRefused) as refused:
        recutting_for(region, LAYOUT, replace(LAYOUT, block_tokens=32))
    assert refused.value.param == "block_tokens"
    region.close()


def test_a_layout_of_unknown_values_goes_as_it_is_or_not_at_all() -> None:
    region = BlockRegion.create_shared(LAYOUT.block_bytes, 4)
    coded = replace(LAYOUT, dtype="coded8", exact=False)
    assert recutting_for(region, coded, coded) is None
    for other in (replace(coded, block_tokens=32), replace(coded, dtype="float32")):
        with pytest.raises(HandshakeRefused) as refused:
            recutting_for(region, coded, other)
        assert refused.value.param == "dtype"
    region.close()
