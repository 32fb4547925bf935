"""The paths of an incoming transfer, one by one; any order of events is in `test_handoff_machine.py`."""

from __future__ import annotations

from dataclasses import replace

import pytest

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
from kvtransfer.state import TRANSITIONS, Arrival, HandoffState, IncomingTransfer, Seal
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
