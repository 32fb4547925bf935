"""Epochs in Redis: how they are named, read, created and moved on. Commands and parsing only; others send them.

    <namespace>:incarnation     32 hex digits : run id of the server that it was last confirmed for
    <namespace>:e:<name>        the counter of one name; starts at a random number, so one that was lost never comes back

Whatever happens to these keys (flushed, evicted, overwritten) can only make values unreadable: a value is served if the
incarnation and every counter that it is bound to are what they were. A server that restarted from its append-only file has
lost nothing and keeps its incarnation. One that restarted without such a file may have gone back to counters of long ago
together with the values that were invalidated since, so it gets a new incarnation before anything is read from it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from router.store.base import Epoch, Epochs
from router.store.link import Command, Reply

_INCARNATION = re.compile(rb"([0-9a-f]{32}):([0-9a-f]{1,64})")
_COUNTER = re.compile(rb"[1-9][0-9]{0,17}")


@dataclass(frozen=True, slots=True)
class Server:
    """What a server says of itself."""

    run_id: str
    version: tuple[int, ...]
    has_append_only_file: bool

    @classmethod
    def parse(cls, info: Reply) -> Server | None:
        if not isinstance(info, bytes):
            return None
        fields = dict(line.split(":", 1) for line in info.decode(errors="replace").splitlines() if ":" in line)
        version = re.match(r"(\d+)\.(\d+)", fields.get("redis_version", ""))
        if version is None or not re.fullmatch(r"[0-9a-f]{1,64}", fields.get("run_id", "")):
            return None
        numbers = tuple(int(part) for part in version.groups())
        return cls(fields["run_id"], numbers, fields.get("aof_enabled") == "1")


class EpochKeys:
    """The keys of one namespace."""

    def __init__(self, namespace: str) -> None:
        self.incarnation = f"{namespace}:incarnation"
        self._prefix = f"{namespace}:e:"

    def of(self, names: Sequence[str]) -> list[str]:
        return [self.incarnation, *(self._prefix + name for name in names)]

    def parse(self, names: Sequence[str], values: Sequence[Reply]) -> Epochs | None:
        """`values` are those of `of(names)`. None if one of them is missing or is not ours."""
        incarnation = _parsed_incarnation(values[0])
        if incarnation is None or not all(_is_counter(value) for value in values[1:]):
            return None
        return Epochs(tuple((name, Epoch(int(value), incarnation[0])) for name, value in zip(names, values[1:], strict=True)))

    def create(self, names: Sequence[str], values: Sequence[Reply], server: Server) -> list[Command]:
        """Gives a start to what is missing; what is there and not ours is replaced."""
        commands: list[Command] = []
        for position, (key, value) in enumerate(zip(self.of(names), values, strict=True)):
            only_if_missing = ("NX",) if value is None else ()
            if position == 0 and _parsed_incarnation(value) is None:
                commands.append(("SET", key, _new_incarnation(server), *only_if_missing))
            elif position > 0 and not _is_counter(value):
                commands.append(("SET", key, _first_counter(), *only_if_missing))
        return commands

    def confirm(self, value: Reply, server: Server) -> bytes | None:
        """What the incarnation must be set to before this server may be read; None if it is right as it is."""
        now = _parsed_incarnation(value)
        if now is None:
            return _new_incarnation(server)
        incarnation, run_id = now
        if run_id == server.run_id:
            return None
        return _incarnation_value(incarnation, server) if server.has_append_only_file else _new_incarnation(server)

    def advance(self, names: Sequence[str]) -> list[Command]:
        """Moves the counters on. To be sent as one transaction."""
        commands: list[Command] = []
        for key in self.of(names)[1:]:
            commands += (("SET", key, _first_counter(), "NX"), ("INCR", key))
        return commands

    def forget(self, names: Sequence[str]) -> Command:
        """Moves the epochs on, too, for a lost counter starts elsewhere; a server that is out of memory still takes it."""
        return ("DEL", *self.of(names)[1:])


def _parsed_incarnation(value: Reply) -> tuple[bytes, str] | None:
    match = _INCARNATION.fullmatch(value) if isinstance(value, bytes) else None
    return (bytes.fromhex(match[1].decode()), match[2].decode()) if match else None


def _is_counter(value: Reply) -> bool:
    return isinstance(value, bytes) and _COUNTER.fullmatch(value) is not None


def _first_counter() -> int:
    return 1 + secrets.randbelow(10**17)


def _new_incarnation(server: Server) -> bytes:
    return _incarnation_value(secrets.token_bytes(16), server)


def _incarnation_value(incarnation: bytes, server: Server) -> bytes:
    return f"{incarnation.hex()}:{server.run_id}".encode()
