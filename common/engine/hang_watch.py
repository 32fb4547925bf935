"""Notices an engine that hangs without raising: its thread is at work and gives no sign, look after look.

    every hang_s / LOOKS     the thread waits for work, or has given a sign since the last look -> count anew
                             else one more; at LOOKS of them `on_hang` is called, once

Looks are counted, and not seconds: a process that was stopped for a while and goes on has looked once. Made, used and closed on
the asyncio loop. It does not know what the engine is doing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from common.errors import EngineFailure

LOOKS = 4


class HangWatch:
    def __init__(self, sign: Callable[[], int | None], hang_s: float, on_hang: Callable[[EngineFailure], None]) -> None:
        """`sign` is another number after each sign of life, None while there is nothing to do."""
        self._sign = sign
        self._hang_s = hang_s
        self._on_hang = on_hang
        self._seen: int | None = None
        self._looks = 0
        self._next = asyncio.get_running_loop().call_later(hang_s / LOOKS, self._look)

    def close(self) -> None:
        self._next.cancel()

    def _look(self) -> None:
        sign = self._sign()
        self._looks = self._looks + 1 if sign is not None and sign == self._seen else 0
        self._seen = sign
        if self._looks < LOOKS:
            self._next = asyncio.get_running_loop().call_later(self._hang_s / LOOKS, self._look)
        else:
            self._on_hang(EngineFailure(f"the engine has given no sign for {self._hang_s:g} s"))
