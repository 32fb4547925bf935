"""Quantiles of durations in little memory: counts in buckets, each 5 % wider than the one before.

A quantile is off by 2.5 % at most. Sketches of different seconds can be added up, which numbers of them cannot.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

_GROWTH = math.log(1.05)
_LEAST_S, _MOST_S = 1e-6, 1e5  # bounds the number of buckets


class Sketch:
    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._total = 0

    def __len__(self) -> int:
        return self._total

    def add(self, seconds: float) -> None:
        bucket = round(math.log(min(max(seconds, _LEAST_S), _MOST_S)) / _GROWTH)
        self._counts[bucket] = self._counts.get(bucket, 0) + 1
        self._total += 1

    def quantile(self, share: float) -> float | None:
        """The least duration that so much of them, 0 to 1, does not exceed; None without any."""
        left = max(1, math.ceil(share * self._total))
        for bucket in sorted(self._counts):
            left -= self._counts[bucket]
            if left <= 0:
                return math.exp(bucket * _GROWTH)
        return None


def together(sketches: Iterable[Sketch]) -> Sketch:
    total = Sketch()
    for sketch in sketches:
        for bucket, count in sketch._counts.items():
            total._counts[bucket] = total._counts.get(bucket, 0) + count
        total._total += sketch._total
    return total
