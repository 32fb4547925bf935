"""Weighted canaries without memory: a conversation always meets the same model, whichever router it comes to.

Each model draws a number from a hash of the conversation and itself, bent by its weight; the largest wins. So shares are those of
the weights, a changed weight moves only the conversations that it must, and the next in order is a fallback that is stable too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

_2_64 = 2.0**64


def weighted_order(weights: Mapping[str, float], conversation: str) -> tuple[str, ...]:
    """Models with a weight above 0, the chosen one first."""
    drawn = {model: _draw(conversation, model, weight) for model, weight in weights.items() if weight > 0}
    return tuple(sorted(drawn, key=lambda model: (-drawn[model], model)))


def _draw(conversation: str, model: str, weight: float) -> float:
    digest = hashlib.blake2b(f"{conversation}\0{model}".encode(), digest_size=8).digest()
    uniform = (int.from_bytes(digest, "big") + 0.5) / _2_64
    return -weight / math.log(uniform)
