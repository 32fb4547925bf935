"""The verifier against one draw at a time, on made-up logits: every way a guess can be right or wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.engine.batch import SampleSpec, SequenceSlice
from common.engine.sampler import sample
from common.engine.token_rules import RowRules
from common.engine.verification import draw, follow, num_sampled_rows
from common.types import SampledToken

VOCAB = 12
SPEC = SampleSpec(position=0, seed=1, choice=0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, logprobs=None)


def one_by_one(row_after: Callable[[list[int]], torch.Tensor], specs: Sequence[SampleSpec], count: int) -> list[SampledToken]:
    """What comes when nobody guesses; `row_after` is the model."""
    drawn: list[SampledToken] = []
    while len(drawn) < count:
        row = row_after([token.token_id for token in drawn])
        drawn += sample(row[None], [specs[len(drawn)]], [0])
    return drawn


def model(seed: int) -> Callable[[list[int]], torch.Tensor]:
    """Logits that depend on all that was drawn."""

    def row_after(answer: list[int]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash((seed, *answer)) % 2**62)
        return torch.randn(VOCAB, generator=generator) * 2

    return row_after


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_draws_are_those_of_one_at_a_time(data: st.DataObject) -> None:
    """Several slices in a step: some guess, some do not, some draw several choices from one row, some draw nothing."""
    slices: list[SequenceSlice] = []
    rows: list[torch.Tensor] = []
    expected: list[list[SampledToken]] = []
    for number in range(data.draw(st.integers(1, 5))):
        kind = data.draw(st.sampled_from(["silent", "choices", "guesses", "guesses"]))
        row_after = model(data.draw(st.integers(0, 10_000)))
        base = replace(
            SPEC,
            seed=number,
            temperature=data.draw(st.sampled_from([0.0, 0.0, 0.7, 1.5])),
            top_k=data.draw(st.sampled_from([0, 3])),
            top_p=data.draw(st.sampled_from([1.0, 0.8])),
            logprobs=data.draw(st.sampled_from([None, None, 2])),
        )
        if kind == "silent":
            slices.append(SequenceSlice([1, 2], 0, [1]))
            expected.append([])
        elif kind == "choices":
            specs = tuple(replace(base, choice=choice) for choice in range(data.draw(st.integers(1, 3))))
            slices.append(SequenceSlice([1, 2], 0, [1], specs))
            rows.append(row_after([]))
            expected.append(sample(rows[-1][None], specs, [0] * len(specs)))
        else:
            count = data.draw(st.integers(0, 5))
            banned = data.draw(st.booleans())
            rules = RowRules(banned_token_ids=np.array([int(row_after([]).argmax())])) if banned else None
            specs = tuple(replace(base, position=place, rules=rules) for place in range(count + 1))
            drafts = [token.token_id for token in one_by_one(row_after, specs, count)]
            wrong = data.draw(st.sets(st.integers(0, max(0, count - 1)), max_size=2)) if count else set()
            for place in wrong:
                drafts[place] = (drafts[place] + data.draw(st.integers(1, VOCAB - 1))) % VOCAB
            rows += [row_after(drafts[:place]) for place in range(count + 1)]
            slices.append(SequenceSlice([9, *drafts], 30, [1], specs, num_drafts=count))
            expected.append(one_by_one(row_after, specs, min(wrong, default=count) + 1))
    assert sum(map(num_sampled_rows, slices)) == len(rows)
    logits = torch.stack(rows) if rows else torch.empty(0, VOCAB)
    assert [list(tokens) for tokens in draw(logits, slices, sample)] == expected
    if all(spec.takes_best and len(item.samples) == item.num_drafts + 1 for item in slices for spec in item.samples):
        assert [list(tokens) for tokens in follow(slices, logits.argmax(dim=1).tolist())] == expected


@pytest.mark.parametrize(("temperature", "logprobs", "drawn"), [(0.0, None, 6), (0.0, 1, 3), (0.7, None, 3)])
def test_what_is_dear_is_not_drawn_behind_a_wrong_guess(temperature: float, logprobs: int | None, drawn: int) -> None:
    asked: list[int] = []

    def counting(logits: torch.Tensor, specs: Sequence[SampleSpec], rows: Sequence[int]) -> list[SampledToken]:
        asked.append(len(specs))
        return sample(logits, specs, rows)

    specs = tuple(replace(SPEC, position=place, temperature=temperature, logprobs=logprobs) for place in range(6))
    row_after = model(7)
    drafts = [token.token_id for token in one_by_one(row_after, specs, 5)]
    drafts[2] = (drafts[2] + 1) % VOCAB
    logits = torch.stack([row_after(drafts[:place]) for place in range(6)])
    assert len(draw(logits, [SequenceSlice([9, *drafts], 30, [1], specs, num_drafts=5)], counting)[0]) == 3
    assert sum(asked) == drawn
