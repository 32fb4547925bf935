"""What the engine's thread is in while it works, and that it leaves it, however it ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from common.engine.loop import EngineLoop
from common.errors import EngineFailure


class Core:
    """Computes once for each post, or fails."""

    def __init__(self, inside: list[int], *, fails: bool) -> None:
        self._inside = inside
        self._fails = fails
        self._wanted = 0
        self.seen: list[str] = []
        self.computed = threading.Event()

    def want(self) -> None:
        self._wanted += 1

    def schedule(self) -> bool:
        return self._wanted > 0

    def compute(self, hand_over: Callable[[], None]) -> None:
        self._wanted -= 1
        self.seen.append("computed" if threading.get_ident() in self._inside else "outside")
        self.computed.set()
        if self._fails:
            raise EngineFailure("broken")

    def finish(self) -> None:
        self.seen.append("finished" if threading.get_ident() in self._inside else "outside")

    def abandon(self) -> None:
        self.seen.append("abandoned" if threading.get_ident() in self._inside else "outside")

    def take_events(self) -> list[str]:
        return []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("fails", "seen"), [(False, ["computed", "finished"]), (True, ["computed", "abandoned"])])
async def test_a_thread_is_in_its_surroundings_from_start_to_end(fails: bool, seen: list[str]) -> None:
    inside: list[int] = []

    @contextmanager
    def surroundings() -> Iterator[None]:
        inside.append(threading.get_ident())
        try:
            yield
        finally:
            inside.remove(threading.get_ident())

    core = Core(inside, fails=fails)
    failed = asyncio.Event()
    loop = EngineLoop[str](core, name="engine", inside=surroundings)
    loop.start(deliver=lambda events: None, on_failure=lambda error: failed.set())
    loop.post(core.want)
    assert await asyncio.to_thread(core.computed.wait, 10)
    if fails:
        await asyncio.wait_for(failed.wait(), 10)
    await loop.stop()
    assert core.seen == seen
    assert not inside
