"""What a router's gate counts: who waits, who was refused, what each tenant was served."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric

from common.metrics.buckets import PHASE_BUCKETS_S
from common.metrics.scrape_gauges import ScrapeGauges


@dataclass(frozen=True, slots=True)
class QueueReadings:
    """One band of one model's queue in a router at the moment of a scrape. Written by its gate."""

    model: str
    band: str
    requests: int
    tokens: int
    oldest_s: float
    gap_tokens: float


class AdmissionMetrics:
    """What a router's gate counts. Tenants appear under labels of a bounded set; beyond `MAX_TENANTS` they share one."""

    MAX_TENANTS = 64

    def __init__(self, registry: CollectorRegistry) -> None:
        self._queue_s = Histogram(
            "pdserve_queue_seconds", "From arrival to dispatch.", ("band",), buckets=PHASE_BUCKETS_S, registry=registry
        )
        self._queue_s_of: dict[str, Histogram] = {}  # looking a label up takes longer than all else that admits a request
        self.rejected_total = Counter(
            "pdserve_rejected", "Requests that were not let through.", ("reason", "band"), registry=registry
        )
        self.overdue_total = Counter(
            "pdserve_overdue_dispatches",
            "Dispatches of a band that had waited too long behind another.",
            ("band",),
            registry=registry,
        )
        self._served = Counter(
            "pdserve_tenant_service_tokens", "Tokens by tenant: prompt, cached ones among them, generated.", ("tenant", "kind"),
            registry=registry,
        )  # fmt: skip
        self._served_of: dict[tuple[str, str], Counter] = {}
        self._tenants: set[str] = set()
        self._queues: Callable[[], Iterable[QueueReadings]] = tuple
        registry.register(ScrapeGauges(self._read))

    def serve(self, tenant: str, kind: str, tokens: int) -> None:
        counter = self._served_of.get((tenant, kind))
        if counter is None:
            if tenant not in self._tenants and len(self._tenants) >= self.MAX_TENANTS:
                label = "others"
            else:
                label = tenant
                self._tenants.add(tenant)
            counter = self._served_of[tenant, kind] = self._served.labels(label, kind)
        counter.inc(tokens)

    def queued(self, band: str, seconds: float) -> None:
        histogram = self._queue_s_of.get(band)
        if histogram is None:
            histogram = self._queue_s_of[band] = self._queue_s.labels(band)
        histogram.observe(seconds)

    def read_queues_from(self, read: Callable[[], Iterable[QueueReadings]]) -> None:
        """Called at scrape time."""
        self._queues = read

    def _read(self) -> Iterable[Metric]:
        labels = ("model_name", "band")
        requests = GaugeMetricFamily("pdserve_queue_requests", "Requests that wait for a worker.", labels=labels)
        tokens = GaugeMetricFamily("pdserve_queue_tokens", "Prompt and expected output of those.", labels=labels)
        oldest = GaugeMetricFamily("pdserve_queue_oldest_seconds", "How long the oldest of those has waited.", labels=labels)
        gap = GaugeMetricFamily(
            "pdserve_fairness_gap_tokens", "Service of the most over that of the least served tenant that waits.", labels=labels
        )
        for one in self._queues():
            values = (one.model, one.band)
            requests.add_metric(values, one.requests)
            tokens.add_metric(values, one.tokens)
            oldest.add_metric(values, one.oldest_s)
            gap.add_metric(values, one.gap_tokens)
        yield from (requests, tokens, oldest, gap)
