"""Pieces of KV moved by Triton: bytes where they belong, and the sums that a host makes of the same bytes."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from common.clock import SystemClock
from common.engine.kv_pool import KVPool
from common.engine.lane_sums import lane_sums
from common.engine.triton_kernels.move_pieces import move_pieces, move_pieces_reference, sums_of_moves, words_of
from common.errors import DigestMismatch
from common.types import KVLayout, WorkerRef
from kvtransfer.receiver import KVReceiver
from kvtransfer.sender import KVSender
from kvtransfer.state import Seal
from support.device_pools import HostMemory, VisibleRegion


def pool_of(device: torch.device, seed: int) -> KVPool:
    layout = KVLayout("m", "t", 3, 2, 24, 16, "bfloat16", exact=False)
    pool = KVPool(layout, 5, device)
    values = torch.randn(pool.tensor.shape, generator=torch.Generator().manual_seed(seed))
    pool.tensor.copy_(values)
    return pool


def piece_range(pool: KVPool, block: int, first_layer: int, num_layers: int) -> tuple[int, int]:
    """Where some layers of a block lie: (byte offset, number of bytes)."""
    layer_bytes = pool.layout.block_bytes // pool.layout.num_layers
    return block * pool.layout.block_bytes + first_layer * layer_bytes, num_layers * layer_bytes


def test_pieces_go_from_pool_to_buffer_to_pool_with_the_host_s_digests(device: torch.device) -> None:
    source, destination = pool_of(device, 0), pool_of(device, 1)
    pieces = [(1, 0, 3), (4, 1, 2), (2, 2, 1)]  # block, first layer, layers: three chunks, two, one and a half
    ranges = [piece_range(source, *piece) for piece in pieces]
    ends = np.cumsum([0, *(size for _, size in ranges)]).tolist()
    staging = torch.zeros(ends[-1] // 4, dtype=torch.int32, device=device)
    out = [(at, put, size) for (at, size), put in zip(ranges, ends[:-1], strict=True)]
    sums = move_pieces(words_of(source.tensor), staging, out)
    for index, ((block, first, layers), (_, put, size)) in enumerate(zip(pieces, out, strict=True)):
        content = source.tensor[block, first : first + layers].contiguous().cpu().view(torch.uint8).numpy().data.cast("B")
        assert bytes(staging.cpu().numpy().data.cast("B")[put : put + size]) == bytes(content)
        assert sums_of_moves(sums.cpu().numpy(), out)[index] == lane_sums(content).tobytes()
    before = destination.tensor.clone()
    back = move_pieces(staging, words_of(destination.tensor), [(put, at, size) for at, put, size in out])
    assert torch.equal(back[0], sums[0])
    for block, first, layers in pieces:
        before[block, first : first + layers] = source.tensor[block, first : first + layers]
    assert torch.equal(destination.tensor, before)  # nothing beside the pieces


def test_the_reference_moves_and_sums_the_same(device: torch.device) -> None:
    source = words_of(pool_of(device, 0).tensor)
    moves = [(0, 4096, 5000), (8, 0, 4)]
    ours, theirs = torch.zeros(3000, dtype=torch.int32, device=device), torch.zeros(3000, dtype=torch.int32, device=device)
    sums, expected = move_pieces(source, ours, moves), move_pieces_reference(source, theirs, moves)
    assert torch.equal(ours, theirs)
    assert torch.equal(sums[0], expected[0])
    assert torch.equal(sums[1, 0], expected[1, 0])


def test_what_is_there_can_be_summed_alone(device: torch.device) -> None:
    source = words_of(pool_of(device, 0).tensor)
    before = source.clone()
    moves = [(16, 16, 8192), (4, 4, 100)]
    sums, expected = move_pieces(source, None, moves), move_pieces_reference(source, None, moves)
    assert torch.equal(sums[0], expected[0])
    assert torch.equal(sums[1, 0], expected[1, 0])
    assert torch.equal(source, before)


class KernelMemory(HostMemory):
    """A pool in shared memory on which the kernel works."""

    def sums(self, destination, copies):  # type: ignore[no-untyped-def]
        def words(memory: object) -> torch.Tensor:
            return torch.frombuffer(memory, dtype=torch.int32)  # type: ignore[call-overload]

        moved = move_pieces(words(self.shared.buffer), None if destination is None else words(destination), copies)
        return sums_of_moves(moved.numpy(), copies)


@pytest.mark.parametrize("spoiled", [False, True])
async def test_a_transfer_between_devices_is_moved_and_verified_by_the_kernel(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, spoiled: bool
) -> None:
    if device.type != "cpu":
        pytest.skip("pools in host memory, for the interpreter")
    monkeypatch.setattr("support.device_pools.HostMemory", KernelMemory)
    layout = KVLayout("m", "t", 2, 1, 16, 16, "float32", False)
    source, pool = VisibleRegion(layout.block_bytes, 4), VisibleRegion(layout.block_bytes, 4)
    source.memory.shared.buffer[:] = np.random.default_rng(0).bytes(4 * layout.block_bytes)
    receiver = KVReceiver(pool, layout, "d", 1, b"s" * 32, SystemClock())
    sender = KVSender(source, layout, "p", 1, b"s" * 32, SystemClock())
    landed = receiver.pieces_written

    def landing(link, nonce, written) -> None:  # type: ignore[no-untyped-def]
        if spoiled:
            pool.memory.shared.buffer[2 * layout.block_bytes + 77] ^= 4
        landed(link, nonce, written)

    monkeypatch.setattr(receiver, "pieces_written", landing)
    async with asyncio.timeout(120):
        await sender.connect("d", 1, await receiver.start(["cuda_ipc"], "127.0.0.1"), 4)
        incoming = receiver.open(
            request_id="r", attempt=0, prefill=WorkerRef("p", 1, ""), first_block=0, blocks=(2, 0), num_tokens=32, ttl_s=20.0
        )
        outgoing = sender.open(incoming.ticket)
        await outgoing.push([(0, 3), (1, 1)])
        if spoiled:
            assert isinstance(await incoming.wait_failed(), DigestMismatch)
        else:
            account = await outgoing.finish()
            await incoming.complete(Seal(incoming.ticket.nonce, 32, account.digests))
            assert bytes(pool.memory.shared.block(2)) == bytes(source.memory.shared.block(3))
            assert bytes(pool.memory.shared.block(0)) == bytes(source.memory.shared.block(1))
        await sender.close()
        await receiver.close()
    pool.close()
    source.close()


@pytest.mark.parametrize("moves", [[], [(0, 0, 0)]])
def test_nothing_to_move_is_moved(device: torch.device, moves: list[tuple[int, int, int]]) -> None:
    words = torch.ones(8, dtype=torch.int32, device=device)
    assert move_pieces(words, words.clone(), moves).numel() == 0
