"""What names an answer: digests over everything that it depends on, and over nothing else.

    key      model revision, tenant, tags, prompt tokens, sampling, what cuts the tokens into an answer      but for the limit
    limited  key + max_tokens: for an answer that ran into its limit
    scope    the same, with the text of the body in place of prompt tokens and without the last user text: for the semantic cache

The prompt counts as the token ids that workers get, so a template, a tool description or a role can only be forgotten here if it
is forgotten there. Every field counts unless it is listed below as noise, also one that is added tomorrow; a test wants each
field named. Noise is who asks, how long one waits, how tokens are shown, and what a greedy draw does not look at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from common.types import SamplingParams
from router.cache.canonical import canonical, fields_of, token_ids
from router.sampling_class import SamplingClass
from router.schemas import GenerationBody
from router.validate import ValidCall

CACHE_SCHEMA = "answers-1"
DIGEST_BYTES = 16

# Of `common.types.Request`. The prompt and the sampling are taken by themselves.
REQUEST_NOISE = frozenset({"request_id", "timeout_s", "dispatch_id", "priority"})
_REQUEST_PARTS = frozenset({"prompt_token_ids", "sampling"})
_REQUEST_LEFT_OUT = REQUEST_NOISE | _REQUEST_PARTS

# Of `common.types.SamplingParams`. `max_tokens` has its own rule, a seed that the router drew is no part of the question.
SAMPLING_LIMIT = frozenset({"max_tokens"})
SAMPLING_SEED = frozenset({"seed"})
GREEDY_NOISE = frozenset({"seed", "top_k", "top_p", "min_p"})  # one argmax, whatever they say

# Of `router.validate.OutputPlan`: how tokens that are the same are shown.
PLAN_NOISE = frozenset(
    {"stream", "include_usage", "usage_on_every_chunk", "timings", "return_token_ids", "echo", "prompt_texts"}
)  # fmt: skip

# Of the bodies of `router.schemas`, for the scope. `model` is an alias; the limit and the seed are judged as above, and what
# `messages` and `prompt` hold beside the last user text is added to the scope by itself.
BODY_NOISE = frozenset(
    {
        "model", "stream", "stream_options", "pdserve_timings", "priority", "return_token_ids",
        "max_tokens", "max_completion_tokens", "seed",
    }
)  # fmt: skip
_BODY_LEFT_OUT = BODY_NOISE | {"messages", "prompt"}


@dataclass(frozen=True, slots=True)
class AnswerKey:
    """`key` is for answers that ended by themselves: they serve every limit that they fit in."""

    key: bytes
    limited: bytes


def answer_key(call: ValidCall, index: int, names: Sequence[str]) -> AnswerKey:
    """Of one request of a call. `names` are those of the epochs that its answer depends on."""
    request = call.requests[index]
    everything = (
        _head(call, names),
        fields_of(request, _REQUEST_LEFT_OUT),
        token_ids(request.prompt_token_ids),
        _sampling(request.sampling, call.sampling_class),
        fields_of(call.plan, PLAN_NOISE),
    )
    key = _digest(everything)
    return AnswerKey(key, _digest((key, canonical(request.sampling.max_tokens))))


def scope_digest(call: ValidCall, body: GenerationBody, names: Sequence[str], frame: object) -> bytes:
    """`frame` is what surrounds the last user text in the conversation."""
    request = call.requests[0]
    return _digest(
        (
            b"scope",
            _head(call, names),
            fields_of(request, _REQUEST_LEFT_OUT),
            canonical(type(body).__name__),
            canonical(frame),
            fields_of(body, _BODY_LEFT_OUT),
            _sampling(request.sampling, call.sampling_class),
            fields_of(call.plan, PLAN_NOISE),
        )
    )


def _head(call: ValidCall, names: Sequence[str]) -> bytes:
    return canonical((CACHE_SCHEMA, call.model.name, call.model.fingerprint, call.model.tokenizer.digest, names))


def _sampling(sampling: SamplingParams, kind: SamplingClass) -> bytes:
    noise = SAMPLING_LIMIT
    if sampling.greedy:
        noise |= GREEDY_NOISE
    elif kind is not SamplingClass.SEEDED:
        noise |= SAMPLING_SEED
    return canonical(sampling.greedy or kind is SamplingClass.SEEDED) + fields_of(sampling, noise)


def _digest(parts: Sequence[bytes]) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
