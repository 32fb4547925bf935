"""Which steps draw their own tokens, by which program, and why the others do not."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np
import pytest

from common.engine.batch import SampleSpec, SequenceSlice
from common.engine.captured.drawing import GREEDY, DrawPlan, Filters, OnHost, plan_draws
from common.engine.grammar import NextMask
from common.engine.token_rules import RowRules

VOCAB = 100
BEST = SampleSpec(position=4, seed=1, choice=0, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, logprobs=None)
DRAWN = replace(BEST, temperature=0.8)
BANS = RowRules(banned_token_ids=np.array([3]))


def slices(*specs: SampleSpec | None) -> list[SequenceSlice]:
    return [SequenceSlice([1], 3, [1], () if spec is None else (spec,)) for spec in specs]


def test_greedy_steps_need_nothing() -> None:
    assert plan_draws(slices(BEST, None, replace(BEST, top_k=5, top_p=0.1)), VOCAB) is GREEDY


@pytest.mark.parametrize(
    ("specs", "filters"),
    [
        ([DRAWN, BEST], Filters.NONE),
        ([replace(DRAWN, min_p=0.1, top_k=VOCAB), replace(BEST, top_p=0.5)], Filters.NONE),
        ([DRAWN, replace(DRAWN, top_p=0.9)], Filters.TOP_P),
        ([replace(DRAWN, top_k=3), DRAWN], Filters.ALL),
        ([replace(DRAWN, top_k=3), replace(DRAWN, top_p=0.9)], Filters.ALL),
    ],
)
def test_filters_that_nobody_asks_for_are_left_out(specs: list[SampleSpec], filters: Filters) -> None:
    assert plan_draws(slices(*specs), VOCAB) == DrawPlan(filters, specs, [])


def test_rules_go_with_their_rows_and_greedy_ones_are_drawn_behind_them() -> None:
    ruled = replace(BEST, rules=BANS)
    assert plan_draws(slices(None, ruled), VOCAB) == DrawPlan(Filters.NONE, [None, ruled], [(1, BANS)])


@pytest.mark.parametrize(
    ("spec", "obstacle"),
    [
        (replace(BEST, logprobs=0), OnHost.LOGPROBS),
        (replace(DRAWN, rules=RowRules(mask=cast(NextMask, object()))), OnHost.GRAMMAR),
        (replace(BEST, rules=RowRules(allowed_token_ids=np.array([3]))), OnHost.ALLOWED),
    ],
)
def test_what_a_step_cannot_draw_has_a_reason(spec: SampleSpec, obstacle: OnHost) -> None:
    assert plan_draws(slices(DRAWN, spec), VOCAB) is obstacle
