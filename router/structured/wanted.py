"""From the fields of a body to the grammar that the answer is to obey.

    response_format {json_schema | json_object}, structured_outputs {json | json_object | regex | choice | grammar},
    guided_json, guided_regex, guided_choice, guided_grammar (older names of the same)      --> Wanted, at most one

Everything that can be said without compiling is said here: sizes, depth, shapes. It knows neither models nor processes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import InvalidRequest
from common.types import GrammarKind

MAX_GRAMMAR_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 64
MAX_CHOICES = 1024
LARK_OR_GBNF = "grammar"  # whichever it looks like; a kind only on the way to the examination

_KINDS = ("json", "json_object", "regex", "choice", "grammar")
_OLDER_NAMES = {f"guided_{kind}": kind for kind in ("json", "regex", "choice", "grammar")}
FORM_FIELDS = ("response_format", "structured_outputs", *_OLDER_NAMES)
# Of structured_outputs: accepted with the value that changes nothing.
_NEUTRAL = {
    "structural_tag": None,
    "disable_fallback": True,
    "disable_any_whitespace": False,
    "disable_additional_properties": False,
    "whitespace_pattern": None,
    "backend": None,
}


@dataclass(frozen=True, slots=True)
class Wanted:
    kind: str  # of `common.types.GrammarKind`, or LARK_OR_GBNF
    text: str
    param: str  # the field that asked for it


def wanted(body: Mapping[str, Any]) -> Wanted | None:
    """`body` has the fields named above, where they were given. Raises InvalidRequest naming the field."""
    found: list[Wanted] = []
    given = body.get("response_format")
    if given is not None:
        found += _of_response_format(given)
    given = body.get("structured_outputs")
    if given is not None:
        found += _of_structured_outputs(given)
    for name, kind in _OLDER_NAMES.items():
        if body.get(name) not in (None, ""):
            found.append(_of_kind(kind, body[name], name))
    if len(found) > 1:
        raise InvalidRequest(f"{found[0].param} and {found[1].param} cannot both be given", param=found[1].param)
    return found[0] if found else None


def _of_response_format(given: Any) -> list[Wanted]:
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "text":
        return []
    if kind == "json_object":
        return [_of_kind("json_object", True, "response_format")]
    if kind != "json_schema":
        raise InvalidRequest("type must be 'text', 'json_object' or 'json_schema'", param="response_format.type")
    inner = given.get("json_schema")
    if not isinstance(inner, dict):
        raise InvalidRequest("json_schema must be an object with a schema", param="response_format.json_schema")
    if not isinstance(inner.get("name", ""), str) or not isinstance(inner.get("strict") or False, bool):
        raise InvalidRequest("name must be a string and strict a boolean", param="response_format.json_schema")
    if inner.get("schema") is None:
        raise InvalidRequest("the schema is missing", param="response_format.json_schema.schema")
    return [_of_kind("json", inner["schema"], "response_format.json_schema.schema")]


def _of_structured_outputs(given: Any) -> list[Wanted]:
    if not isinstance(given, dict):
        raise InvalidRequest("must be an object", param="structured_outputs")
    fields = {name: value for name, value in given.items() if value is not None and not name.startswith("_")}
    for name, value in fields.items():
        if name not in _KINDS and (name not in _NEUTRAL or value is not _NEUTRAL[name]):
            raise InvalidRequest(f"{name[:64]} is not supported, or not with this value", param=f"structured_outputs.{name[:64]}")
    return [
        _of_kind(name, fields[name], f"structured_outputs.{name}")
        for name in _KINDS
        if name in fields and not (name == "json_object" and fields[name] is False)
    ]


def _of_kind(kind: str, value: Any, param: str) -> Wanted:
    match kind:
        case "json":
            return Wanted(GrammarKind.JSON_SCHEMA, _schema_text(value, param), param)
        case "json_object":
            if value is not True:
                raise InvalidRequest("must be a boolean", param=param)
            return Wanted(GrammarKind.JSON_SCHEMA, '{"type":"object"}', param)
        case "choice":
            return Wanted(GrammarKind.CHOICE, _choices_text(value, param), param)
    if not isinstance(value, str) or not value:
        raise InvalidRequest("must be a string and not be empty", param=param)
    return Wanted(GrammarKind.REGEX if kind == "regex" else LARK_OR_GBNF, check_size(value, param), param)


def _schema_text(value: Any, param: str) -> str:
    return schema_text(parsed_schema(value, param) if isinstance(value, str) else value, param)


def parsed_schema(text: str, param: str) -> Any:
    check_size(text, param)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the schema is not JSON: {str(error)[:200]}", param=param) from error


def schema_text(value: Any, param: str) -> str:
    """A schema as one text, if it is an object of a depth and size that can be compiled."""
    if value is True:
        value = {}
    if not isinstance(value, dict):
        raise InvalidRequest("a schema must be an object", param=param)
    _check_depth(value, param)
    try:
        return check_size(json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False), param)
    except ValueError as error:
        raise InvalidRequest(f"the schema is not JSON: {error}", param=param) from error


def _choices_text(value: Any, param: str) -> str:
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
        raise InvalidRequest("must be a list of strings, none of them empty", param=param)
    if len(value) > MAX_CHOICES:
        raise InvalidRequest(f"at most {MAX_CHOICES} choices", param=param)
    return check_size(json.dumps(value, ensure_ascii=False), param)


def check_size(text: str, param: str) -> str:
    try:
        size_bytes = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidRequest("the text holds half of a surrogate pair, which no encoding can express", param=param) from None
    if size_bytes > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(f"{size_bytes} bytes are too many; the limit is {MAX_GRAMMAR_BYTES}", param=param)
    return text


def _check_depth(value: Any, param: str) -> None:
    level = [value]
    for _ in range(MAX_SCHEMA_DEPTH):
        parts = (item.values() if isinstance(item, dict) else item if isinstance(item, list) else () for item in level)
        level = [part for inner in parts for part in inner if isinstance(part, (dict, list))]
        if not level:
            return
    raise InvalidRequest(f"the schema is nested more than {MAX_SCHEMA_DEPTH} deep", param=param)
