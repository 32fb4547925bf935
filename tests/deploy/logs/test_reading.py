"""Logs of several processes as one stream: in order, complete, across files that begin anew, while processes come and go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from common.errors import ClusterError, InvalidRequest
from common.log_files import LogFile
from deploy.cluster_state import started_at
from deploy.logs.drawing import LogDrawing
from deploy.logs.folder_watch import FolderWatch
from deploy.logs.reading import Tail, follow, history, processes_of
from deploy.logs.records import Level, Record, Wanted, parse, parse_since
from deploy.logs.runs import Run, begin_run, clusters_with_logs, run_in, runs_of

START = datetime(2026, 5, 4, 12, 0, tzinfo=UTC)
EVERYTHING = Wanted()


def line(second: float, process: str, event: str = "it happened", **fields: object) -> str:
    at = (START + timedelta(seconds=second)).isoformat()
    return json.dumps({"timestamp": at, "process": process, "level": "info", "event": event, **fields})


class Writer:
    """A process's log file, as that process holds it."""

    def __init__(self, folder: Path, process: str, max_bytes: int = 1 << 20) -> None:
        self._file = LogFile(folder, process, max_bytes=max_bytes)
        self._process = process

    def say(self, second: float, event: str, **fields: object) -> None:
        self._file.write(line(second, self._process, event, **fields))

    def say_plainly(self, text: str) -> None:
        self._file.write(text)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """Stands for a launcher: lives until its input ends."""
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as process:
        yield process
        if process.stdin is not None and not process.stdin.closed:
            process.stdin.close()
        process.wait(60)


def run_of(folder: Path, launcher: subprocess.Popen[bytes] | None = None) -> Run:
    folder.mkdir(exist_ok=True)
    return Run(folder, launcher.pid, started_at(launcher.pid) or 0) if launcher else Run(folder, 0, 0)


def events(records: Iterator[Record] | list[Record]) -> list[str]:
    return [record.event for record in records]


def test_files_are_merged_by_time_with_their_older_parts(tmp_path: Path) -> None:
    router, worker = Writer(tmp_path, "router"), Writer(tmp_path, "tiny/decode/0#1", max_bytes=1200)
    for second in range(10):
        (router if second % 3 else worker).say(second, f"e{second}")
    run = run_of(tmp_path)
    assert (tmp_path / "tiny+decode+0.jsonl").stat().st_size < 600  # it has begun anew, so two files are read
    assert events(history(run, EVERYTHING)) == [f"e{second}" for second in range(10)]
    assert events(history(run, EVERYTHING, last=3)) == ["e7", "e8", "e9"]
    assert events(history(run, EVERYTHING, last=0)) == []
    assert processes_of(run) == ["router", "tiny/decode/0"]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Wanted(("router",)), {"router"}),
        (Wanted(("tiny/decode/0",)), {"tiny/decode/0#1", "tiny/decode/0#2"}),
        (Wanted(("tiny/decode/0#2",)), {"tiny/decode/0#2"}),
        (Wanted(("tiny/decode",)), {"tiny/decode/0#1", "tiny/decode/0#2"}),
        (Wanted(("tiny",)), {"tiny/decode/0#1", "tiny/decode/0#2", "tiny/prefill/0#1"}),
        (Wanted(("prefill",)), {"tiny/prefill/0#1"}),
        (Wanted(("prefill", "router")), {"tiny/prefill/0#1", "router"}),
        (Wanted(("tin",)), set()),
    ],
)
def test_whose_lines_are_wanted(tmp_path: Path, wanted: Wanted, expected: set[str]) -> None:
    for process in ("router", "tiny/decode/0#1", "tiny/decode/0#2", "tiny/prefill/0#1"):
        Writer(tmp_path, process).say(0, "here")
    assert {record.process for record in history(run_of(tmp_path), wanted)} == expected


