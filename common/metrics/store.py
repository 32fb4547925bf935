"""What the store behind the caches counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric

from common.metrics.buckets import STORE_BUCKETS_S
from common.metrics.scrape_gauges import ScrapeGauges

BREAKER_STATES = ("closed", "open", "half_open")


class StoreMetrics:
    """What the store behind the caches counts. Part of the router's metrics."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._operations = Counter(
            "pdserve_store_operations", "Operations of the store by result.", ("operation", "result"), registry=registry
        )
        self._dropped = Counter("pdserve_store_dropped_writes", "Values that were not kept.", ("reason",), registry=registry)
        self._operation_s = Histogram(
            "pdserve_store_operation_seconds",
            "Round trips to a shared store.",
            ("operation",),
            buckets=STORE_BUCKETS_S,
            registry=registry,
        )
        self._read_size: Callable[[], tuple[int, int]] | None = None
        self._read_breaker: Callable[[], str] | None = None
        registry.register(ScrapeGauges(self._read))

    def operation(self, name: str, result: str, seconds: float | None = None) -> None:
        """`seconds` if it was a round trip."""
        self._operations.labels(name, result).inc()
        if seconds is not None:
            self._operation_s.labels(name).observe(seconds)

    def dropped(self, reason: str, count: int = 1) -> None:
        self._dropped.labels(reason).inc(count)

    def read_size_from(self, read: Callable[[], tuple[int, int]]) -> None:
        """`read` returns entries and bytes of a store that is in this process; called at scrape time."""
        self._read_size = read

    def read_breaker_from(self, read: Callable[[], str]) -> None:
        """`read` returns the state of the breaker before a shared store, one of BREAKER_STATES; called at scrape time."""
        self._read_breaker = read

    def _read(self) -> Iterable[Metric]:
        if self._read_size is not None:
            entries, size_bytes = self._read_size()
            yield GaugeMetricFamily("pdserve_store_entries", "Values in the store of this process.", value=entries)
            yield GaugeMetricFamily("pdserve_store_bytes", "Bytes they take.", value=size_bytes)
        if self._read_breaker is not None:
            now = self._read_breaker()
            breaker = GaugeMetricFamily("pdserve_store_breaker", "1 for the state that the breaker is in.", labels=("state",))
            for state in BREAKER_STATES:
                breaker.add_metric((state,), float(state == now))
            yield breaker
