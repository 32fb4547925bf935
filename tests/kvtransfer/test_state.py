"""The state machine of incoming transfers against a model that remembers what really happened; wrong machines must be caught."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from common.clock import ManualClock
from common.errors import (
    DigestMismatch,
    IllegalTransition,
    SealMismatch,
    TicketRefused,
    TransferBroken,
    TransferTimeout,
)
from common.types import Ticket
from kvtransfer.state import TRANSITIONS, Arrival, HandoffState, IncomingTransfer, Seal

NONCE = b"n" * 16
FIRST = 3


def digest_of(logical_block: int, version: int = 0) -> bytes:
    return bytes([logical_block, version]) * 8


def ticket(num_blocks: int) -> Ticket:
    return Ticket(
        nonce=NONCE,
        request_id="r",
        attempt=0,
        decode_worker_id="d",
        decode_incarnation=1,
        prefill_worker_id="p",
        prefill_incarnation=1,
        first_block=FIRST,
        blocks=tuple(range(100, 100 + num_blocks)),
        num_tokens=16 * (FIRST + num_blocks),
        layout_fingerprint=b"f" * 32,
        ttl_s=10.0,
    )


def good_seal(num_blocks: int) -> Seal:
    return Seal(NONCE, 16 * (FIRST + num_blocks), {FIRST + index: digest_of(FIRST + index) for index in range(num_blocks)})


def streaming(num_blocks: int, clock: ManualClock | None = None) -> IncomingTransfer:
    transfer = IncomingTransfer(ticket(num_blocks), clock or ManualClock())
    transfer.offer()
    transfer.writer_opened()
    return transfer


def arrive_all(transfer: IncomingTransfer, num_blocks: int) -> None:
    for logical in range(FIRST, FIRST + num_blocks):
        assert transfer.block_arrived(logical, digest_of(logical), ok=True) is Arrival.VERIFIED


# -- the paths that are drawn in the docstring -------------------------------------------------------------------------


@pytest.mark.parametrize("seal_first", [True, False])
@pytest.mark.parametrize("close_before_seal", [True, False])
def test_a_healthy_transfer_becomes_active(seal_first: bool, close_before_seal: bool) -> None:
    transfer = streaming(2)
    if seal_first:
        transfer.sealed(good_seal(2))
        arrive_all(transfer, 2)
        assert transfer.state is HandoffState.SEALED  # its writer is still there
        transfer.writer_closed()
    else:
        arrive_all(transfer, 2)
        steps = [transfer.writer_closed, lambda: transfer.sealed(good_seal(2))]
        for step in steps if close_before_seal else reversed(steps):
            assert transfer.state not in (HandoffState.VERIFIED, HandoffState.ACTIVE)
            step()
    assert transfer.state is HandoffState.VERIFIED
    transfer.activate()
    with pytest.raises(IllegalTransition):
        transfer.take_back()


def test_no_blocks_need_no_writer() -> None:
    transfer = IncomingTransfer(ticket(0), ManualClock())
    transfer.offer()
    transfer.sealed(good_seal(0))
    assert transfer.state is HandoffState.VERIFIED


def test_repeating_the_seal_and_the_blocks_has_no_effect() -> None:
    transfer = streaming(1)
    transfer.sealed(good_seal(1))
    transfer.sealed(good_seal(1))
    arrive_all(transfer, 1)
    assert transfer.block_arrived(FIRST, digest_of(FIRST), ok=True) is Arrival.DUPLICATE
    transfer.writer_closed()
    assert transfer.state is HandoffState.VERIFIED


@pytest.mark.parametrize(
    "seal",
    [
        replace(good_seal(2), nonce=b"m" * 16),
        replace(good_seal(2), num_tokens=1),
        replace(good_seal(2), num_tokens=16 * (FIRST + 2) - 1),
        replace(good_seal(2), digests={}),
        replace(good_seal(2), digests={FIRST: digest_of(FIRST)}),
        replace(good_seal(2), digests=good_seal(3).digests),
        replace(good_seal(2), digests={FIRST: digest_of(FIRST), FIRST + 1: digest_of(FIRST)}),
    ],
)
@pytest.mark.parametrize("blocks_first", [True, False])
def test_a_seal_that_does_not_add_up_poisons(seal: Seal, blocks_first: bool) -> None:
    transfer = streaming(2)
    if blocks_first:
        arrive_all(transfer, 2)
        with pytest.raises(SealMismatch):
            transfer.sealed(seal)
    else:
        try:
            transfer.sealed(seal)
        except SealMismatch:
            pass
        else:
            assert transfer.block_arrived(FIRST, digest_of(FIRST), ok=True) is Arrival.VERIFIED
            assert transfer.block_arrived(FIRST + 1, digest_of(FIRST + 1), ok=True) is Arrival.REFUSED
    assert transfer.state is HandoffState.POISONED
    assert isinstance(transfer.error, SealMismatch)
    transfer.writer_closed()
    assert transfer.take_back() == (100, 101)


def test_a_seal_without_a_writer_is_refused() -> None:
    transfer = IncomingTransfer(ticket(1), ManualClock())
    transfer.offer()
    with pytest.raises(SealMismatch):
        transfer.sealed(good_seal(1))


def test_two_different_seals_poison() -> None:
    transfer = streaming(1)
    transfer.sealed(good_seal(1))
    with pytest.raises(SealMismatch):
        transfer.sealed(replace(good_seal(1), digests={FIRST: digest_of(FIRST, 1)}))


@pytest.mark.parametrize(
    ("logical", "digest", "ok", "error"),
    [
        (FIRST, digest_of(FIRST), False, DigestMismatch),
        (FIRST - 1, digest_of(FIRST), True, TicketRefused),
        (FIRST + 2, digest_of(FIRST), True, TicketRefused),
    ],
)
def test_a_wrong_block_poisons(logical: int, digest: bytes, ok: bool, error: type[Exception]) -> None:
    transfer = streaming(2)
    assert transfer.block_arrived(logical, digest, ok) is Arrival.REFUSED
    assert isinstance(transfer.error, error)
    with pytest.raises(error):
        transfer.sealed(good_seal(2))


def test_two_contents_for_one_block_poison() -> None:
    transfer = streaming(2)
    arrive_all(transfer, 1)
    assert transfer.block_arrived(FIRST, digest_of(FIRST, 1), ok=True) is Arrival.REFUSED
    assert isinstance(transfer.error, DigestMismatch)


@pytest.mark.parametrize("sealed", [True, False])
def test_a_writer_that_stops_early_is_noticed_at_once(sealed: bool) -> None:
    transfer = streaming(2)
    arrive_all(transfer, 1)
    if sealed:
        transfer.sealed(good_seal(2))
    transfer.writer_closed()
    assert isinstance(transfer.error, SealMismatch if sealed else TransferBroken)
    assert transfer.state is HandoffState.DRAINED


def test_time_runs_out() -> None:
    clock = ManualClock(5.0)
    transfer = streaming(1, clock)
    transfer.expire(14.9)
    assert transfer.state is HandoffState.STREAMING
    transfer.expire(15.0)
    assert isinstance(transfer.error, TransferTimeout)
    assert transfer.state is HandoffState.POISONED


def test_a_late_or_second_writer_is_not_let_in() -> None:
    clock = ManualClock()
    late = IncomingTransfer(ticket(1), clock)
    late.offer()
    clock.advance(10.0)
    with pytest.raises(TicketRefused):
        late.writer_opened()
    with pytest.raises(TicketRefused):
        streaming(1).writer_opened()
    cancelled = IncomingTransfer(ticket(1), ManualClock())
    cancelled.offer()
    cancelled.cancel()
    with pytest.raises(TicketRefused):
        cancelled.writer_opened()
    assert cancelled.take_back() == (100,)


def test_blocks_of_a_cancelled_transfer_wait_for_the_writer() -> None:
    transfer = streaming(2)
    arrive_all(transfer, 1)
    transfer.cancel()
    assert transfer.block_arrived(FIRST + 1, digest_of(FIRST + 1), ok=True) is Arrival.LATE
    assert transfer.wants(FIRST + 1) is None
    with pytest.raises(IllegalTransition):
        transfer.take_back()
    transfer.writer_closed()
    assert transfer.take_back() == (100, 101)
    with pytest.raises(IllegalTransition):
        transfer.take_back()


def test_only_wanted_blocks_have_a_place() -> None:
    transfer = streaming(2)
    assert [transfer.wants(logical) for logical in range(FIRST - 1, FIRST + 3)] == [None, 100, 101, None]
    arrive_all(transfer, 1)
    assert transfer.wants(FIRST) is None  # verified: not to be overwritten


def test_every_state_is_in_the_table_and_can_be_reached() -> None:
    assert set(TRANSITIONS) == set(HandoffState)
    reached = {HandoffState.RESERVED}
    while True:
        grown = reached.union(*(TRANSITIONS[state] for state in reached))
        if grown == reached:
            break
        reached = grown
    assert reached == set(HandoffState)


# -- any order of events, against a model ------------------------------------------------------------------------------


class Handoff(RuleBasedStateMachine):
    """The model keeps only facts: who may write, which bytes really arrived right, what the seal said."""

    transfer_class: type[IncomingTransfer] = IncomingTransfer

    @initialize(num_blocks=st.integers(0, 3), writer_comes_at_once=st.booleans())
    def start(self, num_blocks: int, writer_comes_at_once: bool) -> None:
        self.num_blocks = num_blocks
        self.clock = ManualClock()
        self.transfer = self.transfer_class(ticket(num_blocks), self.clock)
        self.writer = False
        self.right: dict[int, bytes] = {}  # arrived with intact bytes while the writer was open
        self.anything_wrong = False
        self.seal: Seal | None = None
        self.given_up = False
        self.transfer.offer()
        if writer_comes_at_once:
            self.writer_comes()

    @rule()
    def writer_comes(self) -> None:
        try:
            self.transfer.writer_opened()
        except TicketRefused:
            return
        assert not self.writer
        assert not self.given_up
        assert self.clock.monotonic_s() < 10.0
        self.writer = True

    @rule()
    def next_block(self) -> None:
        self.block(min({*range(self.num_blocks)} - {logical - FIRST for logical in self.right}, default=0), 0, True)

    @rule(offset=st.integers(0, 1))
    def some_block(self, offset: int) -> None:
        self.block(offset, 0, True)

    @precondition(lambda self: self.writer)
    @rule(offsets=st.lists(st.integers(0, 2), max_size=4))
    def a_burst_and_gone(self, offsets: list[int]) -> None:
        for offset in offsets:
            self.block(min(offset, self.num_blocks - 1), 0, True)
        self.good_seal()
        self.writer_goes()

    @rule(bad=st.sampled_from([(-1, 0, True), (9, 0, True), (0, 1, True), (1, 1, True), (0, 0, False), (1, 0, False)]))
    def bad_block(self, bad: tuple[int, int, bool]) -> None:
        self.block(*bad)

    def block(self, offset: int, version: int, ok: bool) -> None:
        logical = FIRST + offset
        undecided = self.transfer.state in (HandoffState.STREAMING, HandoffState.SEALED)
        arrival = self.transfer.block_arrived(logical, digest_of(logical, version), ok)
        inside = 0 <= offset < self.num_blocks
        if not self.writer or not undecided:
            assert arrival is Arrival.LATE
        elif not inside or not ok or self.right.get(logical, digest_of(logical, version)) != digest_of(logical, version):
            assert arrival is Arrival.REFUSED
            self.anything_wrong = True
        elif arrival is Arrival.REFUSED:
            assert self.seal is not None
            assert self.seal.digests[logical] != digest_of(logical, version)
            self.anything_wrong = True
        else:
            assert arrival is (Arrival.DUPLICATE if logical in self.right else Arrival.VERIFIED)
            self.right[logical] = digest_of(logical, version)

    @rule()
    def good_seal(self) -> None:
        self.seal_comes(0, 0, 0)

    @rule(bad=st.sampled_from([(1, 0, 0), (-16, 0, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1)]))
    def bad_seal(self, bad: tuple[int, int, int]) -> None:
        self.seal_comes(*bad)

    def seal_comes(self, more_tokens: int, version: int, more_blocks: int) -> None:
        logical_blocks = range(FIRST, FIRST + self.num_blocks + more_blocks)
        num_tokens = 16 * (FIRST + self.num_blocks) + more_tokens
        seal = Seal(NONCE, num_tokens, {logical: digest_of(logical, version) for logical in logical_blocks})
        try:
            self.transfer.sealed(seal)
        except (SealMismatch, DigestMismatch, TicketRefused, TransferBroken, TransferTimeout):
            self.anything_wrong = True
        except IllegalTransition:
            assert self.given_up
        else:
            assert self.seal is None or self.seal == seal
            self.seal = seal

    @precondition(lambda self: self.writer)
    @rule()
    def writer_goes(self) -> None:
        self.writer = False
        self.transfer.writer_closed()

    @rule()
    def cancel(self) -> None:
        self.transfer.cancel()
        self.given_up = True

    @rule(seconds=st.floats(0.1, 6.0))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.transfer.expire(self.clock.monotonic_s())

    @rule()
    def use(self) -> None:
        try:
            self.transfer.activate()
        except IllegalTransition:
            return
        self.check_usable()

    @rule()
    def take_back(self) -> None:
        try:
            blocks = self.transfer.take_back()
        except IllegalTransition:
            return
        assert not self.writer, "a block was freed while a writer may write to it"
        assert blocks == tuple(range(100, 100 + self.num_blocks))

    def check_usable(self) -> None:
        assert not self.writer, "KV is used while a writer may write to it"
        assert self.seal is not None
        assert self.seal.num_tokens == 16 * (FIRST + self.num_blocks)
        assert self.right == dict(self.seal.digests), "KV is used that did not arrive as sealed"
        assert set(self.right) == set(range(FIRST, FIRST + self.num_blocks))

    @invariant()
    def no_unverified_kv_is_used(self) -> None:
        if self.transfer.state in (HandoffState.VERIFIED, HandoffState.ACTIVE):
            self.check_usable()

    @invariant()
    def nothing_is_free_under_a_writer(self) -> None:
        if self.transfer.state in (HandoffState.DRAINED, HandoffState.FREE):
            assert not self.writer, "a block counts as free while a writer may write to it"

    @invariant()
    def the_machine_is_not_stuck(self) -> None:
        if self.seal is not None and self.right == dict(self.seal.digests) and not self.writer and not self.given_up:
            assert (
                self.anything_wrong or self.transfer.error or self.transfer.state in (HandoffState.VERIFIED, HandoffState.ACTIVE)
            )


MODEL_SETTINGS = settings(
    max_examples=400,
    stateful_step_count=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
Handoff.TestCase.settings = MODEL_SETTINGS
TestHandoff = Handoff.TestCase


class SkipsTheDigest(IncomingTransfer):
    def block_arrived(self, logical_block: int, digest: bytes, ok: bool) -> Arrival:
        return super().block_arrived(logical_block, digest, True)


class CountsBlocks(IncomingTransfer):
    arrivals = 0

    def block_arrived(self, logical_block: int, digest: bytes, ok: bool) -> Arrival:
        arrival = super().block_arrived(logical_block, digest, ok)
        self.arrivals += arrival in (Arrival.VERIFIED, Arrival.DUPLICATE)
        return arrival

    @property
    def complete(self) -> bool:
        return self.arrivals >= len(self.expected)


class FreesOnAbort(IncomingTransfer):
    def _drain_if_alone(self) -> None:
        if self.state in (HandoffState.POISONED, HandoffState.CANCELLED):
            self._move(HandoffState.DRAINED)


class UsesBeforeTheWriterIsGone(IncomingTransfer):
    def _verify_if_complete(self) -> None:
        if self.state is HandoffState.SEALED and self.complete:
            self._move(HandoffState.VERIFIED)


class BelievesAnySeal(IncomingTransfer):
    def _complaint_about(self, seal: Seal) -> str | None:
        return None


@pytest.mark.parametrize("mutant", [SkipsTheDigest, CountsBlocks, FreesOnAbort, UsesBeforeTheWriterIsGone, BelievesAnySeal])
def test_the_model_catches(mutant: type[IncomingTransfer]) -> None:
    class Wrong(Handoff):
        transfer_class = mutant

    with pytest.raises((AssertionError, KeyError)):
        run_state_machine_as_test(
            Wrong, settings=settings(MODEL_SETTINGS, max_examples=3000, phases=[Phase.generate], derandomize=True)
        )
