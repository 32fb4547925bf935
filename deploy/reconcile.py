"""Desired against actual, as pure functions: `decide` turns a state into the next state and the actions that lead there.

A replica is one slot of a pool; its worker id is `model/role/index`. Each start of a slot is a new incarnation.

    (absent) --Start--> STARTING --became_ready--> READY --Drain--> DRAINING --became_drained--> DRAINED --Stop--> STOPPING
                 ^         |                         |                 |                            |                 |
                 |         +---------lost------------+                 +------------lost------------+------lost-------+-> (absent)
                 |                   v
                 +-- BACKOFF <-------+-------> FAILED (never ready, or an error that a restart cannot mend)
                (its time came)

DRAINED --Flip--> STARTING in the pool of the other role: the process goes on under another id (`flip`). If that fails the
process is gone, and the new replica is one that was lost while it started.

A replica that is `outgoing` (`replace_workers`) serves until its successor does: the pool may have one worker more than desired
while it has such replicas, and drains one of them whenever it has one ready worker more. Where nothing can be started beside
them, and another one is ready, one drains first.

`decide` emits an action in the same step in which it moves the replica, so every action is emitted once. The other functions
tell it what happened; news about an older incarnation changes nothing. There is no clock, socket, process or Ray here: the pool
manager performs the actions and reports back.

A pool grows only into room: replicas on their way out still hold memory, and count; so do those that are to come by a flip.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

from common.types import Role


class Phase(enum.Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DRAINED = "drained"
    STOPPING = "stopping"
    BACKOFF = "backoff"  # no process; will be started again
    FAILED = "failed"  # no process; given up until the next change of scale


WITH_PROCESS = frozenset({Phase.STARTING, Phase.READY, Phase.DRAINING, Phase.DRAINED, Phase.STOPPING})
LEAVING = frozenset({Phase.DRAINING, Phase.DRAINED, Phase.STOPPING})


@dataclass(frozen=True, slots=True, order=True)
class Pool:
    model: str
    role: Role

    @property
    def worker_prefix(self) -> str:
        return f"{self.model}/{self.role.value}/"

    def worker_id(self, index: int) -> str:
        return f"{self.worker_prefix}{index}"


@dataclass(frozen=True, slots=True)
class Replica:
    pool: Pool
    worker_id: str
    birth: int  # grows with every new slot; the newest goes first when a pool shrinks
    incarnation: int
    phase: Phase
    ready_at_s: float | None = None
    quick_failures: int = 0  # in a row
    failed_starts: int = 0  # the last of them that were not even ready
    restart_at_s: float = 0.0
    failure: str = ""  # why the previous incarnation ended
    outgoing: bool = False  # to be replaced
    flip_to: Pool | None = None  # where its process goes on when it is drained
    was: str = ""  # the worker id that its process had before a flip


@dataclass(frozen=True, slots=True)
class Start:
    worker_id: str
    incarnation: int
    pool: Pool


@dataclass(frozen=True, slots=True)
class Drain:
    worker_id: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Stop:
    worker_id: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Flip:
    """The process of `worker_id` is to be another worker from now on."""

    worker_id: str
    incarnation: int
    successor: Start


Action = Start | Drain | Stop | Flip


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """A replica that fails before it was ready for `stable_s` failed quickly; each quick failure doubles the wait. It is given up
    only if it does not even become ready, several times in a row: one that did may have died of its host, or of its users."""

    stable_s: float = 30.0
    first_wait_s: float = 0.5
    longest_wait_s: float = 10.0
    most_failed_starts: int = 4

    def wait_s(self, quick_failures: int) -> float:
        if quick_failures == 0:
            return 0.0
        return min(self.longest_wait_s, self.first_wait_s * 2.0 ** (quick_failures - 1))


@dataclass(frozen=True, slots=True)
class PoolsState:
    desired: Mapping[Pool, int]
    replicas: Mapping[str, Replica] = field(default_factory=dict)  # by worker id
    incarnations: Mapping[str, int] = field(default_factory=dict)  # the last one used, of slots that are gone too
    births: int = 0
    closing: bool = False

    def of(self, pool: Pool) -> list[Replica]:
        """The pool's replicas, oldest first."""
        return sorted((replica for replica in self.replicas.values() if replica.pool == pool), key=lambda one: one.birth)

    def pools(self) -> list[Pool]:
        return sorted({*self.desired, *(replica.pool for replica in self.replicas.values())})

    def ready(self, pool: Pool) -> list[Replica]:
        return [one for one in self.of(pool) if one.phase is Phase.READY]

    def limit(self, pool: Pool) -> int:
        """How many replicas may stay: one more than desired while one is to be replaced."""
        replacing = any(one.outgoing and one.phase not in LEAVING for one in self.of(pool))
        return self.desired.get(pool, 0) + int(replacing and not self.closing)

    def room(self, pool: Pool) -> int:
        """How many processes the pool may have now: those of other pools that drain to come here have their places."""
        return self.limit(pool) - sum(one.flip_to == pool for one in self.replicas.values())

    def settled(self, pool: Pool) -> bool:
        """Exactly the desired number is ready and nobody else is left, nor to be replaced."""
        replicas = self.of(pool)
        right = all(one.phase is Phase.READY and not one.outgoing for one in replicas)
        return right and len(replicas) == self.desired.get(pool, 0)


