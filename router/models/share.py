"""Holds a promise about many decisions: the share of the dear model, or a floor under quality, while the questions change.

    bar = integral + gain * recent error          a dear model must be worth so much more per unit of its cost

A fixed bar keeps its share only while questions are those that it was set for. Here each decision moves the integral by its own
error, so that over n decisions the mean error is at most (range of the bar) / (rate * n), whatever is asked. One per name and
router; soft state.
"""

from __future__ import annotations

_RATE = 0.01
_PROPORTIONAL = 0.25
_RECENT = 0.02  # weight of the newest decision in the recent error
_LOWEST, _HIGHEST = -1.0, 1.0


class ShareController:
    def __init__(self, first: float = 0.0) -> None:
        self._integral = first
        self._recent = 0.0

    @property
    def bar(self) -> float:
        return min(_HIGHEST, max(_LOWEST, self._integral + _PROPORTIONAL * self._recent))

    def saw(self, error: float) -> None:
        """`error` > 0: dearer (or better) than promised, so the bar goes up."""
        self._integral = min(_HIGHEST, max(_LOWEST, self._integral + _RATE * error))
        self._recent += _RECENT * (error - self._recent)
