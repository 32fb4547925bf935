"""A line of a log as a value, and which lines somebody wants to see.

A line that is no JSON (the stacks of a process that crashed, written by the interpreter as it died) is a record too: an error,
at the time of the line before it.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson

from common.errors import InvalidRequest

_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d)")
_SPAN_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_RESPONSE_PREFIXES = ("chatcmpl-", "cmpl-", "resp_")  # of the ids that answers bear, before the request's own
_NAMED = frozenset({"timestamp", "level", "process", "request_id", "event", "exception", "stack", "module"})


class Level(enum.StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"
    CRITICAL = "critical"


_ORDER = {level.value: place for place, level in enumerate(Level)}


@dataclass(frozen=True, slots=True)
class Record:
    at: datetime
    level: str
    process: str  # with its incarnation, if it has one
    event: str
    request_id: str
    fields: Mapping[str, Any]
    trace: str
    line: str  # as it stands in the file

    @property
    def place(self) -> tuple[datetime, str]:
        """For the order of a merged stream."""
        return self.at, self.process


def parse(line: str, *, process: str, before: datetime) -> Record:
    """`process` is that of the file, `before` the time of the line before: they stand in for what a line does not say."""
    try:
        told = orjson.loads(line)
        at = datetime.fromisoformat(told["timestamp"])
    except (ValueError, KeyError, TypeError):
        return Record(before, Level.ERROR, process, line, "", {}, "", line)
    return Record(
        at=at if at.tzinfo else at.replace(tzinfo=UTC),
        level=str(told.get("level", Level.INFO)),
        process=str(told.get("process", process)),
        event=str(told.get("event", "")),
        request_id=str(told.get("request_id", "")),
        fields={name: value for name, value in told.items() if name not in _NAMED},
        trace=str(told.get("exception") or told.get("stack") or ""),
        line=line,
    )


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which records somebody asked for. Empty parts ask for everything."""

    processes: tuple[str, ...] = ()  # a process, a worker's slot, a pool `model/role`, a model, or a role
    level: Level = Level.DEBUG
    request_id: str = ""
    since: datetime | None = None

    def takes(self, record: Record) -> bool:
        return (
            _ORDER.get(record.level, 0) >= _ORDER[self.level]
            and (self.since is None or record.at >= self.since)
            and (not self.request_id or _is_of(record, bare_request_id(self.request_id)))
            and self.takes_process(record.process)
        )

    def takes_process(self, process: str) -> bool:
        return not self.processes or any(_names(wanted, process) for wanted in self.processes)

    def takes_file(self, process: str) -> bool:
        """Whether the file of this process, which holds all its incarnations, may have records that are wanted."""
        return not self.processes or any(_names(wanted.partition("#")[0], process) for wanted in self.processes)


def _names(wanted: str, process: str) -> bool:
    slot = process.partition("#")[0]
    parts = slot.split("/")
    return wanted in (process, slot) or slot.startswith(f"{wanted}/") or (len(parts) == 3 and wanted == parts[1])


def _is_of(record: Record, request_id: str) -> bool:
    # Workers know a request by an id that is unique: the client's, and more behind it.
    return record.request_id == request_id or record.request_id.startswith(f"{request_id}-")


def bare_request_id(text: str) -> str:
    """The request's id, from itself or from the id of its answer."""
    return next((text.removeprefix(prefix) for prefix in _RESPONSE_PREFIXES if text.startswith(prefix)), text)


def parse_since(text: str, now: datetime) -> datetime:
    """`90s`, `15m`, `2h`, `1d` before now; or a time today, or a date and time, in the local zone unless it names one.
    Raises InvalidRequest."""
    span = _SPAN.fullmatch(text.strip())
    if span is not None:
        return now - timedelta(seconds=float(span[1]) * _SPAN_S[span[2]])
    local = now.astimezone()
    try:
        if re.fullmatch(r"\d{1,2}:\d{2}(:\d{2})?", text):
            clock = datetime.strptime(text, "%H:%M:%S" if text.count(":") == 2 else "%H:%M")
            return local.replace(hour=clock.hour, minute=clock.minute, second=clock.second, microsecond=0)
        told = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidRequest(f"--since wants 90s, 15m, 2h, 1d, 13:05 or 2026-01-31T13:05, not {text!r}", param="since") from None
    return told if told.tzinfo else told.replace(tzinfo=local.tzinfo)
