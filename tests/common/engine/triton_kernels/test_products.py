"""Products with weights of 8 and 4 bits, of exact mode and of experts, against torch in wider types."""

from __future__ import annotations

import pytest
import torch

from common.engine.quantisation import (
    dequantise,
    dequantise_fp8,
    dequantise_int4,
    quantise,
    quantise_fp8,
    quantise_int4,
)
from common.engine.triton_kernels.gemm_exact import exact_linear, exact_linear_reference
from common.engine.triton_kernels.gemm_fp8 import fp8, fp8_reference
from common.engine.triton_kernels.gemm_w4a16 import w4a16, w4a16_reference
from common.engine.triton_kernels.gemm_w8a8 import round_rows, round_rows_reference, w8a8, w8a8_reference
from common.engine.triton_kernels.grouped_gemm import (
    Tiling,
    grouped_product,
    grouped_product_reference,
    make_plan,
)
from common.engine.triton_kernels.split_sums import sum_partials, sum_partials_reference

SHAPES = [(1, 256, 64), (3, 192, 80), (17, 328, 72)]  # rows, inputs, outputs: tiles that are not full
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}


def matrices(rows: int, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows * inputs + outputs)
    left = torch.randn(rows, inputs, generator=generator).to(dtype)
    weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    bias = torch.randn(outputs, generator=generator).to(dtype)
    return left.to(device), weight.to(device), bias.to(device)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [64, 128])
def test_weights_of_4_bits(shape: tuple[int, int, int], group: int, dtype: torch.dtype, device: torch.device) -> None:
    rows, weight, bias = matrices(*shape, dtype, device)
    packed, scales = quantise_int4(weight, group)
    close(w4a16(rows, packed, scales, bias), w4a16_reference(rows, packed, scales, bias))
    close(w4a16(rows, packed, scales, None), w4a16_reference(rows, packed, scales, None))


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_and_weights_of_8_bits(shape: tuple[int, int, int], device: torch.device) -> None:
    rows, weight, bias = matrices(*shape, torch.float32, device)
    weights, scales = quantise(weight)
    rounded, row_scales = round_rows(rows)
    expected_rounded, expected_scales = round_rows_reference(rows)
    assert torch.equal(rounded, expected_rounded)
    torch.testing.assert_close(row_scales, expected_scales, rtol=1e-6, atol=0)
    close(w8a8(rows, weights, scales, bias), w8a8_reference(rows, weights, scales, bias))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_in_fp8(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    rows, weight, bias = matrices(*shape, dtype, device)
    weight[0, 0] = 0.0
    weight[0, 1] = weight[0].abs().max() / 448 / 2**9  # comes out as the least that is not zero, or as zero
    weights, scales = quantise_fp8(weight)
    close(fp8(rows, weights, scales, bias), fp8_reference(rows, weights, scales, bias))


def test_every_float_of_8_bits_is_read_as_it_is(device: torch.device) -> None:
    finite = [byte for byte in range(256) if byte & 127 != 127]
    weights = (
        torch.tensor(finite, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)[:, None].expand(-1, 16).contiguous()
    )
    rows = torch.zeros(1, 16, device=device)
    rows[0, 0] = 1.0
    got = fp8(rows, weights, torch.ones(len(finite), device=device), None)
    assert torch.equal(got[0], weights[:, 0].float())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_exact_product_is_right(dtype: torch.dtype, device: torch.device) -> None:
    for shape in SHAPES:
        rows, weight, bias = matrices(*shape, dtype, device)
        weight = weight.to(dtype)
        close(exact_linear(rows, weight, bias), exact_linear_reference(rows, weight, bias))


@pytest.mark.usefixtures("rows_apart")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_row_of_the_exact_product_does_not_know_its_company(dtype: torch.dtype, device: torch.device) -> None:
    rows, weight, bias = matrices(150, 200, 96, dtype, device)
    weight = weight.to(dtype)
    together = exact_linear(rows, weight, bias)
    for start, end in ((0, 1), (5, 8), (60, 70), (149, 150), (1, 150)):
        assert torch.equal(exact_linear(rows[start:end], weight, bias), together[start:end])


def test_parts_are_added_up_in_order(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    partial = (torch.randn(7, 5, 300, generator=generator) * 1e4).to(device)
    bias = torch.randn(300, generator=generator).to(device)
    for given in (None, bias):
        assert torch.equal(sum_partials(partial, given, torch.float32), sum_partials_reference(partial, given, torch.float32))


@pytest.mark.parametrize("num_rows", [1, 5, 40])
def test_a_plan_gives_each_slot_one_place_with_its_expert(num_rows: int, device: torch.device) -> None:
    expert_ids = torch.randint(0, 6, (num_rows, 3), generator=torch.Generator().manual_seed(num_rows)).to(device)
    expert_ids[expert_ids == 4] = 5  # one that nobody chose
    plan = make_plan(expert_ids, 6, 16)
    num_slots, found = num_rows * 3, set()
    for tile, expert in enumerate(plan.tile_experts.tolist()):
        slots = [slot for slot in plan.slots[tile * 16 : (tile + 1) * 16].tolist() if slot < num_slots]
        assert bool(slots) == (expert >= 0)
        for slot in slots:
            assert expert_ids[slot // 3, slot % 3] == expert
            assert slot not in found
            found.add(slot)
    assert len(found) == num_slots


@pytest.mark.parametrize("num_rows", [1, 21])
def test_rows_meet_the_matrices_of_their_experts(num_rows: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    rows = torch.randn(num_rows, 72, generator=generator).to(device)
    weights = torch.randn(4, 80, 72, generator=generator).to(device)
    expert_ids = torch.randint(0, 4, (num_rows, 2), generator=generator).to(device)
    tiling = Tiling(16, 32, 64)
    plan = make_plan(expert_ids, 4, tiling.rows)
    num_slots = 2 * num_rows
    got = grouped_product(rows, weights, plan, num_slots, 2, tiling)
    torch.testing.assert_close(got, grouped_product_reference(rows, weights, expert_ids), rtol=1e-4, atol=1e-4)
    back = torch.randn(4, 72, 80, generator=generator).to(device)
    again = grouped_product(got, back, plan, num_slots, 1, tiling)  # of slots, each with a row of its own
    torch.testing.assert_close(again, grouped_product_reference(got, back, expert_ids), rtol=1e-4, atol=1e-3)


def test_rounding_keeps_what_it_promises() -> None:
    matrix = torch.randn(40, 200, generator=torch.Generator().manual_seed(3))
    largest = matrix.abs().amax()
    for rounded, steps in (
        (dequantise(*quantise(matrix), 200), 127),
        (dequantise_int4(*quantise_int4(matrix, 64), 200), 7),
        (dequantise_int4(*quantise_int4(matrix, 128), 200), 7),
    ):
        assert (rounded - matrix).abs().max() <= largest / steps / 2 * 1.001
    relative = ((dequantise_fp8(*quantise_fp8(matrix)) - matrix).abs() / matrix.abs().clamp(min=1e-2)).max()
    assert relative <= 2**-4 * 1.001
