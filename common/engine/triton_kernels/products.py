"""Which kernel multiplies rows with a matrix that is held in 8 or 4 bits, and with the experts of a mixture.

Weights are rounded when the model is built, on the device, and the matrix that they came from is let go. Many rows (a prompt's)
at 4 bits or in fp8 are multiplied with the weights as floats, made for the occasion: then arithmetic decides, not reading.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from common.engine.numerics import ExpertsProduct, weighted_sum
from common.engine.packed_matrix import Product, pack
from common.engine.quantisation import (
    WeightFormat,
    dequantise_fp8,
    dequantise_int4,
    quantise,
    quantise_fp8,
    quantise_int4,
)
from common.engine.triton_kernels.gemm_fp8 import fp8
from common.engine.triton_kernels.gemm_w4a16 import w4a16
from common.engine.triton_kernels.gemm_w8a8 import w8a8
from common.engine.triton_kernels.grouped_gemm import grouped_product, make_plan, tiling_for

FEW_ROWS = 256


def rounded_product(weight: torch.Tensor, bias: torch.Tensor | None, weight_format: WeightFormat) -> Product:
    match weight_format:
        case WeightFormat.MODEL | WeightFormat.FILE | WeightFormat.INT4_BLOCKS:  # the last two are a CPU's
            return pack(weight, bias)
        case WeightFormat.INT8:
            rounded, scales = quantise(weight)
            return lambda rows: w8a8(rows, rounded, scales, bias)
        case WeightFormat.INT4:
            return _int4_product(weight, bias)
        case WeightFormat.FP8:
            return _fp8_product(weight, bias)


def experts_product(gate_up: torch.Tensor, down: torch.Tensor) -> ExpertsProduct:
    """`gate_up` [experts, 2 * ffn, hidden], `down` [experts, hidden, ffn], activated by silu."""
    num_experts = len(gate_up)

    def compute(rows: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        num_rows, per_row = expert_ids.shape
        num_slots = num_rows * per_row
        tiling = tiling_for(num_slots, num_experts)
        plan = make_plan(expert_ids, num_experts, tiling.rows)
        gate, up = grouped_product(rows, gate_up, plan, num_slots, per_row, tiling).chunk(2, dim=-1)
        answers = grouped_product(F.silu(gate).mul_(up), down, plan, num_slots, 1, tiling)
        return weighted_sum(answers.view(num_rows, per_row, -1), weights)

    return compute


def _int4_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    packed, scales = quantise_int4(weight)
    num_inputs, dtype = weight.shape[1], weight.dtype
    del weight

    def product(rows: torch.Tensor) -> torch.Tensor:
        if len(rows) <= FEW_ROWS:
            return w4a16(rows, packed, scales, bias)
        return F.linear(rows, dequantise_int4(packed, scales, num_inputs).to(dtype), bias)

    return product


def _fp8_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    weights, scales = quantise_fp8(weight)
    dtype = weight.dtype
    del weight

    def product(rows: torch.Tensor) -> torch.Tensor:
        if len(rows) <= FEW_ROWS:
            return fp8(rows, weights, scales, bias)
        return F.linear(rows, dequantise_fp8(weights, scales).to(dtype), bias)

    return product
