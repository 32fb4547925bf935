"""What stands between an opener and a call's arguments where the name is not in the JSON, as Mistral's newer models write it:

    [TOOL_CALLS]name[ARGS]{...}      [TOOL_CALLS]name[CALL_ID]id[ARGS]{...}      [TOOL_CALLS]name{...}

Taken character by character. It knows the names that were offered, so what cannot become one of them is told at once.
"""

from __future__ import annotations

from collections.abc import Collection

_ID_MARKER = "[CALL_ID]"
_LONGEST_ID = 64


class CallHead:
    def __init__(self, names: Collection[str], arguments_marker: str) -> None:
        self._names = names
        self._marker = arguments_marker
        self.text = ""

    def push(self, character: str) -> bool:
        """Whether the character can stand there; it is taken only then."""
        text = self.text + character
        name, bracket, _ = text.partition("[")
        if bracket:
            possible = name in self._names and self._leads_to_arguments(text[len(name) :])
        else:
            possible = any(known.startswith(name) for known in self._names)
        if possible:
            self.text = text
        return possible

    @property
    def done(self) -> bool:
        """Arguments come next, and nothing else can."""
        return self.text.endswith(self._marker)

    @property
    def name(self) -> str | None:
        """Of the call, if the arguments may begin here."""
        name, bracket, _ = self.text.partition("[")
        return name if name in self._names and (self.done or not bracket) else None

    def _leads_to_arguments(self, text: str) -> bool:
        if self._marker.startswith(text) or _ID_MARKER.startswith(text):
            return True
        call_id, bracket, rest = text.removeprefix(_ID_MARKER).partition("[")
        is_id = len(call_id) <= _LONGEST_ID and all(
            letter.isascii() and (letter.isalnum() or letter in "-_") for letter in call_id
        )
        return text.startswith(_ID_MARKER) and is_id and self._marker.startswith(bracket + rest)
