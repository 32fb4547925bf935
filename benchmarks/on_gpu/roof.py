"""The roof: bytes that the device copies in a second, and operations that it does in one large product."""

from __future__ import annotations

import torch

from benchmarks.on_gpu.report import Roof
from benchmarks.on_gpu.timing import seconds_of


def measure_roof(device: str) -> Roof:
    roof = Roof(_copied_bytes_per_s(device), _flops_per_s(device))
    if device == "cuda":
        torch.cuda.empty_cache()  # other processes are to have it
    return roof


def _copied_bytes_per_s(device: str) -> float:
    """Read and written ones."""
    size_bytes = 4 * 2**30 if device == "cuda" else 16 * 2**20
    source = torch.ones(size_bytes, dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    return 2 * size_bytes / seconds_of(lambda: destination.copy_(source), device)


def _flops_per_s(device: str) -> float:
    edge, dtype = (8192, torch.bfloat16) if device == "cuda" else (256, torch.float32)
    left, right = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))  # zeros would be faster than numbers
    return 2 * edge**3 / seconds_of(lambda: left @ right, device)
