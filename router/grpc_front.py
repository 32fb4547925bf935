"""The public gRPC face, `pdserve.v1.Inference`: the twin of the HTTP face over other messages.

A message becomes the same body that HTTP parses (absent optionals are left out, so that they take the same defaults), goes
through the same schemas, validator and generation, and fails with the same errors, as a status with an `ErrorDetail` trailer.
With `echo` the prompt comes before the first generated text of a choice; its first token has no log-probability: NaN.

The last event of a stream carries usage, and nothing else. What the cache did is told in trailing metadata.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

from common.errors import PdserveError
from common.logs import bound, get_logger
from common.rpc import typed_errors
from common.tokenizer import Tokenizer
from common.tracing.span import entered
from common.types import TokenLogprob
from common.wire import inference_pb2 as pb
from common.wire import inference_pb2_grpc
from router.admission.tenants import Identity
from router.cache.control import cache_control
from router.front import Front, request_id_or_new
from router.generation import Generation
from router.models.fallback import Answer
from router.models.routes import Route
from router.observe.observatory import Sighting
from router.observe.slo import CLIENT_LEFT
from router.schemas import ChatBody, CompletionBody, TokenizeBody, parse
from router.streaming import ChoiceDelta
from router.structured.wanted import parsed_schema
from router.tools.naming import draw_call_id, finish_reason
from router.tools.reading import CallArguments, CallBegins, Content, Reader
from router.validate import Caller

log = get_logger(__name__)

SERVICE = "pdserve.v1.Inference"
_REQUEST_ID, _PRIORITY = "x-request-id", "x-priority"

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass
class _Call:
    """What is known of a call, for its log line and its count."""

    request_id: str
    received_s: float
    metadata: Mapping[str, str] = field(repr=False)
    identity: Identity = field(repr=False)
    priority: str | None
    model: str = ""


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    def __init__(self, front: Front) -> None:
        self._front = front

    async def Generate(self, request: pb.InferenceRequest, context: Context) -> None:
        async with self._call(context, "Generate", request.request_id) as call, self._observed(call) as sighting:
            await self._front.admit(call.identity)
            control = cache_control(lambda name: call.metadata.get(name, ""))
            standing = sighting.standing = self._front.standing(call.identity, call.priority)
            tenant = call.identity.tenant
            caller = Caller(call.request_id, tenant.cache_salt, timeout_s=context.time_remaining())
            route = await self._front.route(_parsed(request), caller, lambda name: call.metadata.get(name, ""), tenant.name)

            def begin(route: Route) -> Generation:
                call.model = route.call.model.name
                waits = not route.has_other
                generation = self._front.generation(route.call, call.received_s, standing, control, waits=waits)
                sighting.generation = generation
                return generation

            answer = Answer(route, begin)
            events: _Events | None = None
            # Written, not yielded: a call that the client cancels ends here at once, and closes what is below.
            async with aclosing(answer.deltas()) as deltas:
                async for delta in deltas:
                    events = events or _Events(answer.generation, call.request_id)  # only now is it known who answers
                    await context.write(events.of(delta))
            events = events or _Events(answer.generation, call.request_id)
            await context.write(events.last())
            told = {**route.headers, **answer.generation.cache_headers}
            context.set_trailing_metadata(tuple((name.lower(), value) for name, value in told.items()))

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsReply:
        async with self._call(context, "ListModels", ""):
            registry = self._front.registry
            return pb.ListModelsReply(
                models=[
                    pb.Model(
                        id=name,
                        created=model.created_s,
                        owned_by="pdserve",
                        max_model_tokens=registry.max_model_tokens(model),
                    )
                    for name, model in self._front.names()
                ]
            )

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeReply:
        async with self._call(context, "Tokenize", ""):
            data: dict[str, Any] = {"model": request.model}
            if request.HasField("chat"):
                data["messages"] = _messages(request.chat)
            elif request.HasField("prompt"):
                data["prompt"] = request.prompt
            if request.HasField("add_special_tokens"):
                data["add_special_tokens"] = request.add_special_tokens
            text = await self._front.tokenize(parse(TokenizeBody, data))
            return pb.TokenizeReply(token_ids=text.token_ids, max_model_tokens=text.model.max_model_tokens)

    @asynccontextmanager
    async def _call(self, context: Context, method: str, request_id: str) -> AsyncIterator[_Call]:
        """Around every handler: request id, API key, typed errors, count and log line."""
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        front = self._front
        request_id = request_id_or_new(request_id or metadata.get(_REQUEST_ID, ""))
        received_s = front.clock.monotonic_s()
        call: _Call | None = None
        status = "499"  # unless it ends otherwise
        with bound(request_id=request_id):
            try:
                async with typed_errors(context):
                    try:
                        identity = await front.keys.identify(metadata.get("authorization"))
                        call = _Call(request_id, received_s, metadata, identity, metadata.get(_PRIORITY))
                        await context.send_initial_metadata(((_REQUEST_ID, request_id),))
                        yield call
                        status = "200"
                    except PdserveError as error:
                        status = str(error.http_status)
                        raise
            finally:
                model = "" if call is None else call.model
                front.metrics.requests_total.labels(model, f"grpc/{method}", status).inc()
                seconds = front.clock.monotonic_s() - received_s
                log.info("request", method="gRPC", endpoint=method, status=status, model=model, seconds=seconds)

    @asynccontextmanager
    async def _observed(self, call: _Call) -> AsyncIterator[Sighting]:
        """Around the handler that answers. Not entered by who has no good key."""
        observatory = self._front.observatory
        sighting = observatory.begin(call.request_id, "grpc/Generate", call.received_s, lambda name: call.metadata.get(name, ""))
        status = 500  # unless it ends otherwise
        failure: PdserveError | None = None
        try:
            with entered(sighting.span):
                yield sighting
            status = 200
        except asyncio.CancelledError:
            status = CLIENT_LEFT
            raise
        except PdserveError as error:
            status, failure = error.http_status, error
            raise
        finally:
            observatory.end(sighting, status, failure)


class _Events:
    """The messages of one stream."""

    def __init__(self, generation: Generation, request_id: str) -> None:
        self._generation = generation
        self._request_id = request_id
        self._tokenizer: Tokenizer = generation.call.model.tokenizer
        self._started: set[int] = set()
        self._readers: dict[int, Reader] = {}  # by choice
        self._called: set[int] = set()  # choices with calls

    def of(self, delta: ChoiceDelta) -> pb.InferenceEvent:
        plan = self._generation.call.plan
        text, calls = self._read(delta)
        reports = [self._report(token.token_id, token.logprob) for token in delta.tokens if token.logprob is not None]
        if plan.echo and delta.choice not in self._started:
            text = plan.prompt_texts[0] + text
            prompt = self._generation.call.requests[0].prompt_token_ids
            echoed = self._generation.prompt_logprobs(0)
            reports = [*(self._report(*pair) for pair in zip(prompt, echoed, strict=False)), *reports]
        self._started.add(delta.choice)
        return pb.InferenceEvent(
            request_id=self._request_id,
            index=delta.choice,
            text=text,
            token_ids=[token.token_id for token in delta.tokens],
            logprobs=reports,
            finish_reason=finish_reason(delta.finish_reason, called=delta.choice in self._called) or "",
            stop_reason="" if delta.stop_reason is None else str(delta.stop_reason),
            tool_calls=calls,
        )

    def _read(self, delta: ChoiceDelta) -> tuple[str, list[pb.ToolCallDelta]]:
        """The delta's text without its tool calls, and those."""
        tools = self._generation.call.plan.tools
        if tools is None:
            return delta.text, []
        reader = self._readers.get(delta.choice)
        if reader is None:
            reader = self._readers[delta.choice] = tools.reader()
        pieces = reader.push(delta.text)
        if delta.finish_reason is not None:
            pieces += reader.finish()
        text = "".join(piece.text for piece in pieces if isinstance(piece, Content))
        calls: list[pb.ToolCallDelta] = []
        for piece in pieces:
            if isinstance(piece, CallBegins):
                self._called.add(delta.choice)
                calls.append(pb.ToolCallDelta(index=piece.index, id=draw_call_id(), name=piece.name))
            elif isinstance(piece, CallArguments):
                calls.append(pb.ToolCallDelta(index=piece.index, arguments=piece.text))
        return text, calls

    def last(self) -> pb.InferenceEvent:
        usage = self._generation.usage
        return pb.InferenceEvent(
            request_id=self._request_id,
            usage=pb.Usage(
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                total_tokens=usage.total_tokens,
                cached_tokens=usage.cached_tokens,
            ),
        )

    def _report(self, token_id: int, logprob: TokenLogprob | None) -> pb.TokenReport:
        data = self._tokenizer.token_bytes(token_id)
        return pb.TokenReport(
            token=data.decode("utf-8", errors="replace"),
            logprob=math.nan if logprob is None else logprob.logprob,
            bytes=data,
            token_id=token_id,
            top=() if logprob is None else list(self._alternatives(logprob.top)),
        )

    def _alternatives(self, top: Sequence[tuple[int, float]]) -> Iterable[pb.TokenAlternative]:
        for token_id, logprob in top[: self._generation.call.plan.logprobs]:
            data = self._tokenizer.token_bytes(token_id)
            text = data.decode("utf-8", errors="replace")
            yield pb.TokenAlternative(token=text, logprob=logprob, bytes=data, token_id=token_id)


