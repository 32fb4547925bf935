"""How long a request waits for workers that are not there.

    asleep          the manager brings workers because they are asked for      until the request's deadline
    awaited         it starts successors of those that were lost               for `migration_wait_s` from when nobody was found
    not yet heard   a worker is gone, and the manager has not said so          as long as it may take to notice, if that is less
    otherwise       scaled to zero, given up, or never there                   not at all

The rest of an answer waits for `migration_wait_s` in any case: it was being served a moment ago. A wait that a worker ended does
not count for the next one; how often a request may lose its worker is not decided here.
"""

from __future__ import annotations

from common.clock import Clock
from router.registry import Registry

_NOTICED_S = 5.0  # a host that falls silent is given up after four; a process that ends is noticed in no time


class Patience:
    """Of one request, or of the rest of one."""

    def __init__(
        self, model: str, registry: Registry, clock: Clock, *, wait_s: float, deadline_s: float, is_rest: bool, waits: bool
    ) -> None:
        """`waits`: False where somebody else can serve the request, so that it is not to wait for successors."""
        self._model = model
        self._registry = registry
        self._clock = clock
        self._wait_s = wait_s
        self._deadline_s = deadline_s
        self._waits = waits
        self._rest_until_s = min(clock.monotonic_s() + wait_s, deadline_s) if is_rest else None
        self._alone_since_s: float | None = None

    def found(self) -> None:
        """A worker was reached."""
        self._alone_since_s = None

    def left_s(self, *, nobody: bool = True, unheard: bool = False) -> float:
        """Of the wait for a worker, now; at most 0: it is over. `nobody`: there was none; else one was there, and failed.
        `unheard`: one is gone of which the manager has not said so."""
        now_s = self._clock.monotonic_s()
        if self._rest_until_s is not None:
            return self._rest_until_s - now_s
        if not (self._waits and nobody):
            return 0.0
        if self._alone_since_s is None:
            self._alone_since_s = now_s
        unheard_s = min(_NOTICED_S, self._wait_s) if unheard else 0.0
        wait_s = self._wait_s if self._registry.awaits(self._model) else unheard_s
        return min(self._alone_since_s + wait_s, self._deadline_s) - now_s
