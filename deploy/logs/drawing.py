"""How a record looks to a person: time, process, level, event, then its fields; a traceback below it.

13:05:01.123  tiny/decode/0#2   warning  remote prefill failed  error=TransferBroken prefill=tiny/prefill/0  [8f3c…]
"""

from __future__ import annotations

from datetime import date, datetime
from typing import Any

from rich.text import Text

from deploy.logs.records import Record

_LEVELS = {"debug": "dim", "info": "default", "warning": "yellow", "error": "bold red", "critical": "bold white on red"}
_ROLES = {"decode": "green", "prefill": "blue", "router": "cyan", "manager": "magenta", "launcher": "magenta"}
_LEVEL_WIDTH = len("critical")
_WIDEST_PROCESS = 32


class LogDrawing:
    """Draws one stream. Remembers how wide the names of processes are, so that columns stay where they are."""

    def __init__(self, today: date | None, *, process_width: int = 0) -> None:
        """With `today` its records show their time only; other ones, and all without it, their date as well."""
        self._today = today
        self._process_width = min(_WIDEST_PROCESS, process_width)

    def draw(self, record: Record) -> Text:
        self._process_width = max(self._process_width, min(_WIDEST_PROCESS, len(record.process)))
        style = _LEVELS.get(record.level, "default")
        text = Text(no_wrap=False, overflow="fold")
        text.append(f"{self._time(record.at)}  ", "dim")
        text.append(f"{record.process:<{self._process_width}}  ", _style_of_process(record.process))
        text.append(f"{record.level:<{_LEVEL_WIDTH}}  ", style)
        text.append(_plain(record.event), style if record.level in ("error", "critical", "warning") else "bold")
        for name, value in record.fields.items():
            text.append(f"  {name}=", "dim")
            text.append(_shown(value))
        if record.request_id:
            text.append(f"  [{_plain(record.request_id)}]", "dim")
        for line in record.trace.rstrip().splitlines():
            text.append(f"\n    {_plain(line)}", "red")
        return text

    def _time(self, at: datetime) -> str:
        local = at.astimezone()
        clock = local.strftime("%H:%M:%S.") + f"{local.microsecond // 1000:03}"
        return clock if local.date() == self._today else f"{local.date().isoformat()} {clock}"


def _style_of_process(process: str) -> str:
    slot = process.partition("#")[0].split("/")
    return _ROLES.get(slot[1] if len(slot) == 3 else slot[0], "default")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    text = _plain(str(value))
    return repr(text) if isinstance(value, str) and (not text or any(one.isspace() for one in text)) else text


def _plain(text: str) -> str:
    """Without what would move a terminal's cursor or change its colours: some of a line may be a stranger's words."""
    return (
        text
        if text.isprintable()
        else "".join(one if one.isprintable() or one == "\t" else "\N{REPLACEMENT CHARACTER}" for one in text)
    )
