"""A configuration as YAML with the origin of each value beside it.

Plain values, and lists of them, take one line; what holds others is opened up. Lines of defaults can be left out, together with
parts in which nothing else is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

_COLUMN = 56  # where origins stand, unless a line is longer
_INDENT = "  "

Origin = Callable[[Sequence[str]], str | None]


@dataclass(frozen=True, slots=True)
class Line:
    text: str
    origin: str = ""  # empty: a line that opens a part
    default: bool = False
    column: int = _COLUMN


def effective_lines(values: Mapping[str, Any], origin: Origin, *, changed_only: bool) -> list[Line]:
    return list(_mapping(values, (), origin, changed_only))


def _mapping(values: Mapping[str, Any], keys: tuple[str, ...], origin: Origin, changed_only: bool) -> Iterator[Line]:
    for name, value in values.items():
        here = (*keys, str(name))
        label = f"{_INDENT * len(keys)}{_scalar(str(name))}:"
        if _opens(value):
            inside = list(_inside(value, here, origin, changed_only))
            if inside or not changed_only:
                yield Line(label)
                yield from inside
        else:
            yield from _leaf(label, value, here, origin, changed_only)


def _inside(value: Any, keys: tuple[str, ...], origin: Origin, changed_only: bool) -> Iterator[Line]:
    if isinstance(value, dict):
        yield from _mapping(value, keys, origin, changed_only)
        return
    for index, item in enumerate(value):
        here = (*keys, str(index))
        lines = list(_mapping(item, here, origin, changed_only))
        # The dash takes the place of the first line's indentation: a list's items are as deep as their keys.
        for position, line in enumerate(lines):
            text = f"{_INDENT * (len(keys) - 1)}{'- ' if position == 0 else _INDENT}{line.text[len(_INDENT) * len(here) :]}"
            yield Line(text, line.origin, line.default)


def _leaf(label: str, value: Any, keys: tuple[str, ...], origin: Origin, changed_only: bool) -> Iterator[Line]:
    found = origin(keys)
    if found is not None or not changed_only:
        yield Line(f"{label} {_scalar(value)}", found or "default", found is None)


def _opens(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value)
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _scalar(value: Any) -> str:
    """One value, or a list of them, on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()
