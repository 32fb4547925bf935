"""Products of rows with the matrices of their experts: a mixture-of-experts layer as two launches of fixed size.

    slot          (row, place in its choice of experts): row * experts_per_token + place
    plan          slots sorted by expert; each expert's are cut into tiles of one size, the last one padded
    launch        as many tiles as there can be at most; those beyond the last find no expert and end at once

The plan is made on the device by operations whose shapes depend on the number of rows alone: no count comes to the host, and a
step with experts can be captured. Outputs stand in slots; they are weighted and added up slot after slot, without atomics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a program works. Any of them gives the right sums; which is fastest is a matter of the device."""

    rows: int
    outputs: int
    inputs: int
    warps: int = 4
    stages: int = 4


@dataclass(frozen=True, slots=True)
class GroupedPlan:
    slots: torch.Tensor  # [tiles * rows of a tile], in tiles; the number of slots where there is none
    tile_experts: torch.Tensor  # [tiles]; -1 where there is no tile
    tile_rows: int


def tiling_for(num_slots: int, num_experts: int) -> Tiling:
    """Few slots for each expert: narrow tiles, for the weights decide. Many: tiles that keep tensor cores busy."""
    per_expert = num_slots / num_experts
    if per_expert <= 16:
        return Tiling(16, 64, 128)
    if per_expert <= 64:
        return Tiling(64, 64, 64)
    return Tiling(128, 128, 64, warps=8, stages=3)


def make_plan(expert_ids: torch.Tensor, num_experts: int, tile_rows: int) -> GroupedPlan:
    """`expert_ids` [rows, experts per token]."""
    device, flat = expert_ids.device, expert_ids.reshape(-1).long()
    num_slots = len(flat)
    order = torch.argsort(flat, stable=True)
    counts = (flat[:, None] == torch.arange(num_experts, device=device)).sum(dim=0)
    tiles = (counts + tile_rows - 1) // tile_rows
    tile_ends = tiles.cumsum(0)
    num_tiles = num_slots // tile_rows + min(num_experts, num_slots)  # whoever chooses whom
    experts = torch.searchsorted(tile_ends, torch.arange(num_tiles, device=device), right=True)
    sorted_experts = flat[order]
    first_slot = counts.cumsum(0) - counts
    rank = torch.arange(num_slots, device=device) - first_slot[sorted_experts]
    place = (tile_ends - tiles)[sorted_experts] * tile_rows + rank
    slots = torch.full((num_tiles * tile_rows,), num_slots, device=device).scatter_(0, place, order)
    return GroupedPlan(slots.int(), torch.where(experts < num_experts, experts, -1).int(), tile_rows)


@triton.jit
def grouped_kernel(
    rows,
    weights,
    output,
    slots,
    tile_experts,
    num_slots,
    num_outputs,
    num_inputs,
    SLOTS_PER_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    tile = tl.program_id(1)
    expert = tl.load(tile_experts + tile).to(tl.int64)
    if expert >= 0:
        own_slots = tl.load(slots + tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
        slot_there, output_there = own_slots < num_slots, outputs < num_outputs
        source = rows + (own_slots // SLOTS_PER_ROW)[:, None] * num_inputs
        matrix = weights + expert * num_outputs * num_inputs + outputs[None, :].to(tl.int64) * num_inputs
        total = tl.full((ROWS, OUTPUTS), 0.0, tl.float32)
        for start in range(0, num_inputs, INPUTS):
            places = start + tl.arange(0, INPUTS)
            there = places < num_inputs
            left = tl.load(source + places[None, :], mask=slot_there[:, None] & there[None, :], other=0.0)
            right = tl.load(matrix + places[:, None], mask=output_there[None, :] & there[:, None], other=0.0)
            total = tl.dot(left, right, total, input_precision="ieee", out_dtype=tl.float32)
        place = own_slots[:, None] * num_outputs + outputs[None, :]
        tl.store(output + place, total.to(output.dtype.element_ty), mask=slot_there[:, None] & output_there[None, :])


def grouped_product(
    rows: torch.Tensor, weights: torch.Tensor, plan: GroupedPlan, num_slots: int, slots_per_row: int, tiling: Tiling
) -> torch.Tensor:
    """[slots, outputs]: row `slot // slots_per_row` times `weights [experts, outputs, inputs]` of the slot's expert."""
    rows = rows.contiguous()
    _, num_outputs, num_inputs = weights.shape
    output = torch.empty(num_slots, num_outputs, dtype=rows.dtype, device=rows.device)
    grouped_kernel[(triton.cdiv(num_outputs, tiling.outputs), len(plan.tile_experts))](
        rows,
        weights,
        output,
        plan.slots,
        plan.tile_experts,
        num_slots,
        num_outputs,
        num_inputs,
        slots_per_row,
        plan.tile_rows,
        tiling.outputs,
        tiling.inputs,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return output


def grouped_product_reference(rows: torch.Tensor, weights: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
    """One product per slot: `rows` [rows, inputs], or [slots, inputs]; the result is [slots, outputs]."""
    flat = expert_ids.reshape(-1).long()
    per_row = len(flat) // len(rows)
    repeated = rows.repeat_interleave(per_row, dim=0).double()
    return torch.einsum("si,soi->so", repeated, weights.double()[flat]).to(rows.dtype)
