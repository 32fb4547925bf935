"""Limits as the faces and the gate ask them: one count over all routers where they share a Redis, else each router's own.

    take       one script in Redis, atomic over all buckets of a caller: fill up, take what is owed, then all or nothing
    spend      is owed: told with the next take, or soon after by `run`
    no answer  the router's own buckets decide, from the levels that it last heard of; what they let through is owed

So a minute's worth is given once, whichever routers are asked, and no request fails or waits longer than one look-up of the
store may take because Redis is away: that is the store's budget and breaker (`router.store`). While it is away, each router
gives out a caller's rate on its own; afterwards at most a minute's worth of that is charged. An answer that came too late may
have been counted in Redis and is owed as well: it errs on the limit's side, by a few requests until the breaker opens.

Requests at a time (`max_concurrent`) are counted by each router alone: a router that dies could not give them back.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

from common.clock import Clock
from router.admission.limits import Account, Bucket, Limit, Limiter, LimitReached, buckets, take
from router.admission.tenants import Identity
from router.store.link import Command, Reply

_GATHER_S = 0.1  # what is owed is told so often
_AWAY_S = 1.0  # and so often while nobody listens
_AT_ONCE = 64  # buckets in one command

# By the server's clock, so that routers need not agree on theirs. Returns which bucket is short (from 1; 0 = none), and all
# levels as text, for Redis cuts numbers to integers. A bucket that is full is forgotten: it is as if nobody had asked for it.
_SCRIPT = b"""
local time = redis.call('TIME')
local now_ms = tonumber(time[1]) * 1000 + tonumber(time[2]) / 1000
local cost = tonumber(ARGV[1])
local levels, short = {}, 0
for i, key in ipairs(KEYS) do
  local size, owed = tonumber(ARGV[2 * i]), tonumber(ARGV[2 * i + 1])
  local kept = redis.pcall('HMGET', key, 'level', 'seen_ms')
  if kept.err then
    redis.call('DEL', key)
    kept = {}
  end
  local level, seen_ms = tonumber(kept[1] or ''), tonumber(kept[2] or '')
  if not level or not seen_ms or not (level > -1e15) then
    level, seen_ms = size, now_ms
  end
  levels[i] = math.min(size, math.min(size, level + math.max(0, now_ms - seen_ms) * size / 60000) - owed)
  if short == 0 and levels[i] < math.min(cost, size) then
    short = i
  end
end
for i, key in ipairs(KEYS) do
  local size = tonumber(ARGV[2 * i])
  if short == 0 then
    levels[i] = levels[i] - cost
  end
  redis.call('HSET', key, 'level', string.format('%.6f', levels[i]), 'seen_ms', string.format('%.3f', now_ms))
  redis.call('PEXPIRE', key, math.max(1, math.ceil((size - levels[i]) * 60000 / size)))
  levels[i] = string.format('%.6f', levels[i])
