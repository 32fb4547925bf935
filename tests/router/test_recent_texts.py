"""A text is tokenised once per tenant while it is remembered, and what is remembered is bounded."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from router.recent_texts import RecentTexts


def chars(text: str) -> int:
    """What it counts for."""
    return len(text) + 64


class Counting:
    """Stands for a tokenizer: an id per character, after a first one if special tokens are added."""

    def __init__(self, shift: int = 0) -> None:
        self.asked: list[str] = []
        self._shift = shift

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.asked.append(text)
        return [1] * add_special_tokens + [ord(character) + self._shift for character in text]


def test_the_same_text_is_tokenised_once_for_each_tenant() -> None:
    texts, tokenizer = RecentTexts(1000), Counting()
    one: Any = tokenizer
    for tenant in ("a", "b", "a", "b"):
        assert texts.encode(one, "xy", add_special_tokens=False, tenant=tenant) == (120, 121)
    assert tokenizer.asked == ["xy", "xy"]


def test_what_changes_the_ids_tells_texts_apart() -> None:
    texts = RecentTexts(1000)
    one: Any = Counting()
    other: Any = Counting(shift=5)
    assert texts.encode(one, "x", add_special_tokens=False, tenant="") == (120,)
    assert texts.encode(one, "x", add_special_tokens=True, tenant="") == (1, 120)
    assert texts.encode(other, "x", add_special_tokens=False, tenant="") == (125,)


@given(st.lists(st.text("ab", max_size=6), max_size=30), st.integers(0, 330))
def test_the_last_texts_are_remembered_and_no_more_than_fit(asked: list[str], max_chars: int) -> None:
    texts, tokenizer = RecentTexts(max_chars), Counting()
    one: Any = tokenizer
    kept: list[str] = []  # oldest first
    expected: list[str] = []
    for text in asked:
        assert texts.encode(one, text, add_special_tokens=False, tenant="") == tuple(map(ord, text))
        if text in kept:
            kept.remove(text)
        else:
            expected.append(text)
        if chars(text) <= max_chars:
            kept.append(text)
        while sum(map(chars, kept)) > max_chars:
            kept.pop(0)
    assert tokenizer.asked == expected
    assert texts.num_chars == sum(map(chars, kept)) <= max_chars
