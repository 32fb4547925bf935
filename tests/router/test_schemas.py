from __future__ import annotations

from functools import reduce
from typing import Any

import pytest
from pydantic import BaseModel

from common.errors import InvalidRequest
from router.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, parse

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "hi"}

FUNCTION: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
BAD_SCHEMAS: list[Any] = [3, [], "[", "3", {"const": "x" * 70_000}, reduce(lambda inner, _: {"items": inner}, range(65), {})]
FORM = {"response_format", "structured_outputs", "guided_json", "tools", "tool_choice", "parallel_tool_calls"}

# field, values that are refused in both kinds of body; each must name the field
REFUSED: list[tuple[str, list[Any]]] = [
    ("model", ["", 5, ["m"]]),
    ("stream", ["true", 1]),
    ("n", [0, -1, "2", 1.5, True]),
    ("max_tokens", [-1, "16", 2.5, True]),
    ("temperature", [-0.1, 2.1, "1", True, float("nan"), float("inf")]),
    ("top_p", [0, -1, 1.01, "1"]),
    ("top_k", [-2, 1.5, "1"]),
    ("min_p", [-0.1, 1.1]),
    ("min_tokens", [-1, "1"]),
    ("seed", [2**63, -(2**63) - 1, "1", 1.5]),
    ("stop", [5, [5], ["a"] * 9, ["x" * 129], ["é" * 65], [""], "", {"a": 1}]),
    ("stop_token_ids", ["1", [1] * 65]),
    ("stop_token_ids[1]", [[1, 1.5], [1, "1"], [1, True]]),
    ("ignore_eos", ["yes", 1]),
    ("include_stop_str_in_output", ["yes"]),
    ("skip_special_tokens", ["no"]),
    ("return_token_ids", [1]),
    ("presence_penalty", [2.01, -2.01, "1", True, float("nan")]),
    ("frequency_penalty", [2.01, -2.01, "1", True, float("inf")]),
    ("repetition_penalty", [0, 0.009, -1, 10.01, "1", True, float("nan")]),
    (
        "logit_bias",
        [
            [],
            "x",
            5,
            [[5, 1]],
            {"a": 1},
            {"-1": 1},
            {"1.0": 1},
            {"": 1},
            {" 5": 1},
            {"٣": 1},
            {"5": 1, "05": 2},
            {"9" * 11: 1},
            {"5": "1"},
            {"5": True},
            {"5": None},
            {"5": 100.5},
            {"5": -101},
            {"5": float("nan")},
            {"5": float("inf")},
            {"5": [1]},
            {str(i): 1 for i in range(1025)},
        ],
    ),
    ("allowed_token_ids", [[], "1", 5, [1] * 1025]),
    ("allowed_token_ids[1]", [[1, "1"], [1, True], [1, 1.0]]),
    ("bad_words", ["no", [5], [""], ["x"] * 129, ["é" * 65], {"a": 1}]),
    # not offered here
    ("response_format.type", [{"type": "structural_tag"}, "text", []]),
    ("response_format.json_schema", [{"type": "json_schema"}, {"type": "json_schema", "json_schema": {"name": 3, "schema": {}}}]),
    ("response_format.json_schema.schema", [{"type": "json_schema", "json_schema": {"schema": value}} for value in BAD_SCHEMAS]),
    ("functions", [[{"name": "f"}]]),
    ("function_call", [{"name": "f"}]),
    ("structured_outputs", ["json"]),
    ("structured_outputs.json", [{"json": value} for value in BAD_SCHEMAS]),
    ("structured_outputs.regex", [{"regex": value} for value in (3, "", "a" * 70_000, "\ud800")] + [{"json": {}, "regex": "a"}]),
    ("structured_outputs.choice", [{"choice": value} for value in ([], "yes", [1], ["a", ""], ["x"] * 1025)]),
    ("structured_outputs.grammar", [{"grammar": {}}]),
    ("structured_outputs.json_object", [{"json_object": "yes"}]),
    ("structured_outputs.whitespace_pattern", [{"json": {}, "whitespace_pattern": " *"}]),
    ("guided_json", ["{", 3]),
    ("guided_regex", [["a+"]]),
    ("guided_new_thing", ["x"]),
    ("best_of", [2, 0, "1", True]),
    ("suffix", ["end"]),
    ("prompt_embeds", ["AAAA"]),
    ("truncate_prompt_tokens", [10, -1]),
    ("prompt_logprobs", [0, 1]),
    ("priority", [1, -1]),
    ("cache_salt", ["mine"]),
    ("chat_template", ["{{ 1 }}"]),
    ("reasoning_effort", ["high"]),
    ("modalities", [["text", "audio"]]),
    ("return_tokens_as_token_ids", [True]),
    # internal
    ("kv_transfer_params", [{"do_remote_prefill": True}, {}]),
    ("bootstrap_host", ["10.0.0.1"]),
    ("bootstrap_room", [7]),
    ("data_parallel_rank", [0]),
]
CHAT_REFUSED: list[tuple[str, list[Any]]] = [
    ("messages", [[], "hi", [{"role": "user", "content": "x"}] * 1025]),
    ("messages[0]", [["hi"]]),
    ("messages[0].role", [[{"content": "x"}], [{"role": "wizard", "content": "x"}]]),
    (
        "messages[0].content",
        [
            [{"role": "user", "content": 5}],
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
            [{"role": "user", "content": [{"type": "input_audio"}]}],
            [{"role": "user", "content": [{"type": "text"}]}],
            [{"role": "user", "content": ["text"]}],
        ],
    ),
    ("messages[0].tool_calls[0].function", [[{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]]),
    ("tools", ["f", [{"type": "function", "function": {"name": "f"}}] * 2, [FUNCTION] * 129]),
    ("tools[0]", [[3], [{"type": "retrieval"}], [{"type": "function"}]]),
    ("tools[0].function.name", [[{"type": "function", "function": {"name": name}}] for name in ("", "a b", "x" * 65, None)]),
    ("tools[0].function.parameters", [[{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]]),
    ("tool_choice", ["required", "always", {"type": "function", "function": {"name": "f"}}]),
    ("max_completion_tokens", [-1, "5"]),
    ("logprobs", [5, "true"]),
    ("top_logprobs", [-1, 21, "2"]),
    ("echo", [True]),
    ("continue_final_message", ["yes"]),
    ("chat_template_kwargs", ["x", {"messages": []}, {"a b": 1}, {"deep": {"er": 1}}, {str(i): i for i in range(17)}]),
]
COMPLETION_REFUSED: list[tuple[str, list[Any]]] = [
    ("tools", [[FUNCTION]]),
    ("tool_choice", ["required"]),
    ("prompt", [5, [], ["a", 5], [[1], "a"], [["a"]], [1.5], [True], {"a": 1}, ["a"] * 257]),
    ("logprobs", [-1, 21, True, "1"]),
    ("echo", ["yes"]),
    ("add_special_tokens", [0]),
]
NEUTRAL: dict[str, Any] = {
    "response_format": {"type": "text"}, "tool_choice": "none", "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0,
    "repetition_penalty": 1.0, "best_of": 1, "suffix": "", "structured_outputs": {}, "guided_json": "", "priority": 0,
    "user": "u", "service_tier": "auto", "metadata": {"a": "b"}, "store": True, "parallel_tool_calls": False, "functions": [],
    "stream_options": {"include_usage": None}, "skip_special_tokens": True, "spaces_between_special_tokens": True,
    "something_from_the_future": {"deep": [1]}, "cache_salt": "", "chat_template": "", "reasoning_effort": "none", "tools": [],
}  # fmt: skip


def cases(table: list[tuple[str, list[Any]]]) -> list[Any]:
    return [pytest.param(field, value, id=f"{field}={str(value)[:30]}") for field, values in table for value in values]


def refused(kind: type[BaseModel], body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        parse(kind, body)
    assert raised.value.param == param
    assert raised.value.message


@pytest.mark.parametrize(("field", "value"), cases(REFUSED))
def test_wrong_and_unsupported_values_name_their_field(field: str, value: Any) -> None:
    given = {field.replace(".", "[").partition("[")[0]: value}
    refused(ChatBody, {**CHAT, **given}, field)
    refused(CompletionBody, {**COMPLETION, **given}, field)


@pytest.mark.parametrize(("field", "value"), cases(CHAT_REFUSED))
def test_chat_fields(field: str, value: Any) -> None:
    refused(ChatBody, {**CHAT, field.replace(".", "[").partition("[")[0]: value}, field)


@pytest.mark.parametrize(("field", "value"), cases(COMPLETION_REFUSED))
def test_completion_fields(field: str, value: Any) -> None:
    refused(CompletionBody, {**COMPLETION, field: value}, field)


@pytest.mark.parametrize("field", ["model", "messages"])
def test_missing_fields(field: str) -> None:
    refused(ChatBody, {name: value for name, value in CHAT.items() if name != field}, field)


@pytest.mark.parametrize("data", [[], "x", None, 5])
def test_a_body_is_an_object(data: Any) -> None:
    with pytest.raises(InvalidRequest):
        parse(ChatBody, data)


@pytest.mark.parametrize("field", [field for field, _ in REFUSED if field.isidentifier() and field != "model"])
def test_null_is_the_same_as_absent(field: str) -> None:
    assert parse(ChatBody, {**CHAT, field: None}) == parse(ChatBody, CHAT)
    assert parse(CompletionBody, {**COMPLETION, field: None}) == parse(CompletionBody, COMPLETION)


def test_neutral_harmless_and_unknown_fields_change_nothing() -> None:
    chat, completion = parse(ChatBody, {**CHAT, **NEUTRAL}), parse(CompletionBody, {**COMPLETION, **NEUTRAL})
    assert chat.model_dump(exclude=FORM) == parse(ChatBody, CHAT).model_dump(exclude=FORM)
    assert completion.model_dump(exclude=FORM) == parse(CompletionBody, COMPLETION).model_dump(exclude=FORM)
    assert chat.form is completion.form is chat.toolbox is None


def test_tools_are_let_through_when_they_must_not_be_called() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert parse(ChatBody, {**CHAT, "tools": tools, "tool_choice": "none"}).toolbox is None
    assert parse(ChatBody, {**CHAT, "tools": tools}).toolbox is not None


def test_best_of_may_equal_n() -> None:
    assert parse(CompletionBody, {**COMPLETION, "n": 3, "best_of": 3}).n == 3


@pytest.mark.parametrize(
    ("prompt", "parsed"),
    [("a", ("a",)), (["a", "b"], ("a", "b")), ([1, 2], ((1, 2),)), ([[1], [2, 3]], ((1,), (2, 3)))],
)
def test_kinds_of_prompts(prompt: Any, parsed: Any) -> None:
    assert parse(CompletionBody, {**COMPLETION, "prompt": prompt}).prompt == parsed


def test_text_parts_become_one_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = parse(ChatBody, {**CHAT, "messages": [{"role": "user", "content": parts}]})
    assert body.messages[0].content == "a\nb"


def test_the_limits_themselves_are_allowed() -> None:
    body = {**COMPLETION, "stop": ["x" * 128] * 8, "seed": -(2**63), "temperature": 2, "top_p": 1, "top_k": -1, "logprobs": 20}
    assert parse(CompletionBody, body).stop == ("x" * 128,) * 8
    assert parse(ChatBody, {**CHAT, "stop": "one"}).stop == ("one",)


def test_bias_keys_are_strings_in_json_and_numbers_in_grpc() -> None:
    for bias in ({"5": -100, "7": 0.5}, {5: -100, 7: 0.5}):
        assert parse(ChatBody, {**CHAT, "logit_bias": bias}).logit_bias == ((5, -100.0), (7, 0.5))


def test_the_limits_of_rules_are_allowed() -> None:
    rules: dict[str, Any] = {
        "presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 0.01,
        "logit_bias": {str(i): 100 for i in range(1024)}, "allowed_token_ids": [1] * 1024, "bad_words": ["x" * 128] * 128,
    }  # fmt: skip
    assert parse(CompletionBody, {**COMPLETION, **rules}).presence_penalty == -2
    assert parse(ChatBody, {**CHAT, **rules, "repetition_penalty": 10}).repetition_penalty == 10


def test_tokenize_bodies() -> None:
    assert parse(TokenizeBody, {"prompt": "x"}).model == ""
    refused(TokenizeBody, {"prompt": 5}, "prompt")
    refused(DetokenizeBody, {"tokens": ["a"]}, "tokens[0]")
