"""Few combinations of many settings, in which all the same every two values stand together that may."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

Combination = dict[str, str]
Axes = Mapping[str, Sequence[str]]


def product(axes: Axes, allowed: Callable[[Combination], bool]) -> list[Combination]:
    """All of them, in order."""
    every = (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
    return [one for one in every if allowed(one)]


def pairs_in(one: Combination) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    return set(itertools.combinations(sorted(one.items()), 2))


def covering(combinations: Sequence[Combination]) -> list[Combination]:
    """Some of the combinations, in which every pair of values is that is in any of them: always the one with most new pairs."""
    left = set().union(*map(pairs_in, combinations))
    chosen = []
    while left:
        best = max(combinations, key=lambda one: len(pairs_in(one) & left))
        chosen.append(best)
        left -= pairs_in(best)
    return chosen
