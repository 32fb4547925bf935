"""Every Prometheus metric of pdserve, on one page. vLLM's names where it has one (boards know them), `pdserve_` else.

One registry per process, served by that process: routers on their HTTP port, workers and the manager on ports of their own.
Counters and histograms are updated where things happen; gauges are read from live state at scrape time, so that they can never
go stale.
No metric carries a prompt, a request id or an API key.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from common.metrics_access import guarded

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560
)  # fmt: skip
_TOKEN_BUCKETS_S = (
    0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5,
    7.5, 10, 20, 40, 80,
)  # fmt: skip
_PHASE_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 30, 60, 120, 600, 1800, 7680)
_LOOKUP_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.015, 0.02, 0.05, 0.1, 0.5)
_STORE_BUCKETS_S = (0.0002, 0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.012, 0.015, 0.02, 0.05, 0.1, 0.5, 1)
_COMPILE_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
BREAKER_STATES = ("closed", "open", "half_open")
_STEP_TOKEN_BUCKETS = tuple(2**exponent for exponent in range(15))
_REQUEST_TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_RATIO_BUCKETS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0)


class RouterMetrics:
    """What a router counts. Created once, by the router's process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        model = ("model_name",)
        self.requests_total = Counter(
            "pdserve_router_requests", "Requests by their HTTP status.", ("model_name", "endpoint", "status"), registry=registry
        )
        self.success_total = Counter(
            "vllm:request_success", "Choices that ended well.", ("model_name", "finished_reason"), registry=registry
        )
        self.ttft_s = Histogram(
            "vllm:time_to_first_token_seconds", "Received until first token.", model, buckets=_TTFT_BUCKETS_S, registry=registry
        )
        self.itl_s = Histogram(
            "vllm:inter_token_latency_seconds", "Gap between tokens.", model, buckets=_TOKEN_BUCKETS_S, registry=registry
        )
        self.tpot_s = Histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean gap between the tokens of a request.",
            model,
            buckets=_TOKEN_BUCKETS_S,
            registry=registry,
        )
        self.e2e_s = Histogram(
            "vllm:e2e_request_latency_seconds", "Received until last token.", model, buckets=_PHASE_BUCKETS_S, registry=registry
        )
        self.prompt_tokens = Counter("vllm:prompt_tokens", "Prompt tokens of admitted requests.", model, registry=registry)
        self.generation_tokens = Counter("vllm:generation_tokens", "Tokens sent to clients.", model, registry=registry)
        self.retries_total = Counter(
            "pdserve_router_retries", "Dispatches tried again elsewhere.", ("model_name", "reason"), registry=registry
        )
        self.migrations_total = Counter(
            "pdserve_router_migrations", "Answers that went on elsewhere after their worker was lost.", model, registry=registry
        )
        self.cancelled_total = Counter("pdserve_router_cancelled", "Requests whose client left.", model, registry=registry)
        self._placements = Counter(
            "pdserve_router_placements",
            "Dispatches by where the prompt was to be computed: here (by the decode worker), there, or as the worker decides.",
            ("model_name", "choice"),
            registry=registry,
        )
        self._forecast_error = Histogram(
            "pdserve_router_ttft_forecast_error_ratio",
            "How far the predicted time to the first token was off: |predicted - taken| / taken.",
            model,
            buckets=_RATIO_BUCKETS,
            registry=registry,
        )
        self.watched_workers = Gauge("pdserve_router_watched_workers", "Workers that report to this router.", registry=registry)
        self.known_blocks = Gauge("pdserve_router_known_blocks", "KV blocks whose place is known.", registry=registry)
        self.cache_requests = Counter(
            "pdserve_cache_requests", "Requests by what the cache did.", ("model_name", "result", "reason"), registry=registry
        )
        self.cache_saved_tokens = Counter(
            "pdserve_cache_saved_tokens", "Tokens that no worker computed.", ("model_name", "kind"), registry=registry
        )
        self.cache_lookup_s = Histogram(
            "pdserve_cache_lookup_seconds", "Asking the cache.", ("stage",), buckets=_LOOKUP_BUCKETS_S, registry=registry
        )
        self.semantic = SemanticMetrics(registry)
        self.store = StoreMetrics(registry)
        self.admission = AdmissionMetrics(registry)
        self.observe = ObserveMetrics(registry)
        self._inflight: Callable[[], dict[str, int]] = dict
        registry.register(_Gauges(self._read))

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
        registry.register(_Gauges(self._gauges))

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
            buckets=_STORE_BUCKETS_S,
            registry=registry,
        )
        self._read_size: Callable[[], tuple[int, int]] | None = None
        self._read_breaker: Callable[[], str] | None = None
        registry.register(_Gauges(self._read))

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
            "pdserve_queue_seconds", "From arrival to dispatch.", ("band",), buckets=_PHASE_BUCKETS_S, registry=registry
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
        registry.register(_Gauges(self._read))

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


