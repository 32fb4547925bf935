"""Where in a text the last tokens of a sequence have occurred before.

    text       a b c d e a b c d ... x b c d
    ending in (c, d), newest first         ^        chains[end] leads to the occurrence before that one
                             ^

For every place the text is known by its last `gram_tokens` tokens; the occurrences of equal grams form a chain. A look-up walks
the newest few of the chain of the sequence's last gram and takes the one with which most tokens agree backwards, the newest of
equals. Adding a token takes one entry in a table, a look-up is bounded whatever the text is.

The text is the owner's list, and only grows; what is not covered yet is not found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Match:
    end: int  # the tokens before text[end] agree; text[end] is what followed
    num_tokens: int  # so many agree


class TextIndex:
    def __init__(self, text: Sequence[int], gram_tokens: int, *, most_occurrences: int = 16, most_tokens: int = 64) -> None:
        """Looks at `most_occurrences` places, and at `most_tokens` tokens of each."""
        self._text = text
        self._gram_tokens = gram_tokens
        self._most_occurrences = most_occurrences
        self._most_tokens = most_tokens
        self._newest: dict[tuple[int, ...], int] = {}
        self._before: list[int] = []  # by end: the end of the occurrence before it, 0 if there is none
        self._num_covered = 0

    def cover(self, end: int) -> None:
        """Places up to `end` can be found from now on; text[end] has to be there, for it is what followed."""
        text, size, newest, before = self._text, self._gram_tokens, self._newest, self._before
        for place in range(self._num_covered + 1, end + 1):
            if place < size:
                before.append(0)
                continue
            gram = tuple(text[place - size : place])
            before.append(newest.get(gram, 0))
            newest[gram] = place
        self._num_covered = max(self._num_covered, end)

    def find(self, tokens: Sequence[int]) -> Match | None:
        """The place where most of the last tokens of `tokens` stand."""
        size = self._gram_tokens
        if len(tokens) < size:
            return None
        best = Match(0, 0)
        end = self._newest.get(tuple(tokens[len(tokens) - size :]), 0)
        for _ in range(self._most_occurrences):
            if not end or best.num_tokens >= self._most_tokens:
                break
            num_tokens = self._agreeing(tokens, end)
            if num_tokens > best.num_tokens:
                best = Match(end, num_tokens)
            end = self._before[end - 1]
        return best if best.num_tokens else None

    def _agreeing(self, tokens: Sequence[int], end: int) -> int:
        text, last = self._text, len(tokens)
        count, most = self._gram_tokens, min(self._most_tokens, end, last)
        while count < most and text[end - count - 1] == tokens[last - count - 1]:
            count += 1
        return count
