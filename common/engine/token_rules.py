"""What a request says about which token may come next, worked out for one draw.

    Request --TokenRules.of--> TokenRules, one per choice --for_next(tokens)--> RowRules, one per draw --> logit_rules
    CompiledGrammar, if it has one ---^

A `RowRules` is a pure function of the request and of the sequence's tokens. What a `TokenRules` keeps between calls, how often it
has seen each token, is a cache of that function: a choice that was preempted, forked, moved to another worker, or whose first
token was drawn elsewhere, counts the same tokens again and comes to the same rules. It may be asked about tokens that are only
guessed; `rewind` then makes it forget those that did not come.

Requests that ask for none of this have no `TokenRules`. It knows neither logits nor tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from common.engine.grammar import CompiledGrammar, GrammarState, NextMask, Restriction
from common.errors import EngineFailure
from common.types import FORCING_BIAS, Request

Ids = npt.NDArray[np.int64]
Values = npt.NDArray[np.float32]

_NO_IDS: Ids = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Bias:
    token_ids: Ids  # each once
    values: Values


@dataclass(frozen=True, slots=True, eq=False)
class Penalties:
    """`token_ids` are the tokens that the penalties are about, each once: the generated ones, and with a repetition penalty the
    prompt's as well. A count is how often the token was generated."""

    token_ids: Ids
    counts: Values
    repetition: float
    frequency: float
    presence: float


@dataclass(frozen=True, slots=True, eq=False)
class RowRules:
    """What is to be changed about one row of logits before a token is drawn from it."""

    bias: Bias | None = None
    penalties: Penalties | None = None
    allowed_token_ids: Ids | None = None  # each once; None = all
    banned_token_ids: Ids = field(default_factory=lambda: _NO_IDS)
    mask: NextMask | None = None  # of a grammar; says what the two above would say as well

    @property
    def is_mask(self) -> bool:
        """Whether nothing but the mask changes anything, if there is one."""
        return self.bias is None and self.penalties is None and self.allowed_token_ids is None and not len(self.banned_token_ids)

    def allow(self, token_id: int) -> bool:
        """Whether this token may come. Used to find guesses that are wrong for sure; what is drawn is decided over logits."""
        if self.mask is not None:
            return self.mask.allow(token_id)
        allowed = self.allowed_token_ids
        return not (self.banned_token_ids == token_id).any() and (allowed is None or bool((allowed == token_id).any()))


