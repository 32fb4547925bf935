"""How fast this machine reads memory with all cores, and which share of that a decode step reaches.

A step reads every matrix once. What it reads beyond them (KV of one short sequence) is left out, so the share is a lower bound.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

_BYTES = 512 * 1024 * 1024  # far beyond any cache
_PASSES = 6
# With the scales of groups of 64, and with scale and offset of blocks of 32.
_BYTES_PER_WEIGHT: Mapping[str, float] = {"model": 2.0, "int8": 1.0 + 4 / 64, "int4": 0.5 + 4 / 32, "file": 0.5 + 4 / 32}


def read_bytes_per_s(threads: int) -> float:
    """The best of some passes that add up a block of memory."""
    import torch  # here, as below: who only looks at figures does without it

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        values = torch.ones(_BYTES // 4)
        times_s = []
        for _ in range(_PASSES):
            started_s = time.perf_counter()
            values.sum()
            times_s.append(time.perf_counter() - started_s)
    finally:
        torch.set_num_threads(before)
    return _BYTES / min(times_s)


def bytes_per_token(model: Path, weights: str) -> float:
    """Of a step of one row: all matrices; of the embedding one row, unless it is the head too. Raises ModelLoadError."""
    from common.engine.loader import load_architecture

    architecture = load_architecture(model)
    shapes = architecture.tensor_shapes()
    matrices = sum(shape[0] * shape[1] for name, shape in shapes.items() if len(shape) == 2 and "embed_tokens" not in name)
    tied = shapes["model.embed_tokens.weight"] if architecture.tie_embeddings else (0, 0)
    return (matrices + tied[0] * tied[1]) * _BYTES_PER_WEIGHT[weights]
