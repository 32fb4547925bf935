"""What launches have in common: how widths are padded, and whether programs are interpreted or compiled."""

from __future__ import annotations

import math

import triton
import triton.knobs

_LOG2_E = math.log2(math.e)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def padded_width(width: int) -> int:
    """Ranges within a program are powers of two, and matrix products take no less than 16."""
    return max(16, int(triton.next_power_of_2(width)))


def softmax_scale(head_dim: int) -> float:
    """What scores are multiplied by, so that powers of 2 give what powers of e would."""
    return _LOG2_E / math.sqrt(head_dim)
