"""Runs of the hand-off's model on the real decode side: what must work works, and what a mutant lets happen does not.

The events are those that the model prints: event, attempt, details. Some runs are written down here; with spin installed, the
fresh counterexample of every mutant is replayed as well. Bytes are real, links are not: a link here only carries out events.
The driver owns the blocks as a decode worker does: it has those again that `abandon` returned, or whose request was answered.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable
from pathlib import Path

import pytest

from common.clock import ManualClock
from common.errors import IllegalTransition, TransferTimeout
from common.types import KVLayout, WorkerRef
from kvtransfer.digest import block_digest_of, piece_digest
from kvtransfer.receiver import Incoming, KVReceiver
from kvtransfer.region import BlockRegion
from kvtransfer.state import UNDECIDED, HandoffState, IncomingTransfer, Seal
from kvtransfer.ticket import derive_secret
from kvtransfer.transports.base import PeerName, PieceName, Refusal, Written
from support.model_checker import missing_tool, search

LAYOUT = KVLayout("model", "tokenizer", 2, 1, 8, 16, "float32", True)
SECRET = derive_secret("token")
PREFILL = PeerName("m/prefill/0", 7)
BLOCKS = 3
TURNS = 8  # of the event loop, until nothing moves any more
MODEL = Path(__file__).with_name("handoff.pml")


class NotAsInTheModel(Exception):
    """The real code did something else; the text says what."""


class Link:
    kind = "replayed"
    peer = PREFILL

    def __init__(self, fences_locally: bool) -> None:
        self.fences_locally = fences_locally

    def credit(self, nonce: bytes, size_bytes: int) -> None:
        """The model writes without."""

    def pulse(self, nonce: bytes) -> None:
        """The model has deadlines that come at any time."""

    def hang_up(self) -> None:
        """The model's links end by themselves."""


class Attempt:
    def __init__(self, worker: int, blocks: range, incoming: Incoming, link: Link, content: random.Random) -> None:
        self.worker, self.blocks, self.incoming, self.link = worker, blocks, incoming, link
        self.nonce = incoming.ticket.nonce
        self.content = [content.randbytes(LAYOUT.block_bytes) for _ in blocks]
        self.completing: asyncio.Task[None] | None = None
        self.abandoning: asyncio.Task[tuple[int, ...]] | None = None
        self.has_blocks = True

    def name(self, index: int) -> PieceName:
        return PieceName(index, 0, LAYOUT.num_layers)

    def digest(self, index: int) -> bytes:
        return piece_digest(memoryview(self.content[index]), self.nonce, *self.name(index))

    def seal(self) -> Seal:
        sums = {index: block_digest_of([(0, LAYOUT.num_layers, self.digest(index))]) for index in range(len(self.blocks))}
        return Seal(self.nonce, len(self.blocks) * LAYOUT.block_tokens, sums)


