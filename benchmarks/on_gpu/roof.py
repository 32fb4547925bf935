"""The roof: bytes that the device copies in a second, and operations that it does in one large product."""

from __future__ import annotations

import torch

from benchmarks.on_gpu.report import Roof
from benchmarks.on_gpu.timing import seconds_of


def measure_roof(device: str) -> Roof:
    size_bytes, edge = (4 * 2**30, 8192) if device == "cuda" else (16 * 2**20, 256)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    source = torch.ones(size_bytes, dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    copy_s = seconds_of(lambda: destination.copy_(source), device)
    left, right = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))  # zeros would be faster than numbers
    product_s = seconds_of(lambda: left @ right, device)
    return Roof(2 * size_bytes / copy_s, 2 * edge**3 / product_s)
