"""What the span of a call says, in the words of OpenTelemetry's conventions for generative AI where they have one.

They are still called experimental, so the words are spelt out here and nowhere else. No prompt, answer or key.
"""

from __future__ import annotations

from common.tracing.span import Span, Value
from router.observe.records import RequestRecord
from router.validate import ValidCall

_OPERATIONS = {"/v1/completions": "text_completion"}
_CHAT = "chat"


def operation_of(endpoint: str) -> str:
    return _OPERATIONS.get(endpoint, _CHAT)


def describe_call(span: Span, endpoint: str, call: ValidCall) -> None:
    """Who is to answer, and how."""
    span.rename(f"{operation_of(endpoint)} {call.model.name}")
    sampling = call.requests[0].sampling
    span.set(
        {
            "gen_ai.request.model": call.body.model or call.model.name,
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": sampling.top_k,
            "gen_ai.request.seed": str(sampling.seed),  # may exceed what a number can be
            "gen_ai.request.choice.count": call.num_choices,
            "gen_ai.request.stream": call.plan.stream,
        }
    )


def describe_answer(span: Span, record: RequestRecord, finish_reasons: tuple[str, ...]) -> None:
    attributes: dict[str, Value] = {
        "gen_ai.operation.name": operation_of(record.endpoint),
        "gen_ai.provider.name": "pdserve",
        "pdserve.request_id": record.request_id,
        "http.response.status_code": record.status,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "pdserve.retries": record.retries,
        "pdserve.migrations": len(record.migrated_to),
    }
    named = {
        "gen_ai.response.model": record.model,
        "pdserve.cache": record.cache,
        "pdserve.decode_worker": record.decode_worker,
        "pdserve.prefill_worker": record.prefill_worker,
        "pdserve.band": record.band,
    }
    attributes.update({name: value for name, value in named.items() if value})
    if finish_reasons:
        attributes["gen_ai.response.finish_reasons"] = finish_reasons
    if record.ttft_s is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = record.ttft_s
    span.set(attributes)
