"""What users of other servers' caches complained of, one test each. Keys are those of whole requests, as a router makes them."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from support.cache_calls import Calls
from support.router_clients import http_client

QUESTION = {"role": "user", "content": "what do I owe?"}
BASE: dict[str, Any] = {"messages": [QUESTION], "temperature": 0}


async def same(calls: Calls, one: dict[str, Any], other: dict[str, Any]) -> bool:
    return (await calls.chat_key(BASE | one)).key == (await calls.chat_key(BASE | other)).key


async def test_the_system_prompt_was_not_in_the_key(calls: Calls) -> None:
    prompts = [[{"role": "system", "content": text}, QUESTION] for text in ("You are a lawyer.", "You are a pirate.")]
    assert not await same(calls, {"messages": prompts[0]}, {"messages": prompts[1]})
    assert not await same(calls, {"messages": prompts[0]}, {})


async def test_only_the_last_user_message_was_in_the_key(calls: Calls) -> None:
    talks = [[{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}, QUESTION] for text in ("rent", "tax")]
    assert not await same(calls, {"messages": talks[0]}, {"messages": talks[1]})


async def test_fields_were_joined_without_lengths(calls: Calls) -> None:
    one = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}, QUESTION]
    other = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}, QUESTION]
    assert not await same(calls, {"messages": one}, {"messages": other})
    assert not await same(calls, {"stop": ["ab", "c"]}, {"stop": ["a", "bc"]})
    assert not await same(calls, {"stop_token_ids": [1, 23]}, {"stop_token_ids": [12, 3]})


async def test_parameters_of_sampling_were_not_in_the_key(calls: Calls) -> None:
    assert not await same(calls, {}, {"temperature": 1, "seed": 1})
    assert not await same(calls, {}, {"frequency_penalty": 1})
    assert not await same(calls, {}, {"n": 2})


async def test_what_changes_nothing_was_in_the_key(calls: Calls) -> None:
    for noise in ({"user": "a"}, {"metadata": {"trace": "7"}}, {"stream": True}, {"store": False}, {"prompt_cache_key": "k"}):
        assert await same(calls, {}, noise), noise


async def test_the_role_was_not_in_the_key(calls: Calls) -> None:
    assert not await same(calls, {}, {"messages": [{**QUESTION, "role": "system"}]})


async def test_another_models_answer_was_given(calls: Calls) -> None:
    assert not await same(calls, {}, {"model": "other"})


async def test_a_new_template_or_weights_under_the_same_name(calls: Calls) -> None:
    one, other = [await calls.chat_key(BASE, fingerprint=revision) for revision in ("f1", "f2")]
    assert one.key != other.key


async def test_another_tenants_answer_was_given(calls: Calls) -> None:
    one, other = [await calls.chat_key(BASE, tenant=tenant) for tenant in ("a", "b")]
    assert one.key != other.key


async def ask(http: httpx.AsyncClient, **more: Any) -> httpx.Response:
    return await http.post("/v1/chat/completions", json={"model": "tiny", **BASE, **more})


@pytest.mark.parametrize("first_streams", [True, False])
async def test_streams_and_bodies_had_caches_of_their_own(start_cluster: Any, first_streams: bool) -> None:
    async with start_cluster(cache={}) as cluster, http_client(cluster) as http:
        await ask(http, stream=first_streams)
        reply = await ask(http, stream=not first_streams)
        assert reply.headers["x-cache"] == "hit-exact"
        kind = "application/json" if first_streams else "text/event-stream"  # never a body where a stream was asked for
        assert reply.headers["content-type"].startswith(kind)


async def test_a_cut_answer_was_given_to_who_wanted_a_whole_one(start_cluster: Any) -> None:
    async with start_cluster(cache={}) as cluster, http_client(cluster) as http:
        assert (await ask(http, max_tokens=2)).json()["choices"][0]["finish_reason"] == "length"
        whole = await ask(http, max_tokens=50)
        assert (whole.headers["x-cache"], whole.json()["choices"][0]["finish_reason"]) == ("miss", "stop")


async def test_who_regenerates_got_the_same_again(start_cluster: Any) -> None:
    async with start_cluster(cache={}) as cluster, http_client(cluster) as http:
        for _ in range(3):
            assert (await ask(http, temperature=None)).headers["x-cache"] == "ineligible"
        assert len({request.sampling.seed for request in cluster.worker.requests}) == 3


async def test_there_was_no_way_to_remove_a_wrong_answer(start_cluster: Any) -> None:
    async with start_cluster(cache={}) as cluster, http_client(cluster) as http:
        await ask(http)
        wrong = (await ask(http)).headers["x-cache-id"]
        assert (await http.post("/v1/cache/invalidate", json={"id": wrong})).status_code == 200
        cluster.worker.answer = "the right one"
        assert (await ask(http)).json()["choices"][0]["message"]["content"] == "the right one"
