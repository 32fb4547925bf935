"""The store that all routers share: one Redis (7 or later), spoken to over three connections per router.

    connect -> confirm the incarnation -> serve (look-ups | writes and invalidations | change log) -> lost -> back-off -> ...

A look-up is one round trip: an MGET of the incarnation, the epochs and the value, atomic in Redis, and the server's time.
What it returns is checked against what was stored (`router.store.sealed`), so nothing is served from memory of this process.
Only the first look-up that names a new epoch takes a second round trip, which creates it.

All times of expiry are in the server's clock. The clocks of routers are compared with nothing but themselves.

Between a request and a Redis that is away, hung, slow or full stand three things: no request opens a connection, each look-
up has its budget, and the breaker (`router.store.breaker`) lets none pass while answers do not come. Writes wait in a queue
of bounded size and are dropped, and counted, when they cannot be made.

A change of server behind one address, or a replica made primary, is safe as long as it has all writes that were
acknowledged. A Redis Cluster is not supported: the keys of a look-up must live together.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.clock import Clock
from common.config import RedisConfig
from common.errors import StoreUnavailable
from common.logs import get_logger
from common.metrics import StoreMetrics
from router.store.base import AWAY, Epochs, Listener, Reading, check_key, sorted_names
from router.store.breaker import Breaker
from router.store.change_log import WAIT_S, ChangeLog
from router.store.epochs import EpochKeys, Server
from router.store.link import Command, Link, Reply, answer_within, together
from router.store.sealed import Sealer

if TYPE_CHECKING:
    from redis.asyncio.connection import AbstractConnection

log = get_logger(__name__)

_BACKOFF_FIRST_S, _BACKOFF_LAST_S = 0.05, 1.0
_BATCH_WRITES, _BATCH_BYTES = 64, 1024 * 1024
_LEAST_VERSION = (7, 0)
_CONFIRMATIONS = 10  # tries to agree with other routers on an incarnation
_MAX_DELETED_KEYS = 1024


@dataclass(slots=True)
class _Session:
    """One time of being connected."""

    server: Server
    lookups: Link
    writes: Link
    ahead_s: float  # the server's clock less ours


@dataclass(frozen=True, slots=True)
class _Write:
    key: bytes
    sealed: bytes
    ttl_ms: int
    names: tuple[str, ...]


class RedisStore:
    """`connect` makes a connection that is not open yet. While `run` has not connected, the store is away."""

    def __init__(
        self,
        config: RedisConfig,
        *,
        connect: Callable[[], AbstractConnection],
        sealer: Sealer,
        max_value_bytes: int,
        clock: Clock,
        metrics: StoreMetrics,
        jitter: random.Random,
    ) -> None:
        self._config = config
        self._connect = connect
        self._sealer = sealer
        self._max_value_bytes = max_value_bytes
        self._clock = clock
        self._metrics = metrics
        self._jitter = jitter
        self._values = f"{config.namespace}:v:".encode()
        self._epoch_keys = EpochKeys(config.namespace)
        self._log = ChangeLog(config.namespace, max_entries=config.log_entries, timeout_s=config.write_timeout_s, metrics=metrics)
        self._breaker = Breaker(clock=clock, budget_s=config.operation_timeout_s, jitter=jitter)
        self._breaker_moved = asyncio.Event()
        self._session: _Session | None = None
        self._queue: deque[_Write] = deque()
        self._queued_bytes = 0
        self._queued = asyncio.Event()
        metrics.read_breaker_from(lambda: self._breaker.state.value)

    async def get(self, key: bytes, names: Sequence[str]) -> Reading:
        check_key(key)
        wanted = sorted_names(names)
        session = self._passing()
        if session is None:
            self._metrics.operation("get", "away")
            return AWAY
        start_s = self._clock.monotonic_s()
        try:
            reading, result = await self._look_up(session, key, wanted, start_s + self._config.operation_timeout_s)
        except TimeoutError:
            reading, result = AWAY, "late"
            self._failed()
        except ConnectionError:
            reading, result = AWAY, "lost"
            self._failed()
        else:
            self._answered(self._clock.monotonic_s() - start_s)
        self._metrics.operation("get", result, self._clock.monotonic_s() - start_s)
        return reading

    def put(self, key: bytes, value: bytes, *, ttl_s: float, epochs: Epochs) -> None:
        check_key(key)
        ttl_ms = int(ttl_s * 1000)
        session = self._passing()
        if len(value) > self._max_value_bytes:
            self._metrics.dropped("too_large")
        elif ttl_ms <= 0:
            self._metrics.dropped("outdated")
        elif session is None:
            self._metrics.dropped("away")
        elif self._queued_bytes + len(value) > self._config.queued_bytes:
            self._metrics.dropped("queue_full")
        else:
            expires_ms = int((self._clock.monotonic_s() + session.ahead_s) * 1000) + ttl_ms
            sealed = self._sealer.seal(key, value, epochs=epochs, expires_ms=expires_ms)
            self._queue.append(_Write(key, sealed, ttl_ms, epochs.names))
            self._queued_bytes += len(sealed)
            self._queued.set()

    async def delete(self, keys: Sequence[bytes]) -> None:
        if not keys:
            return
        gone = set(keys)
        kept = [write for write in self._queue if write.key not in gone]
        self._queue = deque(kept)
        self._queued_bytes = sum(len(write.sealed) for write in kept)
        for start in range(0, len(keys), _MAX_DELETED_KEYS):
            part = keys[start : start + _MAX_DELETED_KEYS]
            replies = await self._administer("delete", [("DEL", *(self._values + key for key in part)), self._log.deleted(part)])
            if not isinstance(replies[0], int):
                self._metrics.operation("delete", "refused")
                raise StoreUnavailable("the store refused to delete", retry_after_s=1.0)
        self._metrics.operation("delete", "ok")

    async def invalidate(self, names: Sequence[str]) -> None:
        unique = sorted_names(names)
        if not unique:
            return
        news = self._log.invalidated(unique)
        advance: list[Command] = [("MULTI",), *self._epoch_keys.advance(unique), ("EXEC",), news]
        *_, done, _logged = await self._administer("invalidate", advance)
        if not isinstance(done, list) or not all(isinstance(reply, int) for reply in done[1::2]):
            # Out of memory, or something else lies where a counter should be. Removing counters always helps.
            forgotten, _logged = await self._administer("invalidate", [self._epoch_keys.forget(unique), news])
            if not isinstance(forgotten, int):
                self._metrics.operation("invalidate", "refused")
                raise StoreUnavailable("the store refused to invalidate", retry_after_s=1.0)
        self._metrics.operation("invalidate", "ok")

    def subscribe(self, listener: Listener) -> None:
        self._log.subscribe(listener)

    async def ask(self, operation: str, commands: Sequence[Command]) -> list[Reply] | None:
        """For what shares this connection, under the same budget and breaker. None if there is no answer."""
        session = self._passing()
        if session is None:
            self._metrics.operation(operation, "away")
            return None
        start_s = self._clock.monotonic_s()
        replies: list[Reply] | None = None
        try:
            replies = await self._answer(session, commands, start_s + self._config.operation_timeout_s)
        except (TimeoutError, ConnectionError):
            self._failed()
        else:
            self._answered(self._clock.monotonic_s() - start_s)
        self._metrics.operation(operation, "late" if replies is None else "ok", self._clock.monotonic_s() - start_s)
        return replies

    async def run(self) -> None:
        backoff_s, reported = _BACKOFF_FIRST_S, False
        while True:
            reason, was_up = await self._serve()
            if was_up:
                backoff_s, reported = _BACKOFF_FIRST_S, False
            if not reported:
                log.warning("the shared store is away", reason=reason)
            reported = True
            await asyncio.sleep(backoff_s * (0.5 + 0.5 * self._jitter.random()))
            backoff_s = min(2 * backoff_s, _BACKOFF_LAST_S)

    async def close(self) -> None:
        """Connections end with `run`."""

    # Requests

    def _passing(self) -> _Session | None:
        return self._session if self._breaker.passes else None

    async def _look_up(self, session: _Session, key: bytes, names: tuple[str, ...], deadline_s: float) -> tuple[Reading, str]:
        keys = self._epoch_keys.of(names)
        read: list[Command] = [("MGET", *keys, self._values + key), ("TIME",)]
        values, time = await self._answer(session, read, deadline_s)
        if not isinstance(values, list) or not isinstance(time, list):
            return AWAY, "refused"
        epochs = self._epoch_keys.parse(names, values[:-1])
        if epochs is None:
            create = self._epoch_keys.create(names, values[:-1], session.server)
            *_, values, time = await self._answer(session, [*create, *read], deadline_s)
            if not isinstance(values, list) or not isinstance(time, list):
                return AWAY, "refused"
            epochs = self._epoch_keys.parse(names, values[:-1])
            if epochs is None:  # no room for it, or something else lies under one of the keys
                session.writes.call([("DEL", *(key for key, value in zip(keys, values, strict=False) if value is None))])
                return AWAY, "refused"
        now_s = int(time[0]) + int(time[1]) / 1e6
        session.ahead_s = now_s - self._clock.monotonic_s()
        if values[-1] is None:
            return Reading(None, epochs), "absent"
        opened = self._sealer.open(key, values[-1])
        if opened is None:
            return Reading(None, epochs), "unverified"
        if opened.expires_ms <= now_s * 1000:
            return Reading(None, epochs), "expired"
        if not set(opened.epochs.pairs) <= set(epochs.pairs):
            return Reading(None, epochs), "invalidated"
        return Reading(opened.value, epochs), "found"

    async def _answer(self, session: _Session, commands: Sequence[Command], deadline_s: float) -> list[Reply]:
        return await answer_within(session.lookups.call(commands), max(0.0, deadline_s - self._clock.monotonic_s()))

    async def _administer(self, operation: str, commands: Sequence[Command]) -> list[Reply]:
        """For what must be known to be done. The breaker is for requests; this is tried whenever there is a connection."""
        session = self._session
        if session is None:
            self._metrics.operation(operation, "away")
            raise StoreUnavailable("the shared store is away", retry_after_s=1.0)
        start_s = self._clock.monotonic_s()
        try:
            return await answer_within(session.writes.call(commands), self._config.write_timeout_s)
        except (TimeoutError, ConnectionError) as error:
            self._metrics.operation(operation, "late", self._clock.monotonic_s() - start_s)
            raise StoreUnavailable("the shared store did not answer in time", retry_after_s=1.0) from error

    def _failed(self) -> None:
        self._breaker.failed()
        if not self._breaker.passes:
            self._breaker_moved.set()

    def _answered(self, seconds: float) -> None:
        self._breaker.answered(seconds)
        if not self._breaker.passes:
            self._breaker_moved.set()

    # The life of a connection

    async def _serve(self) -> tuple[str, bool]:
        """Connects and serves until it cannot. Returns why it ended, and whether it had begun."""
        stall_s = self._config.write_timeout_s
        lookups, writes = (Link(self._connect(), stall_s=stall_s) for _ in range(2))
        tail = Link(self._connect(), stall_s=stall_s + WAIT_S)
        links = (lookups, writes, tail)
        was_up = False
        try:
            for link in links:
                await link.open(self._config.connect_timeout_s)
            await together(*(link.run() for link in links), self._work(lookups, writes, tail))
            reason = "ended"
        except ConnectionError as error:
            reason = str(error)
        except StoreUnavailable as error:
            reason = error.message
        finally:
            was_up = self._session is not None
            self._session = None
            self._breaker.lost()
            if self._queue:
                self._metrics.dropped("away", len(self._queue))
            self._queue.clear()
            self._queued_bytes = 0
            for link in links:
                await link.close()
        return reason, was_up

    async def _work(self, lookups: Link, writes: Link, tail: Link) -> None:
        servers = [
            Server.parse((await self._setup(link, [("INFO", "server", "persistence")]))[0]) for link in (lookups, writes, tail)
        ]
        server = servers[0]
        if server is None or any(other is None or other.run_id != server.run_id for other in servers):
            raise StoreUnavailable("the server does not say who it is, or changed while connecting")
        if server.version < _LEAST_VERSION:
            raise StoreUnavailable(f"Redis {'.'.join(map(str, _LEAST_VERSION))} or later is needed")
        await self._confirm_incarnation(writes, server)
        seconds, micros = (await self._setup(writes, [("TIME",)]))[0]
        ahead_s = int(seconds) + int(micros) / 1e6 - self._clock.monotonic_s()
        session = self._session = _Session(server, lookups, writes, ahead_s)
        log.info("the shared store is connected", version=".".join(map(str, server.version)))
        await together(self._write(session), self._probe(session), self._log.run(tail))

    async def _setup(self, link: Link, commands: Sequence[Command]) -> list[Reply]:
        try:
            return await answer_within(link.call(commands), self._config.connect_timeout_s)
        except TimeoutError as error:
            raise ConnectionError("no answer while connecting") from error

    async def _confirm_incarnation(self, link: Link, server: Server) -> None:
        key = self._epoch_keys.incarnation
        for _ in range(_CONFIRMATIONS):
            _watched, now = await self._setup(link, [("WATCH", key), ("GET", key)])
            value = self._epoch_keys.confirm(now, server)
            if value is None:
                await self._setup(link, [("UNWATCH",)])
                return
            *_, done = await self._setup(link, [("MULTI",), ("SET", key, value), ("EXEC",)])
            if isinstance(done, list):
                return
            if done is not None:  # refused; None is: another router was quicker
                await self._setup(link, [("UNWATCH",), ("DEL", key)])
                raise StoreUnavailable("the store takes no writes")
        raise StoreUnavailable("no agreement on an incarnation")

    async def _write(self, session: _Session) -> None:
        while True:
            await self._queued.wait()
            batch: list[_Write] = []
            batch_bytes = 0
            while self._queue and len(batch) < _BATCH_WRITES and batch_bytes < _BATCH_BYTES:
                batch.append(self._queue.popleft())
                batch_bytes += len(batch[-1].sealed)
            self._queued_bytes -= batch_bytes
            if not self._queue:
                self._queued.clear()
            if batch:
                await self._write_batch(session, batch)

    async def _write_batch(self, session: _Session, batch: Sequence[_Write]) -> None:
        commands: list[Command] = []
        for write in batch:
            commands.append(("SET", self._values + write.key, write.sealed, "PX", write.ttl_ms))
            commands.append(self._log.inserted(write.key, write.names))
        start_s = self._clock.monotonic_s()
        try:
            replies = await answer_within(session.writes.call(commands), self._config.write_timeout_s)
        except TimeoutError:
            self._metrics.dropped("late", len(batch))
            self._failed()
            return
        except ConnectionError:
            self._metrics.dropped("lost", len(batch))
            raise
        seconds = self._clock.monotonic_s() - start_s
        for reply in replies[::2]:
            if reply == b"OK":
                self._metrics.operation("put", "ok", seconds)
            else:
                self._metrics.operation("put", "refused", seconds)
                self._metrics.dropped("refused")

    async def _probe(self, session: _Session) -> None:
        """Closes the breaker again when the server answers a probe in good time."""
        while True:
            wait_s = self._breaker.probe_in_s()
            if wait_s is None:
                self._breaker_moved.clear()
                await self._breaker_moved.wait()
                continue
            await asyncio.sleep(wait_s)
            self._breaker.probing()
            start_s = self._clock.monotonic_s()
            try:
                await answer_within(session.lookups.call([("PING",)]), self._config.operation_timeout_s)
            except TimeoutError:
                self._breaker.probed(None)
                continue
            self._breaker.probed(self._clock.monotonic_s() - start_s)
