"""Pieces of KV moved by Triton: bytes where they belong, and the sums that a host makes of the same bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.engine.kv_pool import KVPool
from common.engine.triton_kernels.move_pieces import move_pieces, move_pieces_reference, piece_range, words_of
from common.lane_sums import lane_sums
from common.types import KVLayout
from kvtransfer.digest import DigestKind, piece_digest, piece_digest_of_sums

NONCE = bytes(range(16))


def pool_of(device: torch.device, seed: int) -> KVPool:
    layout = KVLayout("m", "t", 3, 2, 24, 16, "bfloat16", exact=False)
    pool = KVPool(layout, 5, device)
    values = torch.randn(pool.tensor.shape, generator=torch.Generator().manual_seed(seed))
    pool.tensor.copy_(values)
    return pool


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
        own = sums[index].cpu().numpy().view(np.uint64)[: len(lane_sums(content))]
        assert np.array_equal(own, lane_sums(content))
        made = piece_digest_of_sums(memoryview(own.copy()).cast("B"), size, NONCE, index, first, layers)
        assert made == piece_digest(content, NONCE, index, first, layers, DigestKind.LANES)
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


@pytest.mark.parametrize("moves", [[], [(0, 0, 0)]])
def test_nothing_to_move_is_moved(device: torch.device, moves: list[tuple[int, int, int]]) -> None:
    words = torch.ones(8, dtype=torch.int32, device=device)
    assert move_pieces(words, words.clone(), moves).numel() == 0
