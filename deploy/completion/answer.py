"""The words of a command line up to the cursor -> what the last one may become, in the form that the shell reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deploy.completion.command_tree import Node, Option, Value, load
from deploy.completion.names import home, names_for


@dataclass(frozen=True, slots=True)
class Candidate:
    text: str
    help: str = ""


def answer(shell: str, words: Sequence[str]) -> str:
    """`words` are those after `pdserve`; the last one is incomplete, perhaps empty."""
    found = candidates(load(home()), words or [""])
    match shell:
        case "zsh":
            lines = [_with_colon(one) for one in found]
        case "fish":
            lines = [f"{one.text}\t{one.help}" if one.help else one.text for one in found]
        case _:
            lines = [one.text for one in found]
    return "".join(f"{line}\n" for line in lines)


def candidates(tree: Node, words: Sequence[str]) -> list[Candidate]:
    *before, incomplete = words
    node, position, pending, options_ended = tree, 0, None, False
    cluster = ""
    for word in before:
        if pending is not None:
            if word == "=":  # bash makes three words of --option=value
                continue
            cluster = word if "--cluster" in pending.names else cluster
            pending = None
        elif word == "--":
            options_ended = True
        elif word.startswith("-") and not options_ended:
            name, equals, value = word.partition("=")
            option = _option(node, name)
            if option is not None and option.value is not None:
                pending = None if equals else option
                cluster = value if equals and "--cluster" in option.names else cluster
        elif node.commands:
            if word not in node.commands:
                return []
            node = node.commands[word]
        else:
            position += 1
    if pending is not None:
        return _values(pending.value, "" if incomplete == "=" else incomplete, cluster)
    if incomplete.startswith("-") and not options_ended:
        return _options(node, incomplete, cluster)
    if node.commands:
        return [Candidate(name, child.help) for name, child in node.commands.items() if name.startswith(incomplete)]
    return _values(_argument(node, position), incomplete, cluster)


def _options(node: Node, incomplete: str, cluster: str) -> list[Candidate]:
    name, equals, begun = incomplete.partition("=")
    option = _option(node, name)
    if equals:
        return [Candidate(f"{name}={one.text}") for one in _values(option.value if option else None, begun, cluster)]
    return [Candidate(name, option.help) for option in node.options for name in option.names if name.startswith(incomplete)]


def _option(node: Node, name: str) -> Option | None:
    return next((option for option in node.options if name in option.names), None)


def _argument(node: Node, position: int) -> Value | None:
    if position < len(node.arguments):
        return node.arguments[position]
    return node.arguments[-1] if node.arguments and node.arguments[-1].many else None


def _values(value: Value | None, incomplete: str, cluster: str) -> list[Candidate]:
    """None for files: those the shell itself completes, when it gets no answer."""
    if value is None:
        return []
    names = value.choices or names_for(value.kind, cluster)
    return [Candidate(name) for name in names if name.startswith(incomplete)]


def _with_colon(one: Candidate) -> str:
    text = one.text.replace(":", "\\:")
    return f"{text}:{one.help}" if one.help else text
