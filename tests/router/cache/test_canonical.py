"""Equal bytes mean equal values, whatever the values are."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from router.cache.canonical import canonical, fields_of, token_ids

_PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
_VALUES = st.recursive(
    _PLAIN,
    lambda inner: (
        st.lists(inner, max_size=4).map(tuple) | st.dictionaries(st.text(), inner, max_size=4) | st.frozensets(_PLAIN, max_size=4)
    ),
    max_leaves=12,
)


def typed(value: object) -> object:
    """The same value such that Python's own equality tells types apart: 1, 1.0 and True are equal there."""
    if isinstance(value, tuple):
        return ("tuple", tuple(map(typed, value)))
    if isinstance(value, frozenset):
        return ("set", frozenset(map(typed, value)))
    if isinstance(value, dict):
        return ("map", frozenset((key, typed(item)) for key, item in value.items()))
    return (type(value).__name__, value)


@given(_VALUES, _VALUES)
def test_two_values_have_the_same_form_if_and_only_if_they_are_equal(one: object, other: object) -> None:
    assert (canonical(one) == canonical(other)) == (typed(one) == typed(other))


# Of the letters that tags are made of: what is written between two values must not be something that a value can hold.
_TAGGED = st.lists(st.text("sl\x01\x00", max_size=3), max_size=3)


@example(["a", "sb"], ["as", "b"])
@given(_TAGGED, _TAGGED)
def test_no_way_of_cutting_texts_makes_lists_equal(one: list[str], other: list[str]) -> None:
    assert (canonical(one) == canonical(other)) == (one == other)


@given(st.dictionaries(st.text(), st.integers()))
def test_the_order_of_keys_does_not_matter(values: dict[str, int]) -> None:
    assert canonical(values) == canonical(dict(reversed(values.items())))


def test_zero_has_one_form() -> None:
    assert canonical(0.0) == canonical(-0.0)


class Colour(enum.StrEnum):
    RED = "red"


class Model(BaseModel):
    b: int = 1
    a: str = "x"


@dataclass(frozen=True, slots=True)
class Value:
    b: int = 1
    a: str = "x"


def test_objects_are_their_fields() -> None:
    assert canonical(Value()) == canonical(Model())
    assert canonical(Value(b=2)) != canonical(Value())
    assert fields_of(Value(b=2), {"b"}) == fields_of(Value(), {"b"})
    assert fields_of(Value(), {"b"}) != fields_of(Value(), {"a"})
    assert canonical(Colour.RED) == canonical("red")


def test_a_type_without_a_form_is_refused() -> None:
    with pytest.raises(TypeError, match="object"):
        canonical((1, object()))


@given(st.lists(st.integers(0, 2**32 - 1)), st.lists(st.integers(0, 2**32 - 1)))
def test_token_ids(one: list[int], other: list[int]) -> None:
    assert (token_ids(one) == token_ids(other)) == (one == other)
