"""Changes between pictures, against a second way to apply them (RFC 7396, written out here from its text)."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from router.console.merge_patch import merge_patch

VALUES = st.recursive(
    st.one_of(st.none(), st.integers(0, 3), st.text("ab", max_size=2), st.lists(st.integers(0, 2), max_size=2)),
    lambda inner: st.dictionaries(st.sampled_from("xyz"), inner, max_size=3),
    max_leaves=8,
)
PICTURES = st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3)


def applied(target: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = applied(result.get(name), value)
    return result


def without_nulls(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: without_nulls(part) for name, part in value.items() if part is not None}


@settings(max_examples=40)
@given(PICTURES, PICTURES)
def test_applied_it_makes_the_second_of_the_first(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert without_nulls(applied(before, merge_patch(before, after))) == without_nulls(after)


@settings(max_examples=40)
@given(PICTURES)
def test_nothing_has_changed_from_a_picture_to_itself(picture: dict[str, Any]) -> None:
    assert merge_patch(picture, picture) == {}


def test_only_what_changed_is_told() -> None:
    before = {"workers": {"a": {"running": 1, "kv": {"used": 3, "free": 5}}, "b": {"running": 0}}, "name": "x"}
    after = {"workers": {"a": {"running": 1, "kv": {"used": 4, "free": 5}}, "c": {"running": 0}}, "name": "x"}
    assert merge_patch(before, after) == {"workers": {"a": {"kv": {"used": 4}}, "b": None, "c": {"running": 0}}}
