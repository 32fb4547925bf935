"""Engines of one test file that share a model's weights, for where reading them takes longer than what is computed with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from common.engine import engine
from common.engine.loader import ModelArchitecture


@contextmanager
def weights_read_once() -> Iterator[None]:
    """Engines that are built meanwhile have the same tensors, which nobody writes to."""
    load_weights = engine.load_weights
    known: dict[tuple[Path, torch.dtype, torch.device], tuple[ModelArchitecture, dict[str, torch.Tensor]]] = {}

    def load(path: Path, dtype: torch.dtype, device: torch.device) -> tuple[ModelArchitecture, dict[str, torch.Tensor]]:
        key = path, dtype, device
        if key not in known:
            known[key] = load_weights(path, dtype, device)
        architecture, tensors = known[key]
        return architecture, dict(tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "load_weights", load)
        yield
