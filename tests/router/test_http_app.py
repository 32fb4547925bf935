"""The OpenAI face end to end: a real client, a real router on real sockets, decode workers with scripted answers."""

from __future__ import annotations

import json

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError

from support.fake_cluster import CONTEXT, EOS, MODEL, FakeCluster

USER = [{"role": "user", "content": "hi"}]


async def sse(http: httpx.AsyncClient, path: str, body: dict) -> tuple[httpx.Response, list]:
    """The response and its events, parsed; [DONE] stays a string."""
    async with http.stream("POST", path, json={"model": MODEL, "stream": True, **body}) as response:
        events = []
        text = (await response.aread()).decode()
    for block in text.split("\n\n")[:-1]:
        assert block.startswith("data: "), block
        data = block.removeprefix("data: ")
        events.append(data if data == "[DONE]" else json.loads(data))
    assert text.endswith("\n\n")
    return response, events


async def test_chat_at_once(cluster: FakeCluster, openai: AsyncOpenAI) -> None:
    answer = await openai.chat.completions.create(model=MODEL, messages=USER, seed=-5, temperature=0.5)
    choice = answer.choices[0]
    assert choice.message.content == "hello there"
    assert (choice.message.role, choice.finish_reason, answer.object) == ("assistant", "stop", "chat.completion")
    request = cluster.worker.requests[0]
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert list(request.prompt_token_ids) == cluster.tokenizer.encode(prompt, add_special_tokens=False)
    assert request.sampling.seed == 2**64 - 5
    assert request.sampling.max_tokens == CONTEXT - len(request.prompt_token_ids)  # what fits
    num_answer = len(cluster.tokenizer.encode("hello there", add_special_tokens=False)) + 1  # and the end token
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(request.prompt_token_ids)
    assert answer.usage.completion_tokens == num_answer
    assert answer.usage.total_tokens == len(request.prompt_token_ids) + num_answer
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint is not None
    assert answer.system_fingerprint.startswith("pdserve-")


async def test_chat_stream_has_the_documented_order(http: httpx.AsyncClient) -> None:
    options = {"include_usage": True}
    response, events = await sse(http, "/v1/chat/completions", {"messages": USER, "stream_options": options})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"
    assert events[-1] == "[DONE]"
    *chunks, usage = events[:-1]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("usage" not in chunk for chunk in chunks)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "hello there"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == usage["usage"]["prompt_tokens"] + usage["usage"]["completion_tokens"]
    assert {(event["id"], event["object"], event["model"]) for event in events[:-1]} == {
        (chunks[0]["id"], "chat.completion.chunk", MODEL)
    }


async def test_without_include_usage_there_is_no_usage_chunk(http: httpx.AsyncClient) -> None:
    _, events = await sse(http, "/v1/chat/completions", {"messages": USER})
    assert all(event["choices"] and "usage" not in event for event in events[:-1])


