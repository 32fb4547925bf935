"""One trace of one request through router, decode worker and prefill worker, as a collector on a real socket sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from common.config import DecodeConfig, EngineConfig, PrefillConfig, TracingConfig
from support.otlp_collector import Collector, Seen, collector
from support.served import served
from support.tiny_models import make_tiny_model
from support.workers import running_workers

ENGINE = EngineConfig(dtype="float32", exact=True, kv_pool_tokens=4096)
TRACE_ID, CLIENTS_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{CLIENTS_SPAN}-01"
ROUTER, DECODE, PREFILL = "pdserve-router", "pdserve-decode", "pdserve-prefill"
WORDS = "a rather long story of cheese and the moon " * 6
_CLOCKS_NS = 2_000_000  # each process compares its two clocks once


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


async def trace_of(model_path: Path, *, local: bool, body: dict[str, Any]) -> Collector:
    async with collector() as found:
        tracing = {"otlp_endpoint": found.endpoint}
        decode = DecodeConfig(local_prefill="always" if local else "never")
        prefill = PrefillConfig(chunk_tokens=16)
        async with (
            running_workers(
                model_path, engine=ENGINE, decode=decode, prefill=prefill, tracing=TracingConfig(**tracing), transports=("tcp",)
            ) as workers,
            served(workers, model_path, tracing=tracing) as url,
            httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as http,
        ):
            reply = await http.post("/v1/completions", json=body, headers={"traceparent": TRACEPARENT, "x-request-id": "r1"})
            assert reply.status_code == 200, reply.text
    return found


def assert_inside(child: Seen, parent: Seen) -> None:
    assert_begins_in(child, parent)
    assert child.span.end_time_unix_nano <= parent.span.end_time_unix_nano + _CLOCKS_NS


def assert_begins_in(child: Seen, parent: Seen) -> None:
    assert child.trace_id == parent.trace_id
    assert child.parent_id == parent.span_id
    assert child.span.start_time_unix_nano >= parent.span.start_time_unix_nano - _CLOCKS_NS
    assert child.span.start_time_unix_nano <= child.span.end_time_unix_nano


async def test_one_trace_with_the_right_parents_and_times_that_nest(model_path: Path) -> None:
    body = {"model": "tiny", "prompt": WORDS, "max_tokens": 6, "n": 2, "seed": 1, "temperature": 0.5, "ignore_eos": True}
    found = await trace_of(model_path, local=False, body=body)
    assert {seen.trace_id for seen in found.spans} == {TRACE_ID}
    request = found.one(ROUTER, "text_completion tiny")
    assert request.parent_id == CLIENTS_SPAN
    dispatch, decode = found.one(ROUTER, "dispatch"), found.one(DECODE, "decode")
    remote, prefill = found.one(DECODE, "remote prefill"), found.one(PREFILL, "prefill")
    for child, parent in (
        (found.one(ROUTER, "queue"), request),
        (found.one(ROUTER, "first token"), request),
        (dispatch, request),
        (found.one(DECODE, "queue"), decode),
        (found.one(DECODE, "generate"), decode),
        (remote, decode),
        (found.one(DECODE, "transfer"), remote),
        (prefill, remote),
        (found.one(PREFILL, "queue"), prefill),
        (found.one(PREFILL, "compute"), prefill),
    ):
        assert_inside(child, parent)
    # The router hangs up when it has the last token; the worker hears of it later.
    assert_begins_in(decode, dispatch)
    generate = found.one(DECODE, "generate")
    assert generate.span.end_time_unix_nano <= dispatch.span.end_time_unix_nano + _CLOCKS_NS
    assert len(found.spans) == 12
    assert prefill.events.count("chunk") >= 3
    assert "first token" in decode.events
    assert dispatch.attributes["pdserve.decode_worker"] == "tiny/decode/0"
    assert found.one(DECODE, "transfer").attributes["pdserve.transport"] == "tcp"
    said = request.attributes
    assert said["gen_ai.operation.name"] == "text_completion"
    assert said["gen_ai.response.model"] == said["gen_ai.request.model"] == "tiny"
    assert (said["gen_ai.request.max_tokens"], said["gen_ai.request.choice.count"]) == (6, 2)
    assert (said["gen_ai.usage.output_tokens"], said["gen_ai.response.finish_reasons"]) == (12, ["length", "length"])
    assert said["http.response.status_code"] == 200
    assert not any(word in str(seen.span) for seen in found.spans for word in ("cheese", "moon"))


async def test_a_prompt_that_is_computed_by_the_decode_worker(model_path: Path) -> None:
    body = {"model": "tiny", "prompt": WORDS, "max_tokens": 3, "ignore_eos": True}
    found = await trace_of(model_path, local=True, body=body)
    decode = found.one(DECODE, "decode")
    assert_inside(found.one(DECODE, "prefill"), decode)
    assert_inside(found.one(DECODE, "generate"), decode)
    assert_begins_in(decode, found.one(ROUTER, "dispatch"))
    assert not any(seen.service == PREFILL for seen in found.spans)
