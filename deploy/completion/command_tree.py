"""All commands, options and arguments as plain data, kept in a file until the code that says them changes.

    load -> the file, if it fits -> Node        else -> the command line is imported, described, and written down

Described are the functions behind the commands: the types and help texts of their parameters.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import typer

_FORMAT = 1
_FILE = "completion.json"
_FOLDER = Path(__file__).parent.parent  # the package whose files say what the commands are
_FOR_FILES = "file"
_NAMED = ("cluster", "worker", "who", "model", "key")  # parameters whose values `deploy.completion.names` knows


@dataclass(slots=True)
class Value:
    """What an option or an argument takes."""

    kind: str = ""  # one of _NAMED, "file", or empty
    choices: list[str] = field(default_factory=list)
    many: bool = False


@dataclass(slots=True)
class Option:
    names: list[str]
    help: str
    value: Value | None  # None: a switch


@dataclass(slots=True)
class Node:
    help: str = ""
    commands: dict[str, Node] = field(default_factory=dict)
    options: list[Option] = field(default_factory=list)
    arguments: list[Value] = field(default_factory=list)


def load(home: Path) -> Node:
    fingerprint = _fingerprint()
    path = home / _FILE
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["fingerprint"] == fingerprint:
            return _node(kept["tree"])
    from deploy.app import app

    tree = describe(app)
    with contextlib.suppress(OSError):
        home.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}.tmp")
        draft.write_text(json.dumps({"fingerprint": fingerprint, "tree": asdict(tree)}), encoding="utf-8")
        draft.replace(path)
    return tree


def describe(app: typer.Typer) -> Node:
    node = Node()
    for command in app.registered_commands:
        if command.callback is not None and not command.hidden:
            name = command.name or command.callback.__name__.replace("_", "-")
            node.commands[name] = _command(command.callback)
    for group in app.registered_groups:
        if group.typer_instance is not None and isinstance(group.name, str):
            inside = describe(group.typer_instance)
            inside.help = str(group.typer_instance.info.help or "")
            node.commands[group.name] = inside
    return node


def _command(function: Callable[..., Any]) -> Node:
    import inspect
    import typing

    from typer.models import ArgumentInfo, OptionInfo

    node = Node(help=_first_line(function.__doc__))
    hints = typing.get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        annotation = hints[name]
        infos = getattr(annotation, "__metadata__", ())
        info = next((one for one in infos if isinstance(one, (OptionInfo, ArgumentInfo))), None)
        kind = typing.get_args(annotation)[0] if infos else annotation
        if isinstance(info, ArgumentInfo) or (info is None and parameter.default is inspect.Parameter.empty):
            node.arguments.append(_value(name, kind))
        elif info is None or not info.hidden:
            # Within Annotated, what is written first stands where a default would.
            said = (info.default, *(info.param_decls or ())) if info is not None else ()
            declared = [one for one in said if isinstance(one, str) and one.startswith("-")]
            names = declared or [f"--{name.replace('_', '-')}"]
            value = None if kind is bool else _value(name, kind)
            node.options.append(Option(names, _first_line(info.help if info else ""), value))
    node.options.append(Option(["--help"], "Show this message and exit.", None))
    return node


def _value(name: str, kind: Any) -> Value:
    import enum

    inner = list(_inner(kind))
    choices = [str(member.value) for one in inner if isinstance(one, type) and issubclass(one, enum.Enum) for member in one]
    is_file = any(isinstance(one, type) and issubclass(one, Path) for one in inner)
    known = name if name in _NAMED else _FOR_FILES if is_file else ""
    return Value(known, choices, list in inner)


def _inner(kind: Any) -> Iterator[Any]:
    """A type and all that it is made of."""
    import typing

    yield kind
    origin = typing.get_origin(kind)
    if origin is not None:
        yield origin
        for argument in typing.get_args(kind):
            yield from _inner(argument)


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


def _fingerprint() -> str:
    """Changes with every file that a command may be described in."""
    parts = [str(_FORMAT), sys.version]
    for folder in (_FOLDER, _FOLDER / "commands", _FOLDER / "logs"):
        for entry in sorted(os.scandir(folder), key=lambda one: one.name):
            if entry.name.endswith(".py"):
                status = entry.stat()
                parts.append(f"{entry.path}:{status.st_mtime_ns}:{status.st_size}")
    return "\n".join(parts)


def _node(kept: dict[str, Any]) -> Node:
    return Node(
        help=kept["help"],
        commands={name: _node(child) for name, child in kept["commands"].items()},
        options=[Option(one["names"], one["help"], one["value"] and Value(**one["value"])) for one in kept["options"]],
        arguments=[Value(**one) for one in kept["arguments"]],
    )