class World:
    """Two decode workers. `fenced` says of each whether its links fence."""

    def __init__(self, fenced: tuple[bool, bool]) -> None:
        self.fenced = fenced
        self.attempts: dict[int, Attempt] = {}
        self.dropped = 0  # pieces that had nowhere to go
        self.late = 0  # stores into blocks in quarantine
        self._random = random.Random(1)
        self._pools = [
            BlockRegion(memoryview(bytearray(BLOCKS * LAYOUT.block_bytes)), LAYOUT.block_bytes, BLOCKS) for _ in range(2)
        ]
        self._incarnations = [1, 1]
        self._receivers = [self._start(0), self._start(1)]

    async def play(self, events: Iterable[str]) -> None:
        for event in events:
            what, *numbers = event.split()
            await getattr(self, f"_on_{what}")(*map(int, numbers))
            for _ in range(TURNS):
                self._give_up_what_failed()
                await asyncio.sleep(0)
            self._check()

    async def stop(self) -> None:
        for receiver in self._receivers:
            await receiver.close()
        for attempt in self.attempts.values():
            attempt.incoming.writer_gone()
        for _ in range(TURNS):
            self._give_up_what_failed()
            await asyncio.sleep(0)
        tasks = [task for attempt in self.attempts.values() for task in (attempt.completing, attempt.abandoning) if task]
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10.0)

    # -- events -------------------------------------------------------------------------------------------------------

    async def _on_offer(self, number: int, worker: int, first_block: int, count: int) -> None:
        blocks = range(first_block, first_block + count)
        kept = any(a.has_blocks and a.worker == worker and set(a.blocks) & set(blocks) for a in self.attempts.values())
        try:
            incoming = self._receivers[worker].open(
                request_id=str(number),
                attempt=0,
                prefill=WorkerRef(PREFILL.worker_id, PREFILL.incarnation, "unused"),
                first_block=0,
                blocks=blocks,
                num_tokens=count * LAYOUT.block_tokens,
                ttl_s=100.0,
            )
        except IllegalTransition as error:
            assert kept
            raise NotAsInTheModel("kept") from error
        assert not kept, "blocks are offered that were not given back"
        self.attempts[number] = Attempt(worker, blocks, incoming, Link(self.fenced[worker]), self._random)

    async def _on_open(self, number: int) -> None:
        attempt = self.attempts[number]
        if isinstance(self._receivers[attempt.worker].writer_opened(attempt.link, attempt.nonce), Refusal):
            raise NotAsInTheModel("refused")

    async def _on_data(self, number: int, index: int, damaged: int) -> None:
        attempt = self.attempts[number]
        receiver, name = self._receivers[attempt.worker], attempt.name(index)
        arrived = self._bytes(attempt, index, damaged)
        place = receiver.destination(attempt.link, attempt.nonce, name)
        if place is None:
            self.dropped += 1
        else:
            assert attempt.has_blocks
            place[:] = arrived
        written = Written(name, attempt.digest(index), None if place is not None else memoryview(arrived))
        receiver.pieces_written(attempt.link, attempt.nonce, [written])

    async def _on_fetch(self, number: int, index: int, damaged: int) -> None:
        """The decode worker copies; what it has copied is stated later."""
        attempt = self.attempts[number]
        place = self._receivers[attempt.worker].destination(attempt.link, attempt.nonce, attempt.name(index))
        if place is None:
            self.dropped += 1
        else:
            assert attempt.has_blocks
            place[:] = self._bytes(attempt, index, damaged)

    async def _on_store(self, number: int, index: int, damaged: int) -> None:
        """The writer has the pool mapped: nobody is asked."""
        attempt = self.attempts[number]
        assert attempt.has_blocks, "a write hits a block that was given back"
        assert attempt.incoming.state not in (HandoffState.VERIFIED, HandoffState.ACTIVE), "a write hits verified KV"
        self.late += attempt.incoming.state not in UNDECIDED
        self._block(attempt, index)[:] = self._bytes(attempt, index, damaged)

    async def _on_notice(self, number: int, index: int) -> None:
        attempt = self.attempts[number]
        written = Written(attempt.name(index), attempt.digest(index), None)
        self._receivers[attempt.worker].pieces_written(attempt.link, attempt.nonce, [written])

    async def _on_close(self, number: int) -> None:
        attempt = self.attempts[number]
        self._receivers[attempt.worker].writer_closed(attempt.link, attempt.nonce)

    async def _on_link_end(self, number: int) -> None:
        attempt = self.attempts[number]
        self._receivers[attempt.worker].link_lost(attempt.link)

    async def _on_seal(self, number: int) -> None:
        attempt = self.attempts[number]
        attempt.completing = asyncio.create_task(attempt.incoming.complete(attempt.seal()))

    async def _on_deadline(self, number: int) -> None:
        self.attempts[number].incoming.fail(TransferTimeout("the model says so"))

    async def _on_cancel(self, number: int) -> None:
        self._abandon(self.attempts[number])

    async def _on_use(self, number: int) -> None:
        if not self._is_usable(self.attempts[number]):
            raise NotAsInTheModel("not verified")

    async def _on_answer(self, number: int) -> None:
        self.attempts[number].has_blocks = False

    async def _on_crash(self, worker: int) -> None:
        await self._receivers[worker].close()
        self._incarnations[worker] += 1
        self._receivers[worker] = self._start(worker)
        for attempt in self.attempts.values():
            attempt.has_blocks = attempt.has_blocks and attempt.worker != worker

    # -- what must be true ---------------------------------------------------------------------------------------------

    def _check(self) -> None:
        for attempt in self.attempts.values():
            if attempt.has_blocks and self._is_usable(attempt):
                for index, content in enumerate(attempt.content):
                    assert self._block(attempt, index) == content, "KV is used that is not what was sent"

    def _is_usable(self, attempt: Attempt) -> bool:
        task = attempt.completing
        return task is not None and task.done() and not task.cancelled() and task.exception() is None

    # -- within --------------------------------------------------------------------------------------------------------

    def _start(self, worker: int) -> KVReceiver:
        name = f"m/decode/{worker}"
        return KVReceiver(self._pools[worker], LAYOUT, name, self._incarnations[worker], SECRET, ManualClock())

    def _give_up_what_failed(self) -> None:
        """As a decode worker does: what failed is abandoned, its blocks come back when they come back."""
        for attempt in self.attempts.values():
            if attempt.incoming.transfer.error is not None:
                self._abandon(attempt)

    def _abandon(self, attempt: Attempt) -> None:
        async def lost() -> None:
            """Release never arrives."""

        async def abandon() -> tuple[int, ...]:
            blocks = await attempt.incoming.abandon(lost, tries=0)
            assert blocks == tuple(attempt.blocks)
            attempt.has_blocks = False
            return blocks

        if attempt.abandoning is None and attempt.has_blocks:
            attempt.abandoning = asyncio.create_task(abandon())

    def _bytes(self, attempt: Attempt, index: int, damaged: int) -> bytes:
        content = attempt.content[index]
        return content if not damaged else bytes([content[0] ^ 1]) + content[1:]

    def _block(self, attempt: Attempt, index: int) -> memoryview:
        return self._pools[attempt.worker].block(attempt.blocks[index])


