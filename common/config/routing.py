"""Names that stand for several models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.config.part import Part


class RouteWhen(Part):
    """All that is given must hold."""

    tokens_over: int | None = Field(None, ge=0, description="The prompt has more tokens, as the model of the rule counts them.")
    header: dict[str, str] = Field({}, description="Headers (metadata, over gRPC) of the call with exactly these values.")
    tenant: str | None = Field(None, min_length=1, description="The call comes from this tenant.")

    @model_validator(mode="after")
    def _says_something(self) -> RouteWhen:
        if self.tokens_over is None and self.tenant is None and not self.header:
            raise ValueError("a rule needs tokens_over, header or tenant")
        return self


class RouteRule(Part):
    when: RouteWhen
    use: str = Field(description="The model that answers then.")


class ModelPrice(Part):
    """In any one currency, per million tokens."""

    input: float = Field(ge=0)
    output: float = Field(ge=0)


class RouteAlias(Part):
    """A name that stands for several models: either `candidates` with a policy, or `weights`."""

    candidates: tuple[str, ...] = Field((), description="Models; without prices they count as written from cheap to dear.")
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {}, description="A canary: each model's share of the conversations. A conversation stays with its model."
    )
    policy: Literal["first", "cheapest", "predicted"] = Field(
        "first",
        description="first: as written. cheapest: by price. predicted: by predicted quality less cost; needs a predictor.",
    )
    strong_share: float | None = Field(None, ge=0, le=1, description="predicted: hold the mean cost here, 0 cheapest, 1 dearest.")
    quality_floor: float | None = Field(
        None, gt=0, le=1, description="predicted: hold the predicted quality at this part of the best candidate's."
    )
    fallback: tuple[str, ...] = Field((), description="Models that are tried after those, in this order.")

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.candidates, *self.weights, *self.fallback)))

    @model_validator(mode="after")
    def _holds_together(self) -> RouteAlias:
        if bool(self.candidates) == bool(self.weights):
            raise ValueError("give either candidates or weights")
        if self.weights and (self.policy != "first" or not any(self.weights.values())):
            raise ValueError("weights need no policy, and one of them above 0")
        if (self.strong_share is not None or self.quality_floor is not None) and self.policy != "predicted":
            raise ValueError("strong_share and quality_floor belong to policy: predicted")
        if self.policy == "predicted" and (self.strong_share is None) == (self.quality_floor is None):
            raise ValueError("policy: predicted needs strong_share or quality_floor, one of them")
        return self


class RoutingConfig(Part):
    """Which model answers to a name that stands for several. A model that is asked for by its own name is not routed."""

    aliases: dict[str, RouteAlias] = Field({}, description="By the name that clients ask for, such as auto.")
    rules: tuple[RouteRule, ...] = Field((), description="For all these names; the first that holds decides.")
    prices: dict[str, ModelPrice] = Field({}, description="By model.")
    predictor: str | None = Field(None, description="File of the predictor, as written by benchmarks/routing.py --train.")
    embedder: Literal["none", "minilm"] = Field(
        "none",
        description="none: the words of a text predict. minilm: similar questions as well, if the predictor was trained so;"
        " a small model on the CPU; needs pdserve[embed].",
    )
    embedder_budget_s: float = Field(
        0.1, gt=0, le=10, description="Longest time that a call may wait for the embedder; after it the words predict alone."
    )

    @model_validator(mode="after")
    def _predictor_is_there(self) -> RoutingConfig:
        if self.predictor is None and any(alias.policy == "predicted" for alias in self.aliases.values()):
            raise ValueError("policy: predicted needs routing.predictor")
        if self.predictor is None and self.embedder != "none":
            raise ValueError("embedder belongs to routing.predictor")
        return self

    @property
    def mentioned(self) -> frozenset[str]:
        """Every model that is named."""
        return frozenset(
            (
                *(model for alias in self.aliases.values() for model in alias.models),
                *(rule.use for rule in self.rules),
                *self.prices,
            )
        )
