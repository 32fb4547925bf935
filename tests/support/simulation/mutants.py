"""The real code with one of its promises broken. A simulation that does not notice is no simulation.

Each mutant replaces methods of real classes while it is open. What a mutant breaks is said in its docstring.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import pytest

import kvtransfer.receiver
import kvtransfer.sender
import prefill_worker.handoff
from common.blocks import next_hash, num_blocks
from common.errors import HandoffError, TransferBroken
from decode_worker.generation import Choice, ChoiceState
from decode_worker.scheduler import DecodeScheduler
from kvtransfer import ticket as tickets
from kvtransfer.incoming import Incoming
from kvtransfer.outgoing import Outgoing
from kvtransfer.receiver import KVReceiver
from kvtransfer.recutting import Cut, Made, Recutting
from kvtransfer.reshard import BlockTable
from kvtransfer.state import Arrival, HandoffState, IncomingTransfer, Seal
from kvtransfer.transports import authentication
from kvtransfer.transports.authentication import Verdict
from kvtransfer.transports.base import PieceName, ReceiverLink, Refusal

Mutant = Callable[[pytest.MonkeyPatch], None]


def no_epoch(patch: pytest.MonkeyPatch) -> None:
    """A transfer is known by request and attempt alone; which incarnation, and which link, nobody asks."""
    mint, verify, judge = tickets.mint, tickets.verify, authentication.judge

    def mint_alike(**fields: Any) -> Any:
        name = f"{fields['request_id']}/{fields['attempt']}".encode()
        return mint(**(fields | {"draw_nonce": lambda size: hashlib.sha256(name).digest()[:size]}))

    def verify_without(ticket: Any, secret: bytes, **expected: Any) -> None:
        incarnations = {name: getattr(ticket, name) for name in ("prefill_incarnation", "decode_incarnation")}
        verify(ticket, secret, **(expected | incarnations))

    def judge_without(*arguments: Any) -> Verdict:
        verdict = judge(*arguments)
        return Verdict.WELCOME if verdict in (Verdict.WRONG_INCARNATION, Verdict.NOT_ADMITTED) else verdict

    def let_in_anybody(self: KVReceiver, link: ReceiverLink, nonce: bytes) -> int | Refusal:
        incoming = self._incoming.get(nonce)
        return Refusal.UNKNOWN if incoming is None else incoming.let_in(link)

    patch.setattr(kvtransfer.receiver, "mint", mint_alike)
    patch.setattr(kvtransfer.sender, "verify", verify_without)
    patch.setattr(authentication, "judge", judge_without)
    patch.setattr(KVReceiver, "admit", lambda self, peer: None)
    patch.setattr(KVReceiver, "writer_opened", let_in_anybody)
    patch.setattr(KVReceiver, "_written_over", lambda self, link, nonce: self._incoming.get(nonce))


def free_on_abort(patch: pytest.MonkeyPatch) -> None:
    """Who gives up gets the blocks back at once, though a writer may still write to them."""

    async def abandon(self: Incoming, release: Callable[[], Awaitable[None]], **_: Any) -> tuple[int, ...]:
        self.transfer.cancel()
        self._settle()
        self._end()
        return self.ticket.blocks

    patch.setattr(Incoming, "abandon", abandon)


def quarantine_times_out(patch: pytest.MonkeyPatch) -> None:
    """A writer that has not answered for a while is believed to have stopped."""
    original = Incoming.abandon

    async def abandon(self: Incoming, release: Callable[[], Awaitable[None]], **options: Any) -> tuple[int, ...]:
        async def release_and_hope() -> None:
            try:
                await release()
            finally:
                tries.append(1)
                if len(tries) == 2:
                    self.writer_gone()

        tries: list[int] = []
        return await original(self, release_and_hope, **options)

    patch.setattr(Incoming, "abandon", abandon)


def sources_let_go_early(patch: pytest.MonkeyPatch) -> None:
    """An abort does not wait for the write that is under way: its sources are freed while they are read."""

    async def abort(self: Outgoing) -> None:
        self._fail(TransferBroken("the transfer was aborted"))

    patch.setattr(Outgoing, "abort", abort)


def finished_before_taken(patch: pytest.MonkeyPatch) -> None:
    """What was offered counts as written: its sources are freed though the decode side has yet to fetch them."""

    def is_through(self: Outgoing) -> bool:
        return self._phase.value == "finishing" and not self._queue

    patch.setattr(Outgoing, "_is_through", is_through)


def complete_by_count(patch: pytest.MonkeyPatch) -> None:
    """So many pieces came as there should be, so they must be the right ones; the seal has so many digests as it should."""
    arrived, complain = IncomingTransfer.piece_arrived, IncomingTransfer._complaint_about
    layers: dict[int, int] = {}

    def count(self: IncomingTransfer, name: PieceName, digest: bytes, ok: bool) -> Arrival:
        arrival = arrived(self, name, digest, ok)
        if arrival in (Arrival.VERIFIED, Arrival.DUPLICATE):
            layers[id(self)] = layers.get(id(self), 0) + name.num_layers
        return arrival

    def complete(self: IncomingTransfer) -> bool:
        return layers.get(id(self), 0) >= len(self.expected) * self._num_layers

    def complaint(self: IncomingTransfer, seal: Seal) -> str | None:
        return None if len(seal.digests) == len(self.expected) else complain(self, seal)

    def forget(self: IncomingTransfer) -> None:
        offer(self)
        layers.pop(id(self), None)

    offer = IncomingTransfer.offer
    patch.setattr(IncomingTransfer, "offer", forget)
    patch.setattr(IncomingTransfer, "piece_arrived", count)
    patch.setattr(IncomingTransfer, "pieces_arrived", lambda *_: False)  # each is counted
    patch.setattr(IncomingTransfer, "complete", property(complete))
    patch.setattr(IncomingTransfer, "_complaint_about", complaint)


def digest_skipped(patch: pytest.MonkeyPatch) -> None:
    """Whatever arrives is taken for what was sent."""
    arrived = IncomingTransfer.piece_arrived
    patch.setattr(IncomingTransfer, "piece_arrived", lambda self, name, digest, ok: arrived(self, name, digest, True))


def place_kept(patch: pytest.MonkeyPatch) -> None:
    """Where a piece may go is decided once: a writer that was shut out between two parts of it still has its place."""
    destination = KVReceiver.destination
    places: WeakKeyDictionary[KVReceiver, dict[tuple[bytes, PieceName], memoryview]] = WeakKeyDictionary()

    def remembered(self: KVReceiver, link: ReceiverLink, nonce: bytes, name: PieceName) -> memoryview | None:
        its = places.setdefault(self, {})
        place = its.get((nonce, name)) or destination(self, link, nonce, name)
        if place is not None:
            its[nonce, name] = place
        return place

    patch.setattr(KVReceiver, "destination", remembered)


def unverified_used(patch: pytest.MonkeyPatch) -> None:
    """The seal is enough: nobody waits for the blocks that it speaks of."""

    async def complete(self: Incoming, seal: Seal) -> None:
        self.transfer.seal = seal
        self.transfer.state = HandoffState.ACTIVE
        self._settle()
        self._end()

    patch.setattr(Incoming, "complete", complete)


def unverified_cached(patch: pytest.MonkeyPatch) -> None:
    """Blocks can be found by others as soon as they are reserved, before anything is in them."""
    place = DecodeScheduler._place_prompt

    def place_and_register(self: DecodeScheduler, choice: Choice) -> None:
        place(self, choice)
        if choice.state is ChoiceState.REMOTE:
            sequence, size = choice.sequence, self._layout.block_tokens
            block_hash = self._blocks.root(choice.generation.request.cache_salt)
            for index in range(len(sequence.tokens) // size):
                block_hash = next_hash(block_hash, sequence.tokens[index * size : (index + 1) * size])
                self._blocks.register(sequence.blocks[index], block_hash)

    patch.setattr(DecodeScheduler, "_place_prompt", place_and_register)


def quarantine_skipped(patch: pytest.MonkeyPatch) -> None:
    """The scheduler gives blocks back as if they had only one owner."""
    patch.setattr(DecodeScheduler, "_quarantine", lambda self, choice: self._blocks.release(choice.sequence.detach()))
    patch.setattr(DecodeScheduler, "drained", lambda self, blocks: None)


def drained_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Blocks that nobody can write to any more are not given back."""
    patch.setattr(DecodeScheduler, "drained", lambda self, blocks: None)


