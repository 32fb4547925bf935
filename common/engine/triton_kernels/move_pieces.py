"""Copies pieces of KV from one pool to another and sums what it copied on the way, or only sums what is there: how KV moves on a
GPU, and what shows that it did.

    program (piece, chunk)    4 KiB: read once, written once, four sums of 64 bits (`common.engine.lane_sums`)

A piece is a contiguous range on both sides, as it is everywhere in a transfer: some layers of a block. However many there are,
and however they are scattered, they are one launch. The sums, 1/128 of the bytes, are all that comes to the host for the digests.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from common.engine.lane_sums import CHUNK_WORDS, KEY, LANES, lane_sums, num_chunks
from common.engine.to_device import to_device

Move = tuple[int, int, int]
"""Byte offset in the source, byte offset in the destination, number of bytes; all multiples of 4."""


@triton.jit
def move_kernel(
    source,
    destination,
    moves,
    key,
    sums,
    chunks,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
    UNIT: tl.constexpr,
    COPIES: tl.constexpr,
):
    piece, chunk = tl.program_id(0), tl.program_id(1)
    take = tl.load(moves + piece * 3) * UNIT
    put = tl.load(moves + piece * 3 + 1) * UNIT
    size = tl.load(moves + piece * 3 + 2) * UNIT
    if chunk * CHUNK < size:
        word = chunk * CHUNK + tl.arange(0, CHUNK)
        inside = word < size
        words = tl.load(source + take + word, mask=inside, other=0)
        if COPIES:
            tl.store(destination + put + word, words, mask=inside)
        out = sums + (piece.to(tl.int64) * chunks + chunk) * LANES
        for lane in tl.static_range(LANES):
            keys = tl.load(key + 2 * lane + tl.arange(0, CHUNK))
            keyed = words.to(tl.uint32, bitcast=True) + keys.to(tl.uint32, bitcast=True)
            even, odd = tl.split(tl.reshape(keyed, [CHUNK // 2, 2]))
            tl.store(out + lane, tl.sum(even.to(tl.int64) * odd.to(tl.int64), 0))


def words_of(memory: torch.Tensor) -> torch.Tensor:
    """Contiguous memory as words of 32 bits."""
    return memory.view(-1).view(torch.int32)


def move_pieces(source: torch.Tensor, destination: torch.Tensor | None, moves: Sequence[Move]) -> torch.Tensor:
    """`source` and `destination` are `words_of` memory on one device; without a destination nothing is written. Returns the sums,
    int64 [moves, chunks of the longest, 4] on that device: bit for bit those of `lane_sums`; beyond a shorter piece's own chunks
    they mean nothing."""
    # In units of 16 bytes where that will do: only then may a thread read so many at once.
    unit = 4 if all(number % 16 == 0 for move in moves for number in move) else 1
    table = to_device(np.array(moves, dtype=np.int64).reshape(-1, 3) // (4 * unit), source.device)
    chunks = max((num_chunks(size) for *_, size in moves), default=0)
    sums = torch.empty(len(moves), chunks, LANES, dtype=torch.int64, device=source.device)
    if chunks:
        move_kernel[(len(moves), chunks)](
            source,
            source if destination is None else destination,
            table,
            _key_on(source.device),
            sums,
            chunks,
            CHUNK=CHUNK_WORDS,
            LANES=LANES,
            UNIT=unit,
            COPIES=destination is not None,
            num_warps=4,
        )
    return sums


@functools.cache
def _key_on(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(KEY.astype(np.int64).astype(np.int32)).to(device)


def sums_of_moves(sums: np.ndarray, moves: Sequence[Move]) -> list[bytes]:
    """Of what `move_pieces` gave, once it is on the host, each piece's own."""
    return [piece[: num_chunks(size)].tobytes() for piece, (*_, size) in zip(sums, moves, strict=True)]


def move_pieces_reference(source: torch.Tensor, destination: torch.Tensor | None, moves: Sequence[Move]) -> torch.Tensor:
    chunks = max((num_chunks(size) for *_, size in moves), default=0)
    sums = torch.zeros(len(moves), chunks, LANES, dtype=torch.int64)
    for index, (take, put, size) in enumerate(moves):
        words = source[take // 4 : (take + size) // 4]
        if destination is not None:
            destination[put // 4 : (put + size) // 4] = words
        own = lane_sums(words.cpu().numpy().view(np.uint8).data)
        sums[index, : len(own)] = torch.from_numpy(own.view(np.int64))
    return sums.to(source.device)
