"""The observatory's values as JSON: seconds of a span become milliseconds, times of day stay seconds."""

from __future__ import annotations

from typing import Any

from router.observe.cost import CostSplit
from router.observe.records import ActiveRequest, RequestRecord, Second

Json = dict[str, Any]


def request_json(record: RequestRecord) -> Json:
    return {
        "id": record.request_id,
        "endpoint": record.endpoint,
        "model": record.model,
        "tenant": record.tenant,
        "band": record.band,
        "started_at_s": round(record.started_at_s, 3),
        "status": record.status,
        "error": record.error,
        "cache": record.cache,
        "choices": record.num_choices,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "cached_tokens": record.cached_tokens,
        "queue_ms": _ms(record.queue_s),
        "ttft_ms": _ms(record.ttft_s),
        "tpot_ms": _ms(record.tpot_s),
        "total_ms": _ms(record.total_s),
        "stages": [[stage.name, _ms(stage.seconds)] for stage in record.stages],
        "transfer_hidden_ms": _ms(record.transfer_hidden_s),
        "transport": record.transport,
        "transfer_bytes": record.transfer_bytes,
        "prefill_worker": record.prefill_worker,
        "decode_worker": record.decode_worker,
        "retries": record.retries,
        "migrated_to": list(record.migrated_to),
        "slo": record.slo,
        "slo_met": record.slo_met,
        "cost_ms": _cost(record.cost),
        "trace_id": record.trace_id,
    }


def active_json(request: ActiveRequest) -> Json:
    return {
        "id": request.request_id,
        "endpoint": request.endpoint,
        "model": request.model,
        "tenant": request.tenant,
        "band": request.band,
        "started_at_s": round(request.started_at_s, 3),
        "age_ms": _ms(request.age_s),
        "ttft_ms": _ms(request.ttft_s),
        "prompt_tokens": request.prompt_tokens,
        "completion_tokens": request.completion_tokens,
        "decode_worker": request.decode_worker,
    }


def second_json(second: Second) -> Json:
    return {
        "at_s": round(second.at_s, 3),
        "length_s": round(second.length_s, 3),
        "requests": second.requests,
        "failed": second.failed,
        "in_flight": second.in_flight,
        "queued": second.queued,
        "tokens": second.tokens,
        "prompt_tokens": second.prompt_tokens,
        "cached_tokens": second.cached_tokens,
        "cache_hits": second.cache_hits,
        "ttft_p50_ms": _ms(second.ttft_p50_s),
        "ttft_p99_ms": _ms(second.ttft_p99_s),
        "tpot_p50_ms": _ms(second.tpot_p50_s),
        "tpot_p99_ms": _ms(second.tpot_p99_s),
        "slo": {name: [count.met, count.missed] for name, count in second.slo.items()},
        "cost_ms": _cost(second.cost),
        "loop_delay_ms": _ms(second.loop_delay_s),
    }


def _cost(cost: CostSplit) -> Json:
    parts = (cost.prefill_s, cost.transfer_s, cost.decode_s, cost.wasted_s, cost.saved_s)
    return dict(zip(("prefill", "transfer", "decode", "wasted", "saved"), map(_ms, parts), strict=True))


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
