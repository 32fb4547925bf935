"""One look at a cluster as plain values: what the screen shows and `--json` prints.

A figure that nobody can tell is None: a rate after the first look, a quantile of nothing, a process that does not answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deploy.top.samples import Change, added, quantile

_HIT_RESULTS = ("hit-exact", "hit-semantic", "coalesced")
_REQUESTS = "pdserve_router_requests_total"
_ASKED_RESULTS = (*_HIT_RESULTS, "miss")


@dataclass(frozen=True, slots=True)
class Latency:
    p50_s: float | None
    p99_s: float | None


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A model, over all routers."""

    name: str
    prefill_ready: int
    prefill_desired: int
    decode_ready: int
    decode_desired: int
    requests_per_s: float | None
    failures_per_s: float | None  # answers with 429 and from 500 on
    tokens_per_s: float | None  # sent to clients
    in_flight: int
    queued: int
    oldest_queued_s: float
    ttft: Latency
    tpot: Latency
    cache_hits: float | None  # share of the requests that the cache was asked for
    promises_met: float | None  # share of the requests that were promised something (router.slo)


@dataclass(frozen=True, slots=True)
class WorkerRow:
    worker_id: str
    model: str
    role: str
    state: str
    incarnation: int
    tensor_parallel: int
    pipeline_parallel: int
    running: int
    waiting: int
    tokens_per_s: float | None  # drawn by a decode worker, computed by a prefill worker
    step_p50_s: float | None
    kv_used: float | None  # share of the blocks
    kv_in_transfer: int  # blocks
    prefix_hits: float | None  # share of the prompt tokens that were looked up
    transport: str  # of the latest hand-offs
    transfer_bytes_per_s: float | None
    transfer_failures: int  # in the time of `latency_over_s`
    preemptions: int
    failure: str
    answers: bool  # whether its metrics could be read


@dataclass(frozen=True, slots=True)
class RouterRow:
    router_id: str
    http_address: str
    requests_per_s: float | None
    tokens_per_s: float | None
    in_flight: int
    goodput_per_s: float | None  # requests that got what they were promised
    retries: int  # in the time of `latency_over_s`
    migrations: int
    store: str  # state of the breaker before a shared store; empty without one
    answers: bool


@dataclass(frozen=True, slots=True)
class EventRow:
    at_s: float  # Unix time
    kind: str
    worker_id: str
    model: str
    text: str


@dataclass(frozen=True, slots=True)
class Picture:
    cluster: str
    at_s: float  # Unix time
    up_s: float
    rates_over_s: float | None  # None: the first look
    latency_over_s: float | None  # None: since the processes started
    models: tuple[ModelRow, ...]
    routers: tuple[RouterRow, ...]
    workers: tuple[WorkerRow, ...]
    events: tuple[EventRow, ...] = field(default=())  # oldest first


@dataclass(frozen=True)
class Changes:
    """By process, over two lengths of time: short for rates, longer for what needs many requests to mean something."""

    short: Mapping[str, Change]  # by the address of its metrics
    long: Mapping[str, Change]


def draw_up(described: Mapping[str, Any], changes: Changes, *, at_s: float, up_s: float, first: bool) -> Picture:
    """`described` is what `status --json` prints."""
    routers = [(router, router["http_address"]) for router in described["routers"]]
    seconds = max((change.seconds for change in changes.short.values()), default=0.0)
    long_seconds = max((change.seconds for change in changes.long.values()), default=0.0)
    return Picture(
        cluster=described["cluster"],
        at_s=at_s,
        up_s=up_s,
        rates_over_s=None if first else seconds,
        latency_over_s=long_seconds or None,
        models=tuple(_model(model, described["workers"], _there(routers, changes)) for model in described["models"]),
        routers=tuple(_router(router, changes.short.get(address), changes.long.get(address)) for router, address in routers),
        workers=tuple(
            _worker(worker, changes.short.get(worker["metrics_address"]), changes.long.get(worker["metrics_address"]))
            for worker in described["workers"]
        ),
        events=tuple(
            EventRow(event["at_s"], event["kind"], event["worker_id"], event["model"], event["text"])
            for event in described["events"]
        ),
    )


def _there(routers: Sequence[tuple[Any, str]], changes: Changes) -> list[tuple[Change, Change]]:
    return [(changes.short[address], changes.long[address]) for _, address in routers if address in changes.short]


def _model(model: Mapping[str, Any], workers: Sequence[Mapping[str, Any]], routers: list[tuple[Change, Change]]) -> ModelRow:
    name = model["name"]
    ready = [worker["role"] for worker in workers if worker["model"] == name and worker["state"] == "ready"]
    short, long = [pair[0] for pair in routers], [pair[1] for pair in routers]
    statuses = {
        status: _sum(change.per_s(_REQUESTS, model_name=name, status=status) for change in short)
        for status in {one for change in short for one in change.later.by(_REQUESTS, "status")}
    }
    oldest = [change.later.by("pdserve_queue_oldest_seconds", "band", model_name=name) for change in short]
    return ModelRow(
        name=name,
        prefill_ready=ready.count("prefill"),
        prefill_desired=model["desired_prefill"],
        decode_ready=ready.count("decode"),
        decode_desired=model["desired_decode"],
        requests_per_s=_sum(change.per_s(_REQUESTS, model_name=name) for change in short),
        failures_per_s=_sum([_zero(short), *(rate for status, rate in statuses.items() if _failed(status))]),
        tokens_per_s=_sum(change.per_s("vllm:generation_tokens_total", model_name=name) for change in short),
        in_flight=_count(short, "pdserve_router_inflight_requests", name),
        queued=_count(short, "pdserve_queue_requests", name),
        oldest_queued_s=max((seconds for bands in oldest for seconds in bands.values()), default=0.0),
        ttft=_latency(long, "vllm:time_to_first_token_seconds", name),
        tpot=_latency(long, "vllm:request_time_per_output_token_seconds", name),
        cache_hits=_share(_by_all(long, "pdserve_cache_requests_total", "result", name), _HIT_RESULTS, _ASKED_RESULTS),
        promises_met=_share(_by_all(long, "pdserve_slo_requests_total", "outcome", name), ("met",), ("met", "missed")),
    )


