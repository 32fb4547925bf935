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
from kvtransfer.digest import block_digest_of
from kvtransfer.state import TRANSITIONS, UNDECIDED, Arrival, HandoffState, IncomingTransfer, Seal
from kvtransfer.transports.base import PieceName

NONCE = b"n" * 16
FIRST = 3
LAYERS = 2
LEASE_S = 4.0
WHOLE = ((0, LAYERS),)  # how a block may be cut into pieces: first layer, number of layers
BY_LAYER = tuple((layer, 1) for layer in range(LAYERS))


def digest_of(name: PieceName, version: int = 0) -> bytes:
    return bytes([*name, version]) * 4


def block_digest(logical_block: int, cut: tuple[tuple[int, int], ...] = WHOLE, version: int = 0) -> bytes:
    """What the seal states of a block that was cut so, and sent in this version."""
    return block_digest_of([(*part, digest_of(PieceName(logical_block, *part), version)) for part in cut])


def whole(logical_block: int) -> PieceName:
    return PieceName(logical_block, 0, LAYERS)


def new_transfer(num_blocks: int, clock: ManualClock | None = None) -> IncomingTransfer:
    return IncomingTransfer(ticket(num_blocks), clock or ManualClock(), num_layers=LAYERS, lease_s=LEASE_S)


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


def good_seal(num_blocks: int, cut: tuple[tuple[int, int], ...] = WHOLE) -> Seal:
    digests = {FIRST + index: block_digest(FIRST + index, cut) for index in range(num_blocks)}
    return Seal(NONCE, 16 * (FIRST + num_blocks), digests)


def streaming(num_blocks: int, clock: ManualClock | None = None) -> IncomingTransfer:
    transfer = new_transfer(num_blocks, clock)
    transfer.offer()
    transfer.writer_opened()
    return transfer


def arrive(transfer: IncomingTransfer, name: PieceName, version: int = 0) -> Arrival:
    return transfer.piece_arrived(name, digest_of(name, version), ok=True)


def arrive_all(transfer: IncomingTransfer, num_blocks: int, cut: tuple[tuple[int, int], ...] = WHOLE) -> None:
    for part in cut:
        for logical in range(FIRST, FIRST + num_blocks):
            assert arrive(transfer, PieceName(logical, *part)) is Arrival.VERIFIED


# -- the paths that are drawn in the docstring -------------------------------------------------------------------------


@pytest.mark.parametrize("seal_first", [True, False])
@pytest.mark.parametrize("close_before_seal", [True, False])
@pytest.mark.parametrize("cut", [WHOLE, BY_LAYER, BY_LAYER[::-1]])
def test_a_healthy_transfer_becomes_active(seal_first: bool, close_before_seal: bool, cut: tuple[tuple[int, int], ...]) -> None:
    transfer = streaming(2)
    seal = good_seal(2, tuple(sorted(cut)))
    if seal_first:
        transfer.sealed(seal)
        arrive_all(transfer, 2, cut)
        assert transfer.state is HandoffState.SEALED  # its writer is still there
        transfer.writer_closed()
    else:
        arrive_all(transfer, 2, cut)
        steps = [transfer.writer_closed, lambda: transfer.sealed(seal)]
        for step in steps if close_before_seal else reversed(steps):
            assert transfer.state not in (HandoffState.VERIFIED, HandoffState.ACTIVE)
            step()
    assert transfer.state is HandoffState.VERIFIED
    transfer.activate()
    with pytest.raises(IllegalTransition):
        transfer.take_back()


def test_no_blocks_need_no_writer() -> None:
    transfer = new_transfer(0)
    transfer.offer()
    transfer.sealed(good_seal(0))
    assert transfer.state is HandoffState.VERIFIED


def test_repeating_the_seal_and_the_blocks_has_no_effect() -> None:
    transfer = streaming(1)
    transfer.sealed(good_seal(1))
    transfer.sealed(good_seal(1))
    arrive_all(transfer, 1)
    assert arrive(transfer, whole(FIRST)) is Arrival.DUPLICATE
    transfer.writer_closed()
    assert transfer.state is HandoffState.VERIFIED


