"""Shapes of tiles, warps and stages for H100 and H200, as a table. Nothing is tuned while an engine serves.

The entries are predictions, from what a multiprocessor has: 227 KiB of shared memory for programs, 64 Ki registers, 64 warps,
tensor cores that take 64 rows at a time from four warps, and 4.8 TB/s / 132 = 36 GB/s of memory, which by Little's law needs
about 32 KiB in flight (36 GB/s x 0.9 us). What the compiler makes of them is checked for sm_90 (`tests`): registers, no spills,
shared memory, asynchronous copies. Nothing is measured; `benchmarks/tune_kernels.py` does that on a GPU and writes the table
anew.

A tile's address is itself loaded, from the block table, which takes every second stage: 5 stages keep two tiles in flight.

    split      one token is 1 to 8 rows of one KV head: 16 rows, the least that a tensor core takes. The KV that is read decides.
               64 tokens x 128 dims x 2 (K, V) x 2 bytes = 32 KiB a tile, two of them in flight. 72 KiB and 150 registers: three
               programs a multiprocessor, 192 KiB in flight.
    exact      64 rows, so that chunks of prompts do not crawl; padding a decode step's tile costs multiplications, of which a
    step
               has plenty to spare (64 rows are 64 operations a byte; the balance of the machine is at 206).
    prefill    128 rows x 64 keys: 4 x 128 x 64 x 128 operations on 32 KiB, eight warps, 190 registers, 97 KiB: one program a
               multiprocessor, which is what 64 Ki registers allow. Heads of 256 have twice the sum: 64 rows.
    fp32       twice the bytes, and tensor cores would round to 10 bits: products by ordinary multiplications, whose operands take
               registers. Small tiles, not a case to be fast in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MULTIPROCESSORS = 132
SHARED_BYTES = 227 * 1024
MAX_SPLITS = 16
EXACT_SPLIT_TOKENS = 512
"""Of exact mode, where a split is the same positions in every sequence. A multiple of every tile in the table."""


@dataclass(frozen=True, slots=True)
class Tiling:
    rows: int  # of a query tile: tokens x query heads of one KV head
    kv_tile: int  # tokens
    warps: int
    stages: int

    def tokens(self, heads_per_kv_head: int) -> int:
        """Of a query tile."""
        return max(1, self.rows // heads_per_kv_head)

    def staged_bytes(self, width: int, value_bytes: int) -> int:
        """Of keys and values in flight or in use; products by tensor cores may hold one more tile."""
        return max(1, self.stages // 2) * self.tile_bytes(width, value_bytes)

    def tile_bytes(self, width: int, value_bytes: int) -> int:
        return self.kv_tile * width * 2 * value_bytes


# (kernel, bytes of a value, heads up to this wide)
TILINGS: dict[tuple[str, int, int], Tiling] = {
    ("split", 2, 128): Tiling(rows=16, kv_tile=64, warps=4, stages=5),
    ("split", 2, 256): Tiling(rows=16, kv_tile=32, warps=4, stages=5),
    ("split", 4, 128): Tiling(rows=16, kv_tile=64, warps=8, stages=2),
    ("split", 4, 256): Tiling(rows=16, kv_tile=32, warps=8, stages=2),
    ("exact", 2, 128): Tiling(rows=64, kv_tile=64, warps=4, stages=3),
    ("exact", 2, 256): Tiling(rows=64, kv_tile=32, warps=8, stages=3),
    ("exact", 4, 128): Tiling(rows=32, kv_tile=64, warps=8, stages=2),
    ("exact", 4, 256): Tiling(rows=16, kv_tile=32, warps=8, stages=2),
    ("prefill", 2, 64): Tiling(rows=128, kv_tile=128, warps=8, stages=3),
    ("prefill", 2, 128): Tiling(rows=128, kv_tile=64, warps=8, stages=3),
    ("prefill", 2, 256): Tiling(rows=64, kv_tile=64, warps=8, stages=2),
    ("prefill", 4, 128): Tiling(rows=32, kv_tile=64, warps=8, stages=1),
    ("prefill", 4, 256): Tiling(rows=16, kv_tile=32, warps=8, stages=1),
}
MAX_HEAD_DIM = 256


def tiling(kernel: str, dtype: torch.dtype, head_dim: int, heads_per_kv_head: int) -> Tiling:
    """Of an attention kernel; as wide as the heads of one token at least. Raises KeyError for heads wider than MAX_HEAD_DIM."""
    widest = min(width for name, size, width in TILINGS if (name, size) == (kernel, dtype.itemsize) and width >= head_dim)
    entry = TILINGS[kernel, dtype.itemsize, widest]
    rows = entry.rows
    while rows < heads_per_kv_head:
        rows *= 2
    return Tiling(rows, entry.kv_tile, entry.warps, entry.stages)


def num_splits(num_programs: int, longest_tokens: int, kv_tile: int) -> int:
    """Into how many parts KV is cut where nothing fixes it: twice as many programs as multiprocessors, four tiles each
    at least."""
    wanted = -(-2 * MULTIPROCESSORS // max(1, num_programs))
    return max(1, min(wanted, MAX_SPLITS, longest_tokens // (4 * kv_tile)))


def row_warps(width: int) -> int:
    """For programs that hold one row: 8 to 16 values a thread, so that a load is 16 bytes wide."""
    return max(1, min(16, width // 512))
