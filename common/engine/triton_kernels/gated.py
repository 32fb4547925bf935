"""Activations of gated feed-forward parts: `silu(gate) * up` and `gelu(gate) * up` of rows `[n, gate | up]`, in one pass.

Element by element, in fp32; the activation is rounded to the rows' dtype before it is multiplied, as torch does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from common.engine.layers.activation import stepwise_gated_gelu, stepwise_gated_silu

_ELEMENTS = 1024
GELU_SLOPE = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
GELU_CUBE = tl.constexpr(0.044715)


@triton.jit(do_not_specialize=["row_stride"])
def gated_kernel(gate_up, output, row_stride, WIDTH: tl.constexpr, GELU: tl.constexpr, ELEMENTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = at < WIDTH
    dtype: tl.constexpr = gate_up.dtype.element_ty
    gate = tl.load(gate_up + row * row_stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        steep = 2.0 * GELU_SLOPE * gate * (1.0 + GELU_CUBE * gate * gate)
    else:
        steep = gate
    active = (gate / (1.0 + tl.exp(-steep))).to(dtype).to(tl.float32)
    tl.store(output + row * WIDTH + at, (active * up).to(dtype), mask=inside)


def gated_silu(gate_up: torch.Tensor) -> torch.Tensor:
    return _gated(gate_up, gelu=False)


def gated_gelu(gate_up: torch.Tensor) -> torch.Tensor:
    """Gelu in its approximation by tanh."""
    return _gated(gate_up, gelu=True)


def _gated(gate_up: torch.Tensor, *, gelu: bool) -> torch.Tensor:
    num_rows, both = gate_up.shape
    width = both // 2
    output = torch.empty(num_rows, width, dtype=gate_up.dtype, device=gate_up.device)
    grid = (num_rows, triton.cdiv(width, _ELEMENTS))
    gated_kernel[grid](gate_up, output, gate_up.stride(0), WIDTH=width, GELU=gelu, ELEMENTS=_ELEMENTS, num_warps=4)
    return output


gated_silu_reference = stepwise_gated_silu
gated_gelu_reference = stepwise_gated_gelu
