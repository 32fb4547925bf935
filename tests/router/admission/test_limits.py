"""Requests and tokens per minute, and requests at a time, of a tenant and of its keys."""

from __future__ import annotations

from typing import Any

import pytest

from common.config import RouterConfig
from router.admission.limits import Limit, Limiter
from router.admission.tenants import Identity, tenants_of


def identity(key_id: str = "k1", tenant: str = "acme", **part: Any) -> Identity:
    config = RouterConfig.model_validate({"tenants": {tenant: part}})
    return Identity(tenants_of(config)[tenant], key_id)


def test_a_minutes_worth_may_come_at_once_and_then_evenly() -> None:
    limiter, who = Limiter(), identity(limits={"requests_per_minute": 6})
    assert [limiter.ask(who, 0.0) for _ in range(6)] == [None] * 6
    reached = limiter.ask(who, 1.0)
    assert reached is not None
    assert (reached.limit, reached.of_key) == (Limit.REQUESTS, False)
    assert reached.retry_after_s == pytest.approx(9.0)  # one every ten seconds, and one has passed
    assert limiter.ask(who, 9.9) is not None
    assert limiter.ask(who, 10.0) is None
    assert limiter.ask(who, 10.1) is not None
    assert [limiter.ask(who, 1000.0) for _ in range(6)] == [None] * 6
    assert limiter.ask(who, 1000.0) is not None


def test_a_request_that_is_refused_for_its_key_does_not_count_for_its_tenant() -> None:
    part = {"limits": {"requests_per_minute": 3}, "key_limits": {"requests_per_minute": 1}}
    limiter, one, two, three = Limiter(), *(identity(key, **part) for key in ("k1", "k2", "k3"))
    assert limiter.ask(one, 0.0) is None
    reached = limiter.ask(one, 0.0)
    assert reached is not None
    assert reached.of_key
    assert limiter.ask(two, 0.0) is None
    assert limiter.ask(three, 0.0) is None
    reached = limiter.ask(identity("k4", **part), 0.0)
    assert reached is not None
    assert not reached.of_key


def test_answers_count_when_they_come_and_may_exceed() -> None:
    limiter, who = Limiter(), identity(limits={"tokens_per_minute": 600})
    assert limiter.enter(who, 100, 0.0) is None
    limiter.spend(who, 650, 0.0)  # 150 below
    reached = limiter.enter(who, 50, 0.0)
    assert reached is not None
    assert (reached.limit, reached.retry_after_s) == (Limit.TOKENS, pytest.approx(20.0))
    assert limiter.headers(who, 0.0)["x-ratelimit-remaining-tokens"] == "0"
    assert limiter.enter(who, 50, 20.0) is None


def test_what_was_not_computed_is_given_back() -> None:
    limiter, who = Limiter(), identity(limits={"tokens_per_minute": 600})
    assert limiter.enter(who, 600, 0.0) is None
    limiter.leave(who, 0.0)
    limiter.spend(who, -600, 0.0)
    limiter.spend(who, -600, 0.0)
    assert limiter.enter(who, 600, 0.0) is None
    assert limiter.enter(who, 600, 0.0) is not None


def test_a_prompt_that_is_larger_than_a_minutes_worth_waits_for_a_full_one() -> None:
    limiter, who = Limiter(), identity(limits={"tokens_per_minute": 60})
    assert limiter.enter(who, 500, 0.0) is None
    reached = limiter.enter(who, 500, 0.0)
    assert reached is not None
    assert reached.retry_after_s == pytest.approx(500.0)
    assert limiter.enter(who, 500, 500.0) is None


def test_at_a_time() -> None:
    limiter, who = Limiter(), identity(key_limits={"max_concurrent": 2})
    assert [limiter.enter(who, 5, 0.0) for _ in range(2)] == [None, None]
    reached = limiter.enter(who, 5, 0.0)
    assert reached is not None
    assert (reached.limit, reached.of_key) == (Limit.CONCURRENT, True)
    limiter.leave(who, 1.0)
    assert limiter.enter(who, 5, 1.0) is None


def test_a_refusal_takes_nothing() -> None:
    limiter, who = Limiter(), identity(limits={"tokens_per_minute": 100}, key_limits={"max_concurrent": 1})
    assert limiter.enter(who, 40, 0.0) is None
    assert limiter.enter(who, 40, 0.0) is not None
    assert limiter.headers(who, 0.0)["x-ratelimit-remaining-tokens"] == "60"


def test_headers_speak_of_the_tightest_limit() -> None:
    part = {
        "limits": {"requests_per_minute": 600, "tokens_per_minute": 6000},
        "key_limits": {"requests_per_minute": 60},
    }
    limiter, who = Limiter(), identity(**part)
    for _ in range(3):
        limiter.ask(who, 0.0)
    limiter.enter(who, 5900, 0.0)
    assert limiter.headers(who, 0.0) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "57",
        "x-ratelimit-reset-requests": "3s",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "100",
        "x-ratelimit-reset-tokens": "59s",
    }
    limiter.spend(who, 700, 0.0)
    assert limiter.headers(who, 0.0)["x-ratelimit-reset-tokens"] == "1m6s"
    assert limiter.headers(who, 2.95)["x-ratelimit-reset-requests"] == "50ms"
    assert Limiter().headers(identity(), 0.0) == {}


def test_tenants_and_keys_have_accounts_of_their_own() -> None:
    part = {"limits": {"requests_per_minute": 1}}
    limiter = Limiter()
    assert limiter.ask(identity(tenant="acme", **part), 0.0) is None
    assert limiter.ask(identity(tenant="zeta", **part), 0.0) is None
    assert limiter.ask(identity("k2", tenant="acme", **part), 0.0) is not None
