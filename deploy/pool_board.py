"""The state of the pools in one place: what it is, how it changes, and the picture of it that everybody is shown.

    tell(change) -> state, its events, `news` for whoever decides -> publish() -> snapshot -> after(version) wakes the waiting

The state is replaced as a whole and never changed, so any thread may read it. Nothing is decided here, and nobody is talked to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from common.clock import Clock
from common.wire.registry_pb2 import ClusterSnapshot
from deploy.events import EventLog, Happening, changes
from deploy.membership import Membership
from deploy.reconcile import PoolsState


class PoolBoard:
    def __init__(self, state: PoolsState, membership: Membership, clock: Clock) -> None:
        self.state = state
        self.membership = membership
        self.news = asyncio.Event()  # something was told since whoever decides cleared it
        self._events = EventLog(clock)

    @property
    def snapshot(self) -> ClusterSnapshot:
        return self.membership.snapshot

    def tell(self, change: Callable[[PoolsState], PoolsState]) -> None:
        """Something happened or was ordered, and has to be decided about."""
        self.enter(change(self.state))
        self.news.set()

    def enter(self, state: PoolsState) -> None:
        """What was decided is the state from now on."""
        self._events.add(changes(self.state, state))
        self.state = state

    def note(self, happening: Happening) -> None:
        """An event that is no change of the state."""
        self._events.add([happening])

    def publish(self) -> None:
        self.membership.publish(self.state, self._events.latest())
