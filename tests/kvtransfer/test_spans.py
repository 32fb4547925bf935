"""Pushes as they wait, held against the pieces that they are made of, which are worked out here one by one."""

from __future__ import annotations

import random
import struct
from typing import NamedTuple

import pytest

from kvtransfer.region import BlockRegion
from kvtransfer.spans import Span, SpanPieces, address_of, columns_of
from kvtransfer.transports.base import Piece, PieceName

LAYERS, LAYER_BYTES, BLOCKS = 6, 512, 16
BLOCK_BYTES = LAYERS * LAYER_BYTES


class Pushed(NamedTuple):
    logical: int
    source: int
    destination: int


def span_of(pushed: list[Pushed], first: int, end: int) -> Span:
    return Span(
        first,
        end - first,
        (end - first) * LAYER_BYTES,
        [block.logical for block in pushed],
        [block.source * BLOCK_BYTES + first * LAYER_BYTES for block in pushed],
        [block.destination * BLOCK_BYTES + first * LAYER_BYTES for block in pushed],
    )


def pieces_by_hand(region: BlockRegion, pushed: list[Pushed], first: int, end: int) -> list[Piece]:
    return [
        Piece(
            PieceName(block.logical, first, end - first),
            block.destination * BLOCK_BYTES + first * LAYER_BYTES,
            region.block(block.source)[first * LAYER_BYTES : end * LAYER_BYTES],
        )
        for block in pushed
    ]


@pytest.fixture
def region() -> BlockRegion:
    region = BlockRegion.create_shared(BLOCK_BYTES, BLOCKS)
    region.buffer[:] = random.Random(1).randbytes(region.buffer.nbytes)
    return region


def some_blocks(seed: int, count: int) -> list[Pushed]:
    chance = random.Random(seed)
    sources, destinations = (chance.sample(range(BLOCKS), count) for _ in range(2))
    return [Pushed(40 + index, *pair) for index, pair in enumerate(zip(sources, destinations, strict=True))]


@pytest.mark.parametrize("seed", range(8))
def test_spans_stand_for_their_pieces(region: BlockRegion, seed: int) -> None:
    front, back = some_blocks(seed, 5), some_blocks(seed + 100, 3)
    pieces = SpanPieces(region, [span_of(front, 1, 4), span_of(back, 0, 2)])
    expected = pieces_by_hand(region, front, 1, 4) + pieces_by_hand(region, back, 0, 2)
    assert list(pieces) == expected
    assert len(pieces) == 8
    assert [pieces[index] for index in range(8)] == expected
    assert pieces[2:7] == expected[2:7]
    for told in (columns_of(pieces), columns_of(expected)):
        assert told.names() == [piece.name for piece in expected]
        assert told.sizes_bytes == [piece.source.nbytes for piece in expected]
        addresses = [address_of(piece.source) for piece in expected]
        assert told.reach() == (
            min(addresses),
            max(address + piece.source.nbytes for address, piece in zip(addresses, expected, strict=True)),
        )
        rows = list(struct.iter_unpack("<QQQIHH", told.packed()))
        assert [row[0] for row in rows] == addresses
        assert [row[1] for row in rows] == [0] * 8
        assert [(row[2], PieceName(*row[3:])) for row in rows] == [(piece.source.nbytes, piece.name) for piece in expected]
        for pool_address in (region.address, region.address - 7 * BLOCK_BYTES):
            placed = list(struct.iter_unpack("<IHHQ", told.placed(pool_address)))
            assert [PieceName(*row[:3]) for row in placed] == [piece.name for piece in expected]
            assert [pool_address + row[3] for row in placed] == addresses


def test_what_waits_is_taken_block_by_block(region: BlockRegion) -> None:
    pushed = some_blocks(3, 7)
    first, rest = span_of(pushed, 2, 5).parted(3)
    assert first == span_of(pushed[:3], 2, 5)
    assert rest == span_of(pushed[3:], 2, 5)
    assert first.size_bytes == 3 * 3 * LAYER_BYTES


def test_layers_that_go_on_become_one_span() -> None:
    pushed = some_blocks(4, 6)
    assert span_of(pushed, 0, 2).joined(span_of(pushed, 2, 5)) == span_of(pushed, 0, 5)


def test_what_does_not_lie_behind_stays_apart() -> None:
    pushed = some_blocks(5, 6)
    span = span_of(pushed, 0, 2)
    elsewhere_here = [*pushed[:-1], pushed[-1]._replace(source=pushed[0].source)]
    elsewhere_there = [*pushed[:-1], pushed[-1]._replace(destination=pushed[0].destination)]
    for other in (
        span_of(pushed, 3, 4),  # a layer is missing
        span_of(pushed, 1, 3),  # one comes twice
        span_of(pushed[::-1], 2, 3),
        span_of(pushed[:-1], 2, 3),
        span_of(elsewhere_here, 2, 3),
        span_of(elsewhere_there, 2, 3),
        span_of([block._replace(logical=block.logical + 1) for block in pushed], 2, 3),
    ):
        assert span.joined(other) is None


def test_the_memory_stays_while_pieces_of_it_are_held(region: BlockRegion) -> None:
    """Native code is told addresses, which keep nothing alive."""
    pieces = SpanPieces(region, [span_of(some_blocks(6, 2), 0, LAYERS)])
    before = [bytes(piece.source) for piece in pieces_by_hand(region, some_blocks(6, 2), 0, LAYERS)]
    region.close()
    assert [bytes(piece.source) for piece in pieces] == before
