"""The configuration: one YAML file, parsed once at the entry point into a frozen tree, and passed down by part.

Precedence: command line (`--set router.http_port=8001`) over environment (`PDSERVE_ROUTER__HTTP_PORT=8001`) over file over the
defaults of the fields. An unknown key or a bad value is a ConfigError that names the key and, for the file, its line
(`common.config.source`). Each file here holds one part of the tree; help texts live in the fields.
"""

from common.config.admission import AdmissionConfig, PlacementConfig, PricesConfig, SloConfig
from common.config.autoscaling import AutoscalingConfig, PoolAutoscalingConfig
from common.config.cache import CacheConfig, ExactCacheConfig, RedisConfig, SemanticCacheConfig
from common.config.cluster import HeadConfig, HealthConfig, NetworkConfig, RayConfig
from common.config.engine import EngineConfig, ParallelConfig
from common.config.load import CheckedConfig, check_config, load_config, pdserve_home
from common.config.model import ModelConfig
from common.config.pools import DecodeConfig, PoolConfig, PrefillConfig, SpeculationConfig
from common.config.router import ConsoleConfig, RouterConfig
from common.config.routing import ModelPrice, RouteAlias, RouteRule, RouteWhen, RoutingConfig
from common.config.telemetry import LoggingConfig, TracingConfig
from common.config.tenants import BandName, LimitsConfig, TenantConfig
from common.config.transfer import TransferConfig
from common.config.tree import Config

__all__ = [
    "AdmissionConfig",
    "AutoscalingConfig",
    "BandName",
    "CacheConfig",
    "CheckedConfig",
    "Config",
    "ConsoleConfig",
    "DecodeConfig",
    "EngineConfig",
    "ExactCacheConfig",
    "HeadConfig",
    "HealthConfig",
    "LimitsConfig",
    "LoggingConfig",
    "ModelConfig",
    "ModelPrice",
    "NetworkConfig",
    "ParallelConfig",
    "PlacementConfig",
    "PoolAutoscalingConfig",
    "PoolConfig",
    "PrefillConfig",
    "PricesConfig",
    "RayConfig",
    "RedisConfig",
    "RouteAlias",
    "RouteRule",
    "RouteWhen",
    "RouterConfig",
    "RoutingConfig",
    "SemanticCacheConfig",
    "SloConfig",
    "SpeculationConfig",
    "TenantConfig",
    "TracingConfig",
    "TransferConfig",
    "check_config",
    "load_config",
    "pdserve_home",
]
