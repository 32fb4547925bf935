"""The contract between schedulers and the runner: a step as data.

A scheduler (one per worker role) returns a `ScheduledBatch`; the runner computes it and returns a `ForwardResult`. There is no
prefill or decode phase in here: each sequence has tokens, some of them already in KV, and a step computes the next few.

    sequence   |== in KV ==|-- token_ids of this step --|   not yet   |
               0         start                start + len(token_ids)

Decode is the case of one token at the end; a chunk of a prompt is the case of many. A slice samples iff `samples` is not empty,
and then from the logits of its last token.

Speculation is the case of a token and guesses of what follows it, the drafts. One token is drawn after each of them, and a draft
that equals the draw before it was right; so a slice gives its draws up to the first that differs, which is itself the next token:

    token_ids   last token | draft 0 | draft 1 | draft 2        num_drafts = 3, four samples
    draws       = draft 0    = draft 1  another                 three tokens; the KV of draft 2 is worthless

Nothing here owns memory: block tables name blocks that the block manager owns, and
the scheduler guarantees that `block_table` covers `start + len(token_ids)` tokens and no two slices write one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from common.engine.grammar import CompiledGrammar, NextMask
from common.engine.token_rules import RowRules, TokenRules
from common.errors import PdserveError
from common.load import pairs
from common.types import Request, SampledToken, SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from common.engine.heads.rows import HiddenRow


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """How to draw one token. The draw is a function of (logits, this): same alone, batched, preempted or elsewhere."""

    position: int  # index of the token to be drawn in its sequence; the RNG counter
    seed: int
    choice: int  # with `seed`, the RNG key
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    logprobs: int | None
    rules: RowRules | None = None  # penalties, bias, bans, grammar

    @property
    def takes_best(self) -> bool:
        """Whether the token is the best of those that may come, by logits as they are, of which nothing is reported."""
        return self.temperature == 0.0 and self.logprobs is None and (self.rules is None or self.rules.is_mask)

    @property
    def mask(self) -> NextMask | None:
        return None if self.rules is None else self.rules.mask

    @classmethod
    def for_next_token(cls, sampling: SamplingParams, *, choice: int, position: int, rules: RowRules | None) -> SampleSpec:
        """The draw of a choice's next token, which will stand at `position` of the sequence."""
        return cls(
            position=position,
            seed=sampling.seed,
            choice=choice,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            logprobs=sampling.logprobs,
            rules=rules,
        )


def first_samples(request: Request, grammar: CompiledGrammar | None = None) -> tuple[SampleSpec, ...]:
    """One draw per choice from the prompt's last logits. On whichever worker computes the prompt, so it needs all the rules."""
    rules = TokenRules.of(request, grammar)
    first = None if rules is None else rules.for_next(request.prompt_token_ids)
    return tuple(
        SampleSpec.for_next_token(
            request.sampling, choice=request.first_choice + index, position=request.num_prompt_tokens, rules=first
        )
        for index in range(request.num_choices)
    )


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """One sequence's share of a step. Written by a scheduler."""

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    samples: tuple[SampleSpec, ...] = ()
    prompt_logprobs: int | None = None  # report log-probabilities of the *next* prompt token at each position
    next_token_ids: Sequence[
        int
    ] = ()  # with prompt_logprobs: the tokens whose log-probability is reported, one per position that has one
    num_drafts: int = 0  # so many of token_ids, at their end, are guesses; there is one sample more


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    slices: tuple[SequenceSlice, ...]
    keeps_rows: bool = False  # the hidden rows that tokens were drawn from are wanted as well

    @property
    def num_tokens(self) -> int:
        return sum([len(item.token_ids) for item in self.slices])

    @property
    def num_pairs(self) -> float:
        return sum([pairs(len(item.token_ids), item.start + len(item.token_ids)) for item in self.slices])


@dataclass(frozen=True, slots=True)
class SliceResult:
    tokens: tuple[SampledToken, ...] = ()  # one per SampleSpec; with drafts, up to the first that is not the draft
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # one per next_token_id
    error: PdserveError | None = None  # the request's rules leave no token to draw: there are no tokens, and it ends in this
    row: HiddenRow | None = None  # what the last of the tokens was drawn from, if the batch keeps rows


@dataclass(frozen=True, slots=True)
class ForwardResult:
    slices: tuple[SliceResult, ...] = field(default=())
