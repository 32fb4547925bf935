"""Both ends of a decoder: the embedding, and the last norm with the head. A stage of a pipeline may have one, or neither.

Which ends a stage has is said by the weights that it was given; everything between is the layers' business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

from common.engine.loader import ModelArchitecture
from common.errors import EngineFailure

Part = TypeVar("Part")


@dataclass(frozen=True, slots=True)
class ModelEnds:
    embedding: torch.Tensor | None  # [vocab, hidden]
    norm: torch.Tensor | None
    head: torch.Tensor | None  # [vocab, hidden], or as many rows of it as this process computes
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def take(cls, architecture: ModelArchitecture, weights: dict[str, torch.Tensor]) -> ModelEnds:
        """Takes them out of `weights`, of which some must be there."""
        some = next(iter(weights.values()))
        embedding = weights.pop("model.embed_tokens.weight", None)
        head = embedding if architecture.tie_embeddings else weights.pop("lm_head.weight", None)
        return cls(embedding, weights.pop("model.norm.weight", None), head, some.dtype, some.device)


def present(part: Part | None) -> Part:
    """What this stage must have, or its caller is wrong."""
    if part is None:
        raise EngineFailure("this stage of the pipeline was asked for what another one has")
    return part
