"""The threads of a native engine (`team.h`), by a program of their own: what a data race breaks seldom shows in a step's bits."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from common import native_build
from common.engine.native import build

CHECK = Path(__file__).with_name("team_check.cpp")
SOURCE = Path(build.__file__).with_name("source")


def compile_check(to: Path, *flags: str) -> Path:
    compiler = native_build.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    command = [compiler, "-std=c++20", "-pthread", *flags, f"-I{SOURCE}", str(CHECK), "-o", str(to)]
    compiled = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if compiled.returncode and "tsan" in compiled.stderr:
        pytest.skip("the compiler has no thread sanitizer")
    assert compiled.returncode == 0, compiled.stderr
    return to


def wrongs(program: Path, members: int, calls: int) -> int:
    finished = subprocess.run([program, str(members), str(calls)], capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    return int(finished.stdout)


def test_every_part_is_done_once_and_no_loop_begins_before_the_one_ahead_of_it_is_done(tmp_path: Path) -> None:
    program = compile_check(tmp_path / "check", "-O2")
    assert [wrongs(program, members, 400) for members in (1, 2, 3, 5)] == [0, 0, 0, 0]


@pytest.mark.long
def test_members_of_a_team_have_no_data_race(tmp_path: Path) -> None:
    program = compile_check(tmp_path / "check", "-O1", "-g", "-fsanitize=thread")
    assert wrongs(program, 3, 100) == 0