async def replay(run: str | Iterable[str], fenced: tuple[bool, bool]) -> tuple[World, str]:
    """The world after a run, and where the real code differed from it, or nothing."""
    events = [event.strip() for event in run.split("|")] if isinstance(run, str) else list(run)
    world = World(fenced)
    difference = ""
    try:
        await world.play(events)
    except NotAsInTheModel as error:
        difference = str(error)
    finally:
        await world.stop()
    return world, difference


UNFENCED_AND_FENCED, FENCED_AND_UNFENCED = (False, True), (True, False)
FIRST_OF_TWO = "offer 0 0 0 2 | open 0 | store 0 0 0 | notice 0 0"
FIRST_FETCHED = "offer 0 0 0 2 | open 0 | fetch 0 0 0 | notice 0 0"

WORKING = {
    "one after the other": f"{FIRST_OF_TWO} | store 0 1 0 | notice 0 1 | close 0 | seal 0 | use 0 | answer 0 "
    "| offer 1 0 1 1 | open 1 | store 1 0 0 | notice 1 0 | seal 1 | close 1 | use 1 | answer 1",
    "the link ends after the last piece": f"{FIRST_OF_TWO} | store 0 1 0 | notice 0 1 | link_end 0 | seal 0 | use 0 | answer 0",
    "a notice twice": f"{FIRST_OF_TWO} | notice 0 0 | store 0 1 0 | notice 0 1 | notice 0 0 | seal 0 | close 0 | use 0 "
    "| answer 0",
    "a retry after a deadline": "offer 0 0 0 2 | deadline 0 | offer 2 0 0 2 | open 2 | store 2 1 0 | notice 2 1 | store 2 0 0 "
    "| notice 2 0 | seal 2 | link_end 2 | use 2 | answer 2",
    "a retry after a crash": f"{FIRST_OF_TWO} | crash 0 | offer 2 0 0 2 | open 2 | store 2 0 0 | notice 2 0 | store 2 1 0 "
    "| notice 2 1 | close 2 | seal 2 | use 2 | answer 2",
    "fetched": "offer 1 1 2 1 | open 1 | fetch 1 0 0 | notice 1 0 | close 1 | seal 1 | use 1 | answer 1",
    "fenced": "offer 1 1 2 1 | open 1 | data 1 0 0 | close 1 | seal 1 | use 1 | answer 1",
}


