"""What a router's observatory counts: promises kept, cost, fairness, how much of a waterfall is explained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from common.metrics.buckets import RATIO_BUCKETS, REQUEST_TOKEN_BUCKETS, TOKEN_BUCKETS_S
from common.metrics.scrape_gauges import ScrapeGauges


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
            buckets=TOKEN_BUCKETS_S,
            registry=registry,
        )
        self._unexplained = Histogram(
            "pdserve_waterfall_unexplained_ratio",
            "Part of the time to the first token that no stage accounts for: network, event loops.",
            ("model_name",),
            buckets=RATIO_BUCKETS,
            registry=registry,
        )
        self._prompt_tokens = Histogram(
            "vllm:request_prompt_tokens",
            "Tokens of a prompt.",
            ("model_name",),
            buckets=REQUEST_TOKEN_BUCKETS,
            registry=registry,
        )
        self._generation_tokens = Histogram(
            "vllm:request_generation_tokens",
            "Tokens of an answer.",
            ("model_name",),
            buckets=REQUEST_TOKEN_BUCKETS,
            registry=registry,
        )
        self._of_model: dict[str, _OfModel] = {}
        self._readings: Callable[[], ObserveReadings] = ObserveReadings
        registry.register(ScrapeGauges(self._read))

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
