"""Which shapes of decode steps there are: so many rows, with block tables of such a width.

A batch takes the least bucket that holds it; rows beyond it are padding. Row counts grow in powers of two and then by eighths, so
that padding costs little where a row costs much. An attention that reads tables only as far as a sequence goes needs one width;
one that gathers the whole table gets several, each twice the one before.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

FINE_STEP = 8


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    rows: int
    blocks: int  # of a block table


@dataclass(frozen=True, slots=True)
class Buckets:
    rows: tuple[int, ...]
    widths: tuple[int, ...]

    def bucket_for(self, num_rows: int, num_blocks: int) -> Bucket | None:
        """The least that holds so many sequences, the longest with so many blocks. None if there is none."""
        row, width = bisect_left(self.rows, num_rows), bisect_left(self.widths, num_blocks)
        if num_rows < 1 or row == len(self.rows) or width == len(self.widths):
            return None
        return Bucket(self.rows[row], self.widths[width])

    def all(self) -> Sequence[Bucket]:
        """Largest first: what is captured later finds room in the memory of what was captured before."""
        return sorted((Bucket(rows, blocks) for rows in self.rows for blocks in self.widths), reverse=True)


def make_buckets(max_rows: int, max_blocks: int, *, one_width: bool) -> Buckets:
    """1, 2, 4, 8, 16, 24 ... up to `max_rows`, which is always one of them."""
    rows = {1, 2, 4, *range(FINE_STEP, max_rows, FINE_STEP), max_rows}
    widths = {max_blocks}
    if not one_width:
        width = 8
        while width < max_blocks:
            widths.add(width)
            width *= 2
    return Buckets(tuple(sorted(count for count in rows if count <= max_rows)), tuple(sorted(widths)))