def _router(router: Mapping[str, Any], short: Change | None, long: Change | None) -> RouterRow:
    if short is None or long is None:
        return RouterRow(router["router_id"], router["http_address"], None, None, 0, None, 0, 0, "", answers=False)
    breaker = short.later.by("pdserve_store_breaker", "state")
    promised = short.later.there("pdserve_goodput_requests_per_second")
    return RouterRow(
        router_id=router["router_id"],
        http_address=router["http_address"],
        requests_per_s=_requests_per_s(short),
        tokens_per_s=short.per_s("vllm:generation_tokens_total"),
        in_flight=int(short.later.total("pdserve_router_inflight_requests")),
        goodput_per_s=short.later.total("pdserve_goodput_requests_per_second") if promised else None,
        retries=int(long.grown("pdserve_router_retries_total")),
        migrations=int(long.grown("pdserve_router_migrations_total")),
        store=next((state for state, value in breaker.items() if value), ""),
        answers=True,
    )


def _worker(worker: Mapping[str, Any], short: Change | None, long: Change | None) -> WorkerRow:
    total, free = worker["blocks_total"], worker["blocks_free"]
    transports: dict[str, float] = {}
    failures = preemptions = 0.0
    prefix_hits = step_s = tokens_per_s = bytes_per_s = None
    if short is not None and long is not None:
        drawn = "vllm:generation_tokens_total" if worker["role"] == "decode" else "pdserve_computed_tokens_total"
        tokens_per_s = short.per_s(drawn)
        bytes_per_s = short.per_s("pdserve_transfer_bytes_total")
        step_s = quantile(long.buckets("pdserve_step_seconds"), 0.5)
        queries = long.grown("vllm:prefix_cache_queries_total")
        prefix_hits = long.grown("vllm:prefix_cache_hits_total") / queries if queries else None
        transports = long.grown_by("pdserve_transfers_total", "transport", outcome="ok")
        failures = long.grown("pdserve_transfers_total") - sum(transports.values())
        preemptions = long.grown("vllm:num_preemptions_total")
    return WorkerRow(
        worker_id=worker["worker_id"],
        model=worker["model"],
        role=worker["role"],
        state=worker["state"],
        incarnation=worker["incarnation"],
        tensor_parallel=worker["tensor_parallel"],
        pipeline_parallel=worker["pipeline_parallel"],
        running=worker["requests_running"],
        waiting=worker["requests_waiting"],
        tokens_per_s=tokens_per_s,
        step_p50_s=step_s,
        kv_used=(total - free) / total if total else None,
        kv_in_transfer=worker["blocks_in_transfer"],
        prefix_hits=prefix_hits,
        transport=max(transports, key=lambda kind: transports[kind]) if any(transports.values()) else "",
        transfer_bytes_per_s=bytes_per_s,
        transfer_failures=int(failures),
        preemptions=int(preemptions),
        failure=worker["failure"],
        answers=short is not None,
    )


def _latency(changes: list[Change], histogram: str, model: str) -> Latency:
    buckets = added([change.buckets(histogram, model_name=model) for change in changes])
    return Latency(quantile(buckets, 0.5), quantile(buckets, 0.99))


def _by_all(changes: list[Change], name: str, label: str, model: str) -> dict[str, float]:
    parts = [change.grown_by(name, label, model_name=model) for change in changes]
    return {value: sum(part.get(value, 0.0) for part in parts) for value in {value for part in parts for value in part}}


def _count(changes: list[Change], name: str, model: str) -> int:
    return int(sum(change.later.total(name, model_name=model) for change in changes))


def _share(counts: Mapping[str, float], some: Sequence[str], all_of: Sequence[str]) -> float | None:
    whole = sum(counts.get(value, 0.0) for value in all_of)
    return sum(counts.get(value, 0.0) for value in some) / whole if whole else None


def _sum(rates: Iterable[float | None]) -> float | None:
    known = [rate for rate in rates if rate is not None]
    return sum(known) if known else None


def _zero(changes: list[Change]) -> float | None:
    return 0.0 if any(change.seconds > 0 for change in changes) else None


def _failed(status: str) -> bool:
    """What the client asked for wrongly, or left, is not ours."""
    return status == "429" or status >= "500"


def _requests_per_s(change: Change) -> float | None:
    """Without those that name no model: scrapes, health checks, refused keys."""
    rate, nameless = change.per_s(_REQUESTS), change.per_s(_REQUESTS, model_name="")
    return None if rate is None or nameless is None else max(0.0, rate - nameless)
