"""What a client may write: the request bodies of both front ends, field by field, and what this version refuses.

A body goes through `parse` once. Explicit null is the same as leaving a field out. Three kinds of field end in a 400 that names
the field, because ignoring them would silently change what the client gets: a known field with a wrong value, a known feature
that is not offered here (unless it is set to its neutral value), and the internal fields of the hand-off. Unknown fields are
ignored with a debug log. The models are strict: "5" is not 5, and true is not 1.

Nothing here knows a model, a tokenizer or the configuration; `router.validate` does the checks that need them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from common.errors import InvalidRequest
from common.logs import get_logger
from common.types import BANNING_BIAS, FORCING_BIAS
from router.structured.wanted import FORM_FIELDS, Wanted, wanted
from router.tools.definitions import Toolbox, toolbox

log = get_logger(__name__)

MAX_MESSAGES = 1024
MAX_PROMPTS = 256
MAX_STOP_STRINGS = 8
MAX_STOP_BYTES = 128
MAX_STOP_TOKEN_IDS = 64
MAX_LOGPROBS = 20
MAX_TEMPLATE_ARGUMENTS = 16
MAX_BIASED_TOKENS = 1024
MAX_ALLOWED_TOKENS = 1024
MAX_BAD_WORDS = 128
MAX_BAD_WORD_BYTES = 128
MAX_CALLS_IN_MESSAGE = 128

Prompt = str | tuple[int, ...]


def _wrong(message: str) -> PydanticCustomError:
    # The message is data, not a template: braces in it must not be filled in.
    return PydanticCustomError("pdserve", "{message}", {"message": message})


def _prompts(value: object) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise _wrong("must be a string, a list of strings, a list of token ids or a list of such lists, and not be empty")
    if all(type(item) is int for item in value):
        return (tuple(value),)
    if len(value) > MAX_PROMPTS:
        raise _wrong(f"at most {MAX_PROMPTS} prompts in one request")
    if all(isinstance(item, str) for item in value):
        return tuple(value)
    if all(isinstance(item, list) and all(type(token) is int for token in item) for item in value):
        return tuple(tuple(item) for item in value)
    raise _wrong("must be a string, a list of strings, a list of token ids or a list of such lists; kinds cannot be mixed")


def _stop_strings(value: object) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise _wrong("must be a string or a list of strings")
    if len(items) > MAX_STOP_STRINGS:
        raise _wrong(f"at most {MAX_STOP_STRINGS} stop strings")
    if any(not item for item in items):
        raise _wrong("a stop string cannot be empty")
    if any(len(item.encode("utf-8", "surrogatepass")) > MAX_STOP_BYTES for item in items):
        raise _wrong(f"a stop string is at most {MAX_STOP_BYTES} bytes long")
    return tuple(items)


def _logit_bias(value: object) -> tuple[tuple[int, float], ...]:
    """JSON's keys are strings; gRPC's are numbers."""
    if not isinstance(value, Mapping):
        raise _wrong("must be an object of token ids and values")
    if len(value) > MAX_BIASED_TOKENS:
        raise _wrong(f"at most {MAX_BIASED_TOKENS} tokens")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not re.fullmatch("[0-9]{1,10}", str(key), re.ASCII) or int(key) in biases:
            raise _wrong(f"{str(key)[:40]!r} is not a token id, or is there twice")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not BANNING_BIAS <= bias <= FORCING_BIAS:
            raise _wrong(f"the value of {key} must be a number from {BANNING_BIAS:g} to {FORCING_BIAS:g}")
        biases[int(key)] = float(bias)
    return tuple(sorted(biases.items()))


def _bad_words(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _wrong("must be a list of strings")
    if len(value) > MAX_BAD_WORDS:
        raise _wrong(f"at most {MAX_BAD_WORDS} bad words")
    if any(not item for item in value):
        raise _wrong("a bad word cannot be empty")
    if any(len(item.encode("utf-8", "surrogatepass")) > MAX_BAD_WORD_BYTES for item in value):
        raise _wrong(f"a bad word is at most {MAX_BAD_WORD_BYTES} bytes long")
    return tuple(value)


def _priority(value: object) -> object:
    return None if type(value) is int and value == 0 else value  # what other servers take for the usual one


def _content(value: object) -> object:
    """Text parts become one text, as chat templates want it; other kinds of part are refused."""
    if not isinstance(value, list):
        return value
    texts: list[str] = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise _wrong(f"content parts of type {str(kind)[:40]!r} are not supported; only 'text' is")
        if not isinstance(part.get("text"), str):
            raise _wrong("a text part needs a string 'text'")
        texts.append(part["text"])
    return "\n".join(texts)


def _template_arguments(value: object) -> object:
    if not isinstance(value, dict):
        raise _wrong("must be an object")
    if len(value) > MAX_TEMPLATE_ARGUMENTS:
        raise _wrong(f"at most {MAX_TEMPLATE_ARGUMENTS} arguments")
    for name, argument in value.items():
        if not name.isidentifier() or name in ("messages", "tools", "documents", "add_generation_prompt"):
            raise _wrong(f"{name[:40]!r} cannot be given here")
        if not isinstance(argument, (bool, int, str)):
            raise _wrong(f"{name[:40]!r} must be a boolean, an integer or a string")
    return value


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class CalledFunction(_Body):
    name: str = Field(min_length=1, max_length=256)
    arguments: str = ""


class MessageToolCall(_Body):
    id: str = Field("", max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_content)] = None
    name: str | None = Field(None, max_length=256)
    tool_calls: list[MessageToolCall] | None = Field(None, max_length=MAX_CALLS_IN_MESSAGE)
    tool_call_id: str | None = Field(None, max_length=256)


class GenerationBody(_Body):
    """The fields that chat and completions share. None means "not given" wherever the default depends on something."""

    model: str = Field(min_length=1, max_length=256)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(None, ge=0)
    n: int = Field(1, ge=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    min_tokens: int = Field(0, ge=0)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10)  # smaller ones would take logits to infinity
    logit_bias: Annotated[tuple[tuple[int, float], ...], BeforeValidator(_logit_bias)] = ()
    allowed_token_ids: list[int] | None = Field(None, min_length=1, max_length=MAX_ALLOWED_TOKENS)
    bad_words: Annotated[tuple[str, ...], BeforeValidator(_bad_words)] = ()
    ignore_eos: bool = False
    stop: Annotated[tuple[str, ...], BeforeValidator(_stop_strings)] = ()
    stop_token_ids: list[int] = Field(default_factory=list, max_length=MAX_STOP_TOKEN_IDS)
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    priority: Annotated[Literal["interactive", "batch", "background"] | None, BeforeValidator(_priority)] = None
    # What the text must look like; `router.structured.wanted` reads these, and `form` is what it found.
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    pdserve_timings: bool = False

    @cached_property
    def form(self) -> Wanted | None:
        return wanted({name: getattr(self, name) for name in FORM_FIELDS})


class ChatBody(GenerationBody):
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(_template_arguments)] = Field(default_factory=dict)
    # `router.tools.definitions` reads these.
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None

    @cached_property
    def toolbox(self) -> Toolbox | None:
        return toolbox(self.tools, self.tool_choice, self.parallel_tool_calls)


class CompletionBody(GenerationBody):
    prompt: Annotated[tuple[Prompt, ...], BeforeValidator(_prompts)]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    add_special_tokens: bool = True


class TokenizeBody(_Body):
    """`prompt` or `messages`. `model` may be left out while only one is served."""

    model: str = ""
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(_template_arguments)] = Field(default_factory=dict)
    return_token_strs: bool = False


class DetokenizeBody(_Body):
    model: str = ""
    tokens: list[int]


class InvalidateBody(_Body):
    """What the answers that are to be forgotten have in common; of several, each is forgotten by itself."""

    model: str | None = Field(None, min_length=1, max_length=256)
    tags: list[str] = Field(default_factory=list)
    tenant: Literal["self"] | None = None
    id: str | None = Field(None, pattern="^[0-9a-f]{32}$")


class FeedbackBody(_Body):
    """A client's word on an answer of the semantic cache."""

    id: str = Field(pattern="^[0-9a-f]{32}$")  # of the answer's header x-cache-id
    ok: bool


