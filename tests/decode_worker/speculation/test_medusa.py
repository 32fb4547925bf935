"""The proposer that asks heads, and the controller that chooses between it and n-grams."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from common.clock import ManualClock
from common.engine.heads.file import Description
from common.engine.heads.heads import DraftHeads
from common.engine.heads.rows import HiddenRow
from common.types import SamplingParams
from decode_worker.speculation.medusa import MedusaProposer
from decode_worker.speculation.proposer import ChoiceKey, Guess, Wanted
from decode_worker.speculation.speculator import AdaptiveSpeculator
from support.tiny_heads import make_weights

SAMPLING = SamplingParams(max_tokens=100, seed=1)
ROW = HiddenRow(torch.ones(16))
STEPS = 800


def wanted(name: str = "a", *, row: HiddenRow | None = None, most_tokens: int = 100) -> Wanted:
    return Wanted(ChoiceKey(name, 0), "", [1, 2, 3], SAMPLING, most_tokens, row)


@pytest.fixture
def heads() -> DraftHeads:
    weights = make_weights(Description("d", 3, hidden_size=16, vocab_size=40, width=16), list(range(30)))
    generator = torch.Generator().manual_seed(1)
    head, embedding = torch.randn(30, 16, generator=generator), torch.randn(30, 16, generator=generator)
    return DraftHeads(weights, head, embedding, torch.device("cpu"), torch.float32)


def test_whoever_has_a_row_gets_a_guess_of_the_wanted_length(heads: DraftHeads) -> None:
    other = HiddenRow(torch.randn(16, generator=torch.Generator().manual_seed(2)))
    asked = [
        wanted("no row"),
        wanted("long", row=ROW),
        wanted("one", row=ROW, most_tokens=1),
        wanted("none", row=ROW, most_tokens=0),
        wanted("short row", row=HiddenRow(torch.ones(15))),
        wanted("other", row=other, most_tokens=2),
    ]
    guesses = MedusaProposer(heads).propose(asked)
    assert [len(guess.token_ids) for guess in guesses] == [0, 3, 1, 0, 0, 2]
    assert guesses[1].token_ids == tuple(heads.guess([ROW], [3], 3)[0][0])
    assert guesses[2].token_ids == guesses[1].token_ids[:1]
    assert guesses[5].token_ids == tuple(heads.guess([other], [3], 2)[0][0])
    assert all(0 <= guess.evidence <= 4 for guess in guesses)


class Scripted:
    """Offers the same whenever it is asked; may take time, by a clock that it turns itself."""

    def __init__(self, name: str, guess: Guess, clock: ManualClock | None = None, token_s: float = 0.0) -> None:
        self.name, self.guess, self.clock, self.token_s = name, guess, clock, token_s
        self.takes_time = self.reads_rows = clock is not None
        self.asked = 0
        self.rows: list[HiddenRow | None] = []

    def propose(self, wanted: Sequence[Wanted]) -> list[Guess]:
        self.asked += len(wanted)
        self.rows = [item.row for item in wanted]
        if self.clock is not None:
            self.clock.advance(self.token_s * max(item.most_tokens for item in wanted))
        return [Guess(self.guess.token_ids[: item.most_tokens], self.guess.evidence) for item in wanted]

    def end(self, key: ChoiceKey, salt: str, tokens: Sequence[int], num_prompt_tokens: int) -> None:
        """Nothing to forget."""


def run(
    quick_right: float, slow_right: float, token_s: float, *, num_sequences: int = 1, slope: float = 0.03
) -> dict[str, float]:
    """Made-up steps: tokens per second over those without guesses, and how many tokens of each proposer were in steps."""
    rng, clock = random.Random(1), ManualClock()
    quick = Scripted("quick", Guess((1, 2, 3, 4, 5, 6, 7, 8), 3))
    slow = Scripted("slow", Guess((11, 12, 13), 2), clock, token_s)
    speculator = AdaptiveSpeculator([quick, slow], 8, clock)
    keys = [ChoiceKey(str(number), 0) for number in range(num_sequences)]
    for key in keys:
        speculator.remember(key, ROW)
    drafted = {"quick": 0, "slow": 0}
    tokens, started_s, base_s = 0, clock.monotonic_s(), 0.0
    for _ in range(STEPS):
        drafts = speculator.draft([wanted(key.request_id) for key in keys], num_rows=num_sequences, most_rows=100)
        rows = num_sequences + sum(map(len, drafts))
        seconds = 1.0 + slope * rows
        base_s += 1.0 + slope * num_sequences
        clock.advance(seconds)
        speculator.observe_step(rows, seconds)
        for key, draft in zip(keys, drafts, strict=True):
            # Each proposer is right or wrong by itself: what comes continues the one that is.
            truth = []
            for proposer, right in ((quick, quick_right), (slow, slow_right)):
                count = 0
                while count < len(proposer.guess.token_ids) and rng.random() < right:
                    count += 1
                truth.append(proposer.guess.token_ids[:count])
            said = truth[0] if draft and draft[0] == 1 else truth[1] if draft else max(truth, key=len)
            num_right = min(len(draft), len(said))
            came = [*said[:num_right], said[num_right] if not draft and said else 99]
            tokens += num_right + 1
            if draft:
                drafted[speculator.author(key)] += len(draft)
            speculator.settle(key, came, ROW)
    gain = tokens / (clock.monotonic_s() - started_s) / (STEPS * num_sequences / base_s)
    return {"gain": gain, **drafted, "asked": slow.asked}


def test_the_better_one_is_taken() -> None:
    copying = run(0.95, 0.5, 0.02)
    assert copying["gain"] > 2.5
    assert copying["quick"] > 20 * copying["slow"]
    talking = run(0.05, 0.7, 0.02)
    assert talking["gain"] > 1.5
    assert talking["slow"] > 20 * talking["quick"]


def test_heads_that_take_too_long_or_know_nothing_are_left_alone() -> None:
    for right, token_s in ((0.6, 2.0), (0.02, 0.05)):
        found = run(0.05, right, token_s)
        assert found["gain"] > 0.97
        assert 2 <= found["asked"] < 100, "tried again from time to time"


def test_in_a_full_batch_nobody_guesses_for_nothing() -> None:
    found = run(0.1, 0.4, 0.05, num_sequences=8, slope=0.5)
    assert found["gain"] > 0.97


def test_rows_are_those_of_the_last_token_and_go_with_it() -> None:
    clock = ManualClock()
    slow = Scripted("slow", Guess((1,), 0), clock, 0.01)
    speculator = AdaptiveSpeculator([slow], 8, clock)
    assert speculator.keeps_rows
    key = ChoiceKey("a", 0)
    assert speculator.draft([wanted()], num_rows=1, most_rows=9) == [()]
    assert slow.asked == 0, "without a row it has nothing to go by"
    speculator.remember(key, ROW)
    speculator.draft([wanted()], num_rows=1, most_rows=9)
    assert slow.rows == [ROW]
    later = HiddenRow(torch.zeros(16))
    speculator.settle(key, [1, 5], later)
    speculator.draft([wanted()], num_rows=1, most_rows=9)
    assert slow.rows == [later]
    speculator.settle(key, [7])
    asked = slow.asked
    assert speculator.draft([wanted()], num_rows=1, most_rows=9) == [()]
    assert slow.asked == asked
    speculator.end(key, "", [1], 1)
    assert speculator.num_sequences == 0


def test_who_reads_no_rows_is_given_none() -> None:
    speculator = AdaptiveSpeculator([Scripted("quick", Guess((1,), 0))], 8, ManualClock())
    assert not speculator.keeps_rows
    speculator.remember(ChoiceKey("a", 0), ROW)
    assert speculator.num_sequences == 0
