"""Rates of totals that others count: how much one grew in the last few seconds.

A total comes with each snapshot in which it has changed, so that between two of them it is what it was. One that falls is
another counter, of a new incarnation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

_WINDOW_S = 3.0
_LEAST_S = 0.5  # a shorter time says nothing about a rate


class Meter:
    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque()  # (when, total), changes only

    def take(self, total: float, now_s: float) -> None:
        if self._samples and total < self._samples[-1][1]:
            self._samples.clear()
        if not self._samples or total != self._samples[-1][1]:
            self._samples.append((now_s, total))
        while len(self._samples) > 1 and self._samples[1][0] <= now_s - _WINDOW_S:
            self._samples.popleft()

    def per_second(self, now_s: float) -> float:
        since_s = now_s - _WINDOW_S
        base = None
        for when_s, total in self._samples:
            if base is None or when_s <= since_s:
                base = (max(when_s, since_s), total)
        if base is None:
            return 0.0
        return (self._samples[-1][1] - base[1]) / max(now_s - base[0], _LEAST_S)


class Meters:
    """Many of them by name. What is not taken in a round is forgotten at its end."""

    def __init__(self) -> None:
        self._meters: dict[Hashable, Meter] = {}
        self._taken: set[Hashable] = set()

    def take(self, name: Hashable, total: float, now_s: float) -> None:
        self._meters.setdefault(name, Meter()).take(total, now_s)
        self._taken.add(name)

    def end_round(self) -> None:
        for name in self._meters.keys() - self._taken:
            del self._meters[name]
        self._taken.clear()

    def per_second(self, name: Hashable, now_s: float) -> float:
        meter = self._meters.get(name)
        return 0.0 if meter is None else meter.per_second(now_s)
