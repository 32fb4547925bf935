"""The log of changes: a Redis stream of bounded length that every router writes to and every router reads.

    read from the beginning -> wait for news -> read on -> ...       (the cursor is the last entry that was read)
                 ^---- the entry under the cursor is gone: the log was cut beyond it, flushed or replaced; listeners get Reset

It feeds indexes in the routers' processes. Nothing is served by what it says: that is what `get` is for. So an entry that is not
understood is passed over, and one that somebody else wrote can at most make an index look for what is not there.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.errors import StoreUnavailable
from common.logs import get_logger
from common.metrics import StoreMetrics
from router.store.base import MAX_KEY_BYTES, MAX_NAME_BYTES, Change, Deleted, Inserted, Invalidated, Listener, Reset
from router.store.link import Command, Link, Reply, answer_within

log = get_logger(__name__)

WAIT_S = 1.0  # how long the server holds a read that finds nothing; a flush of the log is noticed after that at the latest
_PAGE_ENTRIES = 512
_BEGINNING = b"0-0"


class ChangeLog:
    """`run` is called again after each loss of the connection and goes on where it was."""

    def __init__(self, namespace: str, *, max_entries: int, timeout_s: float, metrics: StoreMetrics) -> None:
        self._key = f"{namespace}:log"
        self._max_entries = max_entries
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._listeners: list[Listener] = []
        self._cursor = _BEGINNING

    def subscribe(self, listener: Listener) -> None:
        self._listeners.append(listener)

    def inserted(self, key: bytes, names: Sequence[str]) -> Command:
        return self._add(b"inserted", b"key", key, *(part for name in names for part in ("name", name)))

    def deleted(self, keys: Sequence[bytes]) -> Command:
        return self._add(b"deleted", *(part for key in keys for part in (b"key", key)))

    def invalidated(self, names: Sequence[str]) -> Command:
        return self._add(b"invalidated", *(part for name in names for part in ("name", name)))

    def _add(self, kind: bytes, *fields: bytes | str) -> Command:
        return ("XADD", self._key, "MAXLEN", "~", self._max_entries, "*", b"kind", kind, *fields)

    async def run(self, link: Link) -> None:
        """Reads for ever. Raises ConnectionError when the link ends, StoreUnavailable when the server refuses."""
        while True:
            while await self._read_page(link):
                pass
            news: Command = ("XREAD", "COUNT", 1, "BLOCK", int(WAIT_S * 1000), "STREAMS", self._key, self._cursor)
            await self._call(link, (news,))

    async def _read_page(self, link: Link) -> bool:
        """Reads on from the cursor; True if there may be more."""
        under_cursor: Command = ("XRANGE", self._key, self._cursor, self._cursor)
        after: Command = ("XRANGE", self._key, b"(" + self._cursor, "+", "COUNT", _PAGE_ENTRIES)
        *_, pages = await self._call(link, (("MULTI",), under_cursor, after, ("EXEC",)))
        if not isinstance(pages, list):
            raise StoreUnavailable("the change log cannot be read")
        if any(not isinstance(page, list) for page in pages):
            log.warning("something else lies where the change log should be, removing it")
            await self._call(link, (("DEL", self._key),))
            pages = [[], []]
        if self._cursor != _BEGINNING and not pages[0]:
            self._cursor = _BEGINNING
            self._metrics.operation("log", "reset")
            self._tell(Reset())
            return True
        for identifier, fields in pages[1]:
            change = _parse(fields)
            self._metrics.operation("log", "read" if change is not None else "refused")
            if change is not None:
                self._tell(change)
            self._cursor = identifier
        return len(pages[1]) == _PAGE_ENTRIES

    async def _call(self, link: Link, commands: Sequence[Command]) -> list[Reply]:
        try:
            return await answer_within(link.call(commands), WAIT_S + self._timeout_s)
        except TimeoutError as error:
            raise ConnectionError("the change log is not read in time") from error

    def _tell(self, change: Change) -> None:
        for listener in self._listeners:
            listener(change)


def _parse(fields: Reply) -> Change | None:
    """None if it is not an entry of ours."""
    if not isinstance(fields, list) or len(fields) < 2 or fields[0] != b"kind":
        return None
    labels, values = fields[2::2], fields[3::2]
    keys = tuple(value for label, value in zip(labels, values, strict=True) if label == b"key")
    raw_names = [value for label, value in zip(labels, values, strict=True) if label == b"name"]
    if any(not 1 <= len(key) <= MAX_KEY_BYTES for key in keys) or any(len(name) > MAX_NAME_BYTES for name in raw_names):
        return None
    try:
        names = tuple(name.decode() for name in raw_names)
    except UnicodeDecodeError:
        return None
    match fields[1], len(keys), len(names):
        case b"inserted", 1, _:
            return Inserted(keys[0], names)
        case b"deleted", count, 0 if count:
            return Deleted(keys)
        case b"invalidated", 0, count if count:
            return Invalidated(names)
        case _:
            return None
