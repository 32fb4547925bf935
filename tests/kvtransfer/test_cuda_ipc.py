"""What is particular to pools on a device: the handle's way, batches of one launch, and quarantine while a write may be under
way.

The device is one of `support.device_pools`. What any link promises is in `test_transports`, which takes a GPU where there is
one; two processes on a GPU are in `tests/common/engine/test_on_gpu.py`.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator

import pytest

from common.clock import SystemClock
from common.errors import HandshakeRefused, StartupError, TransferBroken
from common.types import KVLayout, WorkerRef
from kvtransfer.device import DeviceRegion, DeviceView, read_contents, region_of
from kvtransfer.digest import piece_digest
from kvtransfer.incoming import Incoming
from kvtransfer.receiver import KVReceiver
from kvtransfer.region import BlockRegion
from kvtransfer.sender import KVSender
from kvtransfer.state import HandoffState, Seal
from kvtransfer.ticket import derive_secret
from kvtransfer.transports.cuda_ipc import MAX_HANDLE_BYTES, decode_offer, encode_offer
from support.device_pools import HostMemory, VisibleRegion

LAYOUT = KVLayout("model", "tokenizer", 4, 2, 32, 16, "float32", True)
BLOCKS = 12
SECRET = derive_secret("token")
PATIENCE_S = 120.0


class Pair:
    def __init__(self) -> None:
        self.pool, self.source = (VisibleRegion(LAYOUT.block_bytes, BLOCKS) for _ in range(2))
        shared = self.source.memory.shared.buffer
        shared[:] = bytes(range(256)) * (shared.nbytes // 256)
        self.receiver = KVReceiver(self.pool, LAYOUT, "d", 1, SECRET, SystemClock())
        self.sender = KVSender(self.source, LAYOUT, "p", 1, SECRET, SystemClock())

    async def start(self) -> None:
        offers = await self.receiver.start(["shm", "cuda_ipc", "tcp"], "127.0.0.1")
        assert [offer.kind for offer in offers] == ["cuda_ipc"]  # no other kind can serve such a pool
        assert await self.sender.connect("d", 1, offers, BLOCKS) == "cuda_ipc"

    def offer(self, blocks: tuple[int, ...]) -> Incoming:
        return self.receiver.open(
            request_id="r",
            attempt=0,
            prefill=WorkerRef("p", 1, "unused"),
            first_block=0,
            blocks=blocks,
            num_tokens=16 * len(blocks),
            ttl_s=PATIENCE_S,
        )

    async def stop(self) -> None:
        await self.sender.close()
        await self.receiver.close()
        self.pool.close()
        self.source.close()


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    pair = Pair()
    await pair.start()
    yield pair
    await pair.stop()
    assert pair.source.memory.open_peers == 0  # the peer's memory was let go


async def test_a_group_of_layers_of_many_blocks_is_one_launch_and_one_look(pair: Pair) -> None:
    incoming = pair.offer((7, 3, 9, 1))
    outgoing = pair.sender.open(incoming.ticket)
    async with asyncio.timeout(PATIENCE_S):
        for layers in ((0, 3), (3, 4)):
            await outgoing.push([(0, 2), (1, 3), (2, 4), (3, 5)], layers)
            while pair.pool.memory.num_content_calls < (1 if layers[0] == 0 else 2):
                await asyncio.sleep(0.001)
        account = await outgoing.finish()
        await incoming.complete(Seal(incoming.ticket.nonce, incoming.ticket.num_tokens, account.digests))
    layer_bytes = LAYOUT.block_bytes // 4
    assert [len(copies) for copies in pair.source.memory.writes] == [4, 4]
    assert pair.source.memory.writes[0][0] == (2 * LAYOUT.block_bytes, 7 * LAYOUT.block_bytes, 3 * layer_bytes)
    assert (pair.pool.memory.num_content_calls, pair.source.memory.num_content_calls) == (2, 0)  # sources are summed as they go
    for source, destination in ((2, 7), (3, 3), (4, 9), (5, 1)):
        assert bytes(pair.pool.block(destination)) == bytes(pair.source.block(source))


async def test_blocks_stay_in_quarantine_while_a_write_is_under_way(pair: Pair) -> None:
    """A writer that was stopped in a batch: no time that passes gives its blocks back, only its going on or its end does."""
    memory = pair.source.memory
    memory.go_on.clear()
    incoming = pair.offer((0, 1))
    outgoing = pair.sender.open(incoming.ticket)
    await outgoing.push([(0, 0), (1, 1)])
    async with asyncio.timeout(PATIENCE_S):
        while not memory.writes:
            await asyncio.sleep(0.001)
    giving_up = asyncio.create_task(incoming.abandon(lambda: asyncio.sleep(0), tries=2, timeout_s=0.02))
    await asyncio.sleep(0.2)
    assert not giving_up.done()
    assert incoming.state is HandoffState.CANCELLED
    assert pair.receiver.num_quarantined == 1
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(pair.sender.release([incoming.ticket.nonce])), 0.05)
    memory.go_on.set()
    assert await asyncio.wait_for(giving_up, PATIENCE_S) == (0, 1)
    assert pair.receiver.num_quarantined == 0


async def test_a_pool_in_host_memory_is_neither_served_nor_written_from(pair: Pair) -> None:
    host = BlockRegion.create_shared(LAYOUT.block_bytes, BLOCKS)
    receiver = KVReceiver(host, LAYOUT, "d", 1, SECRET, SystemClock())
    with pytest.raises(StartupError):
        await receiver.start(["cuda_ipc"], "127.0.0.1")
    sender = KVSender(host, LAYOUT, "p2", 1, SECRET, SystemClock())
    offers = await pair.receiver.start(["cuda_ipc"], "127.0.0.1")
    with pytest.raises(HandshakeRefused, match="not on a device"):
        await sender.connect("d", 1, offers, BLOCKS)
    await sender.close()
    await receiver.close()
    host.close()


async def test_a_handle_that_opens_nothing_is_an_error_of_the_link(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostMemory, "handle", lambda self: b"/nowhere")
    offers = await pair.receiver.start(["cuda_ipc"], "127.0.0.1")
    sender = KVSender(pair.source, LAYOUT, "p2", 1, SECRET, SystemClock())
    with pytest.raises(TransferBroken, match="another GPU"):
        await sender.connect("d", 1, offers, BLOCKS)
    await sender.close()


def test_an_offer_says_how_long_its_handle_is() -> None:
    offer = encode_offer(b"abc", 4096)
    assert decode_offer(offer[:-3]) == (3, 4096)
    assert offer[-3:] == b"abc"
    for handle in (b"", bytes(MAX_HANDLE_BYTES + 1)):
        with pytest.raises(StartupError):
            encode_offer(handle, 4096)
    for wrong in (b"XXXX" + offer[4:-3], struct.pack("<4sHQ", b"PDCI", 0, 1), struct.pack("<4sHQ", b"PDCI", 3, 0)):
        with pytest.raises(TransferBroken):
            decode_offer(wrong)


def test_a_view_is_cut_as_memory_is_and_cannot_be_read() -> None:
    memory = HostMemory(256, 4)
    region = region_of(memory, 256)
    assert isinstance(region, DeviceRegion)
    view = region.block(2)
    assert isinstance(view, DeviceView)
    part = view[64:128][16:]
    assert (part.offset_bytes, part.nbytes, len(part)) == (2 * 256 + 80, 48, 48)
    assert view[250:400].nbytes == 6
    for reading in (bytes, memoryview):
        with pytest.raises(TypeError):
            reading(view)  # type: ignore[arg-type]
    with pytest.raises(IndexError):
        region.block(4)
    memory.shared.close()


def test_what_was_read_at_once_counts_once() -> None:
    memory = HostMemory(256, 4)
    region = region_of(memory, 256)
    views = [region.block(0), region.block(1)]
    read_contents(views)
    before = [piece_digest(view, bytes(16), 0, 0, 1) for view in views]
    assert memory.num_content_calls == 1
    assert before[0] != piece_digest(views[0], bytes(16), 1, 0, 1)  # read anew; another place
    assert memory.num_content_calls == 2
    memory.shared.buffer[3] = 1
    assert piece_digest(views[0], bytes(16), 0, 0, 1) != before[0]
    memory.shared.close()
