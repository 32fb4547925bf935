"""A trace follows an answer over both faces, to every worker that has a part in it, and into the log."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import grpc.aio
import pytest
import structlog

from common.config import LoggingConfig
from common.logs import configure_logging
from common.wire import inference_pb2, inference_pb2_grpc
from support.fake_cluster import MODEL
from support.otlp_collector import collector
from support.router_clients import http_client

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
HEADERS = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01", "tracestate": "vendor=1"}
BODY: dict[str, Any] = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 50, "seed": 3}
ROUTER = "pdserve-router"


async def test_a_rest_that_goes_elsewhere_stays_in_the_trace(start_cluster: Any) -> None:
    async with collector() as found:
        async with (
            start_cluster(num_workers=2, tracing={"otlp_endpoint": found.endpoint}) as cluster,
            http_client(cluster) as http,
        ):
            for worker in cluster.workers:
                worker.fail_after = 2  # of those who begin; a rest begins anew and ends before that
            cluster.workers[1].answer = cluster.workers[0].answer
            reply = await http.post("/v1/completions", json={**BODY, "n": 2, "max_tokens": 3}, headers=HEADERS)
            assert reply.status_code == 200, reply.text
            parents = [parent for worker in cluster.workers for parent in worker.traceparents]
        dispatches = found.named(ROUTER, "dispatch")
        request = found.one(ROUTER, f"text_completion {MODEL}")
        assert len(dispatches) == len(parents) == 3, "the answer, and the rest of each choice"
        assert {seen.parent_id for seen in dispatches} == {request.span_id}
        assert sorted(parents) == sorted(f"00-{TRACE_ID}-{seen.span_id}-01" for seen in dispatches)
        assert request.attributes["pdserve.migrations"] == 2
        assert request.span.trace_state == "vendor=1"
        assert [seen.attributes.get("error.type") for seen in dispatches].count("WorkerLost") == 1


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    written = io.StringIO()
    monkeypatch.setattr("sys.stderr", written)
    before = structlog.get_config()
    configure_logging(LoggingConfig(format="json"), process="router")
    structlog.configure(cache_logger_on_first_use=False)
    yield written
    structlog.configure(**before)


async def test_grpc_honours_a_trace_and_errors_are_named(start_cluster: Any, log: io.StringIO) -> None:
    async with collector() as found:
        async with start_cluster(tracing={"otlp_endpoint": found.endpoint}) as cluster, http_client(cluster) as http:
            async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
                stub = inference_pb2_grpc.InferenceStub(channel)
                message = inference_pb2.InferenceRequest(model=MODEL, prompt="hi")
                async for _ in stub.Generate(message, metadata=tuple(HEADERS.items())):
                    continue
            await http.post("/v1/completions", json={**BODY, "model": "nobody"})
        answered = found.one(ROUTER, f"chat {MODEL}")
        failed = found.one(ROUTER, "text_completion")
        assert answered.trace_id == TRACE_ID
        assert failed.trace_id != TRACE_ID, "one of its own"
        assert failed.attributes["error.type"] == "ModelNotFound"
        assert failed.span.status.code == 2
    lines = [json.loads(line) for line in log.getvalue().splitlines() if line.startswith("{")]
    requests = [line for line in lines if line.get("event") == "request" and line.get("endpoint") == "/v1/completions"]
    assert [line["trace_id"] for line in requests] == [failed.trace_id]
    assert requests[0]["request_id"]


async def test_what_a_client_does_not_sample_is_not_exported_and_still_told_on(start_cluster: Any) -> None:
    async with collector() as found:
        async with start_cluster(tracing={"otlp_endpoint": found.endpoint}) as cluster, http_client(cluster) as http:
            unsampled = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-00"}
            assert (await http.post("/v1/completions", json=BODY, headers=unsampled)).status_code == 200
            (parent,) = cluster.worker.traceparents
        assert parent.startswith(f"00-{TRACE_ID}-")
        assert parent.endswith("-00")
        assert found.spans == []


async def test_without_an_endpoint_nothing_is_told_on(start_cluster: Any) -> None:
    async with start_cluster() as cluster, http_client(cluster) as http:
        assert (await http.post("/v1/completions", json=BODY, headers=HEADERS)).status_code == 200
        assert cluster.worker.traceparents == [""]
