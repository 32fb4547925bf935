"""How long a guess pays: acceptance, the cost of rows, the choice between them, and all of it over simulated steps."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.clock import ManualClock
from common.types import SamplingParams
from decode_worker.speculation.acceptance import Acceptance, History, Promises
from decode_worker.speculation.controller import choose_lengths
from decode_worker.speculation.ngram import NgramProposer
from decode_worker.speculation.proposer import ChoiceKey, Guess, Wanted
from decode_worker.speculation.recess import Recess
from decode_worker.speculation.speculator import AdaptiveSpeculator
from decode_worker.speculation.step_cost import StepCost

SAMPLING = SamplingParams(max_tokens=100, seed=1)


def learned(cost_of: Callable[[int], float], rows: Sequence[int]) -> StepCost:
    cost = StepCost()
    for number in rows:
        for _ in range(3):
            cost.observe(number, cost_of(number))
    return cost


def test_cost_is_what_was_measured_and_a_line_between() -> None:
    cost = learned(lambda rows: 10.0 + rows, [1, 5, 40])
    assert cost.of(1, 5) == pytest.approx([11, 12, 13, 14, 15])
    assert cost.of(39, 3) == pytest.approx([49, 50, 51])
    assert StepCost().of(3, 2)[1] > StepCost().of(3, 2)[0] > 0


def test_a_hiccup_does_not_count() -> None:
    cost = learned(lambda rows: 10.0, [1, 4])
    cost.observe(9, 1000.0)
    assert cost.of(9, 1)[0] < 20
    cost.observe(4, 1000.0)
    assert cost.of(4, 1)[0] == 10.0


def test_what_was_not_seen_for_long_is_forgotten() -> None:
    cost = learned(lambda rows: 100.0 * rows, [1, 8])
    for _ in range(2000):
        cost.observe(1, 10.0)
    assert cost.of(8, 1)[0] < 20


@settings(max_examples=100, deadline=None)
@given(
    observed=st.lists(st.tuples(st.integers(1, 300), st.floats(0.001, 10.0)), max_size=40),
    first=st.integers(1, 300),
)
def test_more_rows_never_cost_less(observed: list[tuple[int, float]], first: int) -> None:
    cost = StepCost()
    for rows, seconds in observed:
        for _ in range(3):
            cost.observe(rows, seconds)
    costs = cost.of(first, 60)
    assert len(costs) == 60
    assert all(later >= earlier * (1 - 1e-9) > 0 for earlier, later in itertools.pairwise(costs))


def speed(offers: Sequence[tuple[int, float, float]], lengths: Sequence[int], costs: Callable[[int], float]) -> float:
    """The geometric mean of the sequences' tokens per second."""
    tokens = [
        1.0 + sum(first * further**place for place in range(length))
        for (_, first, further), length in zip(offers, lengths, strict=True)
    ]
    return math.prod(tokens) ** (1 / len(tokens)) / costs(len(offers) + sum(lengths))


@settings(max_examples=150, deadline=None)
@given(
    offers=st.lists(st.tuples(st.integers(0, 4), st.floats(0.01, 0.98), st.floats(0.05, 0.98)), min_size=1, max_size=3),
    slope=st.floats(0.0, 1.0),
    most_rows=st.integers(0, 12),
)
def test_no_other_lengths_make_answers_come_faster(offers: list[tuple[int, float, float]], slope: float, most_rows: int) -> None:
    """Against all combinations there are; where the gain is small nothing is taken."""

    def seconds(rows: int) -> float:
        return 1.0 + slope * rows

    cost = learned(seconds, range(1, 20))
    lengths = choose_lengths(offers, cost, num_sequences=len(offers), num_rows=len(offers), most_rows=most_rows)
    assert sum(lengths) <= most_rows
    assert all(0 <= length <= offer[0] for length, offer in zip(lengths, offers, strict=True))
    best = max(
        speed(offers, combination, seconds)
        for combination in itertools.product(*(range(offer[0] + 1) for offer in offers))
        if sum(combination) <= most_rows
    )
    nothing = speed(offers, [0] * len(offers), seconds)
    if sum(lengths):
        assert speed(offers, lengths, seconds) == pytest.approx(best)
        assert best > nothing
    else:
        assert best <= 1.04 * nothing


