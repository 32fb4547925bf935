"""The parts of model routing that are pure functions: shares, stickiness, order, and the bar that holds a share."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from common.config import ModelPrice, RouteAlias
from router.models.canary import weighted_order
from router.models.facts import Facts, facts_of
from router.models.policy import candidates_of, error_of, relative_costs
from router.models.share import ShareController
from router.schemas import ChatBody, CompletionBody, parse

WEIGHTS = {"a": 70.0, "b": 25.0, "c": 5.0}
CHI_SQUARE_999 = 13.8  # two degrees of freedom


def chat(*messages: tuple[str, str], model: str = "auto") -> ChatBody:
    return parse(ChatBody, {"model": model, "messages": [{"role": role, "content": text} for role, text in messages]})


def no_header(name: str) -> str:
    return ""


def test_canaries_have_the_shares_of_their_weights() -> None:
    found = Counter(weighted_order(WEIGHTS, f"conversation {index}")[0] for index in range(20_000))
    expected = {model: 20_000 * weight / 100 for model, weight in WEIGHTS.items()}
    assert sum((found[model] - expected[model]) ** 2 / expected[model] for model in WEIGHTS) < CHI_SQUARE_999


def test_a_changed_weight_moves_only_who_must() -> None:
    keys = [f"{index}" for index in range(5_000)]
    before = {key: weighted_order(WEIGHTS, key)[0] for key in keys}
    after = {key: weighted_order({**WEIGHTS, "c": 20.0}, key)[0] for key in keys}
    moved = [key for key in keys if before[key] != after[key]]
    assert moved
    assert all(after[key] == "c" for key in moved)
    assert all("c" not in weighted_order({**WEIGHTS, "c": 0.0}, key) for key in keys[:50])


def test_a_conversation_is_the_same_in_all_its_turns_and_another_client_has_others() -> None:
    first = facts_of(chat(("system", "s"), ("user", "hi")), no_header, tenant="t", scope="x")
    later = facts_of(
        chat(("system", "s"), ("user", "hi"), ("assistant", "yes"), ("user", "more")), no_header, tenant="t", scope="x"
    )
    assert first.conversation == later.conversation
    assert (first.text, later.text) == ("hi", "more")
    others = [
        facts_of(chat(("system", "s"), ("user", "ho")), no_header, tenant="t", scope="x"),
        facts_of(chat(("user", "s"), ("user", "hi")), no_header, tenant="t", scope="x"),
        facts_of(chat(("system", "s"), ("user", "hi")), no_header, tenant="t", scope="y"),
        facts_of(chat(("system", "s"), ("user", "hi")), lambda name: "77", tenant="t", scope="x"),
    ]
    assert len({first.conversation, *(facts.conversation for facts in others)}) == 5
    prompt = facts_of(parse(CompletionBody, {"model": "auto", "prompt": [[1, 2, 3]]}), no_header, tenant="t", scope="x")
    assert prompt.text == ""


def test_the_header_names_the_conversation() -> None:
    one = facts_of(chat(("user", "a")), lambda name: "77" if name == "x-conversation-id" else "", tenant="t", scope="x")
    two = facts_of(chat(("user", "b")), lambda name: "77" if name == "x-conversation-id" else "", tenant="t", scope="x")
    assert one.conversation == two.conversation


def test_costs_are_prices_from_0_to_1_and_the_order_without_them() -> None:
    prices = {"a": ModelPrice(input=1, output=3), "b": ModelPrice(input=0, output=1), "c": ModelPrice(input=2, output=3)}
    assert relative_costs(("a", "b", "c"), prices) == {"a": 0.75, "b": 0.0, "c": 1.0}
    assert relative_costs(("a", "b", "d"), prices) == {"a": 0.0, "b": 0.5, "d": 1.0}
    assert relative_costs(("a",), prices) == {"a": 0.0}


def order(alias: RouteAlias, predicted: dict[str, float], bar: float = 0.0) -> list[str]:
    facts = Facts("auto", no_header, "t", "c", "t")
    return [candidate.model for candidate in candidates_of(alias, facts, {"cheap": 0.0, "dear": 1.0}, predicted, bar)]


def test_policies_order_their_candidates() -> None:
    assert order(RouteAlias(candidates=("dear", "cheap")), {}) == ["dear", "cheap"]
    assert order(RouteAlias(candidates=("dear", "cheap"), policy="cheapest"), {}) == ["cheap", "dear"]


def test_the_gain_decides_and_not_how_hard_it_is() -> None:
    alias = RouteAlias(candidates=("cheap", "dear"), policy="predicted", strong_share=0.5)
    assert order(alias, {"cheap": 0.1, "dear": 0.15}, bar=0.2) == ["cheap", "dear"]  # hard, and the dear one does not help
    assert order(alias, {"cheap": 0.6, "dear": 0.9}, bar=0.2) == ["dear", "cheap"]
    assert order(alias, {"cheap": 0.6, "dear": 0.6}, bar=0.0) == ["cheap", "dear"]


def gains(rng: random.Random, mean: float, count: int) -> list[float]:
    return [min(1.0, max(-1.0, rng.gauss(mean, 0.12))) for _ in range(count)]


@pytest.mark.parametrize("target", [0.2, 0.5, 0.8])
def test_a_share_is_held_when_the_questions_change(target: float) -> None:
    rng = random.Random(3)
    alias = RouteAlias(candidates=("cheap", "dear"), policy="predicted", strong_share=target)
    costs = {"cheap": 0.0, "dear": 1.0}
    controller = ShareController()
    fixed_bar = sorted(gains(rng, 0.1, 2_000))[int(2_000 * (1 - target))]
    shares, fixed = [], []
    for gain in [*gains(rng, 0.1, 3_000), *gains(rng, 0.25, 3_000)]:
        predicted = {"cheap": 0.5, "dear": 0.5 + gain}
        chosen = "dear" if gain > controller.bar else "cheap"
        error = error_of(alias, chosen, costs, predicted)
        assert error is not None
        controller.saw(error)
        shares.append(costs[chosen])
        fixed.append(gain > fixed_bar)
    assert abs(sum(shares[3_000:]) / 3_000 - target) < 0.02
    assert abs(sum(fixed[3_000:]) / 3_000 - target) > 0.10


def test_a_quality_floor_is_held() -> None:
    rng = random.Random(4)
    alias = RouteAlias(candidates=("cheap", "dear"), policy="predicted", quality_floor=0.9)
    controller = ShareController()
    reached, best = 0.0, 0.0
    for gain in gains(rng, 0.2, 6_000):
        predicted = {"cheap": 0.5, "dear": 0.5 + gain}
        chosen = "dear" if gain > controller.bar else "cheap"
        controller.saw(error_of(alias, chosen, {"cheap": 0.0, "dear": 1.0}, predicted) or 0.0)
        reached, best = reached + predicted[chosen], best + max(predicted.values())
    assert reached / best == pytest.approx(0.9, abs=0.01)
