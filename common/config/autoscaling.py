"""How many workers a model has, decided by how it is used (`deploy/autoscaler`)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from common.config.part import Part


class PoolAutoscalingConfig(Part):
    min_replicas: int = Field(1, ge=0, description="Fewest workers. 0 for both pools: the model sleeps when nobody uses it.")
    max_replicas: int = Field(1, ge=0, description="Most workers.")

    @model_validator(mode="after")
    def _in_order(self) -> PoolAutoscalingConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self


class AutoscalingConfig(Part):
    """How many workers a model has, decided by how it is used. `replicas` of the pools is what it starts with."""

    mode: Literal["off", "dry-run", "on"] = Field(
        "off", description="dry-run: decides and says why (`pdserve autoscaler`), and changes nothing."
    )
    prefill: PoolAutoscalingConfig = PoolAutoscalingConfig()
    decode: PoolAutoscalingConfig = PoolAutoscalingConfig()
    max_workers: int | None = Field(None, ge=1, description="Most workers of both pools together.")
    target_ttft_s: float = Field(1.0, gt=0, description="Prompts that wait are to be computed within this time.")
    target_queue_age_s: float = Field(0.5, gt=0, description="No request is to wait longer before anything is done for it.")
    target_tpot_s: float = Field(0.05, gt=0, description="Time per output token that decode workers are to keep.")
    target_kv_use: float = Field(0.8, gt=0, le=1, description="Share of the decode workers' KV that may be in use.")
    target_utilization: float = Field(0.7, gt=0, le=1, description="Share of time that prefill workers may be computing.")
    target_ongoing_requests: float | None = Field(
        None, gt=0, description="Sequences per decode worker; default is what target_tpot_s allows, as measured."
    )
    hysteresis: float = Field(
        0.8, gt=0, le=1, description="A pool shrinks, or lends a worker, only if the others would then be this far below target."
    )
    look_back_period_s: float = Field(5.0, gt=0, description="Signals are averages over this time.")
    flip_delay_s: float = Field(
        5.0, ge=0, description="How long a pool must be too small before another's worker changes its role."
    )
    upscale_delay_s: float = Field(15.0, ge=0, description="How long a pool must be too small before it gets more workers.")
    downscale_delay_s: float = Field(300.0, ge=0, description="How long a pool must be too large before it gets fewer.")
    cooldown_s: float = Field(10.0, ge=0, description="Least time between two changes of a model.")
    idle_s: float = Field(600.0, gt=0, description="A model that may sleep does so after nobody used it for this long.")
    interval_s: float = Field(1.0, gt=0, description="How often it is decided.")

    @property
    def may_sleep(self) -> bool:
        return self.prefill.min_replicas == 0 and self.decode.min_replicas == 0

    @field_validator("mode", mode="before")
    @classmethod
    def _as_yaml_has_it(cls, mode: object) -> object:
        """YAML takes a bare on or off for a truth value."""
        return {True: "on", False: "off"}[mode] if isinstance(mode, bool) else mode

    @model_validator(mode="after")
    def _can_serve(self) -> AutoscalingConfig:
        if self.mode == "off":
            return self
        if self.decode.max_replicas == 0:
            raise ValueError("decode.max_replicas is 0: nobody could ever serve the model")
        if self.decode.min_replicas == 0 and self.prefill.min_replicas > 0:
            raise ValueError("decode.min_replicas is 0 and prefill.min_replicas is not: a model sleeps as a whole")
        if self.max_workers is not None and self.max_workers < max(2, self.prefill.min_replicas + self.decode.min_replicas):
            raise ValueError("max_workers is below what min_replicas of the pools ask for")
        return self
