"""Workers that share the cores of a host, seen through the file that they share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from common.engine.cores import PLACES, OwnCores, SharedCores
from common.engine.spare_core import FIRST_PAUSE_CALLS
from common.errors import StartupError

MS = 1_000_000


class Now:
    def __init__(self) -> None:
        self.ns = 10**15

    def __call__(self) -> int:
        return self.ns


@pytest.fixture
def now() -> Now:
    return Now()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cores"


def threads_of(cores: SharedCores | OwnCores) -> int:
    with cores.computing(512) as threads:
        return threads


def test_whoever_computes_alone_has_all_cores(path: Path, now: Now) -> None:
    one, other = SharedCores(path, 6, now_ns=now), SharedCores(path, 6, now_ns=now)
    assert (one.most, threads_of(one), threads_of(one)) == (6, 6, 6)
    now.ns += 1000 * MS
    assert threads_of(other) == 6


def test_a_step_of_few_rows_has_all_cores_and_beside_others_leaves_one_to_those_who_carry_its_tokens(
    path: Path, now: Now
) -> None:
    for cores, beside_another in ((1, 1), (2, 1), (4, 1), (7, 3)):
        mine, other = (SharedCores(path.with_name(f"{cores}"), cores, now_ns=now) for _ in range(2))
        for rows in (1, 63, 64):
            with mine.computing(rows) as threads:
                assert threads == cores
        with other.computing(512), mine.computing(1) as few:
            assert few == beside_another
        now.ns += 10**9


def test_where_leaving_a_core_is_found_to_be_faster_it_is_left(path: Path, now: Now) -> None:
    cores = SharedCores(path, 4, now_ns=now)
    found = set()
    for _ in range(2 * FIRST_PAUSE_CALLS):
        with cores.computing(1) as threads:
            now.ns += threads * MS
        found.add(threads)
    assert found == {3, 4}
    assert threads == 3


def test_those_who_compute_at_once_have_equal_parts(path: Path, now: Now) -> None:
    three = [SharedCores(path, 7, now_ns=now) for _ in range(3)]
    with three[0].computing(512) as alone, three[1].computing(512) as second, three[2].computing(512) as third:
        assert (alone, second, third) == (7, 3, 2)
    assert [threads_of(one) for one in three] == [2, 2, 2]
    two_on_one_core = [SharedCores(path, 1, now_ns=now) for _ in range(2)]
    with two_on_one_core[0].computing(512), two_on_one_core[1].computing(512) as threads:
        assert threads == 1


def test_between_two_steps_somebody_is_busy_still_and_then_not(path: Path, now: Now) -> None:
    one, other = SharedCores(path, 4, now_ns=now), SharedCores(path, 4, now_ns=now)
    threads_of(one)
    now.ns += 9 * MS
    assert threads_of(other) == 2
    now.ns += 11 * MS
    assert threads_of(other) == 4


def test_who_dies_within_a_computation_is_forgotten(path: Path, now: Now) -> None:
    script = """
import os, sys, time
from pathlib import Path
from common.engine.cores import SharedCores
with SharedCores(Path(sys.argv[1]), 4, now_ns=lambda: 10**15).computing(512):
    os._exit(0)
"""
    subprocess.run([sys.executable, "-c", script, str(path)], check=True, timeout=60)
    survivors = [SharedCores(path.with_name("other"), 4, now_ns=now), SharedCores(path, 4, now_ns=now)]
    assert threads_of(survivors[1]) == 4, "the first place is free again, and whoever takes it begins anew"

    holder = SharedCores(path, 4, now_ns=now)
    with holder.computing(512):
        now.ns += 4_000 * MS
        assert threads_of(survivors[1]) == 2
        now.ns += 2_000 * MS
        assert threads_of(survivors[1]) == 4


def test_places_are_given_back(path: Path) -> None:
    all_places = [SharedCores(path, 2) for _ in range(PLACES)]
    with pytest.raises(StartupError, match="64 engines"):
        SharedCores(path, 2)
    all_places.pop()
    SharedCores(path, 2)


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="No such file"):
        SharedCores(tmp_path / "no folder" / "cores", 2)


def test_own_cores_are_always_as_many() -> None:
    assert (OwnCores(3).most, threads_of(OwnCores(3))) == (3, 3)
