"""Weights in 8 or 4 bits.

    int8         weight ~ rounded * scale     rounded in -127 ... 127, a scale for each 64 inputs of an output, as for each 64
                                              values of a row where rows are rounded as well
    int4         likewise                     rounded in -7 ... 7, a scale for each 64 or 128 inputs; two in a byte, 8 added
    int4-blocks  ~ rounded * scale + minimum  rounded in 0 ... 15, both for each 32 inputs (`block_matrix`): what int4 is on CPUs
    fp8          weight ~ float * scale       a float of 8 bits (e4m3), one scale for each output
    file         the weights of a GGUF file   in the file's own blocks, on CPUs; nothing is rounded again

Norms, biases, the embedding, the router of a mixture and KV stay as they are. What each costs in quality is measured by
`benchmarks/quality.py`.
"""

from __future__ import annotations

import enum

import torch
import torch.nn.functional as F

from common.engine.block_matrix import BlockMatrix

GROUP = 64
STEPS = 127
PACKED_INPUTS = 128  # of 4 bits, in 64 bytes: the low halves hold the first 64, the high halves the others
INT4_GROUP = 128
INT4_STEPS = 7
FP8_LARGEST = 448.0


class WeightFormat(enum.StrEnum):
    """Of the matrices of a model, as an engine holds them. Workers with different formats refuse each other's KV."""

    MODEL = "model"  # as they came, in the engine's dtype
    INT8 = "int8"
    INT4 = "int4"
    INT4_BLOCKS = "int4-blocks"
    FP8 = "fp8"
    FILE = "file"

    @classmethod
    def of(cls, weights: str, device: str, kernels: str) -> WeightFormat:
        """What a named `engine.weights` means there. Triton's kernels have blocks of their own, also in their interpreter."""
        if weights == cls.INT4 and device == "cpu" and kernels != "triton":
            return cls.INT4_BLOCKS
        return cls(weights)


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


def quantise_int4(matrix: torch.Tensor, group: int = INT4_GROUP) -> tuple[torch.Tensor, torch.Tensor]:
    """[outputs, inputs] -> packed uint8 [outputs, runs * 64], padded with zeros, and fp32 scales [outputs, groups]."""
    padded = F.pad(matrix.float(), (0, -matrix.shape[1] % PACKED_INPUTS))
    groups = padded.view(len(padded), -1, group)
    scales = groups.abs().amax(dim=-1) / INT4_STEPS
    inverse = torch.where(scales > 0, 1.0 / scales, torch.zeros_like(scales))
    rounded = (groups * inverse[:, :, None]).round().clamp(-INT4_STEPS, INT4_STEPS) + (INT4_STEPS + 1)
    runs = rounded.to(torch.uint8).view(len(padded), -1, 2, PACKED_INPUTS // 2)
    return (runs[:, :, 0] | (runs[:, :, 1] << 4)).reshape(len(padded), -1), scales.contiguous()


def dequantise_int4(packed: torch.Tensor, scales: torch.Tensor, num_inputs: int) -> torch.Tensor:
    """fp32 [outputs, inputs]."""
    runs = packed.view(len(packed), -1, 1, PACKED_INPUTS // 2)
    rounded = torch.cat((runs & 15, runs >> 4), dim=2).view(*scales.shape, -1).float() - (INT4_STEPS + 1)
    return (rounded * scales[:, :, None]).view(len(packed), -1)[:, :num_inputs]


def quantise_fp8(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[outputs, inputs] -> e4m3 [outputs, inputs] and fp32 scales [outputs]."""
    scales = matrix.float().abs().amax(dim=-1) / FP8_LARGEST
    inverse = torch.where(scales > 0, 1.0 / scales, torch.zeros_like(scales))
    scaled = (matrix.float() * inverse[:, None]).clamp(-FP8_LARGEST, FP8_LARGEST)
    return scaled.to(torch.float8_e4m3fn), scales


def dequantise_fp8(weights: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """fp32 [outputs, inputs]."""
    return weights.float() * scales[:, None]


def rounded_matrix(matrix: torch.Tensor, weight_format: WeightFormat) -> torch.Tensor:
    """What the format leaves of a matrix, in the type that it had."""
    match weight_format:
        case WeightFormat.MODEL | WeightFormat.FILE:
            return matrix
        case WeightFormat.INT8:
            rounded = dequantise(*quantise(matrix), matrix.shape[1])
        case WeightFormat.INT4:
            rounded = dequantise_int4(*quantise_int4(matrix), matrix.shape[1])
        case WeightFormat.INT4_BLOCKS:
            rounded = BlockMatrix.rounded(matrix).dequantised()
        case WeightFormat.FP8:
            rounded = dequantise_fp8(*quantise_fp8(matrix))
    return rounded.to(matrix.dtype)


def rounded_weights(weights: dict[str, torch.Tensor], weight_format: WeightFormat = WeightFormat.INT8) -> dict[str, torch.Tensor]:
    """The same model with every matrix of its layers as the format would have it, in the type it had. For engines that cannot
    compute in it: what they say differs by rounding, not by weights."""
    return {
        name: rounded_matrix(weight, weight_format) if weight.dim() == 2 and is_rounded(name) else weight
        for name, weight in weights.items()
    }


def is_rounded(name: str) -> bool:
    """Whether a format is for this matrix: those of the layers, but for what chooses experts."""
    return name.startswith("model.layers.") and not name.endswith(".mlp.gate.weight")
