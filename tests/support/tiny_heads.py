"""Heads with made-up weights for tiny models: they guess often and are seldom right."""

from __future__ import annotations

from pathlib import Path

import torch

from common.engine.heads.file import Description, HeadWeights, write_heads
from common.engine.loader import load_architecture
from common.model_store import resolve


def make_weights(description: Description, words: list[int], seed: int = 0) -> HeadWeights:
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    hidden, width = description.hidden_size, description.width
    return HeadWeights(
        description,
        torch.tensor(words),
        norm=torch.rand(hidden, generator=generator) + 0.5,
        keep=torch.rand(hidden, generator=generator),
        bias=torch.randn(width, generator=generator),
        state=matrix(width, hidden),
        word=matrix(width, hidden),
        out=matrix(hidden, width),
    )


def make_tiny_heads(path: Path, model_path: Path, *, words: list[int] | None = None, num_guesses: int = 3) -> Path:
    """A file of heads for a tiny model."""
    architecture = load_architecture(model_path)
    digest = resolve(str(model_path)).digest()
    description = Description(digest, num_guesses, architecture.hidden_size, architecture.vocab_size, 48)
    write_heads(path, make_weights(description, words or list(range(3, 380))))
    return path
