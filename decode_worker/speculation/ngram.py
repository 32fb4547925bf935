"""Guesses that the answer goes on as it, its prompt, or another answer of the same tenant went on before.

    a sequence           ... a b c d e f ... a b c        the longest earlier occurrence of its end -> guess: d e f
    answers so far       the last so many tokens of finished answers, per tenant

It costs no arithmetic: an index grows with the sequence (`text_index`), from the first guess on. A guess that reaches the end
of the text goes on with itself, so a period is continued for ever. Evidence is how many tokens agreed, and whose they were.

Answers of a tenant lie in two lists: a full one is kept until the next is full, so that forgetting costs nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from decode_worker.speculation.proposer import ChoiceKey, Guess, Wanted
from decode_worker.speculation.text_index import Match, TextIndex

_MOST_TENANTS = 64
_CONTEXT_TOKENS = 8  # of the prompt's end, remembered with an answer
_END = -1  # stands between answers; no token
_OF_OTHER_ANSWERS = 16  # added to the evidence of such guesses
_NO_GUESS = Guess()


class NgramProposer:
    name = "ngram"
    takes_time = False
    reads_rows = False

    def __init__(self, *, gram_tokens: int, shared_tokens: int) -> None:
        """Guesses where at least `gram_tokens` agree. Remembers up to `shared_tokens` of finished answers per tenant."""
        self._gram_tokens = gram_tokens
        self._shared_tokens = shared_tokens
        self._own: dict[ChoiceKey, tuple[list[int], TextIndex]] = {}
        self._answers: OrderedDict[str, _Answers] = OrderedDict()  # by salt, least recently used first

    @property
    def num_sequences(self) -> int:
        return len(self._own)

    def propose(self, wanted: Sequence[Wanted]) -> list[Guess]:
        return [self._guess(item) for item in wanted]

    def end(self, key: ChoiceKey, salt: str, tokens: Sequence[int], num_prompt_tokens: int) -> None:
        self._own.pop(key, None)
        if self._shared_tokens and len(tokens) > num_prompt_tokens:
            answers = self._answers.setdefault(salt, _Answers(self._gram_tokens, self._shared_tokens))
            self._answers.move_to_end(salt)
            answers.add(tokens[max(0, num_prompt_tokens - _CONTEXT_TOKENS) :])
            if len(self._answers) > _MOST_TENANTS:
                self._answers.popitem(last=False)

    def _guess(self, wanted: Wanted) -> Guess:
        text, index = self._own.get(wanted.key) or self._begin(wanted.key)
        text.extend(wanted.tokens[len(text) :])
        index.cover(len(text) - 1)
        own = index.find(text)
        answers = self._answers.get(wanted.salt)
        if answers is not None:
            found = answers.find(text)
            if found is not None and (own is None or found[1].num_tokens > own.num_tokens):
                token_ids = _following(found[0], found[1], wanted.most_tokens)
                return Guess(token_ids, _OF_OTHER_ANSWERS + _evidence(found[1]))
        return _NO_GUESS if own is None else Guess(_following(text, own, wanted.most_tokens), _evidence(own))

    def _begin(self, key: ChoiceKey) -> tuple[list[int], TextIndex]:
        text: list[int] = []
        begun = self._own[key] = (text, TextIndex(text, self._gram_tokens))
        return begun


class _Answers:
    """The newest answers of a tenant."""

    def __init__(self, gram_tokens: int, most_tokens: int) -> None:
        self._gram_tokens = gram_tokens
        self._most_tokens = most_tokens
        self._texts: list[tuple[list[int], TextIndex]] = []  # newest first, two at most

    def add(self, tokens: Sequence[int]) -> None:
        kept = tokens[-(self._most_tokens // 2) :]
        if not self._texts or len(self._texts[0][0]) + len(kept) > self._most_tokens // 2:
            text: list[int] = []
            self._texts = [(text, TextIndex(text, self._gram_tokens)), *self._texts[:1]]
        text, index = self._texts[0]
        text.extend(kept)
        index.cover(len(text) - 1)
        text.append(_END)

    def find(self, tokens: Sequence[int]) -> tuple[list[int], Match] | None:
        best: tuple[list[int], Match] | None = None
        for text, index in self._texts:
            match = index.find(tokens)
            if match is not None and (best is None or match.num_tokens > best[1].num_tokens):
                best = (text, match)
        return best


def _following(text: list[int], match: Match, most_tokens: int) -> tuple[int, ...]:
    """What followed the match, and behind the end of the text the guess itself; up to the end of an answer."""
    found = text[match.end : match.end + most_tokens]
    if _END in found:
        return tuple(found[: found.index(_END)])
    period = len(text) - match.end
    for place in range(len(found), most_tokens):
        found.append(found[place - period])
    return tuple(found)


def _evidence(match: Match) -> int:
    """1, 2, 3, 4, 5-8, 9-16, 17-32, 33-64 tokens that agree."""
    return match.num_tokens if match.num_tokens < 5 else 2 + (match.num_tokens - 1).bit_length()
