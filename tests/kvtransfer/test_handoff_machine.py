"""The hand-off's decode side against a naive oracle, for any order of events; wrong hand-offs must be caught.

The oracle is a dictionary of bytes and a few facts: what is in each layer of each block, what the prompt's KV is, who may write,
what was said. It knows no digest: whether a statement about bytes is true it sees from the bytes, the nonce and the place that it
was made for. A writer says once what it wrote once, and what it says may come late, twice, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from common.clock import ManualClock
from common.errors import HandoffError, IllegalTransition, SealMismatch, TicketRefused, TransferBroken, TransferTimeout
from common.types import Ticket
from kvtransfer.digest import block_digest_of, piece_digest
from kvtransfer.state import Arrival, HandoffState, IncomingTransfer, Seal
from kvtransfer.transports.base import PieceName
from support.search_depth import FACTOR, examples

NONCE, OLD_NONCE = b"n" * 16, b"o" * 16
FIRST, LAYERS = 3, 3
CELL_BYTES = 8
LEASE_S, TTL_S = 2.0, 10.0
SPLITS = [((0, 3),), ((0, 1), (1, 2)), ((0, 2), (2, 1)), ((0, 1), (1, 1), (2, 1))]  # first layer, number of layers
RECEIVING = (HandoffState.STREAMING, HandoffState.SEALED)
UNDECIDED = (HandoffState.RESERVED, HandoffState.OFFERED, *RECEIVING)
USABLE = (HandoffState.VERIFIED, HandoffState.ACTIVE)

# Each run knows a few kinds of trouble only: with all of them at once nothing would ever get far.
KINDS = ["endings", "waits", "other splits", "wrong pieces", "late and again", "bad seals"]
TROUBLE = [kinds for count in range(4) for kinds in combinations(KINDS, count)]

Cell = tuple[int, int]  # logical block, layer


def kv(prompt: str, logical_block: int, layer: int) -> bytes:
    return f"{prompt[0]}{logical_block:03}{layer:03}.".encode()


def kv_of(prompt: str, name: PieceName) -> bytes:
    logical_block, first, count = name
    return b"".join(kv(prompt, logical_block, layer) for layer in range(first, first + count))


@dataclass(frozen=True)
class Statement:
    """What a writer says of a piece: these bytes, in this place, under this nonce."""

    name: PieceName
    content: bytes
    nonce: bytes = NONCE
    place: PieceName | None = None  # the place that the digest was made for, if it is another one
    dropped: bytes | None = None  # what arrived, if it had nowhere to go


class Handoff(RuleBasedStateMachine):
    transfer_class: type[IncomingTransfer] = IncomingTransfer
    digest: Callable[[memoryview, bytes, PieceName], bytes] = staticmethod(
        lambda data, nonce, name: piece_digest(data, nonce, *name)
    )
    reached: set[HandoffState] | None = None

    @initialize(
        splits=st.lists(st.sampled_from(SPLITS), max_size=3),
        writer_comes=st.sampled_from([True, True, True, False]),
        trouble=st.sampled_from(TROUBLE),
    )
    def start(self, splits: list[tuple[Cell, ...]], writer_comes: bool, trouble: tuple[str, ...]) -> None:
        self.trouble = trouble
        self.logical_blocks = range(FIRST, FIRST + len(splits))
        self.split = dict(zip(self.logical_blocks, splits, strict=True))
        ticket = Ticket(
            nonce=NONCE,
            request_id="r",
            attempt=1,
            decode_worker_id="d",
            decode_incarnation=1,
            prefill_worker_id="p",
            prefill_incarnation=1,
            first_block=FIRST,
            blocks=tuple(range(100, 100 + len(splits))),
            num_tokens=16 * (FIRST + len(splits)),
            layout_fingerprint=b"f" * 32,
            ttl_s=TTL_S,
        )
        self.clock = ManualClock(50.0)
        self.transfer = self.transfer_class(ticket, self.clock, num_layers=LAYERS, lease_s=LEASE_S)
        self.memory: dict[Cell, bytes] = {
            (block, layer): kv("old", block, layer) for block in self.logical_blocks for layer in range(LAYERS)
        }
        self.accepted: dict[Cell, PieceName] = {}  # by which piece
        self.said: list[Statement] = []
        self.unsaid: list[Statement] = []  # written, and not announced yet
        self.seal: Seal | None = None
        self.writer = self.writer_came = self.given_back = self.used = False
        self.offered_s: float | None = None
        self.heard_s = 0.0
        self.error: HandoffError | None = None
        self.over = False  # failed or cancelled
        if writer_comes:
            self.offer()
            self.a_writer_comes()

    # -- the decode worker --------------------------------------------------------------------------------------------

    @precondition(lambda self: self.offered_s is None or "late and again" in self.trouble)
    @rule()
    def offer(self) -> None:
        try:
            self.transfer.offer()
        except IllegalTransition:
            assert self.offered_s is not None or self.over
        else:
            assert self.offered_s is None
            assert not self.over
            self.offered_s = self.heard_s = self.now_s

    @precondition(lambda self: self.transfer.state in USABLE or "late and again" in self.trouble)
    @rule()
    def use(self) -> None:
        try:
            self.transfer.activate()
        except IllegalTransition:
            return
        assert not self.used
        self.used = True

    @precondition(lambda self: "endings" in self.trouble)
    @rule()
    def cancel(self) -> None:
        self.transfer.cancel()
        self.over = True
        assert self.transfer.state not in (*UNDECIDED, *USABLE)

    @precondition(lambda self: "endings" in self.trouble)
    @rule(error=st.sampled_from([TransferBroken("a"), TransferBroken("b")]))
    def fail(self, error: HandoffError) -> None:
        can_fail = self.transfer.state in (*UNDECIDED, HandoffState.VERIFIED)
        self.transfer.poison(error)
        self.over = self.over or can_fail
        assert (self.transfer.error is error) == (can_fail or self.error is error)

    @precondition(lambda self: self.over or "late and again" in self.trouble)
    @rule()
    def take_back(self) -> None:
        try:
            blocks = self.transfer.take_back()
        except IllegalTransition:
            assert self.given_back or self.writer or not self.over
            return
        assert not self.given_back, "blocks are given back twice"
        assert not self.writer, "blocks are given back while a writer may write to them"
        assert self.over, "blocks are given back that are wanted"
        assert blocks == tuple(range(100, 100 + len(self.logical_blocks)))
        self.given_back = True

    @rule(seconds=st.sampled_from([0.5, 1.0, 1.5, 2.5, 6.0]))
    def time_passes(self, seconds: float) -> None:
        if "waits" not in self.trouble:
            seconds = 0.25
        self.clock.advance(seconds)
        undecided = self.transfer.state in UNDECIDED and self.offered_s is not None
        late = undecided and self.offered_s is not None and self.now_s >= self.offered_s + TTL_S
        awaits = self.writer or (len(self.logical_blocks) > 0 and self.seal is None)  # OPEN, writes, CLOSE, or the seal
        silent = undecided and awaits and self.now_s >= self.heard_s + LEASE_S
        assert self.transfer.silent(self.now_s) == (self.writer and self.now_s >= self.heard_s + LEASE_S)
        self.transfer.expire(self.now_s)
        if late or silent:
            assert isinstance(self.transfer.error, TransferTimeout)
            assert self.transfer.state not in UNDECIDED
            self.over = True
        elif undecided:
            assert self.transfer.state in UNDECIDED
            assert self.transfer.expires_s is not None
            assert self.transfer.expires_s > self.now_s

    @rule()
    def a_sign_of_life(self) -> None:
        self.transfer.heard(self.now_s)
        self.heard_s = self.now_s

    # -- the writer ---------------------------------------------------------------------------------------------------

    @precondition(lambda self: not self.writer_came or "late and again" in self.trouble)
    @rule()
    def a_writer_comes(self) -> None:
        try:
            self.transfer.writer_opened()
        except TicketRefused:
            expired = self.offered_s is not None and self.now_s >= self.offered_s + TTL_S
            assert (
                self.offered_s is None
                or self.writer_came
                or self.over
                or expired
                or self.transfer.state is not HandoffState.OFFERED
            )
            return
        assert self.offered_s is not None
        assert not self.writer_came, "two writers were let in"
        assert not self.over
        assert self.now_s < self.offered_s + TTL_S
        self.writer = self.writer_came = True
        self.heard_s = self.now_s

    @precondition(lambda self: self.writer)
    @rule(offset=st.integers(0, 2), index=st.integers(0, 2), asks=st.booleans())
    def a_right_piece(self, offset: int, index: int, asks: bool) -> None:
        if self.logical_blocks:
            block = self.logical_blocks[offset % len(self.logical_blocks)]
            first, count = self.split[block][index % len(self.split[block])]
            self.say(self.written(PieceName(block, first, count), "new", asks))

    @precondition(lambda self: self.writer)
    @rule(asks=st.booleans(), seals=st.booleans(), goes=st.booleans())
    def all_that_is_missing(self, asks: bool, seals: bool, goes: bool) -> None:
        for block, split in self.split.items():
            for first, count in split:
                if (block, first) not in self.accepted:
                    self.say(self.written(PieceName(block, first, count), "new", asks))
        if seals:
            self.a_seal("good")
        if goes:
            self.the_writer_goes()

    @precondition(lambda self: self.writer and self.split and "other splits" in self.trouble)
    @rule(
        offset=st.integers(0, 2),
        layers=st.sampled_from([(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (2, 1)]),
        prompt=st.sampled_from(["new", "alien"]),
        asks=st.booleans(),
    )
    def a_piece_split_in_another_way(self, offset: int, layers: tuple[int, int], prompt: str, asks: bool) -> None:
        """Its bytes are what its digest says."""
        block = self.logical_blocks[offset % len(self.logical_blocks)]
        self.say(self.written(PieceName(block, *layers), prompt, asks))

    @precondition(lambda self: self.writer and "wrong pieces" in self.trouble)
    @rule(
        name=st.sampled_from([(FIRST - 1, 0, 3), (FIRST + 3, 0, 3), (FIRST, 0, 0), (FIRST, 0, 4), (FIRST, 3, 1), (FIRST, 2, 2)])
    )
    def a_piece_that_is_in_no_block(self, name: tuple[int, int, int]) -> None:
        self.say(self.written(PieceName(*name), "new", asks=True))

    @precondition(lambda self: self.writer and "wrong pieces" in self.trouble)
    @rule(
        offset=st.integers(0, 2), wrong=st.sampled_from(["damaged", "of another attempt", "of another place"]), asks=st.booleans()
    )
    def a_wrong_piece(self, offset: int, wrong: str, asks: bool) -> None:
        name = PieceName(FIRST + offset, *self.split.get(FIRST + offset, ((0, 3),))[0])
        other = PieceName(name.logical_block + 1, name.first_layer, name.num_layers)
        match wrong:
            case "damaged":
                self.say(replace(self.written(name, "bad", asks), content=kv_of("new", name)))
            case "of another attempt":
                self.say(replace(self.written(name, "alien", asks), nonce=OLD_NONCE))
            case _:
                self.say(replace(self.written(name, "new", asks, of=other), place=other))

    @precondition(lambda self: self.writer and "late and again" in self.trouble)
    @rule(offset=st.integers(0, 2))
    def a_piece_is_written_and_not_yet_announced(self, offset: int) -> None:
        block = FIRST + offset
        for first, count in self.split.get(block, ()):
            if not any((block, layer) in self.accepted for layer in range(first, first + count)):
                self.unsaid.append(self.written(PieceName(block, first, count), "new", asks=False))
                return

    @precondition(lambda self: self.unsaid)
    @rule()
    def an_announcement_arrives_late(self) -> None:
        self.say(self.unsaid.pop(0))

    @precondition(lambda self: self.said and "late and again" in self.trouble)
    @rule(data=st.data(), copies=st.integers(1, 6))
    def what_was_said_is_said_again(self, data: st.DataObject, copies: int) -> None:
        """Copies of the message, with the bytes, for which there is no place any more."""
        statement = data.draw(st.sampled_from(self.said))
        if self.transfer.wants(statement.name) is not None:
            return  # it would be written, which is another rule
        for _ in range(copies):
            self.say(replace(statement, dropped=statement.content), note=False)

    @precondition(lambda self: self.writer and (self.is_all_accepted() or self.over or "endings" in self.trouble))
    @rule()
    def the_writer_goes(self) -> None:
        complete = self.is_all_accepted()
        undecided = self.transfer.state in RECEIVING
        self.heard_s = self.now_s if self.writer else self.heard_s
        self.writer = False
        self.transfer.writer_closed()
        if undecided and not complete:
            assert isinstance(self.transfer.error, (TransferBroken, SealMismatch))
            self.over = True

    @precondition(lambda self: not self.writer_came)
    @rule()
    def a_writer_that_never_came_goes(self) -> None:
        if not self.writer:
            before = self.transfer.state
            self.transfer.writer_closed()
            assert self.transfer.state is before

    @precondition(lambda self: self.writer_came or "bad seals" in self.trouble)
    @rule(kind=st.sampled_from(["good", "other nonce", "fewer tokens", "missing", "more", "other content", "empty"]))
    def a_seal(self, kind: str) -> None:
        if "bad seals" not in self.trouble:
            kind = "good"
        good = Seal(NONCE, self.transfer.ticket.num_tokens, {block: self.sum_of(block, "new") for block in self.logical_blocks})
        last = self.logical_blocks[-1] if self.logical_blocks else FIRST
        seals = {
            "good": good,
            "other nonce": Seal(
                OLD_NONCE, good.num_tokens, {block: self.sum_of(block, "alien") for block in self.logical_blocks}
            ),
            "fewer tokens": replace(good, num_tokens=good.num_tokens - 1),
            "missing": replace(good, digests={block: digest for block, digest in good.digests.items() if block != last}),
            "more": replace(good, digests={**good.digests, FIRST + 7: b"x" * 16}),
            "other content": replace(good, digests={**good.digests, last: b"y" * 16}),
            "empty": Seal(NONCE, 0, {}),
        }
        seal = seals[kind]
        state = self.transfer.state
        try:
            self.transfer.sealed(seal)
        except IllegalTransition:
            assert state not in (HandoffState.OFFERED, *RECEIVING)
        except HandoffError:
            if state is HandoffState.ACTIVE:  # too late to change anything
                assert seal != self.seal
                return
            was_over, self.over = self.over, True
            assert was_over or isinstance(self.transfer.error, SealMismatch)
            assert was_over or seal != good or self.is_good_seal_contradicted(), "a good seal is refused"
        else:
            assert seal.nonce == NONCE, "the seal of another attempt is taken"
            assert seal.num_tokens == good.num_tokens
            assert self.seal in (None, seal)
            self.seal = seal

    # -- what the oracle knows ----------------------------------------------------------------------------------------

    @property
    def now_s(self) -> float:
        return self.clock.monotonic_s()

    def cells(self, name: PieceName) -> list[Cell]:
        return [(name.logical_block, layer) for layer in range(name.first_layer, name.first_layer + name.num_layers)]

    def is_possible(self, name: PieceName) -> bool:
        return name.num_layers > 0 and all(cell in self.memory for cell in self.cells(name))

    def is_all_accepted(self) -> bool:
        return self.accepted.keys() == self.memory.keys()

    def is_good_seal_contradicted(self) -> bool:
        """By another one that came before, by there being no writer, or by what was accepted for some block."""
        if self.seal is not None or (self.split and not self.writer_came):
            return True
        for block, split in self.split.items():
            cells = [(block, layer) for layer in range(LAYERS)]
            if all(cell in self.accepted for cell in cells):
                pieces = {self.accepted[cell] for cell in cells}
                right = {PieceName(block, *piece) for piece in split}
                if pieces != right or any(self.memory[cell] != kv("new", *cell) for cell in cells):
                    return True
        return False

    def sum_of(self, block: int, prompt: str) -> bytes:
        nonce = NONCE if prompt == "new" else OLD_NONCE
        pieces = [(PieceName(block, first, count), first, count) for first, count in self.split[block]]
        digest = type(self).digest
        return block_digest_of(
            [(first, count, digest(memoryview(kv_of(prompt, name)), nonce, name)) for name, first, count in pieces]
        )

    def written(self, name: PieceName, prompt: str, asks: bool, of: PieceName | None = None) -> Statement:
        """Over a link that asks, the bytes go where the decode side says; else the writer puts them there. Nobody overwrites
        what was accepted: a writer writes a piece once."""
        content = kv_of(prompt, of or name)
        place = self.transfer.wants(name)
        overlaps = any(cell in self.accepted for cell in self.cells(name))
        receives = self.writer and self.transfer.state in RECEIVING
        assert (place is not None) == (receives and self.is_possible(name) and not overlaps)
        if not self.is_possible(name) or overlaps or (asks and place is None):
            return Statement(name, content, dropped=content)
        assert self.writer
        assert not self.given_back, "a write hits blocks that were given back"
        assert self.transfer.state not in USABLE, "a write hits KV that was verified"
        for index, cell in enumerate(self.cells(name)):
            self.memory[cell] = content[CELL_BYTES * index : CELL_BYTES * (index + 1)]
        return Statement(name, content)

    def say(self, statement: Statement, *, note: bool = True) -> None:
        name = statement.name
        receives = self.writer and self.transfer.state in RECEIVING
        found = statement.dropped
        if found is None:
            found = b"".join(self.memory[cell] for cell in self.cells(name))
        is_true = found == statement.content and statement.nonce == NONCE and statement.place in (None, name)
        digest = type(self).digest
        stated = digest(memoryview(statement.content), statement.nonce, statement.place or name)
        arrival = self.transfer.piece_arrived(name, stated, digest(memoryview(found), NONCE, name) == stated)
        if note:
            self.said.append(replace(statement, dropped=None))
        here = [cell for cell in self.cells(name) if cell in self.accepted]
        if not receives:
            assert arrival is Arrival.LATE
        elif not self.is_possible(name) or not is_true:
            assert arrival is Arrival.REFUSED, "a false statement is believed"
        elif here:
            same = all(self.accepted.get(cell) == name for cell in self.cells(name)) and self.holds(name, statement.content)
            assert arrival is (Arrival.DUPLICATE if same else Arrival.REFUSED)
        elif arrival is Arrival.REFUSED:
            assert self.seal is not None, "a true statement is refused"
        else:
            assert arrival is Arrival.VERIFIED
            self.accepted.update(dict.fromkeys(self.cells(name), name))
        self.over = self.over or arrival is Arrival.REFUSED

    def holds(self, name: PieceName, content: bytes) -> bool:
        return b"".join(self.memory[cell] for cell in self.cells(name)) == content

    # -- what must be true after every step ----------------------------------------------------------------------------

    @invariant()
    def only_right_kv_is_used(self) -> None:
        if self.transfer.state in USABLE:
            assert not self.over, "a transfer that was over is used"
            assert not self.writer, "KV is used while a writer may write to it"
            assert self.seal is not None, "KV is used that was not sealed"
            assert self.memory == {cell: kv("new", *cell) for cell in self.memory}, "KV is used that is not the prompt's"

    @invariant()
    def right_kv_is_usable(self) -> None:
        pieces = {PieceName(block, *piece) for block, split in self.split.items() for piece in split}
        if set(self.accepted.values()) == pieces and self.seal is not None and not self.writer and not self.over:
            assert self.transfer.state in USABLE, "everything is there, and it is not used"

    @invariant()
    def nothing_is_free_under_a_writer(self) -> None:
        if self.transfer.state in (HandoffState.DRAINED, HandoffState.FREE):
            assert not self.writer, "blocks count as free while a writer may write to them"
        elif self.over and not self.writer:
            assert self.transfer.state is HandoffState.ACTIVE, "blocks without a writer are not given back"

    @invariant()
    def the_first_error_stays(self) -> None:
        assert self.error is None or self.transfer.error is self.error
        self.error = self.transfer.error
        assert self.error is None or self.over

    @invariant()
    def complete_is_a_set(self) -> None:
        assert self.transfer.complete == self.is_all_accepted()

    @invariant()
    def note_the_state(self) -> None:
        if self.reached is not None and self.split:
            self.reached.add(self.transfer.state)


MACHINE_SETTINGS = settings(
    max_examples=examples(600),
    stateful_step_count=15,
    deadline=None,
    derandomize=FACTOR == 1,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_any_order_of_events_and_every_state_is_reached() -> None:
    every: set[HandoffState] = set()

    class Noted(Handoff):
        reached = every

    run_state_machine_as_test(Noted, settings=MACHINE_SETTINGS)
    assert every == set(HandoffState)


# -- wrong hand-offs ---------------------------------------------------------------------------------------------------


class TakesAnyNonce(IncomingTransfer):
    """With digests that do not cover the nonce either: see `WITHOUT_NONCE`."""

    def _complaint_about(self, seal: Seal) -> str | None:
        return super()._complaint_about(replace(seal, nonce=self.ticket.nonce))


class FreesOnAbort(IncomingTransfer):
    def _drain_if_alone(self) -> None:
        if self.state in (HandoffState.POISONED, HandoffState.CANCELLED):
            self._move(HandoffState.DRAINED)


class EndsTheLeaseEarly(IncomingTransfer):
    """Silence counts as the writer's end."""

    def expire(self, now_s: float) -> None:
        super().expire(now_s)
        if isinstance(self.error, TransferTimeout):
            self.writer_closed()