def abort_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A stream that was cancelled leaves its request in the scheduler."""
    patch.setattr(DecodeScheduler, "abort", lambda self, request_id: None)


def no_lease(patch: pytest.MonkeyPatch) -> None:
    """A prefill worker holds its blocks for as long as the ticket says, whether the decode worker is there or not."""
    patch.setattr(Outgoing, "_check_lease", lambda self: None)


def staging_lent_twice(patch: pytest.MonkeyPatch) -> None:
    """Memory in which pieces were made is lent anew while they are still to be written."""
    make = Recutting.make

    async def make_and_give_back(self: Recutting, cuts: Sequence[Cut], num_tokens: int) -> Made:
        made = await make(self, cuts, num_tokens)
        if all(made.staging is not idle for idle in self._idle):
            self._idle.append(made.staging)
        return made

    patch.setattr(Recutting, "make", make_and_give_back)
    patch.setattr(Recutting, "give_back", lambda self, made: None)


def cutting_cancelled(patch: pytest.MonkeyPatch) -> None:
    """Who gives up cancels what is being made: that ends the wait for the thread, and the thread goes on reading its sources."""
    start, fail = Outgoing._start_making, Outgoing._fail
    under_way: WeakKeyDictionary[Outgoing, asyncio.Task[Made]] = WeakKeyDictionary()

    def start_and_remember(self: Outgoing, recutting: Recutting, batch: Sequence[Any]) -> asyncio.Task[Made] | None:
        making = start(self, recutting, batch)
        if making is not None:
            under_way[self] = making
        return making

    def fail_and_cancel(self: Outgoing, error: HandoffError) -> None:
        fail(self, error)
        if self in under_way:
            under_way[self].cancel()

    patch.setattr(Outgoing, "_start_making", start_and_remember)
    patch.setattr(Outgoing, "_fail", fail_and_cancel)


def cut_one_block_further(patch: pytest.MonkeyPatch) -> None:
    """Where a block of the peer begins within one of ours, the tokens are taken from the next."""
    covering = Recutting.covering

    def shifted(self: Recutting, logical_block: int, blocks: Sequence[int], num_tokens: int) -> BlockTable:
        table = covering(self, logical_block, blocks, num_tokens)
        begins_within = logical_block * self.layout.block_tokens % self._source.layout.block_tokens
        return replace(table, blocks=(*table.blocks[1:], table.blocks[0])) if begins_within else table

    patch.setattr(Recutting, "covering", shifted)


def half_computed_blocks_pushed(patch: pytest.MonkeyPatch) -> None:
    """A block leaves as soon as its first token is there."""
    patch.setattr(prefill_worker.handoff, "num_full_blocks", num_blocks)


MUTANTS: tuple[Mutant, ...] = (
    no_epoch,
    free_on_abort,
    quarantine_times_out,
    sources_let_go_early,
    finished_before_taken,
    complete_by_count,
    digest_skipped,
    place_kept,
    unverified_used,
    unverified_cached,
    quarantine_skipped,
    drained_forgotten,
    abort_forgotten,
    no_lease,
    staging_lent_twice,
    cutting_cancelled,
    cut_one_block_further,
    half_computed_blocks_pushed,
)


@contextmanager
def broken_by(mutant: Mutant) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        mutant(patch)
        yield
