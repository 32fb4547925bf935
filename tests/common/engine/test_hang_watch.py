"""When an engine's thread counts as hanging: counted in looks, on a loop whose time the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from common.engine.hang_watch import LOOKS, HangWatch
from common.errors import EngineFailure


class Timers:
    """Stands for the loop: what is to be called later is called by hand."""

    def __init__(self) -> None:
        self.next: Callable[[], None] | None = None

    def call_later(self, delay_s: float, action: Callable[[], None]) -> Timers:
        assert delay_s == 8.0 / LOOKS
        self.next = action
        return self

    def cancel(self) -> None:
        self.next = None

    def look(self, times: int = 1) -> None:
        for _ in range(times):
            action, self.next = self.next, None
            assert action is not None, "it does not look any more"
            action()


class Watched:
    def __init__(self, monkeypatch) -> None:  # type: ignore[no-untyped-def]
        self.sign: int | None = 1
        self.hangs: list[EngineFailure] = []
        self.timers = Timers()
        monkeypatch.setattr(asyncio, "get_running_loop", lambda: self.timers)
        self.watch = HangWatch(lambda: self.sign, 8.0, self.hangs.append)


def test_one_that_works_and_gives_no_sign_hangs_and_that_is_said_once(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    watched = Watched(monkeypatch)
    watched.timers.look(LOOKS)
    assert not watched.hangs
    watched.timers.look()
    assert [error.message for error in watched.hangs] == ["the engine has given no sign for 8 s"]
    assert watched.timers.next is None


def test_a_sign_or_nothing_to_do_counts_anew(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    watched = Watched(monkeypatch)
    for sign in (2, None, 3):
        watched.timers.look(LOOKS)
        watched.sign = sign
    watched.timers.look(LOOKS)
    assert not watched.hangs
    watched.sign = None
    watched.timers.look(5 * LOOKS)
    assert not watched.hangs


def test_who_is_not_watched_any_more_does_not_hang(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    watched = Watched(monkeypatch)
    watched.watch.close()
    assert watched.timers.next is None
