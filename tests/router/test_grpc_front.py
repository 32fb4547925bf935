"""The gRPC face against the HTTP face: the same words for the same request, the same errors for the same mistakes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from common.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound, PdserveError, WorkerLost
from common.rpc import connect, error_from_rpc
from common.wire import inference_pb2 as pb
from common.wire.inference_pb2_grpc import InferenceStub
from support.fake_cluster import CONTEXT, EOS, MODEL, FakeCluster
from support.router_clients import http_client

CHAT = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hi")])


@pytest.fixture
async def channel(cluster: FakeCluster) -> AsyncIterator[grpc.aio.Channel]:
    channel = connect(cluster.grpc_address, None)
    yield channel
    await channel.close()


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> InferenceStub:
    return InferenceStub(channel)


async def generate(stub: InferenceStub, timeout_s: float | None = None, **fields: Any) -> list[pb.InferenceEvent]:
    request = pb.InferenceRequest(**{"model": MODEL, **fields})
    return [event async for event in stub.Generate(request, timeout=timeout_s)]


async def failure_of(stub: InferenceStub, **fields: Any) -> PdserveError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await generate(stub, **fields)
    return error_from_rpc(raised.value)


async def test_chat_is_what_http_says(cluster: FakeCluster, stub: InferenceStub, http: httpx.AsyncClient) -> None:
    *events, last = await generate(stub, chat=CHAT, seed=5, temperature=0.5, stop=["zzz"])
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "seed": 5, "temperature": 0.5, "stop": "zzz"}
    twin = (await http.post("/v1/chat/completions", json=body)).json()
    assert "".join(event.text for event in events) == twin["choices"][0]["message"]["content"] == "hello there"
    assert events[-1].finish_reason == twin["choices"][0]["finish_reason"]
    assert not any(event.finish_reason for event in events[:-1])
    assert {
        "prompt_tokens": last.usage.prompt_tokens,
        "completion_tokens": last.usage.completion_tokens,
        "total_tokens": last.usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": last.usage.cached_tokens},
    } == twin["usage"]
    ours, theirs = cluster.worker.requests
    assert (ours.prompt_token_ids, ours.sampling) == (theirs.prompt_token_ids, theirs.sampling)


async def test_completion_defaults_are_those_of_http(cluster: FakeCluster, stub: InferenceStub, http: httpx.AsyncClient) -> None:
    await generate(stub, prompt="hi", seed=1)
    await generate(stub, prompt_token_ids=pb.TokenIds(ids=cluster.tokenizer.encode("hi")), seed=1)
    await http.post("/v1/completions", json={"model": MODEL, "prompt": "hi", "seed": 1})
    first, second, third = cluster.worker.requests
    assert first.sampling == second.sampling == third.sampling
    assert first.prompt_token_ids == second.prompt_token_ids == third.prompt_token_ids


async def test_every_field_arrives(cluster: FakeCluster, stub: InferenceStub) -> None:
    fields = {"max_tokens": 9, "temperature": 0.25, "top_p": 0.5, "top_k": 7, "min_p": 0.125, "seed": -1, "n": 2, "min_tokens": 1}
    await generate(stub, prompt="hi", **fields, stop_token_ids=[9], ignore_eos=True, logprobs=3)
    request = cluster.worker.requests[0]
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (9, 0.25, 0.5, 7)
    assert (sampling.min_p, sampling.seed, request.num_choices, sampling.min_tokens) == (0.125, 2**64 - 1, 2, 1)
    assert (sampling.stop_token_ids, sampling.logprobs) == ((9,), 3)


async def test_rules_for_tokens_are_those_of_http(cluster: FakeCluster, stub: InferenceStub, http: httpx.AsyncClient) -> None:
    numbers = {"presence_penalty": 0.5, "frequency_penalty": -0.25, "repetition_penalty": 1.125}
    lists = {"allowed_token_ids": [9, 8, 9, 40], "bad_words": ["hot word", " the"]}
    await generate(stub, prompt="hi", seed=1, **numbers, **lists, logit_bias={8: -100.0, 40: 1.5})
    body = {"model": MODEL, "prompt": "hi", "seed": 1, **numbers, **lists, "logit_bias": {"8": -100, "40": 1.5}}
    await http.post("/v1/completions", json=body)
    ours, theirs = (request.sampling for request in cluster.worker.requests)
    assert sorted(ours.logit_bias) == sorted(theirs.logit_bias) == [(8, -100.0), (40, 1.5)]
    assert replace(ours, logit_bias=()) == replace(theirs, logit_bias=())
    assert {name: getattr(ours, name) for name in numbers} == numbers
    assert ours.allowed_token_ids == (9, 8, 40)
    encode = cluster.tokenizer.encode
    assert set(ours.bad_words) == {tuple(encode(text)) for text in ("hot word", " hot word", "the", " the")}

    refused = {
        "presence_penalty": 2.5, "repetition_penalty": 0.0, "logit_bias": {8: 101.0},
        "allowed_token_ids": [999_999], "bad_words": [""],
    }  # fmt: skip
    for name, value in refused.items():
        failure = await failure_of(stub, prompt="hi", **{name: value})
        assert (type(failure), failure.param) == (InvalidRequest, name)


async def test_choices_and_logprobs(cluster: FakeCluster, stub: InferenceStub) -> None:
    *events, _ = await generate(stub, chat=CHAT, n=2, logprobs=2, stop_token_ids=[EOS])
    ids = cluster.tokenizer.encode("hello there", add_special_tokens=False)
    for index in range(2):
        mine = [event for event in events if event.index == index]
        assert [token for event in mine for token in event.token_ids] == ids
        reports = [report for event in mine for report in event.logprobs]
        assert b"".join(report.bytes for report in reports) == b"hello there"
        assert all([top.logprob for top in report.top] == [-0.25, -1.25] for report in reports)
        assert mine[-1].stop_reason == str(EOS)


async def test_echo_reports_the_prompt_first(cluster: FakeCluster, stub: InferenceStub) -> None:
    *events, _ = await generate(stub, prompt="the word ", echo=True, logprobs=1, max_tokens=1)
    prompt = cluster.worker.requests[0].prompt_token_ids
    reports = [report for event in events for report in event.logprobs]
    assert [report.token_id for report in reports[: len(prompt)]] == list(prompt)
    assert math.isnan(reports[0].logprob)
    assert all(report.logprob == -0.25 for report in reports[1:])
    assert "".join(event.text for event in events).startswith("the word ")


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "x", "temperature": 3}, {"prompt": "x", "temperature": 3}),
    ("/v1/completions", {"prompt": "x", "n": 17}, {"prompt": "x", "n": 17}),
    ("/v1/completions", {"prompt": "x", "logprobs": 21}, {"prompt": "x", "logprobs": 21}),
    ("/v1/completions", {"prompt": "x", "stop": ["s"] * 9}, {"prompt": "x", "stop": ["s"] * 9}),
    ("/v1/completions", {"prompt": ""}, {"prompt": ""}),
    ("/v1/completions", {}, {}),
    ("/v1/completions", {"prompt": [383, 384]}, {"prompt_token_ids": pb.TokenIds(ids=[383, 384])}),
    ("/v1/completions", {"prompt": [5] * CONTEXT}, {"prompt_token_ids": pb.TokenIds(ids=[5] * CONTEXT)}),
    ("/v1/completions", {"model": "nobody", "prompt": "x"}, {"model": "nobody", "prompt": "x"}),
    ("/v1/completions", {"model": "", "prompt": "x"}, {"model": "", "prompt": "x"}),
    ("/v1/chat/completions", {"messages": []}, {"chat": pb.ChatMessages()}),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"chat": pb.ChatMessages(messages=[pb.ChatMessage(role="wizard", content="x")])},
    ),
]


async def test_both_faces_refuse_alike(cluster: FakeCluster, stub: InferenceStub, http: httpx.AsyncClient) -> None:
    for path, body, fields in REFUSED:
        failure = await failure_of(stub, **fields)
        reply = await http.post(path, json={"model": MODEL, **body})
        error = reply.json()["error"]
        assert (failure.http_status, failure.message, failure.param) == (reply.status_code, error["message"], error["param"])
    assert not cluster.worker.requests


async def test_bytes_that_are_no_request_are_the_callers_mistake(channel: grpc.aio.Channel) -> None:
    generate = channel.unary_stream("/pdserve.v1.Inference/Generate")
    tokenize = channel.unary_unary("/pdserve.v1.Inference/Tokenize")
    for call in (generate(b"\x0a\x02\xff\xfe").read(), generate(b"\xff" * 4).read(), tokenize(b"\x0a\x02\xff\xfe")):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert isinstance(error_from_rpc(raised.value), InvalidRequest)


async def test_statuses_and_types(stub: InferenceStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await generate(stub, model="nobody", prompt="x")
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND
    assert isinstance(error_from_rpc(raised.value), ModelNotFound)
    assert isinstance(await failure_of(stub, prompt_token_ids=pb.TokenIds(ids=[5] * CONTEXT)), ContextLengthExceeded)


async def test_a_failure_after_the_first_token_is_typed(cluster: FakeCluster, stub: InferenceStub) -> None:
    cluster.worker.fail_after = 1
    assert isinstance(await failure_of(stub, prompt="x"), WorkerLost)


@pytest.mark.parametrize("hold_after", [0, 2])
async def test_cancelling_the_call_cancels_the_work(cluster: FakeCluster, stub: InferenceStub, hold_after: int) -> None:
    cluster.worker.hold_after = hold_after
    call = stub.Generate(pb.InferenceRequest(model=MODEL, prompt="x"))
    await cluster.worker.holding.wait()
    call.cancel()
    async with asyncio.timeout(120):
        await cluster.worker.cancelled.wait()


async def test_the_clients_deadline_travels(cluster: FakeCluster, stub: InferenceStub) -> None:
    cluster.worker.hold_after = 1
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await generate(stub, prompt="x", timeout_s=0.3)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert all(request.timeout_s <= 0.3 for request in cluster.worker.requests)
    await cluster.worker.cancelled.wait()


async def test_request_ids_come_back(cluster: FakeCluster, stub: InferenceStub) -> None:
    call = stub.Generate(pb.InferenceRequest(model=MODEL, prompt="x", request_id="mine"))
    assert dict(await call.initial_metadata())["x-request-id"] == "mine"
    assert {event.request_id async for event in call} == {"mine"}
    assert cluster.worker.requests[0].request_id.startswith("mine-")


async def test_list_models_and_tokenize(cluster: FakeCluster, stub: InferenceStub) -> None:
    models = (await stub.ListModels(pb.ListModelsRequest())).models
    assert [(model.id, model.max_model_tokens) for model in models] == [(MODEL, CONTEXT), ("small", CONTEXT)]
    plain = await stub.Tokenize(pb.TokenizeRequest(model=MODEL, prompt="the hot word"))
    assert list(plain.token_ids) == cluster.tokenizer.encode("the hot word")
    assert plain.max_model_tokens == CONTEXT
    chat = await stub.Tokenize(pb.TokenizeRequest(chat=CHAT))
    await generate(stub, chat=CHAT)
    assert tuple(chat.token_ids) == cluster.worker.requests[0].prompt_token_ids


async def test_keys_are_asked_for(start_cluster: Any) -> None:
    async with start_cluster(api_keys=("key-a",)) as cluster:
        channel = connect(cluster.grpc_address, None)
        stub = InferenceStub(channel)
        for metadata in ((), (("authorization", "Bearer wrong"),)):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub.ListModels(pb.ListModelsRequest(), metadata=metadata)
            assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
        granted = (("authorization", "Bearer key-a"),)
        async for _ in stub.Generate(pb.InferenceRequest(model=MODEL, prompt="x"), metadata=granted):
            continue
        async with http_client(cluster) as http:
            await http.post("/v1/completions", json={"model": MODEL, "prompt": "x"}, headers={"Authorization": "Bearer key-a"})
        ours, theirs = cluster.worker.requests
        assert ours.cache_salt == theirs.cache_salt != ""
        await channel.close()


async def test_health_and_reflection(channel: grpc.aio.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "pdserve.v1.Inference"):
        reply = await health.Check(health_pb2.HealthCheckRequest(service=service))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    replies = reflection.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = [service.name async for reply in replies for service in reply.list_services_response.service]
    assert "pdserve.v1.Inference" in names


async def test_calls_are_counted(stub: InferenceStub, http: httpx.AsyncClient) -> None:
    await generate(stub, prompt="x")
    await failure_of(stub, model="nobody", prompt="x")
    text = (await http.get("/metrics")).text
    assert f'pdserve_router_requests_total{{endpoint="grpc/Generate",model_name="{MODEL}",status="200"}} 1.0' in text
    assert 'pdserve_router_requests_total{endpoint="grpc/Generate",model_name="",status="404"} 1.0' in text
