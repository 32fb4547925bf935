"""Tool calls out of an answer's text, as it arrives: characters in, pieces out. Wherever the text is cut, the pieces add up to
the same.

    text ──FreeReader──>    Content | CallBegins, CallArguments     the model writes as it likes: a call is shown once it is whole
    text ──CertainReader──> CallBegins, CallArguments ...           a grammar has it write calls: arguments are shown as they come

A call counts if it is JSON of the family's shape and names a tool that was offered. Everything else is content, character by
character; only white space before and after calls is left out. They know neither tokens nor JSON answers to clients.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

from router.tools.families import Family
from router.tools.heads import CallHead

_BLANK = " \t\r\n"
_JSON_OUTSIDE_STRINGS = frozenset('{}[],:"+-.0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ' + _BLANK)


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    index: int  # of the call that began last
    text: str


Piece = Content | CallBegins | CallArguments


class Reader(Protocol):
    """One per choice."""

    def push(self, text: str) -> list[Piece]: ...

    def finish(self) -> list[Piece]:
        """The answer is over: what was held back."""
        ...


class JsonEnd:
    """Where a JSON object or list ends. Counts brackets; what is between them is looked at elsewhere."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.begun = False

    @property
    def done(self) -> bool:
        return self.begun and self._depth == 0

    def push(self, character: str) -> bool:
        """Whether the character can stand there."""
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = False
            return True
        if not self.begun and character not in "{[":
            return character in _BLANK
        if character not in _JSON_OUTSIDE_STRINGS:
            return False
        if character in "{[":
            self.begun = True
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
        elif character == '"':
            self._in_string = True
        return True


class _State(enum.Enum):
    TEXT = "text"  # looking for an opener
    HEAD = "head"  # behind an opener, where JSON comes next or a name
    JSON = "json"  # behind an opener, and behind the name if it comes first
    CLOSER = "closer"  # behind the JSON


class FreeReader:
    """What is not decided yet is held back: in TEXT blanks and the beginning of an opener, else all since that."""

    def __init__(self, family: Family, names: Collection[str]) -> None:
        self._family = family
        self._names = frozenset(names)
        self._markers = tuple(opener for opener in family.openers if opener)
        self._state = _State.TEXT
        self._blank = ""
        self._held = ""  # an opener, or the beginning of one
        self._head = CallHead(self._names, family.arguments_marker)
        self._name: str | None = None  # if it came before the JSON
        self._inside: list[str] = []  # the JSON behind it
        self._closing = ""  # and what came behind that
        self._json = JsonEnd()
        self._num_calls = 0
        # Where JSON by itself is a call: at the beginning, and behind a call and its separator.
        self._bare_json = "" in family.openers
        self._pieces: list[Piece] = []

    def push(self, text: str) -> list[Piece]:
        for character in text:
            self._take(character)
        return self._taken()

    def finish(self) -> list[Piece]:
        if self._state is _State.CLOSER and not self._closing.strip(_BLANK):
            self._call_is_whole()
        if self._state is _State.TEXT and not self._held and self._num_calls and not self._blank.strip(_BLANK):
            self._blank = ""  # behind the last call
        self._give_up()
        return self._taken()

    def _taken(self) -> list[Piece]:
        """Neighbouring contents as one."""
        pieces, self._pieces = self._pieces, []
        joined: list[Piece] = []
        for piece in pieces:
            if isinstance(piece, Content) and joined and isinstance(joined[-1], Content):
                joined[-1] = Content(joined[-1].text + piece.text)
            else:
                joined.append(piece)
        return joined

    def _take(self, character: str) -> None:
        if self._state is _State.TEXT:
            self._look_for_opener(character)
        elif self._state is _State.HEAD:
            self._look_for_arguments(character)
        elif self._state is _State.JSON:
            if not self._json.push(character):
                self._give_up()
                self._take(character)
                return
            self._inside.append(character)
            if self._json.done:
                self._state = _State.CLOSER
                if not self._family.closer:
                    self._call_is_whole()
        else:
            closing = (self._closing + character).lstrip(_BLANK)
            if not self._family.closer.startswith(closing):
                self._give_up()
                self._take(character)
                return
            self._closing += character
            if closing == self._family.closer:
                self._call_is_whole()

    def _look_for_opener(self, character: str) -> None:
        if not self._held and character in _BLANK:
            self._blank += character
            return
        held = self._held + character
        if not self._held and self._bare_json and character == "{":
            self._enter_json("")
            self._take(character)
            return
        if not self._held and character == self._family.separator and self._num_calls and not self._bare_json:
            self._held_separator(character)
            return
        if any(marker.startswith(held) for marker in self._markers):
            self._held = held
            if held in self._markers:
                self._enter_json(held)
            return
        if self._held:
            # The opener did not come; another may begin within what was held.
            first, rest = self._held[0], self._held[1:] + character
            self._held = ""
            self._say(first)
            for item in rest:
                self._take(item)
            return
        self._say(character)

    def _look_for_arguments(self, character: str) -> None:
        head = self._head
        if not head.text and character in "[{" + _BLANK:
            self._state = _State.JSON
            self._take(character)
        elif character == "{" and head.name is not None:
            self._enter_arguments()
            self._take(character)
        elif head.push(character):
            if head.done:
                self._enter_arguments()
        else:
            # No call; one may begin within what was held.
            opener, self._held, self._state = self._held, "", _State.TEXT
            self._say(opener)
            for item in head.text + character:
                self._take(item)

    def _enter_arguments(self) -> None:
        self._name = self._head.name
        self._held += self._head.text
        self._state = _State.JSON

    def _held_separator(self, character: str) -> None:
        """Behind a call: perhaps another one follows, else it was text."""
        self._blank += character
        self._bare_json = True

    def _enter_json(self, opener: str) -> None:
        self._held, self._json, self._name = opener, JsonEnd(), None
        self._state = _State.JSON
        if self._family.arguments_marker:
            self._head = CallHead(self._names, self._family.arguments_marker)
            self._state = _State.HEAD

    def _call_is_whole(self) -> None:
        inside = "".join(self._inside)
        calls = _calls(inside, self._names) if self._name is None else _call_of(self._name, inside)
        if calls is None:
            self._give_up()
            return
        self._blank = self._held = self._closing = ""
        self._inside.clear()
        self._state, self._bare_json = _State.TEXT, False
        for name, arguments in calls:
            self._pieces += (CallBegins(self._num_calls, name), CallArguments(self._num_calls, arguments))
            self._num_calls += 1

    def _give_up(self) -> None:
        """What is held is text."""
        head = self._head.text if self._state is _State.HEAD else ""
        held = self._held + head + "".join(self._inside) + self._closing
        self._held = self._closing = ""
        self._inside.clear()
        self._state = _State.TEXT
        self._say(held)

    def _say(self, text: str) -> None:
        if self._blank + text:
            self._pieces.append(Content(self._blank + text))
        self._blank = ""
        if text:
            self._bare_json = False