def test_one_that_repeats_itself_does_not_hold_up_seven_that_do_not() -> None:
    """Rows that cost a tenth of the step, as on two cores at eight sequences: all tokens together would come faster by 9 %, but
    seven answers of eight slower by a third. Where all eight repeat themselves every one gains."""

    def seconds(rows: int) -> float:
        return 1.0 + 0.1 * max(0, rows - 8)

    cost, certain = learned(seconds, range(8, 60)), (4, 0.97, 0.97)
    assert choose_lengths([certain, *[(0, 0.0, 0.0)] * 7], cost, num_sequences=8, num_rows=8, most_rows=40) == [0] * 8
    assert min(choose_lengths([certain] * 8, cost, num_sequences=8, num_rows=8, most_rows=40)) >= 2


def test_guesses_that_promise_more_than_they_keep_are_worth_less() -> None:
    promises = Promises()
    assert promises.kept_share == 1.0
    for _ in range(100):
        promises.observe(2.0, 1)
    assert promises.kept_share == pytest.approx(0.5, abs=0.03)
    for _ in range(256 * 8):
        promises.step()
    assert promises.kept_share > 0.9, "a bad stretch is forgotten"
    for _ in range(100):
        promises.observe(1.0, 2)
    assert promises.kept_share == 1.0


def test_a_guess_is_judged_by_what_came() -> None:
    acceptance, history = Acceptance(), History()
    for _ in range(40):
        acceptance.observe(history, 1, (1, 2, 3, 4), [1, 2, 9])
    first, further = acceptance.rates(history, 1)
    assert first > 0.9
    assert further == pytest.approx(0.5, abs=0.05)
    for _ in range(60):
        acceptance.observe(history, 1, (1, 2), [7])
    assert acceptance.rates(history, 1)[0] < 0.15
    acceptance.observe(history, 2, (), [1])
    acceptance.observe(history, 2, (1,), [])
    assert acceptance.rates(History(), 2) == acceptance.rates(History(), 3), "nothing was compared, nothing is learned"


def test_a_sequence_differs_from_all_others() -> None:
    acceptance, easy = Acceptance(), History()
    for _ in range(50):
        acceptance.observe(History(), 5, (1,), [2])
    for _ in range(20):
        acceptance.observe(easy, 5, (1,), [1])
    assert acceptance.rates(easy, 5)[0] > 0.7
    assert acceptance.rates(History(), 5)[0] < 0.4


class Scripted:
    """A proposer that always offers the same, and counts how often it is asked."""

    name = "scripted"
    takes_time = False
    reads_rows = False

    def __init__(self, guess: Guess, clock: ManualClock | None = None, asking_s: float = 0.0) -> None:
        """To be asked about one sequence takes so long, by a clock that it turns itself."""
        self.guess = guess
        self.asked = 0
        self.clock, self.asking_s = clock or ManualClock(), asking_s

    def propose(self, wanted: Sequence[Wanted]) -> list[Guess]:
        self.asked += len(wanted)
        self.clock.advance(self.asking_s * len(wanted))
        return [Guess(self.guess.token_ids[: item.most_tokens], self.guess.evidence) for item in wanted]

    def end(self, key: ChoiceKey, salt: str, tokens: Sequence[int], num_prompt_tokens: int) -> None:
        """Nothing to forget."""


def run(
    num_sequences: int,
    right: float,
    slope: float,
    *,
    steps: int = 400,
    hiccup: Callable[[int, int], float] = lambda step, drafted: 1.0,
    asking_s: float = 0.0,
) -> tuple[float, float, Scripted]:
    """Tokens per second with speculation over those without, and drafts per sequence and step, in a made-up machine. A step may
    take so many times what its rows say."""
    rng, clock = random.Random(1), ManualClock()
    proposer = Scripted(Guess(tuple(range(8)), 3), clock, asking_s)
    speculator = AdaptiveSpeculator([proposer], 8, clock)
    started_s = clock.monotonic_s()
    keys = [ChoiceKey(str(number), 0) for number in range(num_sequences)]
    tokens = seconds = drafted = 0.0
    for step in range(steps):
        wanted = [Wanted(key, "", [], SAMPLING, 100) for key in keys]
        drafts = speculator.draft(wanted, num_rows=num_sequences, most_rows=200)
        rows = num_sequences + sum(map(len, drafts))
        step_s = (1.0 + slope * rows) * rng.uniform(0.9, 1.1) * hiccup(step, rows - num_sequences)
        speculator.observe_step(rows, step_s)
        seconds += step_s
        drafted += rows - num_sequences
        for key, draft in zip(keys, drafts, strict=True):
            num_right = 0
            while num_right < len(draft) and rng.random() < right:
                num_right += 1
            # Behind the last right draft stands a draw of its own, which tells of the guess where it is known to go on.
            follows = num_right if num_right == len(draft) < 8 and rng.random() < right else 99
            came = [*range(num_right), follows]
            tokens += len(came)
            speculator.settle(key, came)
    alone = num_sequences / (1.0 + slope * num_sequences)
    seconds += clock.monotonic_s() - started_s
    return tokens / seconds / alone, drafted / steps / num_sequences, proposer