BodyT = TypeVar("BodyT", bound=_Body)


def parse(kind: type[BodyT], data: object) -> BodyT:
    """The one way from parsed JSON (or its gRPC twin) to a body. Raises InvalidRequest naming the field."""
    if not isinstance(data, Mapping):
        raise InvalidRequest("the body must be a JSON object")
    given = {name: value for name, value in data.items() if value is not None}
    if issubclass(kind, GenerationBody):
        _refuse(given, kind)
    fields = kind.model_fields
    unknown = sorted(name for name in given if name not in fields and name not in _HARMLESS)
    if unknown:
        log.debug("unknown request fields ignored", fields=[name[:64] for name in unknown[:16]])
    try:
        body = kind.model_validate(given)
    except ValidationError as error:
        raise _explained(error) from None
    if isinstance(body, GenerationBody):
        _ = body.form  # these two raise InvalidRequest by themselves
    if isinstance(body, ChatBody):
        _ = body.toolbox
    return body


def _empty(value: object) -> bool:
    return value in ("", [], {})


def _is(*neutral: object) -> Callable[[Any], bool]:
    # `1 == True` in Python; a flag is not a number here.
    return lambda value: any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in neutral)


def _never(value: object) -> bool:
    return False


_INTERNAL = ("kv_transfer_params", "data_parallel_rank", "routed_dp_rank", "disagg_prefill_dp_rank")
_INTERNAL_PREFIX = "bootstrap_"

