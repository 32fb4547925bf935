"""Every field of what clients write and of what is made of it, named as meaning or noise: none can be forgotten."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest

from common.tokenizer import Tokenizer
from common.types import Grammar, GrammarKind, Request, SamplingParams
from router.cache.digest import BODY_NOISE, answer_key, scope_digest
from router.sampling_class import SamplingClass
from router.schemas import ChatBody, CompletionBody, GenerationBody
from router.tools.definitions import Toolbox
from router.tools.families import HERMES
from router.validate import OutputPlan, ServedModel, ToolPlan, ValidCall
from support.cache_calls import Calls
from support.fake_cluster import CONTEXT

SYSTEM = {"role": "system", "content": "be brief"}
TALK = [SYSTEM, {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}, {"role": "user", "content": "hi"}]
CHAT: dict[str, Any] = {"messages": TALK, "temperature": 0.5, "seed": 7, "max_tokens": 20}
COMPLETION: dict[str, Any] = {"prompt": "say it", "temperature": 0.5, "seed": 7, "max_tokens": 20}

TOOLS: list[Any] = [{"type": "function", "function": {"name": "f"}}]

# field: what is written in addition. Meaning changes the key; noise does not; the limit has a rule of its own; what acts on the
# prompt alone counts as far as it changes the prompt's tokens.
SHARED_MEANING: dict[str, dict[str, Any]] = {
    "n": {"n": 2},
    "seed": {"seed": 8},
    "temperature": {"temperature": 0.6},
    "top_p": {"top_p": 0.5},
    "top_k": {"top_k": 3},
    "min_p": {"min_p": 0.1},
    "min_tokens": {"min_tokens": 2},
    "presence_penalty": {"presence_penalty": 0.5},
    "frequency_penalty": {"frequency_penalty": 0.5},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "logit_bias": {"logit_bias": {"7": 1}},
    "allowed_token_ids": {"allowed_token_ids": [7, 8]},
    "bad_words": {"bad_words": ["word"]},
    "ignore_eos": {"ignore_eos": True},
    "stop": {"stop": ["the"]},
    "stop_token_ids": {"stop_token_ids": [9]},
    "include_stop_str_in_output": {"include_stop_str_in_output": True},
    "skip_special_tokens": {"skip_special_tokens": False},
    "response_format": {"response_format": {"type": "json_object"}},
    "structured_outputs": {"structured_outputs": {"choice": ["a"]}},
    "guided_json": {"guided_json": {"type": "array"}},
    "guided_regex": {"guided_regex": "a+"},
    "guided_choice": {"guided_choice": ["a", "b"]},
    "guided_grammar": {"guided_grammar": 'start: "a"'},
}
SHARED_NOISE: dict[str, dict[str, Any]] = {
    "model": {"model": "small"},  # an alias
    "stream": {"stream": True},
    "stream_options": {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "return_token_ids": {"return_token_ids": True},
    "pdserve_timings": {"pdserve_timings": True},
    "priority": {"priority": "batch"},
}
CHAT_MEANING: dict[str, dict[str, Any]] = {
    "messages": {"messages": [*TALK[:-1], {"role": "user", "content": "ho"}]},
    "logprobs": {"logprobs": True},
    "top_logprobs": {"logprobs": True, "top_logprobs": 2},
    "add_generation_prompt": {"add_generation_prompt": False},
    "continue_final_message": {"continue_final_message": True},
    "tools": {"tools": TOOLS},
    "tool_choice": {"tools": TOOLS, "tool_choice": "required"},
    "parallel_tool_calls": {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False},
}
# What some of these need to be there already.
CHAT_BASES: dict[str, dict[str, Any]] = {
    "top_logprobs": {"logprobs": True},
    "tool_choice": {"tools": TOOLS},
    "parallel_tool_calls": {"tools": TOOLS, "tool_choice": "required"},
}
COMPLETION_MEANING: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": "say that"},
    "logprobs": {"logprobs": 0},
}
COMPLETION_NOISE: dict[str, dict[str, Any]] = {"echo": {"echo": True}}
LIMITS: dict[str, dict[str, Any]] = {"max_tokens": {"max_tokens": 21}, "max_completion_tokens": {"max_completion_tokens": 21}}
THROUGH_THE_PROMPT: dict[str, dict[str, Any]] = {
    "add_special_tokens": {"add_special_tokens": True},
    "chat_template_kwargs": {"chat_template_kwargs": {"enable_thinking": True}},
}
UNREAD: dict[str, Any] = {
    "user": "u", "metadata": {"trace": "1"}, "store": True, "service_tier": "flex", "safety_identifier": "s", "request_id": "q",
    "prompt_cache_key": "k", "parallel_tool_calls": False, "session_id": "s",
}  # fmt: skip


def test_every_field_of_a_body_is_classified() -> None:
    chat = [*SHARED_MEANING, *SHARED_NOISE, *CHAT_MEANING, *LIMITS, *THROUGH_THE_PROMPT]
    assert sorted(chat) == sorted(ChatBody.model_fields)
    completion = {*SHARED_MEANING, *SHARED_NOISE, *COMPLETION_MEANING, *COMPLETION_NOISE, *LIMITS, *THROUGH_THE_PROMPT}
    assert completion - {"max_completion_tokens", "chat_template_kwargs"} == set(CompletionBody.model_fields)


@pytest.mark.parametrize("field", sorted(SHARED_MEANING | CHAT_MEANING))
async def test_what_means_something_changes_the_key_of_a_chat(calls: Calls, field: str) -> None:
    base = CHAT | CHAT_BASES.get(field, {})
    changed = await calls.chat_key(base | (SHARED_MEANING | CHAT_MEANING)[field])
    plain = await calls.chat_key(base)
    assert changed.key != plain.key
    assert changed.limited != plain.limited


@pytest.mark.parametrize("field", sorted(SHARED_MEANING | COMPLETION_MEANING))
async def test_what_means_something_changes_the_key_of_a_completion(calls: Calls, field: str) -> None:
    changed = await calls.completion_key(COMPLETION | (SHARED_MEANING | COMPLETION_MEANING)[field])
    assert changed.key != (await calls.completion_key(COMPLETION)).key


@pytest.mark.parametrize("field", sorted(SHARED_NOISE))
async def test_noise_does_not_change_the_key_of_a_chat(calls: Calls, field: str) -> None:
    assert await calls.chat_key(CHAT | SHARED_NOISE[field]) == await calls.chat_key(CHAT)


@pytest.mark.parametrize("field", sorted(SHARED_NOISE | COMPLETION_NOISE))
async def test_noise_does_not_change_the_key_of_a_completion(calls: Calls, field: str) -> None:
    noise = (SHARED_NOISE | COMPLETION_NOISE)[field]
    assert await calls.completion_key(COMPLETION | noise) == await calls.completion_key(COMPLETION)


@pytest.mark.parametrize("field", sorted(THROUGH_THE_PROMPT))
async def test_what_acts_on_the_prompt_counts_as_far_as_it_changes_tokens(calls: Calls, field: str) -> None:
    one, other = await calls.chat(CHAT), await calls.chat(CHAT | THROUGH_THE_PROMPT[field])
    same = one.requests[0].prompt_token_ids == other.requests[0].prompt_token_ids
    assert (answer_key(one, 0, ()) == answer_key(other, 0, ())) == same


@pytest.mark.parametrize("field", sorted(LIMITS))
async def test_the_limit_is_in_one_of_the_two_keys(calls: Calls, field: str) -> None:
    one, other = await calls.chat_key(CHAT), await calls.chat_key(CHAT | LIMITS[field])
    assert one.key == other.key
    assert one.limited != other.limited


async def test_fields_that_are_not_read_and_defaults_that_are_spelt_out_do_not_count(calls: Calls) -> None:
    plain = await calls.chat_key(CHAT)
    assert await calls.chat_key(CHAT | UNREAD) == plain
    assert await calls.chat_key(dict(reversed(CHAT.items()))) == plain
    spelt_out = {"n": 1, "top_p": 1.0, "top_k": 0, "stop": None, "logit_bias": {}, "presence_penalty": 0, "stream": False}
    assert await calls.chat_key(CHAT | spelt_out) == plain
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in TALK]
    assert await calls.chat_key(CHAT | {"messages": parts}) == plain


async def test_who_asks_and_when_does_not_count_but_the_tenant_does(calls: Calls) -> None:
    plain = await calls.chat_key(CHAT)
    assert await calls.chat_key(CHAT, request_id="another") == plain
    assert (await calls.chat_key(CHAT, tenant="u")).key != plain.key
    assert (await calls.chat_key(CHAT, fingerprint="f2")).key != plain.key
    assert (await calls.chat_key(CHAT | {"model": "other"})).key != plain.key
    assert (await calls.chat_key(CHAT, names=("tag:a@t",))).key != plain.key


async def test_a_greedy_draw_does_not_look_at_the_seed_and_the_filters(calls: Calls) -> None:
    greedy = CHAT | {"temperature": 0, "seed": None}
    plain = await calls.chat_key(greedy)
    for more in ({"seed": 3}, {"top_p": 0.3}, {"top_k": 5}, {"min_p": 0.3}):
        assert await calls.chat_key(greedy | more) == plain
    assert (await calls.chat_key(greedy | {"frequency_penalty": 1})).key != plain.key


async def test_a_seed_that_the_router_drew_is_no_part_of_the_question(calls: Calls) -> None:
    unseeded = CHAT | {"seed": None}
    assert await calls.chat_key(unseeded) == await calls.chat_key(unseeded)
    call = await calls.chat(unseeded)
    drawn = await calls.chat_key(CHAT | {"seed": 5})
    same_seed = dataclasses.replace(call.requests[0], sampling=dataclasses.replace(call.requests[0].sampling, seed=5))
    assert answer_key(dataclasses.replace(call, requests=(same_seed,)), 0, ()).key != drawn.key


async def test_the_class_of_sampling_is_what_the_client_wrote(calls: Calls) -> None:
    for more, kind in (
        ({"temperature": 0}, SamplingClass.GREEDY),
        ({"temperature": 0, "seed": 1}, SamplingClass.GREEDY),
        ({"seed": 1}, SamplingClass.SEEDED),
        ({"temperature": 0.2, "seed": 0}, SamplingClass.SEEDED),
        ({}, SamplingClass.UNSET),
        ({"temperature": None}, SamplingClass.UNSET),
        ({"temperature": 1.0}, SamplingClass.SAMPLED),
    ):
        assert (await calls.chat({"messages": TALK, **more})).sampling_class is kind, more


# -- what is made of the bodies ----------------------------------------------------------------------------------------

REQUEST_FIELDS: dict[str, Any] = {  # None: noise, with another value in `NOISE_VALUES`
    "request_id": None, "model": "m2", "prompt_token_ids": (5, 6), "sampling": None, "num_choices": 3, "cache_salt": "u",
    "timeout_s": None, "first_choice": 1, "num_resumed_tokens": 1, "dispatch_id": None, "priority": None,
}  # fmt: skip
SAMPLING_FIELDS: dict[str, Any] = {
    "max_tokens": None, "seed": 2, "temperature": 0.9, "top_k": 4, "top_p": 0.4, "min_p": 0.2, "min_tokens": 3,
    "stop_token_ids": (3,), "logprobs": 1, "prompt_logprobs": 1, "presence_penalty": 1.0, "frequency_penalty": 1.0,
    "repetition_penalty": 2.0, "logit_bias": ((3, 1.0),), "allowed_token_ids": (4,), "bad_words": ((4, 5),),
    "grammar": Grammar(GrammarKind.REGEX, "a+"),
}  # fmt: skip
PLAN_FIELDS: dict[str, Any] = {
    "stops": ("x",), "include_stop": True, "min_tokens": 1, "client_stop_token_ids": frozenset({4}), "discard_tokens": True,
    "logprobs": 1, "echo": None, "prompt_texts": None, "skip_special_tokens": False, "return_token_ids": None, "stream": None,
    "include_usage": None, "usage_on_every_chunk": None, "timings": None, "tools": ToolPlan(HERMES, Toolbox(())),
}  # fmt: skip
NOISE_VALUES: dict[str, Any] = {
    "request_id": "other", "timeout_s": 1.0, "max_tokens": 99, "echo": True, "prompt_texts": ("say",), "return_token_ids": True,
    "stream": True, "include_usage": True, "usage_on_every_chunk": True, "timings": True, "dispatch_id": 5, "priority": 2,
}  # fmt: skip


def made_call(tokenizer: Tokenizer, request: dict[str, Any], sampling: dict[str, Any], plan: dict[str, Any]) -> ValidCall:
    params = SamplingParams(**({"max_tokens": 9, "seed": 1} | sampling))
    one = Request(
        **({"request_id": "r", "model": "m", "prompt_token_ids": (5,), "sampling": params, "cache_salt": "t"} | request)
    )
    model = ServedModel(one.model, tokenizer, CONTEXT, 0, "f1")
    body = CompletionBody(model="m", prompt="x")
    return ValidCall(model, (one,), OutputPlan(**plan), SamplingClass.SEEDED, body)


@pytest.mark.parametrize(
    ("kind", "table"), [(Request, REQUEST_FIELDS), (SamplingParams, SAMPLING_FIELDS), (OutputPlan, PLAN_FIELDS)]
)
def test_every_field_of_requests_sampling_and_plans_is_classified(kind: Any, table: dict[str, Any], tokenizer: Tokenizer) -> None:
    assert {field.name for field in dataclasses.fields(kind)} == table.keys()
    plain = answer_key(made_call(tokenizer, {}, {}, {}), 0, ()).key
    for name, value in table.items():
        if name == "sampling":
            continue
        parts: list[dict[str, Any]] = [{}, {}, {}]
        parts[(Request, SamplingParams, OutputPlan).index(kind)] = {name: NOISE_VALUES[name] if value is None else value}
        changed = answer_key(made_call(tokenizer, *parts), 0, ()).key
        assert (changed == plain) == (value is None), name


def test_the_noise_of_bodies_is_named_as_it_is_in_bodies() -> None:
    assert set(ChatBody.model_fields) >= BODY_NOISE
    assert BODY_NOISE - set(CompletionBody.model_fields) == {"max_completion_tokens"}


@pytest.mark.parametrize("field", sorted((SHARED_MEANING | CHAT_MEANING).keys() - {"seed", "messages", "continue_final_message"}))
async def test_the_scope_holds_everything_but_the_last_text(calls: Calls, field: str) -> None:
    async def scope(more: dict[str, Any], frame: object = "frame") -> bytes:
        call = await calls.chat(CHAT | {"logprobs": True} | more)
        body: GenerationBody = call.body
        return scope_digest(call, body, (), frame)

    plain = await scope({})
    if field != "logprobs":
        assert await scope((SHARED_MEANING | CHAT_MEANING)[field]) != plain
    assert await scope({"seed": 8}) != plain
    assert await scope({}, frame="another") != plain
    assert await scope({"messages": [{"role": "user", "content": "else"}]}) == plain
    for noise in SHARED_NOISE.values():
        assert await scope(noise) == plain


# -- many ----------------------------------------------------------------------------------------------------------------


def other_value(rng: random.Random, value: Any) -> Any:
    """Another value of the same kind."""
    while True:
        if isinstance(value, bool):
            return not value
        if value is None:
            return rng.randrange(20)
        if isinstance(value, int):
            new: Any = rng.randrange(1 << rng.choice((2, 8, 62)))
        elif isinstance(value, float):
            new = rng.choice((rng.random(), float(rng.randrange(9)), rng.random() * 1e-9))
        elif isinstance(value, str):
            new = value + rng.choice("ab\0é") if rng.random() < 0.5 else value[:-1]
        elif isinstance(value, frozenset):
            new = value ^ {rng.randrange(50)}
        else:
            new = changed_tuple(rng, value)
        if new != value:
            return new


def changed_tuple(rng: random.Random, value: tuple[Any, ...]) -> tuple[Any, ...]:
    way = rng.randrange(4)
    place = rng.randrange(len(value) + 1)
    if way == 0 or not value:
        return (*value[:place], rng.randrange(50), *value[place:])
    if way == 1:
        return value[:place] + value[place + 1 :]
    if way == 2:
        return tuple(reversed(value))
    return tuple(rng.randrange(50) for _ in value)


@pytest.mark.parametrize("probes", [1_000, pytest.param(105_000, marks=pytest.mark.long)])
def test_a_change_of_meaning_never_hits_and_a_change_of_noise_always_does(tokenizer: Tokenizer, probes: int) -> None:
    rng = random.Random(probes)
    tables = (REQUEST_FIELDS, SAMPLING_FIELDS, PLAN_FIELDS)
    state: list[dict[str, Any]] = [{}, {}, {}]
    seen: dict[bytes, Any] = {}
    key = answer_key(made_call(tokenizer, *state), 0, ()).key
    for _ in range(probes):
        which = rng.randrange(3)
        name = rng.choice([name for name in tables[which] if name != "sampling"])
        noise = tables[which][name] is None
        call = made_call(tokenizer, *state)
        holder = (call.requests[0], call.requests[0].sampling, call.plan)[which]
        value = other_value(rng, getattr(holder, name))
        if name == "temperature" and value == 0:
            continue  # of greedy requests other fields are noise
        changed = [dict(part) for part in state]
        changed[which][name] = value
        new_key = answer_key(made_call(tokenizer, *changed), 0, ()).key
        if noise:
            assert new_key == key, name
        else:
            assert new_key != key, name
            meaning = repr([dataclasses.asdict(kind_made) for kind_made in meanings(made_call(tokenizer, *changed))])
            assert seen.setdefault(new_key, meaning) == meaning, "two meanings, one key"
        state, key = changed, new_key
        if rng.random() < 0.02:
            state = [{}, {}, {}]
            key = answer_key(made_call(tokenizer, *state), 0, ()).key


def meanings(call: ValidCall) -> tuple[Any, Any]:
    neutral = {name: None for name, value in REQUEST_FIELDS.items() if value is None and name != "sampling"}
    plan = {name: None for name, value in PLAN_FIELDS.items() if value is None}
    sampling = dataclasses.replace(call.requests[0].sampling, max_tokens=0)
    return (
        dataclasses.replace(call.requests[0], **neutral, sampling=sampling),
        dataclasses.replace(call.plan, **plan, client_stop_token_ids=tuple(sorted(call.plan.client_stop_token_ids))),
    )
