"""The JSON schemas that any reader of grammars takes for the same: closed objects, lists, plain scalars, choices, references.

Not: texts with a length, a pattern or a format, numbers with bounds, open objects, keywords that combine schemas otherwise than
by `anyOf`. What is not known here is not plain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MOST_ITEMS = 1000  # more of them make an automaton large
_MOST_VALUES = 1000
_MOST_PROPERTIES = 64  # those that may be left out cost xgrammar the square of their number
_LARGEST = 2**53
_REMARKS = frozenset({"title", "description", "default", "examples", "$comment", "$schema", "$defs", "definitions"})
_SCALARS = (str, int, float, bool, type(None))


def is_plain(schema: object) -> bool:
    """`schema` is one that compiles; here it is only asked what is in it."""
    if not isinstance(schema, Mapping):
        return False
    shared = [part for name in ("$defs", "definitions") for part in _values(schema.get(name, {}))]
    return _is_plain(schema, is_root=True) and all(_is_plain(part) for part in shared)


def _is_plain(schema: object, *, is_root: bool = False) -> bool:
    if not isinstance(schema, Mapping) or (not is_root and not {"$defs", "definitions"}.isdisjoint(schema)):
        return False
    keywords = schema.keys() - _REMARKS
    match schema:
        case {"$ref": str(target)}:
            parts = target.split("/")
            return keywords == {"$ref"} and (
                target == "#" or (len(parts) == 3 and parts[0] == "#" and parts[1] in ("$defs", "definitions"))
            )
        case {"anyOf": list(parts)}:
            return keywords == {"anyOf"} and all(_is_plain(part) for part in parts)
        case {"enum": list(values)}:
            return (
                keywords == {"enum"} | _type_of(schema, values) and len(values) <= _MOST_VALUES and all(map(_is_scalar, values))
            )
        case {"const": value}:
            return keywords == {"const"} | _type_of(schema, [value]) and _is_scalar(value)
        case {"type": "object"}:
            return _is_plain_object(schema, keywords)
        case {"type": "array", "items": items}:
            within = all(_is_between(schema.get(name, 0), 0, _MOST_ITEMS) for name in ("minItems", "maxItems"))
            return keywords <= {"type", "items", "minItems", "maxItems"} and within and _is_plain(items)
        case {"type": "integer"}:
            return keywords <= {"type", "minimum", "maximum"} and all(
                _is_between(schema.get(name, 0), -_LARGEST, _LARGEST) for name in ("minimum", "maximum")
            )
        case {"type": "string" | "number" | "boolean" | "null"}:
            return keywords == {"type"}
    return False


def _is_plain_object(schema: Mapping[str, Any], keywords: set[str]) -> bool:
    properties = schema.get("properties", {})
    return (
        keywords <= {"type", "properties", "required", "additionalProperties"}
        and schema.get("additionalProperties") is False
        and isinstance(properties, Mapping)
        and len(properties) <= _MOST_PROPERTIES
        and set(schema.get("required", ())) <= properties.keys()
        and all(_is_plain(part) for part in properties.values())
    )


def _type_of(schema: Mapping[str, Any], values: list[object]) -> set[str]:
    """A type beside the values says nothing more, if it is that of texts and they are."""
    return {"type"} if schema.get("type") == "string" and all(isinstance(value, str) for value in values) else set()


def _values(part: object) -> list[object]:
    return list(part.values()) if isinstance(part, Mapping) else [part]


def _is_between(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and least <= value <= most


def _is_scalar(value: object) -> bool:
    return isinstance(value, _SCALARS)
