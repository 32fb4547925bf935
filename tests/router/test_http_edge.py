"""Errors, limits and keys at the edge of the HTTP face."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, AuthenticationError, BadRequestError, NotFoundError

from common.config import LoggingConfig
from common.logs import configure_logging
from support.fake_cluster import MODEL, FakeCluster
from support.router_clients import http_client, openai_client

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


async def test_errors_are_openai_exceptions(cluster: FakeCluster, openai: AsyncOpenAI) -> None:
    with pytest.raises(NotFoundError) as unknown:
        await openai.chat.completions.create(**{**CHAT, "model": "nobody"})
    assert (unknown.value.param, unknown.value.code, unknown.value.type) == ("model", "model_not_found", "NotFoundError")
    with pytest.raises(BadRequestError) as wrong:
        await openai.chat.completions.create(**CHAT, temperature=3)
    assert (wrong.value.param, wrong.value.type) == ("temperature", "BadRequestError")
    assert wrong.value.response.headers["x-request-id"]
    assert not cluster.worker.requests


async def test_a_model_of_the_configuration_that_is_not_up_is_503(http: httpx.AsyncClient) -> None:
    reply = await http.post("/v1/chat/completions", json={**CHAT, "model": "absent"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "no_worker_available")
    assert reply.headers["retry-after"]


WRONG_FOR_THE_MODEL: list[tuple[dict[str, Any], str]] = [
    ({"n": 17}, "n"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"stop_token_ids": [384]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 10_000}, "max_completion_tokens"),
    ({"max_tokens": 10_000}, "max_tokens"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "word " * 600}]}, "messages"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"continue_final_message": True, "messages": [{"role": "user", "content": " "}]}, "continue_final_message"),
]
WRONG_COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [384]}, "prompt"),
    ({"prompt": [[5], [-1]]}, "prompt"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ({"prompt": ["x"] * 100, "n": 3}, "n"),
    ({}, "prompt"),
]


async def test_what_depends_on_the_model_is_checked_before_any_worker_hears_of_it(
    cluster: FakeCluster, http: httpx.AsyncClient
) -> None:
    cases = [("/v1/chat/completions", {**CHAT, **body}, param) for body, param in WRONG_FOR_THE_MODEL]
    cases += [("/v1/completions", {"model": MODEL, **body}, param) for body, param in WRONG_COMPLETIONS]
    for path, body, param in cases:
        reply = await http.post(path, json=body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), body
    assert not cluster.worker.requests


async def test_bodies_that_are_no_json_object(http: httpx.AsyncClient) -> None:
    for content in (b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b'{"model": NaN}'):
        reply = await http.post("/v1/chat/completions", content=content)
        assert reply.status_code == 400
        assert reply.json()["error"]["type"] == "BadRequestError"
    assert "not UTF-8: byte 12 is 0xff" in (await http.post("/v1/completions", content=b'{"prompt": "\xff"}')).text
    packed = await http.post("/v1/completions", content=b"\x1f\x8b", headers={"content-encoding": "gzip"})
    assert (packed.status_code, packed.json()["error"]["param"]) == (400, "content-encoding")


async def test_large_bodies_are_413(start_cluster: Any) -> None:
    async with start_cluster(max_body_bytes=2048) as cluster, http_client(cluster) as http:
        body = b'{"model": "tiny", "prompt": "' + b"x" * 3000 + b'"}'
        declared = await http.post("/v1/completions", content=body)
        assert (declared.status_code, declared.json()["error"]["code"]) == (413, "payload_too_large")

        async def pieces() -> Any:
            for start in range(0, len(body), 500):
                yield body[start : start + 500]

        assert (await http.post("/v1/completions", content=pieces())).status_code == 413  # without a Content-Length
        assert (await http.post("/v1/completions", json={"model": MODEL, "prompt": "x"})).status_code == 200


async def test_unknown_routes_and_methods_have_the_same_shape(http: httpx.AsyncClient) -> None:
    unknown = await http.get("/v1/nothing")
    assert unknown.status_code == 404
    assert unknown.json()["error"]["type"] == "NotFoundError"
    wrong = await http.get("/v1/chat/completions")
    assert wrong.status_code == 405
    assert wrong.json()["error"]["message"]
    assert "POST" in wrong.headers["allow"]
    assert wrong.headers["x-request-id"]
    for page in ("/docs", "/redoc", "/openapi.json"):
        assert (await http.get(page)).status_code == 404


async def test_keys_guard_everything_but_the_open_paths(start_cluster: Any) -> None:
    async with start_cluster(api_keys=("key-a", "key-b")) as cluster, http_client(cluster) as http:
        for path in (
            "/v1/models",
            "/v1/chat/completions",
            "/tokenize",
            "/detokenize",
            "/tokenizer_info",
            "/anything",
            "/health/",
        ):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic key-a"}, {"Authorization": "key-a"}):
                reply = await http.request("POST" if "models" not in path else "GET", path, headers=headers)
                assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key"), path
                assert reply.headers["www-authenticate"] == "Bearer"
        for path in ("/health", "/ready", "/version", "/metrics"):
            assert (await http.get(path)).status_code == 200
        assert not cluster.worker.requests
        async with openai_client(cluster, "nope") as intruder:
            with pytest.raises(AuthenticationError):
                await intruder.models.list()


async def test_the_key_is_the_tenant(start_cluster: Any) -> None:
    async with start_cluster(api_keys=("key-a", "key-b")) as cluster:
        for key in ("key-a", "key-b", "key-a"):
            async with openai_client(cluster, key) as client:
                await client.chat.completions.create(**CHAT)
        first, second, third = (request.cache_salt for request in cluster.worker.requests)
        assert first == third != second
        assert len(first) >= 32
        assert "key" not in first


async def test_without_keys_there_is_one_tenant(cluster: FakeCluster, openai: AsyncOpenAI) -> None:
    await openai.chat.completions.create(**CHAT)
    assert cluster.worker.requests[0].cache_salt == ""


async def test_prompts_and_answers_appear_in_no_log_and_no_metric(start_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import structlog

    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    before = structlog.get_config()
    configure_logging(LoggingConfig(level="debug", format="json"), process="router")
    structlog.configure(cache_logger_on_first_use=False)
    try:
        async with start_cluster(num_workers=2) as cluster, http_client(cluster) as http:
            cluster.workers[0].answer = cluster.workers[1].answer = "the canary sings"
            cluster.workers[0].fail_after = 2
            for content in ("canary prompt", "canary " * 200):
                for extra in ({}, {"temperature": "canary"}, {"stream": True}, {"canary_field": 1}):
                    body = {**CHAT, "messages": [{"role": "user", "content": content}], **extra}
                    await http.post("/v1/chat/completions", json=body, headers={"X-Request-Id": "visible-id"})
            metrics = (await http.get("/metrics")).text
    finally:
        structlog.configure(**before)
    assert '"request_id": "visible-id"' in log.getvalue()
    assert "canary_field" in log.getvalue()  # names of unknown fields are told, at debug level
    assert "canary" not in log.getvalue().replace("canary_field", "")
    assert "canary" not in metrics


async def test_a_slow_sender_does_not_hold_up_others(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    host, _, port = cluster.http_url.removeprefix("http://").partition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    await writer.drain()
    assert (await http.post("/v1/completions", json={"model": MODEL, "prompt": "x"})).status_code == 200
    writer.close()
    await writer.wait_closed()