@pytest.mark.parametrize("run", WORKING.values(), ids=WORKING)
async def test_a_run_without_a_fault_that_matters_ends_in_an_answer(run: str) -> None:
    world, difference = await replay(run, UNFENCED_AND_FENCED)
    assert difference == ""
    assert not any(attempt.has_blocks for attempt in world.attempts.values())


REFUSED = {
    # what a wrong protocol allowed: links, the run, how the real code differs
    "free on abort": (UNFENCED_AND_FENCED, "offer 0 0 0 2 | open 0 | cancel 0 | offer 1 0 0 1", "kept"),
    "free on abort, after some data": (
        UNFENCED_AND_FENCED,
        f"{FIRST_OF_TWO} | cancel 0 | offer 1 0 1 1 | open 1 | store 0 1 0",
        "kept",
    ),
    "early lease end": (UNFENCED_AND_FENCED, "offer 0 0 0 2 | open 0 | deadline 0 | offer 2 0 0 2", "kept"),
    "count only": (
        UNFENCED_AND_FENCED,
        f"{FIRST_OF_TWO} | notice 0 0 | store 0 1 1 | link_end 0 | seal 0 | use 0",
        "not verified",
    ),
    "count only, the link stays": (UNFENCED_AND_FENCED, f"{FIRST_OF_TWO} | notice 0 0 | seal 0 | use 0", "not verified"),
    "no digest of what is fetched": (
        FENCED_AND_UNFENCED,
        f"{FIRST_FETCHED} | fetch 0 1 1 | notice 0 1 | link_end 0 | seal 0 | use 0",
        "not verified",
    ),
    "stated before it is fetched": (
        FENCED_AND_UNFENCED,
        f"{FIRST_FETCHED} | notice 0 1 | fetch 0 1 0 | close 0 | seal 0 | use 0",
        "not verified",
    ),
    "no digest": (
        UNFENCED_AND_FENCED,
        f"{FIRST_OF_TWO} | store 0 1 1 | notice 0 1 | link_end 0 | seal 0 | use 0",
        "not verified",
    ),
    "used under a writer": (UNFENCED_AND_FENCED, f"{FIRST_OF_TWO} | store 0 1 0 | notice 0 1 | seal 0 | use 0", "not verified"),
    "used without a seal": (UNFENCED_AND_FENCED, f"{FIRST_OF_TWO} | store 0 1 0 | notice 0 1 | close 0 | use 0", "not verified"),
    "a second writer": (UNFENCED_AND_FENCED, "offer 0 0 0 2 | open 0 | close 0 | open 0", "refused"),
    "a writer that comes too late": (FENCED_AND_UNFENCED, "offer 0 0 0 2 | deadline 0 | offer 2 0 0 2 | open 0", "refused"),
    "a writer of an earlier life": (UNFENCED_AND_FENCED, "offer 0 0 0 2 | crash 0 | offer 2 0 0 2 | open 0", "refused"),
}


@pytest.mark.parametrize(("fenced", "run", "difference"), REFUSED.values(), ids=REFUSED)
async def test_what_a_wrong_protocol_allows_does_not_happen(fenced: tuple[bool, bool], run: str, difference: str) -> None:
    assert (await replay(run, fenced))[1] == difference


NOWHERE = {
    "no epoch": "offer 1 0 0 1 | open 1 | deadline 1 | offer 0 0 0 2 | open 0 | data 1 0 0",
    "no epoch, after a crash": "offer 1 0 0 1 | open 1 | crash 0 | offer 0 0 0 2 | open 0 | data 1 0 0",
    "after the end of the link": "offer 0 0 0 2 | open 0 | link_end 0 | data 0 0 0",
    "ready when it is not wanted": f"{FIRST_FETCHED} | deadline 0 | offer 2 0 0 2 | open 2 | fetch 0 1 0 | fetch 2 0 0 "
    "| notice 2 0 | fetch 2 1 0 | notice 2 1 | close 2 | seal 2 | use 2",
    "ready twice": f"{FIRST_FETCHED} | fetch 0 0 1 | fetch 0 1 0 | notice 0 1 | close 0 | seal 0 | use 0",
    "twice": "offer 0 0 0 2 | open 0 | data 0 0 0 | data 0 0 0 | data 0 1 0 | close 0 | seal 0 | use 0",
}


