"""The one validator of both front ends: a parsed body in, the requests for the workers and the plan for the answer out.

Everything that can be wrong with a call is found here, before any worker hears of it: `router.schemas` has looked at the fields
one by one; this module looks at them against the model and the limits. A prompt becomes tokens exactly once, here. Long
prompts are tokenised in a thread, so that they do not hold up the streams of others.

It does not know where workers are, nor HTTP nor gRPC.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from common.config import RouterConfig
from common.errors import ContextLengthExceeded, InvalidRequest
from common.tokenizer import Tokenizer
from common.types import GrammarKind, Request, SamplingParams
from router.recent_texts import RecentTexts
from router.sampling_class import SamplingClass
from router.schemas import ChatBody, ChatMessage, CompletionBody, DetokenizeBody, GenerationBody, Prompt, TokenizeBody
from router.structured.examination import Examination
from router.structured.wanted import Wanted
from router.tools.definitions import Toolbox
from router.tools.families import Family, calls_grammar, family_of
from router.tools.reading import CertainReader, FreeReader, Reader
from router.tools.rendering import as_plain_messages, for_template

COMPLETION_MAX_TOKENS = 16  # OpenAI's default
MAX_TOTAL_CHOICES = 256
_INLINE_CHARS = 4096  # shorter texts are tokenised on the event loop: a thread would cost more than it saves
_UINT64 = 2**64
_REMEMBERED_CHARS = 1_000_000  # with their token ids a dozen megabytes

ResultT = TypeVar("ResultT")
_Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that can be asked for, as the registry knows it at this moment."""

    name: str
    tokenizer: Tokenizer
    max_model_tokens: int  # longest prompt + output that every ready decode worker can hold
    created_s: int
    fingerprint: str  # of the KV layout, hex; "" until a worker was ready


class ModelDirectory(Protocol):
    async def model(self, name: str) -> ServedModel:
        """By name or alias; "" is the only model there is. Raises ModelNotFound or NoWorkerAvailable."""
        ...


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. Written by a front end."""

    request_id: str  # as the client sees it; not unique, since clients may choose it
    cache_salt: str = ""  # digest of the API key; "" without keys
    timeout_s: float | None = None  # the client's own deadline


@dataclass(frozen=True, slots=True, eq=False)
class ToolPlan:
    """How tool calls are read out of an answer."""

    family: Family
    toolbox: Toolbox

    def reader(self) -> Reader:
        """For one choice."""
        if self.toolbox.must_call:
            return CertainReader(self.family, self.toolbox.names)
        return FreeReader(self.family, self.toolbox.names)


@dataclass(frozen=True, slots=True)
class OutputPlan:
    """How the tokens of a call become its answer. Written here, read by `router.generation` and the front ends."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    min_tokens: int = 0
    client_stop_token_ids: frozenset[int] = frozenset()
    discard_tokens: bool = False
    logprobs: int | None = None
    echo: bool = False
    prompt_texts: tuple[str, ...] = ()  # one per request, if echo
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    stream: bool = False
    include_usage: bool = False
    usage_on_every_chunk: bool = False
    timings: bool = False
    tools: ToolPlan | None = None

    @property
    def reports_tokens(self) -> bool:
        """Whether the client is told of tokens one by one."""
        return self.return_token_ids or self.logprobs is not None


@dataclass(frozen=True, slots=True)
class ValidCall:
    """One call of a client: one request per prompt, each with `num_choices` choices. Choice c of request r has the index
    `r * num_choices + c` in the answer."""

    model: ServedModel
    requests: tuple[Request, ...]
    plan: OutputPlan
    sampling_class: SamplingClass
    body: GenerationBody  # as the client wrote it

    @property
    def num_choices(self) -> int:
        return sum(request.num_choices for request in self.requests)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(request.num_prompt_tokens for request in self.requests)


@dataclass(frozen=True, slots=True)
class _Words:
    """What a call says in words or ids about which tokens may come, as token ids. The same for all its prompts."""

    stop_token_ids: tuple[int, ...]
    allowed_token_ids: tuple[int, ...]
    bad_words: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class TokenizedText:
    token_ids: tuple[int, ...]
    model: ServedModel