@pytest.mark.parametrize(
    ("num_sequences", "right", "slope", "least_gain", "least_drafts", "most_drafts"),
    [
        (1, 0.95, 0.03, 3.0, 6, 8),  # copying, rows almost free
        (1, 0.0, 0.03, 0.97, 0, 0.3),  # never right
        (1, 0.3, 0.3, 0.97, 0, 2),
        (8, 0.3, 0.1, 0.97, 0, 1.5),
        (64, 0.9, 0.001, 2.0, 2, 8),  # a machine with room for rows
        (64, 0.5, 1.0, 0.97, 0, 0.1),  # a full one: every row costs what a token costs
    ],
)
def test_speculation_pays_or_does_not_happen(
    num_sequences: int, right: float, slope: float, least_gain: float, least_drafts: float, most_drafts: float
) -> None:
    gain, drafts, _ = run(num_sequences, right, slope)
    assert gain > least_gain
    assert least_drafts <= drafts <= most_drafts


def test_what_medians_do_not_see_is_no_loss_for_long() -> None:
    """Each third step with guesses takes four times what others of as many rows take: their median says nothing of it. Were the
    loss not looked at, it would be four tenths."""

    def dear(step: int, drafted: int) -> float:
        return 4.0 if drafted and step % 3 == 0 else 1.0

    gain, drafts, _ = run(8, 0.6, 0.02, steps=1000, hiccup=dear)
    assert gain > 0.9
    assert drafts > 0.0, "it is found out when guesses pay again"
    gain, drafts, _ = run(8, 0.6, 0.02, steps=1000)
    assert gain > 1.3


@pytest.mark.parametrize("right", [0.0, 0.1])
def test_asking_in_vain_is_given_up_though_each_guess_that_is_taken_pays(right: float) -> None:
    """To ask takes a tenth of a step, hardly a guess is right, and rows are free."""
    gain, _, proposer = run(4, right, 0.0, steps=4000, asking_s=0.025)
    assert gain > 0.985
    assert proposer.asked > 4 * 256, "it is tried again from time to time"


def test_asking_that_pays_goes_on() -> None:
    gain, drafts, _ = run(4, 0.6, 0.0, steps=1000, asking_s=0.025)
    assert gain > 1.75
    assert drafts > 4


def test_recesses_grow_until_asking_pays_and_are_of_one_size_of_batches() -> None:
    recess = Recess()

    def asked(num_sequences: int, gained: Sequence[float]) -> list[bool]:
        """For so many steps each: whether it was asked about, and what that gained."""
        told = []
        for each in gained:
            told.append(not recess.is_on(num_sequences))
            if told[-1]:
                recess.gained(each)
        return told

    for length in (128, 256, 512, 512):
        assert asked(8, [-0.02] * (128 + length)) == [True] * 128 + [False] * length
        assert all(asked(1, [-0.02] * 8)), "one alone is another matter"
    assert asked(9, [2.0] + [-0.02] * (127 + 128 + 128)) == [True] * (128 + 128) + [False] * 128
    assert all(asked(64, [-0.009] * 200)), "so little is borne"