class CountsArrivals(IncomingTransfer):
    layers = 0

    def piece_arrived(self, name: PieceName, digest: bytes, ok: bool) -> Arrival:
        arrival = super().piece_arrived(name, digest, ok)
        self.layers += name.num_layers * (arrival in (Arrival.VERIFIED, Arrival.DUPLICATE))
        return arrival

    @property
    def complete(self) -> bool:
        return self.layers >= len(self.expected) * LAYERS


class SkipsTheDigest(IncomingTransfer):
    def piece_arrived(self, name: PieceName, digest: bytes, ok: bool) -> Arrival:
        return super().piece_arrived(name, digest, True)


class UsesUnderAWriter(IncomingTransfer):
    def _verify_if_complete(self) -> None:
        if self.state is HandoffState.SEALED and self.complete:
            self._move(HandoffState.VERIFIED)


class LetsInASecondWriter(IncomingTransfer):
    def writer_opened(self) -> None:
        if self.state is HandoffState.STREAMING:
            self.writer_open = True
        else:
            super().writer_opened()


class BelievesAnySeal(IncomingTransfer):
    def _complaint_about(self, seal: Seal) -> str | None:
        return None


class KeepsTheLastError(IncomingTransfer):
    def poison(self, error: HandoffError) -> None:
        super().poison(error)
        if self.error is not None:
            self.error = error


