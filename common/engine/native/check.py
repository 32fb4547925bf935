"""Holds a freshly compiled library against torch on a small made-up model, before anything is served with it.

A compiler that miscompiles, or a machine whose instructions are not what they claim, shows here: a few rows go through one layer
in both types, as a chunk and one by one, and logits and KV have to agree.
"""

from __future__ import annotations

from pathlib import Path

import torch

from common.engine.attention import create_attention
from common.engine.batch import ScheduledBatch, SequenceSlice
from common.engine.kv_pool import KVPool
from common.engine.loader import ModelArchitecture
from common.engine.models import Model, create_model
from common.engine.native.build import BuildError
from common.engine.native.library import Library
from common.engine.native.model import NativeModel
from common.engine.native.panels import ModelPanels
from common.engine.numerics import FastNumerics
from common.engine.quantisation import WeightFormat
from common.engine.step_input import StepBuffers
from common.types import KVLayout

_TOKENS = 70
_BLOCKS = 10
_TOLERANCE = {
    (torch.float32, WeightFormat.MODEL): 1e-3,
    (torch.bfloat16, WeightFormat.MODEL): 0.15,
    (torch.bfloat16, WeightFormat.INT8): 0.25,
}
"""Of logits with a spread of about one."""


def check_library(path: Path) -> None:
    """Raises BuildError if the library does not compute what torch computes, EngineFailure if it cannot be loaded."""
    library = Library(path)
    architecture = ModelArchitecture("llama", 1, 72, 6, 2, 16, 80, 100, 10_000.0, None, 1e-5, 128, True, True)
    for (dtype, weight_format), tolerance in _TOLERANCE.items():
        generator = torch.Generator().manual_seed(0)
        weights = {
            name: (torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) == 2 else 1.0)).to(dtype)
            for name, shape in architecture.tensor_shapes().items()
        }
        panels = ModelPanels.of(architecture, weights, weight_format)
        torch_pool, native_pool = _pool(architecture, dtype), _pool(architecture, dtype)
        expected = _logits(create_model(architecture, weights, FastNumerics(), 128), torch_pool, (_TOKENS,))
        native = NativeModel(library, architecture, panels, native_pool, 128, threads=1)
        for cuts in ((_TOKENS,), (33, 34, 35, _TOKENS)):
            furthest = float((_logits(native, native_pool, cuts) - expected).abs().max())
            furthest = max(furthest, float((native_pool.tensor - torch_pool.tensor).abs().max()))
            if not furthest <= tolerance:
                raise BuildError(f"the library is {furthest:.2g} off in {dtype}, weights as {weight_format}")


def _pool(architecture: ModelArchitecture, dtype: torch.dtype) -> KVPool:
    name = str(dtype).removeprefix("torch.")
    layout = KVLayout("", "", architecture.num_layers, architecture.num_kv_heads, architecture.head_dim, 8, name, False)
    return KVPool(layout, 1 + _BLOCKS, torch.device("cpu"))


@torch.inference_mode()
def _logits(model: Model, pool: KVPool, cuts: tuple[int, ...]) -> torch.Tensor:
    attention = create_attention("fast", pool, 6)
    buffers = StepBuffers(pool)
    parts = []
    for start, end in zip((0, *cuts), cuts, strict=False):
        tokens = [token * 37 % 100 for token in range(start, end)]
        step = buffers.fill(ScheduledBatch((SequenceSlice(tokens, start, range(1, 1 + _BLOCKS)),)))
        parts.append(model.logits(model.forward(step, pool, attention)))
    return torch.cat(parts)
