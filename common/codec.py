"""Values of `common.types` to and from their protobuf messages. Protobuf objects never travel further inwards than this.

Every pair is total on valid values and round-trips. Decoding trusts the shape that protobuf guarantees and nothing else: enums
that this build does not know and fields that must be present raise InvalidRequest naming the field.
"""

from __future__ import annotations

from common.errors import ERRORS_BY_CODE, InvalidRequest, PdserveError, error_from_code
from common.load import StepSample, WorkerLoad, WorkerPace, WorkerReport, WorkerShape
from common.types import (
    LOWEST_PRIORITY,
    FinishReason,
    Grammar,
    GrammarKind,
    KVLayout,
    PrefillChoice,
    Request,
    Role,
    SampledToken,
    SamplingParams,
    StageTimings,
    Started,
    Ticket,
    TokenChunk,
    TokenLogprob,
    WorkAccount,
    WorkerRef,
)
from common.wire import types_pb2 as pb
from common.wire import worker_pb2

_FINISH_TO_WIRE = {FinishReason.STOP: pb.FINISH_REASON_STOP, FinishReason.LENGTH: pb.FINISH_REASON_LENGTH}
_FINISH_FROM_WIRE = {wire: reason for reason, wire in _FINISH_TO_WIRE.items()}
_GRAMMAR_TO_WIRE = {
    GrammarKind.JSON_SCHEMA: pb.GRAMMAR_KIND_JSON_SCHEMA,
    GrammarKind.REGEX: pb.GRAMMAR_KIND_REGEX,
    GrammarKind.CHOICE: pb.GRAMMAR_KIND_CHOICE,
    GrammarKind.LARK: pb.GRAMMAR_KIND_LARK,
}
_GRAMMAR_FROM_WIRE = {wire: kind for kind, wire in _GRAMMAR_TO_WIRE.items()}
_ROLE_TO_WIRE = {Role.PREFILL: pb.ROLE_PREFILL, Role.DECODE: pb.ROLE_DECODE}
_ROLE_FROM_WIRE = {wire: role for role, wire in _ROLE_TO_WIRE.items()}


_CHOICE_TO_WIRE = {
    PrefillChoice.WORKER: worker_pb2.PREFILL_CHOICE_UNSPECIFIED,
    PrefillChoice.HERE: worker_pb2.PREFILL_CHOICE_HERE,
    PrefillChoice.THERE: worker_pb2.PREFILL_CHOICE_THERE,
}
_CHOICE_FROM_WIRE = {wire: choice for choice, wire in _CHOICE_TO_WIRE.items()}


def choice_to_wire(choice: PrefillChoice) -> worker_pb2.PrefillChoice:
    return _CHOICE_TO_WIRE[choice]


def choice_from_wire(wire: worker_pb2.PrefillChoice) -> PrefillChoice:
    """A choice of a newer router that this build does not know leaves it to the worker."""
    return _CHOICE_FROM_WIRE.get(wire, PrefillChoice.WORKER)


def role_to_wire(role: Role) -> pb.Role:
    return _ROLE_TO_WIRE[role]


def role_from_wire(wire: pb.Role) -> Role:
    if wire not in _ROLE_FROM_WIRE:
        raise InvalidRequest(f"unknown role {int(wire)}", param="role")
    return _ROLE_FROM_WIRE[wire]


def grammar_to_wire(grammar: Grammar) -> pb.Grammar:
    return pb.Grammar(kind=_GRAMMAR_TO_WIRE[grammar.kind], text=grammar.text)


def grammar_from_wire(message: pb.Grammar) -> Grammar:
    if message.kind not in _GRAMMAR_FROM_WIRE:
        raise InvalidRequest(f"unknown kind of grammar {int(message.kind)}", param="grammar")
    return Grammar(_GRAMMAR_FROM_WIRE[message.kind], message.text)


def sampling_to_wire(sampling: SamplingParams) -> pb.SamplingParams:
    return pb.SamplingParams(
        max_tokens=sampling.max_tokens,
        seed=sampling.seed,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        min_tokens=sampling.min_tokens,
        stop_token_ids=sampling.stop_token_ids,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=[pb.TokenBias(token_id=token_id, bias=bias) for token_id, bias in sampling.logit_bias],
        allowed_token_ids=sampling.allowed_token_ids,
        bad_words=[pb.TokenSequence(token_ids=word) for word in sampling.bad_words],
        grammar=grammar_to_wire(sampling.grammar) if sampling.grammar is not None else None,
    )