class ForgetsTheLease(IncomingTransfer):
    def heard(self, now_s: float) -> None:
        super().heard(now_s + LEASE_S)


class TakesOverlaps(IncomingTransfer):
    def piece_arrived(self, name: PieceName, digest: bytes, ok: bool) -> Arrival:
        if self._layers_here.get(name.logical_block, 0) & self._layers(*name[1:]) and self.receiving and self.writer_open:
            return Arrival.DUPLICATE
        return super().piece_arrived(name, digest, ok)


class TakesAFirstLayerForTheBlock(IncomingTransfer):
    def _layers(self, first_layer: int, num_layers: int) -> int:
        layers = super()._layers(first_layer, num_layers)
        return self._all_layers if layers & 1 else layers


class WaitsForASilentWriter(IncomingTransfer):
    def expire(self, now_s: float) -> None:
        self.heard(now_s)
        super().expire(now_s)


def without_nonce(data: memoryview, nonce: bytes, name: PieceName) -> bytes:
    return piece_digest(data, NONCE, *name)


FIVE = [TakesAnyNonce, FreesOnAbort, EndsTheLeaseEarly, CountsArrivals, SkipsTheDigest]
MORE = [
    UsesUnderAWriter,
    LetsInASecondWriter,
    BelievesAnySeal,
    KeepsTheLastError,
    ForgetsTheLease,
    TakesOverlaps,
    TakesAFirstLayerForTheBlock,
    WaitsForASilentWriter,
]


@pytest.mark.parametrize("mutant", [*FIVE, *MORE])
def test_the_machine_catches(mutant: type[IncomingTransfer]) -> None:
    class Wrong(Handoff):
        transfer_class = mutant
        digest = staticmethod(without_nonce) if mutant is TakesAnyNonce else Handoff.digest

    with pytest.raises((AssertionError, KeyError)):
        run_state_machine_as_test(
            Wrong, settings=settings(MACHINE_SETTINGS, max_examples=3000, phases=[Phase.generate], derandomize=True)
        )