async def test_continuous_usage_grows_to_the_total(http: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    _, events = await sse(http, "/v1/completions", {"prompt": "hi", "stream_options": options})
    counts = [event["usage"]["completion_tokens"] for event in events[:-1]]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


async def test_several_choices(cluster: FakeCluster, openai: AsyncOpenAI) -> None:
    answer = await openai.chat.completions.create(model=MODEL, messages=USER, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {"hello there"}
    assert len(cluster.worker.requests) == 1  # one request, three choices
    stream = await openai.chat.completions.create(model=MODEL, messages=USER, n=3, stream=True)
    texts, roles, ends = ["", "", ""], [0, 0, 0], [0, 0, 0]
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] += choice.delta.role == "assistant"
            ends[choice.index] += choice.finish_reason == "stop"
    assert (texts, roles, ends) == (["hello there"] * 3, [1] * 3, [1] * 3)


async def test_several_prompts_of_every_kind(cluster: FakeCluster, openai: AsyncOpenAI) -> None:
    ids = [cluster.tokenizer.encode(text) for text in ("the word", "hot")]
    for prompt in (["the word", "hot"], ids):
        answer = await openai.completions.create(model=MODEL, prompt=prompt, n=2)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        sent = cluster.worker.requests[-2:]
        assert {request.prompt_token_ids for request in sent} == {tuple(item) for item in ids}
        assert len({request.request_id for request in sent}) == 2
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == sum(len(item) for item in ids)
    one = await openai.completions.create(model=MODEL, prompt=ids[0])
    assert one.choices[0].text == "hello there"
    assert cluster.worker.requests[-1].prompt_token_ids == tuple(ids[0])
    assert cluster.worker.requests[-1].sampling.max_tokens == 16


async def test_chat_logprobs(cluster: FakeCluster, openai: AsyncOpenAI) -> None:
    answer = await openai.chat.completions.create(model=MODEL, messages=USER, logprobs=True, top_logprobs=2)
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    ids = cluster.tokenizer.encode("hello there", add_special_tokens=False)
    assert [bytes(item.bytes or ()) for item in content] == [cluster.tokenizer.token_bytes(token) for token in ids]
    assert "".join(item.token for item in content) == "hello there"
    assert {item.logprob for item in content} == {-0.25}
    assert [[top.logprob for top in item.top_logprobs] for item in content] == [[-0.25, -1.25]] * len(ids)
    streamed = []
    async for chunk in await openai.chat.completions.create(
        model=MODEL, messages=USER, logprobs=True, top_logprobs=2, stream=True
    ):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content or []
    assert [item.model_dump() for item in streamed] == [item.model_dump() for item in content]


async def test_completion_logprobs(openai: AsyncOpenAI) -> None:
    answer = await openai.completions.create(model=MODEL, prompt="hi", logprobs=2)
    logprobs, text = answer.choices[0].logprobs, answer.choices[0].text
    assert logprobs is not None
    assert "".join(logprobs.tokens or ()) == text
    assert all(text[offset:].startswith(token) for offset, token in zip(logprobs.text_offset, logprobs.tokens, strict=True))
    assert logprobs.token_logprobs == [-0.25] * len(logprobs.tokens)
    assert all(list(top.values()) == [-0.25, -1.25] for top in logprobs.top_logprobs)
    bare = await openai.completions.create(model=MODEL, prompt="hi", logprobs=0)
    assert all(list(top.values()) == [-0.25] for top in bare.choices[0].logprobs.top_logprobs)


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_with_logprobs_as_evaluation_harnesses_ask(cluster: FakeCluster, openai: AsyncOpenAI, stream: bool) -> None:
    prompts = [cluster.tokenizer.encode(text) for text in ("the hot word", "hot")]
    settings = {"model": MODEL, "prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1234}
    parts: dict[int, dict[str, list]] = {}
    texts = {0: "", 1: ""}
    if stream:
        choices = [choice async for chunk in await openai.completions.create(**settings, stream=True) for choice in chunk.choices]
    else:
        choices = (await openai.completions.create(**settings)).choices
    for choice in choices:
        texts[choice.index] += choice.text
        for name, values in choice.logprobs.model_dump().items():
            parts.setdefault(choice.index, {}).setdefault(name, []).extend(values)
    for index, prompt in enumerate(prompts):
        merged = parts[index]
        assert len(merged["tokens"]) == len(prompt) + 1
        assert merged["token_logprobs"][0] is None
        assert merged["top_logprobs"][0] is None
        scored = merged["token_logprobs"][1:-1]  # the harness drops the generated token
        assert scored == [-0.25] * (len(prompt) - 1)
        assert all(isinstance(top, dict) and top for top in merged["top_logprobs"][1:-1])
        assert "".join(merged["tokens"]) == texts[index]
        pairs = zip(merged["text_offset"], merged["tokens"], strict=True)
        assert all(texts[index][offset:].startswith(token) for offset, token in pairs)


async def test_echo_alone_repeats_the_prompt_once(cluster: FakeCluster, openai: AsyncOpenAI) -> None:
    answer = await openai.completions.create(model=MODEL, prompt="say ", echo=True)
    assert answer.choices[0].text == "say hello there"
    assert cluster.worker.requests[-1].sampling.prompt_logprobs is None


async def test_echo_without_any_token(cluster: FakeCluster, openai: AsyncOpenAI) -> None:
    answer = await openai.completions.create(model=MODEL, prompt="the word", echo=True, logprobs=1, max_tokens=0)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == ("the word", "length")
    assert choice.logprobs is not None
    assert len(choice.logprobs.tokens or ()) == len(cluster.worker.requests[-1].prompt_token_ids)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_choice_and_cancels_the_rest(
    cluster: FakeCluster, http: httpx.AsyncClient, stream: bool
) -> None:
    cluster.worker.answer = "one two three STOP four five six"
    cluster.worker.hold_after = len(cluster.tokenizer.encode("one two three STOP four", add_special_tokens=False))
    body = {"prompt": "count", "stop": ["STOP", "zzz"], "max_tokens": 100}
    if stream:
        _, events = await sse(http, "/v1/completions", body)
        choices = [event["choices"][0] for event in events[:-1]]
    else:
        choices = (await http.post("/v1/completions", json={"model": MODEL, **body})).json()["choices"]
    assert "".join(choice["text"] for choice in choices) == "one two three "
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", "STOP")
    await cluster.worker.cancelled.wait()


async def test_a_stop_string_may_be_included(cluster: FakeCluster, openai: AsyncOpenAI) -> None:
    cluster.worker.answer = "one two three"
    answer = await openai.completions.create(
        model=MODEL, prompt="count", stop=" two", extra_body={"include_stop_str_in_output": True}
    )
    assert answer.choices[0].text == "one two"


async def test_a_stop_token_of_the_client_is_named(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    body = {"model": MODEL, "prompt": "hi"}
    plain = (await http.post("/v1/completions", json=body)).json()["choices"][0]
    assert (plain["finish_reason"], plain["stop_reason"]) == ("stop", None)
    named = (await http.post("/v1/completions", json={**body, "stop_token_ids": [EOS, 7]})).json()["choices"][0]
    assert (named["finish_reason"], named["stop_reason"]) == ("stop", EOS)
    assert cluster.worker.requests[-1].sampling.stop_token_ids == (EOS, 7)
    ignoring = (await http.post("/v1/completions", json={**body, "ignore_eos": True})).json()["choices"][0]
    assert ignoring["finish_reason"] == "length"
    assert cluster.worker.requests[-1].sampling.stop_token_ids == ()


async def test_token_ids_on_request(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    answer_ids = cluster.tokenizer.encode("hello there", add_special_tokens=False)
    completion = {"model": MODEL, "prompt": "hi", "return_token_ids": True}
    choice = (await http.post("/v1/completions", json=completion)).json()["choices"][0]
    assert choice["token_ids"] == answer_ids
    assert choice["prompt_token_ids"] == cluster.tokenizer.encode("hi")
    _, events = await sse(http, "/v1/chat/completions", {"messages": USER, "return_token_ids": True})
    streamed = [token for event in events[:-1] for token in event["choices"][0].get("token_ids", [])]
    assert streamed == answer_ids
    assert events[0]["prompt_token_ids"] == list(cluster.worker.requests[-1].prompt_token_ids)


async def test_text_split_inside_characters_arrives_whole(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    cluster.worker.answer = "żółw 🐢 日本"
    _, events = await sse(http, "/v1/chat/completions", {"messages": USER})
    pieces = [event["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert "".join(pieces) == "żółw 🐢 日本"
    assert not any("\ufffd" in piece for piece in pieces)


async def test_timings_extension(http: httpx.AsyncClient) -> None:
    body = {"model": MODEL, "messages": USER}
    assert "timings" not in (await http.post("/v1/chat/completions", json=body)).json()
    timings = (await http.post("/v1/chat/completions", json={**body, "pdserve_timings": True})).json()["timings"]
    assert sum(timings["stages_ms"].values()) == pytest.approx(timings["ttft_ms"], abs=0.1)
    assert timings["total_ms"] >= timings["ttft_ms"] > 0
    assert (timings["prefill_worker"], timings["decode_worker"]) == ("tiny/prefill/0", "tiny/decode/0")
    assert (timings["transport"], timings["cached_tokens"], timings["transfer_bytes"]) == ("shm", 3, 4096)
    _, events = await sse(http, "/v1/chat/completions", {"messages": USER, "pdserve_timings": True})
    assert events[-2]["choices"] == []
    assert events[-2]["timings"]["decode_worker"] == "tiny/decode/0"
    by_header = await http.post("/v1/chat/completions", json=body, headers={"x-pdserve-timings": "1"})
    assert "timings" in by_header.json()


async def test_models(openai: AsyncOpenAI) -> None:
    listed = [model.id async for model in openai.models.list()]
    assert listed == [MODEL, "small"]
    model = await openai.models.retrieve("small")
    assert (model.owned_by, model.created, model.max_model_len) == ("pdserve", 1_700_000_000, CONTEXT)
    with pytest.raises(NotFoundError) as raised:
        await openai.models.retrieve("a/b")
    assert raised.value.code == "model_not_found"


async def test_an_alias_is_the_model(cluster: FakeCluster, openai: AsyncOpenAI) -> None:
    answer = await openai.chat.completions.create(model="small", messages=USER)
    assert answer.model == MODEL
    assert cluster.worker.requests[-1].model == MODEL


async def test_tokenize_and_detokenize(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    ids = cluster.tokenizer.encode("the hot word")
    reply = (await http.post("/tokenize", json={"model": MODEL, "prompt": "the hot word", "return_token_strs": True})).json()
    assert (reply["tokens"], reply["count"], reply["max_model_len"]) == (ids, len(ids), CONTEXT)
    assert "".join(reply["token_strs"]) == "the hot word"
    assert (await http.post("/detokenize", json={"tokens": ids})).json() == {"prompt": "the hot word"}
    chat = (await http.post("/tokenize", json={"messages": USER})).json()
    await http.post("/v1/chat/completions", json={"model": MODEL, "messages": USER})
    assert chat["tokens"] == list(cluster.worker.requests[-1].prompt_token_ids)
    assert (await http.post("/detokenize", json={"tokens": [999_999]})).json()["error"]["param"] == "tokens"
    assert (await http.get("/tokenizer_info")).json()["eos_token"] == "<|im_end|>"


async def test_request_ids(http: httpx.AsyncClient) -> None:
    body = {"model": MODEL, "messages": USER}
    given = await http.post("/v1/chat/completions", json=body, headers={"X-Request-Id": "mine-1"})
    assert (given.headers["x-request-id"], given.json()["id"]) == ("mine-1", "chatcmpl-mine-1")
    for bad in ("x" * 129, "tab\tin it"):
        drawn = (await http.get("/version", headers={"X-Request-Id": bad})).headers["x-request-id"]
        assert len(drawn) == 32
        assert int(drawn, 16)


async def test_the_same_request_id_twice_is_two_requests_at_the_worker(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    for _ in range(2):
        await http.post("/v1/completions", json={"model": MODEL, "prompt": "x"}, headers={"X-Request-Id": "same"})
    first, second = (request.request_id for request in cluster.worker.requests)
    assert first != second
    assert first.startswith("same-")


async def test_health_ready_version_metrics(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    assert ((await http.get("/health")).status_code, (await http.get("/health")).content) == (200, b"")
    ready = await http.get("/ready")
    assert (ready.status_code, ready.json()["models"]) == (200, [MODEL])
    assert (await http.get("/version")).json()["version"]
    await http.post("/v1/chat/completions", json={"model": MODEL, "messages": USER})
    await http.post("/v1/chat/completions", json={"model": "nobody", "messages": USER})
    metrics = await http.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = metrics.text.splitlines()
    endpoint = 'endpoint="/v1/chat/completions"'
    assert f'pdserve_router_requests_total{{{endpoint},model_name="{MODEL}",status="200"}} 1.0' in lines
    assert f'pdserve_router_requests_total{{{endpoint},model_name="",status="404"}} 1.0' in lines
    assert f'vllm:time_to_first_token_seconds_count{{model_name="{MODEL}"}} 1.0' in lines
    assert f'pdserve_router_inflight_requests{{model_name="{MODEL}"}} 0.0' in lines
    tokens = len(cluster.tokenizer.encode("hello there", add_special_tokens=False)) + 1
    assert f'vllm:generation_tokens_total{{model_name="{MODEL}"}} {tokens}.0' in lines


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("field", "value", "more"),
    [
        ("presence_penalty", 2.5, {}),
        ("frequency_penalty", -2.5, {}),
        ("repetition_penalty", 0, {}),
        ("logit_bias", {"999999": 1}, {}),
        ("logit_bias", {"7": 200}, {}),
        ("allowed_token_ids", [], {}),
        ("allowed_token_ids", [999_999], {}),
        ("allowed_token_ids", [-1], {}),
        ("bad_words", ["fine", ""], {}),
        # Nothing would be left to draw.
        ("allowed_token_ids", [7], {"logit_bias": {"7": -100}}),
        ("allowed_token_ids", [EOS], {"min_tokens": 1}),
        ("logit_bias", "all", {}),
    ],
)
async def test_rules_that_cannot_be_kept_are_refused_by_name(
    cluster: FakeCluster, http: httpx.AsyncClient, path: str, field: str, value: object, more: dict[str, object]
) -> None:
    if value == "all":
        value = {str(token_id): -100 for token_id in range(cluster.tokenizer.vocab_size)}
    body = {"model": MODEL, "max_tokens": 4, field: value, **more, **({"messages": USER} if "chat" in path else {"prompt": "hi"})}
    answer = await http.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert not cluster.worker.requests


async def test_rules_reach_the_worker(cluster: FakeCluster, openai: AsyncOpenAI) -> None:
    extra = {"repetition_penalty": 1.2, "allowed_token_ids": [7, 8], "bad_words": ["the word"]}
    for ask in (openai.chat.completions.create, openai.completions.create):
        prompt = {"messages": USER} if ask == openai.chat.completions.create else {"prompt": ["a", "b"]}
        await ask(model=MODEL, **prompt, presence_penalty=0.5, frequency_penalty=-0.5, logit_bias={"7": 3}, extra_body=extra)
    encode = cluster.tokenizer.encode
    assert len(cluster.worker.requests) == 3
    for request in cluster.worker.requests:
        sampling = request.sampling
        assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.5, -0.5, 1.2)
        assert (sampling.logit_bias, sampling.allowed_token_ids) == (((7, 3.0),), (7, 8))
        assert sampling.bad_words == (tuple(encode("the word")), tuple(encode(" the word")))


async def test_context_overflow_names_the_limit(cluster: FakeCluster, openai: AsyncOpenAI) -> None:
    with pytest.raises(BadRequestError) as too_long:
        await openai.completions.create(model=MODEL, prompt=[5] * CONTEXT)
    assert (too_long.value.code, too_long.value.param) == ("context_length_exceeded", "prompt")
    assert str(CONTEXT) in too_long.value.message
    with pytest.raises(BadRequestError) as too_much:
        await openai.completions.create(model=MODEL, prompt=[5] * 100, max_tokens=CONTEXT - 99)
    assert (too_much.value.code, too_much.value.param) == ("context_length_exceeded", "max_tokens")
    fits = await openai.completions.create(model=MODEL, prompt=[5] * 100, max_tokens=CONTEXT - 100)
    assert fits.choices[0].text == "hello there"
    assert len(cluster.worker.requests) == 1  # no worker heard of the others
