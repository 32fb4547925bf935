"""What routing looks at in a call: its name, its headers, its tenant, its text, and which conversation it belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from router.schemas import ChatBody, CompletionBody

CONVERSATION_HEADER = "x-conversation-id"
_SHOWN_CHARS = 8192  # of a text; what is beyond says little more about how hard it is, and costs time

Header = Callable[[str], str]
"""The value of a header by its name in lower case; "" if it is not there."""


@dataclass(frozen=True, slots=True)
class Facts:
    asked: str
    header: Header
    tenant: str
    conversation: str  # the same for all turns of a conversation
    text: str  # what is asked in this turn


def facts_of(body: ChatBody | CompletionBody, header: Header, *, tenant: str, scope: str) -> Facts:
    """`scope` tells the conversations of one client from those of another."""
    if isinstance(body, ChatBody):
        texts = [(message.role, message.content or "") for message in body.messages]
        users = [text for role, text in texts if role == "user"]
        text = users[-1] if users else texts[-1][1]
        beginning = [*(text for role, text in texts if role in ("system", "developer")), *users[:1]]
    else:
        prompt = body.prompt[0]
        text = prompt if isinstance(prompt, str) else ""
        beginning = [prompt if isinstance(prompt, str) else repr(prompt)]
    given = header(CONVERSATION_HEADER)
    digest = hashlib.blake2b(digest_size=16)
    for part in (scope, "given", given) if given else (scope, "begins", *beginning):
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return Facts(body.model, header, tenant, digest.hexdigest(), text[:_SHOWN_CHARS])
