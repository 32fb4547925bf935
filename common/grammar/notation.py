"""Pieces of grammars as text. Knows no compiler, so that the router can write grammars without one."""

from __future__ import annotations

import json
from typing import Any

# Between two parts of a JSON value: nothing, a space, or a line break with some indentation. No answer is an endless blank.
JSON_WHITE_SPACE = r"( |\n[ \t]{0,16})?"
# Keywords that cannot be enforced are refused, not ignored.
JSON_OPTIONS: dict[str, Any] = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": JSON_WHITE_SPACE,
    "coerce_one_of": False,
    "lenient": False,
}


def lark_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def lark_json(schema: dict[str, Any]) -> str:
    """A JSON value of this schema as a part of a Lark grammar, with the same white space as a whole one."""
    return "%json " + json.dumps({**schema, "x-guidance": JSON_OPTIONS})