@dataclass(frozen=True, slots=True)
class PromiseReadings:
    """How one class of promises (`router.slo`) was kept lately. Written by the observatory."""

    name: str
    met_ratio: float  # NaN = there was nothing to keep
    goodput_per_s: float  # requests that got what they were promised


@dataclass(frozen=True, slots=True)
class CostReadings:
    """What a model's answers have cost since the router started (`router.observe.cost`). Written by the observatory."""

    model: str
    seconds: Mapping[str, float]  # of workers, by what for
    saved_s: float
    tokens: Mapping[str, int]
    money: Mapping[str, float]  # empty without prices
    saved_money: float


@dataclass(frozen=True, slots=True)
class ObserveReadings:
    promises: tuple[PromiseReadings, ...] = ()
    costs: tuple[CostReadings, ...] = ()
    fairness: Mapping[tuple[str, str], float] = field(default_factory=dict)  # Jain's index by model and band


@dataclass(slots=True)
class _OfModel:
    """A model's metrics, looked up once: looking a label up takes longer than counting."""

    unexplained: Histogram
    prompt_tokens: Histogram
    generation_tokens: Histogram
    promised: dict[tuple[str, bool], Counter] = field(default_factory=dict)


class ObserveMetrics:
    """What a router's observatory counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._promised = Counter(
            "pdserve_slo_requests",
            "Requests by whether they got the times that their class is promised.",
            ("model_name", "slo", "outcome"),
            registry=registry,
        )
        self.loop_delay_s = Histogram(
            "pdserve_router_loop_delay_seconds",
            "How late the router's event loop was, looked at once a second.",
            buckets=_TOKEN_BUCKETS_S,
            registry=registry,
        )
        self._unexplained = Histogram(
            "pdserve_waterfall_unexplained_ratio",
            "Part of the time to the first token that no stage accounts for: network, event loops.",
            ("model_name",),
            buckets=_RATIO_BUCKETS,
            registry=registry,
        )
        self._prompt_tokens = Histogram(
            "vllm:request_prompt_tokens",
            "Tokens of a prompt.",
            ("model_name",),
            buckets=_REQUEST_TOKEN_BUCKETS,
            registry=registry,
        )
        self._generation_tokens = Histogram(
            "vllm:request_generation_tokens",
            "Tokens of an answer.",
            ("model_name",),
            buckets=_REQUEST_TOKEN_BUCKETS,
            registry=registry,
        )
        self._of_model: dict[str, _OfModel] = {}
        self._readings: Callable[[], ObserveReadings] = ObserveReadings
        registry.register(_Gauges(self._read))

    def ended(
        self,
        model: str,
        *,
        slo: str = "",
        met: bool | None = None,
        unexplained_ratio: float | None = None,
        tokens: tuple[int, int] | None = None,
    ) -> None:
        """A request. `slo` is "" if it was promised nothing, `met` None if it counts for neither; `unexplained_ratio` is there if
        workers gave it a first token, `tokens` (prompt, generated) if it ended well."""
        of = self._of_model.get(model)
        if of is None:
            of = self._of_model[model] = _OfModel(
                self._unexplained.labels(model), self._prompt_tokens.labels(model), self._generation_tokens.labels(model)
            )
        if slo and met is not None:
            counter = of.promised.get((slo, met))
            if counter is None:
                counter = of.promised[slo, met] = self._promised.labels(model, slo, "met" if met else "missed")
            counter.inc()
        if unexplained_ratio is not None:
            of.unexplained.observe(unexplained_ratio)
        if tokens is not None:
            of.prompt_tokens.observe(tokens[0])
            of.generation_tokens.observe(tokens[1])

    def read_from(self, read: Callable[[], ObserveReadings]) -> None:
        """Called at scrape time."""
        self._readings = read

    def _read(self) -> Iterable[Metric]:
        now = self._readings()
        yield from self._of_promises(now.promises)
        yield from self._of_costs(now.costs)
        fairness = GaugeMetricFamily(
            "pdserve_fairness_jain_index",
            "How evenly waiting tenants were served for their weight in half a minute; 1 = all the same.",
            labels=("model_name", "band"),
        )
        for (model, band), index in now.fairness.items():
            fairness.add_metric((model, band), index)
        yield fairness

    def _of_costs(self, costs: Iterable[CostReadings]) -> Iterable[Metric]:
        labels = ("model_name", "part")
        seconds = CounterMetricFamily("pdserve_cost_seconds", "Seconds of workers, by what they went for.", labels=labels)
        saved = CounterMetricFamily(
            "pdserve_cost_saved_seconds", "Seconds of workers that caches saved, by estimate.", labels=("model_name",)
        )
        tokens = CounterMetricFamily("pdserve_cost_tokens", "Tokens behind those seconds.", labels=labels)
        money = CounterMetricFamily("pdserve_cost_money", "The same seconds at router.prices.", labels=labels)
        saved_money = CounterMetricFamily(
            "pdserve_cost_saved_money", "The saved seconds at router.prices.", labels=("model_name",)
        )
        for one in costs:
            for family, values in ((seconds, one.seconds), (tokens, one.tokens), (money, one.money)):
                for part, value in values.items():
                    family.add_metric((one.model, part), value)
            saved.add_metric((one.model,), one.saved_s)
            if one.money:
                saved_money.add_metric((one.model,), one.saved_money)
        yield from (seconds, saved, tokens, money, saved_money)

    def _of_promises(self, promises: Iterable[PromiseReadings]) -> Iterable[Metric]:
        ratio = GaugeMetricFamily(
            "pdserve_slo_met_ratio", "Share of the last five minutes' requests that got what was promised.", labels=("slo",)
        )
        goodput = GaugeMetricFamily(
            "pdserve_goodput_requests_per_second", "Requests that got what was promised, over five minutes.", labels=("slo",)
        )
        for one in promises:
            ratio.add_metric((one.name,), one.met_ratio)
            goodput.add_metric((one.name,), one.goodput_per_s)
        yield from (ratio, goodput)


@dataclass(frozen=True, slots=True)
class LeaseReadings:
    """Transfers that may still read or write KV, on one side. Written by `kvtransfer`."""

    open: int = 0
    expired: int = 0  # since the start: whose ticket or lease ran out
    oldest_s: float = 0.0
    quarantined: int = 0  # given up, while a writer may still write
    quarantined_oldest_s: float = 0.0


@dataclass(frozen=True, slots=True)
class MaskReadings:
    """Masks of grammars that were worked out beside the model since the start. Written by the engine."""

    count: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class WorkerReadings:
    """A worker's state at the moment of a scrape. Written by the worker's host."""

    requests_running: int
    requests_waiting: int
    blocks_total: int
    blocks_free: int
    blocks_cached: int
    blocks_used: int
    blocks_in_transfer: int
    leases: LeaseReadings
    block_tokens: int
    computed_tokens: int
    generated_tokens: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    drafted_tokens: int
    accepted_tokens: int
    steps_by_accepted: tuple[int, ...]
    guesses_by_author: Mapping[str, tuple[int, int]]  # drafted and accepted tokens
    work_s: Mapping[str, float]  # time of steps, by what their rows were for
    masks: MaskReadings
    ranks: int = 1
    steps_ahead: int = 0  # planned while another was computed
    waits: Mapping[str, int] = field(default_factory=dict)  # steps that could not be, by the reason
    surplus_rows: int = 0
    swapped_out: int = 0
    swapped_in: int = 0


class WorkerMetrics:
    """What a worker of either role counts. Created once, by the worker's server."""

    def __init__(self, registry: CollectorRegistry, *, model: str, role: str, read: Callable[[], WorkerReadings]) -> None:
        self._values = (model, role)
        self._read_state = read
        names = ("model_name", "engine")

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(name, text, (*names, *more), registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, names, buckets=buckets, registry=registry).labels(*self._values)

        self._finished = counter("vllm:request_success", "Requests that ended well here.", "finished_reason")
        self._failed = counter("pdserve_request_failures", "Requests that ended in an error here.", "error")
        self._transfers = counter("pdserve_transfers", "Hand-offs by outcome.", "transport", "outcome")
        self.transfer_bytes = counter("pdserve_transfer_bytes", "KV bytes pushed or received.").labels(*self._values)
        self.transfer_blocks = counter("pdserve_transfer_blocks", "KV blocks pushed or received.").labels(*self._values)
        self.step_tokens = histogram("vllm:iteration_tokens_total", "Tokens computed in a step.", _STEP_TOKEN_BUCKETS)
        self.step_s = histogram("pdserve_step_seconds", "Time of one engine step.", _TOKEN_BUCKETS_S)
        self.queue_s = histogram("vllm:request_queue_time_seconds", "Waiting for blocks or for a turn.", _PHASE_BUCKETS_S)
        self.prefill_s = histogram("vllm:request_prefill_time_seconds", "Computing the prompt.", _PHASE_BUCKETS_S)
        self.decode_s = histogram("vllm:request_decode_time_seconds", "First token until the last.", _PHASE_BUCKETS_S)
        self.transfer_exposed_s = histogram(
            "pdserve_transfer_exposed_seconds", "KV transfer that prefill did not hide.", _TOKEN_BUCKETS_S
        )
        self.transfer_hidden_s = histogram(
            "pdserve_transfer_hidden_seconds", "KV transfer that went on while the prompt was computed.", _TOKEN_BUCKETS_S
        )
        self.inference_s = histogram("vllm:request_inference_time_seconds", "Prompt and answer together.", _PHASE_BUCKETS_S)
        self._grammars = counter("pdserve_grammar_requests", "Requests with a grammar, by what that took.", "outcome")
        self._grammar_s = histogram(
            "pdserve_grammar_compile_seconds", "Compiling a grammar that was not known.", _COMPILE_BUCKETS_S
        )
        registry.register(_Gauges(self._read))

    def grammar(self, outcome: str, seconds: float | None = None) -> None:
        """`outcome` is cached, compiled or refused; `seconds` if there was anything to compile."""
        self._grammars.labels(*self._values, outcome).inc()
        if seconds is not None:
            self._grammar_s.observe(seconds)

    def finished(self, reason: str) -> None:
        self._finished.labels(*self._values, reason).inc()

    def failed(self, error: str) -> None:
        self._failed.labels(*self._values, error).inc()

    def transferred(self, transport: str, outcome: str) -> None:
        """`outcome` is "ok" or the name of an error class."""
        self._transfers.labels(*self._values, transport, outcome).inc()

    def _read(self) -> Iterable[Metric]:
        now = self._read_state()
        available = now.blocks_free + now.blocks_cached
        single = (
            ("vllm:num_requests_running", "Requests in the current batch.", now.requests_running),
            ("vllm:num_requests_waiting", "Requests waiting to be scheduled.", now.requests_waiting),
            ("vllm:kv_cache_usage_perc", "Share of KV blocks in use.", 1.0 - available / max(1, now.blocks_total)),
            ("pdserve_worker_ranks", "Processes that compute as this worker.", now.ranks),
            ("pdserve_kv_leases_open", "Transfers that may still read or write KV.", now.leases.open),
            ("pdserve_kv_lease_oldest_seconds", "Age of the oldest of those.", now.leases.oldest_s),
            ("pdserve_kv_leases_quarantined", "Those that were given up, whose blocks wait for it.", now.leases.quarantined),
            ("pdserve_kv_quarantine_oldest_seconds", "Age of the oldest of those.", now.leases.quarantined_oldest_s),
        )
        for name, text, value in single:
            gauge = GaugeMetricFamily(name, text, labels=("model_name", "engine"))
            gauge.add_metric(self._values, value)
            yield gauge
        for name, text, total in (
            ("pdserve_computed_tokens", "Tokens whose KV was computed here.", now.computed_tokens),
            ("vllm:generation_tokens", "Tokens drawn here.", now.generated_tokens),
            ("vllm:num_preemptions", "Sequences that lost their blocks.", now.preemptions),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", now.prefix_queries),
            ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", now.prefix_hits),
            ("vllm:spec_decode_num_draft_tokens", "Tokens guessed and checked.", now.drafted_tokens),
            ("vllm:spec_decode_num_accepted_tokens", "Guessed tokens that were right.", now.accepted_tokens),
            ("vllm:spec_decode_num_drafts", "Guesses of one or more tokens.", sum(now.steps_by_accepted)),
            ("pdserve_kv_leases_expired", "Transfers whose ticket or lease ran out.", now.leases.expired),
            ("pdserve_grammar_masks", "Masks of grammars that were worked out.", now.masks.count),
            ("pdserve_grammar_mask_seconds", "Time that took, beside the model.", now.masks.seconds),
            ("pdserve_steps_ahead", "Steps planned while the one before was computed.", now.steps_ahead),
            ("pdserve_surplus_rows", "Rows of those for answers that had ended meanwhile.", now.surplus_rows),
            ("pdserve_swapped_out", "Preempted sequences whose KV went to swap space.", now.swapped_out),
            ("pdserve_swapped_in", "Sequences whose KV came back from there.", now.swapped_in),
            ("pdserve_speculation_wasted_rows", "Rows computed for wrong guesses.", now.drafted_tokens - now.accepted_tokens),
        ):
            counter = CounterMetricFamily(name, text, labels=("model_name", "engine"))
            counter.add_metric(self._values, total)
            yield counter
        work = CounterMetricFamily(
            "pdserve_work_seconds", "Time of steps, shared by what their rows were for.", labels=("model_name", "engine", "part")
        )
        for part, seconds in now.work_s.items():
            work.add_metric((*self._values, part), seconds)
        yield work
        guesses = CounterMetricFamily(
            "pdserve_speculation_guesses",
            "Guessed tokens that were checked, by who guessed and whether they were right.",
            labels=("model_name", "engine", "proposer", "outcome"),
        )
        for author, (drafted, right) in now.guesses_by_author.items():
            guesses.add_metric((*self._values, author, "right"), right)
            guesses.add_metric((*self._values, author, "wrong"), drafted - right)
        yield guesses
        waits = CounterMetricFamily(
            "pdserve_step_waits",
            "Steps that could not be planned before the one before was read, by the reason.",
            labels=("model_name", "engine", "reason"),
        )
        for reason, count in now.waits.items():
            waits.add_metric((*self._values, reason), count)
        yield waits
        accepted = HistogramMetricFamily(
            "pdserve_speculation_accepted_tokens", "Right guesses in a step of one sequence.", labels=("model_name", "engine")
        )
        totals = tuple(itertools.accumulate(now.steps_by_accepted))
        buckets = [*((f"{length}.0", total) for length, total in enumerate(totals)), ("+Inf", totals[-1] if totals else 0)]
        accepted.add_metric(self._values, buckets, now.accepted_tokens)
        yield accepted
        blocks = GaugeMetricFamily("pdserve_kv_blocks", "KV blocks by state.", labels=("model_name", "engine", "state"))
        for state, count in (
            ("free", now.blocks_free),
            ("cached", now.blocks_cached),
            ("used", now.blocks_used),
            ("in_transfer", now.blocks_in_transfer),
        ):
            blocks.add_metric((*self._values, state), count)
        yield blocks
        info = GaugeMetricFamily(
            "vllm:cache_config_info", "Shape of the KV pool.", labels=("model_name", "engine", "block_size", "num_gpu_blocks")
        )
        info.add_metric((*self._values, str(now.block_tokens), str(now.blocks_total)), 1)
        yield info


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
        registry.register(_Gauges(self._read))

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


class _Gauges(Collector):
    """Gauges that are computed when they are read."""

    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        return self._read()

    def describe(self) -> Iterable[Metric]:
        return ()  # names are known at collection only; state may not exist yet at registration


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Scrapes are not news."""


def _app(registry: CollectorRegistry) -> WSGIApplication:
    # Not prometheus_client.make_wsgi_app: to whoever prefers OpenMetrics, as Prometheus does, it spells vllm: as vllm_.
    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", METRICS_TYPE)])
        return [generate_latest(registry)]

    return answer


def start_metrics_server(registry: CollectorRegistry, host: str, *, cluster_token: str) -> tuple[str, Callable[[], None]]:
    """Serves the registry on a free port from a thread, to whom `common.metrics_access` lets. Returns its "host:port" and what
    stops it (blocks up to 0.1 s)."""
    # Not prometheus_client.start_http_server: it takes half a second to stop.
    app = guarded(_app(registry), host=host, cluster_token=cluster_token)
    server = make_server(host, 0, app, _Server, _QuietHandler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="metrics", daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5.0)

    return f"{host}:{server.server_port}", stop