class Validator:
    """Remembers nothing that matters to an answer. `draw_seed` is called for requests without a seed."""

    def __init__(
        self,
        config: RouterConfig,
        directory: ModelDirectory,
        examination: Examination,
        *,
        draw_seed: Callable[[], int] = lambda: secrets.randbits(64),
        draw_suffix: Callable[[], str] = lambda: secrets.token_hex(4),
    ) -> None:
        self._config = config
        self._directory = directory
        self._examination = examination
        self._draw_seed = draw_seed
        self._draw_suffix = draw_suffix
        self._texts = RecentTexts(_REMEMBERED_CHARS)

    async def chat(self, body: ChatBody, caller: Caller) -> ValidCall:
        model = await self._directory.model(body.model)
        self._check_choices(body)
        if body.top_logprobs and not body.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        tools, form = body.toolbox, body.form
        family = family_of(model.tokenizer.chat_template)
        if tools is not None and tools.must_call:
            if form is not None:
                raise InvalidRequest("an answer that must call a tool has no other form", param=form.param)
            form = Wanted(GrammarKind.LARK, calls_grammar(family, tools), "tools")
        encode = self._encoder(model, caller, add_special_tokens=body.add_special_tokens)
        prompt = await _rendered(model, body, encode, tools=tools)
        limit_field = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
        limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        if limit == 0:
            raise InvalidRequest(f"{limit_field} must be at least 1", param=limit_field)
        room = _room(model, prompt, param="messages")
        if limit is not None:
            _check_fits(model, prompt, limit, param=limit_field)
        plan = self._plan(body, logprobs)
        if tools is not None:
            skip = body.skip_special_tokens and not family.special_markers
            plan = replace(plan, tools=ToolPlan(family, tools), skip_special_tokens=skip)
        words = await _words(body, model.tokenizer)
        sampling = self._sampling(body, model, words, max_tokens=room if limit is None else limit, logprobs=logprobs)
        if form is not None:
            sampling = replace(sampling, grammar=await self._examination.examine(form))
        return self._call(model, [prompt], body, [sampling], plan, caller)

    async def completion(self, body: CompletionBody, caller: Caller) -> ValidCall:
        model = await self._directory.model(body.model)
        self._check_choices(body)
        if body.n * len(body.prompt) > MAX_TOTAL_CHOICES:
            raise InvalidRequest(f"n times the number of prompts is at most {MAX_TOTAL_CHOICES}", param="n")
        discard = body.max_tokens == 0
        if discard and not body.echo:
            raise InvalidRequest("max_tokens may be 0 only together with echo", param="max_tokens")
        form = body.form
        encode = self._encoder(model, caller, add_special_tokens=body.add_special_tokens)
        prompts = await _encoded(model.tokenizer, body.prompt, encode)
        words = await _words(body, model.tokenizer)
        samplings = []
        for prompt in prompts:
            room = _room(model, prompt, param="prompt")
            if body.max_tokens is not None:
                _check_fits(model, prompt, body.max_tokens, param="max_tokens")
            wanted = COMPLETION_MAX_TOKENS if body.max_tokens is None else max(1, body.max_tokens)
            sampling = self._sampling(body, model, words, max_tokens=min(wanted, room), logprobs=body.logprobs)
            samplings.append(replace(sampling, prompt_logprobs=body.logprobs) if body.echo else sampling)
        if form is not None:
            grammar = await self._examination.examine(form)
            samplings = [replace(sampling, grammar=grammar) for sampling in samplings]
        plan = self._plan(body, body.logprobs)
        if body.echo:
            texts = tuple(
                text if isinstance(text, str) else model.tokenizer.decode(text, skip_special_tokens=body.skip_special_tokens)
                for text in body.prompt
            )
            plan = replace(plan, echo=True, prompt_texts=texts, discard_tokens=discard)
        return self._call(model, prompts, body, samplings, plan, caller)

    async def tokenize(self, body: TokenizeBody) -> TokenizedText:
        model = await self._directory.model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("give either prompt or messages", param="prompt")
        encode = model.tokenizer.encode
        if body.messages is not None:
            ids = await _rendered(model, body, lambda text: encode(text, bool(body.add_special_tokens)))
        else:
            special = True if body.add_special_tokens is None else body.add_special_tokens
            text = body.prompt or ""
            ids = await _off_loop(len(text), lambda: tuple(encode(text, special)))
        return TokenizedText(ids, model)

    async def detokenize(self, body: DetokenizeBody) -> str:
        model = await self._directory.model(body.model)
        _check_vocabulary(body.tokens, model.tokenizer, param="tokens")
        decode = model.tokenizer.decode
        return await _off_loop(4 * len(body.tokens), lambda: decode(body.tokens, skip_special_tokens=False))

    def _encoder(self, model: ServedModel, caller: Caller, *, add_special_tokens: bool) -> _Encode:
        def encode(text: str) -> tuple[int, ...]:
            return self._texts.encode(model.tokenizer, text, add_special_tokens=add_special_tokens, tenant=caller.cache_salt)

        return encode

    def _check_choices(self, body: GenerationBody) -> None:
        if body.n > self._config.max_choices:
            raise InvalidRequest(f"n is at most {self._config.max_choices}", param="n")

    def _sampling(
        self, body: GenerationBody, model: ServedModel, words: _Words, *, max_tokens: int, logprobs: int | None
    ) -> SamplingParams:
        vocab_size = model.tokenizer.vocab_size
        if body.min_tokens > max_tokens:
            raise InvalidRequest(f"min_tokens is more than the {max_tokens} tokens to be generated", param="min_tokens")
        sampling = SamplingParams(
            max_tokens=max_tokens,
            seed=self._draw_seed() % _UINT64 if body.seed is None else body.seed % _UINT64,
            temperature=body.temperature,
            top_k=min(max(0, body.top_k), vocab_size),
            top_p=body.top_p,
            min_p=body.min_p,
            min_tokens=body.min_tokens,
            stop_token_ids=words.stop_token_ids,
            logprobs=logprobs,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            repetition_penalty=body.repetition_penalty,
            logit_bias=body.logit_bias,
            allowed_token_ids=words.allowed_token_ids,
            bad_words=words.bad_words,
        )
        if not sampling.leaves_a_token(vocab_size):
            given = ("allowed_token_ids", "logit_bias", "bad_words", "stop_token_ids")
            param = next((name for name in given if getattr(body, name)), "min_tokens")
            raise InvalidRequest("all tokens that may come are banned, some perhaps until min_tokens are there", param=param)
        return sampling

    def _plan(self, body: GenerationBody, logprobs: int | None) -> OutputPlan:
        return OutputPlan(
            stops=body.stop,
            include_stop=body.include_stop_str_in_output,
            min_tokens=body.min_tokens,
            client_stop_token_ids=frozenset(body.stop_token_ids),
            logprobs=logprobs,
            skip_special_tokens=body.skip_special_tokens,
            return_token_ids=body.return_token_ids,
            stream=body.stream,
            include_usage=bool(body.stream_options.include_usage),
            usage_on_every_chunk=bool(body.stream_options.continuous_usage_stats),
            timings=body.pdserve_timings,
        )

    def _call(
        self,
        model: ServedModel,
        prompts: Sequence[tuple[int, ...]],
        body: GenerationBody,
        samplings: Sequence[SamplingParams],
        plan: OutputPlan,
        caller: Caller,
    ) -> ValidCall:
        return ValidCall(model, self._requests(model, prompts, body, samplings, caller), plan, _sampling_class(body), body)

    def _requests(
        self,
        model: ServedModel,
        prompts: Sequence[tuple[int, ...]],
        body: GenerationBody,
        samplings: Sequence[SamplingParams],
        caller: Caller,
    ) -> tuple[Request, ...]:
        # Clients choose request ids, and may choose the same twice; what workers see is unique.
        unique = f"{caller.request_id}-{self._draw_suffix()}"
        timeout_s = self._config.request_timeout_s
        if caller.timeout_s is not None:
            timeout_s = min(timeout_s, caller.timeout_s)
        return tuple(
            Request(
                request_id=unique if len(prompts) == 1 else f"{unique}-{index}",
                model=model.name,
                prompt_token_ids=prompt,
                sampling=sampling,
                num_choices=body.n,
                cache_salt=caller.cache_salt,
                timeout_s=timeout_s,
            )
            for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
        )


