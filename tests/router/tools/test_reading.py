"""Tool calls in text: what is read does not depend on how the text is cut, and no character is lost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.tools.families import HERMES, LLAMA3, MISTRAL, MISTRAL_NAME_FIRST, Family
from router.tools.reading import CallArguments, CallBegins, CertainReader, Content, FreeReader, Reader

NAMES = ("get_weather", "f", "f2")
FAMILIES = {family.name: family for family in (HERMES, MISTRAL, MISTRAL_NAME_FIRST, LLAMA3)}
W = '{"name": "get_weather", "arguments": {"city": "Köln }{ \\" ]"}}'
WA = '{"city": "Köln }{ \\" ]"}'
P = '{"name": "f", "parameters": {"a": [1, {"b": 1e400}]}}'
PA = '{"a": [1, {"b": 1e400}]}'


def read(reader: Reader, pieces: Sequence[str]) -> tuple[str, list[tuple[str, str]]]:
    """(content, calls); checks what every reader promises of the order of its pieces."""
    content = ""
    calls: list[tuple[str, str]] = []
    for piece in [found for part in pieces for found in reader.push(part)] + reader.finish():
        match piece:
            case Content():
                assert piece.text
                content += piece.text
            case CallBegins():
                assert piece.index == len(calls)
                calls.append((piece.name, ""))
            case CallArguments():
                assert piece.index == len(calls) - 1
                calls[-1] = (calls[-1][0], calls[-1][1] + piece.text)
    return content, calls


@pytest.mark.parametrize(
    ("family", "text", "content", "calls"),
    [
        ("hermes", "plain words", "plain words", []),
        ("hermes", "", "", []),
        ("hermes", f"<tool_call>\n{W}\n</tool_call>", "", [("get_weather", WA)]),
        (
            "hermes",
            f"Let me see.\n<tool_call>{W}</tool_call>\n<tool_call>{P}</tool_call>\n",
            "Let me see.",
            [("get_weather", WA), ("f", PA)],
        ),
        ("hermes", f"<tool_call>[{W}, {P}]</tool_call> done", " done", [("get_weather", WA), ("f", PA)]),
        ("hermes", f"<tool_call>{W}", "", [("get_weather", WA)]),  # the end token came early
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
        # Nothing of these is a call.
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>', None, []),
        ("hermes", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', None, []),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', None, []),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 01}}</tool_call>', None, []),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "x', None, []),
        ("hermes", "<tool_call>f(1)</tool_call>", None, []),
        ("hermes", "<tool_cal", None, []),
        ("hermes", "a < b <tool <<tool_call", None, []),
        ("hermes", f"{W}", None, []),
        ("hermes", f"<tool_call>{W}</tool_cal>", None, []),
        # A broken one does not swallow a good one.
        ("hermes", f"<tool_call>oh <tool_call>{W}</tool_call>", "<tool_call>oh", [("get_weather", WA)]),
        ("hermes", f"<tool_call><tool_call>{W}</tool_call>", "<tool_call>", [("get_weather", WA)]),
        ("mistral", f"[TOOL_CALLS][{W}, {P}]", "", [("get_weather", WA), ("f", PA)]),
        ("mistral", f"[TOOL_CALLS] {W}", "", [("get_weather", WA)]),
        ("mistral", "[TOOL [TOOL_CALLS] what", None, []),
        ("mistral", "see [1] and [2]", None, []),
        ("mistral", f"[TOOL_CALLS]get_weather[ARGS]{WA}[TOOL_CALLS]f[ARGS]{PA}", "", [("get_weather", WA), ("f", PA)]),
        ("mistral, name first", f"[TOOL_CALLS][{W}, {P}]", "", [("get_weather", WA), ("f", PA)]),
        ("mistral, name first", f"Well.[TOOL_CALLS]f2[ARGS]{PA}", "Well.", [("f2", PA)]),
        ("mistral, name first", f"[TOOL_CALLS]f[ARGS] {PA}\n", "", [("f", PA)]),
        ("mistral, name first", f"[TOOL_CALLS]f[CALL_ID]9FZ8h4sN1[ARGS]{PA}", "", [("f", PA)]),
        ("mistral, name first", f"[TOOL_CALLS]get_weather{WA}", "", [("get_weather", WA)]),
        ("mistral, name first", f"[TOOL_CALLS]f[ARGS]{PA}[TOOL_CALLS]f[ARGS]{{}}", "", [("f", PA), ("f", "{}")]),
        ("mistral, name first", f"[TOOL_CALLS]f[TOOL_CALLS]f2[ARGS]{PA}", "[TOOL_CALLS]f", [("f2", PA)]),
        ("mistral, name first", f"[TOOL_CALLS]rm[ARGS]{PA}", None, []),
        ("mistral, name first", f"[TOOL_CALLS]get_weather2[ARGS]{PA}", None, []),
        ("mistral, name first", f"[TOOL_CALLS]f[CALL_ID]a b[ARGS]{PA}", None, []),
        ("mistral, name first", f"[TOOL_CALLS]f[CALL_ID]a{PA}", None, []),
        ("mistral, name first", f"[TOOL_CALLS]f[ARG]{PA}", None, []),
        ("mistral, name first", "[TOOL_CALLS]f[ARGS][1]", None, []),
        ("mistral, name first", '[TOOL_CALLS]f[ARGS]{"a": 01}', None, []),
        ("mistral, name first", "[TOOL_CALLS]f[AR", None, []),
        ("mistral, name first", "[TOOL_CALLS]get_", None, []),
        ("llama3", P, "", [("f", PA)]),
        ("llama3", f"<|python_tag|>{P}; {W}", "", [("f", PA), ("get_weather", WA)]),
        ("llama3", f"{P};", ";", [("f", PA)]),
        ("llama3", f"{P}; and so on", "; and so on", [("f", PA)]),
        ("llama3", f"Words {P}", None, []),
        ("llama3", '{"a": 1}', None, []),
        ("llama3", '{"a": 1} {', None, []),
    ],
)  # fmt: skip
def test_what_is_read(family: str, text: str, content: str | None, calls: list[tuple[str, str]]) -> None:
    """No content given: all of the text."""
    wanted = (text if content is None else content, calls)
    assert read(FreeReader(FAMILIES[family], NAMES), [text]) == wanted
    assert read(FreeReader(FAMILIES[family], NAMES), list(text)) == wanted


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<tool_call>\n", "\n</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]",
    "f", "f2", "<|python_tag|>", "[", "]", "{", "}",
    ";", ",", " ", "\n", '"', "\\", "<", "word", "é", W, P, '{"name": "f", "arguments": {}}', "<tool", "_call>",
]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.lists(st.sampled_from(FRAGMENTS), max_size=12), st.data())
def test_cuts_change_nothing_and_nothing_is_lost(name: str, fragments: list[str], data: st.DataObject) -> None:
    text, family = "".join(fragments), FAMILIES[name]
    whole = read(FreeReader(family, NAMES), [text])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(FreeReader(family, NAMES), pieces) == whole
    assert read(FreeReader(family, NAMES), list(text)) == whole
    content, calls = whole
    if not calls:
        assert content == text
    # The content, and each call's arguments, stand in the text in this order; what is between them is markup.
    for item_name, arguments in calls:
        assert item_name in NAMES
        assert isinstance(json.loads(arguments), dict)
        assert arguments in text or json.dumps(arguments)[1:-1] in text
    rest = iter(text)
    assert all(character in rest for character in content)


def calls_text(family: Family, calls: Sequence[tuple[str, Any]]) -> str:
    written = [family.head(name) + json.dumps(arguments) for name, arguments in calls]
    return family.first + (family.tail + family.between).join(written) + family.tail + family.last


SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=6)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=5)
OBJECTS = st.dictionaries(st.text(max_size=4), JSON, max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.lists(st.tuples(st.sampled_from(NAMES), OBJECTS), min_size=1, max_size=3), st.data())
def test_what_a_grammar_writes_is_read_as_it_comes(name: str, calls: list[tuple[str, Any]], data: st.DataObject) -> None:
    family = FAMILIES[name]
    text = calls_text(family, calls)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    wanted = ("", [(called, json.dumps(arguments)) for called, arguments in calls])
    assert read(CertainReader(family, NAMES), pieces) == wanted
    assert read(FreeReader(family, NAMES), pieces) == wanted  # the same text is also read without knowing
    # Arguments are shown as they come, and what is cut off is not made up.
    end = data.draw(st.integers(0, len(text)))
    content, cut = read(CertainReader(family, NAMES), [text[:end]])
    assert content == ("" if cut else text[:end])
    assert all(ours == theirs for ours, theirs in zip(cut[:-1], wanted[1], strict=False))
    if cut:
        assert wanted[1][len(cut) - 1][0] == cut[-1][0]
        assert wanted[1][len(cut) - 1][1].startswith(cut[-1][1])


def test_a_certain_reader_takes_what_should_not_come_as_content() -> None:
    assert read(CertainReader(HERMES, NAMES), ["<tool", "_coll>", "x"]) == ("<tool_coll>x", [])