class CertainReader:
    """Of text that `families.calls_grammar` allows. Should it be other text after all, that is content."""

    def __init__(self, family: Family, names: Iterable[str]) -> None:
        self._family = family
        heads = {family.head(name): name for name in names}
        self._first = {family.first + head: name for head, name in heads.items()}
        self._next = {family.tail + family.between + head: name for head, name in heads.items()}
        self._end = family.tail + family.last
        self._expected = self._first
        self._held = ""
        self._json: JsonEnd | None = None
        self._index = -1
        self._is_content = False

    def push(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        start = 0
        for position, character in enumerate(text):
            if self._is_content:
                pieces.append(Content(text[position:]))
                return pieces
            if self._json is None:
                self._held += character
                name = self._expected.get(self._held)
                if name is not None:
                    self._index += 1
                    pieces.append(CallBegins(self._index, name))
                    self._json, self._held, self._expected = JsonEnd(), "", self._next
                    start = position + 1
                elif not any(wanted.startswith(self._held) for wanted in (*self._expected, *self._ends)):
                    self._is_content = True
                    pieces.append(Content(self._held))
                    self._held = ""
            else:
                self._json.push(character)
                if self._json.done:
                    pieces.append(CallArguments(self._index, text[start : position + 1]))
                    self._json = None
        if self._json is not None and text[start:]:
            pieces.append(CallArguments(self._index, text[start:]))
        return pieces

    @property
    def _ends(self) -> tuple[str, ...]:
        return (self._end,) if self._index >= 0 else ()

    def finish(self) -> list[Piece]:
        held, self._held = self._held, ""
        # A beginning of what stands behind a call says nothing; a beginning of the first call is all there is.
        return [Content(held)] if held and self._index < 0 else []


def _calls(text: str, names: frozenset[str]) -> list[tuple[str, str]] | None:
    """(name, arguments) of each call, the arguments as they were written. None if it is anything else."""
    try:
        items = _elements(text)
        calls = []
        for item in items:
            members = _members(item)
            name = json.loads(members["name"])
            arguments = members.get("arguments", members.get("parameters", "{}"))
            if isinstance(written := json.loads(arguments), str):
                arguments = written  # some models write them as a string
            if name not in names or not isinstance(json.loads(arguments), dict):
                return None
            calls.append((name, arguments))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return calls or None


def _call_of(name: str, arguments: str) -> list[tuple[str, str]] | None:
    """As `_calls`, of one whose name came first."""
    try:
        return [(name, arguments.strip(_BLANK))] if isinstance(json.loads(arguments), dict) else None
    except (ValueError, RecursionError):
        return None


_decoder = json.JSONDecoder()


def _elements(text: str) -> list[str]:
    """The texts of a list's elements, or the text itself if it is no list."""
    text = text.strip(_BLANK)
    if not text.startswith("["):
        return [text]
    elements: list[str] = []
    at = _skip(text, 1)
    while text[at : at + 1] != "]":
        _, end = _decoder.raw_decode(text, at)
        elements.append(text[at:end])
        at = _skip(text, end)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            raise ValueError("a list that goes wrong")
    return elements


def _members(text: str) -> dict[str, str]:
    """The texts of an object's values by name."""
    json.loads(text)
    members: dict[str, str] = {}
    at = _skip(text, 1)
    if not text.startswith("{"):
        raise ValueError("no object")
    while text[at : at + 1] != "}":
        name, end = _decoder.raw_decode(text, at)
        start = _skip(text, _skip(text, end) + 1)  # behind the colon
        _, end = _decoder.raw_decode(text, start)
        members[name] = text[start:end]
        at = _skip(text, end)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
    return members


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] in _BLANK and at < len(text):
        at += 1
    return at
