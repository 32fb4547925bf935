"""Weights in 8 bits: every 64 inputs of an output share one scale, as every 64 values of a row do where rows are rounded as well.

    weight ~ rounded * scale        rounded in -127 ... 127, scale = largest of the group / 127, symmetric: no zero points

Norms, biases, the embedding and KV stay as they are. What this costs in quality is measured by `benchmarks/quality.py`.
"""

from __future__ import annotations

import enum

import torch
import torch.nn.functional as F

GROUP = 64
STEPS = 127


class WeightFormat(enum.StrEnum):
    """Of the matrices of a model, as an engine holds them. Workers with different formats refuse each other's KV."""

    MODEL = "model"  # as they came, in the engine's dtype
    INT8 = "int8"


def quantise(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[outputs, inputs] -> int8 [outputs, groups * 64], padded with zeros, and fp32 scales [outputs, groups]."""
    padded = F.pad(matrix.float(), (0, -matrix.shape[1] % GROUP))
    groups = padded.view(len(padded), -1, GROUP)
    scales = groups.abs().amax(dim=-1) / STEPS
    inverse = torch.where(scales > 0, 1.0 / scales, torch.zeros_like(scales))
    rounded = (groups * inverse[:, :, None]).round().clamp(-STEPS, STEPS).to(torch.int8)
    return rounded.view(padded.shape), scales.contiguous()


def dequantise(rounded: torch.Tensor, scales: torch.Tensor, num_inputs: int) -> torch.Tensor:
    """fp32 [outputs, inputs]."""
    groups = rounded.view(len(rounded), -1, GROUP).float() * scales[:, :, None]
    return groups.view(len(rounded), -1)[:, :num_inputs]


def rounded_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same model with every matrix of its layers as 8 bits would have it, in the type it had. For engines that cannot
    compute in 8 bits: what they say differs by rounding, not by weights."""
    return {
        name: dequantise(*quantise(weight), weight.shape[1]).to(weight.dtype)
        if weight.dim() == 2 and name.startswith("model.layers.")
        else weight
        for name, weight in weights.items()
    }
