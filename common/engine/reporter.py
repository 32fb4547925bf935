"""What a worker tells routers about itself: one look at the engine serves all who watch.

    watch(): snapshot, change, change ...      each watcher has its own numbers and its own list of what it was not told yet
                 ^
    engine thread, between two steps: load, dispatches taken in, blocks registered and evicted, samples of steps

Nothing is recorded while nobody watches, and an engine that does nothing is not woken to say so. A watcher that does not keep up
loses no change: changes of one block replace each other, and when there are more of them than the cache has blocks, the watcher
gets a new snapshot instead. It knows no wire format and no router.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from common.blocks import BlockHash, BlockKey, block_key
from common.engine.block_manager import BlockManager
from common.engine.core import SchedulerTotals
from common.engine.loop import Inbox
from common.errors import WorkerLost
from common.load import StepSample, WorkerLoad, WorkerReport, WorkerShape

MIN_INTERVAL_S = 0.02
HEARTBEAT_S = 1.0
_MAX_STEPS = 32  # of a report; the latest ones


class ReportingScheduler(Protocol):
    """What the reporter asks of a scheduler. `load`, `open_dispatches` and `take_dispatches` on the engine's thread only."""

    totals: SchedulerTotals
    waiting_since_s: float | None

    @property
    def num_running(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...

    def load(self) -> WorkerLoad: ...

    def open_dispatches(self) -> tuple[int, ...]:
        """Of every request that it holds."""
        ...

    def take_dispatches(self) -> tuple[int, ...]:
        """Of the requests that were submitted since the last call, whatever became of them."""
        ...


@dataclass(slots=True, eq=False)
class _Watcher:
    """What one watcher was not told yet."""

    snapshot: tuple[BlockKey, ...] | None = None
    changes: dict[BlockKey, bool] = field(default_factory=dict)
    dispatches: list[int] = field(default_factory=list)
    steps: list[StepSample] = field(default_factory=list)
    wants_snapshot: bool = True
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def clear(self) -> None:
        self.snapshot, self.changes, self.dispatches, self.steps = None, {}, [], []
        self.news.clear()


@dataclass(frozen=True, slots=True)
class _Look:
    load: WorkerLoad
    dispatches: tuple[int, ...]
    open_dispatches: tuple[int, ...]
    changes: dict[BlockKey, bool]
    snapshot: tuple[BlockKey, ...] | None
    changes_lost: bool


class Reporter:
    """One per worker; lives on its asyncio loop but for what says otherwise. `shape` is known once the engine is loaded."""

    def __init__(self, scheduler: ReportingScheduler, blocks: BlockManager, inbox: Inbox, shape: WorkerShape) -> None:
        self._scheduler = scheduler
        self._blocks = blocks
        self._inbox = inbox
        self._shape = shape
        self._watchers: set[_Watcher] = set()
        self._load = WorkerLoad()
        self._looking: asyncio.Future[None] | None = None
        self._seen: tuple[int, ...] = ()
        self._closed = asyncio.Event()
        self._changes: dict[BlockKey, bool] = {}  # engine thread
        self._changes_lost = False  # engine thread
        self._recording = False  # engine thread
        self._steps: list[StepSample] = []  # appended on the engine thread, swapped on the loop

    def step_done(self, tokens: int, pairs: float, seconds: float) -> None:
        """On the engine's thread, after each step."""
        if self._recording:
            self._steps.append(StepSample(tokens, pairs, seconds))
            del self._steps[:-_MAX_STEPS]

    async def watch(self, interval_s: float) -> AsyncGenerator[WorkerReport, None]:
        """Reports when something changed, no more often than asked, and signs of life between. Raises WorkerLost at `close`."""
        interval_s = max(interval_s, MIN_INTERVAL_S)
        watcher = _Watcher()
        self._watchers.add(watcher)
        sequence = 0
        loop = asyncio.get_running_loop()
        reported_s = -HEARTBEAT_S
        try:
            while not self._closed.is_set():
                if watcher.wants_snapshot or self._state() != self._seen:
                    await self._look()
                if watcher.wants_snapshot:
                    continue  # the look that was under way had begun before this watcher came
                if watcher.news.is_set() or loop.time() - reported_s >= HEARTBEAT_S:
                    sequence += 1
                    reported_s = loop.time()
                    yield self._report(watcher, sequence)
                await self._pause(interval_s)
            raise WorkerLost("the worker is being stopped")
        finally:
            self._watchers.discard(watcher)

    def close(self) -> None:
        self._closed.set()

    # -- within --------------------------------------------------------------------------------------------------------

    def _state(self) -> tuple[int, ...]:
        """Differs whenever a look could find something new. Read from any thread."""
        scheduler = self._scheduler
        totals = scheduler.totals
        return (scheduler.num_running, scheduler.num_waiting, totals.submitted, totals.computed_tokens, totals.generated_tokens)

    async def _pause(self, interval_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(interval_s):
                await self._closed.wait()

    async def _look(self) -> None:
        """All who want a look at the same time share it."""
        if self._looking is None:
            loop = asyncio.get_running_loop()
            looking = self._looking = loop.create_future()
            wants_snapshot = tuple(watcher for watcher in self._watchers if watcher.wants_snapshot)
            self._seen = self._state()

            def found(look: _Look) -> None:
                self._looking = None
                self._distribute(look, wants_snapshot)
                if not looking.done():
                    looking.set_result(None)

            def hand_over(look: _Look) -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(found, look)

            self._inbox.post(self._read, bool(wants_snapshot), hand_over)
        closing: asyncio.Future[object] = asyncio.ensure_future(self._closed.wait())
        looking_or_closing: set[asyncio.Future[Any]] = {self._looking, closing}
        try:
            await asyncio.wait(looking_or_closing, return_when=asyncio.FIRST_COMPLETED)
        finally:
            closing.cancel()

    def _read(self, with_snapshot: bool, hand_over: Callable[[_Look], None]) -> None:
        """On the engine's thread."""
        if not self._recording:
            self._recording = True
            self._blocks.tell(self._on_findable)
        changes, self._changes = self._changes, {}
        lost, self._changes_lost = self._changes_lost, False
        snapshot = tuple(block_key(block_hash) for block_hash in self._blocks.hashes) if with_snapshot or lost else None
        scheduler = self._scheduler
        dispatches = scheduler.take_dispatches()
        hand_over(_Look(scheduler.load(), dispatches, scheduler.open_dispatches(), changes, snapshot, lost))

    def _on_findable(self, block_hash: BlockHash, findable: bool) -> None:
        """On the engine's thread."""
        if self._changes_lost:
            return
        self._changes[block_key(block_hash)] = findable
        if len(self._changes) > 2 * self._blocks.num_total:
            self._changes_lost = True
            self._changes.clear()

    def _distribute(self, look: _Look, wanted_snapshot: tuple[_Watcher, ...]) -> None:
        self._load = look.load
        steps, self._steps = self._steps, []
        for watcher in self._watchers:
            if watcher in wanted_snapshot or look.changes_lost:
                watcher.clear()
                watcher.snapshot = look.snapshot
                watcher.dispatches = list(dict.fromkeys((*look.open_dispatches, *look.dispatches)))
                watcher.wants_snapshot = False
            elif not watcher.wants_snapshot:
                watcher.changes.update(look.changes)
                watcher.dispatches += look.dispatches
                if len(watcher.changes) > self._shape.blocks_total:
                    watcher.clear()
                    watcher.wants_snapshot = True
            watcher.steps = (watcher.steps + steps)[-_MAX_STEPS:]
            watcher.news.set()

    def _report(self, watcher: _Watcher, sequence: int) -> WorkerReport:
        changes, whole = watcher.changes, watcher.snapshot is not None
        if watcher.snapshot is not None:  # what changed since it was taken is part of the picture
            changes = {**dict.fromkeys(watcher.snapshot, True), **changes}
        report = WorkerReport(
            sequence=sequence,
            load=self._load,
            shape=self._shape if whole else None,
            dispatches=tuple(watcher.dispatches),
            registered=tuple(key for key, findable in changes.items() if findable),
            evicted=() if whole else tuple(key for key, findable in changes.items() if not findable),
            steps=tuple(watcher.steps),
        )
        watcher.clear()
        return report
