"""Reads the files of a run: all that is there, merged by time, and then what comes.

    Tail: one file -> whole lines, across the moment at which it begins anew
    history: all files -> one ordered stream, a line of each in memory
    follow: batches as they are written, until the run ends

Following waits for the kernel's word that something in the folder changed, so it costs nothing while nothing is logged.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import select
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from common.log_files import is_older, older, process_of
from deploy.logs.folder_watch import FolderWatch
from deploy.logs.records import Record, Wanted, parse
from deploy.logs.runs import Run

_LONGEST_WAIT_S = 5.0  # then the folder is looked at in any case
_LONGEST_LINE_BYTES = 1 << 20
_START = datetime.min.replace(tzinfo=UTC)


class Tail:
    """Reads one process's file from its beginning on. A line is handed out when its end was written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._process = process_of(path)
        self._file: BinaryIO | None = None
        self._rest = b""
        self._last = _START

    def read(self) -> Iterator[Record]:
        """What was written since the last call."""
        if self._file is None:
            yield from self._read_older()
        yield from self._read_open_file()
        while self._was_replaced():
            yield from self._read_open_file()  # what came between the last look and the replacement
            self._open()
            yield from self._read_open_file()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read_older(self) -> Iterator[Record]:
        """The lines from before the file began anew, once. Opened after the newer file, so that none fall between the two."""
        self._open()
        newer, self._file = self._file, None
        with contextlib.suppress(FileNotFoundError):
            self._file = older(self._path).open("rb")
        if newer is None or self._file is None or not _same(newer, self._file):
            yield from self._read_open_file()
        self.close()
        self._file = newer

    def _read_open_file(self) -> Iterator[Record]:
        while self._file is not None and (chunk := self._file.readline(_LONGEST_LINE_BYTES)):
            self._rest += chunk
            if not chunk.endswith(b"\n") and len(self._rest) < _LONGEST_LINE_BYTES:
                continue
            line, self._rest = self._rest.decode(errors="replace").rstrip("\n"), b""
            if line:
                record = parse(line, process=self._process, before=self._last)
                self._last = record.at
                yield record

    def _was_replaced(self) -> bool:
        try:
            now = os.stat(self._path)
        except FileNotFoundError:
            return False
        return self._file is None or not os.path.samestat(now, os.fstat(self._file.fileno()))

    def _open(self) -> None:
        self.close()
        self._rest = b""  # of a line whose end nobody wrote
        with contextlib.suppress(FileNotFoundError):
            self._file = self._path.open("rb")


def processes_of(run: Run) -> list[str]:
    return sorted({process_of(path) for path in run.files()})


def history(run: Run, wanted: Wanted, *, last: int | None = None) -> Iterator[Record]:
    """All records that are there, in order of time; with `last`, so many from the end."""
    with ExitStack() as opened:
        tails = [opened.enter_context(closing(Tail(path))) for path in _newest(run) if wanted.takes_file(process_of(path))]
        merged = heapq.merge(*(tail.read() for tail in tails), key=lambda record: record.place)
        taken = (record for record in merged if wanted.takes(record))
        yield from taken if last is None else deque(taken, maxlen=last)


def follow(run: Run, wanted: Wanted, *, last: int) -> Iterator[list[Record]]:
    """The last so many records, then what comes, in batches that are ordered in themselves. Ends after the run has ended."""
    tails: dict[Path, Tail] = {}
    launcher = _watch_process(run)
    with FolderWatch(run.folder) as watch:
        try:
            batch = _look(run, wanted, tails)
            yield batch[max(0, len(batch) - last) :]
            while launcher is not None:
                watch.wait(_LONGEST_WAIT_S, also=launcher)
                ended = _is_readable(launcher)  # before the look: what was written until then is shown
                yield _look(run, wanted, tails)
                if ended:
                    return
        finally:
            for tail in tails.values():
                tail.close()
            if launcher is not None:
                os.close(launcher)


def _look(run: Run, wanted: Wanted, tails: dict[Path, Tail]) -> list[Record]:
    for path in _newest(run):
        if wanted.takes_file(process_of(path)) and path not in tails:
            tails[path] = Tail(path)
    found = (record for tail in tails.values() for record in tail.read() if wanted.takes(record))
    return sorted(found, key=lambda record: record.place)


def _newest(run: Run) -> list[Path]:
    return [path for path in run.files() if not is_older(path)]


def _watch_process(run: Run) -> int | None:
    """A descriptor that becomes readable when the launcher ends; None if it has ended."""
    try:
        descriptor = os.pidfd_open(run.launcher_pid) if run.launcher_pid > 0 else None
    except ProcessLookupError:
        return None
    if descriptor is not None and not run.lives:  # the number is somebody else's by now
        os.close(descriptor)
        return None
    return descriptor


def _is_readable(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 0)[0])


def _same(one: BinaryIO, other: BinaryIO) -> bool:
    return os.path.samestat(os.fstat(one.fileno()), os.fstat(other.fileno()))
