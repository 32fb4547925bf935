"""What a step costs by its rows, learned from the steps that were made.

    seconds |                         . '        known: the median of the newest few steps of so many rows
            |               x . x . '            between: a straight line
            |   x . x . x                        beyond: as steep as what is known
            +-------------------------- rows

A few rows are almost free where a step is bound by reading the weights, and cost like any others where it is not; kernels add
steps of their own. So nothing is assumed but that more rows do not cost less. What was not seen for long is forgotten, for
sequences grow and kernels are replaced. Medians, and a third observation before any counts, keep a hiccup of the machine out.
"""

from __future__ import annotations

import statistics
from collections import deque

_MEMORY = 7  # observations per number of rows
_TRUSTED = 3
_FORGOTTEN_AFTER_STEPS = 500
_PRIOR_SHARE = 0.05  # of the cost of no rows at all, for every row, where nothing is known
_EXACT_ROWS = 32  # beyond, numbers of rows are rounded down to a sixteenth


class _Place:
    __slots__ = ("last_step", "median_s", "seconds")

    def __init__(self) -> None:
        self.seconds: deque[float] = deque(maxlen=_MEMORY)
        self.median_s = 0.0
        self.last_step = 0


class StepCost:
    def __init__(self) -> None:
        self._places: dict[int, _Place] = {}
        self._num_steps = 0

    def observe(self, num_rows: int, seconds: float) -> None:
        if seconds <= 0.0:  # a clock too coarse to tell
            return
        self._num_steps += 1
        place = self._places.setdefault(_rounded(num_rows), _Place())
        place.seconds.append(seconds)
        place.median_s = statistics.median(place.seconds)
        place.last_step = self._num_steps
        if self._num_steps % _FORGOTTEN_AFTER_STEPS == 0:
            oldest = self._num_steps - _FORGOTTEN_AFTER_STEPS
            self._places = {rows: place for rows, place in self._places.items() if place.last_step > oldest}

    @property
    def is_known(self) -> bool:
        return any(len(place.seconds) >= _TRUSTED for place in self._places.values())

    def of(self, first_rows: int, count: int) -> list[float]:
        """The costs of steps of `first_rows`, `first_rows` + 1, ... rows; seconds, or any other unit if nothing is known."""
        points = self._points()
        if not points:
            return [1.0 + _PRIOR_SHARE * rows for rows in range(first_rows, first_rows + count)]
        (least_rows, least), (most_rows, most) = points[0], points[-1]
        first_slope = _PRIOR_SHARE * least / (1.0 + _PRIOR_SHARE * least_rows)
        last_slope = (most - least) / (most_rows - least_rows) if len(points) > 1 else first_slope
        costs: list[float] = []
        place = 0
        for rows in range(first_rows, first_rows + count):
            while place < len(points) and points[place][0] < rows:
                place += 1
            if place == 0:
                costs.append(least - first_slope * (least_rows - rows))
            elif place == len(points):
                costs.append(most + last_slope * (rows - most_rows))
            else:
                (left, below), (right, above) = points[place - 1], points[place]
                costs.append(below + (above - below) * (rows - left) / (right - left))
        return costs

    def _points(self) -> list[tuple[int, float]]:
        """What is known, by rows, made to rise."""
        points: list[tuple[int, float]] = []
        most = 0.0
        for rows in sorted(self._places):
            place = self._places[rows]
            if len(place.seconds) >= _TRUSTED:
                most = max(most, place.median_s)
                points.append((rows, most))
        return points


def _rounded(num_rows: int) -> int:
    step = 1 if num_rows <= _EXACT_ROWS else 1 << (num_rows.bit_length() - 5)
    return num_rows // step * step
