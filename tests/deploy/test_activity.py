"""What the kernel says of processes that hang and of one that works, on a machine that may have far too much to do."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from deploy.activity import Activity, Look, look_at, observe, was_kept_waiting, what_it_did

WAIT_S = 120.0
SLEEPER = "import sys, time; sys.stdout.write('x'); sys.stdout.flush(); time.sleep(600)"
WORKER = "import sys; sys.stdout.write('x'); sys.stdout.flush()\nwhile True: pass"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def started(stack: ExitStack, program: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    stack.callback(process.__exit__, None, None, None)
    stack.callback(process.kill)
    assert process.stdout is not None
    assert process.stdout.read(1) == b"x"
    return process


async def seen(pid: int, wanted: Activity) -> Activity:
    """What is seen in the end: a process falls asleep, or stops, a moment after it was told to."""
    for _ in range(600):
        found = await observe(pid, 0.1)
        if found is wanted:
            break
    return found


async def test_one_that_works_waits_or_is_stopped(stack: ExitStack) -> None:
    working = started(stack, WORKER)
    assert await seen(working.pid, Activity.WORKING) is Activity.WORKING
    working.send_signal(signal.SIGSTOP)
    await asyncio.to_thread(os.waitpid, working.pid, os.WUNTRACED)
    assert await observe(working.pid, 0.05) is Activity.STOPPED
    working.send_signal(signal.SIGCONT)
    assert await seen(working.pid, Activity.WORKING) is Activity.WORKING
    asleep = started(stack, SLEEPER)
    assert await seen(asleep.pid, Activity.ASLEEP) is Activity.ASLEEP
    asleep.kill()
    await asyncio.to_thread(os.waitid, os.P_PID, asleep.pid, os.WEXITED | os.WNOWAIT)  # it is left as a zombie
    assert await observe(asleep.pid, 0.01) is Activity.GONE
    asleep.wait(WAIT_S)
    assert look_at(asleep.pid) is None


@pytest.mark.parametrize(("waited_s", "kept"), [(0.01, False), (0.5, True)])
def test_who_waits_for_cores_himself_is_known(waited_s: float, kept: bool) -> None:
    assert was_kept_waiting(Look("SR", 1.0, 0.2), Look("SR", 9.0, 0.2 + waited_s), span_s=1.0) is kept


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        (Look("SSS", 1.0), Look("SSS", 1.01), Activity.ASLEEP),  # libraries look around now and then
        (Look("SSS", 1.0), Look("SSS", 1.4), Activity.WORKING),  # it had the core between the looks
        (Look("SRS", 1.0), Look("SRS", 1.0), Activity.WORKING),  # it waited for a core all the time
        (Look("SSD", 1.0), Look("SSS", 1.0), Activity.WORKING),
        (Look("SRS", 1.0), Look("TTT", 1.5), Activity.STOPPED),
        (Look("TTT", 1.0), Look("TTZ", 1.0), Activity.STOPPED),
        (Look("SSS", 1.0), Look("ZZ", 1.0), Activity.GONE),
        (Look("SSS", 1.0), None, Activity.GONE),
    ],
)
def test_what_two_looks_mean(before: Look, after: Look | None, found: Activity) -> None:
    assert what_it_did(before, after, span_s=1.0) is found
