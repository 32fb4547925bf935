"""What the semantic cache counts, and how it stands with each class of questions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily, Metric

from common.metrics.scrape_gauges import ScrapeGauges


@dataclass(frozen=True, slots=True)
class SemanticClass:
    """How the semantic cache stands with a class of questions (a model's)."""

    name: str
    state: str
    threshold: float
    wrong_ratio: float
    upper_bound: float


class SemanticMetrics:
    """What the semantic cache counts. Part of the router's metrics."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.labels = Counter(
            "pdserve_cache_labels", "What was found out about candidates.", ("source", "verdict"), registry=registry
        )
        self.ineligible = Counter(
            "pdserve_cache_semantic_ineligible", "Questions that were not looked up.", ("reason",), registry=registry
        )
        self.vetoes = Counter("pdserve_cache_vetoes", "Candidates that were ruled out.", ("reason",), registry=registry)
        self._read: Callable[[], tuple[list[SemanticClass], int]] | None = None
        self._promised_ratio = 0.0
        registry.register(ScrapeGauges(self._gauges))

    def read_from(self, read: Callable[[], tuple[list[SemanticClass], int]], *, promised_ratio: float) -> None:
        """`read` returns the classes and the number of known questions; called at scrape time. Until then there are no gauges.
        `promised_ratio` is the share of wrong answers among hits that is not to be exceeded."""
        self._read, self._promised_ratio = read, promised_ratio

    def standing(self) -> tuple[list[SemanticClass], int]:
        """The classes and the number of known questions, now."""
        return ([], 0) if self._read is None else self._read()

    def _gauges(self) -> Iterable[Metric]:
        if self._read is None:
            return
        classes, num_entries = self._read()
        ratio = GaugeMetricFamily("pdserve_cache_wrong_ratio", "Wrong among hits.", labels=("model_name", "kind"))
        threshold = GaugeMetricFamily("pdserve_cache_threshold", "Least chance that is served.", labels=("model_name",))
        state = GaugeMetricFamily("pdserve_cache_class", "1 for the state that it is in.", labels=("model_name", "state"))
        for kind in classes:
            ratio.add_metric((kind.name, "estimate"), kind.wrong_ratio)
            ratio.add_metric((kind.name, "ucb"), kind.upper_bound)
            ratio.add_metric((kind.name, "promised"), self._promised_ratio)
            threshold.add_metric((kind.name,), kind.threshold)
            state.add_metric((kind.name, kind.state), 1)
        yield from (ratio, threshold, state)
        entries = GaugeMetricFamily("pdserve_cache_semantic_entries", "Questions that are known.")
        entries.add_metric((), num_entries)
        yield entries
