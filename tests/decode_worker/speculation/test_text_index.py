"""The index against a search of the whole text."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from decode_worker.speculation.text_index import Match, TextIndex

EVERYTHING = 10_000


def longest(text: list[int], covered: int, tokens: list[int], least: int, most: int) -> Match | None:
    """Every place, every length: most tokens, then the newest."""
    found = []
    for end in range(1, covered + 1):
        agreeing = 0
        while agreeing < min(most, end, len(tokens)) and text[end - 1 - agreeing] == tokens[-1 - agreeing]:
            agreeing += 1
        if agreeing >= least:
            found.append((agreeing, end))
    return Match(max(found)[1], max(found)[0]) if found else None


texts = st.lists(st.integers(0, 3), max_size=60)


@settings(max_examples=300, deadline=None)
@given(text=texts, tail=texts, least=st.integers(1, 4), most=st.integers(4, 20), pieces=st.lists(st.integers(0, 60), max_size=5))
def test_the_longest_occurrence_is_found(text: list[int], tail: list[int], least: int, most: int, pieces: list[int]) -> None:
    """In the text itself and in another one, however it was covered bit by bit."""
    index = TextIndex(text, least, most_occurrences=EVERYTHING, most_tokens=most)
    covered = 0
    for end in sorted(min(piece, max(0, len(text) - 1)) for piece in pieces):
        index.cover(end)
        covered = end
        for tokens in (text[: end + 1], tail, [*tail, *text[:end]]):
            assert index.find(tokens) == longest(text, covered, tokens, least, most)


@settings(max_examples=100, deadline=None)
@given(text=texts, most_occurrences=st.integers(1, 4))
def test_a_short_search_finds_a_true_occurrence_if_there_is_one(text: list[int], most_occurrences: int) -> None:
    index = TextIndex(text, 2, most_occurrences=most_occurrences)
    index.cover(len(text) - 1)
    found = index.find(text)
    best = longest(text, len(text) - 1, text, 2, 64)
    assert (found is None) == (best is None)
    if found is not None:
        assert text[found.end - found.num_tokens : found.end] == text[len(text) - found.num_tokens :]
        assert found.num_tokens <= best.num_tokens


def test_work_is_bounded_where_everything_agrees() -> None:
    """A text of one token: each look-up looks at one place, and no further back than it must."""
    text = [7] * 5000
    index = TextIndex(text, 2, most_tokens=64)
    index.cover(len(text) - 1)
    assert index.find(text) == Match(4999, 64)