def sampling_from_wire(message: pb.SamplingParams) -> SamplingParams:
    return SamplingParams(
        max_tokens=message.max_tokens,
        seed=message.seed,
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        min_tokens=message.min_tokens,
        stop_token_ids=tuple(message.stop_token_ids),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
        logit_bias=tuple((item.token_id, item.bias) for item in message.logit_bias),
        allowed_token_ids=tuple(message.allowed_token_ids),
        bad_words=tuple(tuple(word.token_ids) for word in message.bad_words),
        grammar=grammar_from_wire(message.grammar) if message.HasField("grammar") else None,
    )


def request_to_wire(request: Request) -> pb.Request:
    return pb.Request(
        request_id=request.request_id,
        model=request.model,
        prompt_token_ids=request.prompt_token_ids,
        sampling=sampling_to_wire(request.sampling),
        num_choices=request.num_choices,
        cache_salt=request.cache_salt,
        timeout_s=request.timeout_s,
        first_choice=request.first_choice,
        num_resumed_tokens=request.num_resumed_tokens,
        dispatch_id=request.dispatch_id,
        priority=request.priority,
    )


def request_from_wire(message: pb.Request) -> Request:
    if not message.prompt_token_ids:
        raise InvalidRequest("the prompt is empty", param="prompt_token_ids")
    if message.num_choices < 1:
        raise InvalidRequest("num_choices must be at least 1", param="num_choices")
    if message.sampling.max_tokens < 1:
        raise InvalidRequest("max_tokens must be at least 1", param="max_tokens")
    if message.num_resumed_tokens >= min(len(message.prompt_token_ids), message.sampling.max_tokens):
        raise InvalidRequest("more of the answer is there already than can be", param="num_resumed_tokens")
    if message.num_resumed_tokens and message.num_choices > 1:
        raise InvalidRequest("one choice at a time is resumed", param="num_choices")
    if message.priority > LOWEST_PRIORITY:
        raise InvalidRequest(f"priority must be 0 to {LOWEST_PRIORITY}", param="priority")
    return Request(
        request_id=message.request_id,
        model=message.model,
        prompt_token_ids=tuple(message.prompt_token_ids),
        sampling=sampling_from_wire(message.sampling),
        num_choices=message.num_choices,
        cache_salt=message.cache_salt,
        timeout_s=message.timeout_s,
        first_choice=message.first_choice,
        num_resumed_tokens=message.num_resumed_tokens,
        dispatch_id=message.dispatch_id,
        priority=message.priority,
    )


def worker_ref_to_wire(ref: WorkerRef) -> pb.WorkerRef:
    return pb.WorkerRef(worker_id=ref.worker_id, incarnation=ref.incarnation, address=ref.address)


def worker_ref_from_wire(message: pb.WorkerRef) -> WorkerRef:
    return WorkerRef(worker_id=message.worker_id, incarnation=message.incarnation, address=message.address)


def token_logprob_to_wire(value: TokenLogprob | None) -> pb.TokenLogprob:
    """None stands for a position without a value (the first prompt token)."""
    if value is None:
        return pb.TokenLogprob(absent=True)
    return pb.TokenLogprob(
        token_id=value.token_id,
        logprob=value.logprob,
        top=[pb.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in value.top],
    )


def token_logprob_from_wire(message: pb.TokenLogprob) -> TokenLogprob | None:
    if message.absent:
        return None
    return TokenLogprob(message.token_id, message.logprob, tuple((top.token_id, top.logprob) for top in message.top))


def sampled_token_to_wire(token: SampledToken) -> pb.TokenLogprob:
    """A sampled token without logprobs travels as a TokenLogprob whose `absent` is set."""
    if token.logprob is None:
        return pb.TokenLogprob(token_id=token.token_id, absent=True)
    return token_logprob_to_wire(token.logprob)


def sampled_token_from_wire(message: pb.TokenLogprob) -> SampledToken:
    return SampledToken(message.token_id, token_logprob_from_wire(message))


def chunk_to_wire(chunk: TokenChunk) -> pb.TokenChunk:
    return pb.TokenChunk(
        choice=chunk.choice,
        token_ids=chunk.token_ids,
        logprobs=[token_logprob_to_wire(item) for item in chunk.logprobs],
        finish_reason=_FINISH_TO_WIRE[chunk.finish_reason] if chunk.finish_reason else pb.FINISH_REASON_UNSPECIFIED,
        stop_token_id=chunk.stop_token_id,
    )


