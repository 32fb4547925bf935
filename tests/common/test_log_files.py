"""Log files: bounded, whole lines, one per process whoever restarts it; and what a process says as it dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.log_files import LogFile, file_of, is_older, older, process_of

LOGGING = """
import logging, os, sys
from common.config import LoggingConfig
from common.logs import bound, configure_logging, get_logger
configure_logging(LoggingConfig(folder=sys.argv[1], level="info", max_file_bytes=20_000), process="tiny/decode/0#2")
log = get_logger("here")
"""


def run(folder: Path, body: str, *, ends: int = 0) -> list[str]:
    """Lines of the log of a process that configures logging and then does this."""
    found = subprocess.run(
        [sys.executable, "-c", LOGGING + body, str(folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert found.returncode == ends, found.stderr
    return file_of(folder, "tiny/decode/0").read_text().splitlines()


def test_names_of_files_are_those_of_processes(tmp_path: Path) -> None:
    for process in ("router", "smollm2-135m/decode/12", "a.1/prefill/0"):
        path = file_of(tmp_path, process)
        assert path.parent == tmp_path
        assert process_of(path) == process_of(older(path)) == process
        assert not is_older(path)
        assert is_older(older(path))
    assert file_of(tmp_path, "m/decode/0#7") == file_of(tmp_path, "m/decode/0")


def test_what_is_kept_is_bounded_and_the_newest(tmp_path: Path) -> None:
    file = LogFile(tmp_path, "router", max_bytes=2000)
    for number in range(1000):
        file.write(f"line {number:05}")
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2000
    file.close()
    path = file_of(tmp_path, "router")
    kept = [*older(path).read_text().splitlines(), *path.read_text().splitlines()]
    assert kept == [f"line {number:05}" for number in range(1000 - len(kept), 1000)]
    assert len(kept) > 80


def test_two_processes_of_one_name_lose_nothing_but_the_oldest(tmp_path: Path) -> None:
    one, other = (LogFile(tmp_path, "router", max_bytes=4000) for _ in range(2))
    for number in range(400):
        (one if number % 2 else other).write(f"line {number:05}")
    one.close()
    other.close()
    path = file_of(tmp_path, "router")
    kept = [*older(path).read_text().splitlines(), *path.read_text().splitlines()]
    assert kept == [f"line {number:05}" for number in range(400 - len(kept), 400)]


def test_what_is_said_what_libraries_warn_of_and_what_ends_the_process_are_lines_alike(tmp_path: Path) -> None:
    body = """
with bound(request_id="r1"):
    log.info("linked", prefill="p")
log.debug("not this")
logging.getLogger("asyncio").error("never retrieved")
logging.getLogger("x").info("not this")
raise ValueError("oh")
"""
    first, library, last = (json.loads(line) for line in run(tmp_path, body, ends=1))
    assert first.pop("timestamp").endswith("Z")
    assert first == {
        "process": "tiny/decode/0#2",
        "level": "info",
        "event": "linked",
        "module": "here",
        "prefill": "p",
        "request_id": "r1",
    }
    assert (library["module"], library["level"], library["event"]) == ("asyncio", "error", "never retrieved")
    assert last["level"] == "critical"
    assert "ValueError: oh" in last["exception"]


def test_a_crash_in_native_code_leaves_its_stack_in_the_file_that_is_current(tmp_path: Path) -> None:
    """Also after the file has begun anew."""
    lines = run(tmp_path, "for n in range(300):\n    log.info('x' * 100)\nos.abort()\n", ends=-6)
    assert any("Fatal Python error: Aborted" in line for line in lines)
    assert older(file_of(tmp_path, "tiny/decode/0")).exists()


def test_a_folder_that_cannot_be_written_to_costs_the_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        LogFile(tmp_path / "file" / "below", "router", max_bytes=1000)
    body = """
configure_logging(LoggingConfig(folder=sys.argv[1] + "/run.json/below"), process="router")
sys.stderr.write("|")
log.info("served all the same")
"""
    (tmp_path / "run.json").write_text("")
    found = subprocess.run(
        [sys.executable, "-c", LOGGING + body, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    complaint, _, said = found.stderr.partition("|")
    assert "no log file" in complaint
    assert "served all the same" in said


def test_a_full_disk_costs_lines(tmp_path: Path) -> None:
    file = LogFile(tmp_path, "router", max_bytes=1000)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, file._descriptor)
    os.close(full)
    file.write("nowhere to go")
    file.close()
