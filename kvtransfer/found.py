"""Pieces in a pool whose digests native code has found, as it found them: a table, and their digests if one is not as was stated.

A `Written` is made of each for who asks for one; who takes them all at once takes the table's rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import overload

from kvtransfer.digest import DIGEST_BYTES
from kvtransfer.frames import DESCRIPTOR_BYTES, descriptors_in
from kvtransfer.transports.base import PieceName, Written


class FoundPieces(Sequence[Written]):
    def __init__(self, table: bytes, digests: bytes | None) -> None:
        """`table`: descriptors, with the digests that were stated. `digests`: those that the bytes have; None = the same."""
        self._table = table
        self._digests = digests

    @property
    def as_stated(self) -> bool:
        """The bytes of each have the digest that was stated."""
        return self._digests is None

    def rows(self) -> list[tuple[int, int, int, bytes]]:
        """Logical block, first layer, number of layers and stated digest of each."""
        return list(descriptors_in(self._table))

    def __len__(self) -> int:
        return len(self._table) // DESCRIPTOR_BYTES

    @overload
    def __getitem__(self, index: int) -> Written: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Written]: ...
    def __getitem__(self, index: int | slice) -> Written | Sequence[Written]:
        return self._pieces[index]

    def __iter__(self) -> Iterator[Written]:
        return iter(self._pieces)

    @cached_property
    def _pieces(self) -> list[Written]:
        rows = self.rows()
        found = [stated for *_, stated in rows] if self._digests is None else _parted(self._digests)
        return [Written(PieceName(*name), stated, None, its) for (*name, stated), its in zip(rows, found, strict=True)]


def _parted(digests: bytes) -> list[bytes]:
    return [digests[start : start + DIGEST_BYTES] for start in range(0, len(digests), DIGEST_BYTES)]
