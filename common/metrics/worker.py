"""What a worker of either role counts, and what of its state a scrape shows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from common.metrics.buckets import COMPILE_BUCKETS_S, PHASE_BUCKETS_S, STEP_TOKEN_BUCKETS, TOKEN_BUCKETS_S
from common.metrics.scrape_gauges import ScrapeGauges
from common.metrics.worker_readings import WorkerReadings

_LABELS = ("model_name", "engine")


class WorkerMetrics:
    """What a worker of either role counts. Created once, by the worker's server."""

    def __init__(self, registry: CollectorRegistry, *, model: str, role: str, read: Callable[[], WorkerReadings]) -> None:
        self._values = (model, role)
        self._read_state = read

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(name, text, (*_LABELS, *more), registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, _LABELS, buckets=buckets, registry=registry).labels(*self._values)

        self._finished = counter("vllm:request_success", "Requests that ended well here.", "finished_reason")
        self._failed = counter("pdserve_request_failures", "Requests that ended in an error here.", "error")
        self._transfers = counter("pdserve_transfers", "Hand-offs by outcome.", "transport", "outcome")
        self.transfer_bytes = counter("pdserve_transfer_bytes", "KV bytes pushed or received.").labels(*self._values)
        self.transfer_blocks = counter("pdserve_transfer_blocks", "KV blocks pushed or received.").labels(*self._values)
        self.step_tokens = histogram("vllm:iteration_tokens_total", "Tokens computed in a step.", STEP_TOKEN_BUCKETS)
        self.step_s = histogram("pdserve_step_seconds", "Time of one engine step.", TOKEN_BUCKETS_S)
        self.queue_s = histogram("vllm:request_queue_time_seconds", "Waiting for blocks or for a turn.", PHASE_BUCKETS_S)
        self.prefill_s = histogram("vllm:request_prefill_time_seconds", "Computing the prompt.", PHASE_BUCKETS_S)
        self.decode_s = histogram("vllm:request_decode_time_seconds", "First token until the last.", PHASE_BUCKETS_S)
        self.transfer_exposed_s = histogram(
            "pdserve_transfer_exposed_seconds", "KV transfer that prefill did not hide.", TOKEN_BUCKETS_S
        )
        self.transfer_hidden_s = histogram(
            "pdserve_transfer_hidden_seconds", "KV transfer that went on while the prompt was computed.", TOKEN_BUCKETS_S
        )
        self.inference_s = histogram("vllm:request_inference_time_seconds", "Prompt and answer together.", PHASE_BUCKETS_S)
        self._grammars = counter("pdserve_grammar_requests", "Requests with a grammar, by what that took.", "outcome")
        self._grammar_s = histogram(
            "pdserve_grammar_compile_seconds", "Compiling a grammar that was not known.", COMPILE_BUCKETS_S
        )
        registry.register(ScrapeGauges(self._read))

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
        for name, text, value in _gauges(now):
            gauge = GaugeMetricFamily(name, text, labels=_LABELS)
            gauge.add_metric(self._values, value)
            yield gauge
        for name, text, total in _totals(now):
            counter = CounterMetricFamily(name, text, labels=_LABELS)
            counter.add_metric(self._values, total)
            yield counter
        yield from self._steps(now)
        yield from self._guesses(now)
        yield from self._pool(now)

    def _steps(self, now: WorkerReadings) -> Iterable[Metric]:
        work = CounterMetricFamily(
            "pdserve_work_seconds", "Time of steps, shared by what their rows were for.", labels=(*_LABELS, "part")
        )
        for part, seconds in now.work_s.items():
            work.add_metric((*self._values, part), seconds)
        waits = CounterMetricFamily(
            "pdserve_step_waits",
            "Steps that could not be planned before the one before was read, by the reason.",
            labels=(*_LABELS, "reason"),
        )
        for reason, count in now.waits.items():
            waits.add_metric((*self._values, reason), count)
        yield from (work, waits)

    def _guesses(self, now: WorkerReadings) -> Iterable[Metric]:
        guesses = CounterMetricFamily(
            "pdserve_speculation_guesses",
            "Guessed tokens that were checked, by who guessed and whether they were right.",
            labels=(*_LABELS, "proposer", "outcome"),
        )
        for author, (drafted, right) in now.guesses_by_author.items():
            guesses.add_metric((*self._values, author, "right"), right)
            guesses.add_metric((*self._values, author, "wrong"), drafted - right)
        accepted = HistogramMetricFamily(
            "pdserve_speculation_accepted_tokens", "Right guesses in a step of one sequence.", labels=_LABELS
        )
        totals = tuple(itertools.accumulate(now.steps_by_accepted))
        buckets = [*((f"{length}.0", total) for length, total in enumerate(totals)), ("+Inf", totals[-1] if totals else 0)]
        accepted.add_metric(self._values, buckets, now.accepted_tokens)
        yield from (guesses, accepted)

    def _pool(self, now: WorkerReadings) -> Iterable[Metric]:
        blocks = GaugeMetricFamily("pdserve_kv_blocks", "KV blocks by state.", labels=(*_LABELS, "state"))
        for state, count in (
            ("free", now.blocks_free),
            ("cached", now.blocks_cached),
            ("used", now.blocks_used),
            ("in_transfer", now.blocks_in_transfer),
        ):
            blocks.add_metric((*self._values, state), count)
        info = GaugeMetricFamily(
            "vllm:cache_config_info", "Shape of the KV pool.", labels=(*_LABELS, "block_size", "num_gpu_blocks")
        )
        info.add_metric((*self._values, str(now.block_tokens), str(now.blocks_total)), 1)
        yield from (blocks, info)


def _gauges(now: WorkerReadings) -> tuple[tuple[str, str, float], ...]:
    available = now.blocks_free + now.blocks_cached
    return (
        ("vllm:num_requests_running", "Requests in the current batch.", now.requests_running),
        ("vllm:num_requests_waiting", "Requests waiting to be scheduled.", now.requests_waiting),
        ("vllm:kv_cache_usage_perc", "Share of KV blocks in use.", 1.0 - available / max(1, now.blocks_total)),
        ("pdserve_worker_ranks", "Processes that compute as this worker.", now.ranks),
        ("pdserve_kv_leases_open", "Transfers that may still read or write KV.", now.leases.open),
        ("pdserve_kv_lease_oldest_seconds", "Age of the oldest of those.", now.leases.oldest_s),
        ("pdserve_kv_leases_quarantined", "Those that were given up, whose blocks wait for it.", now.leases.quarantined),
        ("pdserve_kv_quarantine_oldest_seconds", "Age of the oldest of those.", now.leases.quarantined_oldest_s),
    )


def _totals(now: WorkerReadings) -> tuple[tuple[str, str, float], ...]:
    return (
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
    )
