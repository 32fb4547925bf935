"""What was pushed, before it is cut into pieces: the same layers of many blocks.

    span     layers [first, first + number)  of the blocks    | a | b | c | ...      waits in the queue of a transfer
    pieces                                                       a    b    c          (`SpanPieces`), when it is its turn
    columns    their names, sizes, places, each in a row of its own: what links ask for where there are many

A span says in columns where its blocks' layers lie, so that pushing, queueing and writing many blocks costs the interpreter
little for each of them: a `Piece` is made only for who asks for one. What waits and goes on in the next layers of the same
blocks, on both sides, becomes one span: a link that is behind writes fewer and larger pieces.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from functools import cached_property
from operator import add
from typing import NamedTuple, Protocol, overload

from kvtransfer.native.kernel import packed_piece, packed_pieces
from kvtransfer.region import BlockRegion
from kvtransfer.transports.base import Piece, PieceName


class Span(NamedTuple):
    first_layer: int  # as the peer numbers them
    num_layers: int
    piece_bytes: int
    logical_blocks: list[int]
    sources_bytes: list[int]  # where each piece begins in the sender's pool
    destinations_bytes: list[int]  # and in the receiver's

    @property
    def size_bytes(self) -> int:
        return self.piece_bytes * len(self.logical_blocks)

    def parted(self, num_blocks: int) -> tuple[Span, Span]:
        """The first so many blocks, and the others."""
        _, _, _, logical, sources, destinations = self
        return (
            self._replace(
                logical_blocks=logical[:num_blocks],
                sources_bytes=sources[:num_blocks],
                destinations_bytes=destinations[:num_blocks],
            ),
            self._replace(
                logical_blocks=logical[num_blocks:],
                sources_bytes=sources[num_blocks:],
                destinations_bytes=destinations[num_blocks:],
            ),
        )

    def joined(self, other: Span) -> Span | None:
        """Both as one, if each of the other's pieces begins where this one's ends, here and there."""
        size_bytes = self.piece_bytes
        if (
            other.first_layer != self.first_layer + self.num_layers
            or other.logical_blocks != self.logical_blocks
            or other.sources_bytes != [start + size_bytes for start in self.sources_bytes]
            or other.destinations_bytes != [start + size_bytes for start in self.destinations_bytes]
        ):
            return None
        return self._replace(num_layers=self.num_layers + other.num_layers, piece_bytes=size_bytes + other.piece_bytes)


class Columns(Protocol):
    """What may be asked of many pieces without making them."""

    @property
    def sizes_bytes(self) -> list[int]: ...

    def names(self) -> list[PieceName]: ...

    def reach(self) -> tuple[int, int]:
        """The pool's bytes that they go to lie between these two offsets."""
        ...

    def packed(self, pool_address: int | None) -> bytes:
        """Of pieces in host memory, for native code that writes them to the pool at this address, or with none leaves them."""
        ...


class SpanPieces(Sequence[Piece]):
    """The pieces of these spans, in their order."""

    def __init__(self, region: BlockRegion, spans: Sequence[Span]) -> None:
        self.sizes_bytes: list[int] = []
        for span in spans:
            self.sizes_bytes += [span.piece_bytes] * len(span.logical_blocks)
        self._region = region
        self._buffer = region.buffer[:]  # as long as it is held, the memory stays where it is
        self._spans = spans

    def __len__(self) -> int:
        return len(self.sizes_bytes)

    @overload
    def __getitem__(self, index: int) -> Piece: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Piece]: ...
    def __getitem__(self, index: int | slice) -> Piece | Sequence[Piece]:
        return self._pieces[index]

    def __iter__(self) -> Iterator[Piece]:
        return iter(self._pieces)

    def names(self) -> list[PieceName]:
        return [PieceName(logical, first, number) for first, number, _, blocks, _, _ in self._spans for logical in blocks]

    def reach(self) -> tuple[int, int]:
        ends_bytes = [max(span.destinations_bytes) + span.piece_bytes for span in self._spans]
        return min([min(span.destinations_bytes) for span in self._spans]), max(ends_bytes)

    def packed(self, pool_address: int | None) -> bytes:
        here, packed = self._region.address, list[bytes]()
        for first, number, size, blocks, sources, destinations in self._spans:
            to = [0] * len(blocks) if pool_address is None else [pool_address + place for place in destinations]
            packed.append(packed_pieces([here + start for start in sources], to, size, blocks, first, number))
        return b"".join(packed)

    @cached_property
    def _pieces(self) -> list[Piece]:
        buffer = self._buffer
        return [
            Piece(PieceName(block, first, number), place, buffer[start : start + size])
            for first, number, size, blocks, sources, destinations in self._spans
            for block, start, place in zip(blocks, sources, destinations, strict=True)
        ]


class ListedPieces:
    """Pieces that were made one by one, in columns."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.sizes_bytes = [piece.source.nbytes for piece in pieces]
        self._pieces = pieces

    def names(self) -> list[PieceName]:
        return [piece.name for piece in self._pieces]

    def reach(self) -> tuple[int, int]:
        starts_bytes = [piece.destination_offset_bytes for piece in self._pieces]
        return min(starts_bytes), max(map(add, starts_bytes, self.sizes_bytes))

    def packed(self, pool_address: int | None) -> bytes:
        return b"".join(
            [
                packed_piece(address_of(source), 0 if pool_address is None else pool_address + offset_bytes, source.nbytes, *name)
                for name, offset_bytes, source in self._pieces
            ]
        )


def columns_of(pieces: Sequence[Piece]) -> Columns:
    return pieces if isinstance(pieces, SpanPieces) else ListedPieces(pieces)


def address_of(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
