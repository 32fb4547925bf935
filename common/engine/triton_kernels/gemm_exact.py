"""The matrix product of exact mode on a GPU: one tile shape and one order of summation, so that a row does not know its company.

    program (i, j)   rows 64 i .. 64 i + 63, padded with zeros  x  outputs 64 j .. 64 j + 63
                     inputs in steps of 64, from the first to the last, into one fp32 sum for each element

Each element is a sum over its own row and its own output in one order, whatever the number of rows: no splits, no choice by
shape.
64 rows are the least that the widest tensor-core instruction takes, and a decode step is bound by the weights, not by rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS, OUTPUTS, INPUTS = 64, 64, 64


@triton.jit
def exact_kernel(
    rows,
    weight,
    bias,
    output,
    num_rows,
    num_outputs,
    num_inputs,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    own_rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row_there, output_there = own_rows < num_rows, outputs < num_outputs
    total = tl.full((ROWS, OUTPUTS), 0.0, tl.float32)
    for start in range(0, num_inputs, INPUTS):
        places = start + tl.arange(0, INPUTS)
        there = places < num_inputs
        left = tl.load(
            rows + own_rows[:, None].to(tl.int64) * num_inputs + places[None, :],
            mask=row_there[:, None] & there[None, :],
            other=0.0,
        )
        right = tl.load(
            weight + outputs[None, :].to(tl.int64) * num_inputs + places[:, None],
            mask=output_there[None, :] & there[:, None],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision="ieee", out_dtype=tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + outputs, mask=output_there, other=0.0).to(tl.float32)[None, :]
    place = own_rows[:, None].to(tl.int64) * num_outputs + outputs[None, :]
    tl.store(output + place, total.to(output.dtype.element_ty), mask=row_there[:, None] & output_there[None, :])


def exact_linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`rows [n, inputs] @ weight [outputs, inputs]^T + bias`; a row's bits depend on that row alone."""
    rows = rows.contiguous()
    (num_rows, num_inputs), num_outputs = rows.shape, len(weight)
    output = torch.empty(num_rows, num_outputs, dtype=rows.dtype, device=rows.device)
    exact_kernel[(triton.cdiv(num_outputs, OUTPUTS), triton.cdiv(num_rows, ROWS))](
        rows,
        weight,
        rows if bias is None else bias,
        output,
        num_rows,
        num_outputs,
        num_inputs,
        bias is not None,
        ROWS,
        OUTPUTS,
        INPUTS,
        num_warps=4,
        num_stages=3,
    )
    return output


def exact_linear_reference(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product = rows.double() @ weight.double().T
    return (product if bias is None else product + bias.double()).to(rows.dtype)
