"""How many tokens of each guess are worth a row: as many as make the users' answers come fastest, in geometric mean.

    speed of an answer    its tokens in this step over the step's time: one token, and what its guess is expected to add
    time of a step        by its rows (`step_cost`)

A row for one sequence takes time of all others. Were tokens per second of the whole step the measure, a sequence whose text
repeats itself would hold up seven that do not, and the last of them would end later than without any guess; in the geometric mean
a gain of one has to outweigh the loss of the others in proportion. With one sequence both are the same: rows are nearly free and
long guesses are taken. Many sequences whose guesses are all good (copying) take them all the same. Worked out anew for each step,
from figures alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

from decode_worker.speculation.step_cost import StepCost

_LEAST_GAIN = 1.03  # below, the noise of what is measured decides
_MORE_PER_SEQUENCE, _MOST_LEAST_GAIN = 0.002, 1.04  # with many, a gain of few is soon less than what all pay for it on the host


def choose_lengths(
    offers: Sequence[tuple[int, float, float]],
    cost: StepCost,
    *,
    num_sequences: int,
    num_rows: int,
    most_rows: int,
    drafting_s: float = 0.0,
) -> list[int]:
    """`best_lengths` where all offers are yet to be made, or all are there."""
    awaited = range(len(offers)) if drafting_s else ()
    return best_lengths(
        offers,
        cost,
        num_sequences=num_sequences,
        num_rows=num_rows,
        most_rows=most_rows,
        awaited=awaited,
        drafting_s=drafting_s,
    )[0]


def best_lengths(
    offers: Sequence[tuple[int, float, float]],
    cost: StepCost,
    *,
    num_sequences: int,
    num_rows: int,
    most_rows: int,
    awaited: Collection[int] = (),
    drafting_s: float = 0.0,
    demanded: float = 0.0,
) -> tuple[list[int], float]:
    """How many tokens to take of each offer: (length, probability of its first token, of each further one after a right one); and
    the logarithm of what the answers' speed gains by it, 0 where nothing is taken.

    The step has `num_rows` rows without drafts, one of them for each of `num_sequences` sequences, and room for `most_rows` more.
    Guesses of the offers `awaited` are yet to be made: `drafting_s` is what it takes to make the first token of all of them, the
    second, and so on. A gain has to be larger than usual by `demanded`.
    """
    ranked = sorted((-gain, place, index) for index, offer in enumerate(offers) for place, gain in enumerate(_gains(*offer)))[
        :most_rows
    ]
    lengths = [0] * len(offers)
    if not ranked:
        return lengths, 0.0
    costs = cost.of(num_rows, len(ranked) + 1)
    best_speed = math.log(min(_MOST_LEAST_GAIN, _LEAST_GAIN + _MORE_PER_SEQUENCE * (num_sequences - 1))) + demanded
    gained, best, longest = 0.0, 0, 0
    for count, (negative, place, index) in enumerate(ranked, start=1):
        gained -= negative
        if index in awaited:
            longest = max(longest, place + 1)
        speed = gained / num_sequences - math.log((costs[count] + longest * drafting_s) / costs[0])
        if speed > best_speed:
            best, best_speed = count, speed
    for _, _, index in ranked[:best]:
        lengths[index] += 1
    return lengths, best_speed if best else 0.0


def _gains(length: int, first: float, further: float) -> Iterator[float]:
    """What each token of a guess adds to the logarithm of the sequence's tokens in the step. Falls along the guess, so taking the
    largest of all sequences never skips one."""
    tokens, probability = 1.0, first
    for _ in range(length):
        yield math.log1p(probability / tokens)
        tokens += probability
        probability *= further