@pytest.mark.parametrize(
    "seal",
    [
        replace(good_seal(2), nonce=b"m" * 16),
        replace(good_seal(2), num_tokens=1),
        replace(good_seal(2), num_tokens=16 * (FIRST + 2) - 1),
        replace(good_seal(2), digests={}),
        replace(good_seal(2), digests={FIRST: block_digest(FIRST)}),
        replace(good_seal(2), digests=good_seal(3).digests),
        replace(good_seal(2), digests={FIRST: block_digest(FIRST), FIRST + 1: block_digest(FIRST)}),
        replace(good_seal(2), digests={FIRST: block_digest(FIRST), FIRST + 1: block_digest(FIRST + 1, BY_LAYER)}),
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
            assert arrive(transfer, whole(FIRST)) is Arrival.VERIFIED
            assert arrive(transfer, whole(FIRST + 1)) is Arrival.REFUSED
    assert transfer.state is HandoffState.POISONED
    assert isinstance(transfer.error, SealMismatch)
    transfer.writer_closed()
    assert transfer.take_back() == (100, 101)


def test_a_seal_without_a_writer_is_refused() -> None:
    transfer = new_transfer(1)
    transfer.offer()
    with pytest.raises(SealMismatch):
        transfer.sealed(good_seal(1))


def test_two_different_seals_poison() -> None:
    transfer = streaming(1)
    transfer.sealed(good_seal(1))
    with pytest.raises(SealMismatch):
        transfer.sealed(replace(good_seal(1), digests={FIRST: block_digest(FIRST, version=1)}))


@pytest.mark.parametrize(
    ("name", "ok", "error"),
    [
        (whole(FIRST), False, DigestMismatch),
        (whole(FIRST - 1), True, TicketRefused),
        (whole(FIRST + 2), True, TicketRefused),
        (PieceName(FIRST, 0, LAYERS + 1), True, TicketRefused),
        (PieceName(FIRST, 1, LAYERS), True, TicketRefused),
        (PieceName(FIRST, LAYERS, 1), True, TicketRefused),
        (PieceName(FIRST, 0, 0), True, TicketRefused),
        (PieceName(FIRST, -1, 1), True, TicketRefused),
    ],
)
def test_a_wrong_piece_poisons(name: PieceName, ok: bool, error: type[Exception]) -> None:
    transfer = streaming(2)
    assert transfer.piece_arrived(name, bytes(16), ok) is Arrival.REFUSED
    assert isinstance(transfer.error, error)
    with pytest.raises(error):
        transfer.sealed(good_seal(2))


def test_two_contents_for_one_block_poison() -> None:
    transfer = streaming(2)
    arrive_all(transfer, 1)
    assert arrive(transfer, whole(FIRST), version=1) is Arrival.REFUSED
    assert isinstance(transfer.error, DigestMismatch)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (PieceName(FIRST, 0, 1), PieceName(FIRST, 0, 2)),
        (PieceName(FIRST, 1, 1), PieceName(FIRST, 0, 2)),
        (PieceName(FIRST, 0, 2), PieceName(FIRST, 0, 1)),
        (PieceName(FIRST, 0, 2), PieceName(FIRST, 1, 1)),
    ],
)
@pytest.mark.parametrize("same_digest", [True, False])
def test_pieces_that_overlap_in_part_poison(first: PieceName, second: PieceName, same_digest: bool) -> None:
    transfer = streaming(2)
    assert arrive(transfer, first) is Arrival.VERIFIED
    digest = digest_of(first if same_digest else second)
    assert transfer.piece_arrived(second, digest, ok=True) is Arrival.REFUSED
    assert isinstance(transfer.error, DigestMismatch)


def test_a_block_is_verified_when_all_its_layers_are() -> None:
    transfer = streaming(1)
    assert arrive(transfer, PieceName(FIRST, 1, 1)) is Arrival.VERIFIED
    assert transfer.verified == {}
    assert not transfer.complete
    assert arrive(transfer, PieceName(FIRST, 1, 1)) is Arrival.DUPLICATE
    assert arrive(transfer, PieceName(FIRST, 0, 1)) is Arrival.VERIFIED
    assert transfer.verified == {FIRST: block_digest(FIRST, BY_LAYER)}
    assert transfer.complete


