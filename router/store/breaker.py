"""Keeps requests from waiting for a store that does not answer.

    CLOSED     -- 3 failures within 2 s, or half a second of slow answers  -->  OPEN
    OPEN       -- after a pause, longer each time, with jitter  -->  HALF_OPEN: one probe, which no request waits for
    HALF_OPEN  -- the probe was answered in good time  -->  CLOSED
               -- it was not                           -->  OPEN

A failure is a missing or late answer; an answer that says no (out of memory, wrong type) is an answer. Failures of one moment are
one: many requests may have waited through the same stall. Only CLOSED lets requests pass. Who made it asks `probe_in_s`; it has
no timer and no connection of its own.
"""

from __future__ import annotations

import enum
import random
from collections import deque

from common.clock import Clock
from common.errors import IllegalTransition

_FAILURES, _WITHIN_S = 3, 2.0
_SAMPLES, _SLOW_SAMPLES = 16, 8
_SAMPLE_S = 0.05  # one answer in such a time is looked at: a moment's stall, of whichever side, meets many answers at once
_PAUSE_FIRST_S, _PAUSE_LAST_S = 0.25, 8.0


class BreakerState(enum.Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


_MOVES = {
    BreakerState.CLOSED: {BreakerState.OPEN},
    BreakerState.OPEN: {BreakerState.HALF_OPEN},
    BreakerState.HALF_OPEN: {BreakerState.CLOSED, BreakerState.OPEN},
}


class Breaker:
    """`budget_s` is what an answer may take; one that takes more than half of it is slow. `jitter` gives numbers in [0, 1)."""

    def __init__(self, *, clock: Clock, budget_s: float, jitter: random.Random) -> None:
        self._clock = clock
        self._slow_s = budget_s / 2
        self._moment_s = 0.9 * budget_s  # less than it takes to fail twice in a row
        self._jitter = jitter
        self._failures_s: deque[float] = deque(maxlen=_FAILURES)
        self._slow: deque[bool] = deque(maxlen=_SAMPLES)
        self._sampled_s = clock.monotonic_s() - _SAMPLE_S
        self._pause_s = _PAUSE_FIRST_S
        self._closed_s = clock.monotonic_s()
        self._probe_s = 0.0
        self.state = BreakerState.CLOSED

    @property
    def passes(self) -> bool:
        return self.state is BreakerState.CLOSED

    def answered(self, seconds: float) -> None:
        """An operation of a request was answered. What was under way when the breaker opened no longer counts."""
        now_s = self._clock.monotonic_s()
        if self.state is not BreakerState.CLOSED or now_s - self._sampled_s < _SAMPLE_S:
            return
        self._sampled_s = now_s
        self._slow.append(seconds > self._slow_s)
        if sum(self._slow) >= _SLOW_SAMPLES:
            self._open()

    def failed(self) -> None:
        if self.state is not BreakerState.CLOSED:
            return
        now_s = self._clock.monotonic_s()
        if self._failures_s and now_s - self._failures_s[-1] < self._moment_s:
            return
        self._failures_s.append(now_s)
        if len(self._failures_s) == _FAILURES and now_s - self._failures_s[0] <= _WITHIN_S:
            self._open()

    def lost(self) -> None:
        """The connection is gone: nothing passes until a probe is answered over a new one."""
        if self.state is not BreakerState.OPEN:
            self._open()

    def probe_in_s(self) -> float | None:
        """How long until a probe is due; None while closed."""
        return None if self.state is BreakerState.CLOSED else max(0.0, self._probe_s - self._clock.monotonic_s())

    def probing(self) -> None:
        """The one probe goes out."""
        self._move(BreakerState.HALF_OPEN)

    def probed(self, seconds: float | None) -> None:
        """What became of it: how long the answer took, None if there was none."""
        if seconds is None or seconds > self._slow_s:
            self._open()
            return
        self._move(BreakerState.CLOSED)
        self._closed_s = self._clock.monotonic_s()

    def _open(self) -> None:
        now_s = self._clock.monotonic_s()
        if self.state is BreakerState.CLOSED and now_s - self._closed_s > _PAUSE_LAST_S:
            self._pause_s = _PAUSE_FIRST_S  # it had been well for a while
        self._move(BreakerState.OPEN)
        self._failures_s.clear()
        self._slow.clear()
        self._probe_s = now_s + self._pause_s * (0.5 + 0.5 * self._jitter.random())
        self._pause_s = min(2 * self._pause_s, _PAUSE_LAST_S)

    def _move(self, state: BreakerState) -> None:
        if state not in _MOVES[self.state]:
            raise IllegalTransition(f"{self.state.value} -> {state.value}")
        self.state = state
