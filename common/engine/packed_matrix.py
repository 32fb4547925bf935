"""Weight matrices in the layout that the CPU's matrix library computes in.

Given plain weights, oneDNN reorders them in every call; for a decode step, which reads each weight once, that is half of the
time. Packed once at load, the result is the same. Where there is nothing to gain (a GPU, a dtype the CPU cannot multiply),
weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

Product = Callable[[torch.Tensor], torch.Tensor]
"""`rows [n, in] -> rows @ weight^T + bias [n, out]`."""


def pack(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """The product with `weight [out, in]`. The caller may drop the weight; a packed product holds a copy of its own."""
    if not _can_pack(weight):
        return lambda rows: F.linear(rows, weight, bias)
    # Inductor packs weights by these operators when it freezes a model; eager torch offers no other way.
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    multiply = torch.ops.mkldnn._linear_pointwise.default

    def product(rows: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = multiply(rows, packed, bias, "none", [], "")
        return result

    return product


def _can_pack(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
