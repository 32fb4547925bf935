"""Rows and weights in 8 bits: whole numbers are multiplied, 64 at a time, as the native kernels do on a CPU.

    rows -> rounded to 8 bits, a scale for each 64 of a row -> products of whole numbers -> times both scales, summed in fp32

The rounding of a row looks at that row alone, so its company does not matter to it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from common.engine.quantisation import GROUP, STEPS, dequantise, quantise
from common.engine.triton_kernels.gemm_w4a16 import tile_of
from common.engine.triton_kernels.split_sums import num_splits, sum_partials

OUTPUTS = 64


@triton.jit
def round_rows_kernel(rows, rounded, scales, num_inputs, num_groups, GROUP: tl.constexpr, STEPS: tl.constexpr):
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    places = group * GROUP + tl.arange(0, GROUP)
    values = tl.load(rows + row * num_inputs + places, mask=places < num_inputs, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(values), axis=0) / STEPS
    steps = values * tl.where(scale > 0, 1.0 / tl.where(scale > 0, scale, 1.0), 0.0)
    # To the nearest, halves to even, as torch rounds: adding and taking away 1.5 * 2^23 leaves no fraction.
    nearest = (steps + 12582912.0) - 12582912.0
    nearest = tl.minimum(tl.maximum(nearest, -STEPS * 1.0), STEPS * 1.0)
    tl.store(rounded + row * (num_groups * GROUP) + places, nearest.to(tl.int8))
    tl.store(scales + row * num_groups + group, scale)


@triton.jit
def w8a8_kernel(
    rows,
    row_scales,
    weights,
    weight_scales,
    partial,
    num_rows,
    num_outputs,
    num_groups,
    groups_per_split,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUP: tl.constexpr,
):
    own_rows = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    split = tl.program_id(1)
    inside = tl.arange(0, GROUP)
    row_there, output_there = own_rows < num_rows, outputs < num_outputs
    width = num_groups * GROUP
    total = tl.full((ROWS, OUTPUTS), 0.0, tl.float32)
    for group in range(split * groups_per_split, tl.minimum((split + 1) * groups_per_split, num_groups)):
        places = group * GROUP + inside
        left = tl.load(rows + own_rows[:, None].to(tl.int64) * width + places[None, :], mask=row_there[:, None], other=0)
        right = tl.load(weights + outputs[None, :].to(tl.int64) * width + places[:, None], mask=output_there[None, :], other=0)
        left_scale = tl.load(row_scales + own_rows * num_groups + group, mask=row_there, other=0.0)
        right_scale = tl.load(weight_scales + outputs * num_groups + group, mask=output_there, other=0.0)
        product = tl.dot(left, right, out_dtype=tl.int32).to(tl.float32)
        total += product * left_scale[:, None] * right_scale[None, :]
    place = (split.to(tl.int64) * num_rows + own_rows[:, None]) * num_outputs + outputs[None, :]
    tl.store(partial + place, total, mask=row_there[:, None] & output_there[None, :])


def round_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [n, groups * 64] and fp32 [n, groups]."""
    rows = rows.contiguous()
    num_rows, num_inputs = rows.shape
    num_groups = -(-num_inputs // GROUP)
    rounded = torch.empty(num_rows, num_groups * GROUP, dtype=torch.int8, device=rows.device)
    scales = torch.empty(num_rows, num_groups, dtype=torch.float32, device=rows.device)
    round_rows_kernel[(num_rows, num_groups)](rows, rounded, scales, num_inputs, num_groups, GROUP, STEPS, num_warps=1)
    return rounded, scales


def w8a8(rows: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`rows [n, inputs]` times the matrix that `quantise` made; [n, outputs]."""
    rounded, row_scales = round_rows(rows)
    num_rows, (num_outputs, num_groups) = len(rows), scales.shape
    tile_rows = tile_of(num_rows)
    programs = triton.cdiv(num_outputs, OUTPUTS) * triton.cdiv(num_rows, tile_rows)
    splits = num_splits(programs, num_groups)
    partial = torch.empty(splits, num_rows, num_outputs, dtype=torch.float32, device=rows.device)
    w8a8_kernel[(triton.cdiv(num_outputs, OUTPUTS), splits, triton.cdiv(num_rows, tile_rows))](
        rounded,
        row_scales,
        weights,
        scales,
        partial,
        num_rows,
        num_outputs,
        num_groups,
        triton.cdiv(num_groups, splits),
        tile_rows,
        OUTPUTS,
        GROUP,
        num_warps=4,
        num_stages=4,
    )
    return sum_partials(partial, bias, rows.dtype)


def round_rows_reference(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return quantise(rows)


def w8a8_reference(rows: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rounded, row_scales = quantise(rows)
    left = dequantise(rounded, row_scales, rounded.shape[1])
    product = F.linear(left, dequantise(weights, scales, weights.shape[1]))
    return (product if bias is None else product + bias.float()).to(rows.dtype)