def test_a_block_of_which_layers_are_missing_is_missing() -> None:
    transfer = streaming(1)
    arrive(transfer, PieceName(FIRST, 0, 1))
    transfer.sealed(good_seal(1, BY_LAYER))
    transfer.writer_closed()
    assert isinstance(transfer.error, SealMismatch)


def test_a_seal_that_names_another_cut_of_the_same_bytes_is_refused() -> None:
    transfer = streaming(1)
    arrive_all(transfer, 1, BY_LAYER)
    with pytest.raises(SealMismatch):
        transfer.sealed(good_seal(1, WHOLE))


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
    transfer = new_transfer(0, clock)
    transfer.offer()
    assert transfer.expires_s == 15.0
    transfer.expire(14.9)
    assert transfer.state is HandoffState.OFFERED  # without blocks nothing is said on a link: no lease
    transfer.expire(15.0)
    assert isinstance(transfer.error, TransferTimeout)
    assert transfer.state is HandoffState.DRAINED
    assert transfer.expires_s is None


def test_a_writer_that_does_not_come_runs_out_of_time() -> None:
    clock = ManualClock(5.0)
    transfer = new_transfer(1, clock)
    transfer.offer()
    assert transfer.expires_s == 9.0
    transfer.expire(8.9)
    assert transfer.state is HandoffState.OFFERED
    transfer.expire(9.0)
    assert isinstance(transfer.error, TransferTimeout)
    assert transfer.state is HandoffState.DRAINED


def test_a_silent_writer_runs_out_of_time() -> None:
    clock = ManualClock(5.0)
    transfer = streaming(1, clock)
    assert transfer.expires_s == 9.0
    transfer.expire(8.9)
    transfer.heard(8.9)
    transfer.expire(12.8)
    assert transfer.state is HandoffState.STREAMING
    transfer.expire(12.9)
    assert isinstance(transfer.error, TransferTimeout)
    assert transfer.state is HandoffState.POISONED  # it may still write
    transfer.writer_closed()
    assert transfer.state is HandoffState.DRAINED


def test_signs_of_life_do_not_stretch_the_ticket() -> None:
    clock = ManualClock(5.0)
    transfer = streaming(1, clock)
    transfer.heard(14.0)
    assert transfer.expires_s == 15.0
    transfer.expire(15.0)
    assert isinstance(transfer.error, TransferTimeout)


@pytest.mark.parametrize("seal_comes", [True, False])
def test_after_the_writer_the_seal_has_the_time_of_a_lease(seal_comes: bool) -> None:
    clock = ManualClock()
    transfer = streaming(1, clock)
    arrive_all(transfer, 1)
    clock.advance(3.0)
    transfer.writer_closed()
    assert transfer.expires_s == 7.0
    transfer.expire(6.9)
    if seal_comes:
        transfer.sealed(good_seal(1))
        assert transfer.state is HandoffState.VERIFIED
        assert transfer.expires_s is None
    transfer.expire(7.0)
    assert transfer.state is (HandoffState.VERIFIED if seal_comes else HandoffState.DRAINED)


def test_a_late_or_second_writer_is_not_let_in() -> None:
    clock = ManualClock()
    late = new_transfer(1, clock)
    late.offer()
    clock.advance(10.0)
    with pytest.raises(TicketRefused):
        late.writer_opened()
    with pytest.raises(TicketRefused):
        streaming(1).writer_opened()
    cancelled = new_transfer(1)
    cancelled.offer()
    cancelled.cancel()
    with pytest.raises(TicketRefused):
        cancelled.writer_opened()
    assert cancelled.take_back() == (100,)


