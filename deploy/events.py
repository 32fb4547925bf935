"""What happened to the pools, for people: the difference of two states in words, and a ring of the latest.

    changes(before, after) -> Happening, ...        pure
    EventLog.add(...) -> ClusterEvent               with its number and its time

Nothing is decided from events.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from common.clock import Clock
from common.wire.registry_pb2 import ClusterEvent
from deploy.reconcile import LEAVING, Phase, PoolsState, Replica

KEPT_EVENTS = 200


@dataclass(frozen=True, slots=True)
class Happening:
    kind: str
    model: str
    worker_id: str = ""
    text: str = ""


class EventLog:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ring: deque[ClusterEvent] = deque(maxlen=KEPT_EVENTS)
        self._sequence = 0

    def add(self, happenings: Iterable[Happening]) -> None:
        for one in happenings:
            self._sequence += 1
            event = ClusterEvent(
                sequence=self._sequence,
                at_s=self._clock.wall_s(),
                kind=one.kind,
                worker_id=one.worker_id,
                model=one.model,
                text=one.text,
            )
            self._ring.append(event)

    def latest(self) -> list[ClusterEvent]:
        """Oldest first."""
        return list(self._ring)


def changes(before: PoolsState, after: PoolsState) -> Iterator[Happening]:
    for pool in sorted(after.desired):
        old, new = before.desired.get(pool, 0), after.desired[pool]
        if old != new:
            yield Happening("scaled", pool.model, text=f"{pool.role.value} workers {old} -> {new}")
    flipped = {one.was for one in after.replicas.values() if one.was}
    for worker_id in sorted({*before.replicas, *after.replicas}):
        old_one, new_one = before.replicas.get(worker_id), after.replicas.get(worker_id)
        if new_one is not None:
            yield from _of_replica(old_one, new_one)
        elif old_one is not None and old_one.phase in LEAVING and worker_id not in flipped:
            yield Happening("stopped", old_one.pool.model, worker_id)


def _of_replica(old: Replica | None, new: Replica) -> Iterator[Happening]:
    model, worker_id = new.pool.model, new.worker_id
    if old is None or old.incarnation != new.incarnation:
        if new.was and (old is None or old.was != new.was):
            yield Happening("flipped", model, worker_id, f"was {new.was}")
        elif new.incarnation > 1 and new.failure:
            yield Happening("restarted", model, worker_id, f"incarnation {new.incarnation}, after: {new.failure}")
        elif new.phase is not Phase.BACKOFF:
            yield Happening("started", model, worker_id, f"incarnation {new.incarnation}")
    if old is not None and old.phase is new.phase:
        return
    match new.phase:
        case Phase.READY:
            yield Happening("ready", model, worker_id)
        case Phase.DRAINING:
            yield Happening("draining", model, worker_id, _why_it_leaves(new))
        case Phase.DRAINED:
            yield Happening("drained", model, worker_id)
        case Phase.BACKOFF if old is not None:
            yield Happening("killed" if new.failure.startswith("hung") else "lost", model, worker_id, new.failure)
        case Phase.FAILED:
            yield Happening("given_up", model, worker_id, new.failure)


def _why_it_leaves(replica: Replica) -> str:
    if replica.flip_to is not None:
        return f"to be a {replica.flip_to.role.value} worker"
    return "to be replaced" if replica.outgoing else "no longer wanted"
