"""The exact cache end to end: real clients, a real router, and workers that count what reaches them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from common.rpc import connect
from common.wire import inference_pb2 as pb
from common.wire.inference_pb2_grpc import InferenceStub
from support.fake_cluster import CONTEXT, MODEL, FakeCluster
from support.router_clients import http_client, openai_client

USER = [{"role": "user", "content": "hi"}]
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "messages": USER}
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
ON: dict[str, Any] = {"exact": {"enabled": True}}


@pytest.fixture
async def cluster(start_cluster: Any) -> AsyncIterator[FakeCluster]:
    async with start_cluster(cache=ON) as running:
        yield running


async def ask(http: httpx.AsyncClient, path: str = CHAT, headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
    body = GREEDY | more
    if path == COMPLETION:
        body = {"prompt": "say", **{name: value for name, value in body.items() if name != "messages"}}
    return await http.post(path, json=body, headers=headers)


def results(*replies: httpx.Response) -> list[str]:
    return [reply.headers["x-cache"] for reply in replies]


def reassembled(path: str, text: str) -> dict[int, dict[str, Any]]:
    """What a client that streams has in the end, by choice: in the shape of a body's choices."""
    choices: dict[int, dict[str, Any]] = {}
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    for event in map(json.loads, lines[:-1]):
        for piece in event["choices"]:
            whole = choices.setdefault(piece["index"], {"text": "", "logprobs": None})
            whole["text"] += piece["text"] if path == COMPLETION else piece["delta"].get("content", "")
            if piece["logprobs"] is not None:
                parts = whole["logprobs"] = whole["logprobs"] or {}
                for name, values in piece["logprobs"].items():
                    parts[name] = None if values is None else [*parts.get(name, []), *values]
            if piece["finish_reason"] is not None:
                assert "finish_reason" not in whole
                whole |= {"finish_reason": piece["finish_reason"], "stop_reason": piece["stop_reason"]}
    return choices


def at_once(path: str, body: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {
        choice["index"]: {
            "text": choice["text"] if path == COMPLETION else choice["message"]["content"],
            "logprobs": choice["logprobs"],
            "finish_reason": choice["finish_reason"],
            "stop_reason": choice["stop_reason"],
        }
        for choice in body["choices"]
    }


async def test_an_equal_request_is_answered_without_a_worker(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    fresh, again = await ask(http), await ask(http)
    assert results(fresh, again) == ["miss", "hit-exact"]
    assert len(cluster.worker.requests) == 1
    assert at_once(CHAT, fresh.json()) == at_once(CHAT, again.json())
    assert "x-cache-id" not in fresh.headers
    assert len(bytes.fromhex(again.headers["x-cache-id"])) == 16
    assert again.headers["age"] == "0"
    one, other = fresh.json()["usage"], again.json()["usage"]
    assert (one["prompt_tokens"], one["completion_tokens"]) == (other["prompt_tokens"], other["completion_tokens"])
    assert other["prompt_tokens_details"]["cached_tokens"] == other["prompt_tokens"]  # nobody computed any of them
    assert fresh.json()["id"] != again.json()["id"]


SHAPES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {}),
    (CHAT, {"n": 3}),
    (CHAT, {"logprobs": True, "top_logprobs": 2}),
    (CHAT, {"stop": ["the"]}),
    (CHAT, {"temperature": 0.7, "seed": 3, "n": 2, "stop": ["zzz"], "logprobs": True}),
    (COMPLETION, {}),
    (COMPLETION, {"n": 2, "logprobs": 1}),
    (COMPLETION, {"stop": " th", "include_stop_str_in_output": True}),
    (COMPLETION, {"max_tokens": 2}),
    (COMPLETION, {"echo": True}),
    (COMPLETION, {"echo": True, "logprobs": 1, "max_tokens": 1}),
    (COMPLETION, {"echo": True, "max_tokens": 0}),
    (COMPLETION, {"stop_token_ids": [2]}),
    (COMPLETION, {"ignore_eos": True, "max_tokens": 3}),
]


