"""Penalties, bias, bans: against transformers' logits processors, against a naive version, and against themselves in a batch."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.engine.batch import SampleSpec, first_samples
from common.engine.logit_rules import apply_rules
from common.engine.sampler import sample
from common.engine.token_rules import RowRules, TokenRules
from common.types import Request, SamplingParams

VOCAB = 24
NEUTRAL = SamplingParams(max_tokens=100, seed=1)

token_ids = st.integers(0, VOCAB - 1)
texts = st.one_of(token_ids, st.integers(0, 3))  # often what bad words are made of
prompts = st.lists(texts, min_size=1, max_size=12)
answers = st.lists(texts, max_size=12)
rows = st.lists(st.integers(-40, 40), min_size=VOCAB, max_size=VOCAB).map(lambda row: torch.tensor(row, dtype=torch.float32) / 4)
params = st.builds(
    SamplingParams,
    max_tokens=st.just(100),
    seed=st.integers(0, 2**64 - 1),
    temperature=st.sampled_from([0.0, 0.8]),
    min_tokens=st.sampled_from([0, 0, 4]),
    stop_token_ids=st.lists(token_ids, max_size=2, unique=True).map(tuple),
    presence_penalty=st.sampled_from([0.0, -2.0, 0.7, 2.0]),
    frequency_penalty=st.sampled_from([0.0, -1.1, 0.3, 2.0]),
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3, 10.0]),
    logit_bias=st.dictionaries(token_ids, st.sampled_from([-100.0, -3.5, 0.0, 2.25, 99.5, 100.0]), max_size=6).map(
        lambda bias: tuple(bias.items())
    ),
    allowed_token_ids=st.one_of(st.just(()), st.lists(token_ids, min_size=3, unique=True).map(tuple)),
    bad_words=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple), max_size=4).map(tuple),
)


def request(sampling: SamplingParams, prompt: list[int], **fields: int) -> Request:
    return Request("r", "m", tuple(prompt), sampling, **fields)


def rules_after(sampling: SamplingParams, prompt: list[int], answer: list[int]) -> RowRules | None:
    rules = TokenRules.of(request(sampling, prompt))
    return None if rules is None else rules.for_next([*prompt, *answer])


def changed(row: torch.Tensor, rules: RowRules | None) -> torch.Tensor:
    found = row[None].clone()
    if rules is not None:
        apply_rules(found, [rules])
    return found[0]


def naive(row: torch.Tensor, sampling: SamplingParams, prompt: list[int], answer: list[int]) -> list[float]:
    """Entry by entry, as the rules are written down for users."""
    bias = dict(sampling.logit_bias)
    banned = {token_id for token_id, value in bias.items() if value == -100}
    if len(answer) < sampling.min_tokens:
        banned |= set(sampling.stop_token_ids)
    for word in sampling.bad_words:
        for token_id in range(VOCAB):
            if tuple([*answer, token_id][-len(word) :]) == word:
                banned.add(token_id)
    left = [token_id for token_id in range(VOCAB) if not sampling.allowed_token_ids or token_id in sampling.allowed_token_ids]
    left = [token_id for token_id in left if token_id not in banned]
    forced = [token_id for token_id in left if bias.get(token_id) == 100]
    expected = []
    for token_id in range(VOCAB):
        logit = float(row[token_id]) + bias.get(token_id, 0.0)
        if token_id in prompt or token_id in answer:
            logit = logit / sampling.repetition_penalty if logit > 0 else logit * sampling.repetition_penalty
        logit -= sampling.frequency_penalty * answer.count(token_id)
        logit -= sampling.presence_penalty * (token_id in answer)
        expected.append(logit if token_id in (forced or left) else -math.inf)
    return expected


@settings(max_examples=400, deadline=None)
@given(row=rows, sampling=params, prompt=prompts, answer=answers)
def test_a_row_is_what_the_naive_version_makes_of_it(
    row: torch.Tensor, sampling: SamplingParams, prompt: list[int], answer: list[int]
) -> None:
    found = changed(row, rules_after(sampling, prompt, answer))
    np.testing.assert_allclose(found.numpy(), naive(row, sampling, prompt, answer), rtol=1e-5, atol=1e-5)


@settings(max_examples=200, deadline=None)
@given(row=rows, sampling=params, prompt=prompts, answer=answers)
def test_a_row_is_what_transformers_makes_of_it(
    row: torch.Tensor, sampling: SamplingParams, prompt: list[int], answer: list[int]
) -> None:
    """All rules that it has. It lets bad words begin in the prompt; here they are made of generated tokens."""
    bias = tuple((token_id, value) for token_id, value in sampling.logit_bias if abs(value) < 100)
    sampling = replace(sampling, logit_bias=bias, allowed_token_ids=(), frequency_penalty=0.0, presence_penalty=0.0)
    tokens = torch.tensor([[*prompt, *answer]])
    scores = row[None].clone()
    if bias:
        scores = transformers.SequenceBiasLogitsProcessor([[[i], value] for i, value in bias])(tokens, scores)
    scores = transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(tokens, scores)
    if sampling.bad_words:
        bad_words = transformers.NoBadWordsLogitsProcessor([list(word) for word in sampling.bad_words])
        scores = bad_words(torch.tensor([answer], dtype=torch.long), scores)
    if sampling.stop_token_ids:
        ends = list(sampling.stop_token_ids)
        scores = transformers.MinNewTokensLengthLogitsProcessor(len(prompt), sampling.min_tokens, ends)(tokens, scores)
    found = changed(row, rules_after(sampling, prompt, answer))
    np.testing.assert_allclose(found.numpy(), scores[0].numpy(), rtol=1e-6, atol=0)


@settings(max_examples=150, deadline=None)
@given(work=st.lists(st.tuples(rows, params, prompts, answers), min_size=2, max_size=6))
def test_a_row_is_the_same_bits_alone_and_in_any_batch(
    work: list[tuple[torch.Tensor, SamplingParams, list[int], list[int]]],
) -> None:
    logits = torch.stack([row for row, *_ in work])
    before = logits.clone()
    specs = []
    for row, sampling, prompt, answer in work:
        assume(sampling.leaves_a_token(VOCAB))
        rules = rules_after(sampling, prompt, answer)
        specs.append(SampleSpec.for_next_token(sampling, choice=0, position=len(prompt) + len(answer), rules=rules))
        assert torch.equal(row, before[len(specs) - 1])
    together = logits.clone()[[i for i, spec in enumerate(specs) if spec.rules is not None]]
    apply_rules(together, [spec.rules for spec in specs if spec.rules is not None])
    alone = [changed(row, spec.rules) for (row, *_), spec in zip(work, specs, strict=True) if spec.rules is not None]
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    drawn = sample(logits, specs, list(range(len(specs))))
    assert drawn == [sample(logits[i : i + 1].clone(), [spec], [0])[0] for i, spec in enumerate(specs)]
    assert torch.equal(logits, before)


@settings(max_examples=150, deadline=None)
@given(sampling=params, prompt=prompts, answer=answers, cut=st.integers(0, 12))
def test_what_was_counted_step_by_step_is_what_is_counted_anew(
    sampling: SamplingParams, prompt: list[int], answer: list[int], cut: int
) -> None:
    """So nothing is lost with a preempted choice, nor with one whose beginning another worker computed."""
    growing = TokenRules.of(request(sampling, prompt))
    assume(growing is not None)
    row = torch.linspace(-3.0, 3.0, VOCAB)
    for count in range(len(answer) + 1):
        step = changed(row, growing.for_next([*prompt, *answer[:count]]))
        assert torch.equal(step, changed(row, rules_after(sampling, prompt, answer[:count])))
    resumed = answer[:cut]
    rest = TokenRules.of(request(sampling, [*prompt, *resumed], num_resumed_tokens=len(resumed)))
    assert torch.equal(changed(row, rest.for_next([*prompt, *answer])), step)


@settings(max_examples=80, deadline=None)
@given(
    sampling=params,
    prompt=prompts,
    steps=st.lists(st.tuples(st.lists(texts, max_size=5), st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=6),
)
def test_what_was_only_guessed_is_forgotten(
    sampling: SamplingParams, prompt: list[int], steps: list[tuple[list[int], list[int]]]
) -> None:
    """Asked about guesses, at every place, and rewound to what came: the same rules as if nobody had guessed."""
    rules = TokenRules.of(request(sampling, prompt))
    assume(rules is not None)
    row = torch.linspace(-3.0, 3.0, VOCAB)
    answer: list[int] = []
    for guess, came in steps:
        for count in range(len(guess) + 1):
            guessed = [*answer, *guess[:count]]
            ruled = changed(row, rules.for_next([*prompt, *guessed]))
            assert torch.equal(ruled, changed(row, rules_after(sampling, prompt, guessed)))
        rules.rewind(len(prompt) + len(answer))
        answer += came
    assert torch.equal(changed(row, rules.for_next([*prompt, *answer])), changed(row, rules_after(sampling, prompt, answer)))


@settings(max_examples=100, deadline=None)
@given(sampling=params, prompt=prompts, answer=answers)
def test_whether_a_token_may_come_is_what_the_logits_say(sampling: SamplingParams, prompt: list[int], answer: list[int]) -> None:
    rules = rules_after(sampling, prompt, answer)
    assume(rules is not None)
    left = changed(torch.zeros(VOCAB), rules)
    assert [rules.allow(token_id) for token_id in range(VOCAB)] == torch.isfinite(left).tolist()


@pytest.mark.parametrize(
    ("prompt", "answer", "banned"),
    [([9], [], [7]), ([9], [1], [2, 7]), ([9], [1, 2], [3, 7]), ([1], [2], [7]), ([9, 1, 2], [], [7]), ([9], [1, 2, 9], [7])],
)
def test_bad_words_are_words_of_the_answer(prompt: list[int], answer: list[int], banned: list[int]) -> None:
    sampling = replace(NEUTRAL, bad_words=((7,), (1, 2), (1, 2, 3)))
    found = changed(torch.zeros(VOCAB), rules_after(sampling, prompt, answer))
    assert torch.isinf(found).nonzero()[:, 0].tolist() == banned


def test_rules_made_for_a_draw_do_not_change_afterwards() -> None:
    rules = TokenRules.of(request(replace(NEUTRAL, frequency_penalty=1.0, repetition_penalty=2.0), [1, 2]))
    row = torch.ones(VOCAB)
    first = rules.for_next([1, 2, 3])
    before = changed(row, first)
    rules.for_next([1, 2, 3, 3, 3, *range(4, VOCAB)])
    assert torch.equal(changed(row, first), before)


def test_the_first_tokens_of_all_choices_obey_the_rules() -> None:
    sampling = replace(
        NEUTRAL, repetition_penalty=5.0, bad_words=((3,), (1, 4)), min_tokens=1, stop_token_ids=(5,), logit_bias=((6, -100.0),)
    )
    specs = first_samples(request(sampling, [1, 2, 1], num_choices=3))
    row = torch.full((VOCAB,), 10.0)
    for spec in specs:
        found = changed(row, spec.rules)
        assert found[[1, 2]].tolist() == [2.0, 2.0]
        assert set(torch.isinf(found).nonzero()[:, 0].tolist()) == {3, 5, 6}
    assert [spec.choice for spec in specs] == [0, 1, 2]


def test_many_tokens_are_counted_as_well_as_few() -> None:
    generator = np.random.default_rng(0)
    prompt, answer = generator.integers(0, 900, 700).tolist(), generator.integers(0, 900, 1500).tolist()
    sampling = replace(NEUTRAL, repetition_penalty=1.5, frequency_penalty=0.25, presence_penalty=0.5)
    rules = TokenRules.of(request(sampling, prompt))
    for count in range(len(answer) + 1):
        last = rules.for_next([*prompt, *answer[:count]])
    penalties = last.penalties
    counts = dict(zip(penalties.token_ids.tolist(), penalties.counts.tolist(), strict=True))
    assert counts == {token_id: answer.count(token_id) for token_id in {*prompt, *answer}}


@pytest.mark.parametrize(
    "field",
    [
        {"min_tokens": 2},  # without stop tokens there is nothing to put off
        {"stop_token_ids": (1,)},
        {"temperature": 0.3, "top_k": 4, "top_p": 0.5, "min_p": 0.1, "logprobs": 3},
    ],
)
def test_a_request_without_rules_has_none(field: dict[str, object]) -> None:
    sampling = replace(NEUTRAL, **field)
    assert TokenRules.of(request(sampling, [1])) is None
    assert first_samples(request(sampling, [1]))[0].rules is None


def test_rules_that_are_over_cost_nothing_more() -> None:
    rules = TokenRules.of(request(replace(NEUTRAL, min_tokens=2, stop_token_ids=(5,)), [1]))
    assert [rules.for_next([1, *[7] * count]) is None for count in range(4)] == [False, False, True, True]
    penalised = TokenRules.of(request(replace(NEUTRAL, presence_penalty=1.0), [1]))
    assert penalised.for_next([1]) is None
    assert penalised.for_next([1, 1]) is not None


def test_an_end_token_that_the_model_does_not_have_is_no_harm() -> None:
    rules = RowRules(banned_token_ids=np.array([2, VOCAB + 1]))
    logits = torch.zeros(2, VOCAB)
    apply_rules(logits, [rules, rules])
    assert torch.isinf(logits).sum(dim=1).tolist() == [1, 1]


@settings(max_examples=300, deadline=None)
@given(sampling=params, prompt=prompts, answer=answers)
def test_a_request_that_leaves_a_token_always_does(sampling: SamplingParams, prompt: list[int], answer: list[int]) -> None:
    assume(sampling.leaves_a_token(VOCAB))
    assert changed(torch.zeros(VOCAB), rules_after(sampling, prompt, answer)).isfinite().any()


@pytest.mark.parametrize(
    ("fields", "left"),
    [
        ({"allowed_token_ids": (3,), "logit_bias": ((3, -100.0),)}, False),
        ({"allowed_token_ids": (3,), "logit_bias": ((3, -99.0),)}, True),
        ({"allowed_token_ids": (3,), "bad_words": ((3,),)}, False),
        ({"allowed_token_ids": (3,), "bad_words": ((3, 3),)}, False),
        ({"allowed_token_ids": (3,), "stop_token_ids": (3,)}, True),
        ({"allowed_token_ids": (3,), "stop_token_ids": (3,), "min_tokens": 1}, False),
        ({"allowed_token_ids": (VOCAB,)}, False),
        ({"logit_bias": tuple((i, -100.0) for i in range(VOCAB - 1))}, True),
        ({"logit_bias": tuple((i, -100.0) for i in range(VOCAB))}, False),
        ({"logit_bias": tuple((i, -100.0) for i in range(1, VOCAB + 1))}, True),
    ],
)
def test_whether_a_token_is_left(fields: dict[str, object], left: bool) -> None:
    assert replace(NEUTRAL, **fields).leaves_a_token(VOCAB) is left


@pytest.mark.parametrize("temperature", [0.7, 1.6])
def test_draws_follow_the_distribution_after_the_rules(temperature: float) -> None:
    """G-test over (seed, position); the seeds are fixed, so the test either always passes or never does."""
    sampling = replace(
        NEUTRAL,
        temperature=temperature,
        presence_penalty=0.4,
        frequency_penalty=0.2,
        repetition_penalty=1.4,
        logit_bias=((7, 1.5), (8, -100.0)),
        bad_words=((9,), (4, 5)),
    )
    prompt, answer = [1, 2, 3], [3, 3, 4]
    row = torch.tensor([0.3, -1.0, 2.0, 2.5, 0.0, 1.0, -3.0, 1.5, 2.0, 2.0] + [-40.0] * (VOCAB - 10))
    logits = np.array(naive(row, sampling, prompt, answer))
    expected = np.exp(logits / temperature)
    expected /= expected.sum()
    rules = rules_after(sampling, prompt, answer)
    specs = [
        SampleSpec.for_next_token(replace(sampling, seed=seed), choice=0, position=position, rules=rules)
        for seed in range(40)
        for position in range(100)
    ]
    counts = np.bincount([token.token_id for token in sample(row[None], specs, [0] * len(specs))], minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    seen = counts > 0
    g_statistic = 2 * np.sum(counts[seen] * np.log(counts[seen] / (expected[seen] * len(specs))))
    # 99.99th percentile of chi-square with 6 degrees of freedom is 27.9; seven tokens are left but for unlikely ones.
    assert g_statistic < 27.9
    unruled = np.exp(row.double().numpy() / temperature)
    unruled /= unruled.sum()
    assert 2 * np.sum(counts[seen] * np.log(counts[seen] / (unruled[seen] * len(specs)))) > 27.9
