"""A histogram that is fed once per token: the gaps between tokens, by model.

The metrics library takes a lock for each number that it adds to and looks labels up each time. These are plain lists, written by
one event loop and read at a scrape, on that loop or another thread: a scrape may miss the token of this instant, never more.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client import Metric
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry


class Gaps:
    """Of one model."""

    __slots__ = ("_bounds", "counts", "sum_s")

    def __init__(self, bounds_s: Sequence[float]) -> None:
        self._bounds = bounds_s
        self.counts = [0] * (len(bounds_s) + 1)
        self.sum_s = 0.0

    def observe(self, gap_s: float) -> None:
        self.counts[bisect_left(self._bounds, gap_s)] += 1
        self.sum_s += gap_s


class TokenGaps(Collector):
    def __init__(self, name: str, documentation: str, bounds_s: Sequence[float], *, registry: CollectorRegistry) -> None:
        self._name, self._documentation = name, documentation
        self._bounds_s = tuple(bounds_s)
        self._of: dict[str, Gaps] = {}
        registry.register(self)

    def of(self, model: str) -> Gaps:
        gaps = self._of.get(model)
        if gaps is None:
            gaps = self._of[model] = Gaps(self._bounds_s)
        return gaps

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._documentation, labels=("model_name",))
        limits = [*(str(float(bound)) for bound in self._bounds_s), "+Inf"]
        for model, gaps in self._of.items():
            family.add_metric((model,), list(zip(limits, accumulate(gaps.counts), strict=True)), gaps.sum_s)
        yield family
