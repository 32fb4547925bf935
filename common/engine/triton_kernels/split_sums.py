"""Sums of partial products in one fixed order: what lets a long row be split over a GPU and still come out the same every time.

    partial  [splits, rows, outputs] fp32  ->  rows x outputs: split 0 + split 1 + ..., + bias, rounded once

Nothing is added by atomics, so neither the order in which programs end nor what else runs beside them is seen in the result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ELEMENTS = 1024
MULTIPROCESSORS = 132  # of an H100 or H200; elsewhere only the number of splits is less apt
MAX_SPLITS = 16


@triton.jit
def sum_partials_kernel(
    partial, bias, output, num_elements, num_outputs, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, ELEMENTS: tl.constexpr
):
    places = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    there = places < num_elements
    total = tl.full((ELEMENTS,), 0.0, tl.float32)
    for split in range(SPLITS):
        total += tl.load(partial + split * num_elements + places, mask=there, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + places % num_outputs, mask=there, other=0.0).to(tl.float32)
    tl.store(output + places, total.to(output.dtype.element_ty), mask=there)


def num_splits(num_programs: int, num_steps: int) -> int:
    """Into how many parts the inputs are cut, so that twice as many programs as multiprocessors have something to read."""
    return max(1, min(2 * MULTIPROCESSORS // max(1, num_programs), num_steps, MAX_SPLITS))


def sum_partials(partial: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    splits, num_rows, num_outputs = partial.shape
    output = torch.empty(num_rows, num_outputs, dtype=dtype, device=partial.device)
    count = num_rows * num_outputs
    sum_partials_kernel[(triton.cdiv(count, ELEMENTS),)](
        partial, partial if bias is None else bias, output, count, num_outputs, splits, bias is not None, ELEMENTS
    )
    return output


def sum_partials_reference(partial: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    total = torch.zeros_like(partial[0])
    for part in partial:
        total = total + part
    return (total if bias is None else total + bias.float()).to(dtype)