def test_blocks_of_a_cancelled_transfer_wait_for_the_writer() -> None:
    transfer = streaming(2)
    arrive_all(transfer, 1)
    transfer.cancel()
    assert arrive(transfer, whole(FIRST + 1)) is Arrival.LATE
    assert transfer.wants(whole(FIRST + 1)) is None
    with pytest.raises(IllegalTransition):
        transfer.take_back()
    transfer.writer_closed()
    assert transfer.take_back() == (100, 101)
    with pytest.raises(IllegalTransition):
        transfer.take_back()


def test_only_wanted_pieces_have_a_place() -> None:
    transfer = streaming(2)
    assert [transfer.wants(whole(logical)) for logical in range(FIRST - 1, FIRST + 3)] == [None, 100, 101, None]
    for outside in [(0, LAYERS + 1), (LAYERS, 1), (0, 0), (-1, 1), (1, LAYERS)]:
        assert transfer.wants(PieceName(FIRST, *outside)) is None
    arrive(transfer, PieceName(FIRST, 0, 1))  # verified: not to be overwritten
    assert transfer.wants(PieceName(FIRST, 0, 1)) is None
    assert transfer.wants(whole(FIRST)) is None
    assert transfer.wants(PieceName(FIRST, 1, 1)) == 100


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
        self.transfer = self.transfer_class(ticket(num_blocks), self.clock, num_layers=LAYERS, lease_s=LEASE_S)
        self.writer = False
        self.heard_s = 0.0
        self.layers: dict[tuple[int, int], tuple[PieceName, bytes]] = {}  # block and layer -> what brought it, intact
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
        self.heard_s = self.clock.monotonic_s()

    @property
    def right(self) -> dict[int, bytes]:
        """Logical block -> the digest of the pieces that brought it, once they brought all of it."""
        found = {}
        for logical in {logical for logical, _ in self.layers}:
            pieces = {self.layers.get((logical, layer)) for layer in range(LAYERS)}
            if None not in pieces:
                whole = sorted((name.first_layer, name.num_layers, digest) for name, digest in pieces - {None})
                found[logical] = block_digest_of(whole)
        return found

    @rule(part=st.sampled_from([*WHOLE, *BY_LAYER]))
    def next_piece(self, part: tuple[int, int]) -> None:
        here = self.right
        self.piece(min({*range(self.num_blocks)} - {logical - FIRST for logical in here}, default=0), part, 0, True)

    @rule(offset=st.integers(0, 1), part=st.sampled_from([*WHOLE, *BY_LAYER]))
    def some_piece(self, offset: int, part: tuple[int, int]) -> None:
        self.piece(offset, part, 0, True)

    @precondition(lambda self: self.writer)
    @rule(offsets=st.lists(st.integers(0, 2), max_size=4), cut=st.sampled_from([WHOLE, BY_LAYER]))
    def a_burst_and_gone(self, offsets: list[int], cut: tuple[tuple[int, int], ...]) -> None:
        for offset in offsets:
            for part in cut:
                self.piece(min(offset, self.num_blocks - 1), part, 0, True)
        self.good_seal(cut)
        self.writer_goes()

    @rule(
        bad=st.sampled_from(
            [
                (-1, (0, 2), 0, True),
                (9, (0, 2), 0, True),
                (0, (0, 2), 1, True),
                (1, (1, 1), 1, True),
                (0, (0, 2), 0, False),
                (1, (0, 1), 0, False),
                (0, (1, 2), 0, True),
                (0, (0, 0), 0, True),
            ]
        )
    )
    def bad_piece(self, bad: tuple[int, tuple[int, int], int, bool]) -> None:
        self.piece(*bad)

    def piece(self, offset: int, part: tuple[int, int], version: int, ok: bool) -> None:
        name = PieceName(FIRST + offset, *part)
        digest = digest_of(name, version) if offset >= 0 else bytes(16)
        undecided = self.transfer.state in (HandoffState.STREAMING, HandoffState.SEALED)
        arrival = self.transfer.piece_arrived(name, digest, ok)
        inside = 0 <= offset < self.num_blocks and part in (*WHOLE, *BY_LAYER)
        layers = [(name.logical_block, layer) for layer in range(part[0], sum(part))]
        known = {self.layers[layer] for layer in layers if layer in self.layers}
        if not self.writer or not undecided:
            assert arrival is Arrival.LATE
        elif not inside or not ok or not known <= {(name, digest)}:
            assert arrival is Arrival.REFUSED
            self.anything_wrong = True
        elif arrival is Arrival.REFUSED:
            assert self.seal is not None
            before = dict(self.layers)
            self.layers.update((layer, (name, digest)) for layer in layers)
            assert self.right[name.logical_block] != self.seal.digests[name.logical_block]
            self.layers = before
            self.anything_wrong = True
        else:
            assert arrival is (Arrival.DUPLICATE if known else Arrival.VERIFIED)
            self.layers.update((layer, (name, digest)) for layer in layers)

    @rule(cut=st.sampled_from([WHOLE, BY_LAYER]))
    def good_seal(self, cut: tuple[tuple[int, int], ...]) -> None:
        self.seal_comes(0, 0, 0, cut)

    @rule(bad=st.sampled_from([(1, 0, 0), (-16, 0, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1)]))
    def bad_seal(self, bad: tuple[int, int, int]) -> None:
        self.seal_comes(*bad, WHOLE)

    def seal_comes(self, more_tokens: int, version: int, more_blocks: int, cut: tuple[tuple[int, int], ...]) -> None:
        logical_blocks = range(FIRST, FIRST + self.num_blocks + more_blocks)
        num_tokens = 16 * (FIRST + self.num_blocks) + more_tokens
        seal = Seal(NONCE, num_tokens, {logical: block_digest(logical, cut, version) for logical in logical_blocks})
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
        now_s = self.clock.monotonic_s()
        self.transfer.expire(now_s)
        if now_s >= 10.0 or (self.writer and now_s >= self.heard_s + LEASE_S):
            assert self.transfer.state not in UNDECIDED, "it goes on though its time is over"

    @precondition(lambda self: self.writer)
    @rule()
    def writer_gives_a_sign(self) -> None:
        self.heard_s = self.clock.monotonic_s()
        self.transfer.heard(self.heard_s)

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
    def piece_arrived(self, name: PieceName, digest: bytes, ok: bool) -> Arrival:
        return super().piece_arrived(name, digest, True)


