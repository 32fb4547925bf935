"""Activations of gated feed-forward parts: `activation(gate) * up` of rows `[n, gate | up]`, fast and step by step.

Torch's own activations treat the ends of an array by another formula than its middle, so that a row's bits depend on where it
lies. The stepwise ones are made of operations that do not.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

_GELU_SLOPE, _GELU_CUBE = math.sqrt(2.0 / math.pi), 0.044715  # gelu(x) ~ x / 2 * (1 + tanh(slope * (x + cube * x^3)))


def gated_silu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gated_gelu(gate_up: torch.Tensor) -> torch.Tensor:
    """With gelu in its approximation by tanh."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh").mul_(up)


def stepwise_gated_silu(gate_up: torch.Tensor) -> torch.Tensor:
    """`gate / (1 + exp(-gate)) * up`."""
    gate, up = gate_up.chunk(2, dim=-1)
    wide = gate.float()
    return (wide / torch.neg(wide).exp_().add_(1.0)).to(up.dtype).mul_(up)


def stepwise_gated_gelu(gate_up: torch.Tensor) -> torch.Tensor:
    """As above: `(1 + tanh(z)) / 2` is `1 / (1 + exp(-2 z))`."""
    gate, up = gate_up.chunk(2, dim=-1)
    wide = gate.float()
    curve = (wide * wide).mul_(_GELU_CUBE).add_(1.0).mul_(wide).mul_(-2.0 * _GELU_SLOPE)
    return (wide / curve.exp_().add_(1.0)).to(up.dtype).mul_(up)