async def test_one_answer_is_the_same_at_once_and_streamed(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    for number, (path, more) in enumerate(SHAPES * 2):
        text = f"question {number}"
        question = more | ({"prompt": text} if path == COMPLETION else {"messages": [{"role": "user", "content": text}]})
        if number < len(SHAPES):
            streamed, whole = await ask(http, path, **question, stream=True), await ask(http, path, **question)
        else:
            whole, streamed = await ask(http, path, **question), await ask(http, path, **question, stream=True)
        assert sorted(results(streamed, whole)) == ["hit-exact", "miss"]
        assert len(cluster.worker.requests) == number + 1
        pieces = reassembled(path, streamed.text)
        assert pieces == at_once(path, whole.json())
        assert all(choice["finish_reason"] for choice in pieces.values())


async def test_the_openai_client_sees_no_difference(cluster: FakeCluster, openai: AsyncOpenAI) -> None:
    fresh = await openai.chat.completions.create(**GREEDY)
    stream = await openai.chat.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == fresh.choices[0].message.content
    assert chunks[-1].usage is not None
    assert fresh.usage is not None
    assert chunks[-1].usage.completion_tokens == fresh.usage.completion_tokens
    raw = await openai.chat.completions.with_raw_response.create(**GREEDY, user="somebody", metadata={"a": "b"})
    assert raw.headers["x-cache"] == "hit-exact"
    assert len(cluster.worker.requests) == 1


@pytest.mark.parametrize(
    ("settings", "cases"),
    [
        (
            {},
            [
                ({"temperature": None}, "ineligible"),
                ({"temperature": 0.5}, "ineligible"),
                ({"temperature": 0.5, "seed": 1}, "hit-exact"),
                ({"temperature": None, "seed": 1, "n": 2}, "hit-exact"),
            ],
        ),
        ({"sampled": True}, [({"temperature": 0.5}, "hit-exact"), ({"temperature": None}, "hit-exact")]),
        ({"enabled": False}, [({}, "ineligible")]),
        ({"min_tokens": 50}, [({}, "miss")]),
    ],
)
async def test_only_what_the_model_would_say_again_is_said_again(
    start_cluster: Any, settings: dict[str, Any], cases: list[tuple[dict[str, Any], str]]
) -> None:
    async with start_cluster(cache={"exact": settings}) as cluster, http_client(cluster) as http:
        for more, second in cases:
            before = len(cluster.worker.requests)
            assert results(await ask(http, **more)) == ["miss" if second != "ineligible" else "ineligible"]
            assert results(await ask(http, **more)) == [second]
            assert len(cluster.worker.requests) - before == 1 + (second != "hit-exact")


async def test_an_answer_that_ended_by_itself_serves_every_limit_it_fits_in(
    cluster: FakeCluster, http: httpx.AsyncClient
) -> None:
    visible = len(cluster.tokenizer.encode("hello there", add_special_tokens=False))
    needed = visible + 1  # the end token is drawn too
    await ask(http, max_tokens=needed + 7)
    for limit, result in ((needed, "hit-exact"), (needed + 50, "hit-exact"), (None, "hit-exact"), (needed - 1, "miss")):
        assert results(await ask(http, max_tokens=limit)) == [result], limit
    cut = await ask(http, max_tokens=needed - 1)  # ran into its limit: for this limit alone
    assert (results(cut), cut.json()["choices"][0]["finish_reason"]) == (["hit-exact"], "length")
    assert results(await ask(http, max_tokens=2), await ask(http, max_tokens=2)) == ["miss", "hit-exact"]
    assert results(await ask(http, max_tokens=3)) == ["miss"]
    # What a worker would say under each of these limits is what was said.
    assert len(cluster.worker.requests) == 4


async def test_a_stop_string_in_the_last_token_still_fits(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    cluster.worker.answer = "one two three four"
    first = await ask(http, stop=["two"], max_tokens=100)
    used = first.json()["usage"]["completion_tokens"]
    for limit in (used, used + 1):
        again = await ask(http, stop=["two"], max_tokens=limit)
        assert results(again) == ["hit-exact"]
        assert again.json()["choices"] == first.json()["choices"]
        assert again.json()["usage"]["completion_tokens"] == used
    assert results(await ask(http, stop=["two"], max_tokens=used - 1)) == ["miss"]


CONTROLS: list[tuple[dict[str, str], str, str]] = [  # what is asked for, what comes, what the next plain request is given
    ({"Cache-Control": "no-cache"}, "miss", "hello again"),
    ({"Cache-Control": "max-age=0"}, "miss", "hello again"),
    ({"Cache-Control": "max-age=3600, no-transform"}, "hit-exact", "hello there"),
    ({"Cache-Control": "Only-If-Cached"}, "hit-exact", "hello there"),
    ({"Cache-Control": "no-store"}, "hit-exact", "hello there"),
    ({"x-cache": "bypass"}, "bypass", "hello there"),
    ({"x-cache-tags": "a"}, "miss", "hello there"),
]


async def test_what_a_client_says_of_the_cache(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    for number, (headers, result, then) in enumerate(CONTROLS):
        question = {"messages": [{"role": "user", "content": f"question {number}"}]}
        cluster.worker.answer = "hello there"
        await ask(http, **question)
        cluster.worker.answer = "hello again"
        before = len(cluster.worker.requests)
        controlled = await ask(http, headers=headers, **question)
        assert results(controlled) == [result]
        assert len(cluster.worker.requests) - before == (result != "hit-exact")
        after = await ask(http, **question)
        assert results(after) == ["hit-exact"]
        assert after.json()["choices"][0]["message"]["content"] == then


async def test_what_is_not_to_be_kept_is_not_kept(http: httpx.AsyncClient) -> None:
    for headers in ({"Cache-Control": "no-store"}, {"x-cache": "bypass"}):
        await ask(http, headers=headers)
        assert results(await ask(http, headers={"Cache-Control": "no-store"})) == ["miss"]


async def test_only_if_cached_asks_nobody(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    for more in ({}, {"stream": True}, {"temperature": 0.5}):
        reply = await ask(http, headers={"Cache-Control": "only-if-cached"}, **more)
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "answer_not_cached")
    assert not cluster.worker.requests


async def test_a_header_that_cannot_be_read_is_named(http: httpx.AsyncClient) -> None:
    for name, value in (
        ("Cache-Control", "max-age=soon"),
        ("x-cache", "please"),
        ("x-cache-tags", "a b"),
        ("x-cache-tags", ",".join(map(str, range(17)))),
    ):
        reply = await ask(http, headers={name: value})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, name)


async def test_tenants_never_share(start_cluster: Any) -> None:
    async with start_cluster(cache=ON, api_keys=("one", "two")) as cluster, http_client(cluster) as http:
        keys = [{"Authorization": f"Bearer {key}"} for key in ("one", "two")]
        said = [(await ask(http, headers=key)).headers["x-cache"] for key in (*keys, *keys)]
        assert said == ["miss", "miss", "hit-exact", "hit-exact"]
        assert len(cluster.worker.requests) == 2


async def test_another_revision_of_the_model_is_another_model(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    await ask(http)
    cluster.fingerprint = "f2"
    cluster.publish()
    seen = ["hit-exact"]
    while seen == ["hit-exact"]:
        seen = results(await ask(http))
    assert seen == ["miss"]
    cluster.fingerprint = ""
    cluster.publish()
    while seen != ["ineligible"]:
        seen = results(await ask(http))


async def test_each_prompt_of_a_call_is_looked_up_by_itself(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    assert results(await ask(http, COMPLETION, prompt="a b")) == ["miss"]
    both = await ask(http, COMPLETION, prompt=["a b", "c d"])
    assert results(both) == ["miss"]
    again = await ask(http, COMPLETION, prompt=["c d", "a b"])
    assert results(again) == ["hit-exact"]
    assert len(cluster.worker.requests) == 2
    assert [choice["text"] for choice in again.json()["choices"]] == ["hello there"] * 2
    assert "x-cache-id" not in again.headers


@pytest.mark.parametrize("more", [{"stop": ["zzz"]}, {}])
async def test_an_answer_that_failed_is_not_kept(cluster: FakeCluster, http: httpx.AsyncClient, more: dict[str, Any]) -> None:
    cluster.worker.fail_after = 1
    cluster.worker.transform = None
    async with http.stream("POST", CHAT, json={**GREEDY, **more, "stream": True}) as reply:
        await anext(reply.aiter_lines())  # and away
    cluster.worker.fail_after = None
    assert results(await ask(http, **more)) == ["miss"]


async def test_a_hit_tells_its_time_honestly(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    fresh = (await ask(http, pdserve_timings=True)).json()["timings"]
    assert (fresh["cache"], fresh["decode_worker"]) == ("miss", "tiny/decode/0")
    reply = await ask(http, pdserve_timings=True, stream=True)
    timings = json.loads(reply.text.split("\n\n")[-3].removeprefix("data: "))["timings"]
    assert (timings["cache"], timings["decode_worker"], timings["prefill_worker"]) == ("hit-exact", None, None)
    assert sum(timings["stages_ms"].values()) == pytest.approx(timings["ttft_ms"], abs=0.1)
    assert {name for name, value in timings["stages_ms"].items() if value} <= {"router", "network"}
    assert timings["transfer_bytes"] == 0


async def test_metrics(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    fresh = (await ask(http)).json()["usage"]
    await ask(http, stream=True)
    await ask(http, temperature=1)
    await ask(http, headers={"x-cache": "bypass"})
    lines = (await http.get("/metrics")).text.splitlines()
    for result, reason in (("miss", "absent"), ("hit-exact", ""), ("ineligible", "sampled"), ("bypass", "asked")):
        assert f'pdserve_cache_requests_total{{model_name="{MODEL}",reason="{reason}",result="{result}"}} 1.0' in lines
    for kind, tokens in (("prompt", fresh["prompt_tokens"]), ("generation", fresh["completion_tokens"] - 1)):
        assert f'pdserve_cache_saved_tokens_total{{kind="{kind}",model_name="{MODEL}"}} {tokens}.0' in lines
    assert 'pdserve_cache_lookup_seconds_count{stage="exact"} 2.0' in lines
    assert f'vllm:time_to_first_token_seconds_count{{model_name="{MODEL}"}} 4.0' in lines


async def test_a_hit_still_needs_a_valid_request_and_an_open_door(start_cluster: Any) -> None:
    async with start_cluster(cache=ON) as cluster, http_client(cluster) as http, openai_client(cluster) as openai:
        await ask(http)
        assert (await ask(http, top_p=3)).status_code == 400
        assert (await ask(http, max_tokens=CONTEXT)).status_code == 400
        cluster.worker.hold_after = 1
        await openai.completions.create(model=MODEL, prompt="x", stream=True, seed=1)
        await cluster.worker.holding.wait()
        cluster.stop.set()
        refused = await ask(http)
        while refused.status_code == 200:
            refused = await ask(http)
        assert refused.status_code == 503
        cluster.worker.released.set()


# -- invalidation --------------------------------------------------------------------------------------------------------


async def invalidate(http: httpx.AsyncClient, body: dict[str, Any], headers: dict[str, str] | None = None) -> httpx.Response:
    return await http.post("/v1/cache/invalidate", json=body, headers=headers)


async def test_what_was_invalidated_is_not_served(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    tagged = {"x-cache-tags": "doc:1, doc:2"}
    for body in ({"tenant": "self"}, {"model": MODEL}, {"model": "small"}, {"tags": ["doc:1"]}, {"id": ""}):
        await ask(http, headers=tagged)
        hit = await ask(http, headers={"x-cache-tags": "doc:2,doc:1"})
        assert results(hit) == ["hit-exact"]
        done = await invalidate(http, {"id": hit.headers["x-cache-id"]} if "id" in body else body)
        assert done.status_code == 200
        assert len(done.json()["invalidated"]) == 1
        assert results(await ask(http, headers=tagged), await ask(http, headers=tagged)) == ["miss", "hit-exact"], body


async def test_other_tags_and_other_tenants_are_not_touched(start_cluster: Any) -> None:
    async with start_cluster(cache=ON, api_keys=("one", "two")) as cluster, http_client(cluster) as http:
        one, two = ({"Authorization": f"Bearer {key}", "x-cache-tags": "a"} for key in ("one", "two"))
        for headers in (one, two, one | {"x-cache-tags": "b"}):
            await ask(http, headers=headers)
        for body in ({"tags": ["a"]}, {"tenant": "self"}, {"model": MODEL}):
            assert (await invalidate(http, body, one)).status_code == 200
            assert results(await ask(http, headers=two)) == ["hit-exact"]
            untouched = "hit-exact" if "tags" in body else "miss"
            assert results(await ask(http, headers=one | {"x-cache-tags": "b"})) == [untouched]
            assert results(await ask(http, headers=one)) == ["miss"]
        assert (await invalidate(http, {"tenant": "self"})).status_code == 401


async def test_an_administrator_reaches_a_models_answers_of_everybody(start_cluster: Any) -> None:
    tenants = {"ops": {"keys": ["boss"], "admin": True}}
    async with start_cluster(cache=ON, api_keys=("one",), tenants=tenants) as cluster, http_client(cluster) as http:
        one, boss = ({"Authorization": f"Bearer {key}"} for key in ("one", "boss"))
        await ask(http, headers=one)
        assert (await invalidate(http, {"tenant": "self"}, boss)).status_code == 200
        assert results(await ask(http, headers=one)) == ["hit-exact"]
        assert (await invalidate(http, {"model": MODEL}, boss)).status_code == 200
        assert results(await ask(http, headers=one)) == ["miss"]


async def test_an_invalidation_that_means_nothing_is_refused(http: httpx.AsyncClient) -> None:
    for body, status, param in (
        ({}, 400, "tenant"),
        ({"tenant": "other"}, 400, "tenant"),
        ({"tags": ["a b"]}, 400, "tags"),
        ({"id": "xyz"}, 400, "id"),
        ({"model": "nobody"}, 404, "model"),
    ):
        reply = await invalidate(http, body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (status, param)


async def test_grpc_and_http_share_one_answer(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    channel = connect(cluster.grpc_address, None)
    stub = InferenceStub(channel)
    request = pb.InferenceRequest(model=MODEL, prompt="say", temperature=0, max_tokens=40)

    async def generate(*metadata: tuple[str, str]) -> tuple[str, dict[str, Any], pb.Usage]:
        call = stub.Generate(request, metadata=metadata)
        *events, last = [event async for event in call]
        return "".join(event.text for event in events), dict(await call.trailing_metadata()), last.usage

    text, trailers, usage = await generate()
    assert (text, trailers["x-cache"]) == ("hello there", "miss")
    again, trailers, hit_usage = await generate()
    assert (again, trailers["x-cache"], trailers["age"]) == (text, "hit-exact", "0")
    assert (hit_usage.completion_tokens, hit_usage.cached_tokens) == (usage.completion_tokens, usage.prompt_tokens)
    assert results(await ask(http, COMPLETION, max_tokens=40)) == ["hit-exact"]
    assert (await generate(("x-cache", "bypass")))[1]["x-cache"] == "bypass"
    assert len(cluster.worker.requests) == 2
    await channel.close()
