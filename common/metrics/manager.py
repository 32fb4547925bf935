"""What the pool manager shows of its pools."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from common.metrics.scrape_gauges import ScrapeGauges


@dataclass(frozen=True, slots=True)
class PoolReadings:
    """One pool at the moment of a scrape. Written by the pool manager. `phases` has every phase there is."""

    model: str
    role: str
    desired: int
    phases: Mapping[str, int]
    restarts: int  # incarnations after the first of each slot


class ManagerMetrics:
    """What the pool manager shows. Created once, by its process; `read` is called from the thread that serves metrics."""

    def __init__(
        self, registry: CollectorRegistry, *, read: Callable[[], Iterable[PoolReadings]], routers: Callable[[], int]
    ) -> None:
        self._read_pools, self._count_routers = read, routers
        registry.register(ScrapeGauges(self._read))

    def _read(self) -> Iterable[Metric]:
        labels = ("model_name", "role")
        desired = GaugeMetricFamily("pdserve_pool_desired_workers", "Workers there should be.", labels=labels)
        workers = GaugeMetricFamily("pdserve_pool_workers", "Workers there are, by phase.", labels=(*labels, "phase"))
        restarts = CounterMetricFamily("pdserve_pool_worker_restarts", "Workers started again after a loss.", labels=labels)
        for pool in self._read_pools():
            desired.add_metric((pool.model, pool.role), pool.desired)
            restarts.add_metric((pool.model, pool.role), pool.restarts)
            for phase, count in pool.phases.items():
                workers.add_metric((pool.model, pool.role, phase), count)
        watching = GaugeMetricFamily("pdserve_routers", "Routers that watch the membership.", value=self._count_routers())
        yield from (desired, workers, restarts, watching)
