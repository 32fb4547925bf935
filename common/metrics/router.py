"""What a router counts: requests, latencies, placements, caches; and the parts of it that have files of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric

from common.metrics.admission import AdmissionMetrics
from common.metrics.buckets import LOOKUP_BUCKETS_S, PHASE_BUCKETS_S, RATIO_BUCKETS, TOKEN_BUCKETS_S, TTFT_BUCKETS_S
from common.metrics.observe import ObserveMetrics
from common.metrics.scrape_gauges import ScrapeGauges
from common.metrics.semantic import SemanticMetrics
from common.metrics.store import StoreMetrics
from common.metrics.token_gaps import TokenGaps


class RouterMetrics:
    """What a router counts. Created once, by the router's process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], label: str = "model_name") -> Histogram:
            return Histogram(name, text, (label,), buckets=buckets, registry=registry)

        model = "model_name"
        self.requests_total = counter("pdserve_router_requests", "Requests by their HTTP status.", model, "endpoint", "status")
        self.success_total = counter("vllm:request_success", "Choices that ended well.", model, "finished_reason")
        self.ttft_s = histogram("vllm:time_to_first_token_seconds", "Received until first token.", TTFT_BUCKETS_S)
        self.itl_s = TokenGaps("vllm:inter_token_latency_seconds", "Gap between tokens.", TOKEN_BUCKETS_S, registry=registry)
        self.tpot_s = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean gap between the tokens of a request.", TOKEN_BUCKETS_S
        )
        self.e2e_s = histogram("vllm:e2e_request_latency_seconds", "Received until last token.", PHASE_BUCKETS_S)
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of admitted requests.", model)
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens sent to clients.", model)
        self.retries_total = counter("pdserve_router_retries", "Dispatches tried again elsewhere.", model, "reason")
        self.migrations_total = counter(
            "pdserve_router_migrations", "Answers that went on elsewhere after their worker was lost.", model
        )
        self.cancelled_total = counter("pdserve_router_cancelled", "Requests whose client left.", model)
        self._placements = counter(
            "pdserve_router_placements",
            "Dispatches by where the prompt was to be computed: here (by the decode worker), there, or as the worker decides.",
            model,
            "choice",
        )
        self._forecast_error = histogram(
            "pdserve_router_ttft_forecast_error_ratio",
            "How far the predicted time to the first token was off: |predicted - taken| / taken.",
            RATIO_BUCKETS,
        )
        self.watched_workers = Gauge("pdserve_router_watched_workers", "Workers that report to this router.", registry=registry)
        self.known_blocks = Gauge("pdserve_router_known_blocks", "KV blocks whose place is known.", registry=registry)
        self.cache_requests = counter("pdserve_cache_requests", "Requests by what the cache did.", model, "result", "reason")
        self.cache_saved_tokens = counter("pdserve_cache_saved_tokens", "Tokens that no worker computed.", model, "kind")
        self.cache_lookup_s = histogram("pdserve_cache_lookup_seconds", "Asking the cache.", LOOKUP_BUCKETS_S, "stage")
        self.semantic = SemanticMetrics(registry)
        self.store = StoreMetrics(registry)
        self.admission = AdmissionMetrics(registry)
        self.observe = ObserveMetrics(registry)
        self._inflight: Callable[[], dict[str, int]] = dict
        registry.register(ScrapeGauges(self._read))

    def placed(self, model: str, choice: str) -> None:
        self._placements.labels(model, choice).inc()

    def forecast(self, model: str, *, predicted_s: float, taken_s: float) -> None:
        """One time to the first token, as it was predicted at the dispatch and as it came."""
        self._forecast_error.labels(model).observe(abs(predicted_s - taken_s) / max(taken_s, 1e-6))

    def read_inflight_from(self, read: Callable[[], dict[str, int]]) -> None:
        """`read` returns the number of requests in flight by model name; called at scrape time."""
        self._inflight = read

    def _read(self) -> Iterable[Metric]:
        gauge = GaugeMetricFamily("pdserve_router_inflight_requests", "Requests in flight.", labels=("model_name",))
        for model, count in self._inflight().items():
            gauge.add_metric((model,), count)
        yield gauge
