"""Which workers a request is given to and when; what it is promised, and what it costs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, model_validator

from common.config.part import Part
from common.config.tenants import BandName


class PlacementConfig(Part):
    """How the router chooses workers."""

    policy: Literal[
        "predicted",
        "min_ttft",
        "least_load",
        "round_robin",
        "random",
        "cache_aware",
        "weighted",
        "dynamo",
        "aibrix",
        "loadaware",
    ] = Field(
        "predicted",
        description="predicted: least predicted time to the first token, with what the choice costs other requests;"
        " min_ttft: without that. The others are published formulas, for comparison (router/placement/policies.py).",
    )
    externality: float = Field(0.7, ge=0, description="predicted: weight of what a choice costs other requests.")
    report_interval_s: float = Field(0.1, gt=0, description="How often a worker is asked to report, at most.")
    report_timeout_s: float = Field(5.0, gt=0, description="A worker that reports nothing for so long is watched anew.")
    speculative_ttl_s: float = Field(30.0, gt=0, description="How long a dispatch counts as a cached prefix unless confirmed.")
    index_blocks: int = Field(2_000_000, ge=1, description="Most KV blocks whose place is remembered; about 100 bytes each.")


class AdmissionConfig(Part):
    """The queue before the workers. One per model."""

    max_queued_requests: int = Field(10_000, ge=0, description="Requests that may wait in a router; more get 429.")
    max_queued_tokens: int = Field(20_000_000, ge=0, description="Prompt and expected output of those that wait; more get 429.")
    room_pools: float = Field(
        2.0,
        gt=0,
        description="Tokens, prompt and expected output, that a decode worker is given at once, in units of its KV pool."
        " What exceeds it waits in the router, where it can still be reordered and refused.",
    )
    room_batches: float = Field(
        2.0, gt=0, description="Sequences that a decode worker is given at once, in units of decode.max_running."
    )
    expected_output_tokens: int = Field(512, ge=1, description="Room taken for a choice, if its max_tokens is not less.")
    prompt_token_cost: float = Field(1.0, ge=0, description="Of a computed prompt token, in what tenants are served.")
    output_token_cost: float = Field(2.0, ge=0, description="Of a generated token, in what tenants are served.")
    overdue_s: float = Field(60.0, gt=0, description="A request of a lower band that waits longer is overdue.")
    overdue_every: int = Field(
        8, ge=0, description="While one is overdue, one dispatch in so many is for its band; 0 keeps bands strict for ever."
    )
    ttft_slo_s: dict[BandName, PositiveFloat] = Field(
        {}, description="Time to the first token that a band is promised. What is predicted to miss it gets 429 at once."
    )
    slo_slack: float = Field(0.2, ge=0, description="A prediction may exceed the promise by this share.")


class SloConfig(Part):
    """What the requests of a band are promised; for counting, nothing is refused for it."""

    ttft_s: float | None = Field(None, gt=0, description="Longest time to the first token.")
    tpot_s: float | None = Field(None, gt=0, description="Longest mean time per token after the first.")

    @model_validator(mode="after")
    def _promises_something(self) -> SloConfig:
        if self.ttft_s is None and self.tpot_s is None:
            raise ValueError("a promise needs ttft_s or tpot_s")
        return self


class PricesConfig(Part):
    """Of a worker's hour, in any one currency. For metrics of cost."""

    prefill_hour: float = Field(0.0, ge=0, description="A prefill worker's.")
    decode_hour: float = Field(0.0, ge=0, description="A decode worker's.")

    @property
    def given(self) -> bool:
        return self.prefill_hour > 0 or self.decode_hour > 0