def _sampling_class(body: GenerationBody) -> SamplingClass:
    if body.temperature == 0:
        return SamplingClass.GREEDY
    if body.seed is not None:
        return SamplingClass.SEEDED
    return SamplingClass.SAMPLED if "temperature" in body.model_fields_set else SamplingClass.UNSET


def _room(model: ServedModel, prompt: Sequence[int], *, param: str) -> int:
    """Tokens that may follow the prompt, at least one."""
    if not prompt:
        raise InvalidRequest("the prompt is empty", param=param)
    limit = model.max_model_tokens
    if len(prompt) >= limit:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {limit} tokens, prompt and output together. "
            f"The prompt has {len(prompt)} tokens. Please shorten it.",
            param=param,
        )
    return limit - len(prompt)


def _check_fits(model: ServedModel, prompt: Sequence[int], max_tokens: int, *, param: str) -> None:
    limit = model.max_model_tokens
    if len(prompt) + max_tokens > limit:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {limit} tokens, prompt and output together. You asked for "
            f"{len(prompt) + max_tokens}: {len(prompt)} in the prompt and {max_tokens} as {param}. Please ask for less.",
            param=param,
        )


def _check_vocabulary(ids: Sequence[int], tokenizer: Tokenizer, *, param: str) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < tokenizer.vocab_size):
        raise InvalidRequest(f"token ids must be from 0 to {tokenizer.vocab_size - 1}", param=param)


