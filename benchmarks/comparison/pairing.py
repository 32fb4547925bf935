"""What may be said of two servers that were measured in turns: the median of the ratios of blocks, its interval, and a verdict.

A block is one run of each server, in an order that the next block reverses, so that drift of the machine falls on both sides
alike. Blocks in which other processes used the machine are left out; if too many were, nothing is judged.
"""

from __future__ import annotations

import enum
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MOST_OTHERS_CORES = 0.15  # that other processes, or other guests of the host, may use during a run
FEWEST_PAIRS = 3  # for an interval
_BOOTSTRAPS = 2000


class Verdict(enum.Enum):
    REACHED = "reached"  # the whole interval is on the right side
    UNDECIDED = "undecided"  # the interval holds the target
    MISSED = "missed"
    NOT_JUDGED = "not judged"  # too few undisturbed pairs


class Direction(enum.Enum):
    AT_LEAST = ">="
    AT_MOST = "<="


@dataclass(frozen=True, slots=True)
class Target:
    direction: Direction
    value: float

    def holds(self, ratio: float) -> bool:
        return ratio >= self.value if self.direction is Direction.AT_LEAST else ratio <= self.value

    def __str__(self) -> str:
        return f"{self.direction.value} {self.value:g}"


@dataclass(frozen=True, slots=True)
class Ratio:
    median: float
    low: float  # of the 95 % interval; the extremes where there are too few pairs for one
    high: float
    pairs: int


def order_of(names: Sequence[str], block: int) -> list[str]:
    """A B, B A, A B ..."""
    return list(names) if block % 2 == 0 else list(reversed(names))


def is_undisturbed(others_cores: float, stolen_cores: float) -> bool:
    return others_cores <= MOST_OTHERS_CORES and stolen_cores <= MOST_OTHERS_CORES


def ratio_of(pairs: Sequence[tuple[float, float]]) -> Ratio | None:
    """Of pairs (ours, theirs); None without any."""
    ratios = [ours / theirs for ours, theirs in pairs if theirs > 0]
    if not ratios:
        return None
    if len(ratios) < FEWEST_PAIRS:
        return Ratio(statistics.median(ratios), min(ratios), max(ratios), len(ratios))
    source = random.Random(0)
    medians = sorted(statistics.median(source.choices(ratios, k=len(ratios))) for _ in range(_BOOTSTRAPS))
    low, high = medians[int(0.025 * _BOOTSTRAPS)], medians[int(0.975 * _BOOTSTRAPS) - 1]
    return Ratio(statistics.median(ratios), low, high, len(ratios))


def verdict(target: Target, ratio: Ratio | None, *, measured_pairs: int) -> Verdict:
    """`measured_pairs` counts the disturbed ones too: if fewer than half of them are left, the machine was not ours."""
    if ratio is None or 2 * ratio.pairs < measured_pairs:
        return Verdict.NOT_JUDGED
    held = {target.holds(ratio.low), target.holds(ratio.high)}
    if len(held) == 2:
        return Verdict.UNDECIDED
    return Verdict.REACHED if held.pop() else Verdict.MISSED
