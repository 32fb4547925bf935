"""What happens before a dispatch, for any order of events, against a model that keeps lists; wrong desks must be caught."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from common.config import AdmissionConfig
from router.admission.bands import Band
from router.admission.desk import Desk, Granted, Reason, Turn
from router.admission.forecast import Room
from router.admission.queue import FairQueue, Item

INTERACTIVE, BATCH, BACKGROUND = Band
RANK = {band: rank for rank, band in enumerate(Band)}
OVERDUE_S = 20.0


def item(serial: int, **more: object) -> Item:
    plain = Item(
        serial=serial,
        tenant="a",
        weight=1.0,
        band=INTERACTIVE,
        prompt_tokens=10,
        room_tokens=20,
        sequences=1,
        arrived_s=0.0,
        deadline_s=1000.0,
    )
    return replace(plain, **more)  # type: ignore[arg-type]


def served_at(desk: Desk, *serials: int, every_s: float, room: Room) -> float:
    """Ends one after the other; returns when the last one ended."""
    now_s = 0.0
    for serial in serials:
        now_s += every_s
        desk.started(serial, 0, now_s)
        desk.finished(serial, now_s)
        desk.turn(now_s, room)
    return now_s


# -- one rule at a time ------------------------------------------------------------------------------------------------


def test_nothing_is_limited_that_is_not_known() -> None:
    desk = Desk(AdmissionConfig())
    for serial in range(5):
        assert desk.arrive(item(serial, room_tokens=10**9), 0.0, None, None).refusal is None
        assert [one.item.serial for one in desk.turn(0.0, None).granted] == [serial]


def test_nobody_overtakes_a_large_one_that_does_not_fit() -> None:
    desk, room = Desk(AdmissionConfig()), Room(100, 10)
    for serial, tokens in enumerate([60, 90, 10]):
        desk.arrive(item(serial, room_tokens=tokens), 0.0, room, None)
    assert [one.item.serial for one in desk.turn(0.0, room).granted] == [0]
    desk.finished(0, 1.0)
    assert [one.item.serial for one in desk.turn(1.0, room).granted] == [1, 2]


def test_one_that_is_larger_than_all_room_goes_alone() -> None:
    desk, room = Desk(AdmissionConfig()), Room(100, 10)
    for serial, tokens in enumerate([50, 5000, 50]):
        desk.arrive(item(serial, room_tokens=tokens), 0.0, room, None)
    assert [one.item.serial for one in desk.turn(0.0, room).granted] == [0]
    desk.finished(0, 1.0)
    assert [one.item.serial for one in desk.turn(1.0, room).granted] == [1]
    desk.finished(1, 2.0)
    assert [one.item.serial for one in desk.turn(2.0, room).granted] == [2]


def test_sequences_are_room_as_well() -> None:
    desk, room = Desk(AdmissionConfig()), Room(10**9, 4)
    for serial, sequences in enumerate([3, 2, 1]):
        desk.arrive(item(serial, sequences=sequences), 0.0, room, None)
    assert [one.item.serial for one in desk.turn(0.0, room).granted] == [0]


def test_a_full_queue_lets_the_lower_band_go_first() -> None:
    desk, room = Desk(AdmissionConfig(max_queued_requests=3)), Room(0, 1)
    desk.arrive(item(0), 0.0, room, None)
    desk.turn(0.0, room)
    for serial, band in ((1, BACKGROUND), (2, BATCH), (3, BACKGROUND)):
        assert desk.arrive(item(serial, band=band), 0.0, room, None).put_out == ()
    assert [one.serial for one in desk.arrive(item(4, band=INTERACTIVE), 0.0, room, None).put_out] == [3]
    assert [one.serial for one in desk.arrive(item(5, band=BATCH), 0.0, room, None).put_out] == [1]
    refusal = desk.arrive(item(6, band=BACKGROUND), 0.0, room, None).refusal
    assert refusal is not None
    assert refusal.reason is Reason.QUEUE_FULL


def test_in_a_full_band_who_has_most_waiting_gives_way() -> None:
    desk, room = Desk(AdmissionConfig(max_queued_tokens=100)), Room(0, 1)
    desk.arrive(item(0), 0.0, room, None)
    desk.turn(0.0, room)
    for serial in range(1, 6):
        assert desk.arrive(item(serial, tenant="loud"), 0.0, room, None).refusal is None
    assert desk.arrive(item(6, tenant="loud"), 0.0, room, None).refusal is not None
    assert [one.serial for one in desk.arrive(item(7, tenant="quiet"), 0.0, room, None).put_out] == [5]
    # 80 : 20. Twenty more tokens make it 60 : 40, and then the next would have more than the one that gives way.
    assert [one.serial for one in desk.arrive(item(8, tenant="quiet"), 0.0, room, None).put_out] == [4]
    assert desk.arrive(item(9, tenant="quiet"), 0.0, room, None).refusal is not None


def test_who_cannot_be_given_a_place_puts_nobody_out() -> None:
    desk, room = Desk(AdmissionConfig(max_queued_tokens=100)), Room(0, 1)
    desk.arrive(item(0), 0.0, room, None)
    desk.turn(0.0, room)
    desk.arrive(item(1, band=BACKGROUND), 0.0, room, None)
    for serial in range(2, 6):
        desk.arrive(item(serial), 0.0, room, None)
    assert desk.arrive(item(6, room_tokens=60), 0.0, room, None).refusal is not None
    assert len(desk.queue) == 5


def test_an_expired_one_is_dropped_when_its_turn_comes() -> None:
    desk, room = Desk(AdmissionConfig()), Room(20, 1)
    desk.arrive(item(0), 0.0, room, None)
    desk.turn(0.0, room)
    desk.arrive(item(1, deadline_s=5.0), 0.0, room, None)
    desk.arrive(item(2), 0.0, room, None)
    desk.finished(0, 5.0)
    turn = desk.turn(5.0, room)
    assert [one.serial for one in turn.expired] == [1]
    assert [one.item.serial for one in turn.granted] == [2]


# -- promises ----------------------------------------------------------------------------------------------------------


def a_desk_that_serves_one_per_second(**config: object) -> tuple[Desk, Room, float]:
    """Twenty tokens of room, requests of twenty tokens, the first token at the end; six more are still waiting."""
    desk, room = Desk(AdmissionConfig.model_validate(config)), Room(20, 1)
    for serial in range(26):
        desk.arrive(item(serial), 0.0, room, None)
        desk.turn(0.0, room)
    return desk, room, served_at(desk, *range(20), every_s=1.0, room=room)


def test_the_rate_of_service_is_learnt() -> None:
    desk, _, now_s = a_desk_that_serves_one_per_second()
    assert desk.rate.tokens_per_s == pytest.approx(20)
    # Five wait and one is out: the sixth after it begins in six seconds, and takes one.
    predicted_s = desk.predicted_ttft_s(item(99, arrived_s=now_s), None)
    assert predicted_s == pytest.approx(7.0, rel=0.05)


@pytest.mark.parametrize(("promised_s", "refused"), [(4.0, True), (8.0, False)])
def test_what_would_miss_its_promise_is_refused_at_once(promised_s: float, refused: bool) -> None:
    desk, room, now_s = a_desk_that_serves_one_per_second(ttft_slo_s={"interactive": promised_s}, slo_slack=0.0)
    waiting = len(desk.queue)
    arrival = desk.arrive(item(99, arrived_s=now_s), now_s, room, None)
    assert (arrival.refusal is not None) == refused
    if arrival.refusal is not None:
        assert arrival.refusal.reason is Reason.FORECAST
        assert arrival.refusal.retry_after_s == pytest.approx(7.0 - promised_s, rel=0.1)
        assert len(desk.queue) == waiting


def test_a_quiet_tenant_is_not_refused_for_a_loud_one() -> None:
    desk, room, now_s = a_desk_that_serves_one_per_second(ttft_slo_s={"interactive": 4.0}, slo_slack=0.0)
    assert desk.arrive(item(99, tenant="quiet", arrived_s=now_s), now_s, room, None).refusal is None


def test_bands_without_a_promise_are_not_refused_and_wait_behind() -> None:
    desk, room, now_s = a_desk_that_serves_one_per_second(ttft_slo_s={"interactive": 4.0}, slo_slack=0.0)
    assert desk.arrive(item(99, band=BATCH, arrived_s=now_s), now_s, room, None).refusal is None


def test_a_forecast_of_placement_is_taken_over_what_was_learnt() -> None:
    desk, room = Desk(AdmissionConfig(ttft_slo_s={"interactive": 1.0})), Room(100, 10)
    assert desk.arrive(item(0), 0.0, room, 5.0).refusal is None, "nobody waits before it: how else would we learn"
    desk.turn(0.0, room)
    assert desk.arrive(item(1), 0.0, room, 5.0).refusal is not None
    assert desk.arrive(item(2), 0.0, room, 0.5).refusal is None


def test_a_forecast_that_is_out_of_date_locks_nobody_out() -> None:
    desk, room, now_s = a_desk_that_serves_one_per_second(ttft_slo_s={"interactive": 4.0}, slo_slack=0.0)
    assert desk.arrive(item(98, arrived_s=now_s), now_s, room, None).refusal is not None
    for serial in range(20, 26):
        now_s += 1
        desk.started(serial, 0, now_s)
        desk.finished(serial, now_s)
        desk.turn(now_s, room)
    assert desk.arrive(item(99, arrived_s=now_s), now_s, room, None).refusal is None


def test_predictions_that_are_off_are_corrected() -> None:
    """The first token takes twice as long as it should, by the rate: nine in ten of what is let in come in time after a while."""
    desk = Desk(AdmissionConfig(ttft_slo_s={"interactive": 1e9}))
    for step in range(300):
        desk.rate.happened(1.0, 2.0 if step % 10 else 3.0)
    assert 2.0 <= desk.rate.error <= 3.2


# -- any order of events -----------------------------------------------------------------------------------------------

MAX_REQUESTS, MAX_TOKENS = 6, 300
TENANTS = {"a": 1.0, "b": 1.0, "c": 2.5}


class Admission(RuleBasedStateMachine):
    desk_class: type[Desk] = Desk

    @initialize(tokens=st.sampled_from([60, 150, 400]), sequences=st.sampled_from([2, 5]), every=st.sampled_from([0, 2, 4]))
    def start(self, tokens: int, sequences: int, every: int) -> None:
        self.room: Room | None = Room(tokens, sequences)
        config = AdmissionConfig(
            max_queued_requests=MAX_REQUESTS, max_queued_tokens=MAX_TOKENS, overdue_s=OVERDUE_S, overdue_every=every
        )
        self.desk = self.desk_class(config)
        self.every = every
        self.now_s = 100.0
        self.serial = 0
        self.waiting: dict[int, Item] = {}
        self.out: dict[int, Item] = {}
        self.ended: set[int] = set()
        self.strict_run = 0  # dispatches since one out of order of bands

    @rule(
        tenant=st.sampled_from(sorted(TENANTS)),
        band=st.sampled_from(list(Band)),
        prompt=st.sampled_from([1, 20, 90]),
        output=st.sampled_from([1, 40]),
        sequences=st.sampled_from([1, 1, 3]),
        time_s=st.sampled_from([1.0, 30.0, 500.0]),
    )
    def arrive(self, tenant: str, band: Band, prompt: int, output: int, sequences: int, time_s: float) -> None:
        one = Item(
            serial=self.serial,
            tenant=tenant,
            weight=TENANTS[tenant],
            band=band,
            prompt_tokens=prompt,
            room_tokens=prompt + output * sequences,
            sequences=sequences,
            arrived_s=self.now_s,
            deadline_s=self.now_s + time_s,
        )
        self.serial += 1
        fits_at_once = not self.waiting and self.fits(one)
        arrival = self.desk.arrive(one, self.now_s, self.room, None)
        for other in arrival.put_out:
            assert RANK[other.band] > RANK[band] or (other.band is band and other.tenant != tenant), "somebody better was put out"
            self.end(self.waiting.pop(other.serial))
        if arrival.refusal is not None:
            assert arrival.refusal.reason is Reason.QUEUE_FULL
            assert arrival.put_out == ()
            full = len(self.waiting) + 1 > MAX_REQUESTS
            full |= sum(other.room_tokens for other in self.waiting.values()) + one.room_tokens > MAX_TOKENS
            assert full
            assert not fits_at_once
            self.end(one)
        else:
            self.waiting[one.serial] = one
        self.turn()

    def turn(self) -> None:
        self.check(self.desk.turn(self.now_s, self.room))
        if self.waiting:
            assert not any(self.fits(one) for one in self.heads()), "somebody waits although it is its turn and there is room"

    def check(self, turn: Turn) -> None:
        for one in turn.expired:
            assert one.deadline_s <= self.now_s
            self.end(self.waiting.pop(one.serial))
        for granted in turn.granted:
            self.check_granted(granted)

    def check_granted(self, granted: Granted) -> None:
        one = granted.item
        assert one.deadline_s > self.now_s, "its time is over"
        assert self.fits(one), "there is no room for it"
        same = [other for other in self.waiting.values() if (other.band, other.tenant) == (one.band, one.tenant)]
        alive = [other for other in same if other.deadline_s > self.now_s]
        assert min((other.deadline_s, other.serial) for other in alive) == (one.deadline_s, one.serial), (
            "another is due before it"
        )
        higher = [other for other in self.waiting.values() if RANK[other.band] < RANK[one.band]]
        if any(other.deadline_s > self.now_s for other in higher):
            assert granted.overdue, "a higher band waits"
            assert self.every
            assert self.strict_run >= self.every - 1
            oldest_s = min(other.arrived_s for other in self.waiting.values() if other.band is one.band)
            assert self.now_s - oldest_s >= OVERDUE_S
        self.strict_run = 0 if granted.overdue else self.strict_run + 1
        self.out[one.serial] = self.waiting.pop(one.serial)

    def heads(self) -> list[Item]:
        """Whose turn it may be: the first of a tenant of the highest band."""
        if self.every:
            return []
        highest = min((one.band for one in self.waiting.values()), key=RANK.__getitem__)
        lines: dict[str, Item] = {}
        for one in sorted(self.waiting.values(), key=lambda one: (one.deadline_s, one.serial)):
            if one.band is highest:
                lines.setdefault(one.tenant, one)
        return list(lines.values()) if len(lines) == 1 else []

    def fits(self, one: Item) -> bool:
        if self.room is None or not self.out:
            return True
        tokens = sum(other.room_tokens for other in self.out.values()) + one.room_tokens
        sequences = sum(other.sequences for other in self.out.values()) + one.sequences
        return tokens <= self.room.tokens and sequences <= self.room.sequences

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def a_client_leaves(self, data: st.DataObject) -> None:
        serial = data.draw(st.sampled_from(sorted(self.waiting)))
        left = self.desk.leave(serial, self.now_s)
        assert left == self.waiting[serial]
        assert self.desk.leave(serial, self.now_s) is None
        self.end(self.waiting.pop(serial))
        self.turn()

    @precondition(lambda self: self.out)
    @rule(data=st.data(), tokens=st.integers(0, 30), cached=st.sampled_from([0, 5, 1000]))
    def one_ends(self, data: st.DataObject, tokens: int, cached: int) -> None:
        serial = data.draw(st.sampled_from(sorted(self.out)))
        if tokens:
            self.desk.started(serial, cached, self.now_s)
            self.desk.generated(serial, tokens)
        assert self.desk.leave(serial, self.now_s) is None, "it is out, and does not wait"
        self.desk.finished(serial, self.now_s)
        self.end(self.out.pop(serial))
        self.turn()

    @rule(seconds=st.sampled_from([0.1, 5.0, 25.0]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        self.turn()

    @rule(tokens=st.sampled_from([60, 150, 400, None]))
    def workers_change(self, tokens: int | None) -> None:
        self.room = None if tokens is None else Room(tokens, 4)
        self.turn()

    def end(self, one: Item) -> None:
        assert one.serial not in self.ended, "it ends twice"
        self.ended.add(one.serial)

    @invariant()
    def nobody_is_lost(self) -> None:
        if not hasattr(self, "desk"):
            return
        assert {*self.waiting, *self.out, *self.ended} == set(range(self.serial))
        assert len(self.desk.queue) == len(self.waiting)
        assert all(serial in self.desk.queue for serial in self.waiting)
        assert self.desk.tokens_out == sum(one.room_tokens for one in self.out.values())
        assert self.desk.sequences_out == sum(one.sequences for one in self.out.values())
        assert self.desk.queue.all_room_tokens == sum(one.room_tokens for one in self.waiting.values())
        for band in Band:
            of_band = [one for one in self.waiting.values() if one.band is band]
            assert self.desk.queue.num_items(band) == len(of_band)
            oldest = self.desk.queue.oldest(band)
            assert (None if oldest is None else oldest.serial) == min((one.serial for one in of_band), default=None)

    @invariant()
    def the_queue_is_bounded(self) -> None:
        if hasattr(self, "desk"):
            assert len(self.waiting) <= MAX_REQUESTS
            assert len(self.waiting) < 2 or sum(one.room_tokens for one in self.waiting.values()) <= MAX_TOKENS


MACHINE_SETTINGS = settings(
    max_examples=150,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
Admission.TestCase.settings = MACHINE_SETTINGS
TestAdmission = Admission.TestCase


class ForgetsTheRoomOfWhatEnded(Desk):
    def finished(self, serial: int, now_s: float) -> None:
        kept = self.tokens_out
        super().finished(serial, now_s)
        self.tokens_out = kept


class ServesTheExpired(Desk):
    def turn(self, now_s: float, room: Room | None) -> Turn:
        return super().turn(now_s - 40.0, room)


class HasNoBounds(Desk):
    def _make_place(self, item: Item) -> tuple[Item, ...]:
        return ()


class _Newest(FairQueue):
    def head(self, now_s: float) -> Item | None:
        band = self._next_band(now_s)
        return None if band is None else next(reversed(self._bands[band].items.values()))


class ServesTheNewest(Desk):
    def __init__(self, config: AdmissionConfig) -> None:
        super().__init__(config)
        self.queue.__class__ = _Newest


class _Bandless(FairQueue):
    def _next_band(self, now_s: float) -> Band | None:
        return next((band for band in reversed(Band) if self._bands[band].items), None)


class ServesTheLowestFirst(Desk):
    def __init__(self, config: AdmissionConfig) -> None:
        super().__init__(config)
        self.queue.__class__ = _Bandless


class ServesWithoutRoom(Desk):
    def _fits(self, item: Item, room: Room | None) -> bool:
        return room is None or self.sequences_out + item.sequences <= room.sequences or not self._out


class PutsOutAnybody(Desk):
    def _victims(self, item: Item):  # type: ignore[no-untyped-def]
        for band in self.queue.lowest_first():
            yield from self.queue.by_length(band)


@pytest.mark.long
@pytest.mark.parametrize(
    "mutant",
    [
        ForgetsTheRoomOfWhatEnded,
        ServesTheExpired,
        HasNoBounds,
        ServesTheNewest,
        ServesTheLowestFirst,
        ServesWithoutRoom,
        PutsOutAnybody,
    ],
)
def test_the_model_catches(mutant: type[Desk]) -> None:
    class Wrong(Admission):
        desk_class = mutant

    with pytest.raises((AssertionError, KeyError)):
        run_state_machine_as_test(
            Wrong, settings=settings(MACHINE_SETTINGS, max_examples=2000, phases=[Phase.generate], derandomize=True)
        )
