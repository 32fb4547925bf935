"""The whole tree, and what must hold between its parts."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from common.config.cache import CacheConfig
from common.config.cluster import HeadConfig, HealthConfig, NetworkConfig, RayConfig
from common.config.model import ModelConfig
from common.config.part import Part
from common.config.router import RouterConfig
from common.config.routing import RoutingConfig
from common.config.telemetry import LoggingConfig, TracingConfig
from common.config.transfer import TransferConfig
from common.errors import ConfigError


class Config(Part):
    """The whole file."""

    cluster: str = Field("local", pattern=r"^[a-z0-9\-]+$", description="Name of the cluster on this machine.")
    models: tuple[ModelConfig, ...] = Field(min_length=1)
    transfer: TransferConfig = TransferConfig()
    router: RouterConfig = RouterConfig()
    routing: RoutingConfig = RoutingConfig()
    cache: CacheConfig = CacheConfig()
    ray: RayConfig = RayConfig()
    network: NetworkConfig = NetworkConfig()
    health: HealthConfig = HealthConfig()
    head: HeadConfig = HeadConfig()
    logging: LoggingConfig = LoggingConfig()
    tracing: TracingConfig = TracingConfig()

    @field_validator("models")
    @classmethod
    def _names_are_unique(cls, models: tuple[ModelConfig, ...]) -> tuple[ModelConfig, ...]:
        seen: set[str] = set()
        for name in (name for model in models for name in (model.name, *model.aliases)):
            if name in seen:
                raise ValueError(f"the name {name!r} is given twice")
            seen.add(name)
        return models

    @model_validator(mode="after")
    def _routes_lead_somewhere(self) -> Config:
        names = {model.name for model in self.models}
        unknown = sorted(self.routing.mentioned - names)
        if unknown:
            raise ValueError(f"routing names {unknown[0]!r}, which is none of the models: {', '.join(sorted(names))}")
        taken = sorted(set(self.routing.aliases) & {name for model in self.models for name in (model.name, *model.aliases)})
        if taken:
            raise ValueError(f"routing.aliases has {taken[0]!r}, which is the name of a model")
        return self

    @model_validator(mode="after")
    def _one_redis(self) -> Config:
        if self.head.redis and self.cache.redis.url is not None:
            raise ValueError("head.redis and cache.redis.url exclude each other")
        return self

    @property
    def wants_minilm(self) -> bool:
        """Whether a router of this configuration needs the embedder's model."""
        return (self.cache.semantic.enabled and self.cache.semantic.embedder == "minilm") or self.routing.embedder == "minilm"

    def model_named(self, name: str) -> ModelConfig:
        for model in self.models:
            if name == model.name or name in model.aliases:
                return model
        raise ConfigError(f"no model {name!r} in the configuration", param="models")