def _parsed(request: pb.InferenceRequest) -> ChatBody | CompletionBody:
    return parse(ChatBody, _body(request)) if request.HasField("chat") else parse(CompletionBody, _body(request))


_OPTIONALS = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "n", "ignore_eos", "min_tokens",
    "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip
_LISTS = ("stop", "stop_token_ids", "allowed_token_ids", "bad_words")


def _body(request: pb.InferenceRequest) -> dict[str, Any]:
    """The message as the JSON that an HTTP client would have sent."""
    data: dict[str, Any] = {name: getattr(request, name) for name in _OPTIONALS if request.HasField(name)}
    data["model"] = request.model
    data["return_token_ids"] = True  # every event tells them
    data.update({name: list(getattr(request, name)) for name in _LISTS if getattr(request, name)})
    if request.logit_bias:
        data["logit_bias"] = dict(request.logit_bias)
    form = request.structured_outputs.WhichOneof("form")
    if form is not None:
        value = getattr(request.structured_outputs, form)
        data["structured_outputs"] = {form: list(value.texts) if form == "choice" else value}
    if request.HasField("echo"):
        data["echo"] = request.echo
    if request.HasField("chat"):
        data["messages"] = _messages(request.chat)
        data.update(_tools(request))
        if request.HasField("logprobs"):
            data.update(logprobs=True, top_logprobs=request.logprobs)
        return data
    if request.HasField("prompt"):
        data["prompt"] = request.prompt
    elif request.HasField("prompt_token_ids"):
        data["prompt"] = list(request.prompt_token_ids.ids)
    if request.HasField("logprobs"):
        data["logprobs"] = request.logprobs
    return data


def _tools(request: pb.InferenceRequest) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if request.tools:
        data["tools"] = [{"type": "function", "function": _function(tool)} for tool in request.tools]
    if request.tool_choice:
        data["tool_choice"] = request.tool_choice
    if request.called_tool:
        data["tool_choice"] = {"type": "function", "function": {"name": request.called_tool}}
    if request.HasField("parallel_tool_calls"):
        data["parallel_tool_calls"] = request.parallel_tool_calls
    return data


def _function(tool: pb.Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters:
        function["parameters"] = parsed_schema(tool.parameters, f"tools[{tool.name[:64]}].parameters")
    return function


def _messages(chat: pb.ChatMessages) -> list[dict[str, Any]]:
    return [_message(message) for message in chat.messages]


def _message(message: pb.ChatMessage) -> dict[str, Any]:
    data: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name:
        data["name"] = message.name
    if message.tool_call_id:
        data["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        data["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return data
