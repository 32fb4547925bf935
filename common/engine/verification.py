"""The one verifier of speculation: draws at each position as if nobody had guessed, and stops where the guess was wrong.

    rows of a slice with drafts      | after last token | after draft 0 | after draft 1 |
    drawn                              t0                 t1 if t0 = draft 0   t2 if also t1 = draft 1

A draw is a function of its row of logits and its `SampleSpec` alone, and a row of logits is what it would be without
speculation as long as the tokens before it are. So what comes out are the tokens that would have come out one by one, whoever
guessed, however badly, greedy or not; guesses decide how many come out of one step, and nothing else.

Greedy rows are drawn all at once, for an argmax costs next to nothing. Other draws, and reports of log-probabilities, cost as
much as some layers of a small model: they are made in waves, position by position, and only where all guesses before were right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from common.engine.batch import SampleSpec, SequenceSlice
from common.errors import PdserveError
from common.types import SampledToken

Sample = Callable[[torch.Tensor, Sequence[SampleSpec], Sequence[int]], list[SampledToken]]
"""As `sampler.sample`."""


def num_sampled_rows(item: SequenceSlice) -> int:
    """How many rows at the end of a slice need logits to draw from."""
    return item.num_drafts + 1 if item.samples else 0


def draw(logits: torch.Tensor, slices: Sequence[SequenceSlice], sample: Sample) -> list[tuple[SampledToken, ...]]:
    """The tokens of each slice; `logits` are its `num_sampled_rows` rows, slice by slice.

    None for a slice whose first draw cannot be made (`refusal` says why). If a later one cannot, those before it: the next step
    finds that one first."""
    drawn: list[list[SampledToken]] = [[] for _ in slices]
    first_rows, row = [], 0
    for item in slices:
        first_rows.append(row)
        row += num_sampled_rows(item)
    awaited = [index for index, item in enumerate(slices) if item.samples]
    while awaited:
        awaited = [index for index in awaited if refusal(slices[index], len(drawn[index])) is None]
        specs: list[SampleSpec] = []
        rows: list[int] = []
        for index in awaited:
            item, begin = slices[index], len(drawn[index])
            end = len(item.samples) if _at_once(item) else begin + 1
            specs.extend(item.samples[begin:end])
            rows.extend(first_rows[index] + (position if item.num_drafts else 0) for position in range(begin, end))
        tokens = iter(sample(logits, specs, rows) if specs else ())
        for index in awaited:
            item = slices[index]
            missing = len(item.samples) if _at_once(item) else 1
            drawn[index].extend(next(tokens) for _ in range(missing))
        awaited = [index for index in awaited if _goes_on(slices[index], drawn[index])]
    return [_right(item, tokens) for item, tokens in zip(slices, drawn, strict=True)]


def follow(slices: Sequence[SequenceSlice], best: Sequence[int]) -> list[tuple[SampledToken, ...]]:
    """As `draw`, where `best` is known to be drawn from the rows, whatever comes of those before."""
    found: list[tuple[SampledToken, ...]] = []
    row = 0
    for item in slices:
        tokens: list[SampledToken] = []
        for place, token_id in enumerate(best[row : row + num_sampled_rows(item)]):
            if refusal(item, place) is not None:
                break
            tokens.append(SampledToken(token_id))
            if not _goes_on(item, tokens):
                break
        found.append(tuple(tokens))
        row += num_sampled_rows(item)
    return found


def refusal(item: SequenceSlice, place: int = 0) -> PdserveError | None:
    """Why nothing can be drawn at this place, or, without drafts, for one of the choices."""
    specs = item.samples[place : place + 1] if item.num_drafts else item.samples
    for spec in specs:
        if spec.mask is not None and spec.mask.error is not None:
            return spec.mask.error
    return None


def _at_once(item: SequenceSlice) -> bool:
    """Whether all samples of the slice are drawn in one wave."""
    return not item.num_drafts or all(
        spec.temperature == 0.0 and spec.logprobs is None and spec.rules is None for spec in item.samples
    )


def _goes_on(item: SequenceSlice, drawn: Sequence[SampledToken]) -> bool:
    return len(drawn) < len(item.samples) and drawn[-1].token_id == _draft(item, len(drawn) - 1)


def _right(item: SequenceSlice, drawn: Sequence[SampledToken]) -> tuple[SampledToken, ...]:
    """The draws up to the first that is not the draft."""
    for place in range(min(item.num_drafts, len(drawn))):
        if drawn[place].token_id != _draft(item, place):
            return tuple(drawn[: place + 1])
    return tuple(drawn)


def _draft(item: SequenceSlice, place: int) -> int:
    return item.token_ids[len(item.token_ids) - item.num_drafts + place]
