"""The draft model's book-keeping against a fake model that reads what it is given back from memory."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.blocks import root_hash
from common.engine.batch import ForwardResult, ScheduledBatch, SliceResult
from common.engine.block_manager import BlockManager
from common.types import SampledToken, SamplingParams
from decode_worker.speculation.draft_model import DraftModelProposer
from decode_worker.speculation.proposer import ChoiceKey, Wanted

BLOCK_TOKENS = 4
SAMPLING = SamplingParams(max_tokens=1000, seed=1)


def next_token(tokens: Sequence[int], choice: int) -> int:
    return random.Random(hash((tuple(tokens), choice))).randrange(10, 1000)


def going_on(tokens: Sequence[int], choice: int, count: int) -> list[int]:
    known = list(tokens)
    for _ in range(count):
        known.append(next_token(known, choice))
    return known[len(tokens) :]


class FakeRunner:
    """Keeps tokens where a model keeps KV, and draws from what lies there."""

    def __init__(self, num_blocks: int) -> None:
        self.memory = {block: [0] * BLOCK_TOKENS for block in range(num_blocks)}
        self.rows = 0

    def execute(self, batch: ScheduledBatch) -> ForwardResult:
        assert batch.slices
        results = []
        written: set[tuple[int, int]] = set()
        for item in batch.slices:
            assert item.token_ids
            self.rows += len(item.token_ids)
            for position, token in enumerate(item.token_ids, start=item.start):
                place = (item.block_table[position // BLOCK_TOKENS], position % BLOCK_TOKENS)
                assert place not in written
                written.add(place)
                self.memory[place[0]][place[1]] = token
            end = item.start + len(item.token_ids)
            known = [self.memory[item.block_table[at // BLOCK_TOKENS]][at % BLOCK_TOKENS] for at in range(end)]
            assert all(spec.position == end for spec in item.samples)
            results.append(SliceResult(tuple(SampledToken(next_token(known, spec.choice)) for spec in item.samples)))
        return ForwardResult(tuple(results))


def proposer_over(num_blocks: int, *, max_model_tokens: int = 1000) -> tuple[DraftModelProposer, FakeRunner, BlockManager]:
    runner = FakeRunner(num_blocks)
    blocks = BlockManager(num_blocks, BLOCK_TOKENS, lambda salt: root_hash(b"draft", salt))
    return DraftModelProposer(runner, blocks, max_model_tokens), runner, blocks


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_guesses_are_what_the_model_says_after_the_known_tokens(data: st.DataObject) -> None:
    """Sequences with common beginnings grow by right guesses, by some of them and by other tokens; blocks are few."""
    roomy = data.draw(st.booleans())
    proposer, _, blocks = proposer_over(1000 if roomy else data.draw(st.integers(6, 40)))
    texts: dict[ChoiceKey, list[int]] = {}
    number = 0
    for _ in range(data.draw(st.integers(1, 25))):
        if not texts or (len(texts) < 4 and data.draw(st.booleans())):
            texts[ChoiceKey(str(number), number % 2)] = [*range(data.draw(st.integers(0, 9))), 50 + number]
            number += 1
        asked = data.draw(st.lists(st.sampled_from(sorted(texts, key=str)), unique=True, min_size=1))
        wanted = [Wanted(key, "", texts[key], SAMPLING, data.draw(st.integers(0, 5))) for key in asked]
        for item, guess in zip(wanted, proposer.propose(wanted), strict=True):
            assert len(guess.token_ids) == item.most_tokens or (not guess.token_ids and not roomy)
            assert list(guess.token_ids) == going_on(item.tokens, item.key.choice, len(guess.token_ids))
            right = data.draw(st.integers(0, len(guess.token_ids)))
            texts[item.key] += [*guess.token_ids[:right], data.draw(st.sampled_from([7, *guess.token_ids]))]
        blocks.check_integrity()
        if data.draw(st.integers(0, 4)) == 0:
            key = data.draw(st.sampled_from(sorted(texts, key=str)))
            proposer.end(key, "", texts.pop(key), 1)
    for key, tokens in texts.items():
        proposer.end(key, "", tokens, 1)
    assert proposer.num_sequences == 0
    assert blocks.num_used == 0


def test_nothing_is_computed_twice() -> None:
    proposer, runner, _ = proposer_over(64)
    key, tokens = ChoiceKey("a", 0), list(range(30))
    guess = proposer.propose([Wanted(key, "", tokens, SAMPLING, 4)])[0]
    assert runner.rows == 30 + 3
    tokens += [*guess.token_ids, 7]
    proposer.propose([Wanted(key, "", tokens, SAMPLING, 4)])
    assert runner.rows == 33 + 2 + 3, "the last token of the guess and the one behind it, and three of the new guess"
    other = ChoiceKey("b", 1)
    proposer.propose([Wanted(other, "", tokens, SAMPLING, 1)])
    assert runner.rows == 38 + len(tokens) - 32, "what another choice computed is found"


def test_a_long_prompt_is_caught_up_with_in_pieces() -> None:
    proposer, runner, _ = proposer_over(600)
    wanted = Wanted(ChoiceKey("a", 0), "", list(range(1100)), SAMPLING, 2)
    proposer._max_model_tokens = 2000
    for rows in (512, 1024):
        assert proposer.propose([wanted])[0].token_ids == ()
        assert runner.rows == rows
    assert list(proposer.propose([wanted])[0].token_ids) == going_on(wanted.tokens, 0, 2)


def test_who_was_not_asked_for_longest_gives_up_its_blocks() -> None:
    proposer, runner, blocks = proposer_over(10)
    texts = {ChoiceKey(name, 0): [*range(100 * number, 100 * number + 12)] for number, name in enumerate("abc")}
    for key, tokens in texts.items():
        assert proposer.propose([Wanted(key, "", tokens, SAMPLING, 3)])[0].token_ids
    assert blocks.num_used <= 10
    before = runner.rows
    for tokens in texts.values():
        tokens.append(7)
    first = next(iter(texts))
    assert list(proposer.propose([Wanted(first, "", texts[first], SAMPLING, 3)])[0].token_ids) == going_on(texts[first], 0, 3)
    assert runner.rows > before
    texts[first].append(8)
    together = [Wanted(key, "", tokens, SAMPLING, 3) for key, tokens in texts.items()]
    guesses = [list(guess.token_ids) for guess in proposer.propose(together)]
    assert 0 < sum(map(bool, guesses)) < 3, "there is no room for all three"
    for key, guess in zip(texts, guesses, strict=True):
        assert guess in ([], going_on(texts[key], 0, 3))


@pytest.mark.parametrize(("num_tokens", "guessed"), [(16, 4), (17, 0)])
def test_no_guess_goes_beyond_what_the_model_can_hold(num_tokens: int, guessed: int) -> None:
    proposer, _, _ = proposer_over(64, max_model_tokens=20)
    wanted = Wanted(ChoiceKey("a", 0), "", list(range(num_tokens)), SAMPLING, 4)
    assert len(proposer.propose([wanted])[0].token_ids) == guessed