def test_level_time_and_request_are_filters_that_add_up(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "router")
    writer.say(1, "a", level="warning", request_id="r1")
    writer.say(2, "b", level="error", request_id="r1-x7")  # a worker's name for the same request
    writer.say(3, "c", level="error", request_id="r11")
    writer.say(4, "d", level="debug", request_id="r1")
    run = run_of(tmp_path)
    assert events(history(run, Wanted(level=Level.WARNING))) == ["a", "b", "c"]
    assert events(history(run, Wanted(request_id="r1"))) == ["a", "b", "d"]
    assert events(history(run, Wanted(request_id="chatcmpl-r1", level=Level.ERROR))) == ["b"]
    assert events(history(run, Wanted(since=START + timedelta(seconds=2)))) == ["b", "c", "d"]


def test_a_crash_is_an_error_at_its_place(tmp_path: Path) -> None:
    worker, router = Writer(tmp_path, "tiny/decode/0#1"), Writer(tmp_path, "router")
    worker.say(1, "computing")
    worker.say_plainly("Fatal Python error: Segmentation fault")
    router.say(2, "lost it")
    found = list(history(run_of(tmp_path), EVERYTHING))
    assert events(found) == ["computing", "Fatal Python error: Segmentation fault", "lost it"]
    assert (found[1].level, found[1].process) == ("error", "tiny/decode/0")


def test_half_a_line_waits_for_its_end_and_what_never_ends_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "router.jsonl"
    whole = line(1, "router", "first")
    path.write_text(whole[:20])
    tail = Tail(path)
    assert list(tail.read()) == []
    with path.open("a") as file:
        file.write(whole[20:] + "\n" + line(2, "router", "second") + "\nhalf")
    assert events(list(tail.read())) == ["first", "second"]
    path.rename(tmp_path / "router.1.jsonl")
    path.write_text(line(3, "router", "third") + "\n")
    assert events(list(tail.read())) == ["third"]
    tail.close()


def test_following_sees_everything_of_a_file_that_begins_anew_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "router.jsonl"
    writer = Writer(tmp_path, "router", max_bytes=3000)
    tail = Tail(path)
    seen: list[str] = []
    for number in range(200):
        writer.say(number, f"e{number}")
        if number % 7 == 0:  # more than one file's worth is never written between two looks
            seen += events(list(tail.read()))
    seen += events(list(tail.read()))
    tail.close()
    assert seen == [f"e{number}" for number in range(200)]


