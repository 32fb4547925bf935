"""How many tokens of each guess are worth a row: as many as give the most tokens per second, over the whole step.

    tokens of a step    one of every sequence, and for every draft the probability that it and all before it are right
    cost of a step      by its rows (`step_cost`)

Drafts of all sequences are ranked by that probability, which falls along a guess; the step takes the best so many, where tokens
over cost is highest. With one sequence rows are nearly free and long guesses are taken; a full batch takes only what is nearly
certain, or nothing. All of it is worked out anew for each step, from figures alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from decode_worker.speculation.step_cost import StepCost

_LEAST_GAIN = 1.05  # below, the noise of what is measured decides


def choose_lengths(
    offers: Sequence[tuple[int, float, float]],
    cost: StepCost,
    *,
    num_sequences: int,
    num_rows: int,
    most_rows: int,
    drafting_s: float = 0.0,
) -> list[int]:
    """How many tokens to take of each offer: (length, probability of its first token, of each further one after a right one).

    The step has `num_rows` rows without drafts, one of them for each of `num_sequences` sequences, and room for `most_rows` more.
    Where guesses are yet to be made, `drafting_s` is what it takes to make the first token of all of them, the second, and so on.
    """
    ranked = sorted(
        (-first * further**place, place, index)
        for index, (length, first, further) in enumerate(offers)
        for place in range(length)
    )[:most_rows]
    lengths = [0] * len(offers)
    if not ranked:
        return lengths
    costs = cost.of(num_rows, len(ranked) + 1)
    best_rate = _LEAST_GAIN * num_sequences / costs[0]
    tokens, best, longest = float(num_sequences), 0, 0
    for count, (negative, place, _) in enumerate(ranked, start=1):
        tokens -= negative
        longest = max(longest, place + 1)
        rate = tokens / (costs[count] + longest * drafting_s)
        if rate > best_rate:
            best, best_rate = count, rate
    for _, _, index in ranked[:best]:
        lengths[index] += 1
    return lengths
