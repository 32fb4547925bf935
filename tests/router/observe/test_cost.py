"""Seconds and tokens go into the right parts, nothing is lost, and estimates are means of what was told."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.types import WorkAccount
from router.observe.cost import BrokenOff, CostSplit, Ledger, price

seconds = st.floats(0, 1000, allow_nan=False)
tokens = st.integers(0, 10_000)
works = st.builds(WorkAccount, *[seconds] * 4, *[tokens] * 4)


@given(st.lists(works, max_size=20))
def test_a_ledger_is_the_sum_of_what_it_was_told(told: list[WorkAccount]) -> None:
    ledger = Ledger()
    costs = [ledger.paid(work) for work in told]
    for part in ("prefill_s", "transfer_s", "decode_s", "wasted_s"):
        assert getattr(ledger.seconds, part) == pytest.approx(sum(getattr(work, part) for work in told))
    assert ledger.seconds.total_s == pytest.approx(sum(cost.total_s for cost in costs))
    assert ledger.seconds.saved_s == pytest.approx(sum(cost.saved_s for cost in costs))
    assert dataclasses.astuple(ledger.tokens) == (
        sum(work.prefill_tokens for work in told),
        sum(work.decode_tokens for work in told),
        sum(work.wasted_tokens for work in told),
        sum(work.cached_tokens for work in told),
        0,
    )


def told() -> Ledger:
    """A computed prompt token costs 0.01 s, a generated one 0.1 s."""
    ledger = Ledger()
    ledger.paid(WorkAccount(prefill_s=1.0, decode_s=1.5, wasted_s=0.5, prefill_tokens=100, decode_tokens=20, wasted_tokens=5))
    return ledger


def test_what_a_cache_gave_saved_what_such_tokens_cost() -> None:
    ledger = told()
    assert ledger.paid(WorkAccount(cached_tokens=50)).saved_s == pytest.approx(0.5)
    assert ledger.spared(prompt_tokens=30, answer_tokens=10).saved_s == pytest.approx(1.3)
    assert ledger.seconds.saved_s == pytest.approx(1.8)
    assert ledger.seconds.total_s == pytest.approx(3.0), "what was saved was not paid"
    assert (ledger.tokens.cached_prompt, ledger.tokens.cached_answer) == (50, 40)


def test_an_answer_that_was_broken_off_costs_the_mean_and_leaves_it_as_it_is() -> None:
    ledger = told()
    left = BrokenOff(prompt_tokens=60, cached_tokens=20, generated_tokens=7, transfer_s=0.25)
    cost = ledger.estimate(left)
    assert cost == CostSplit(
        prefill_s=pytest.approx(0.4), transfer_s=0.25, decode_s=pytest.approx(0.7), saved_s=pytest.approx(0.2)
    )
    before = ledger.prefill_token_s, ledger.decode_token_s
    ledger.broken_off(left)
    assert (ledger.prefill_token_s, ledger.decode_token_s) == pytest.approx(before)
    assert ledger.seconds.total_s == pytest.approx(3.0 + cost.total_s)


def test_nothing_is_estimated_of_nothing() -> None:
    ledger = Ledger()
    assert ledger.estimate(BrokenOff(10, 0, 5, 0.0)).total_s == 0.0
    assert ledger.spared(prompt_tokens=10, answer_tokens=5).saved_s == 0.0


def test_prompts_have_the_price_of_prefill_workers_and_all_else_that_of_decode_workers() -> None:
    cost = CostSplit(prefill_s=3600, transfer_s=360, decode_s=1800, wasted_s=720, saved_s=7200)
    money = price(cost, prefill_hour=2.0, decode_hour=10.0)
    assert money == CostSplit(prefill_s=2.0, transfer_s=1.0, decode_s=5.0, wasted_s=2.0, saved_s=4.0)