def decide(state: PoolsState, now_s: float) -> tuple[PoolsState, tuple[Action, ...]]:
    """One step towards the desired state. Idempotent: with nothing new, a second call acts no more."""
    actions: list[Action] = []
    state = _begin_flips(state, actions)
    for pool in state.pools():
        state = _shrink(state, pool, actions)
        state = _replace(state, pool, actions)
        state = _stop_drained(state, pool, actions)
        state = _restart(state, pool, now_s, actions)
        state = _grow(state, pool, actions)
    return state, tuple(actions)


def wake_at_s(state: PoolsState) -> float | None:
    """When time alone makes `decide` act next; None if only news can."""
    waiting = (one for one in state.replicas.values() if one.phase is Phase.BACKOFF and _has_room(state, one.pool))
    return min((one.restart_at_s for one in waiting), default=None)


def set_desired(state: PoolsState, desired: Mapping[Pool, int]) -> PoolsState:
    """Changes the named pools. Whoever gave up there gets a new chance: a change of scale is an operator's word."""
    for replica in list(state.replicas.values()):
        if replica.pool in desired and replica.phase is Phase.FAILED:
            state = _with(state, replace(replica, phase=Phase.BACKOFF, restart_at_s=0.0, quick_failures=0, failed_starts=0))
    return replace(state, desired={**state.desired, **desired})


def replace_workers(state: PoolsState, worker_ids: Collection[str]) -> PoolsState:
    """Has ready workers replaced, one by one in each pool. Others are new anyway."""
    for worker_id in worker_ids:
        replica = state.replicas.get(worker_id)
        if replica is not None and replica.phase is Phase.READY:
            state = _with(state, replace(replica, outgoing=True))
    return state


def flip(state: PoolsState, worker_id: str, target: Pool) -> PoolsState:
    """Has a ready worker become one of another pool; the desired sizes go with it. Nothing changes if it is not ready."""
    replica = state.replicas.get(worker_id)
    if replica is None or replica.phase is not Phase.READY or replica.pool == target or state.closing:
        return state
    source = replica.pool
    sizes = {source: max(0, state.desired.get(source, 0) - 1), target: state.desired.get(target, 0) + 1}
    state = replace(state, desired={**state.desired, **sizes})
    return _with(state, replace(replica, flip_to=target, outgoing=False))


def close(state: PoolsState) -> PoolsState:
    """From here on everything is stopped, without draining first, and nothing is started."""
    return replace(state, desired=dict.fromkeys(state.desired, 0), closing=True)


def became_ready(state: PoolsState, worker_id: str, incarnation: int, now_s: float) -> PoolsState:
    replica = _current(state, worker_id, incarnation)
    if replica is None or replica.phase is not Phase.STARTING:
        return state
    return _with(state, replace(replica, phase=Phase.READY, ready_at_s=now_s))


def became_drained(state: PoolsState, worker_id: str, incarnation: int) -> PoolsState:
    replica = _current(state, worker_id, incarnation)
    if replica is None or replica.phase is not Phase.DRAINING:
        return state
    return _with(state, replace(replica, phase=Phase.DRAINED))


@dataclass(frozen=True, slots=True)
class Loss:
    """The process of an incarnation is gone. `permanent`: the same start would fail again."""

    worker_id: str
    incarnation: int
    reason: str
    permanent: bool = False


def lost(state: PoolsState, loss: Loss, now_s: float, policy: RestartPolicy) -> PoolsState:
    replica = _current(state, loss.worker_id, loss.incarnation)
    if replica is None or replica.phase not in WITH_PROCESS:
        return state
    if replica.phase in LEAVING:
        return _without(state, replica)
    stable = replica.ready_at_s is not None and now_s - replica.ready_at_s >= policy.stable_s
    quick_failures = 0 if stable else replica.quick_failures + 1
    failed_starts = replica.failed_starts + 1 if replica.ready_at_s is None else 0
    gave_up = loss.permanent or failed_starts >= policy.most_failed_starts
    return _with(
        state,
        replace(
            replica,
            phase=Phase.FAILED if gave_up else Phase.BACKOFF,
            ready_at_s=None,
            quick_failures=quick_failures,
            failed_starts=failed_starts,
            restart_at_s=now_s + policy.wait_s(quick_failures),
            failure=loss.reason,
            outgoing=False,  # whoever comes next is the successor
            flip_to=None,
            was="",
        ),
    )


def _begin_flips(state: PoolsState, actions: list[Action]) -> PoolsState:
    for replica in state.replicas.values():
        if replica.flip_to is not None and replica.phase is Phase.READY and not state.closing:
            state = _with(state, replace(replica, phase=Phase.DRAINING))
            actions.append(Drain(replica.worker_id, replica.incarnation))
    return state


