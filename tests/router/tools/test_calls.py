"""Tool calls on both faces of the router, from workers that say what the test tells them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from common.chat_template import ChatTemplate
from common.rpc import connect
from common.types import GrammarKind
from common.wire import inference_pb2 as pb
from common.wire.inference_pb2_grpc import InferenceStub
from router.schemas import ChatBody, parse
from router.tools.definitions import Toolbox, toolbox
from router.tools.families import HERMES, LLAMA3, MISTRAL, MISTRAL_NAME_FIRST, calls_grammar, family_of
from router.tools.rendering import as_plain_messages, for_template
from support.fake_cluster import MODEL, FakeCluster
from support.json_schemas import WRONG
from support.router_clients import http_client

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": CITY}}]
ASK: list[Any] = [{"role": "user", "content": "go"}]
CALL = '<tool_call>\n{"name": "f", "arguments": {"city": "Köln"}}\n</tool_call>'
SAID = f"Well. {CALL}\n{CALL}"


@pytest.fixture
async def cluster(start_cluster: Callable[[], AbstractAsyncContextManager[FakeCluster]]) -> AsyncIterator[FakeCluster]:
    """Descriptions of tools take more tokens than the usual little cluster has."""
    async with start_cluster() as running:
        running.worker.max_model_tokens = 4096
        running.publish()
        async with http_client(running) as client, asyncio.timeout(120):
            while (await client.get("/v1/models")).json()["data"][0]["max_model_len"] != 4096:
                await asyncio.sleep(0.005)
        yield running


async def test_calls_are_read_and_streamed_as_openai_does(cluster: FakeCluster, openai: AsyncOpenAI) -> None:
    cluster.worker.answer = SAID
    common: dict[str, Any] = {"model": MODEL, "messages": ASK, "tools": TOOLS, "n": 2, "max_tokens": 200}
    whole = await openai.chat.completions.create(**common)
    assert len(whole.choices) == 2
    for choice in whole.choices:
        assert (choice.message.content, choice.finish_reason) == ("Well.", "tool_calls")
        assert [call.function.arguments for call in choice.message.tool_calls or ()] == ['{"city": "Köln"}'] * 2
    assert len({call.id for choice in whole.choices for call in choice.message.tool_calls or ()}) == 4
    content = {0: "", 1: ""}
    calls: dict[int, list[str]] = {0: [], 1: []}
    async for chunk in await openai.chat.completions.create(stream=True, **common):
        for part in chunk.choices:
            content[part.index] += part.delta.content or ""
            for call in part.delta.tool_calls or ():
                assert call.function is not None
                if call.id is not None:
                    assert (call.function.name, call.index) == ("f", len(calls[part.index]))
                    calls[part.index].append("")
                calls[part.index][call.index] += call.function.arguments or ""
            assert part.finish_reason in (None, "tool_calls")
    assert content == {0: "Well.", 1: "Well."}
    assert calls == {0: ['{"city": "Köln"}'] * 2, 1: ['{"city": "Köln"}'] * 2}


async def test_what_is_no_call_is_content_and_a_cut_answer_says_so(cluster: FakeCluster, openai: AsyncOpenAI) -> None:
    common: dict[str, Any] = {"model": MODEL, "messages": ASK, "max_tokens": 200}
    cluster.worker.answer = '<tool_call>{"name": "other", "arguments": {}}</tool_call>'
    answer = (await openai.chat.completions.create(tools=TOOLS, **common)).choices[0]
    assert (answer.message.content, answer.message.tool_calls, answer.finish_reason) == (cluster.worker.answer, None, "stop")
    cluster.worker.answer = CALL
    for arguments in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        unread = (await openai.chat.completions.create(**common, **arguments)).choices[0]
        assert (unread.message.content, unread.finish_reason) == (CALL, "stop")
    cluster.worker.answer = CALL + CALL
    limit = len(cluster.tokenizer.encode(CALL, add_special_tokens=False)) + 5
    cut = (await openai.chat.completions.create(tools=TOOLS, **{**common, "max_tokens": limit})).choices[0]
    assert cut.finish_reason == "length"
    assert cut.message.tool_calls
    assert (cut.message.content or "") != ""  # the beginning of the second call: no character is lost


async def test_grpc_says_the_same(cluster: FakeCluster) -> None:
    cluster.worker.answer = SAID
    channel = connect(cluster.grpc_address, None)
    history = [
        pb.ChatMessage(role="user", content="go"),
        pb.ChatMessage(role="assistant", tool_calls=[pb.ToolCall(id="call_1", name="f", arguments='{"city": "x"}')]),
        pb.ChatMessage(role="tool", tool_call_id="call_1", content="rain"),
    ]
    tool = pb.Tool(name="f", description="d", parameters=json.dumps(CITY))
    request = pb.InferenceRequest(model=MODEL, chat=pb.ChatMessages(messages=history), tools=[tool], max_tokens=200)
    events = [event async for event in InferenceStub(channel).Generate(request)]
    assert "".join(event.text for event in events) == "Well."
    deltas = [delta for event in events for delta in event.tool_calls]
    assert [delta.index for delta in deltas if delta.id] == [0, 1]
    assert "".join(delta.arguments for delta in deltas if delta.index == 1) == '{"city": "Köln"}'
    assert [event.finish_reason for event in events if event.finish_reason] == ["tool_calls"]
    forced = pb.InferenceRequest(model=MODEL, chat=pb.ChatMessages(messages=history[:1]), tools=[tool], called_tool="f")
    assert [event async for event in InferenceStub(channel).Generate(forced)]
    grammar = cluster.worker.requests[-1].sampling.grammar
    assert grammar is not None
    assert grammar.kind is GrammarKind.LARK
    await channel.close()


async def test_a_tool_whose_schema_cannot_be_kept(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", **WRONG["dependent"]}}}]
    body = {"model": MODEL, "messages": ASK, "tools": tools, "tool_choice": "required"}
    answer = await http.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
    both = {**body, "tools": TOOLS, "response_format": {"type": "json_object"}}
    assert (await http.post("/v1/chat/completions", json=both)).status_code == 400


def tools_of(choice: Any = None) -> Toolbox:
    found = toolbox(TOOLS, choice, None)
    assert found is not None
    return found


def test_a_template_that_knows_no_tools_gets_plain_messages() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"city":"Köln"}'}}
    messages = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_call_id": "call_1"},
    ]
    system, *rest = as_plain_messages(messages, tools_of())
    assert system["role"] == "system"
    assert json.dumps(TOOLS[0], ensure_ascii=False) in system["content"]
    assert rest == [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": '<tool_call>\n{"name": "f", "arguments": {"city": "Köln"}}\n</tool_call>'},
        {"role": "user", "content": "<tool_response>\nrain\n</tool_response>"},
    ]
    with_system = as_plain_messages([{"role": "system", "content": "Be kind."}, messages[0]], tools_of())
    assert with_system[0]["content"].startswith("Be kind.\n\n")
    assert len(with_system) == 2
    assert as_plain_messages(messages[:1], None) == messages[:1]
    (given,) = for_template([messages[1]])
    assert given["tool_calls"][0]["function"]["arguments"] == {"city": "Köln"}
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == '{"city":"Köln"}'


@pytest.mark.parametrize(
    ("source", "family"),
    [
        ("{{ messages }}", HERMES),
        ("{% if tools %}<tool_call>{{ tools }}{% endif %}", HERMES),
        ("{% if tools %}[AVAILABLE_TOOLS]{{ tools }}[TOOL_CALLS]{% endif %}", MISTRAL),
        ("{% if tools %}[AVAILABLE_TOOLS]{{ tools }}[TOOL_CALLS]{{ name }}[ARGS]{% endif %}", MISTRAL_NAME_FIRST),
        ("{% if tools %}<|python_tag|>{{ tools }}{% endif %}", LLAMA3),
        ("[TOOL_CALLS] in words only", HERMES),
    ],
)
def test_the_family_is_read_off_the_template(source: str, family: object) -> None:
    assert family_of(ChatTemplate(source)) is family


def test_choices_of_tools() -> None:
    assert tools_of().must_call == ()
    assert [tool.name for tool in tools_of("required").must_call] == ["f"]
    assert tools_of({"type": "function", "function": {"name": "f"}}).most_calls == 1
    assert toolbox(TOOLS, "none", None) is None
    assert toolbox([], None, None) is None
    assert parse(ChatBody, {"model": "m", "messages": ASK, "tools": TOOLS}).toolbox is not None
    for family in (HERMES, MISTRAL, MISTRAL_NAME_FIRST, LLAMA3):
        assert calls_grammar(family, tools_of("required")).startswith("start: ")
