"""Every key of the configuration as a reference: what it may be, its default, its help. Made from the fields themselves."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from common.config.source import fields_of, part_of


@dataclass(frozen=True, slots=True)
class Entry:
    key: str
    kind: str
    default: str
    required: bool
    help: str
    is_part: bool


def entries(root: type[BaseModel]) -> list[Entry]:
    return [
        Entry(
            key=key,
            kind=_kind(field),
            default=_default(field),
            required=field.is_required(),
            help=field.description or _first_line(field),
            is_part=part_of(field) is not None,
        )
        for key, field in fields_of(root)
    ]


def nearest(known: Sequence[Entry], key: str) -> str | None:
    """The whole key is compared first, then its last part, for who knows the name but not where it belongs."""
    close = difflib.get_close_matches(key, [one.key for one in known], n=1, cutoff=0.8)
    if close:
        return close[0]
    last = {one.key.rpartition(".")[2]: one.key for one in reversed(known)}
    by_name = difflib.get_close_matches(key.rpartition(".")[2], list(last), n=1)
    return last[by_name[0]] if by_name else None


def as_markdown(root: type[BaseModel]) -> str:
    """One table per part."""
    lines: list[str] = []
    above: str | None = None
    for one in sorted(entries(root), key=lambda entry: (entry.key.rpartition(".")[0], entry.is_part)):
        part, _, name = one.key.rpartition(".")
        if part != above:
            lines += [
                "",
                f"## {part or 'The whole file'}",
                "",
                "| key | what it may be | default | meaning |",
                "|---|---|---|---|",
            ]
            above = part
        cells = (f"`{name}`", one.kind, "must be given" if one.required else f"`{one.default}`", one.help)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(["# Configuration", *lines]) + "\n"


def _kind(field: FieldInfo) -> str:
    limits = [_limit(rule) for rule in field.metadata]
    return " ".join([_name(field.annotation), *(limit for limit in limits if limit)])


def _name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is typing.Literal:
        return " | ".join(str(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_name(one) for one in arguments)
    if origin is typing.Annotated:
        return _name(arguments[0])
    if origin in (tuple, list):
        return f"list of ({_name(arguments[0])})"
    if origin is dict:
        return f"mapping of ({_name(arguments[0])}) to ({_name(arguments[1])})"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "part"
    names = {int: "whole number", float: "number", str: "text", bool: "true | false"}
    return names.get(annotation, str(annotation))


def _limit(rule: Any) -> str:
    match rule:
        case annotated_types.Ge(ge=bound):
            return f">= {bound}"
        case annotated_types.Gt(gt=bound):
            return f"> {bound}"
        case annotated_types.Le(le=bound):
            return f"<= {bound}"
        case annotated_types.Lt(lt=bound):
            return f"< {bound}"
        case _:
            return ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=False)
    if isinstance(value, BaseModel):
        return "its own"
    if value in ((), {}):
        return "none"
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _first_line(field: FieldInfo) -> str:
    part = part_of(field)
    return (part.__doc__ or "").strip().partition("\n")[0] if part is not None and part.__doc__ else ""