def test_guesses_that_become_right_are_used_again() -> None:
    """Nobody has to risk a row to find out: what was offered and not used is compared with what came."""
    speculator = AdaptiveSpeculator([Scripted(Guess((1, 2, 3), 0))], 8, ManualClock())
    wanted = [Wanted(ChoiceKey("a", 0), "", [], SAMPLING, 100)]
    for rows in (1, 2, 3, 4):
        for _ in range(3):
            speculator.observe_step(rows, 0.7 + 0.3 * rows)
    for _ in range(60):
        speculator.draft(wanted, num_rows=1, most_rows=8)
        speculator.settle(wanted[0].key, [9])
    assert speculator.draft(wanted, num_rows=1, most_rows=8) == [()]
    for _ in range(40):
        speculator.settle(wanted[0].key, [1])
        draft = speculator.draft(wanted, num_rows=1, most_rows=8)
    assert draft[0]


def test_in_a_large_batch_hopeless_sequences_are_asked_less_often() -> None:
    for num_sequences, most in ((1, 400), (64, 64 * 60)):
        _, _, proposer = run(num_sequences, 0.0, 0.05)
        assert proposer.asked <= most
    assert run(1, 0.0, 0.05)[2].asked == 400


def test_nothing_is_kept_of_choices_that_ended() -> None:
    speculator = AdaptiveSpeculator([NgramProposer(gram_tokens=2, shared_tokens=100)], 8, ManualClock())
    keys = [ChoiceKey(str(number), 0) for number in range(5)]
    speculator.draft([Wanted(key, "", [1, 2, 1, 2], SAMPLING, 10) for key in keys], num_rows=5, most_rows=10)
    assert speculator.num_sequences == 5
    for key in keys:
        speculator.end(key, "", [1, 2, 1, 2], 2)
        speculator.end(key, "", [1, 2, 1, 2], 2)
        speculator.settle(key, [1])
    assert speculator.num_sequences == 0


def test_no_row_is_taken_that_is_not_there() -> None:
    speculator = AdaptiveSpeculator([Scripted(Guess(tuple(range(20)), 0))], 8, ManualClock())
    wanted = [Wanted(ChoiceKey("a", 0), "", [], SAMPLING, 3), Wanted(ChoiceKey("b", 0), "", [], SAMPLING, 100)]
    assert speculator.draft(wanted, num_rows=2, most_rows=0) == [(), ()]
    drafts = speculator.draft(wanted, num_rows=2, most_rows=100)
    assert len(drafts[0]) <= 3
    assert len(drafts[1]) <= 8
    assert sum(map(len, speculator.draft(wanted, num_rows=2, most_rows=4))) <= 4


class Dear(Scripted):
    """One whose guesses take time."""

    name = "dear"
    takes_time = True

    def __init__(self, guess: Guess, clock: ManualClock, token_s: float) -> None:
        super().__init__(guess, clock)
        self.token_s = token_s

    def propose(self, wanted: Sequence[Wanted]) -> list[Guess]:
        self.clock.advance(self.token_s * max(item.most_tokens for item in wanted))
        return super().propose(wanted)


@pytest.mark.parametrize(
    ("right", "token_s", "least_gain", "least_drafts", "most_drafts"),
    [
        (0.9, 0.1, 1.8, 3, 8),  # a small model that is often right
        (0.9, 1.5, 0.97, 0, 0.4),  # one that takes longer than the large one
        (0.0, 0.1, 0.97, 0, 0.4),  # one that knows nothing
    ],
)
def test_guesses_that_take_steps_are_made_only_where_they_pay(
    right: float, token_s: float, least_gain: float, least_drafts: float, most_drafts: float
) -> None:
    rng, clock = random.Random(2), ManualClock()
    proposer = Dear(Guess(tuple(range(8))), clock, token_s)
    speculator = AdaptiveSpeculator([proposer], 8, clock)
    wanted = [Wanted(ChoiceKey("a", 0), "", [], SAMPLING, 100)]
    tokens, drafted, steps = 0, 0, 3000
    started_s = clock.monotonic_s()
    for _ in range(steps):
        draft = speculator.draft(wanted, num_rows=1, most_rows=100)[0]
        step_s = 1.0 + 0.03 * len(draft)
        clock.advance(step_s)
        speculator.observe_step(1 + len(draft), step_s)
        num_right = 0
        while num_right < len(draft) and rng.random() < right:
            num_right += 1
        tokens, drafted = tokens + num_right + 1, drafted + len(draft)
        speculator.settle(wanted[0].key, [*range(num_right), 99])
    assert tokens / (clock.monotonic_s() - started_s) > least_gain
    assert least_drafts <= drafted / steps <= most_drafts
    assert proposer.asked >= 6, "it is tried again from time to time"
