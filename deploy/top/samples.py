"""One scrape of one process, and what two scrapes say about the time between them.

    text of /metrics -> Samples -> Change(earlier, later): rates, shares, quantiles

A process that was started again counts from zero: what became less is then all new. Knows no metric by name.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from common.errors import EngineFailure

Labels = Mapping[str, str]


@dataclass(frozen=True)
class Samples:
    at_s: float  # monotonic
    series: Mapping[str, tuple[tuple[Labels, float], ...]] = field(default_factory=dict)  # by the name as it is exposed

    def total(self, name: str, **labels: str) -> float:
        return sum(value for found, value in self.series.get(name, ()) if _fits(found, labels))

    def there(self, name: str) -> bool:
        return name in self.series

    def by(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """The sums for each value of one label."""
        sums: dict[str, float] = defaultdict(float)
        for found, value in self.series.get(name, ()):
            if _fits(found, labels):
                sums[found.get(label, "")] += value
        return dict(sums)


def parse(text: str, at_s: float) -> Samples:
    """Raises EngineFailure for text that is no exposition."""
    series: dict[str, list[tuple[Labels, float]]] = defaultdict(list)
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                series[sample.name].append((sample.labels, sample.value))
    except ValueError as error:
        raise EngineFailure(f"the metrics cannot be read: {error}") from error
    return Samples(at_s, {name: tuple(values) for name, values in series.items()})


@dataclass(frozen=True)
class Change:
    """From one scrape to a later one of the same process; without an earlier one, there are no rates."""

    earlier: Samples | None
    later: Samples

    @property
    def seconds(self) -> float:
        return self.later.at_s - self.earlier.at_s if self.earlier is not None else 0.0

    def grown(self, name: str, **labels: str) -> float:
        """How much a counter has grown."""
        now = self.later.total(name, **labels)
        before = self.earlier.total(name, **labels) if self.earlier is not None else 0.0
        return now - before if now >= before else now

    def per_s(self, name: str, **labels: str) -> float | None:
        return self.grown(name, **labels) / self.seconds if self.seconds > 0 else None

    def grown_by(self, name: str, label: str, **labels: str) -> dict[str, float]:
        values = {**self.later.by(name, label, **labels)}
        return {value: self.grown(name, **{**labels, label: value}) for value in values}

    def buckets(self, histogram: str, **labels: str) -> dict[float, float]:
        """Counts up to each bound, cumulative, of what was observed in between."""
        return {_bound(bound): count for bound, count in self.grown_by(f"{histogram}_bucket", "le", **labels).items()}


def quantile(buckets: Mapping[float, float], share: float) -> float | None:
    """The value below which this share of the observations lies, as Prometheus estimates it; None if there are none."""
    bounds = sorted(buckets)
    if not bounds or buckets[bounds[-1]] <= 0:
        return None
    rank = share * buckets[bounds[-1]]
    below, lower = 0.0, 0.0
    for bound in bounds:
        count = buckets[bound]
        if count >= rank and count > below:
            return lower if math.isinf(bound) else lower + (bound - lower) * (rank - below) / (count - below)
        below, lower = count, bound
    return lower


def added(parts: list[dict[float, float]]) -> dict[float, float]:
    """Histograms of several processes, with equal bounds, as one."""
    sums: dict[float, float] = defaultdict(float)
    for part in parts:
        for bound, count in part.items():
            sums[bound] += count
    return dict(sums)


def _fits(found: Labels, wanted: Labels) -> bool:
    return all(found.get(name) == value for name, value in wanted.items())


def _bound(text: str) -> float:
    return math.inf if text == "+Inf" else float(text)
