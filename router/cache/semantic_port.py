"""The port through which a semantic cache is asked, after an exact miss, and told of fresh answers.

    exact miss ──find(question)──> a hit: the key of a stored answer, which is replayed as an exact hit is
                                   None: a worker answers ──learn(question, answer)──> once the answer is complete and stored

Whoever implements it keeps an index of questions; the answers themselves stay in the store, under the keys it was told of.
`learn` gets the very question that `find` got, so what was found out then (an embedding, a candidate that is not yet trusted) can
be kept by `question.key` meanwhile. Not every question is followed by `learn`: answers fail, are cancelled, or may not be stored.
A question whose client wants a fresh answer (`no-cache`) comes to `learn` without `find`.

What never comes here: several choices, log-probabilities, echo, conversations that do not end with a user's text, and calls whose
client ruled it out (`Cache-Control`, `x-cache`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from common.types import FinishReason
from router.sampling_class import SamplingClass


@dataclass(frozen=True, slots=True)
class Question:
    """A request, cut in two: the last user text, and a digest of everything else that an answer depends on."""

    key: bytes  # names the request exactly, but for its limit of tokens
    scope: bytes  # equal for requests that differ in `text` alone, or in their limit; holds tenant, model revision and tags
    text: str  # the last user text: NFC, runs of white space as one space
    tenant: str  # "" without API keys
    model: str  # the served name
    sampling: SamplingClass
    max_tokens: int
    num_earlier_messages: int  # before the last user text; 0 for completions
    has_tools: bool


@dataclass(frozen=True, slots=True)
class SemanticHit:
    """`key` was told by `learn`. If the answer is gone from the store, or longer than the limit, the hit counts as a miss."""

    key: bytes
    score: float  # for the answer's header `x-cache-score`
    hit_id: str  # for `x-cache-id`: by this the client says what it thinks of the hit


@dataclass(frozen=True, slots=True)
class FreshAnswer:
    """An answer that a worker gave to a question and that is now in the store."""

    key: bytes  # of the answer in the store
    text: str  # as the client saw it
    num_tokens: int
    finish_reason: FinishReason
    names: tuple[str, ...]  # of the epochs that it depends on; equal for all questions of a scope
    ttl_s: float


class SemanticLookup(Protocol):
    """Lives as long as the router. Its own deadline bounds `find`; neither call may fail a request."""

    def covers(self, sampling: SamplingClass) -> bool:
        """Whether questions of this class are to be asked at all. False spares making a question."""
        ...

    async def find(self, question: Question) -> SemanticHit | None: ...

    def learn(self, question: Question, answer: FreshAnswer) -> None:
        """Takes note and returns at once."""
        ...


class NoSemantics:
    """The semantic cache is off."""

    def covers(self, sampling: SamplingClass) -> bool:
        return False

    async def find(self, question: Question) -> SemanticHit | None:
        return None

    def learn(self, question: Question, answer: FreshAnswer) -> None:
        """There is nobody who would remember."""