class TokenRules:
    """The rules of one choice. Owned by whoever owns the choice; calls of `for_next` are in the order of the sequence, which
    `rewind` shortens."""

    def __init__(self, request: Request, grammar: CompiledGrammar | None = None) -> None:
        sampling = request.sampling
        if sampling.grammar is not None and grammar is None:
            raise EngineFailure("the request has a grammar that was not compiled")
        self._grammar = None if grammar is None else grammar.start()
        self._restriction: Restriction | None = None  # of the place that was asked about last
        self._sampling = sampling
        self._num_prompt_tokens = request.num_prompt_tokens - request.num_resumed_tokens  # what was generated before is generated
        self._num_certain = request.num_resumed_tokens  # of the answer; what is beyond may be guessed
        single = [word[0] for word in sampling.bad_words if len(word) == 1]
        self._banned = _ids([*sampling.banned_by_bias, *single])
        self._banned_before_min_tokens = _ids([*self._banned.tolist(), *sampling.stop_token_ids])
        self._bad_endings: dict[
            int, list[tuple[list[int], int]]
        ] = {}  # by the last but one token: all but the last, and the last
        for word in sampling.bad_words:
            if len(word) > 1:
                self._bad_endings.setdefault(word[-2], []).append((list(word[:-1]), word[-1]))
        self._forced = _ids(token_id for token_id, value in sampling.logit_bias if value >= FORCING_BIAS)
        self._allowed = _ids(sampling.allowed_token_ids) if sampling.allowed_token_ids else None
        self._bias: Bias | None = None
        if sampling.logit_bias:
            token_ids, values = zip(*sampling.logit_bias, strict=True)
            self._bias = Bias(np.array(token_ids, dtype=np.int64), np.array(values, dtype=np.float32))
        self._penalised = sampling.repetition_penalty != 1.0 or bool(sampling.frequency_penalty or sampling.presence_penalty)
        self._seen: _Seen | None = None

    @classmethod
    def of(cls, request: Request, grammar: CompiledGrammar | None = None) -> TokenRules | None:
        """None if the request leaves the logits as they are. `grammar` is the request's own."""
        sampling = request.sampling
        wanted = (
            (sampling.min_tokens and sampling.stop_token_ids)
            or sampling.repetition_penalty != 1.0
            or sampling.frequency_penalty
            or sampling.presence_penalty
            or sampling.logit_bias
            or sampling.allowed_token_ids
            or sampling.bad_words
            or sampling.grammar
        )
        return cls(request, grammar) if wanted else None

    def for_next(self, tokens: Sequence[int]) -> RowRules | None:
        """The rules for what follows `tokens`, all of the sequence; None if there are none at this place."""
        num_generated = len(tokens) - self._num_prompt_tokens
        banned = self._banned if num_generated >= self._sampling.min_tokens else self._banned_before_min_tokens
        if self._bad_endings and num_generated:
            banned = _ids([*banned.tolist(), *self._completing(tokens, num_generated)])
        if self._grammar is not None:
            return self._with_mask(self._grammar, tokens, banned)
        allowed = self._allowed
        if len(self._forced):
            # A forced token that must not come now forces nothing.
            forced = self._forced if allowed is None else np.intersect1d(self._forced, allowed)
            forced = np.setdiff1d(forced, banned)
            allowed = forced if len(forced) else allowed
        penalties = self._penalties(tokens) if self._penalised else None
        if self._bias is None and penalties is None and allowed is None and not len(banned):
            return None
        return RowRules(self._bias, penalties, allowed, banned)

    @property
    def needs_tokens(self) -> bool:
        """Whether what may come next depends on which tokens came before, and not only on how many."""
        return self._grammar is not None or self._penalised or bool(self._bad_endings)

    def is_over(self, tokens: Sequence[int]) -> bool:
        """Whether the answer, which ends with the last of `tokens`, is whole, and nothing may follow. None of them is a guess."""
        if self._grammar is None:
            return False
        self._advance(self._grammar, tokens)
        self._num_certain = len(tokens) - self._num_prompt_tokens
        return self._grammar.is_over

    def rewind(self, num_tokens: int) -> None:
        """Only the first `num_tokens` of the tokens that it was asked about are still in the sequence. Rules that were given out
        for later places must not be used any more."""
        if self._seen is not None:
            self._seen.rewind(num_tokens)
        if self._grammar is not None:
            self._grammar.rewind(max(0, num_tokens - self._num_prompt_tokens))

    def _advance(self, grammar: GrammarState, tokens: Sequence[int]) -> None:
        grammar.consume(tokens[self._num_prompt_tokens + grammar.num_consumed :])

    def _with_mask(self, grammar: GrammarState, tokens: Sequence[int], banned: Ids) -> RowRules:
        """All that is about which tokens may come is in the mask, so that nothing is left undecided between them."""
        self._advance(grammar, tokens)
        if self._restriction is None or self._restriction.banned_token_ids is not banned:
            self._restriction = Restriction(
                stop_token_ids=self._sampling.stop_token_ids,
                allowed_token_ids=self._allowed,
                forced_token_ids=self._forced if len(self._forced) else None,
                banned_token_ids=banned,
            )
        penalties = self._penalties(tokens) if self._penalised else None
        return RowRules(self._bias, penalties, mask=grammar.next_mask(self._restriction, num_certain=self._num_certain))

    def _completing(self, tokens: Sequence[int], num_generated: int) -> list[int]:
        """The tokens that would complete a bad word of several tokens, all of them generated."""
        return [
            last
            for beginning, last in self._bad_endings.get(tokens[-1], ())
            if len(beginning) <= num_generated and list(tokens[-len(beginning) :]) == beginning
        ]

    def _penalties(self, tokens: Sequence[int]) -> Penalties | None:
        sampling = self._sampling
        if self._seen is None:
            self._seen = _Seen(tokens[: self._num_prompt_tokens], with_prompt=sampling.repetition_penalty != 1.0)
        self._seen.count_up_to(tokens)
        if not self._seen.size:
            return None
        return Penalties(
            self._seen.token_ids,
            self._seen.counts,
            sampling.repetition_penalty,
            sampling.frequency_penalty,
            sampling.presence_penalty,
        )


class _Seen:
    """The distinct tokens of a growing sequence, and how often each was generated."""

    def __init__(self, prompt: Sequence[int], *, with_prompt: bool) -> None:
        distinct = np.unique(np.array(prompt, dtype=np.int64)) if with_prompt else _NO_IDS
        self.size = len(distinct)
        self._token_ids = np.concatenate((distinct, np.zeros(64, dtype=np.int64)))
        self._counts = np.zeros(len(self._token_ids), dtype=np.float32)
        self._place = {token_id: place for place, token_id in enumerate(distinct.tolist())}
        self._num_given = len(distinct)
        self._num_prompt_tokens = len(prompt)
        self._counted: list[int] = []  # the places of the generated tokens, in order

    @property
    def token_ids(self) -> Ids:
        return self._token_ids[: self.size]  # does not change while the sequence grows: what was appended stays

    @property
    def counts(self) -> Values:
        return self._counts[: self.size].copy()

    def count_up_to(self, tokens: Sequence[int]) -> None:
        for token_id in tokens[self._num_prompt_tokens + len(self._counted) :]:
            place = self._place.get(token_id)
            if place is None:
                place = self._append(token_id)
            self._counts[place] += 1
            self._counted.append(place)

    def rewind(self, num_tokens: int) -> None:
        while self._counted and self._num_prompt_tokens + len(self._counted) > num_tokens:
            place = self._counted.pop()
            self._counts[place] -= 1
            if self._counts[place] == 0 and place >= self._num_given:  # then it was appended last
                self.size -= 1
                del self._place[int(self._token_ids[place])]

    def _append(self, token_id: int) -> int:
        if self.size == len(self._token_ids):
            self._token_ids = np.concatenate((self._token_ids, np.zeros_like(self._token_ids)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        place = self._place[token_id] = self.size
        self._token_ids[place] = token_id
        self.size += 1
        return place


def _ids(token_ids: Iterable[int]) -> Ids:
    return np.array(list(dict.fromkeys(token_ids)), dtype=np.int64)
