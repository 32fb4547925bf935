"""Adds to rows what a part of a decoder gave, and norms the sum for the next part: one read and one write of each instead of six.

    rows += added                       or  rows += norm(added)     (Gemma, which norms before it adds as well)
    output = norm(rows)

A program holds one row; nothing depends on another. `OFFSET`: Gemma's norm, whose scale is in fp32 and rounded once; else
Llama's, which rounds before it multiplies by the weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from common.engine.triton_kernels.configurations import row_warps
from common.engine.triton_kernels.launch import padded_width
from common.errors import EngineFailure


@triton.jit
def normed(values, weight, epsilon, width, OFFSET: tl.constexpr, dtype: tl.constexpr):
    """Of a row in fp32, padded with zeros: its norm as `dtype` would hold it, in fp32."""
    scaled = values * tl.rsqrt(tl.sum(values * values, 0) / width + epsilon)
    if OFFSET:
        return (scaled * weight).to(dtype).to(tl.float32)
    return (scaled.to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["row_stride", "added_stride"])
def add_norm_kernel(
    rows,
    added,
    weight,
    first_weight,
    output,
    row_stride,
    added_stride,
    epsilon,
    first_epsilon,
    ADD: tl.constexpr,
    FIRST: tl.constexpr,
    OFFSET: tl.constexpr,
    FIRST_OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PADDED)
    inside = at < WIDTH
    dtype: tl.constexpr = rows.dtype.element_ty
    values = tl.load(rows + row * row_stride + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        more = tl.load(added + row * added_stride + at, mask=inside, other=0.0).to(tl.float32)
        if FIRST:
            scale = tl.load(first_weight + at, mask=inside, other=0.0).to(tl.float32)
            more = normed(more, scale, first_epsilon, WIDTH, FIRST_OFFSET, dtype)
        rounded = (values + more).to(dtype)
        tl.store(rows + row * row_stride + at, rounded, mask=inside)
        values = rounded.to(tl.float32)
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + row * WIDTH + at, normed(values, scale, epsilon, WIDTH, OFFSET, dtype).to(dtype), mask=inside)


class TritonNorm:
    """A norm as `operations.Norm`. `weight` is Llama's, or with `offset` 1 and Gemma's together, in fp32."""

    def __init__(self, weight: torch.Tensor, epsilon: float, *, offset: bool) -> None:
        self.weight = weight.contiguous()
        self.epsilon = epsilon
        self.offset = offset

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        flat = rows.reshape(-1, rows.shape[-1])
        return add_norm(flat, None, self).view(rows.shape)

    def add(self, rows: torch.Tensor, added: torch.Tensor, first: object | None = None) -> torch.Tensor:
        if first is not None and not isinstance(first, TritonNorm):
            raise EngineFailure(f"a norm by Triton is added to one that is a {type(first).__name__}")
        return add_norm(rows, added, self, first)


def add_norm(rows: torch.Tensor, added: torch.Tensor | None, norm: TritonNorm, first: TritonNorm | None = None) -> torch.Tensor:
    """Rows [n, width] with neighbouring values; changes them if something is added. Returns the norm of the sum."""
    count, width = rows.shape
    output = torch.empty(count, width, dtype=rows.dtype, device=rows.device)
    padded = padded_width(width)
    add_norm_kernel[(count,)](
        rows,
        added if added is not None else rows,
        norm.weight,
        first.weight if first is not None else norm.weight,
        output,
        rows.stride(0),
        added.stride(0) if added is not None else 0,
        norm.epsilon,
        first.epsilon if first is not None else 0.0,
        ADD=added is not None,
        FIRST=first is not None,
        OFFSET=norm.offset,
        FIRST_OFFSET=first is not None and first.offset,
        WIDTH=width,
        PADDED=padded,
        num_warps=row_warps(padded),
    )
    return output


def add_norm_reference(
    rows: torch.Tensor, added: torch.Tensor | None, norm: TritonNorm, first: TritonNorm | None = None
) -> torch.Tensor:
    if added is not None:
        rows.add_(added if first is None else add_norm_reference(added, None, first))
    wide = rows.float()
    scaled = wide / (wide.square().mean(dim=-1, keepdim=True) + norm.epsilon).sqrt()
    return (scaled * norm.weight).to(rows.dtype) if norm.offset else scaled.to(rows.dtype) * norm.weight
