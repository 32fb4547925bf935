"""The sampler: filters against a naive version and transformers, draws against exact distributions, rows against themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from common.engine.batch import SampleSpec
from common.engine.sampler import candidates, report_logprobs, sample, uniform
from common.engine.token_rules import RowRules
from common.errors import EngineFailure

SPEC = SampleSpec(position=0, seed=1, choice=0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, logprobs=None)
GREEDY = replace(SPEC, temperature=0.0)


def draw_one(row: torch.Tensor, spec: SampleSpec) -> int:
    return sample(row[None], [spec], [0])[0].token_id


def banning(*token_ids: int) -> RowRules:
    return RowRules(banned_token_ids=np.array(token_ids, dtype=np.int64))


def distribution(row: np.ndarray, spec: SampleSpec) -> np.ndarray:
    """What the code under test draws from, without rules."""
    token_ids, weights = candidates(row, spec)
    found = np.zeros(len(row))
    found[slice(None) if token_ids is None else token_ids] = weights / weights.sum()
    return found


def naive_distribution(row: np.ndarray, spec: SampleSpec) -> np.ndarray:
    """Token by token, with sorted lists: what remains after each filter, normalised."""
    probabilities = {}
    banned = () if spec.rules is None else spec.rules.banned_token_ids.tolist()
    best = max(float(x) for i, x in enumerate(row) if i not in banned)
    for token_id, logit in enumerate(row):
        if token_id not in banned:
            probabilities[token_id] = float(np.exp((float(logit) - best) / spec.temperature))
    ranked = sorted(probabilities, key=lambda token_id: (-row[token_id], token_id))
    if spec.top_k:
        ranked = ranked[: spec.top_k]
    if spec.top_p < 1.0:
        total, mass, kept = sum(probabilities[i] for i in ranked), 0.0, []
        for token_id in ranked:
            kept.append(token_id)
            mass += probabilities[token_id]
            if mass >= spec.top_p * total:
                break
        ranked = kept
    if spec.min_p:
        ranked = [i for i in ranked if probabilities[i] >= spec.min_p * probabilities[ranked[0]]]
    expected = np.zeros(len(row))
    for token_id in ranked:
        expected[token_id] = probabilities[token_id]
    return expected / expected.sum()


# Logits on a coarse grid give ties; top_p off that grid keeps sums away from the threshold, where rounding would decide.
logit_rows = st.lists(st.integers(-12, 12), min_size=3, max_size=30).map(lambda row: np.array(row, dtype=np.float32) / 2)


@settings(max_examples=300, deadline=None)
@given(
    row=logit_rows,
    temperature=st.sampled_from([0.2, 0.7, 1.0, 3.0]),
    top_k=st.integers(0, 35),
    top_p=st.sampled_from([0.0501, 0.3337, 0.7713, 0.9507, 1.0]),
    min_p=st.sampled_from([0.0, 0.0503, 0.4017, 1.0]),
    num_banned=st.integers(0, 2),
)
def test_filters_leave_what_the_naive_version_leaves(
    row: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float, num_banned: int
) -> None:
    spec = replace(SPEC, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    row[np.argsort(-row)[:num_banned]] = -np.inf
    np.testing.assert_allclose(distribution(row, spec), naive_distribution(row, spec), rtol=1e-9, atol=0)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    temperature=st.sampled_from([0.2, 0.7, 1.0, 3.0]),
    top_k=st.integers(0, 120),
    top_p=st.sampled_from([0.0501, 0.3337, 0.7713, 0.9507, 1.0]),
    min_p=st.sampled_from([0.0, 0.0503, 0.4017, 1.0]),
)
def test_filters_leave_what_transformers_leaves(seed: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    row = np.random.default_rng(seed).standard_normal(100).astype(np.float32) * 3
    warpers = transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(transformers.TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(transformers.TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(transformers.MinPLogitsWarper(min_p))
    scores = warpers(torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(row).double()[None])
    spec = replace(SPEC, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    np.testing.assert_allclose(distribution(row, spec), scores.softmax(-1)[0].numpy(), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        replace(SPEC, temperature=0.5),
        replace(SPEC, temperature=2.0, top_k=5),
        replace(SPEC, top_p=0.8),
        replace(SPEC, min_p=0.2, rules=banning(3)),
        replace(SPEC, choice=7, top_k=6, top_p=0.9),
    ],
)
def test_draws_follow_the_distribution(spec: SampleSpec) -> None:
    """G-test over (seed, position); the seeds are fixed, so the test either always passes or never does."""
    row = torch.tensor([0.3, -1.0, 2.0, 2.5, 0.0, 1.0, -3.0, 1.5])
    expected = naive_distribution(row.numpy(), spec)
    specs = [replace(spec, seed=seed, position=position) for seed in range(40) for position in range(100)]
    counts = np.bincount([token.token_id for token in sample(row[None], specs, [0] * len(specs))], minlength=len(row))
    assert counts[expected == 0].sum() == 0
    seen = counts > 0
    g_statistic = 2 * np.sum(counts[seen] * np.log(counts[seen] / (expected[seen] * len(specs))))
    # 99.99th percentile of chi-square with 7 degrees of freedom is 29.9; with fewer it is less.
    assert g_statistic < 29.9


def test_the_statistical_test_can_fail() -> None:
    """A draw that ignores temperature is told apart at the same sample size."""
    row = torch.tensor([0.3, -1.0, 2.0, 2.5, 0.0, 1.0, -3.0, 1.5])
    wrong = naive_distribution(row.numpy(), replace(SPEC, temperature=0.8))
    specs = [replace(SPEC, seed=seed, position=position) for seed in range(40) for position in range(100)]
    counts = np.bincount([token.token_id for token in sample(row[None], specs, [0] * len(specs))], minlength=len(row))
    assert 2 * np.sum(counts * np.log(np.maximum(counts, 1) / (wrong * len(specs)))) > 29.9


def test_uniform_numbers_are_philox_and_never_change() -> None:
    """Recomputed from the published algorithm (Philox4x64-10): a seed must mean the same tokens in every release."""

    def philox(counter: list[int], key: list[int]) -> int:
        mask = (1 << 64) - 1
        x = list(counter)
        k = list(key)
        for _ in range(10):
            first, second = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
            x = [(second >> 64) ^ x[1] ^ k[0], second & mask, (first >> 64) ^ x[3] ^ k[1], first & mask]
            k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
        return x[0]

    for seed, choice, position in [(0, 0, 0), (1, 0, 5), (2**64 - 1, 3, 8191), (123456789, 15, 77)]:
        # numpy counts up before it generates
        expected = (philox([position + 1, 0, 0, 0], [seed, choice]) >> 11) * 2.0**-53
        assert uniform(seed, choice, position) == expected


def test_seed_choice_and_position_each_matter() -> None:
    numbers = {uniform(s, c, p) for s in (0, 1, -1, 2**63) for c in range(4) for p in range(64)}
    assert len(numbers) == 4 * 4 * 64
    assert all(0.0 <= number < 1.0 for number in numbers)
    assert 0.4 < sum(numbers) / len(numbers) < 0.6


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 999, generator=generator) * 3
    specs = [
        replace(
            SPEC,
            seed=i,
            position=i * 3,
            temperature=[0.0, 0.7, 1.3][i % 3],
            top_k=[0, 40][i % 2],
            top_p=[1.0, 0.9][i % 2],
            logprobs=[None, 0, 4][i % 3],
            rules=[None, banning(i, i + 1)][i // 2 % 2],
        )
        for i in range(12)
    ]
    together = sample(logits, specs, list(range(12)))
    for i, spec in enumerate(specs):
        assert sample(logits[i : i + 1].clone(), [spec], [0]) == [together[i]]
    backwards = sample(logits, specs[::-1], list(range(12))[::-1])
    assert backwards[::-1] == together


def test_several_specs_may_read_one_row() -> None:
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    specs = [replace(SPEC, choice=0), replace(SPEC, choice=1), GREEDY, GREEDY]
    tokens = sample(logits, specs, [1, 1, 1, 0])
    assert [token.token_id for token in tokens] == [
        draw_one(logits[1], specs[0]),
        draw_one(logits[1], specs[1]),
        int(logits[1].argmax()),
        int(logits[0].argmax()),
    ]


def test_greedy_takes_the_lowest_of_equal_ids_and_obeys_bans() -> None:
    row = torch.zeros(1000)
    row[[990, 31, 700]] = 5.0
    assert draw_one(row, GREEDY) == 31
    assert draw_one(row, replace(GREEDY, rules=banning(31))) == 700
    assert draw_one(row, replace(GREEDY, rules=banning(31, 700, 990))) == 0
    assert sample(row.repeat(3, 1), [GREEDY, replace(GREEDY, rules=banning(31)), GREEDY], [0, 1, 2])[2].token_id == 31


def test_sampling_leaves_the_logits_as_they_are() -> None:
    logits = torch.randn(3, 20)
    before = logits.clone()
    banned = banning(1, 2, 3)
    sample(logits, [replace(GREEDY, rules=banned), replace(SPEC, rules=banned), GREEDY], [0, 1, 2])
    assert torch.equal(logits, before)


def test_extreme_temperatures_and_logits_are_survived() -> None:
    row = torch.tensor([1e30, -1e30, 0.0, 1e30])
    assert draw_one(row, replace(SPEC, temperature=1e-6)) in (0, 3)
    assert draw_one(torch.tensor([0.0, 1e-4]), replace(SPEC, temperature=1e-9)) == 1
    assert draw_one(torch.tensor([-torch.inf, 0.0, -torch.inf]), SPEC) == 1


HIDING = RowRules(allowed_token_ids=np.array([2]), banned_token_ids=np.array([1]))


@pytest.mark.parametrize("spec", [GREEDY, SPEC, replace(GREEDY, rules=HIDING), replace(SPEC, rules=HIDING)])
@pytest.mark.parametrize("row", [[0.0, torch.nan, 1.0], [torch.inf, 0.0, 0.0], [-torch.inf] * 3])
def test_no_token_is_drawn_from_broken_logits(spec: SampleSpec, row: list[float]) -> None:
    with pytest.raises(EngineFailure, match="finite"):
        draw_one(torch.tensor(row), spec)


def test_logprobs_come_from_the_raw_logits() -> None:
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)) * 2
    spec = replace(GREEDY, logprobs=3)
    specs = [spec, replace(spec, temperature=0.3, top_k=2), replace(spec, rules=banning(int(logits[2].argmax()))), GREEDY]
    tokens = sample(logits, specs, [0, 1, 2, 3])
    exact = logits.double() - logits.double().logsumexp(-1, keepdim=True)
    for i, token in enumerate(tokens[:3]):
        assert token.logprob is not None
        assert token.logprob.token_id == token.token_id
        assert token.logprob.logprob == pytest.approx(float(exact[i, token.token_id]), abs=1e-5)
        expected = sorted(range(300), key=lambda t: (-float(logits[i, t]), t))[:3]
        assert [token_id for token_id, _ in token.logprob.top] == expected
        assert [value for _, value in token.logprob.top] == pytest.approx(exact[i, expected].tolist(), abs=1e-5)
    assert tokens[2].token_id != tokens[2].logprob.top[0][0]
    assert tokens[3].logprob is None


def test_top_logprobs_break_ties_by_id_also_at_the_last_place() -> None:
    row = torch.zeros(200)
    row[[150, 20, 90, 60]] = 1.0
    row[10] = 2.0
    reports = report_logprobs(row.repeat(4, 1), [0, 0, 0, 0], [3, 0, 5, 200])
    assert [token_id for token_id, _ in reports[0].top] == [10, 20, 60]
    assert reports[1].top == ()
    assert [token_id for token_id, _ in reports[2].top] == [10, 20, 60, 90, 150]
    assert len(reports[3].top) == 200


def test_logprobs_are_the_same_bits_alone_and_in_any_batch() -> None:
    logits = torch.randn(70, 1003, generator=torch.Generator().manual_seed(0)) * 4
    ids = list(range(70))
    together = report_logprobs(logits, ids, [2] * 70)
    for start, end in [(0, 1), (5, 6), (3, 40), (64, 70)]:
        assert report_logprobs(logits[start:end].clone(), ids[start:end], [2] * (end - start)) == together[start:end]
