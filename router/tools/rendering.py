"""Messages with tools in them, as a chat template can render them.

A template that knows `tools` gets them, and messages with calls and results, in the shape that templates expect. One that does
not is given ordinary messages: the tools are described in the system message, calls and results stand in the text between tags:

    system     ...\\n\\n<instructions>\\n<tools>\\n{one JSON object per line}\\n</tools> ...
    assistant  <tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call>
    user       <tool_response>\\n...\\n</tool_response>

It knows neither tokens nor how answers are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from router.tools.definitions import Toolbox

Message = dict[str, Any]

_INSTRUCTIONS = """You can call functions. They are described below, one JSON object per line:
<tools>
{tools}
</tools>
To call a function, write a JSON object with its name and its arguments between two tags, exactly like this:
<tool_call>
{{"name": "the function's name", "arguments": {{"an argument": "its value"}}}}
</tool_call>
If no function helps, answer in plain words."""


def for_template(messages: Sequence[Message]) -> list[Message]:
    """Calls with their arguments as objects, which is how templates print them."""
    return [
        {**message, "tool_calls": [_call_for_template(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def as_plain_messages(messages: Sequence[Message], toolbox: Toolbox | None) -> list[Message]:
    """For a template that knows nothing of tools."""
    plain: list[Message] = []
    for message in messages:
        if message["role"] == "tool":
            plain.append({"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"})
            continue
        calls = [_call_as_text(call) for call in message.get("tool_calls", ())]
        rest = {name: value for name, value in message.items() if name != "tool_calls"}
        plain.append({**rest, "content": "\n".join((*([message["content"]] if message["content"] else []), *calls))})
    if toolbox is None:
        return plain
    described = "\n".join(json.dumps(tool.definition, ensure_ascii=False) for tool in toolbox.tools)
    instructions = _INSTRUCTIONS.format(tools=described)
    if plain and plain[0]["role"] == "system":
        plain[0] = {**plain[0], "content": f"{plain[0]['content']}\n\n{instructions}"}
        return plain
    return [{"role": "system", "content": instructions}, *plain]


def _call_for_template(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": _arguments(function["arguments"])}}


def _call_as_text(call: Mapping[str, Any]) -> str:
    function = call["function"]
    written = json.dumps({"name": function["name"], "arguments": _arguments(function["arguments"])}, ensure_ascii=False)
    return f"<tool_call>\n{written}\n</tool_call>"


def _arguments(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text  # what a model once wrote need not have been JSON
    return value if isinstance(value, dict) else text
