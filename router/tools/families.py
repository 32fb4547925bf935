"""How families of models write tool calls. The family of a model is read off its chat template.

    hermes   <tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>     also a list of them inside one pair of tags
    mistral  [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]              the older models
             [TOOL_CALLS]name[ARGS]{...}[TOOL_CALLS]name[ARGS]{...}            the newer ones, some with [CALL_ID]id in between
    llama3   {"name": ..., "parameters": {...}}; ...                          the whole answer, perhaps after <|python_tag|>

A model whose template knows nothing of tools is told of them in Hermes' way (`rendering`). Where a call is a must, the grammar
written here leaves the model nothing but the tool's name and arguments to decide.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from common.chat_template import ChatTemplate
from common.grammar.notation import lark_json, lark_string
from router.tools.definitions import Toolbox


@dataclass(frozen=True, slots=True)
class Family:
    """The texts around calls. `openers` begin calls in free text; "" stands for the beginning of the answer."""

    name: str
    openers: tuple[str, ...]
    closer: str  # after the JSON of a call; "" = none
    arguments: str  # under which name they are
    first: str  # these four: exactly what a grammar writes around calls
    between: str
    tail: str
    last: str
    separator: str = ""  # free text that may stand between two calls
    special_markers: bool = False  # openers are tokens that are left out of text by default
    arguments_marker: str = ""  # free text may have the name before the JSON, and this behind the name (`heads`); "" = it may not
    writes_name_first: bool = False  # a grammar does so

    def head(self, name: str) -> str:
        """Of a call, up to its arguments, as a grammar writes it."""
        if self.writes_name_first:
            return f"{name}{self.arguments_marker}"
        return f'{{"name": {json.dumps(name)}, "{self.arguments}": '


HERMES = Family(
    "hermes", ("<tool_call>",), "</tool_call>", "arguments", "<tool_call>\n", "\n<tool_call>\n", "}\n</tool_call>", ""
)
MISTRAL = Family(
    "mistral",
    ("[TOOL_CALLS]",),
    "",
    "arguments",
    "[TOOL_CALLS][",
    ", ",
    "}",
    "]",
    special_markers=True,
    arguments_marker="[ARGS]",
)
MISTRAL_NAME_FIRST = replace(
    MISTRAL, name="mistral, name first", first="[TOOL_CALLS]", between="[TOOL_CALLS]", tail="", last="", writes_name_first=True
)
LLAMA3 = Family("llama3", ("", "<|python_tag|>"), "", "parameters", "", "; ", "}", "", separator=";", special_markers=True)


def family_of(template: ChatTemplate | None) -> Family:
    source = "" if template is None or not template.knows_tools else template.source
    if "[TOOL_CALLS]" in source:
        return MISTRAL_NAME_FIRST if MISTRAL.arguments_marker in source else MISTRAL
    if "<|python_tag|>" in source or '"parameters"' in source:
        return LLAMA3 if "<tool_call>" not in source else HERMES
    return HERMES


def calls_grammar(family: Family, toolbox: Toolbox) -> str:
    """Lark: nothing but calls of the tools of `toolbox.must_call`."""
    calls = " | ".join(f"call_{index}" for index in range(len(toolbox.must_call)))
    tail = lark_string(family.tail) if family.tail else ""
    more = f"({lark_string(family.between)} call){{0,{toolbox.most_calls - 1}}}" if toolbox.most_calls > 1 else ""
    first, last = (lark_string(text) if text else "" for text in (family.first, family.last))
    lines = [f"start: {first} call {more} {last}", f"call: {calls}"]
    for index, tool in enumerate(toolbox.must_call):
        lines.append(f"call_{index}: {lark_string(family.head(tool.name))} arguments_{index} {tail}")
        lines.append(f"arguments_{index}: {lark_json(tool.parameters)}")
    return "\n".join(lines)
