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

from kvtransfer.frames import encode_places
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
        """Of pieces in host memory: their bytes lie between these two addresses."""
        ...

    def packed(self) -> bytes:
        """Of pieces in host memory, for native code that reads them where they lie."""
        ...

    def placed(self, pool_address: int) -> bytes:
        """Of pieces that lie in the pool at this address: descriptors of READY."""
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
        here, ends_bytes = self._region.address, [max(span.sources_bytes) + span.piece_bytes for span in self._spans]
        return here + min([min(span.sources_bytes) for span in self._spans]), here + max(ends_bytes)

    def packed(self) -> bytes:
        here, packed = self._region.address, list[bytes]()
        for first, number, size, blocks, sources, _ in self._spans:
            packed.append(packed_pieces([here + start for start in sources], size, blocks, first, number))
        return b"".join(packed)

    def placed(self, pool_address: int) -> bytes:
        here, placed = self._region.address - pool_address, list[bytes]()
        for first, number, _, blocks, sources, _ in self._spans:
            placed.append(encode_places(blocks, first, number, [here + start for start in sources] if here else sources))
        return b"".join(placed)

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
        starts = [address_of(source) for _, _, source in self._pieces]
        return min(starts), max(map(add, starts, self.sizes_bytes))

    def packed(self) -> bytes:
        return b"".join([packed_piece(address_of(source), 0, source.nbytes, *name) for name, _, source in self._pieces])

    def placed(self, pool_address: int) -> bytes:
        return b"".join(
            [
                encode_places((block,), first, number, (address_of(source) - pool_address,))
                for (block, first, number), _, source in self._pieces
            ]
        )


def columns_of(pieces: Sequence[Piece]) -> Columns:
    return pieces if isinstance(pieces, SpanPieces) else ListedPieces(pieces)


def address_of(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
