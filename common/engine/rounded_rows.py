"""Rows of keys or values in 8 bits: each value to the nearest of 255 steps, and the row's step behind them.

    | head_dim bytes, signed, padded to whole words | step: fp32 |        value = byte * step

`native/source/rounded_kv.h` writes and reads the same. A row's rounding depends on the row alone, so what holds for batches,
chunks and cached prefixes holds with it. Bytes of zero are values of zero: cleared memory is clear. A row with a value that
is not finite becomes NaN as a whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

STEPS = 127
_STEP_BYTES = 4
_SMALLEST = 1e-30  # rows without a larger value are zeros: their steps would not be


def round_rows(rows: torch.Tensor) -> torch.Tensor:
    """[..., head_dim] -> int8 [..., row]."""
    values = rows.float()
    largest = values.abs().amax(dim=-1, keepdim=True)
    finite = torch.isfinite(largest)
    inverse = torch.where(finite & (largest > _SMALLEST), STEPS / largest, torch.zeros_like(largest))
    codes = torch.where(finite, values * inverse, torch.zeros_like(values)).round().to(torch.int8)
    steps = torch.where(finite, largest / STEPS, torch.full_like(largest, torch.nan))
    return torch.cat((F.pad(codes, (0, -codes.shape[-1] % 4)), steps.contiguous().view(torch.int8)), dim=-1)


def widen_rows(rows: torch.Tensor, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """int8 [..., row] -> [..., head_dim]."""
    steps = rows[..., -_STEP_BYTES:].contiguous().view(torch.float32)
    return (rows[..., :head_dim].float() * steps).to(dtype)
