"""Forms and tools as clients of HTTP meet them: openai-python, a real router, real workers; with the default model as well."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jsonschema
import pytest
from openai import AsyncOpenAI, BadRequestError, DefaultAsyncHttpxClient
from pydantic import BaseModel, Field

from common.config import DecodeConfig, EngineConfig
from support.served import served
from support.tiny_models import make_tiny_model
from support.workers import running_workers

if TYPE_CHECKING:
    from common.model_store import ModelFiles

ENGINE = EngineConfig(dtype="float32", exact=True, kv_pool_tokens=8192)
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Köln"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather of the next days", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
ASK: list[Any] = [{"role": "user", "content": "What will the weather be in Oslo over the next three days?"}]


@asynccontextmanager
async def client_of(path: Path, engine: EngineConfig, name: str, *, num_prefill: int = 1) -> AsyncIterator[AsyncOpenAI]:
    decode = DecodeConfig(local_prefill="never" if num_prefill else "always")
    async with (
        running_workers(path, engine=engine, decode=decode, name=name, num_prefill=num_prefill, transports=("shm",)) as workers,
        served(workers, path, name=name) as url,
        DefaultAsyncHttpxClient(trust_env=False) as http,
    ):
        yield AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http)


async def streamed(client: AsyncOpenAI, **arguments: Any) -> tuple[str, list[dict[str, Any]], str | None]:
    """What a client adds up from chunks: content, calls, finish reason."""
    content, calls, finish = "", [], None
    async for chunk in await client.chat.completions.create(stream=True, **arguments):
        for choice in chunk.choices:
            content += choice.delta.content or ""
            finish = choice.finish_reason or finish
            for call in choice.delta.tool_calls or ():
                if call.id is not None:
                    assert call.index == len(calls)
                    assert call.type == "function"
                    calls.append({"name": call.function.name, "arguments": ""})
                calls[call.index]["arguments"] += call.function.arguments
    return content, calls, finish


async def test_tools_that_must_be_called_are(tmp_path: Path) -> None:
    """Whatever the weights: these are random."""
    async with client_of(make_tiny_model(tmp_path, seed=5), ENGINE, "tiny") as client:
        common = {"model": "tiny", "messages": ASK, "tools": TOOLS, "temperature": 0.9, "max_tokens": 400, "seed": 3}
        named = {"type": "function", "function": {"name": "get_weather"}}
        for choice, parallel in ((named, True), ("required", False), ("required", True)):
            arguments: dict[str, Any] = {**common, "tool_choice": choice, "parallel_tool_calls": parallel}
            whole = (await client.chat.completions.create(n=2, **arguments)).choices
            for answer in whole:
                calls = answer.message.tool_calls
                assert calls
                assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
                assert all(call.id.startswith("call_") for call in calls)
                for call in calls:
                    schema = WEATHER if call.function.name == "get_weather" else {"type": "object", "maxProperties": 0}
                    jsonschema.validate(json.loads(call.function.arguments), schema)
                if choice is named:
                    assert [call.function.name for call in calls] == ["get_weather"]
                assert parallel or len(calls) == 1
            content, calls_streamed, finish = await streamed(client, **arguments)
            assert (content, finish) == ("", "tool_calls")
            assert calls_streamed == [
                {"name": call.function.name, "arguments": call.function.arguments} for call in whole[0].message.tool_calls or ()
            ]
        cut = (await client.chat.completions.create(**{**common, "max_tokens": 45}, tool_choice=named)).choices[0]
        assert cut.finish_reason == "length"
        free = (await client.chat.completions.create(**{**common, "max_tokens": 20}, tool_choice="auto")).choices[0]
        assert free.message.content
        assert not free.message.tool_calls


async def test_a_hostile_schema_is_refused_while_others_stream(tmp_path: Path) -> None:
    async with client_of(make_tiny_model(tmp_path, seed=5), ENGINE, "tiny") as client:
        common: dict[str, Any] = {"model": "tiny", "messages": ASK, "max_tokens": 200, "temperature": 0}
        alone = await streamed(client, **common)
        hostile = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer", "multipleOf": 999_983}}}
        neighbours = [asyncio.create_task(streamed(client, **common)) for _ in range(3)]
        with pytest.raises(BadRequestError) as raised:
            await client.chat.completions.create(**common, response_format=hostile)  # type: ignore[arg-type]
        assert raised.value.param == "response_format.json_schema.schema"
        assert await asyncio.gather(*neighbours) == [alone] * 3


class Person(BaseModel):
    name: str = Field(max_length=30)
    age: int = Field(ge=0, le=150)
    mood: Literal["glad", "sad"]


@pytest.mark.model
async def test_the_default_model_fills_a_form_and_calls_a_tool(smollm2: ModelFiles) -> None:
    engine = EngineConfig(dtype="float32", kernels="torch", kv_pool_tokens=8192)
    async with client_of(smollm2.path, engine, "smollm2", num_prefill=0) as client:
        story: list[Any] = [{"role": "user", "content": "Ada Lovelace, 36 years old, is glad. Who is she? Answer in JSON."}]
        answer = await client.chat.completions.parse(
            model="smollm2", messages=story, response_format=Person, temperature=0, max_tokens=120
        )
        person = answer.choices[0].message.parsed
        assert person is not None
        assert "Ada" in person.name
        assert answer.choices[0].finish_reason == "stop"
        named: Any = {"type": "function", "function": {"name": "get_weather"}}
        content, calls, finish = await streamed(
            client, model="smollm2", messages=ASK, tools=TOOLS, tool_choice=named, temperature=0, max_tokens=120
        )
        assert (content, finish) == ("", "tool_calls")
        assert [call["name"] for call in calls] == ["get_weather"]
        assert json.loads(calls[0]["arguments"])["city"] == "Oslo"
