"""What the verifier draws, against the exact distribution: four tokens of a toy model, through drafts that are mostly wrong.

The joint distribution of the tokens is worked out by hand from the model and the rules. Drafts are thrown, or come from heads on
hidden rows, and then depend on what was drawn before. Draws are a function of seed and position, so a run either always passes or
never does. `make test-distribution` draws two million tokens in all.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from common.blocks import root_hash
from common.clock import ManualClock
from common.engine.batch import SequenceSlice
from common.engine.heads.file import Description
from common.engine.heads.heads import DraftHeads
from common.engine.heads.rows import HiddenRow
from common.engine.sampler import sample
from common.engine.sequence import PagedSequence
from common.engine.verification import draw
from common.types import Request, SamplingParams
from decode_worker.generation import Choice, Generation
from decode_worker.speculation.medusa import MedusaProposer
from decode_worker.speculation.proposer import ChoiceKey, Wanted
from support.search_depth import examples
from support.tiny_heads import make_weights

VOCAB = 6
LENGTH = 4
PROMPT = (1, 4, 1)
MODEL = np.random.default_rng(5).normal(size=(VOCAB, VOCAB)).astype(np.float32) * 1.5  # logits by the last token
AT_ONCE = 1000


@dataclass(frozen=True)
class Case:
    name: str
    longest: int  # draft
    fields: dict[str, float]
    by_heads: bool = False


PENALTIES = {"presence_penalty": 0.9, "frequency_penalty": 0.7, "repetition_penalty": 1.5}
ALL = {"temperature": 0.8, "top_k": 4, "top_p": 0.9, "frequency_penalty": 1.3, "repetition_penalty": 0.7}
CASES = [
    Case("one draft", 1, {}),
    Case("two drafts", 2, {}),
    Case("three drafts", 3, {}),
    Case("cold, top-k", 2, {"temperature": 0.6, "top_k": 3}),
    Case("hot, top-p", 3, {"temperature": 1.7, "top_p": 0.8}),
    Case("penalties", 2, PENALTIES),
    Case("all of it", 3, ALL),
    Case("heads, one draft", 1, {}, by_heads=True),
    Case("heads, three drafts", 3, {}, by_heads=True),
    Case("heads, cold, top-k", 3, {"temperature": 0.6, "top_k": 3}, by_heads=True),
    Case("heads, hot, top-p", 2, {"temperature": 1.7, "top_p": 0.8}, by_heads=True),
    Case("heads, penalties", 3, PENALTIES, by_heads=True),
    Case("heads, all of it", 2, ALL, by_heads=True),
]
HIDDEN = torch.randn(VOCAB, 16, generator=torch.Generator().manual_seed(6))  # hidden rows of the toy model, by the last token


def toy_heads() -> MedusaProposer:
    """Whose guesses depend on the token before the last and on the last one."""
    weights = make_weights(Description("d", 3, hidden_size=16, vocab_size=VOCAB, width=16), list(range(VOCAB)))
    head = torch.randn(VOCAB, 16, generator=torch.Generator().manual_seed(7))
    return MedusaProposer(DraftHeads(weights, head, HIDDEN, torch.device("cpu"), torch.float32))


def exact_probabilities(answer: tuple[int, ...], sampling: SamplingParams) -> np.ndarray:
    """Of the token after the prompt and this much of an answer."""
    logits = MODEL[(*PROMPT, *answer)[-1]].astype(np.float64)
    for token in {*PROMPT, *answer}:
        logits[token] *= 1 / sampling.repetition_penalty if logits[token] > 0 else sampling.repetition_penalty
    for token in set(answer):
        logits[token] -= sampling.presence_penalty + sampling.frequency_penalty * answer.count(token)
    weights = np.exp((logits - logits.max()) / sampling.temperature)
    order = np.argsort(-weights)
    if sampling.top_k:
        weights[order[sampling.top_k :]] = 0.0
    mass = np.cumsum(weights[order]) / weights.sum()
    weights[order[int(np.searchsorted(mass, sampling.top_p)) + 1 :]] = 0.0
    return weights / weights.sum()


def exact_joint(sampling: SamplingParams) -> np.ndarray:
    joint = np.zeros((VOCAB,) * LENGTH)
    for answer in itertools.product(range(VOCAB), repeat=LENGTH):
        joint[answer] = math.prod(float(exact_probabilities(answer[:place], sampling)[answer[place]]) for place in range(LENGTH))
    return joint


Drafter = Callable[[Sequence[Choice], int], list[list[int]]]


def thrown(seed: int) -> Drafter:
    rng = random.Random(seed)
    return lambda choices, longest: [
        [rng.randrange(VOCAB) for _ in range(min(longest, choice.most_drafts))] for choice in choices
    ]


def by_heads(proposer: MedusaProposer) -> Drafter:
    def draft(choices: Sequence[Choice], longest: int) -> list[list[int]]:
        wanted = [
            Wanted(
                ChoiceKey("r", 0),
                "",
                choice.sequence.tokens,
                choice.generation.request.sampling,
                min(longest, choice.most_drafts),
                HiddenRow(HIDDEN[choice.sequence.tokens[-2]]),
            )
            for choice in choices
        ]
        return [list(guess.token_ids) for guess in proposer.propose(wanted)]

    return draft


def drawn_joint(sampling: SamplingParams, longest: int, count: int, drafter: Drafter) -> tuple[np.ndarray, int, int]:
    """Counts of answers, and how many drafts there were and were right."""
    counts = np.zeros((VOCAB,) * LENGTH)
    drafted = accepted = 0
    for first in range(0, count, AT_ONCE):
        generations = [
            Generation(
                Request("r", "m", PROMPT, replace(sampling, seed=seed)),
                (),
                PagedSequence(PROMPT, root_hash(b"", ""), 16),
                ManualClock(),
            )
            for seed in range(first, min(count, first + AT_ONCE))
        ]
        choices = [generation.choices[0] for generation in generations]
        while unfinished := [choice for choice in choices if choice.num_generated < LENGTH]:
            slices = []
            for choice, drafts in zip(unfinished, drafter(unfinished, longest), strict=True):
                samples = choice.next_samples(drafts)
                tokens = [choice.sequence.tokens[-1], *drafts[: len(samples) - 1]]
                slices.append(SequenceSlice(tokens, 0, [1], samples, num_drafts=len(samples) - 1))
            rows = [token for item in slices for token in item.token_ids]
            for choice, item, tokens in zip(unfinished, slices, draw(torch.from_numpy(MODEL[rows]), slices, sample), strict=True):
                drafted += item.num_drafts
                accepted += len(choice.accept(tokens).token_ids) - 1
        for choice in choices:
            counts[tuple(choice.sequence.tokens[len(PROMPT) :])] += 1
    return counts, drafted, accepted


def g_statistic(counts: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """And what it exceeds once in ten thousand times. Cells with little in them are taken together."""
    total = counts.sum()
    large = expected * total >= 5
    seen = np.append(counts[large], counts[~large].sum())
    wanted = np.append(expected[large], expected[~large].sum()) * total
    there = seen > 0
    statistic = 2 * float(np.sum(seen[there] * np.log(seen[there] / wanted[there])))
    degrees = len(seen) - 1
    spread = 2 / (9 * degrees)
    return statistic, degrees * (1 - spread + 3.719 * math.sqrt(spread)) ** 3


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_draws_through_drafts_follow_the_exact_distribution(case: Case) -> None:
    sampling = SamplingParams(**{"max_tokens": LENGTH, "seed": 0, **case.fields})
    count = examples(1000)
    drafter = by_heads(toy_heads()) if case.by_heads else thrown(case.longest)
    counts, drafted, accepted = drawn_joint(sampling, case.longest, count, drafter)
    assert 0 < accepted < drafted
    expected = exact_joint(sampling)
    assert expected.sum() == pytest.approx(1.0)
    assert counts[expected == 0].sum() == 0
    statistic, threshold = g_statistic(counts, expected)
    assert statistic < threshold
    other = exact_joint(replace(sampling, temperature=sampling.temperature * 1.5))
    assert g_statistic(counts, other)[0] > g_statistic(counts, other)[1], "the test would not see a wrong temperature"