end
return {short, unpack(levels)}
"""


class Asked(Protocol):
    """What is needed of the store: see `RedisStore`."""

    async def ask(self, operation: str, commands: Sequence[Command]) -> list[Reply] | None: ...


class Limits:
    """One per router. `server` None: this router counts alone. `run` is a task of the process, if there is a server."""

    def __init__(self, server: Asked | None, *, namespace: str, clock: Clock) -> None:
        self._server = server
        self._prefix = f"{namespace}:limit:".encode()
        self._clock = clock
        self._own = Limiter()
        self._owed: dict[Bucket, float] = {}
        self._owes = asyncio.Event()

    async def ask(self, identity: Identity) -> LimitReached | None:
        """At the door. Counts the request, unless a limit is reached."""
        return await self._take(Limit.REQUESTS, self._accounts(identity), 1)

    async def enter(self, identity: Identity, prompt_tokens: int) -> LimitReached | None:
        """Before the queue. Counts prompt and request, unless a limit is reached; then `leave` is due once."""
        reached = self._own.begin(identity, self._clock.monotonic_s())
        if reached is not None:
            return reached
        entered = False
        try:
            reached = await self._take(Limit.TOKENS, self._accounts(identity), prompt_tokens)
            entered = reached is None
        finally:
            if not entered:
                self.leave(identity)
        return reached

    def spend(self, identity: Identity, tokens: int) -> None:
        """Of an answer, token by token; or, below zero, of a prompt that was not computed after all."""
        if not self._own.limits(identity):
            return
        self._own.spend(identity, tokens, self._clock.monotonic_s())
        if self._server is not None:
            self._owe([bucket for _, bucket in buckets(Limit.TOKENS, self._accounts(identity))], tokens)

    def leave(self, identity: Identity) -> None:
        self._own.leave(identity, self._clock.monotonic_s())

    def headers(self, identity: Identity) -> Mapping[str, str]:
        return self._own.headers(identity, self._clock.monotonic_s())

    async def run(self) -> None:
        """Tells what is owed when no request does. Ends only by cancellation."""
        while True:
            await self._owes.wait()
            await asyncio.sleep(_GATHER_S)
            self._owes.clear()
            if not await self.settle():
                await asyncio.sleep(_AWAY_S)

    async def settle(self) -> bool:
        """Tells what is owed; False if nobody listens."""
        whose = tuple(self._owed)
        for start in range(0, len(whose), _AT_ONCE):
            if await self._tell(whose[start : start + _AT_ONCE], 0) is None:
                return False
        return True

    def _accounts(self, identity: Identity) -> tuple[Account, ...]:
        return self._own.accounts(identity, self._clock.monotonic_s())

    async def _take(self, limit: Limit, accounts: Sequence[Account], cost: int) -> LimitReached | None:
        found = buckets(limit, accounts)
        short = await self._tell([bucket for _, bucket in found], cost) if self._server is not None and found else None
        now_s = self._clock.monotonic_s()
        if short is None:
            reached = take(limit, accounts, cost, now_s)
            if reached is None and self._server is not None:
                self._owe([bucket for _, bucket in found], cost)
            return reached
        if short == 0:
            return None
        account, bucket = found[short - 1]
        return LimitReached(limit, account.of_key, max(0.001, bucket.wait_s(cost, now_s)))

    def _owe(self, whose: Sequence[Bucket], cost: float) -> None:
        for bucket in whose:
            self._owed[bucket] = min(float(bucket.size), self._owed.get(bucket, 0.0) + cost)
            self._owes.set()

    async def _tell(self, whose: Sequence[Bucket], cost: int) -> int | None:
        """Takes `cost` out of all, or says which is short (from 1; 0 = none is). None if Redis does not say."""
        if self._server is None or not whose:
            return None
        owed = [self._owed.pop(bucket, 0.0) for bucket in whose]
        told = False
        try:
            answer = await self._server.ask("limit", [self._command(whose, owed, cost)])
            levels = None if answer is None else _levels(answer[0], len(whose))
            told = levels is not None
        finally:
            if not told:
                for bucket, rest in zip(whose, owed, strict=True):
                    if rest:
                        self._owe([bucket], rest)
        if levels is None:
            return None
        now_s = self._clock.monotonic_s()
        short, *found = levels
        for bucket, level in zip(whose, found, strict=True):
            bucket.correct(level - self._owed.get(bucket, 0.0), now_s)
        return int(short)

    def _command(self, whose: Sequence[Bucket], owed: Sequence[float], cost: int) -> Command:
        keys = [self._prefix + hashlib.blake2b(bucket.name.encode(), digest_size=16).hexdigest().encode() for bucket in whose]
        sizes = [part for bucket, rest in zip(whose, owed, strict=True) for part in (bucket.size, f"{rest:.6f}")]
        return ("EVAL", _SCRIPT, len(keys), *keys, cost, *sizes)


def _levels(reply: Reply, count: int) -> list[float] | None:
    """Which is short, and the level of each; None for anything that is not that."""
    if not isinstance(reply, list) or len(reply) != count + 1:
        return None
    try:
        return [float(part) for part in reply]
    except (TypeError, ValueError):
        return None
