"""The control logic against an arbitrary world: any order of news, deaths and changes of scale."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.types import Role
from deploy.reconcile import (
    LEAVING,
    WITH_PROCESS,
    Action,
    Drain,
    Flip,
    Loss,
    Phase,
    Pool,
    PoolsState,
    RestartPolicy,
    Start,
    Stop,
    became_drained,
    became_ready,
    close,
    decide,
    flip,
    lost,
    replace_workers,
    set_desired,
    wake_at_s,
)

PREFILL = Pool("m", Role.PREFILL)
DECODE = Pool("m", Role.DECODE)
POLICY = RestartPolicy(stable_s=30.0, first_wait_s=1.0, longest_wait_s=8.0, most_failed_starts=3)


@dataclass
class World:
    """Processes as they would really be: each obeys what it was told, when the test lets it."""

    processes: dict[str, int] = field(default_factory=dict)  # worker id -> incarnation
    told: dict[str, set[str]] = field(default_factory=dict)
    highest: dict[str, int] = field(default_factory=dict)

    def perform(self, action: Action) -> None:
        name = action.worker_id
        match action:
            case Start():
                assert name not in self.processes, "two processes of one worker id"
                assert action.incarnation > self.highest.get(name, 0), "an incarnation was used twice"
                self.highest[name] = action.incarnation
                self.processes[name] = action.incarnation
                self.told[name] = set()
            case Drain():
                assert self.processes.get(name) == action.incarnation
                assert not self.told[name], "drained twice, or after it was stopped"
                self.told[name].add("drain")
            case Stop():
                assert self.processes.get(name) == action.incarnation
                assert "stop" not in self.told[name]
                self.told[name].add("stop")
            case Flip():
                assert self.processes.get(name) == action.incarnation
                assert self.told[name] == {"drain"}, "a worker changes its role without being drained, or on its way out"
                del self.processes[name]
                self.perform(action.successor)


class Pools(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.world = World()
        self.state = PoolsState(desired={PREFILL: 1, DECODE: 1})
        self.closed = False
        self.step()

    def step(self) -> None:
        before = {pool: self.count(pool) for pool in (PREFILL, DECODE)}
        limit = {pool: self.state.limit(pool) for pool in (PREFILL, DECODE)}
        ready = {name for name, one in self.state.replicas.items() if one.phase is Phase.READY}
        self.state, actions = decide(self.state, self.now_s)
        for action in actions:
            self.world.perform(action)
            if isinstance(action, Stop) and not self.closed:
                assert action.worker_id not in ready, "stopped a serving worker without draining it"
        for pool in (PREFILL, DECODE):
            # A process that comes by a flip has its memory already, and need not wait for one that leaves.
            came = sum(isinstance(action, Flip) and action.successor.pool == pool for action in actions)
            assert self.count(pool) - came <= max(before[pool], limit[pool]), "grew beyond what is desired"
        again, nothing = decide(self.state, self.now_s)
        assert nothing == ()
        assert again == self.state

    def count(self, pool: Pool) -> int:
        return sum(name.startswith(f"{pool.model}/{pool.role.value}/") for name in self.world.processes)

    def alive(self) -> list[str]:
        return sorted(self.world.processes)

    @rule(prefill=st.integers(0, 4), decode=st.integers(0, 4))
    def scale(self, prefill: int, decode: int) -> None:
        if not self.closed:
            self.state = set_desired(self.state, {PREFILL: prefill, DECODE: decode})
            self.step()

    @precondition(lambda self: self.world.processes)
    @rule(data=st.data())
    def replaces(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(self.alive()), unique=True, max_size=3))
        before = self.state.desired
        self.state = replace_workers(self.state, chosen)
        assert self.state.desired == before
        self.step()

    @precondition(lambda self: self.world.processes)
    @rule(data=st.data())
    def flips(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.alive()))
        total = sum(self.state.desired.values())
        source = self.state.replicas[name].pool
        if self.state.desired[source] > 0:  # one that is on its way out is none to give away
            self.state = flip(self.state, name, DECODE if source == PREFILL else PREFILL)
            assert sum(self.state.desired.values()) == total
        self.step()

    @rule(seconds=st.sampled_from([0.1, 1.0, 10.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        self.step()

    @precondition(lambda self: self.world.processes)
    @rule(data=st.data())
    def becomes_ready(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.alive()))
        self.state = became_ready(self.state, name, self.world.processes[name], self.now_s)
        self.step()

    @precondition(lambda self: self.world.processes)
    @rule(data=st.data())
    def becomes_drained(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.alive()))
        self.state = became_drained(self.state, name, self.world.processes[name])
        self.step()

    @precondition(lambda self: self.world.processes)
    @rule(data=st.data(), permanent=st.booleans())
    def dies(self, data: st.DataObject, permanent: bool) -> None:
        name = data.draw(st.sampled_from(self.alive()))
        incarnation = self.world.processes.pop(name)
        self.state = lost(self.state, Loss(name, incarnation, "died", permanent=permanent), self.now_s, POLICY)
        self.step()

    @rule(data=st.data())
    def stale_news_changes_nothing(self, data: st.DataObject) -> None:
        if not self.world.highest:
            return
        name = data.draw(st.sampled_from(sorted(self.world.highest)))
        old = data.draw(st.integers(0, self.world.highest[name] - 1))
        assert lost(self.state, Loss(name, old, "late"), self.now_s, POLICY) == self.state
        assert became_ready(self.state, name, old, self.now_s) == self.state
        assert became_drained(self.state, name, old) == self.state

    @rule()
    def closes(self) -> None:
        self.closed = True
        self.state = close(self.state)
        self.step()

    @invariant()
    def records_match_the_world(self) -> None:
        recorded = {name: one.incarnation for name, one in self.state.replicas.items() if one.phase in WITH_PROCESS}
        assert recorded == self.world.processes

    def teardown(self) -> None:
        """A world that obeys and no longer fails must reach the desired state."""
        for _ in range(50):
            for name in self.alive():
                incarnation = self.world.processes[name]
                if "stop" in self.world.told[name]:
                    del self.world.processes[name]
                    self.state = lost(self.state, Loss(name, incarnation, "stopped"), self.now_s, POLICY)
                elif "drain" in self.world.told[name]:
                    self.state = became_drained(self.state, name, incarnation)
                else:
                    self.state = became_ready(self.state, name, incarnation, self.now_s)
            self.step()
            wake = wake_at_s(self.state)
            if wake is not None:
                self.now_s = max(self.now_s, wake)
                self.step()
        for pool in (PREFILL, DECODE):
            gave_up = sum(one.phase is Phase.FAILED for one in self.state.of(pool))
            assert self.state.desired[pool] - gave_up <= self.count(pool) <= self.state.limit(pool)
            assert gave_up or self.state.settled(pool)
        if self.closed:
            assert not self.world.processes


TestPools = Pools.TestCase
TestPools.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def _run(state: PoolsState, now_s: float = 0.0) -> tuple[PoolsState, tuple[Action, ...]]:
    return decide(state, now_s)


def test_a_crash_loop_backs_off_and_gives_up_with_the_reason() -> None:
    state, _ = _run(PoolsState(desired={DECODE: 1}))
    now_s, waits = 0.0, []
    for incarnation in (1, 2, 3):
        state = lost(state, Loss("m/decode/0", incarnation, f"crash {incarnation}"), now_s, POLICY)
        wake = wake_at_s(state)
        if wake is not None:
            waits.append(wake - now_s)
            now_s = wake
            state, actions = _run(state, now_s)
            assert actions == (Start("m/decode/0", incarnation + 1, DECODE),)
    assert waits == [1.0, 2.0]
    replica = state.replicas["m/decode/0"]
    assert (replica.phase, replica.failure) == (Phase.FAILED, "crash 3")
    assert _run(state, 1e9)[1] == ()


def test_one_that_becomes_ready_each_time_is_never_given_up_however_often_it_is_lost() -> None:
    """Its host may be cut off and vanish, all within seconds; that it waits ever longer is enough."""
    state, _ = _run(PoolsState(desired={DECODE: 1}))
    now_s, waits = 0.0, []
    for incarnation in range(1, 9):
        state = became_ready(state, "m/decode/0", incarnation, now_s)
        state = lost(state, Loss("m/decode/0", incarnation, "its host vanished"), now_s + 1.0, POLICY)
        wake = wake_at_s(state)
        assert wake is not None
        waits.append(wake - now_s - 1.0)
        state, actions = _run(state, now_s := wake)
        assert actions == (Start("m/decode/0", incarnation + 1, DECODE),)
    assert waits == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0, 8.0]
    for incarnation in (9, 10, 11):
        state = lost(state, Loss("m/decode/0", incarnation, "crash"), now_s, POLICY)
        state, _ = _run(state, now_s := now_s + 100.0)
    assert state.replicas["m/decode/0"].phase is Phase.FAILED


def test_a_worker_that_ran_long_is_restarted_at_once() -> None:
    state, _ = _run(PoolsState(desired={DECODE: 1}))
    state = became_ready(state, "m/decode/0", 1, 5.0)
    state = lost(state, Loss("m/decode/0", 1, "killed"), 35.0, POLICY)
    assert _run(state, 35.0)[1] == (Start("m/decode/0", 2, DECODE),)


def test_a_permanent_failure_is_not_retried_until_scaled() -> None:
    state, _ = _run(PoolsState(desired={DECODE: 1}))
    state = lost(state, Loss("m/decode/0", 1, "no such model", permanent=True), 0.0, POLICY)
    assert _run(state, 1e9)[1] == ()
    assert _run(set_desired(state, {DECODE: 1}), 1.0)[1] == (Start("m/decode/0", 2, DECODE),)


def test_the_newest_ready_replica_leaves_first_and_its_slot_keeps_counting() -> None:
    state, _ = _run(PoolsState(desired={DECODE: 3}))
    for index in range(3):
        state = became_ready(state, f"m/decode/{index}", 1, 0.0)
    state, actions = _run(set_desired(state, {DECODE: 2}))
    assert actions == (Drain("m/decode/2", 1),)
    # While it drains, growing back waits: the leaving worker still holds its memory.
    state, actions = _run(set_desired(state, {DECODE: 3}))
    assert actions == ()
    state, actions = _run(became_drained(state, "m/decode/2", 1))
    assert actions == (Stop("m/decode/2", 1),)
    state, actions = _run(lost(state, Loss("m/decode/2", 1, "stopped"), 0.0, POLICY))
    assert actions == (Start("m/decode/2", 2, DECODE),)


def test_phases_that_leave_have_a_process() -> None:
    assert LEAVING < WITH_PROCESS


def _ready(**desired: int) -> PoolsState:
    """Pools in which everybody is ready."""
    state, _ = _run(PoolsState(desired={PREFILL: desired.get("prefill", 0), DECODE: desired.get("decode", 0)}))
    for replica in list(state.replicas.values()):
        state = became_ready(state, replica.worker_id, replica.incarnation, 0.0)
    return state


def test_a_roll_takes_one_after_the_other_and_always_has_enough() -> None:
    state, actions = _run(replace_workers(_ready(decode=2), ["m/decode/0", "m/decode/1"]))
    assert actions == (Start("m/decode/2", 1, DECODE),)
    state, actions = _run(became_ready(state, "m/decode/2", 1, 0.0))
    assert actions == (Drain("m/decode/0", 1),)
    state, actions = _run(became_drained(state, "m/decode/0", 1))
    assert actions == (Stop("m/decode/0", 1),)
    state, actions = _run(lost(state, Loss("m/decode/0", 1, "stopped"), 0.0, POLICY))
    assert actions == (Start("m/decode/0", 2, DECODE),)
    state, actions = _run(became_ready(state, "m/decode/0", 2, 0.0))
    assert actions == (Drain("m/decode/1", 1),)
    state, _ = _run(became_drained(state, "m/decode/1", 1))
    state, actions = _run(lost(state, Loss("m/decode/1", 1, "stopped"), 0.0, POLICY))
    assert actions == ()
    assert state.settled(DECODE)
    assert sorted(state.replicas) == ["m/decode/0", "m/decode/2"]


def test_where_no_successor_fits_in_one_of_several_leaves_first_and_a_single_one_stays() -> None:
    state, _ = _run(replace_workers(_ready(decode=2), ["m/decode/0"]))
    state, actions = _run(lost(state, Loss("m/decode/2", 1, "no room"), 0.0, POLICY))
    assert actions == (Drain("m/decode/0", 1),)
    state, _ = _run(became_drained(state, "m/decode/0", 1))
    state = lost(state, Loss("m/decode/0", 1, "stopped"), 0.0, POLICY)
    _, actions = _run(state, 1.0)
    assert actions == (Start("m/decode/2", 2, DECODE),)

    state, _ = _run(replace_workers(_ready(decode=1), ["m/decode/0"]))
    _, actions = _run(lost(state, Loss("m/decode/1", 1, "no room"), 0.0, POLICY))
    assert actions == ()


def test_a_worker_that_dies_while_it_is_replaced_is_replaced_by_that() -> None:
    state, _ = _run(replace_workers(_ready(decode=1), ["m/decode/0"]))
    state, actions = _run(lost(state, Loss("m/decode/0", 1, "killed"), 0.0, POLICY))
    assert actions == ()  # its successor is on its way already
    assert _run(became_ready(state, "m/decode/1", 1, 0.0))[0].settled(DECODE)


def test_a_flip_drains_first_and_then_hands_the_process_on() -> None:
    state, actions = _run(flip(_ready(prefill=2, decode=1), "m/prefill/1", DECODE))
    assert actions == (Drain("m/prefill/1", 1),)
    assert (state.desired[PREFILL], state.desired[DECODE]) == (1, 2)
    state, actions = _run(became_drained(state, "m/prefill/1", 1))
    assert actions == (Flip("m/prefill/1", 1, Start("m/decode/1", 1, DECODE)),)
    state, actions = _run(became_ready(state, "m/decode/1", 1, 0.0))
    assert actions == ()
    assert state.settled(PREFILL)
    assert state.settled(DECODE)


def test_a_worker_that_dies_before_its_flip_is_started_anew_in_the_other_pool() -> None:
    state, _ = _run(flip(_ready(prefill=2, decode=1), "m/prefill/1", DECODE))
    _, actions = _run(lost(state, Loss("m/prefill/1", 1, "killed"), 0.0, POLICY))
    assert actions == (Start("m/decode/1", 1, DECODE),)


def test_a_flip_that_is_no_longer_wanted_ends_the_worker() -> None:
    state, _ = _run(flip(_ready(prefill=2, decode=1), "m/prefill/1", DECODE))
    state, actions = _run(set_desired(state, {DECODE: 1}))
    assert actions == ()
    _, actions = _run(became_drained(state, "m/prefill/1", 1))
    assert actions == (Stop("m/prefill/1", 1),)
