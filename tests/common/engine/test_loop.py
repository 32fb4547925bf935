"""What the engine's thread is in while it works, and that it leaves it, however it ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from common.engine.loop import EngineLoop
from common.errors import EngineFailure, RankLost


class Core:
    """Computes once for each post, or fails."""

    def __init__(self, inside: list[int], failure: Exception | None = None) -> None:
        self._inside = inside
        self._failure = failure
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
        if self._failure is not None:
            raise self._failure

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

    core = Core(inside, EngineFailure("broken") if fails else None)
    failed = asyncio.Event()
    loop = EngineLoop[str](core, name="engine", inside=surroundings)
    loop.start(deliver=lambda events: None, on_failure=lambda error: failed.set())
    loop.post(core.want)
    assert await asyncio.to_thread(core.computed.wait, 60)
    if fails:
        await asyncio.wait_for(failed.wait(), 60)
    await loop.stop()
    assert core.seen == seen
    assert not inside


@pytest.mark.parametrize("failure", [EngineFailure("broken"), RankLost("rank 1 of 2 ended")])
async def test_the_loss_of_another_process_leaves_no_traceback(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[type[BaseException]] = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: told.append(arguments.exc_type))
    core = Core([], failure)
    failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
    loop = EngineLoop[str](core, name="engine")
    loop.start(deliver=lambda events: None, on_failure=failed.set_result)
    loop.post(core.want)
    assert await asyncio.wait_for(failed, 60) is failure
    await loop.stop(60)
    assert told == ([] if isinstance(failure, RankLost) else [EngineFailure])
