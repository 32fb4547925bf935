"""What people are told of the pools: the words for a change, and the ring that keeps the latest."""

from __future__ import annotations

from common.clock import ManualClock
from common.types import Role
from deploy.events import KEPT_EVENTS, EventLog, Happening, changes
from deploy.reconcile import Loss, Pool, PoolsState, RestartPolicy, became_ready, decide, lost, set_desired

DECODE = Pool("m", Role.DECODE)
POLICY = RestartPolicy(most_failed_starts=1)


def told(before: PoolsState, after: PoolsState) -> list[tuple[str, str, str]]:
    return [(one.kind, one.worker_id, one.text) for one in changes(before, after)]


def test_a_worker_that_hangs_is_told_as_killed_and_one_that_fails_again_as_given_up() -> None:
    begun, _ = decide(PoolsState(desired={DECODE: 1}), 0.0)
    ready = became_ready(begun, "m/decode/0", 1, 0.0)
    assert told(begun, ready) == [("ready", "m/decode/0", "")]
    assert told(ready, ready) == []
    hung = lost(ready, Loss("m/decode/0", 1, "hung: missed 3 health checks"), 1.0, POLICY)
    assert told(ready, hung) == [("killed", "m/decode/0", "hung: missed 3 health checks")]
    again, _ = decide(hung, 100.0)
    assert told(hung, again) == [("restarted", "m/decode/0", "incarnation 2, after: hung: missed 3 health checks")]
    gave_up = lost(again, Loss("m/decode/0", 2, "no memory"), 101.0, POLICY)
    assert told(again, gave_up) == [("given_up", "m/decode/0", "no memory")]


def test_a_change_of_scale_is_told_with_both_sizes() -> None:
    state = PoolsState(desired={DECODE: 1})
    assert told(state, set_desired(state, {DECODE: 3})) == [("scaled", "", "decode workers 1 -> 3")]


def test_the_ring_keeps_the_latest_and_numbers_all() -> None:
    clock = ManualClock(5.0)
    log = EventLog(clock)
    log.add(Happening("ready", "m", f"m/decode/{index}") for index in range(KEPT_EVENTS + 7))
    latest = log.latest()
    assert [event.sequence for event in latest] == list(range(8, KEPT_EVENTS + 8))
    assert (latest[0].worker_id, latest[0].at_s) == ("m/decode/7", 5.0)
