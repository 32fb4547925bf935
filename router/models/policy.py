"""The order in which the models of a name are tried, before anything is known of their health: pure functions.

weights      canary: by hash of the conversation
first        as written
cheapest     by price
predicted    by predicted quality less what it costs: the largest `P(good) - bar * cost`, cost from 0 (cheapest) to 1 (dearest)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common.config import ModelPrice, RouteAlias
from router.models.canary import weighted_order
from router.models.decision import Candidate
from router.models.facts import Facts


def relative_costs(models: Sequence[str], prices: Mapping[str, ModelPrice]) -> dict[str, float]:
    """From 0 to 1. Without prices the models are taken to be written from cheap to dear."""
    known = {model: prices[model].input + prices[model].output for model in models if model in prices}
    if len(known) < len(models) or max(known.values()) == min(known.values()):
        known = {model: float(place) for place, model in enumerate(models)}
    low, high = min(known.values()), max(known.values())
    return {model: (cost - low) / (high - low or 1.0) for model, cost in known.items()}


def candidates_of(
    alias: RouteAlias,
    facts: Facts,
    costs: Mapping[str, float],
    predicted: Mapping[str, float],
    bar: float,
    predicted_by: str = "",
) -> list[Candidate]:
    """Without the fallbacks of the name."""
    if alias.weights:
        order = weighted_order(alias.weights, facts.conversation)
        return [Candidate(model, f"canary: weight {alias.weights[model]:g}, by conversation") for model in order]
    match alias.policy:
        case "first":
            return [Candidate(model, f"place {place} of its list") for place, model in enumerate(alias.candidates, 1)]
        case "cheapest":
            order = tuple(sorted(alias.candidates, key=lambda model: costs[model]))
            return [Candidate(model, f"place {place} by price") for place, model in enumerate(order, 1)]
        case "predicted":
            value = {model: predicted[model] - bar * costs[model] for model in alias.candidates}
            order = tuple(sorted(alias.candidates, key=lambda model: (-value[model], costs[model])))
            return [
                Candidate(model, f"predicted {predicted[model]:.3f} by {predicted_by}, cost {costs[model]:g}, bar {bar:.3f}")
                for model in order
            ]


def error_of(alias: RouteAlias, chosen: str, costs: Mapping[str, float], predicted: Mapping[str, float]) -> float | None:
    """How far a decision is above what was promised, for the controller of the bar; None if nothing was."""
    if alias.strong_share is not None:
        return costs[chosen] - alias.strong_share
    if alias.quality_floor is not None:
        best = max(predicted[model] for model in alias.candidates)
        return predicted[chosen] - alias.quality_floor * best
    return None
