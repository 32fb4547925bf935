"""Holds a freshly compiled library against torch on a small made-up model, before anything is served with it.

A compiler that miscompiles, or a machine whose instructions are not what they claim, shows here: a few rows go through one layer
in both types, as a chunk and one by one, and logits and KV have to agree; with the library's own, bit by bit.
"""

from __future__ import annotations

from pathlib import Path

import torch

from common.engine.attention import create_attention
from common.engine.batch import ScheduledBatch, SequenceSlice
from common.engine.cores import OwnCores
from common.engine.kv_pool import KVPool
from common.engine.loader import ModelArchitecture
from common.engine.models import Model, create_model
from common.engine.native.build import BuildError
from common.engine.native.library import Library
from common.engine.native.model import NativeModel
from common.engine.native.panels import ModelPanels
from common.engine.numerics import FastNumerics
from common.engine.quantisation import WeightFormat, rounded_weights
from common.engine.rounded_rows import widen_rows
from common.engine.step_input import StepBuffers
from common.types import ROUNDED, KVLayout

_TOKENS = 70
_BLOCKS = 10
_TOLERANCE = (
    (torch.float32, WeightFormat.MODEL, False, 1e-3),
    (torch.bfloat16, WeightFormat.MODEL, False, 0.15),
    (torch.bfloat16, WeightFormat.INT8, False, 0.25),
    (torch.bfloat16, WeightFormat.INT4_BLOCKS, True, 0.25),
)
"""Of logits with a spread of about one, and of KV; and whether KV is rounded."""


def check_library(path: Path) -> None:
    """Raises BuildError if the library does not compute what torch computes, EngineFailure if it cannot be loaded."""
    library = Library(path)
    architecture = ModelArchitecture("llama", 1, 72, 6, 2, 16, 80, 100, 10_000.0, None, 1e-5, 128, True, True)
    for dtype, weight_format, rounded_kv, tolerance in _TOLERANCE:
        generator = torch.Generator().manual_seed(0)
        weights = {
            name: (torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) == 2 else 1.0)).to(dtype)
            for name, shape in architecture.tensor_shapes().items()
        }
        panels = ModelPanels.of(architecture, weights, weight_format)
        torch_pool, native_pool = (_pool(architecture, dtype, rounded_kv) for _ in range(2))
        as_rounded = rounded_weights(weights, weight_format)
        expected = _logits(create_model(architecture, as_rounded, FastNumerics(), 128), torch_pool, (_TOKENS,))
        native = NativeModel(library, architecture, panels, native_pool, 128, OwnCores(1))
        whole = _logits(native, native_pool, (_TOKENS,))
        for cuts in ((_TOKENS,), (33, 34, 35, _TOKENS)):
            got = _logits(native, native_pool, cuts)
            if not torch.equal(got, whole):
                raise BuildError(f"the library gives a row other bits in other company, in {dtype}, weights as {weight_format}")
            furthest = float((got - expected).abs().max())
            furthest = max(furthest, float((_values(native_pool) - _values(torch_pool)).abs().max()))
            if not furthest <= tolerance:
                raise BuildError(f"the library is {furthest:.2g} off in {dtype}, weights as {weight_format}")


def _pool(architecture: ModelArchitecture, dtype: torch.dtype, rounded: bool) -> KVPool:
    name = (ROUNDED if rounded else "") + str(dtype).removeprefix("torch.")
    layout = KVLayout("", "", architecture.num_layers, architecture.num_kv_heads, architecture.head_dim, 8, name, False)
    return KVPool(layout, 1 + _BLOCKS, torch.device("cpu"))


def _values(pool: KVPool) -> torch.Tensor:
    return widen_rows(pool.tensor, pool.layout.head_dim, torch.float32) if pool.layout.is_rounded else pool.tensor


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
