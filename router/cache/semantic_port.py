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

import asyncio
from dataclasses import dataclass
from typing import Protocol

from common.errors import InvalidRequest
from common.types import FinishReason
from router.sampling_class import SamplingClass
from router.store.base import Epochs


@dataclass(frozen=True, slots=True)
class Question:
    """A request, cut in two: the last user text, and a digest of everything else that an answer depends on."""

    key: bytes  # names the request exactly, but for its limit of tokens
    names: tuple[str, ...]  # of the epochs that its answer depends on; equal for all questions of a scope
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
    verify: bool = False  # the answer is to be computed all the same, in the background, and learned


@dataclass(frozen=True, slots=True)
class FreshAnswer:
    """An answer that a worker gave to a question and that is now in the store."""

    key: bytes  # of the answer in the store
    text: str  # as the client saw it
    num_tokens: int
    finish_reason: FinishReason
    names: tuple[str, ...]  # of the epochs that it depends on; equal for all questions of a scope
    epochs: Epochs  # as they were before it was made
    ttl_s: float


class SemanticLookup(Protocol):
    """Lives as long as the router. Its own deadline bounds `find`; neither call may fail a request."""

    def covers(self, sampling: SamplingClass) -> bool:
        """Whether questions of this class are to be asked at all. False spares making a question."""
        ...

    async def find(self, question: Question) -> SemanticHit | None: ...

    def unusable(self, question: Question, hit: SemanticHit) -> None:
        """What `find` gave was not served: the answer is gone from the store, or the request's limit or age rules it out."""
        ...

    def learn(self, question: Question, answer: FreshAnswer) -> None:
        """Takes note and returns at once."""
        ...

    async def feedback(self, hit_id: str, *, ok: bool, tenant: str) -> bool:
        """A client's word on a hit; whether the answer was removed for it. Raises InvalidRequest, StoreUnavailable."""
        ...

    async def run(self) -> None:
        """Ends only by cancellation."""
        ...

    async def close(self) -> None: ...


class NoSemantics:
    """The semantic cache is off."""

    def covers(self, sampling: SamplingClass) -> bool:
        return False

    async def find(self, question: Question) -> SemanticHit | None:
        return None

    def learn(self, question: Question, answer: FreshAnswer) -> None:
        """There is nobody who would remember."""

    def unusable(self, question: Question, hit: SemanticHit) -> None:
        """There are no hits."""

    async def feedback(self, hit_id: str, *, ok: bool, tenant: str) -> bool:
        raise InvalidRequest("the semantic cache is off, so no answer came from it", param="id")

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        """Nothing was opened."""
