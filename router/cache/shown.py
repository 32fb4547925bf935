"""What a listener has handed on already, so that it can go on with another generation of the same answer: each token once.

The second generation gives the same tokens, because the request says how they are drawn. That is checked, not believed: where it
gives others (numerics that depend on the batch, a worker with other weights), going on would splice two answers.
"""

from __future__ import annotations

from dataclasses import replace

from common.errors import WorkerLost
from common.types import TokenChunk
from router.dispatch import DispatchEvent


class Shown:
    """`rewind` once per new generation, then `rest_of` its events in order."""

    def __init__(self) -> None:
        self._tokens: dict[int, list[int]] = {}
        self._position: dict[int, int] = {}  # in the generation that is being read
        self._ended: set[int] = set()

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self._tokens.values()))

    def rewind(self) -> None:
        self._position = {}

    def rest_of(self, event: DispatchEvent) -> DispatchEvent:
        """The event without what was shown; perhaps no chunks are left. Raises WorkerLost if it contradicts what was shown."""
        if len(event.chunks) == 1 and self._is_new(event.chunks[0]):
            return event
        rests = [self._rest(chunk) for chunk in event.chunks]
        return replace(event, chunks=tuple(rest for rest in rests if rest is not None))

    def _is_new(self, chunk: TokenChunk) -> bool:
        """Whether it goes on where all that was shown ends, as tokens do but for those of another generation. It is noted."""
        shown = self._tokens.get(chunk.choice)
        start = self._position.get(chunk.choice, 0)
        if shown is None or len(shown) != start or chunk.finish_reason is not None or chunk.choice in self._ended:
            return False
        shown += chunk.token_ids
        self._position[chunk.choice] = start + len(chunk.token_ids)
        return bool(chunk.token_ids)

    def _rest(self, chunk: TokenChunk) -> TokenChunk | None:
        shown = self._tokens.setdefault(chunk.choice, [])
        start = self._position.get(chunk.choice, 0)
        end = self._position[chunk.choice] = start + len(chunk.token_ids)
        known = min(max(0, len(shown) - start), len(chunk.token_ids))
        same = list(chunk.token_ids[:known]) == shown[start : start + known]
        if not same or (chunk.finish_reason is not None and end < len(shown)):
            raise WorkerLost("the answer broke off, and what another worker made of it is not the same answer")
        shown.extend(chunk.token_ids[known:])
        if chunk.choice in self._ended or (known == len(chunk.token_ids) and chunk.finish_reason is None):
            return None
        if chunk.finish_reason is not None:
            self._ended.add(chunk.choice)
        return replace(chunk, token_ids=chunk.token_ids[known:], logprobs=chunk.logprobs[known:])
