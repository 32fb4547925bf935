"""What all OpenAI-shaped answers have in common: the envelope, usage, errors, and how deltas add up to whole choices.

    streamed     chunk, chunk, ..., chunk with finish_reason, [usage chunk with choices []]      (per choice, interleaved)
    at once      one body with every choice in order

`router.chat_format` and `router.completion_format` are the two shapes of choices. Nothing here knows SSE framing or sockets.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from common.errors import AuthenticationFailed, ContextLengthExceeded, ModelNotFound, Overloaded, PdserveError, RateLimited
from common.types import FinishReason
from router.generation import Generation, Timings
from router.streaming import ChoiceDelta, ReportedToken

Json = dict[str, Any]

VERSION = importlib.metadata.version("pdserve")
_LOWEST_LOGPROB = -9999.0  # JSON has no infinity
_OPENAI_CODES: dict[type[PdserveError], str] = {
    ContextLengthExceeded: "context_length_exceeded",
    ModelNotFound: "model_not_found",
    AuthenticationFailed: "invalid_api_key",
    Overloaded: "rate_limit_exceeded",
    RateLimited: "rate_limit_exceeded",
}


class Formatter(Protocol):
    """One per call."""

    def chunks(self, delta: ChoiceDelta) -> Iterable[Json]:
        """What a streaming client is sent for a delta; perhaps nothing."""
        ...

    def last_chunk(self) -> Json | None:
        """Usage and timings after the last delta, if they were asked for."""
        ...

    def body(self, choices: Sequence[WholeChoice]) -> Json:
        """The whole answer of a client that does not stream."""
        ...


@dataclass(frozen=True, slots=True)
class WholeChoice:
    index: int
    text: str
    tokens: tuple[ReportedToken, ...]
    finish_reason: FinishReason | None
    stop_reason: str | int | None


def whole_choices(deltas: Iterable[ChoiceDelta], num_choices: int) -> list[WholeChoice]:
    """Adds up all deltas of a call, in the order of their indexes."""
    by_choice: list[list[ChoiceDelta]] = [[] for _ in range(num_choices)]
    for delta in deltas:
        by_choice[delta.choice].append(delta)
    return [
        WholeChoice(
            index,
            "".join(delta.text for delta in parts),
            tuple(token for delta in parts for token in delta.tokens),
            parts[-1].finish_reason if parts else None,
            parts[-1].stop_reason if parts else None,
        )
        for index, parts in enumerate(by_choice)
    ]


class Envelope:
    """The part of a call's chunks and bodies that does not depend on their choices."""

    def __init__(self, generation: Generation, *, response_id: str, created_s: int) -> None:
        self._generation = generation
        self._plan = generation.call.plan
        model = generation.call.model
        weights = hashlib.sha256(model.fingerprint.encode()).hexdigest()[:8]
        self._id = response_id
        self._rest = {"created": created_s, "model": model.name, "system_fingerprint": f"pdserve-{VERSION}-{weights}"}

    def chunk(self, object_name: str, choice: Json, **more: Any) -> Json:
        chunk = {"id": self._id, "object": object_name, **self._rest, "choices": [choice], **more}
        if self._plan.usage_on_every_chunk:
            chunk["usage"] = self._usage()
        return chunk

    def last_chunk(self, object_name: str) -> Json | None:
        if not self._plan.include_usage and not self._plan.timings:
            return None
        return {"id": self._id, "object": object_name, **self._rest, "choices": [], "usage": self._usage(), **self._timings()}

    def body(self, object_name: str, choices: list[Json], **more: Any) -> Json:
        head = {"id": self._id, "object": object_name, **self._rest}
        return {**head, "choices": choices, "usage": self._usage(), **more, **self._timings()}

    def _usage(self) -> Json:
        usage = self._generation.usage
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        }

    def _timings(self) -> Json:
        timings = self._generation.timings if self._plan.timings else None
        return {} if timings is None else {"timings": timings_object(timings)}


def timings_object(timings: Timings) -> Json:
    """pdserve's own extension: where the time of a call's first request went, in milliseconds."""
    waterfall = timings.waterfall
    worker = waterfall.worker
    return {
        "ttft_ms": _ms(waterfall.ttft_s),
        "tpot_ms": _ms(waterfall.tpot_s),
        "total_ms": _ms(waterfall.total_s),
        "stages_ms": {name: _ms(seconds) for name, seconds in waterfall.stages()},
        "prefill_worker": worker.prefill_worker or None,
        "decode_worker": timings.decode_worker or None,
        "cache": timings.cache or None,
        "transport": worker.transport or None,
        "transfer_hidden_ms": _ms(worker.transfer_hidden_s),
        "transfer_bytes": worker.transfer_bytes,
        "transfer_blocks": worker.transfer_blocks,
        "cached_tokens": timings.cached_tokens,
        "retries": timings.retries,
    }


def error_body(error: PdserveError) -> Json:
    code = _OPENAI_CODES.get(type(error)) or re.sub(r"(?<!^)(?=[A-Z])", "_", error.code).lower()
    return {"error": {"message": error.message, "type": error.openai_type, "param": error.param, "code": code}}


def json_logprob(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