def chunk_from_wire(message: pb.TokenChunk) -> TokenChunk:
    reported = (token_logprob_from_wire(item) for item in message.logprobs)
    return TokenChunk(
        choice=message.choice,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(item for item in reported if item is not None),
        finish_reason=_FINISH_FROM_WIRE.get(message.finish_reason),
        stop_token_id=message.stop_token_id if message.HasField("stop_token_id") else None,
    )


def timings_to_wire(timings: StageTimings) -> pb.StageTimings:
    return pb.StageTimings(**{name: getattr(timings, name) for name in StageTimings.__slots__})


def timings_from_wire(message: pb.StageTimings) -> StageTimings:
    return StageTimings(**{name: getattr(message, name) for name in StageTimings.__slots__})


def started_to_wire(started: Started) -> pb.Started:
    return pb.Started(
        timings=timings_to_wire(started.timings),
        cached_tokens=started.cached_tokens,
        prompt_logprobs=[token_logprob_to_wire(item) for item in started.prompt_logprobs],
    )


def started_from_wire(message: pb.Started) -> Started:
    return Started(
        timings=timings_from_wire(message.timings),
        cached_tokens=message.cached_tokens,
        prompt_logprobs=tuple(token_logprob_from_wire(item) for item in message.prompt_logprobs),
    )


def work_to_wire(work: WorkAccount) -> pb.WorkAccount:
    return pb.WorkAccount(**{name: getattr(work, name) for name in WorkAccount.__slots__})


def work_from_wire(message: pb.WorkAccount) -> WorkAccount:
    return WorkAccount(**{name: getattr(message, name) for name in WorkAccount.__slots__})


def layout_to_wire(layout: KVLayout) -> pb.KVLayout:
    return pb.KVLayout(**{name: getattr(layout, name) for name in KVLayout.__slots__})


def layout_from_wire(message: pb.KVLayout) -> KVLayout:
    return KVLayout(**{name: getattr(message, name) for name in KVLayout.__slots__})


def ticket_to_wire(ticket: Ticket) -> pb.Ticket:
    return pb.Ticket(**{name: getattr(ticket, name) for name in Ticket.__slots__})


def ticket_from_wire(message: pb.Ticket) -> Ticket:
    values = {name: getattr(message, name) for name in Ticket.__slots__}
    return Ticket(**{**values, "blocks": tuple(message.blocks), "part": tuple(message.part)})


def pace_to_wire(pace: WorkerPace) -> worker_pb2.WorkerPace:
    return worker_pb2.WorkerPace(
        queue_age_s=pace.queue_age_s,
        queued_tokens=pace.queued_tokens,
        decoding=pace.decoding,
        computed_tokens=pace.computed_tokens,
        generated_tokens=pace.generated_tokens,
        step_s=pace.step_s,
        sequence_step_s=pace.sequence_step_s,
    )


def report_to_wire(report: WorkerReport) -> worker_pb2.WorkerReport:
    load = report.load
    return worker_pb2.WorkerReport(
        sequence=report.sequence,
        shape=None
        if report.shape is None
        else worker_pb2.WorkerShape(**{name: getattr(report.shape, name) for name in WorkerShape.__slots__}),
        **{name: getattr(load, name) for name in WorkerLoad.__slots__},
        dispatches=report.dispatches,
        registered=report.registered,
        evicted=report.evicted,
        steps=[worker_pb2.StepSample(tokens=step.tokens, pairs=step.pairs, seconds=step.seconds) for step in report.steps],
    )


def report_from_wire(message: worker_pb2.WorkerReport) -> WorkerReport:
    shape = None
    if message.HasField("shape"):
        if message.shape.block_tokens < 1:
            raise InvalidRequest("a block holds no token", param="block_tokens")
        shape = WorkerShape(**{name: getattr(message.shape, name) for name in WorkerShape.__slots__})
    return WorkerReport(
        sequence=message.sequence,
        load=WorkerLoad(**{name: getattr(message, name) for name in WorkerLoad.__slots__}),
        shape=shape,
        dispatches=tuple(message.dispatches),
        registered=tuple(message.registered),
        evicted=tuple(message.evicted),
        steps=tuple(StepSample(step.tokens, step.pairs, step.seconds) for step in message.steps),
    )


def error_to_wire(error: PdserveError) -> pb.ErrorDetail:
    return pb.ErrorDetail(
        code=error.code if error.code in ERRORS_BY_CODE else "EngineFailure",
        message=error.message,
        param=error.param or "",
        retry_after_s=error.retry_after_s,
    )


def error_from_wire(message: pb.ErrorDetail) -> PdserveError:
    return error_from_code(
        message.code,
        message.message,
        param=message.param or None,
        retry_after_s=message.retry_after_s if message.HasField("retry_after_s") else None,
    )