async def _words(body: GenerationBody, tokenizer: Tokenizer) -> _Words:
    allowed = body.allowed_token_ids or ()
    _check_vocabulary(body.stop_token_ids, tokenizer, param="stop_token_ids")
    _check_vocabulary([token_id for token_id, _ in body.logit_bias], tokenizer, param="logit_bias")
    _check_vocabulary(allowed, tokenizer, param="allowed_token_ids")
    ends = () if body.ignore_eos else tokenizer.eos_token_ids

    def spell() -> tuple[tuple[int, ...], ...]:
        # A word has other tokens at the beginning of a text than after a space.
        bare = [word.lstrip(" ") or word for word in body.bad_words]
        spelt = [tuple(tokenizer.encode(text, add_special_tokens=False)) for word in bare for text in (word, f" {word}")]
        return tuple(dict.fromkeys(spelt))

    bad_words = await _off_loop(2 * sum(map(len, body.bad_words)), spell)
    if not all(bad_words):
        raise InvalidRequest("a bad word has no tokens", param="bad_words")
    return _Words(
        stop_token_ids=tuple(dict.fromkeys((*ends, *body.stop_token_ids))),
        allowed_token_ids=tuple(dict.fromkeys(allowed)),
        bad_words=bad_words,
    )


async def _encoded(tokenizer: Tokenizer, prompts: Sequence[Prompt], encode: _Encode) -> list[tuple[int, ...]]:
    for prompt in prompts:
        if not isinstance(prompt, str):
            _check_vocabulary(prompt, tokenizer, param="prompt")
        if not prompt:
            raise InvalidRequest("the prompt is empty", param="prompt")

    def encode_all() -> list[tuple[int, ...]]:
        return [tuple(encode(prompt)) if isinstance(prompt, str) else prompt for prompt in prompts]

    return await _off_loop(sum(len(prompt) for prompt in prompts if isinstance(prompt, str)), encode_all)


async def _rendered(
    model: ServedModel, body: ChatBody | TokenizeBody, encode: _Encode, *, tools: Toolbox | None = None
) -> tuple[int, ...]:
    template = model.tokenizer.chat_template
    if template is None:
        raise InvalidRequest(f"{model.name} has no chat template; use completions", param="messages")
    if body.continue_final_message and body.add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt cannot both be true", param="continue_final_message"
        )
    generation_prompt = not body.continue_final_message if body.add_generation_prompt is None else body.add_generation_prompt
    messages = [_message(message, index) for index, message in enumerate(body.messages or ())]
    messages = for_template(messages) if template.knows_tools else as_plain_messages(messages, tools)
    definitions = [tool.definition for tool in tools.tools] if tools is not None and template.knows_tools else None

    def render() -> tuple[int, ...]:
        text = template.render(messages, add_generation_prompt=generation_prompt, tools=definitions, **body.chat_template_kwargs)
        if body.continue_final_message:
            text = _without_turn_end(text, messages[-1]["content"])
        return tuple(encode(text))

    return await _off_loop(sum(len(message["content"]) for message in messages), render)


def _message(message: ChatMessage, index: int) -> dict[str, Any]:
    if message.content is None and message.role != "assistant":
        raise InvalidRequest("content must be given", param=f"messages[{index}].content")
    # "developer" is OpenAI's newer name for the system role; templates know the older one.
    role = "system" if message.role == "developer" else message.role
    rendered: dict[str, Any] = {"role": role, "content": message.content or ""}
    if message.name is not None:
        rendered["name"] = message.name
    if message.tool_calls:
        if message.role != "assistant":
            raise InvalidRequest("only an assistant calls tools", param=f"messages[{index}].tool_calls")
        rendered["tool_calls"] = [call.model_dump() for call in message.tool_calls]
    if message.role == "tool" and message.tool_call_id is not None:
        rendered["tool_call_id"] = message.tool_call_id
    return rendered


def _without_turn_end(text: str, final_content: str) -> str:
    """Cuts what the template put after the last message, so that the model continues it."""
    final = final_content.strip()
    start = text.rfind(final)
    if not final or start < 0:
        raise InvalidRequest("the final message cannot be continued with this chat template", param="continue_final_message")
    end = start + len(final)
    if text[start:].startswith(final_content.lstrip()):
        end = start + len(final_content.lstrip())
    return text[:end]


async def _off_loop(size_chars: int, work: Callable[[], ResultT]) -> ResultT:
    return work() if size_chars <= _INLINE_CHARS else await asyncio.to_thread(work)
