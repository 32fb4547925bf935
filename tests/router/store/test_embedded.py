"""The store in the process against a naive model, with a clock that the test moves; and its bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from prometheus_client import CollectorRegistry

from common.clock import ManualClock
from common.metrics import StoreMetrics
from router.store import embedded
from router.store.base import Deleted, Epochs, Inserted, Invalidated, Reset
from router.store.embedded import EmbeddedStore

KEYS = st.sampled_from([b"a", b"b", b"c", b"d", b"e", b"f"])
NAMES = st.sets(st.sampled_from(["tenant:1", "tenant:2", "model:m", "tag:t"]), max_size=3)
OVERHEAD_BYTES = 512
MAX_BYTES = 4 * (OVERHEAD_BYTES + 100)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """The store never waits, so a step is enough."""
    try:
        work.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waited")


@dataclass
class Kept:
    value: bytes
    names: frozenset[str]
    put_at: int  # how many things had happened before its epochs were read
    expires_s: float


class AgainstDictionary(RuleBasedStateMachine):
    """The model: a list of puts in order of use, and for each name when it was last invalidated."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.registry = CollectorRegistry()
        self.store = EmbeddedStore(
            max_bytes=MAX_BYTES, max_value_bytes=1000, clock=self.clock, metrics=StoreMetrics(self.registry)
        )
        self.indexed: set[bytes] = set()
        self.store.subscribe(self.hear)
        self.moment = 0
        self.invalidated_at: dict[str, int] = {}
        self.kept: dict[bytes, Kept] = {}  # least recently used first
        self.readings: list[tuple[int, frozenset[str], Epochs]] = []

    def hear(self, change: object) -> None:
        match change:
            case Inserted(key, _):
                self.indexed.add(key)
            case Deleted(keys):
                self.indexed -= set(keys)
            case Reset():
                self.indexed.clear()
            case Invalidated():
                pass

    def is_current(self, names: frozenset[str], since: int) -> bool:
        return all(self.invalidated_at.get(name, -1) < since for name in names)

    def forget_expired(self) -> None:
        self.kept = {key: kept for key, kept in self.kept.items() if kept.expires_s > self.clock.monotonic_s()}

    @rule(key=KEYS, names=NAMES)
    def get(self, key: bytes, names: set[str]) -> None:
        self.moment += 1
        self.forget_expired()
        reading = run(self.store.get(key, list(names)))
        self.readings.append((self.moment, frozenset(names), reading.epochs))
        kept = self.kept.get(key)
        expected = None
        if kept is not None and not self.is_current(kept.names, kept.put_at):
            del self.kept[key]
        elif kept is not None and kept.names <= names:
            expected = kept.value
            self.kept[key] = self.kept.pop(key)
        assert reading.value == expected

    @rule(key=KEYS, size=st.integers(0, 400), ttl_s=st.sampled_from([1.0, 5.0, 50.0]), which=st.integers(0, 5))
    def put(self, key: bytes, size: int, ttl_s: float, which: int) -> None:
        if not self.readings:
            return
        self.moment += 1
        since, names, epochs = self.readings[-1 - which % len(self.readings)]
        value = self.moment.to_bytes(4, "big") + bytes(size)
        self.store.put(key, value, ttl_s=ttl_s, epochs=epochs)
        if not self.is_current(names, since):
            return
        self.forget_expired()
        self.kept.pop(key, None)
        self.kept[key] = Kept(value, names, since, self.clock.monotonic_s() + ttl_s)
        while self.expected_bytes() > MAX_BYTES:
            del self.kept[next(iter(self.kept))]

    @rule(key=KEYS)
    def delete(self, key: bytes) -> None:
        self.moment += 1
        run(self.store.delete((key,)))
        self.kept.pop(key, None)

    @rule(names=NAMES)
    def invalidate(self, names: set[str]) -> None:
        self.moment += 1
        run(self.store.invalidate(list(names)))
        self.invalidated_at |= dict.fromkeys(names, self.moment)

    @rule(seconds=st.sampled_from([0.5, 1.0, 4.0, 60.0]))
    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    def expected_bytes(self) -> int:
        return sum(OVERHEAD_BYTES + len(key) + len(kept.value) for key, kept in self.kept.items())

    @invariant()
    def its_account_is_right(self) -> None:
        assert (self.registry.get_sample_value("pdserve_store_bytes") or 0) <= MAX_BYTES
        self.forget_expired()
        run(self.store.get(b"nothing", ()))  # drops what has expired
        assert self.registry.get_sample_value("pdserve_store_entries") == len(self.kept)
        assert self.registry.get_sample_value("pdserve_store_bytes") == self.expected_bytes()

    @invariant()
    def an_index_that_listens_holds_what_the_store_holds(self) -> None:
        run(self.store.get(b"nothing", ()))
        self.forget_expired()
        assert self.indexed == self.kept.keys()


TestAgainstDictionary = AgainstDictionary.TestCase
TestAgainstDictionary.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def store_of(max_bytes: int = 100_000) -> tuple[EmbeddedStore, ManualClock]:
    clock = ManualClock()
    metrics = StoreMetrics(CollectorRegistry())
    return EmbeddedStore(max_bytes=max_bytes, max_value_bytes=100_000, clock=clock, metrics=metrics), clock


def test_too_many_invalidated_names_begin_anew_without_bringing_anything_back(monkeypatch: Any) -> None:
    monkeypatch.setattr(embedded, "_MAX_COUNTERS", 3)
    store, _ = store_of()
    heard: list[object] = []
    store.subscribe(heard.append)
    old = run(store.get(b"k", ["tag:0"])).epochs
    run(store.invalidate(["tag:0"]))
    store.put(b"k", b"v", ttl_s=10, epochs=run(store.get(b"k", ["tag:0"])).epochs)
    run(store.invalidate([f"tag:{number}" for number in range(1, 4)]))
    assert heard[-1] == Reset()
    assert run(store.get(b"k", ["tag:0"])).value is None
    store.put(b"k", b"old", ttl_s=10, epochs=old)
    assert run(store.get(b"k", ["tag:0"])).value is None


def test_what_was_read_last_stays_longest() -> None:
    store, _ = store_of(max_bytes=3 * (OVERHEAD_BYTES + 2))
    epochs = run(store.get(b"k", ())).epochs
    for key in (b"1", b"2", b"3"):
        store.put(key, b"v", ttl_s=10, epochs=epochs)
    run(store.get(b"1", ()))
    store.put(b"4", b"v", ttl_s=10, epochs=epochs)
    assert [run(store.get(key, ())).value for key in (b"1", b"2", b"3", b"4")] == [b"v", None, b"v", b"v"]


def test_overwriting_for_ever_takes_no_memory() -> None:
    store, _ = store_of()
    epochs = run(store.get(b"k", ())).epochs
    for number in range(2000):
        store.put(b"k%d" % (number % 3), b"v", ttl_s=1000, epochs=epochs)
    assert len(store._expiries) < 200


async def test_it_runs_until_it_is_cancelled() -> None:
    store, _ = store_of()
    task = asyncio.create_task(store.run())
    await asyncio.sleep(0)
    assert not task.done()
    task.cancel()
    await asyncio.wait((task,))
    assert task.cancelled()
    await store.close()