# What this version does not do yet, with the test for a value that asks for nothing.
_UNSUPPORTED: dict[str, Callable[[Any], bool]] = {
    "tools": _empty,
    "tool_choice": _is("none", "auto"),
    "functions": _empty,
    "function_call": _is("none", "auto"),
    "length_penalty": _is(1),
    "use_beam_search": _is(False),
    "suffix": _empty,
    "prompt_embeds": _empty,
    "logits_processors": _empty,
    "truncate_prompt_tokens": _never,
    "prompt_logprobs": _never,
    "cache_salt": _empty,
    "chat_template": _empty,
    "documents": _empty,
    "reasoning_effort": _is("none"),
    "thinking_token_budget": _never,
    "verbosity": _is("medium"),
    "modalities": _is(["text"]),
    "audio": _empty,
    "web_search_options": _never,
    "spaces_between_special_tokens": _is(True),
    "return_tokens_as_token_ids": _is(False),
    "mm_processor_kwargs": _empty,
    "vllm_xargs": _empty,
    "lora_path": _empty,
}
_UNSUPPORTED_PREFIX = "guided_"

# Accepted because leaving them out of account changes nothing that the client can observe in its tokens.
_HARMLESS = frozenset(
    {
        *_UNSUPPORTED,
        "best_of", "metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_retention", "request_id",
        "rid", "safety_identifier", "service_tier", "session_id", "store", "stream_interval", "user",
    }
)  # fmt: skip


def _refuse(given: Mapping[str, Any], kind: type[GenerationBody]) -> None:
    fields = kind.model_fields
    for name, value in given.items():
        if name in _INTERNAL or name.startswith(_INTERNAL_PREFIX):
            raise InvalidRequest(f"{name} is internal to the cluster and cannot be given by a client", param=name)
        if name in fields:
            continue
        if name.startswith(_UNSUPPORTED_PREFIX) and not _empty(value):
            raise InvalidRequest(f"{name} is not supported", param=name)
        neutral = _UNSUPPORTED.get(name)
        if neutral is not None and not neutral(value):
            raise InvalidRequest(f"{name} is not supported, or not with this value", param=name)
    best_of, choices = given.get("best_of"), given.get("n", 1)
    if best_of is not None and (isinstance(best_of, bool) or best_of != choices):
        raise InvalidRequest("best_of is not supported unless it equals n", param="best_of")
    if kind is ChatBody:
        _refuse_in_chat(given)


def _refuse_in_chat(given: Mapping[str, Any]) -> None:
    for name in ("echo", "prompt"):
        if given.get(name):
            raise InvalidRequest(f"{name} is not supported for chat", param=name)
    messages = given.get("messages")
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        for name in ("function_call", "audio"):
            if isinstance(message, dict) and message.get(name):
                raise InvalidRequest(f"messages with {name} are not supported", param=f"messages[{index}].{name}")


def _explained(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_input=False)[0]
    param = ""
    for part in first["loc"]:
        if isinstance(part, int):
            param += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int"):  # pydantic names the arms of unions here too
            param += f".{part}" if param else part
    return InvalidRequest(f"{param}: {first['msg']}" if param else first["msg"], param=param or None)
