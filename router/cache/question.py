"""From a validated call to the question that a semantic cache is asked, where there is one to ask.

The body as the client wrote it is looked at here, because tokens do not tell where the last user text begins. The text is
normalised as Unicode and in its white space, and in nothing else: case and punctuation carry meaning.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from router.cache.digest import scope_digest
from router.cache.semantic_port import Question
from router.schemas import ChatBody, CompletionBody
from router.validate import ValidCall


def question_of(call: ValidCall, key: bytes, names: Sequence[str]) -> Question | None:
    """None for calls that a similar question's answer cannot serve."""
    body = call.body
    request = call.requests[0]
    plan = call.plan
    if body is None or call.num_choices != 1 or plan.echo or plan.discard_tokens or request.sampling.logprobs is not None:
        return None
    if isinstance(body, ChatBody):
        last = body.messages[-1]
        if last.role != "user" or not last.content:
            return None
        text: str = last.content
        frame: object = (body.messages[:-1], last.name)
        num_earlier = len(body.messages) - 1
    elif isinstance(body, CompletionBody) and isinstance(body.prompt[0], str):
        text, frame, num_earlier = body.prompt[0], (), 0
    else:
        return None
    return Question(
        key=key,
        names=tuple(names),
        scope=scope_digest(call, body, names, frame),
        text=" ".join(unicodedata.normalize("NFC", text).split()),
        tenant=request.cache_salt,
        model=call.model.name,
        sampling=call.sampling_class,
        max_tokens=request.sampling.max_tokens,
        num_earlier_messages=num_earlier,
        has_tools=bool(getattr(body, "tools", None)),
    )