class CountsLayers(IncomingTransfer):
    arrivals = 0

    def piece_arrived(self, name: PieceName, digest: bytes, ok: bool) -> Arrival:
        arrival = super().piece_arrived(name, digest, ok)
        if arrival in (Arrival.VERIFIED, Arrival.DUPLICATE):
            self.arrivals += name.num_layers
        return arrival

    @property
    def complete(self) -> bool:
        return self.arrivals >= len(self.expected) * LAYERS


class OverlooksOverlaps(IncomingTransfer):
    def piece_arrived(self, name: PieceName, digest: bytes, ok: bool) -> Arrival:
        if self._layers_here.get(name.logical_block, 0) & self._layers(name) and ok:
            return Arrival.DUPLICATE
        return super().piece_arrived(name, digest, ok)


class TakesAFirstLayerForTheBlock(IncomingTransfer):
    def _layers(self, name: PieceName) -> int:
        layers = super()._layers(name)
        return self._all_layers if layers & 1 else layers


class WaitsForASilentWriter(IncomingTransfer):
    def expire(self, now_s: float) -> None:
        self.heard(now_s)
        super().expire(now_s)


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


@pytest.mark.parametrize(
    "mutant",
    [
        SkipsTheDigest,
        CountsLayers,
        OverlooksOverlaps,
        TakesAFirstLayerForTheBlock,
        WaitsForASilentWriter,
        FreesOnAbort,
        UsesBeforeTheWriterIsGone,
        BelievesAnySeal,
    ],
)
def test_the_model_catches(mutant: type[IncomingTransfer]) -> None:
    class Wrong(Handoff):
        transfer_class = mutant

    with pytest.raises((AssertionError, KeyError)):
        run_state_machine_as_test(
            Wrong, settings=settings(MODEL_SETTINGS, max_examples=3000, phases=[Phase.generate], derandomize=True)
        )
