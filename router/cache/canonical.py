"""Values as bytes, so that equal bytes mean equal values: every value carries its type and its length; nothing is joined bare.

    ("ab", "c") and ("a", "bc") differ, and so do 1, 1.0, True, "1" and (1,)
    mappings and sets have no order; lists and tuples are alike

A dataclass or a model of pydantic is its fields by name, in the order of their names, without those that the caller leaves out.
Knows no request and no cache.
"""

from __future__ import annotations

import dataclasses
import struct
from array import array
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any, cast

from pydantic import BaseModel

_LENGTH = struct.Struct("<Q")
_DOUBLE = struct.Struct("<d")
_NOTHING = frozenset[str]()


def canonical(value: object) -> bytes:
    """Raises TypeError for a type that has no canonical form: leaving it out could make different requests equal."""
    if value is None:
        return _tagged(b"0", b"")
    if isinstance(value, bool):
        return _tagged(b"?", b"\1" if value else b"\0")
    if isinstance(value, str):  # a StrEnum is its string
        return _tagged(b"s", value.encode("utf-8", "surrogatepass"))
    if isinstance(value, int):
        return _tagged(b"i", b"%d" % value)
    if isinstance(value, float):
        return _tagged(b"f", _DOUBLE.pack(value + 0.0))  # -0.0 is 0.0
    if isinstance(value, bytes):
        return _tagged(b"b", value)
    if isinstance(value, (tuple, list)):
        return _tagged(b"l", b"".join(map(canonical, value)))
    if isinstance(value, (set, frozenset)):
        return _tagged(b"e", b"".join(sorted(map(canonical, value))))
    if isinstance(value, Mapping):
        return _tagged(b"m", b"".join(sorted(canonical(key) + canonical(item) for key, item in value.items())))
    return fields_of(value)


def fields_of(value: object, leave_out: Collection[str] = _NOTHING) -> bytes:
    """The fields of a dataclass or a pydantic model, whatever they are today, but for those named."""
    names = _names(cast(Any, type(value)))
    parts = (encoded + canonical(getattr(value, name)) for name, encoded in names if name not in leave_out)
    return _tagged(b"o", b"".join(parts))


def token_ids(ids: Iterable[int]) -> bytes:
    """The same as a list of ints, in four bytes each: prompts are long."""
    return _tagged(b"t", array("I", ids).tobytes())


def _tagged(tag: bytes, payload: bytes) -> bytes:
    return tag + _LENGTH.pack(len(payload)) + payload


@lru_cache(maxsize=64)
def _names(kind: Any) -> tuple[tuple[str, bytes], ...]:
    """Of a class's fields, and how they are written."""
    if dataclasses.is_dataclass(kind):
        names = [field.name for field in dataclasses.fields(kind)]
    elif issubclass(kind, BaseModel):
        names = list(kind.model_fields)
    else:
        raise TypeError(f"{kind.__name__} has no canonical form")
    return tuple((name, canonical(name)) for name in sorted(names))
