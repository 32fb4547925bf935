"""Copies and sums of equal rows of bytes, many at once: how KV moves from one pool to another on a GPU, and what shows that it
did.

    memory   rows of `row_words` words of 64 bits, one after the other; a row is a layer of a block
    copy     row `sources[i]` of one memory becomes row `destinations[i]` of the other: one launch, however the rows are scattered
    sums     of each row two sums of 64 bits, modulo 2^64: mixed word * multiplier(place), with two kinds of odd multipliers

Whole numbers are added, so a sum does not depend on the order. A word's upper half is mixed into the lower one before, for of the
topmost bits alone any two would cancel. As every multiplier is odd, one flipped bit always shows; that other damage passes both
sums is as likely as two words of 64 random bits being what they should be.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

WORDS = 1024  # of a program at once
_FIRST, _SECOND = -7046029254386353131, -4417276706812531889  # odd: 2^64 divided by the golden ratio, and a prime of xxh3's
_LOWER = 0xFFFFFFFF


@triton.jit
def copy_rows_kernel(source, destination, sources, destinations, row_words, WORDS: tl.constexpr):
    row = tl.program_id(0)
    words = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    there = words < row_words
    values = tl.load(source + tl.load(sources + row) * row_words + words, mask=there)
    tl.store(destination + tl.load(destinations + row) * row_words + words, values, mask=there)


@triton.jit
def sum_rows_kernel(
    memory, rows, sums, row_words, FIRST: tl.constexpr, SECOND: tl.constexpr, LOWER: tl.constexpr, WORDS: tl.constexpr
):
    row = tl.program_id(0)
    base = memory + tl.load(rows + row) * row_words
    first = tl.full((WORDS,), 0, tl.int64)
    second = tl.full((WORDS,), 0, tl.int64)
    for start in range(0, row_words, WORDS):
        places = start + tl.arange(0, WORDS)
        values = tl.load(base + places, mask=places < row_words, other=0)
        values = values ^ ((values >> 32) & LOWER)
        odd = places.to(tl.int64) * 2 + 1
        first += values * (odd * FIRST)
        mixed = odd * SECOND
        second += values * ((mixed ^ (mixed >> 29)) | 1)
    tl.store(sums + row * 2, tl.sum(first, axis=0))
    tl.store(sums + row * 2 + 1, tl.sum(second, axis=0))


def copy_rows(
    source: torch.Tensor, destination: torch.Tensor, sources: torch.Tensor, destinations: torch.Tensor, row_words: int
) -> None:
    """`source` and `destination` are int64 memory; `sources` and `destinations` int64 numbers of rows."""
    grid = (len(sources), triton.cdiv(row_words, WORDS))
    copy_rows_kernel[grid](source, destination, sources, destinations, row_words, WORDS, num_warps=4)


def sum_rows(memory: torch.Tensor, rows: torch.Tensor, row_words: int) -> torch.Tensor:
    """int64 [rows, 2]."""
    sums = torch.empty(len(rows), 2, dtype=torch.int64, device=memory.device)
    sum_rows_kernel[(len(rows),)](memory, rows, sums, row_words, _FIRST, _SECOND, _LOWER, WORDS, num_warps=4)
    return sums


def copy_rows_reference(
    source: torch.Tensor, destination: torch.Tensor, sources: torch.Tensor, destinations: torch.Tensor, row_words: int
) -> None:
    destination.view(-1, row_words)[destinations] = source.view(-1, row_words)[sources]


def sum_rows_reference(memory: torch.Tensor, rows: torch.Tensor, row_words: int) -> torch.Tensor:
    values = memory.view(-1, row_words)[rows]
    values = values ^ ((values >> 32) & _LOWER)
    odd = torch.arange(row_words, device=memory.device) * 2 + 1
    mixed = odd * _SECOND
    first, second = odd * _FIRST, (mixed ^ (mixed >> 29)) | 1
    return torch.stack(((values * first).sum(dim=1), (values * second).sum(dim=1)), dim=1)