def test_what_is_written_just_before_the_file_begins_anew_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the reader saw the end of the file, and before it noticed that there is another."""
    path = tmp_path / "router.jsonl"
    path.write_text(line(1, "router", "first") + "\n")
    tail = Tail(path)
    assert events(list(tail.read())) == ["first"]
    looked = Tail._was_replaced

    def meanwhile(self: Tail) -> bool:
        monkeypatch.setattr(Tail, "_was_replaced", looked)
        with path.open("a") as file:
            file.write(line(2, "router", "last of the old") + "\n")
        path.rename(tmp_path / "router.1.jsonl")
        path.write_text(line(3, "router", "first of the new") + "\n")
        return looked(self)

    monkeypatch.setattr(Tail, "_was_replaced", meanwhile)
    assert events(list(tail.read())) == ["last of the old", "first of the new"]
    tail.close()


def test_following_goes_through_restarts_and_newcomers_and_ends_with_the_cluster(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    """Each step waits for what the step before made: no event of the test depends on time."""
    run = run_of(tmp_path / "run", sleeper)
    Writer(run.folder, "tiny/decode/0#1").say(0, "old")
    Writer(run.folder, "tiny/decode/0#1").say(1, "before")
    seen: list[str] = []
    steps = iter(
        [
            lambda: Writer(run.folder, "tiny/decode/0#1").say(2, "dying"),
            lambda: Writer(run.folder, "tiny/decode/0#2").say(3, "born again"),
            lambda: Writer(run.folder, "tiny/decode/1#1").say(4, "newcomer"),
            lambda: Writer(run.folder, "router").say(5, "not wanted"),
            lambda: sleeper.stdin.close(),
        ]
    )
    expected = ["before", "dying", "born again", "newcomer"]
    for batch in follow(run, Wanted(("decode",)), last=1):
        seen += events(batch)
        if seen == expected[: len(seen)] and (step := next(steps, None)) is not None:
            # From another thread, so that it is the watch that wakes the reader, and not the next look.
            thread = threading.Thread(target=step)
            thread.start()
            thread.join(60)
    assert seen == expected


def test_a_folder_is_watched_for_writing_and_not_for_reading(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    path = tmp_path / "router.jsonl"
    path.write_text("before\n")
    with FolderWatch(tmp_path) as watch:
        path.read_text()
        assert not watch.wait(0)
        with path.open("a") as file:
            file.write("more\n")
        assert watch.wait(60.0)
        assert not watch.wait(0), "each change wakes once"
        path.rename(tmp_path / "router.1.jsonl")
        path.write_text("a new file\n")
        assert watch.wait(60.0)
        launcher = os.pidfd_open(sleeper.pid)
        assert sleeper.stdin is not None
        sleeper.stdin.close()
        assert watch.wait(60.0, also=launcher)
        os.close(launcher)


def test_following_a_run_that_has_ended_shows_what_is_there_and_ends(tmp_path: Path) -> None:
    Writer(tmp_path, "router").say(0, "last words")
    assert [events(batch) for batch in follow(run_of(tmp_path), EVERYTHING, last=5)] == [["last words"]]


def test_runs_are_kept_and_thrown_away(tmp_path: Path) -> None:
    folders = []
    for number in range(5):
        folder = begin_run(tmp_path, "c", f"{number}" * 32, keep=3)
        folder = folder.rename(folder.with_name(f"2026010{number}-000000-x"))  # a second is too coarse for this test
        about = folder / "run.json"
        about.write_text(json.dumps({"launcher_pid": 0, "launcher_started": 0}))
        folders.append(folder)
    assert [run.folder for run in runs_of(tmp_path, "c")] == folders[-3:]
    assert clusters_with_logs(tmp_path) == ["c"]
    newest = begin_run(tmp_path, "c", "f" * 32, keep=1)
    (only,) = runs_of(tmp_path, "c")
    assert only.folder == newest
    assert only.lives  # this process is its launcher
    begin_run(tmp_path, "c", "e" * 32, keep=1)
    assert len(runs_of(tmp_path, "c")) == 2, "a run that is going on is not thrown away"
    with pytest.raises(ClusterError, match="no folder"):
        run_in(tmp_path / "nothing")


NOW = datetime(2026, 5, 4, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90s", NOW - timedelta(seconds=90)),
        ("1.5h", NOW - timedelta(minutes=90)),
        ("2 d", NOW - timedelta(days=2)),
        ("2026-05-04T10:30:00Z", datetime(2026, 5, 4, 10, 30, tzinfo=UTC)),
        ("2026-05-04T12:30:00+02:00", datetime(2026, 5, 4, 10, 30, tzinfo=UTC)),
    ],
)
def test_since(text: str, expected: datetime) -> None:
    assert parse_since(text, NOW) == expected


def test_since_in_local_time(monkeypatch: pytest.MonkeyPatch) -> None:
    local = NOW.astimezone()
    assert parse_since("08:15", NOW) == local.replace(hour=8, minute=15, second=0, microsecond=0)
    assert parse_since("2026-05-04T10:30", NOW).replace(tzinfo=None) == datetime(2026, 5, 4, 10, 30)
    for wrong in ("yesterday", "25:00", "5", "-3m", ""):
        with pytest.raises(InvalidRequest, match="--since wants"):
            parse_since(wrong, NOW)


def test_a_record_is_drawn_on_one_line_and_cannot_steer_the_terminal() -> None:
    record = parse(
        line(0.25, "router", "request \x1b[2J", status="200", seconds=0.123456, said="two words", request_id="r\x07"),
        process="router",
        before=START,
    )
    text = LogDrawing(None).draw(record).plain
    assert "\n" not in text
    assert text.isprintable()
    assert "seconds=0.1235" in text
    assert "said='two words'" in text
    crashed = parse(line(0, "router", "oh", exception="Traceback:\n  File x"), process="router", before=START)
    assert LogDrawing(None).draw(crashed).plain.splitlines()[1:] == ["    Traceback:", "      File x"]
