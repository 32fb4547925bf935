"""What a client asks of an answer's form, from the wire to the worker; and grammars that are refused, in time and alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc.aio
import httpx
import pytest

from common.errors import InvalidRequest, Overloaded
from common.rpc import connect, error_from_rpc
from common.types import Grammar, GrammarKind
from common.wire import inference_pb2 as pb
from common.wire.inference_pb2_grpc import InferenceStub
from router.structured.examination import Examination
from router.structured.wanted import Wanted, wanted
from support.fake_cluster import MODEL, FakeCluster
from support.json_schemas import ENDLESS_WORK, USUAL, WRONG

SCHEMA = USUAL["person"]
TEXT = json.dumps(SCHEMA, separators=(",", ":"))
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": MODEL, "prompt": "hi"}
OBJECT = Grammar(GrammarKind.JSON_SCHEMA, '{"type":"object"}')
LARK = 'start: "a" | "b"'


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


FORMS: list[tuple[dict[str, Any], Grammar]] = [
    ({"response_format": schema_format(SCHEMA)}, Grammar(GrammarKind.JSON_SCHEMA, TEXT)),
    ({"response_format": {"type": "json_object"}}, OBJECT),
    ({"structured_outputs": {"json": SCHEMA}}, Grammar(GrammarKind.JSON_SCHEMA, TEXT)),
    ({"structured_outputs": {"json": TEXT, "regex": None}}, Grammar(GrammarKind.JSON_SCHEMA, TEXT)),
    ({"structured_outputs": {"json_object": True}}, OBJECT),
    ({"structured_outputs": {"regex": "a+"}}, Grammar(GrammarKind.REGEX, "a+")),
    ({"structured_outputs": {"choice": ["ja", "nö"]}}, Grammar(GrammarKind.CHOICE, '["ja", "nö"]')),
    ({"structured_outputs": {"grammar": LARK}}, Grammar(GrammarKind.LARK, LARK)),
    ({"guided_json": SCHEMA}, Grammar(GrammarKind.JSON_SCHEMA, TEXT)),
    ({"guided_regex": "[ab]"}, Grammar(GrammarKind.REGEX, "[ab]")),
    ({"guided_choice": ["x"]}, Grammar(GrammarKind.CHOICE, '["x"]')),
    ({"guided_grammar": LARK}, Grammar(GrammarKind.LARK, LARK)),
]


async def test_every_way_to_ask_reaches_the_worker(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    for given, grammar in FORMS:
        for path, body in (("chat/completions", CHAT), ("completions", COMPLETION)):
            answer = await http.post(f"/v1/{path}", json={**body, **given})
            assert answer.status_code == 200, answer.text
            assert cluster.worker.requests[-1].sampling.grammar == grammar
    await http.post("/v1/chat/completions", json={**CHAT, "response_format": {"type": "text"}})
    assert cluster.worker.requests[-1].sampling.grammar is None


@pytest.fixture
async def stub(cluster: FakeCluster) -> AsyncIterator[InferenceStub]:
    channel = connect(cluster.grpc_address, None)
    yield InferenceStub(channel)
    await channel.close()


async def test_grpc_asks_for_the_same(cluster: FakeCluster, stub: InferenceStub) -> None:
    forms = [
        (pb.StructuredOutputs(json=TEXT), Grammar(GrammarKind.JSON_SCHEMA, TEXT)),
        (pb.StructuredOutputs(json_object=True), OBJECT),
        (pb.StructuredOutputs(regex="a+"), Grammar(GrammarKind.REGEX, "a+")),
        (pb.StructuredOutputs(choice=pb.Choices(texts=["ja", "nö"])), Grammar(GrammarKind.CHOICE, '["ja", "nö"]')),
    ]
    for form, grammar in forms:
        assert [event async for event in stub.Generate(pb.InferenceRequest(model=MODEL, prompt="hi", structured_outputs=form))]
        assert cluster.worker.requests[-1].sampling.grammar == grammar
    wrong = pb.InferenceRequest(model=MODEL, prompt="hi", structured_outputs=pb.StructuredOutputs(regex="("))
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await anext(aiter(stub.Generate(wrong)))
    error = error_from_rpc(raised.value)
    assert (type(error), error.param) == (InvalidRequest, "structured_outputs.regex")


async def test_what_cannot_be_kept_is_a_400_that_names_the_field(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    for schema in list(WRONG.values())[:6]:
        answer = await http.post("/v1/chat/completions", json={**CHAT, "response_format": schema_format(schema)})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "response_format.json_schema.schema"
    both = await http.post(
        "/v1/completions", json={**COMPLETION, "guided_regex": "a", "response_format": {"type": "json_object"}}
    )
    assert (both.status_code, both.json()["error"]["param"]) == (400, "guided_regex")
    assert not cluster.worker.requests


async def test_what_takes_too_long_or_takes_the_compiler_down_ends_alone() -> None:
    """Its process is killed, others go on, and the verdict is remembered."""
    examination = Examination(0.4)
    endless = wanted({"guided_json": ENDLESS_WORK})
    assert endless is not None
    try:
        good = [Wanted(GrammarKind.REGEX, f"a{{{index}}}", "guided_regex") for index in range(1, 9)]
        with pytest.raises(InvalidRequest, match=r"0\.4 s"):
            await examination.examine(endless)
        found = await asyncio.gather(*map(examination.examine, [endless, *good]), return_exceptions=True)
        assert isinstance(found[0], InvalidRequest)
        assert found[0].param == "guided_json"
        assert found[1:] == [Grammar(GrammarKind.REGEX, item.text) for item in good]
        for examiner in examination._idle:  # by something else than a grammar
            examiner._process.kill()
            await examiner._process.wait()
        assert (await examination.examine(Wanted(GrammarKind.REGEX, "b", "guided_regex"))).text == "b"
        (working,) = examination._idle
        asked = asyncio.create_task(examination.examine(replace(endless, text=endless.text + " ")))
        while working in examination._idle:
            await asyncio.sleep(0)
        working._process.kill()
        with pytest.raises(InvalidRequest, match="compiler"):
            await asked
        assert (await examination.examine(Wanted(GrammarKind.REGEX, "c", "guided_regex"))).text == "c"
    finally:
        await examination.close()
    assert not examination._idle


async def test_a_client_that_leaves_frees_its_place() -> None:
    examination = Examination(30.0)
    endless = wanted({"guided_json": ENDLESS_WORK})
    assert endless is not None
    try:
        waiting = [asyncio.create_task(examination.examine(endless)) for _ in range(3)]
        async with asyncio.timeout(120):
            while not examination._free.locked():
                await asyncio.sleep(0.01)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        assert (await examination.examine(Wanted(GrammarKind.REGEX, "x", "guided_regex"))).text == "x"
    finally:
        await examination.close()


async def test_too_many_at_a_time_are_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.structured.examination._MAX_WAITING", 2)
    examination = Examination(5.0)
    try:
        asked = [examination.examine(Wanted(GrammarKind.REGEX, text, "guided_regex")) for text in "abc"]
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(item) for item in found] == [Grammar, Grammar, Overloaded]
    finally:
        await examination.close()