@pytest.mark.parametrize("run", NOWHERE.values(), ids=NOWHERE)
async def test_late_data_has_nowhere_to_go(run: str) -> None:
    world, difference = await replay(run, FENCED_AND_UNFENCED)
    assert difference == ""
    assert world.dropped == 1


@pytest.mark.skipif(missing_tool() is not None, reason=f"{missing_tool()} is not installed")
@pytest.mark.parametrize(
    ("macros", "fenced", "expected"),
    [
        ("NO_EPOCH", FENCED_AND_UNFENCED, "dropped"),
        ("FREE_ON_ABORT", UNFENCED_AND_FENCED, "late"),
        ("EARLY_LEASE_END", UNFENCED_AND_FENCED, "late"),
        ("COUNT_ONLY", UNFENCED_AND_FENCED, "not verified"),
        ("NO_DIGEST", UNFENCED_AND_FENCED, "not verified"),
        ("NO_DIGEST FETCH", FENCED_AND_UNFENCED, "not verified"),
        ("BOTH_ANSWERED", UNFENCED_AND_FENCED, ""),
        ("BOTH_ANSWERED FETCH", FENCED_AND_UNFENCED, ""),
        ("RETRY_ANSWERED", UNFENCED_AND_FENCED, ""),
        ("ANSWERED_AFTER_CRASHES", UNFENCED_AND_FENCED, ""),
        ("ANSWERED_AFTER_CRASHES FETCH", FENCED_AND_UNFENCED, ""),
    ],
)
async def test_what_spin_finds_is_replayed(tmp_path: Path, macros: str, fenced: tuple[bool, bool], expected: str) -> None:
    links = [f"FENCED{worker}={'true' if fences else 'false'}" for worker, fences in enumerate(fenced)]
    found = search(MODEL, tmp_path, *macros.split(), "ATTEMPTS=2" if "ANSWERED" not in macros else "ATTEMPTS=3", *links)
    assert found.events
    world, difference = await replay([" ".join(event) for event in found.events], fenced)
    assert difference or {"dropped": world.dropped, "late": world.late} == {
        "dropped": int(expected == "dropped"),
        "late": int(expected == "late"),
    }
    assert difference == ("" if expected in ("dropped", "late") else expected)


def free_on_abort(transfer: IncomingTransfer) -> None:
    if transfer.state in (HandoffState.POISONED, HandoffState.CANCELLED):
        transfer._move(HandoffState.DRAINED)


def verified_under_a_writer(transfer: IncomingTransfer) -> None:
    if transfer.state is HandoffState.SEALED and transfer.complete:
        transfer._move(HandoffState.VERIFIED)


@pytest.mark.parametrize(
    ("place", "wrong", "run", "complaint"),
    [
        ("_drain_if_alone", free_on_abort, "offer 0 0 0 2 | open 0 | cancel 0 | store 0 1 0", "was given back"),
        ("_drain_if_alone", free_on_abort, "offer 0 0 0 2 | open 0 | deadline 0 | store 0 1 0", "was given back"),
        (
            "_verify_if_complete",
            verified_under_a_writer,
            f"{FIRST_OF_TWO} | store 0 1 0 | notice 0 1 | seal 0 | store 0 0 1",
            "hits verified KV",
        ),
        (
            "complete",
            property(lambda transfer: bool(transfer.verified)),
            f"{FIRST_OF_TWO} | seal 0 | close 0",
            "not what was sent",
        ),
    ],
)
async def test_the_driver_sees_what_must_not_happen(
    monkeypatch: pytest.MonkeyPatch, place: str, wrong: object, run: str, complaint: str
) -> None:
    monkeypatch.setattr(IncomingTransfer, place, wrong)
    with pytest.raises(AssertionError, match=complaint):
        await replay(run, UNFENCED_AND_FENCED)
