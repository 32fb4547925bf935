"""A decision about models, as a value: who may answer, in which order and why, and who may not. It changes nothing by itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from common.errors import PdserveError


@dataclass(frozen=True, slots=True)
class Candidate:
    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """A model that was passed over. `error` is what a client would be told if nobody else could answer."""

    model: str
    reason: str
    error: PdserveError | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Decision:
    asked: str
    candidates: tuple[Candidate, ...]  # the first answers; the others take its place, in this order, if it cannot
    refused: tuple[Refused, ...] = ()
    predicted: tuple[tuple[str, float], ...] = ()  # probability of a good answer, by model
    predicted_by: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "asked": self.asked,
            "model": self.candidates[0].model if self.candidates else None,
            "candidates": [{"model": candidate.model, "reason": candidate.reason} for candidate in self.candidates],
            "refused": [{"model": refused.model, "reason": refused.reason} for refused in self.refused],
            "predicted": {model: round(probability, 4) for model, probability in self.predicted},
            "predicted_by": self.predicted_by or None,
        }
