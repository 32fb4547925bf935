"""Every Prometheus metric of pdserve, a file for each part that counts. vLLM's names where it has one (boards know them), else
`pdserve_`.

One registry per process, served by that process: routers on their HTTP port, workers and the manager on ports of their own.
Counters and histograms are updated where things happen; gauges are read from live state at scrape time, so that they can never
go stale.
No metric carries a prompt, a request id or an API key.
"""

from common.metrics.admission import AdmissionMetrics, QueueReadings
from common.metrics.manager import ManagerMetrics, PoolReadings
from common.metrics.observe import CostReadings, ObserveMetrics, ObserveReadings, PromiseReadings
from common.metrics.router import RouterMetrics
from common.metrics.semantic import SemanticClass, SemanticMetrics
from common.metrics.serving import METRICS_TYPE, start_metrics_server
from common.metrics.store import BREAKER_STATES, StoreMetrics
from common.metrics.worker import WorkerMetrics
from common.metrics.worker_readings import LeaseReadings, MaskReadings, WorkerReadings

__all__ = [
    "BREAKER_STATES",
    "METRICS_TYPE",
    "AdmissionMetrics",
    "CostReadings",
    "LeaseReadings",
    "ManagerMetrics",
    "MaskReadings",
    "ObserveMetrics",
    "ObserveReadings",
    "PoolReadings",
    "PromiseReadings",
    "QueueReadings",
    "RouterMetrics",
    "SemanticClass",
    "SemanticMetrics",
    "StoreMetrics",
    "WorkerMetrics",
    "WorkerReadings",
    "start_metrics_server",
]
