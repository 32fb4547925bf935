"""The tools of a call, as a client defines them in `tools`, `tool_choice` and `parallel_tool_calls`.

A `Toolbox` is what is left after checking: which tools the model may use, and whether it must. It knows neither models nor
templates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from common.errors import InvalidRequest
from router.structured.wanted import MAX_GRAMMAR_BYTES, schema_text

MAX_TOOLS = 128
MAX_CALLS = 16  # in one answer, where the model must call
_NAME = re.compile("[A-Za-z0-9_.-]{1,64}", re.ASCII)
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True, eq=False)
class Tool:
    name: str
    parameters: dict[str, Any]  # a JSON schema
    definition: dict[str, Any]  # as chat templates expect it


@dataclass(frozen=True, slots=True, eq=False)
class Toolbox:
    """Never empty."""

    tools: tuple[Tool, ...]
    must_call: tuple[Tool, ...] = field(default=())  # one of these, at least once; empty = as the model likes
    most_calls: int = MAX_CALLS  # where it must

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.name for tool in self.tools)


def toolbox(tools: Any, choice: Any, parallel: bool | None) -> Toolbox | None:
    """None if the model is to answer in words. Raises InvalidRequest naming the field."""
    offered = _tools(tools)
    named = _named(choice)
    if named is None and choice not in (None, "none", "auto", "required"):
        raise InvalidRequest("must be 'none', 'auto', 'required' or name a function", param="tool_choice")
    if not offered:
        if named is not None or choice == "required":
            raise InvalidRequest("there are no tools to choose from", param="tool_choice")
        return None
    if choice == "none":
        return None
    if named is not None:
        chosen = tuple(tool for tool in offered if tool.name == named)
        if not chosen:
            raise InvalidRequest(f"there is no tool {named[:64]!r}", param="tool_choice")
        return Toolbox(offered, chosen, most_calls=1)
    if choice == "required":
        return Toolbox(offered, offered, most_calls=1 if parallel is False else MAX_CALLS)
    return Toolbox(offered)


def _tools(tools: Any) -> tuple[Tool, ...]:
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise InvalidRequest("must be a list", param="tools")
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"at most {MAX_TOOLS} tools", param="tools")
    found = tuple(_tool(item, f"tools[{index}]") for index, item in enumerate(tools))
    if len({tool.name for tool in found}) < len(found):
        raise InvalidRequest("two tools have the same name", param="tools")
    if sum(len(str(tool.definition)) for tool in found) > 4 * MAX_GRAMMAR_BYTES:
        raise InvalidRequest(f"the definitions together exceed {4 * MAX_GRAMMAR_BYTES} characters", param="tools")
    return found


def _tool(item: Any, param: str) -> Tool:
    if not isinstance(item, Mapping) or item.get("type") != "function" or not isinstance(item.get("function"), Mapping):
        raise InvalidRequest("must be an object with type 'function' and a function", param=param)
    function = item["function"]
    name, description, parameters = function.get("name"), function.get("description"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequest("must be 1 to 64 letters, digits, '_', '-' or '.'", param=f"{param}.function.name")
    if description is not None and not isinstance(description, str):
        raise InvalidRequest("must be a string", param=f"{param}.function.description")
    if not isinstance(function.get("strict") or False, bool):
        raise InvalidRequest("must be a boolean", param=f"{param}.function.strict")
    if parameters is not None:
        schema_text(parameters, f"{param}.function.parameters")
        if parameters.get("type", "object") != "object":
            raise InvalidRequest("parameters must be a schema of an object", param=f"{param}.function.parameters")
        parameters = {"type": "object", **parameters}
    described = {"description": description} if description is not None else {}
    definition = {"type": "function", "function": {"name": name, **described, "parameters": parameters or _NO_ARGUMENTS}}
    return Tool(name, parameters or _NO_ARGUMENTS, definition)


def _named(choice: Any) -> str | None:
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else None
