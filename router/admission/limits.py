"""How much a tenant, and each of its keys, may ask for: requests and tokens per minute, and requests at a time.

    requests   counted at the door, before a body is read
    tokens     a prompt's when it is admitted, an answer's as they come: the second may take an account below zero
    at a time  from its place in the queue to its last token

A bucket holds a minute's worth and fills evenly. A prompt that is larger than a bucket waits for it to be full. What is served
from a cache costs no tokens. Time is handed in.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
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
    def __init__(self, per_minute: int, now_s: float) -> None:
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


class Account:
    """Of a tenant, or of one of its keys."""

    def __init__(self, limits: LimitsConfig, *, of_key: bool, now_s: float) -> None:
        self.of_key = of_key
        self.requests = Bucket(limits.requests_per_minute, now_s) if limits.requests_per_minute else None
        self.tokens = Bucket(limits.tokens_per_minute, now_s) if limits.tokens_per_minute else None
        self.max_concurrent = limits.max_concurrent
        self.concurrent = 0


class Limiter:
    """One per router. What it keeps is bounded by the number of tenants and keys."""

    def __init__(self) -> None:
        self._by_tenant: dict[str, Account] = {}
        self._by_key: dict[tuple[str, str], tuple[Account, ...]] = {}  # tenant and key -> all that its requests count against

    def ask(self, identity: Identity, now_s: float) -> LimitReached | None:
        """At the door. Counts the request, unless a limit is reached."""
        mine = self._of(identity, now_s)
        for account in mine:
            if account.requests is not None and (wait_s := account.requests.wait_s(1, now_s)) > 0:
                return LimitReached(Limit.REQUESTS, account.of_key, wait_s)
        for account in mine:
            if account.requests is not None:
                account.requests.spend(1)
        return None

    def enter(self, identity: Identity, prompt_tokens: int, now_s: float) -> LimitReached | None:
        """Before the queue. Counts prompt and request, unless a limit is reached; then `leave` is due once."""
        mine = self._of(identity, now_s)
        for account in mine:
            if account.max_concurrent is not None and account.concurrent >= account.max_concurrent:
                return LimitReached(Limit.CONCURRENT, account.of_key, 1.0)
            if account.tokens is not None and (wait_s := account.tokens.wait_s(prompt_tokens, now_s)) > 0:
                return LimitReached(Limit.TOKENS, account.of_key, wait_s)
        for account in mine:
            account.concurrent += 1
            if account.tokens is not None:
                account.tokens.spend(prompt_tokens)
        return None

    def spend(self, identity: Identity, tokens: int, now_s: float) -> None:
        """Of an answer; or, below zero, of a prompt that was not computed after all."""
        for account in self._of(identity, now_s):
            if account.tokens is not None:
                account.tokens.level(now_s)
                account.tokens.spend(tokens)

    def leave(self, identity: Identity, now_s: float) -> None:
        for account in self._of(identity, now_s):
            account.concurrent -= 1

    def headers(self, identity: Identity, now_s: float) -> Mapping[str, str]:
        """What an answer says of the tightest of the caller's limits, in the names that OpenAI gave them."""
        mine = self._of(identity, now_s)
        found: dict[str, str] = {}
        for name, buckets in (("requests", [one.requests for one in mine]), ("tokens", [one.tokens for one in mine])):
            tightest = min((bucket for bucket in buckets if bucket is not None), key=lambda one: one.level(now_s), default=None)
            if tightest is not None:
                found[f"x-ratelimit-limit-{name}"] = str(tightest.size)
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(tightest.level(now_s))))
                found[f"x-ratelimit-reset-{name}"] = _duration(tightest.full_in_s(now_s))
        return found

    def _of(self, identity: Identity, now_s: float) -> tuple[Account, ...]:
        name = (identity.tenant.name, identity.key_id)
        found = self._by_key.get(name)
        if found is None:
            tenant = identity.tenant
            mine = []
            if tenant.limits != _UNLIMITED:
                if tenant.name not in self._by_tenant:
                    self._by_tenant[tenant.name] = Account(tenant.limits, of_key=False, now_s=now_s)
                mine.append(self._by_tenant[tenant.name])
            if tenant.key_limits != _UNLIMITED:
                mine.append(Account(tenant.key_limits, of_key=True, now_s=now_s))
            found = self._by_key[name] = tuple(mine)
        return found


_UNLIMITED = LimitsConfig()


def _duration(seconds: float) -> str:
    """As in `6m0s`, `1.5s`, `20ms`."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest_s = divmod(math.ceil(seconds * 10) / 10, 60)
    return f"{int(minutes)}m{rest_s:g}s" if minutes else f"{rest_s:g}s"
