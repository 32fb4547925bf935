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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any, cast

from pydantic import BaseModel

_LENGTH = struct.Struct("<Q")
_DOUBLE = struct.Struct("<d")
_NOTHING = frozenset[str]()


def canonical(value: object) -> bytes:
    """Raises TypeError for a type that has no canonical form: leaving it out could make different requests equal."""
    encode = _OF_TYPE.get(type(value))
    return _of_another(value) if encode is None else encode(value)


def fields_of(value: object, leave_out: Collection[str] = _NOTHING) -> bytes:
    """The fields of a dataclass or a pydantic model, whatever they are today, but for those named."""
    names, read = _fields(cast(Any, type(value)), frozenset(leave_out))
    return _tagged(b"o", b"".join([name + canonical(item) for name, item in zip(names, read(value), strict=True)]))


def token_ids(ids: Iterable[int]) -> bytes:
    """The same as a list of ints, in four bytes each: prompts are long."""
    return _tagged(b"t", array("I", ids).tobytes())


def _tagged(tag: bytes, payload: bytes) -> bytes:
    return tag + _LENGTH.pack(len(payload)) + payload


def _bool(value: bool) -> bytes:
    return _TRUE if value else _FALSE


def _text(value: str) -> bytes:  # a StrEnum is its string
    return _tagged(b"s", value.encode("utf-8", "surrogatepass"))


def _int(value: int) -> bytes:
    return _tagged(b"i", b"%d" % value)


def _float(value: float) -> bytes:
    return _tagged(b"f", _DOUBLE.pack(value + 0.0))  # -0.0 is 0.0


def _bytes(value: bytes) -> bytes:
    return _tagged(b"b", value)


def _list(value: Iterable[object]) -> bytes:
    return _tagged(b"l", b"".join(map(canonical, value)))


def _set(value: Iterable[object]) -> bytes:
    return _tagged(b"e", b"".join(sorted(map(canonical, value))))


def _mapping(value: Mapping[object, object]) -> bytes:
    return _tagged(b"m", b"".join(sorted(canonical(key) + canonical(item) for key, item in value.items())))


_NONE, _TRUE, _FALSE = _tagged(b"0", b""), _tagged(b"?", b"\1"), _tagged(b"?", b"\0")
_BY_KIND: tuple[tuple[type, Callable[[Any], bytes]], ...] = (
    (bool, _bool),  # before int, of which it is one
    (str, _text),
    (int, _int),
    (float, _float),
    (bytes, _bytes),
    (tuple, _list),
    (list, _list),
    (set, _set),
    (frozenset, _set),
    (Mapping, _mapping),
)
# A key has some forty values of these very types.
_OF_TYPE: dict[type, Callable[[Any], bytes]] = {type(None): lambda value: _NONE, **dict(_BY_KIND)}


def _of_another(value: object) -> bytes:
    """Of a type that is derived from one of those, or has fields."""
    encode = next((encode for kind, encode in _BY_KIND if isinstance(value, kind)), fields_of)
    return encode(value)


@lru_cache(maxsize=256)
def _fields(kind: Any, leave_out: frozenset[str]) -> tuple[tuple[bytes, ...], Callable[[object], tuple[Any, ...]]]:
    """How a class's fields are written, but for some, and what reads their values."""
    if dataclasses.is_dataclass(kind):
        names = [field.name for field in dataclasses.fields(kind)]
    elif issubclass(kind, BaseModel):
        names = list(kind.model_fields)
    else:
        raise TypeError(f"{kind.__name__} has no canonical form")
    names = [name for name in sorted(names) if name not in leave_out]
    return tuple(map(canonical, names)), _reader(names)


def _reader(names: Sequence[str]) -> Callable[[object], tuple[Any, ...]]:
    if len(names) > 1:
        return attrgetter(*names)  # of a single name it would give no tuple
    return lambda value: tuple(getattr(value, name) for name in names)
