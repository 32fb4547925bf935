"""What watchers are told of a block manager and a scheduler, put together again and compared with what is there."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

import pytest

from common.blocks import block_key, root_hash
from common.engine.block_manager import BlockManager
from common.engine.core import SchedulerTotals
from common.engine.reporter import Reporter
from common.errors import WorkerLost
from common.load import WorkerLoad, WorkerReport, WorkerShape

NUM_BLOCKS = 20


class Engine:
    """Posts run at once, or when they are let; a scheduler of two figures."""

    def __init__(self) -> None:
        self.blocks = BlockManager(NUM_BLOCKS, 4, lambda salt: root_hash(b"", salt))
        self.totals = SchedulerTotals()
        self.num_running = self.num_waiting = 0
        self.dispatches: list[int] = []
        self.open: list[int] = []
        self.held: list[Callable[[], None]] | None = None

    def post(self, function: Callable[..., None], *arguments: object) -> None:
        if self.held is None:
            function(*arguments)
        else:
            self.held.append(lambda: function(*arguments))

    def load(self) -> WorkerLoad:
        return WorkerLoad(running=self.num_running, queued_tokens=self.totals.computed_tokens)

    def open_dispatches(self) -> tuple[int, ...]:
        return tuple(self.open)

    def take_dispatches(self) -> tuple[int, ...]:
        taken, self.dispatches = tuple(self.dispatches), []
        return taken

    def submit(self, dispatch_id: int) -> None:
        self.dispatches.append(dispatch_id)
        self.open.append(dispatch_id)
        self.totals.submitted += 1

    def compute(self, name: int) -> None:
        """A block with a content of this name becomes findable, at the cost of the oldest."""
        (block,) = self.blocks.allocate(1)
        self.blocks.register(block, hashlib.sha256(str(name).encode()).digest())
        self.blocks.release([block])
        self.totals.computed_tokens += 4

    def keys(self) -> set[int]:
        return {block_key(block_hash) for block_hash in self.blocks.hashes}


class Watcher:
    """As a router puts reports together."""

    def __init__(self, reports: AsyncGenerator[WorkerReport, None]) -> None:
        self.reports = reports
        self.keys: set[int] = set()
        self.dispatches: set[int] = set()
        self.last: WorkerReport | None = None
        self.pictures = 0

    async def read(self) -> WorkerReport:
        async with asyncio.timeout(120):
            report = await anext(self.reports)
        assert report.sequence == (1 if self.last is None else self.last.sequence + 1)
        assert not {*report.registered} & {*report.evicted}
        if report.shape is not None:
            self.pictures += 1
            self.keys, self.dispatches = set(), set()
        self.keys = (self.keys | {*report.registered}) - {*report.evicted}
        assert not self.dispatches & {*report.dispatches}
        self.dispatches |= {*report.dispatches}
        self.last = report
        return report


@asynccontextmanager
async def watching(reporter: Reporter) -> AsyncIterator[Watcher]:
    async with aclosing(reporter.watch(0.0)) as reports:
        yield Watcher(reports)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def reporter(engine: Engine) -> Reporter:
    return Reporter(engine, engine.blocks, engine, WorkerShape(4, b"", NUM_BLOCKS, 64))


async def test_changes_add_up_to_what_is_there(engine: Engine, reporter: Reporter) -> None:
    chance = random.Random(1)
    engine.compute(1)
    engine.submit(7)
    async with watching(reporter) as one, watching(reporter) as other:
        await one.read()
        for turn in range(60):
            for _ in range(chance.randrange(1, 15)):
                engine.compute(chance.randrange(1, 60))
            if turn % 3 == 0:
                engine.submit(100 + turn)
            reader = chance.choice([one, other])
            await reader.read()
            assert reader.keys == engine.keys()
            assert reader.dispatches >= {*engine.open} - {100 + turn} or reader.last is None
            assert reader.last is not None
            assert reader.last.load.queued_tokens == engine.totals.computed_tokens
        engine.compute(61)
        for reader in (one, other):
            await reader.read()
            assert reader.keys == engine.keys()
            assert reader.dispatches == {*engine.open}


async def test_nobody_watching_costs_nothing(engine: Engine, reporter: Reporter) -> None:
    engine.compute(1)
    reporter.step_done(1, 1.0, 0.1)
    async with watching(reporter) as one:
        report = await one.read()
        assert report.steps == ()
        reporter.step_done(5, 7.0, 0.1)
        engine.compute(2)
        report = await one.read()
        assert [(step.tokens, step.pairs, step.seconds) for step in report.steps] == [(5, 7.0, 0.1)]
    for name in range(3, 3 + 4 * NUM_BLOCKS):
        engine.compute(name)
    async with watching(reporter) as one:
        await one.read()
        assert one.keys == engine.keys()


async def test_a_watcher_that_missed_too_much_gets_a_new_picture(engine: Engine, reporter: Reporter) -> None:
    async with watching(reporter) as slow, watching(reporter) as quick:
        await slow.read()
        await quick.read()
        for name in range(1, 6 * NUM_BLOCKS):
            engine.compute(name)
            if name % 5 == 0:
                await quick.read()
        assert quick.pictures == 1
        await slow.read()
        assert slow.pictures == 2
        for reader in (slow, quick):
            engine.compute(1000)
            await reader.read()
            assert reader.keys == engine.keys()
        for name in range(2000, 2000 + NUM_BLOCKS + 3):  # nobody asks meanwhile: too much for the record itself
            engine.compute(name)  # and a block has gone for it
        await quick.read()
        assert quick.pictures == 2
        assert quick.keys == engine.keys()


async def test_an_idle_engine_is_not_woken_and_the_end_is_said(engine: Engine, reporter: Reporter) -> None:
    async with watching(reporter) as one:
        await one.read()
        engine.held = []
        sign_of_life = await one.read()
        assert sign_of_life.registered == ()
        assert engine.held == []
        engine.compute(1)
        waiting = asyncio.ensure_future(one.read())
        await asyncio.sleep(0)
        reporter.close()
        with pytest.raises(WorkerLost):
            await waiting
