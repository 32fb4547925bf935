"""From tokens to text: one `ChoiceText` per choice turns chunks of tokens into deltas that may be shown.

    token ids  --DetokenizerStream-->  pieces  --StopMatcher-->  text that can no longer become part of a stop string

      ... e n d <st          "<st" may be the start of the stop string "<stop>": it is held back
      released |held         until the next pieces decide; a stop string never leaks, however it is split

The stop string that *ends* first wins (of those ending together, the longest): this is what reading character by character gives,
so the result does not depend on how the text was cut into tokens or chunks. After a match, or the worker's finish reason, a
choice is finished and drops what still arrives. A token is reported (id, log-probability) once the text before it is released,
and never if it begins inside the stop string.

Nothing here knows HTTP, gRPC or workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple, Protocol

from common.errors import EngineFailure
from common.types import FinishReason, TokenChunk, TokenLogprob


class Detokenizer(Protocol):
    """`common.tokenizer.DetokenizerStream`, as far as it is used here."""

    def push(self, token_id: int) -> str: ...

    def push_all(self, token_ids: Sequence[int]) -> str: ...

    def flush(self) -> str: ...


class StopMatcher:
    """Finds the first stop string in text that arrives in pieces. Finished after a match."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def feed(self, piece: str) -> str:
        """What may be shown now. After a match, everything up to the stop string (or its end, if included)."""
        if not self._stops:
            return piece
        text = self._held + piece
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            end, start, self.matched = min(found)
            self._held = ""
            return text[: end if self._include else start]
        keep = self._num_undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text ends here: what was held back is not part of a stop string after all."""
        held, self._held = self._held, ""
        return held

    def _num_undecided(self, text: str) -> int:
        """Length of the longest end of `text` that is a beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            tail = text[len(text) - length :]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


class ReportedToken(NamedTuple):
    """A token that may be shown, and where its text begins in the text of its choice. A tuple, for there is one per token."""

    token_id: int
    offset: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What is new of one choice. The last delta of a choice has a finish reason; there is exactly one such."""

    choice: int
    text: str = ""
    tokens: tuple[ReportedToken, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string, or the client's stop token id, that ended the choice

    @property
    def empty(self) -> bool:
        return not self.text and not self.tokens and self.finish_reason is None


@dataclass
class ChoiceText:
    """The text of one choice while it grows. `push` is called with the worker's chunks in order."""

    choice: int
    detokenizer: Detokenizer
    stops: tuple[str, ...] = ()
    include_stop: bool = False
    min_tokens: int = 0  # stop strings are not looked for in the text of so many first tokens
    client_stop_token_ids: frozenset[int] = frozenset()  # others (end of turn) give no stop reason
    discard_tokens: bool = False  # the client asked for no token at all; the worker had to be asked for one
    reports_tokens: bool = True  # whether anybody wants to see tokens beside the text
    finished: bool = field(default=False, init=False)
    num_tokens: int = field(default=0, init=False)  # generated up to the end of the choice, a stop token included

    def __post_init__(self) -> None:
        self._matcher = StopMatcher(self.stops, include=self.include_stop)
        self._detokenized_chars = 0
        self._released_chars = 0
        self._unreported: list[ReportedToken] = []

    def push(self, chunk: TokenChunk) -> ChoiceDelta:
        """The delta that the chunk gives; empty once finished. Raises EngineFailure on a chunk that contradicts itself."""
        if chunk.logprobs and len(chunk.logprobs) != len(chunk.token_ids):
            raise EngineFailure("the worker sent log-probabilities for other tokens than it sent")
        if self.finished:
            return ChoiceDelta(self.choice)
        if self.discard_tokens:
            self.finished = chunk.finish_reason is not None
            return ChoiceDelta(self.choice, finish_reason=FinishReason.LENGTH if self.finished else None)
        if len(chunk.token_ids) == 1 and chunk.finish_reason is None and not (self.stops or self._unreported or chunk.logprobs):
            return self._push_one(chunk.token_ids[0])
        text = self._push_until_stop(chunk) if self.stops else self._push_all(chunk)
        if self._matcher.matched is not None:
            return self._end(text, FinishReason.STOP, self._matcher.matched)
        if chunk.finish_reason is None:
            return ChoiceDelta(self.choice, text, self._report(everything=False))
        if chunk.stop_token_id is not None:
            self.num_tokens += 1
        text += self._release(self.detokenizer.flush())
        if self._matcher.matched is not None:
            return self._end(text, FinishReason.STOP, self._matcher.matched)
        held = self._matcher.flush()
        self._released_chars += len(held)
        stop_token = chunk.stop_token_id if chunk.stop_token_id in self.client_stop_token_ids else None
        return self._end(text + held, chunk.finish_reason, stop_token)

    def _push_one(self, token_id: int) -> ChoiceDelta:
        """What `push` comes to when nothing is held back, and nothing can be: nearly every token of nearly every answer."""
        offset = self._detokenized_chars
        piece = self.detokenizer.push(token_id)
        self.num_tokens += 1
        self._detokenized_chars += len(piece)
        self._released_chars = self._detokenized_chars
        if not self.reports_tokens:
            return ChoiceDelta(self.choice, piece)
        token = ReportedToken(token_id, offset)
        if not piece:
            self._unreported.append(token)
            return ChoiceDelta(self.choice)
        return ChoiceDelta(self.choice, piece, (token,))

    def _push_until_stop(self, chunk: TokenChunk) -> str:
        """What may be shown of the text of many tokens, up to a stop."""
        text = ""
        for token_id, logprob in zip_longest(chunk.token_ids, chunk.logprobs):
            self.num_tokens += 1
            if self.reports_tokens:
                self._unreported.append(ReportedToken(token_id, self._detokenized_chars, logprob))
            text += self._release(self.detokenizer.push(token_id))
            if self._matcher.matched is not None:
                break
        return text

    def _push_all(self, chunk: TokenChunk) -> str:
        """The text of many tokens where none can be a stop: of an answer from the cache, which has hundreds at once."""
        text = self._push_and_note(chunk) if self.reports_tokens else self.detokenizer.push_all(chunk.token_ids)
        self.num_tokens += len(chunk.token_ids)
        self._released_chars += len(text)
        self._detokenized_chars += len(text)
        return text

    def _push_and_note(self, chunk: TokenChunk) -> str:
        """The text of the tokens, each of which is to be reported."""
        push, unreported, offset = self.detokenizer.push, self._unreported, self._detokenized_chars
        pieces = []
        for token_id, logprob in zip_longest(chunk.token_ids, chunk.logprobs):
            unreported.append(ReportedToken(token_id, offset, logprob))
            piece = push(token_id)
            pieces.append(piece)
            offset += len(piece)
        return "".join(pieces)

    def _release(self, piece: str) -> str:
        self._detokenized_chars += len(piece)
        shown = piece if self.num_tokens <= self.min_tokens else self._matcher.feed(piece)
        self._released_chars += len(shown)
        return shown

    def _end(self, text: str, reason: FinishReason, stop_reason: str | int | None) -> ChoiceDelta:
        self.finished = True
        tokens = self._report(everything=self._matcher.matched is None)
        return ChoiceDelta(self.choice, text, tokens, reason, stop_reason)

    def _report(self, *, everything: bool) -> tuple[ReportedToken, ...]:
        """Tokens whose text has begun to be released. At an end without a stop string, all of them."""
        ready = len(self._unreported)
        if not everything:
            ready = sum(1 for token in self._unreported if token.offset < self._released_chars)
        tokens, self._unreported = self._unreported[:ready], self._unreported[ready:]
        return tuple(tokens)
