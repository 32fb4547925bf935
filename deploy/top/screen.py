"""The live screen: looks, draws, waits for the next time or a key, until q, Ctrl-C or a signal.

    terminal taken over -> (look -> draw -> wait)* -> terminal given back, whatever happened

Nothing blocks the loop: a look that hangs does not keep `q` waiting.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live

from common.errors import PdserveError
from common.rpc import cancel_and_wait
from deploy.top.drawing import Frame, draw, draw_absent
from deploy.top.observer import Observer
from deploy.top.picture import Picture

_QUIT_KEYS = b"qQ\x03\x04\x1b"


class Screen:
    def __init__(self, observer: Observer, console: Console, interval_s: float) -> None:
        self._observer = observer
        self._console = console
        self._interval_s = interval_s
        self._hint = f"every {interval_s:g} s, q ends"
        self._stop = asyncio.Event()
        self._picture: Picture | None = None
        self._away = ""

    async def run(self) -> None:
        with (
            Live(console=self._console, screen=True, auto_refresh=False, transient=True) as live,
            _keys_to(self._on_key),
            _signals_to(self._stop, lambda: self._draw(live)),
        ):
            await self._until_stopped(live)

    async def _until_stopped(self, live: Live) -> None:
        stopped = asyncio.ensure_future(self._stop.wait())
        try:
            while not stopped.done():
                looking = asyncio.ensure_future(self._look())
                await asyncio.wait({looking, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if not looking.done():
                    await cancel_and_wait(looking)
                    return
                looking.result()
                self._draw(live)
                await asyncio.wait({stopped}, timeout=self._interval_s)
        finally:
            await cancel_and_wait(stopped)

    async def _look(self) -> None:
        try:
            self._picture = await self._observer.look()
            self._away = ""
        except PdserveError as error:
            self._away = error.message

    def _draw(self, live: Live) -> None:
        size = self._console.size
        frame = Frame(size.width, size.height, self._hint)
        shown = draw(self._picture, frame, away=self._away) if self._picture else draw_absent(self._away or "looking", frame)
        live.update(shown, refresh=True)

    def _on_key(self, keys: bytes) -> None:
        if any(key in _QUIT_KEYS for key in keys):
            self._stop.set()


@contextmanager
def _keys_to(on_key: Callable[[bytes], None]) -> Iterator[None]:
    """Keys as they are pressed, without their echo; nothing if the input is no terminal."""
    if not sys.stdin.isatty():
        yield
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    loop = asyncio.get_running_loop()
    try:
        tty.setcbreak(descriptor)
        loop.add_reader(descriptor, lambda: on_key(os.read(descriptor, 64)))
        yield
    finally:
        loop.remove_reader(descriptor)
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


@contextmanager
def _signals_to(stop: asyncio.Event, redraw: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in ends:
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGWINCH, redraw)
    try:
        yield
    finally:
        for number in (*ends, signal.SIGWINCH):
            loop.remove_signal_handler(number)