def _shrink(state: PoolsState, pool: Pool, actions: list[Action]) -> PoolsState:
    while len(staying := [one for one in state.of(pool) if one.phase not in LEAVING]) > state.limit(pool):
        # Those without a process go first, then those that serve nobody, then those that are to go anyway, then the newest.
        replica = min(
            staying, key=lambda one: (one.phase in WITH_PROCESS, one.phase is Phase.READY, not one.outgoing, -one.birth)
        )
        if replica.phase not in WITH_PROCESS:
            state = _without(state, replica)
        elif replica.phase is Phase.READY and not state.closing:
            state = _with(state, replace(replica, phase=Phase.DRAINING))
            actions.append(Drain(replica.worker_id, replica.incarnation))
        else:
            state = _stop(state, replica, actions)
    return state


def _replace(state: PoolsState, pool: Pool, actions: list[Action]) -> PoolsState:
    """Lets one outgoing replica go, if there are enough without it."""
    ready = state.ready(pool)
    outgoing = [one for one in ready if one.outgoing]
    if not outgoing or state.closing:
        return state
    no_room = any(one.phase in (Phase.BACKOFF, Phase.FAILED) for one in state.of(pool))
    leaving = any(one.phase in LEAVING for one in state.of(pool))
    if len(ready) > state.desired.get(pool, 0) or (no_room and not leaving and len(ready) > 1):
        state = _with(state, replace(outgoing[0], phase=Phase.DRAINING))
        actions.append(Drain(outgoing[0].worker_id, outgoing[0].incarnation))
    return state


def _stop_drained(state: PoolsState, pool: Pool, actions: list[Action]) -> PoolsState:
    for replica in state.of(pool):
        target = replica.flip_to
        wanted = target is not None and not state.closing and _num_staying(state, target) < state.limit(target)
        if replica.phase is Phase.DRAINED and target is not None and wanted:
            state = _flip(state, replica, target, actions)
        elif replica.phase is Phase.DRAINED or (state.closing and replica.phase is Phase.DRAINING):
            state = _stop(state, replica, actions)
    return state


def _num_staying(state: PoolsState, pool: Pool) -> int:
    return sum(one.phase not in LEAVING for one in state.of(pool))


def _flip(state: PoolsState, replica: Replica, target: Pool, actions: list[Action]) -> PoolsState:
    state = _without(state, replica)
    slot = _new_slot(state, target)
    starts: list[Action] = []
    state = _start(state, replace(slot, was=replica.worker_id), starts)
    actions += [Flip(replica.worker_id, replica.incarnation, start) for start in starts if isinstance(start, Start)]
    return replace(state, births=slot.birth)


def _restart(state: PoolsState, pool: Pool, now_s: float, actions: list[Action]) -> PoolsState:
    for replica in state.of(pool):
        if replica.phase is Phase.BACKOFF and replica.restart_at_s <= now_s and _has_room(state, pool):
            state = _start(state, replica, actions)
    return state


def _has_room(state: PoolsState, pool: Pool) -> bool:
    """Whether another process may be started: one that is leaving keeps its place until it is gone."""
    return sum(one.phase in WITH_PROCESS for one in state.of(pool)) < state.room(pool)


def _grow(state: PoolsState, pool: Pool, actions: list[Action]) -> PoolsState:
    for _ in range(state.room(pool) - len(state.of(pool))):
        slot = _new_slot(state, pool)
        state = _start(replace(state, births=slot.birth), slot, actions)
    return state


def _new_slot(state: PoolsState, pool: Pool) -> Replica:
    worker_id = next(name for name in _worker_ids(pool) if name not in state.replicas)
    return Replica(pool, worker_id, birth=state.births + 1, incarnation=0, phase=Phase.BACKOFF)


def _worker_ids(pool: Pool) -> Iterator[str]:
    index = 0
    while True:
        yield pool.worker_id(index)
        index += 1


def _start(state: PoolsState, replica: Replica, actions: list[Action]) -> PoolsState:
    incarnation = state.incarnations.get(replica.worker_id, 0) + 1
    actions.append(Start(replica.worker_id, incarnation, replica.pool))
    state = replace(state, incarnations={**state.incarnations, replica.worker_id: incarnation})
    return _with(state, replace(replica, phase=Phase.STARTING, incarnation=incarnation, ready_at_s=None))


def _stop(state: PoolsState, replica: Replica, actions: list[Action]) -> PoolsState:
    actions.append(Stop(replica.worker_id, replica.incarnation))
    return _with(state, replace(replica, phase=Phase.STOPPING, flip_to=None))


def _current(state: PoolsState, worker_id: str, incarnation: int) -> Replica | None:
    replica = state.replicas.get(worker_id)
    return replica if replica is not None and replica.incarnation == incarnation else None


def _with(state: PoolsState, replica: Replica) -> PoolsState:
    return replace(state, replicas={**state.replicas, replica.worker_id: replica})


def _without(state: PoolsState, replica: Replica) -> PoolsState:
    return replace(state, replicas={name: one for name, one in state.replicas.items() if name != replica.worker_id})
