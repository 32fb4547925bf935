"""Whether short computations should leave a core to others: tried out, and tried again.

    with trial.computing(num_rows) as leaves_one: ...      durations of the two ways are compared, few rows and many apart

A step of decoding shares its cores with those who carry its tokens. It begins with all of them, for a thread whose core somebody
else needs holds up the others only for the parts in its hands (`native/source/team.h`), so two threads take no more of the
cores' time than one. Whether a step is over sooner with one core less depends on how much others do, and that on the load, so
it is measured: every now and then a few calls go the other way. If they took less time by a margin, that is the way from then
on; if not, the next try comes after twice as many calls, so that a way that is twice as slow soon costs nothing. The first try
comes early: where others compute all the time, and who needs the core gets it for milliseconds, all cores take twice as long.

A mean, not a median, is compared: the few steps in which somebody else needed the core are what it is about. It knows no threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TRIED_CALLS = 16
FIRST_PAUSE_CALLS = 128
LONGEST_PAUSE_CALLS = 16_384
MARGIN = 0.9  # of the present way's time, at most


class _Size:
    """Computations of about as many rows."""

    def __init__(self) -> None:
        self.leaves_one = False
        self.pause_calls = FIRST_PAUSE_CALLS
        self._left_calls = FIRST_PAUSE_CALLS  # until a try begins
        self._spent_ns = [0, 0]  # as ever, and the other way: of the last calls before a try, and of those within it
        self._tried_calls = 0

    @property
    def trying(self) -> bool:
        return self._left_calls == 0

    def took(self, spent_ns: int) -> None:
        if not self.trying:
            if self._left_calls <= TRIED_CALLS:
                self._spent_ns[0] += spent_ns
            self._left_calls -= 1
            return
        self._spent_ns[1] += spent_ns
        self._tried_calls += 1
        if self._tried_calls < TRIED_CALLS:
            return
        if self._spent_ns[1] < MARGIN * self._spent_ns[0]:
            self.leaves_one = not self.leaves_one
            self.pause_calls = FIRST_PAUSE_CALLS
        else:
            self.pause_calls = min(2 * self.pause_calls, LONGEST_PAUSE_CALLS)
        self._left_calls, self._spent_ns, self._tried_calls = self.pause_calls, [0, 0], 0


class SpareCore:
    """One per engine; used by its thread."""

    def __init__(self, *, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._now_ns = now_ns
        self._sizes: dict[int, _Size] = {}

    @contextmanager
    def computing(self, num_rows: int) -> Iterator[bool]:
        """Surrounds a computation and says whether it is to leave a core free. One that fails counts for nothing."""
        size = self._sizes.setdefault(num_rows.bit_length(), _Size())
        began_ns = self._now_ns()
        yield size.leaves_one != size.trying
        size.took(self._now_ns() - began_ns)
