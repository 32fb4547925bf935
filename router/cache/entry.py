"""A finished answer at the level of tokens, as it lies in a store.

    events ──Recording.add──> complete ──entry──> encode ──> store ──> decode ──replay──> events, for any client and any format

An entry holds what workers sent, up to the token at which each choice was complete as a client saw it. It is JSON with a version:
what cannot be read, for whatever reason, is no entry. It is rendered by the code that renders fresh answers, so an answer that
was stored for one format serves the others.

Knows neither keys nor stores.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import EngineFailure
from common.types import FinishReason, StageTimings, Started, TokenChunk, TokenLogprob, WorkerRef
from router.choice_text import choice_text
from router.dispatch import Admission, DispatchEvent
from router.streaming import ChoiceText
from router.validate import ValidCall

_VERSION = 1
_REPLAYED_TOKENS = 512  # per event: a long answer must not hold up the streams of others
NO_WORKER = WorkerRef("", 0, "")

_Logprob = tuple[int, float | None, list[tuple[int, float | None]]]  # JSON has no infinity: None is minus infinity


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EntryChoice(_Part):
    tokens: list[int]
    logprobs: list[_Logprob] = []
    finish: FinishReason
    stop_token: int | None = None
    needed_tokens: int  # the least limit under which this choice ends like this


class Entry(_Part):
    version: int = _VERSION
    created_s: float  # wall clock
    choices: list[EntryChoice]
    prompt_logprobs: list[_Logprob | None] = []

    @property
    def ended_by_itself(self) -> bool:
        """Whether no choice ran into the limit, so that a greater one gives the same answer."""
        return all(choice.finish is FinishReason.STOP for choice in self.choices)

    def serves(self, limit_tokens: int) -> bool:
        """Whether a request with this limit would have got the same. (One with the entry's own limit would, however it ended.)"""
        return self.ended_by_itself and all(choice.needed_tokens <= limit_tokens for choice in self.choices)

    @property
    def num_tokens(self) -> int:
        return sum(len(choice.tokens) for choice in self.choices)


def encode(entry: Entry) -> bytes:
    return orjson.dumps(entry.model_dump())


def decode(data: bytes) -> Entry | None:
    try:
        entry = Entry.model_validate_json(data)
    except ValidationError:
        return None
    sound = entry.version == _VERSION and entry.choices and math.isfinite(entry.created_s)
    return entry if sound and all(len(choice.logprobs) in (0, len(choice.tokens)) for choice in entry.choices) else None


async def replay(entry: Entry, *, num_prompt_tokens: int, now_s: float) -> AsyncGenerator[DispatchEvent, None]:
    """The entry as a worker's events; the whole prompt counts as cached. `now_s` is the monotonic time."""
    started = Started(StageTimings(), num_prompt_tokens, tuple(map(_logprob, entry.prompt_logprobs)))
    admission: Admission | None = Admission(started, NO_WORKER, now_s, retries=0)
    for index, choice in enumerate(entry.choices):
        logprobs = tuple(report for report in map(_logprob, choice.logprobs) if report is not None)
        for start in range(0, max(1, len(choice.tokens)), _REPLAYED_TOKENS):
            if admission is None:
                await asyncio.sleep(0)
            end = start + _REPLAYED_TOKENS
            last = end >= len(choice.tokens)
            chunk = TokenChunk(
                index,
                tuple(choice.tokens[start:end]),
                logprobs[start:end],
                choice.finish if last else None,
                choice.stop_token if last else None,
            )
            yield DispatchEvent((chunk,), admission)
            admission = None


@dataclass
class _Growing:
    text: ChoiceText | None  # None: the worker's finish reason alone ends the choice
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    finish: FinishReason | None = None
    stop_token: int | None = None
    needed_tokens: int = 0


class Recording:
    """Follows the events of one request and knows when the answer is complete. With `with_text` it keeps the text too."""

    def __init__(self, call: ValidCall, index: int, *, with_text: bool) -> None:
        first = index * call.requests[index].num_choices
        look_at_text = with_text or bool(call.plan.stops)
        self._choices = [
            _Growing(choice_text(call, first + choice) if look_at_text else None)
            for choice in range(call.requests[index].num_choices)
        ]
        self._num_complete = 0
        self._prompt_logprobs: tuple[TokenLogprob | None, ...] = ()

    @property
    def complete(self) -> bool:
        return self._num_complete == len(self._choices)

    @property
    def text(self) -> str:
        """Of the first choice, as clients see it."""
        return "".join(self._choices[0].shown)

    def add(self, event: DispatchEvent) -> None:
        """Raises EngineFailure on events that contradict themselves."""
        if event.admission is not None:
            self._prompt_logprobs = event.admission.started.prompt_logprobs
        for chunk in event.chunks:
            if not 0 <= chunk.choice < len(self._choices):
                raise EngineFailure("the worker sent tokens for a choice that was not asked for")
            choice = self._choices[chunk.choice]
            if choice.finish is None:
                _grow(choice, chunk)
                self._num_complete += choice.finish is not None

    def entry(self, created_s: float) -> Entry:
        """Once complete."""
        return Entry(
            created_s=created_s,
            choices=[
                EntryChoice(
                    tokens=choice.tokens,
                    logprobs=[_report(logprob) for logprob in choice.logprobs],
                    finish=choice.finish,
                    stop_token=choice.stop_token,
                    needed_tokens=choice.needed_tokens,
                )
                for choice in self._choices
                if choice.finish is not None
            ],
            prompt_logprobs=[None if logprob is None else _report(logprob) for logprob in self._prompt_logprobs],
        )


def _grow(choice: _Growing, chunk: TokenChunk) -> None:
    choice.tokens.extend(chunk.token_ids)
    choice.logprobs.extend(chunk.logprobs)
    if choice.text is not None:
        delta = choice.text.push(chunk)
        choice.shown.append(delta.text)
        if (
            choice.text.finished and chunk.finish_reason is None
        ):  # a stop string; what the worker would have sent next is not known
            choice.finish, choice.needed_tokens = FinishReason.STOP, choice.text.num_tokens
            choice.tokens, choice.logprobs = choice.tokens[: choice.needed_tokens], choice.logprobs[: choice.needed_tokens]
            return
    if chunk.finish_reason is not None:
        # A stop token is drawn as well, though it is not shown: under a limit of the tokens shown it would not have been reached.
        choice.finish, choice.stop_token = chunk.finish_reason, chunk.stop_token_id
        choice.needed_tokens = len(choice.tokens) + (chunk.finish_reason is FinishReason.STOP)


def _report(logprob: TokenLogprob) -> _Logprob:
    return logprob.token_id, _finite(logprob.logprob), [(token_id, _finite(value)) for token_id, value in logprob.top]


def _finite(value: float) -> float | None:
    return None if value == -math.inf else value


def _logprob(report: _Logprob | None) -> TokenLogprob | None:
    if report is None:
        return None
    token_id, value, top = report
    return TokenLogprob(token_id, _number(value), tuple((other, _number(other_value)) for other, other_value in top))


def _number(value: float | None) -> float:
    return -math.inf if value is None else value
