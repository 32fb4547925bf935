"""Names of several models over real sockets: who answers, what the headers say, and who takes over before the first byte."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import numpy as np
import pytest

from common.config import RoutingConfig
from common.errors import EngineFailure, InvalidRequest, Overloaded
from common.wire import inference_pb2, inference_pb2_grpc
from router.models.predictor import Predictor, Words
from router.models.routes import ModelRouter
from router.models.text_features import NUM_FACTS
from support.fake_cluster import CONTEXT, MODEL, FakeCluster
from support.router_clients import http_client

OTHER = "large"
USER = [{"role": "user", "content": "hi"}]
ROUTING: dict[str, Any] = {
    "aliases": {
        "auto": {"candidates": [OTHER, MODEL], "policy": "cheapest"},
        "best": {"candidates": [OTHER], "fallback": [MODEL]},
        "missing": {"candidates": ["absent"], "fallback": [OTHER]},
        "nobody": {"candidates": ["absent"]},
        "canary": {"weights": {MODEL: 50, OTHER: 50}},
    },
    "prices": {MODEL: {"input": 1, "output": 1}, OTHER: {"input": 2, "output": 2}},
    "rules": [
        {"when": {"header": {"x-tier": "premium"}}, "use": OTHER},
        {"when": {"tokens_over": 100}, "use": OTHER},
        {"when": {"tenant": "somebody"}, "use": OTHER},
        {"when": {"tenant": "default", "header": {"x-mine": "1"}}, "use": OTHER},
        {"when": {"header": {"X-Tier": "premium", "x-other": "1"}}, "use": MODEL},
    ],
}


@pytest.fixture
async def two(start_cluster: Callable[..., AbstractAsyncContextManager[FakeCluster]]) -> AsyncIterator[FakeCluster]:
    async with start_cluster(models=(OTHER,), routing=ROUTING) as running:
        yield running


@pytest.fixture
async def http(two: FakeCluster) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(two) as client:
        yield client


async def ask(http: httpx.AsyncClient, model: str, *, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    return await http.post("/v1/chat/completions", json={"model": model, "messages": USER, **body}, headers=headers)


async def test_names_lead_to_models_and_headers_say_which(http: httpx.AsyncClient) -> None:
    for asked, model, why in (
        ("auto", MODEL, "place 1 by price"),
        ("best", OTHER, "place 1 of its list"),
        ("canary", None, "weight"),
    ):
        answer = await ask(http, asked)
        assert answer.status_code == 200
        assert answer.json()["model"] == answer.headers["x-route-model"]
        assert model in (None, answer.json()["model"])
        assert why in answer.headers["x-route-reason"]


async def test_a_name_of_several_models_tokenises_as_one_of_them(http: httpx.AsyncClient, two: FakeCluster) -> None:
    asked = {"prompt": "a few words", "return_token_strs": True}
    plain = (await http.post("/tokenize", json={"model": MODEL, **asked})).json()
    for name in ("auto", "best", "missing", "canary", "small"):
        routed = await http.post("/tokenize", json={"model": name, **asked})
        assert (routed.status_code, routed.json()) == (200, plain)  # both models have one tokenizer
        back = await http.post("/detokenize", json={"model": name, "tokens": plain["tokens"]})
        assert back.json() == {"prompt": "a few words"}
        assert (await http.get("/tokenizer_info", params={"model": name})).status_code == 200
    assert (await http.post("/tokenize", json={"model": "else", **asked})).status_code == 404
    assert (await http.post("/tokenize", json={"model": "nobody", **asked})).status_code == 503  # configured, and not up
    async with grpc.aio.insecure_channel(two.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        reply = await stub.Tokenize(inference_pb2.TokenizeRequest(model="auto", prompt="a few words"))
        assert list(reply.token_ids) == plain["tokens"]


def test_who_stands_for_a_name_without_a_call() -> None:
    routing = RoutingConfig.model_validate(
        {
            "aliases": {
                "listed": {"candidates": ["dear", "cheap"], "fallback": ["other"]},
                "cheapest": {"candidates": ["dear", "cheap"], "policy": "cheapest"},
                "canary": {"weights": {"dear": 5, "cheap": 95}},
            },
            "prices": {"dear": {"input": 2, "output": 2}, "cheap": {"input": 1, "output": 1}},
        }
    )
    up = {"dear", "cheap", "other"}
    router = ModelRouter(routing, is_ready=lambda model: model in up)
    names = ("listed", "cheapest", "canary", "dear")
    assert [router.stand_in(name) for name in names] == ["dear", "cheap", "cheap", "dear"]
    up.remove("cheap")
    assert [router.stand_in(name) for name in names] == ["dear", "dear", "dear", "dear"]
    up.clear()
    assert [router.stand_in(name) for name in names] == ["dear", "cheap", "cheap", "dear"]


async def test_a_model_asked_by_its_name_is_not_routed(http: httpx.AsyncClient, two: FakeCluster) -> None:
    for name in (MODEL, "small"):
        answer = await ask(http, name, headers={"x-tier": "premium"})
        assert answer.json()["model"] == MODEL
        assert "x-route-model" not in answer.headers
    two.workers[0].refuse = Overloaded("full")
    assert (await ask(http, MODEL)).status_code == 429  # and nobody else was asked
    assert two.workers[1].requests == []


async def test_rules_are_taken_in_order_before_the_policy(http: httpx.AsyncClient) -> None:
    premium = await ask(http, "auto", headers={"X-Tier": "premium", "x-other": "1"})
    assert (premium.json()["model"], premium.headers["x-route-reason"]) == (OTHER, "rule 1: header x-tier")
    long = await ask(http, "auto", messages=[{"role": "user", "content": "q " * 150}])
    assert long.json()["model"] == OTHER
    assert long.headers["x-route-reason"].startswith("rule 2: ")
    mine = await ask(http, "auto", headers={"x-mine": "1"})
    assert mine.headers["x-route-reason"] == "rule 4: header x-mine, tenant default"
    assert (await ask(http, "auto", headers={"x-tier": "basic"})).json()["model"] == MODEL


async def test_canaries_are_shared_out_and_stay_with_their_conversation(http: httpx.AsyncClient) -> None:
    models = Counter()
    for number in range(24):
        history = [{"role": "user", "content": f"question {number}"}]
        first = (await ask(http, "canary", messages=history)).json()["model"]
        history += [{"role": "assistant", "content": "a"}, {"role": "user", "content": "and?"}]
        assert (await ask(http, "canary", messages=history)).json()["model"] == first
        models[first] += 1
    assert min(models[MODEL], models[OTHER]) >= 4


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("failure", [Overloaded("full"), EngineFailure("broken")])
async def test_the_next_model_takes_over_before_the_first_byte(
    http: httpx.AsyncClient, two: FakeCluster, stream: bool, failure: Exception
) -> None:
    two.workers[1].refuse = failure  # type: ignore[assignment]
    answer = await ask(http, "best", stream=stream)
    assert answer.status_code == 200
    assert answer.headers["x-route-model"] == MODEL
    assert f"after {type(failure).__name__} of {OTHER}" in answer.headers["x-route-reason"]
    text = answer.text
    assert "I am" not in text
    assert f'"model":"{MODEL}"' in text.replace(" ", "")
    assert len(two.workers[1].requests) >= 1


async def test_after_the_first_byte_an_answer_is_its_models_own(http: httpx.AsyncClient, two: FakeCluster) -> None:
    two.workers[1].fail_after, two.workers[1].failure = 1, EngineFailure("broken")
    answer = await ask(http, "best", stream=True)
    assert answer.headers["x-route-model"] == OTHER
    assert '"error"' in answer.text
    assert two.workers[0].requests == []


async def test_what_the_client_did_wrong_goes_to_nobody_else(http: httpx.AsyncClient, two: FakeCluster) -> None:
    two.workers[1].refuse = InvalidRequest("no", param="n")
    assert (await ask(http, "best")).status_code == 400
    assert two.workers[0].requests == []


async def test_when_all_fail_the_last_error_is_told(http: httpx.AsyncClient, two: FakeCluster) -> None:
    two.workers[0].refuse = Overloaded("the last is full", retry_after_s=7)
    two.workers[1].refuse = EngineFailure("broken")
    answer = await ask(http, "best")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")


async def test_models_without_workers_and_with_too_little_context_are_passed_over(
    http: httpx.AsyncClient, two: FakeCluster
) -> None:
    answer = await ask(http, "missing")
    assert answer.headers["x-route-model"] == OTHER
    assert "absent: its workers are not ready" in answer.headers["x-route-reason"]
    assert (await ask(http, "nobody")).status_code == 503
    two.workers[0].max_model_tokens = 64
    two.publish()
    async with asyncio.timeout(120):
        while (await http.get(f"/v1/models/{MODEL}")).json()["max_model_len"] != 64:
            await asyncio.sleep(0.005)
    long = await ask(http, "auto", max_tokens=100)
    assert long.headers["x-route-model"] == OTHER
    assert f"{MODEL}: ContextLengthExceeded (max_tokens)" in long.headers["x-route-reason"]
    too_long = await ask(http, "auto", max_tokens=CONTEXT)
    assert (too_long.status_code, too_long.json()["error"]["code"]) == (400, "context_length_exceeded")


async def test_explain_says_what_would_happen_and_does_nothing(http: httpx.AsyncClient, two: FakeCluster) -> None:
    said = (await http.post("/v1/route/explain", json={"model": "missing", "messages": USER})).json()
    assert said == {
        "asked": "missing",
        "model": OTHER,
        "candidates": [{"model": OTHER, "reason": "fallback 1"}],
        "refused": [{"model": "absent", "reason": "its workers are not ready"}],
        "predicted": {},
        "predicted_by": None,
    }
    plain = (await http.post("/v1/route/explain", json={"model": "small", "prompt": "hi"})).json()
    assert plain["candidates"] == [{"model": MODEL, "reason": "asked by name"}]
    assert (await http.post("/v1/route/explain", json={"model": "nowhere", "messages": USER})).status_code == 404
    assert (await http.post("/v1/route/explain", json={"model": "auto", "messages": []})).status_code == 400
    nobody = (await http.post("/v1/route/explain", json={"model": "nobody", "messages": USER})).json()
    assert nobody["model"] is None
    assert all(worker.requests == [] for worker in two.workers)


async def test_names_are_listed(http: httpx.AsyncClient) -> None:
    listed = {model["id"]: model for model in (await http.get("/v1/models")).json()["data"]}
    assert {"auto", "best", "missing", "canary", MODEL, OTHER, "small"} <= set(listed)
    assert "nobody" not in listed
    assert (await http.get("/v1/models/auto")).json()["id"] == "auto"


async def test_grpc_routes_and_falls_back_alike(two: FakeCluster) -> None:
    two.workers[1].refuse = Overloaded("full")
    message = inference_pb2.InferenceRequest(model="best", prompt="hi", max_tokens=40)
    async with grpc.aio.insecure_channel(two.grpc_address) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(message, timeout=60)
        text = "".join([event.text async for event in call])
        trailing = dict(await call.trailing_metadata())
    assert text.startswith("hello")
    assert trailing["x-route-model"] == MODEL
    assert "after Overloaded" in trailing["x-route-reason"]


async def test_a_predictor_chooses_by_gain_and_a_conversation_stays(
    start_cluster: Callable[..., AbstractAsyncContextManager[FakeCluster]], tmp_path: Path
) -> None:
    one = np.ones(1, np.float32)
    likes = np.array([[0.0, 0.45]], np.float32)
    of_facts = np.zeros((NUM_FACTS, 2), np.float32)
    words = Words(np.array([zlib.crc32(b"prove")], np.uint32), one, likes, of_facts, np.full(2, 0.5, np.float32))
    path = tmp_path / "predictor.json"
    path.write_text(json.dumps(Predictor((MODEL, OTHER), words).as_json()))
    auto = {"candidates": [MODEL, OTHER], "policy": "predicted", "strong_share": 0.3}
    async with (
        start_cluster(models=(OTHER,), routing={"aliases": {"auto": auto}, "predictor": str(path)}) as cluster,
        http_client(cluster) as http,
    ):
        easy, hard = USER, [{"role": "user", "content": "prove"}]
        assert (await ask(http, "auto", messages=easy)).json()["model"] == MODEL
        assert (await ask(http, "auto", messages=hard)).json()["model"] == OTHER
        kept = await ask(http, "auto", messages=[*hard, {"role": "assistant", "content": "a"}, *easy])
        assert (kept.json()["model"], kept.headers["x-route-reason"]) == (OTHER, "as before in this conversation")
        said = (
            await http.post("/v1/route/explain", json={"model": "auto", "messages": [{"role": "user", "content": "x"}]})
        ).json()
        assert said["predicted"] == {MODEL: 0.5, OTHER: 0.5}
        assert said["predicted_by"] == "words"
        assert "predicted 0.500 by words, cost " in said["candidates"][0]["reason"]
