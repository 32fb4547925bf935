"""How much a tenant, and each of its keys, may ask for: requests and tokens per minute, and requests at a time.

    requests   counted at the door, before a body is read
    tokens     a prompt's when it is admitted, an answer's as they come: the second may take an account below zero
    at a time  from its place in the queue to its last token

A bucket holds a minute's worth and fills evenly. A prompt that is larger than a bucket waits for it to be full. What is served
from a cache costs no tokens. Time is handed in. This is what one router counts; `shared_limits.py` makes one count of several.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from common.config import LimitsConfig
from router.admission.tenants import Identity


class Limit(enum.StrEnum):
    """What was used up; the reason of a refusal."""

    REQUESTS = "requests_per_minute"
    TOKENS = "tokens_per_minute"
    CONCURRENT = "max_concurrent"


@dataclass(frozen=True, slots=True)
class LimitReached:
    limit: Limit
    of_key: bool  # not of the tenant
    retry_after_s: float


class Bucket:
    """`name` tells it from all others, in every router alike."""

    def __init__(self, name: str, per_minute: int, now_s: float) -> None:
        self.name = name
        self.size = per_minute
        self._level = float(per_minute)
        self._seen_s = now_s

    def level(self, now_s: float) -> float:
        """May be below zero."""
        passed_s = max(0.0, now_s - self._seen_s)
        self._level = min(float(self.size), self._level + passed_s * self.size / 60)
        self._seen_s = max(self._seen_s, now_s)
        return self._level

    def wait_s(self, cost: float, now_s: float) -> float:
        """Until so much may be taken; 0 = now."""
        return max(0.0, min(cost, self.size) - self.level(now_s)) * 60 / self.size

    def full_in_s(self, now_s: float) -> float:
        return (self.size - self.level(now_s)) * 60 / self.size

    def spend(self, cost: float) -> None:
        """May be less than zero, which gives back."""
        self._level = min(float(self.size), self._level - cost)

    def correct(self, level: float, now_s: float) -> None:
        """To what others know better."""
        self._level = min(float(self.size), level)
        self._seen_s = max(self._seen_s, now_s)


class Account:
    """Of a tenant, or of one of its keys."""

    def __init__(self, name: str, limits: LimitsConfig, *, of_key: bool, now_s: float) -> None:
        requests, tokens = limits.requests_per_minute, limits.tokens_per_minute
        self.of_key = of_key
        self.requests = Bucket(f"{name}\0requests", requests, now_s) if requests else None
        self.tokens = Bucket(f"{name}\0tokens", tokens, now_s) if tokens else None
        self.max_concurrent = limits.max_concurrent
        self.concurrent = 0


class Limiter:
    """One per router. What it keeps is bounded by the number of tenants and keys."""

    def __init__(self) -> None:
        self._by_tenant: dict[str, Account] = {}
        self._by_key: dict[tuple[str, str], tuple[Account, ...]] = {}  # tenant and key -> all that its requests count against

    def ask(self, identity: Identity, now_s: float) -> LimitReached | None:
        """At the door. Counts the request, unless a limit is reached."""
        return take(Limit.REQUESTS, self.accounts(identity, now_s), 1, now_s)

    def enter(self, identity: Identity, prompt_tokens: int, now_s: float) -> LimitReached | None:
        """Before the queue. Counts prompt and request, unless a limit is reached; then `leave` is due once."""
        reached = self.begin(identity, now_s)
        if reached is None:
            reached = take(Limit.TOKENS, self.accounts(identity, now_s), prompt_tokens, now_s)
            if reached is not None:
                self.leave(identity, now_s)
        return reached

    def begin(self, identity: Identity, now_s: float) -> LimitReached | None:
        """The part of `enter` that counts requests at a time."""
        mine = self.accounts(identity, now_s)
        for account in mine:
            if account.max_concurrent is not None and account.concurrent >= account.max_concurrent:
                return LimitReached(Limit.CONCURRENT, account.of_key, 1.0)
        for account in mine:
            account.concurrent += 1
        return None

    def limits(self, identity: Identity) -> bool:
        """Whether anything is counted for it at all."""
        return self._by_key.get((identity.tenant.name, identity.key_id)) != ()

    def spend(self, identity: Identity, tokens: int, now_s: float) -> None:
        """Of an answer; or, below zero, of a prompt that was not computed after all."""
        for _, bucket in buckets(Limit.TOKENS, self.accounts(identity, now_s)):
            bucket.level(now_s)
            bucket.spend(tokens)

    def leave(self, identity: Identity, now_s: float) -> None:
        for account in self.accounts(identity, now_s):
            account.concurrent -= 1

    def headers(self, identity: Identity, now_s: float) -> Mapping[str, str]:
        """What an answer says of the tightest of the caller's limits, in the names that OpenAI gave them."""
        mine = self.accounts(identity, now_s)
        found: dict[str, str] = {}
        for name, limit in (("requests", Limit.REQUESTS), ("tokens", Limit.TOKENS)):
            tightest = min((bucket for _, bucket in buckets(limit, mine)), key=lambda one: one.level(now_s), default=None)
            if tightest is not None:
                found[f"x-ratelimit-limit-{name}"] = str(tightest.size)
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(tightest.level(now_s))))
                found[f"x-ratelimit-reset-{name}"] = _duration(tightest.full_in_s(now_s))
        return found

    def accounts(self, identity: Identity, now_s: float) -> tuple[Account, ...]:
        """All that a request of this caller counts against."""
        name = (identity.tenant.name, identity.key_id)
        found = self._by_key.get(name)
        if found is None:
            tenant = identity.tenant
            mine = []
            if tenant.limits != _UNLIMITED:
                if tenant.name not in self._by_tenant:
                    self._by_tenant[tenant.name] = Account(f"tenant\0{tenant.name}", tenant.limits, of_key=False, now_s=now_s)
                mine.append(self._by_tenant[tenant.name])
            if tenant.key_limits != _UNLIMITED:
                key = f"key\0{tenant.name}\0{identity.key_id}"
                mine.append(Account(key, tenant.key_limits, of_key=True, now_s=now_s))
            found = self._by_key[name] = tuple(mine)
        return found


_UNLIMITED = LimitsConfig()


def buckets(limit: Limit, accounts: Iterable[Account]) -> list[tuple[Account, Bucket]]:
    """Those of one kind, with whose they are."""
    found = ((account, account.requests if limit is Limit.REQUESTS else account.tokens) for account in accounts)
    return [(account, bucket) for account, bucket in found if bucket is not None]


def take(limit: Limit, accounts: Iterable[Account], cost: float, now_s: float) -> LimitReached | None:
    """Out of every bucket of this kind, or out of none of them."""
    found = buckets(limit, accounts)
    for account, bucket in found:
        if (wait_s := bucket.wait_s(cost, now_s)) > 0:
            return LimitReached(limit, account.of_key, wait_s)
    for _, bucket in found:
        bucket.spend(cost)
    return None


def _duration(seconds: float) -> str:
    """As in `6m0s`, `1.5s`, `20ms`."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest_s = divmod(math.ceil(seconds * 10) / 10, 60)
    return f"{int(minutes)}m{rest_s:g}s" if minutes else f"{rest_s:g}s"
