"""Guesses from what was said: what is guessed, from whose words, and what is remembered."""

from __future__ import annotations

import pytest

from common.types import SamplingParams
from decode_worker.speculation.ngram import NgramProposer
from decode_worker.speculation.proposer import ChoiceKey, Guess, Wanted

A, B = ChoiceKey("a", 0), ChoiceKey("b", 1)


def guess(proposer: NgramProposer, tokens: list[int], *, key: ChoiceKey = A, salt: str = "", most: int = 4) -> Guess:
    return proposer.propose([Wanted(key, salt, tokens, SamplingParams(max_tokens=100, seed=1), most)])[0]


@pytest.mark.parametrize(
    ("tokens", "guessed"),
    [
        ([1, 2, 3, 4, 5, 1, 2], (3, 4, 5, 1)),
        ([1, 2, 9, 1, 2, 8, 1, 2], (8, 1, 2, 8)),  # the newest of equals, and on with itself
        ([5, 1, 2, 9, 7, 1, 2, 8, 5, 1, 2], (9, 7, 1, 2)),  # the longest before the newest
        ([4, 4, 4], (4, 4, 4, 4)),
        ([1, 2, 3, 4], ()),
        ([1], ()),
        ([], ()),
    ],
)
def test_a_sequence_goes_on_as_it_went_on_before(tokens: list[int], guessed: tuple[int, ...]) -> None:
    assert guess(NgramProposer(gram_tokens=2, shared_tokens=0), tokens).token_ids == guessed


def test_a_growing_sequence_is_guessed_as_if_it_were_new() -> None:
    tokens = [(place * place) % 7 for place in range(200)]
    growing = NgramProposer(gram_tokens=3, shared_tokens=0)
    for length in (5, 6, 50, 51, 200):
        assert guess(growing, tokens[:length]) == guess(NgramProposer(gram_tokens=3, shared_tokens=0), tokens[:length])
    assert growing.num_sequences == 1
    growing.end(A, "", tokens, 10)
    assert growing.num_sequences == 0


def test_more_agreement_is_other_evidence() -> None:
    proposer = NgramProposer(gram_tokens=2, shared_tokens=0)
    common = list(range(40))
    seen = [
        guess(proposer, [*common, 99, *common[40 - agreeing :]], key=ChoiceKey("x", agreeing)).evidence
        for agreeing in (2, 3, 4, 6, 12, 30)
    ]
    assert sorted(set(seen)) == seen


def test_answers_are_remembered_for_their_tenant_alone() -> None:
    proposer = NgramProposer(gram_tokens=2, shared_tokens=1000)
    proposer.end(A, "tenant", [1, 2, 3, 10, 11, 12, 13], 3)
    assert guess(proposer, [50, 10, 11], key=B, salt="tenant").token_ids == (12, 13)
    assert guess(proposer, [50, 2, 3], key=ChoiceKey("c", 0), salt="tenant").token_ids == (10, 11, 12, 13)  # with its context
    assert guess(proposer, [50, 10, 11], key=ChoiceKey("d", 0), salt="other").token_ids == ()
    own = guess(proposer, [9, 10, 11, 7, 9, 10, 11], key=ChoiceKey("e", 0), salt="tenant")
    assert own.token_ids[0] == 7, "what agrees longer is better, whose it may be"


def test_no_guess_goes_from_one_answer_into_the_next() -> None:
    proposer = NgramProposer(gram_tokens=2, shared_tokens=1000)
    proposer.end(A, "", [1, 10, 11, 12], 1)
    proposer.end(A, "", [1, 20, 21, 22], 1)
    assert guess(proposer, [10, 11], key=B).token_ids == (12,)
    assert guess(proposer, [11, 12], key=ChoiceKey("c", 0)).token_ids == ()


def test_what_is_remembered_is_bounded_and_the_oldest_goes() -> None:
    proposer = NgramProposer(gram_tokens=2, shared_tokens=40)
    for number in range(20):
        proposer.end(ChoiceKey(str(number), 0), "", [0, *range(100 * number + 100, 100 * number + 110)], 1)
    texts = proposer._answers[""]._texts
    assert len(texts) == 2
    assert sum(len(text) for text, _ in texts) <= 2 * 21
    assert guess(proposer, [2000, 2001], key=A).token_ids == (2002, 2003, 2004, 2005)
    assert guess(proposer, [100, 101], key=B).token_ids == ()
    for number in range(200):
        proposer.end(A, f"tenant {number}", [0, 1, 2, 3], 1)
    assert len(proposer._answers) == 64


def test_nothing_is_remembered_where_it_is_not_wanted() -> None:
    proposer = NgramProposer(gram_tokens=2, shared_tokens=0)
    proposer.end(A, "", [1, 10, 11, 12], 1)
    assert not proposer._answers
