"""What the pool manager is told when it starts: plain values, written by the launcher and carried there by Ray."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.config import DecodeConfig, LoggingConfig, ModelConfig, PrefillConfig, TracingConfig, TransferConfig
from common.types import Role
from deploy.reconcile import Pool, RestartPolicy


@dataclass(frozen=True, slots=True)
class HealthPolicy:
    """As `common.config.HealthConfig` has it."""

    interval_s: float = 0.3
    timeout_s: float = 0.7
    most_misses: int = 3
    busy_timeout_s: float = 10.0


@dataclass(frozen=True)
class ModelToServe:
    config: ModelConfig
    path: str
    created_s: int
    threads: int

    def pool(self, role: Role) -> PrefillConfig | DecodeConfig:
        return self.config.prefill if role is Role.PREFILL else self.config.decode

    @property
    def degrees(self) -> dict[Role, tuple[int, int]]:
        """Of each worker: tensor parallel, pipeline parallel."""
        return {role: (self.pool(role).tensor_parallel, self.pool(role).pipeline_parallel) for role in Role}


@dataclass(frozen=True)
class ManagerSpec:
    cluster: str
    models: tuple[ModelToServe, ...]
    transfer: TransferConfig
    logging: LoggingConfig
    cluster_token: str = field(repr=False)
    tracing: TracingConfig = field(default_factory=TracingConfig)
    host: str = "127.0.0.1"  # the manager's ports bind here, and the workers', unless the network is trusted
    port: int = 0  # of the manager's gRPC server
    trusted_network: bool = False  # workers bind to the address of their own node
    restarts: RestartPolicy = field(default_factory=RestartPolicy)
    health: HealthPolicy = field(default_factory=HealthPolicy)
    cores_file: str = ""  # where all workers are on one host, over which they share its cores
    start_timeout_s: float = 900.0
    drain_timeout_s: float = 60.0
    stop_grace_s: float = 5.0

    @property
    def desired(self) -> dict[Pool, int]:
        """How many workers each pool begins with."""
        return {Pool(one.config.name, role): one.pool(role).replicas for one in self.models for role in Role}

    def num_ranks(self, pool: Pool) -> int:
        """Processes of each worker of the pool."""
        model = next(one for one in self.models if one.config.name == pool.model)
        return model.pool(pool.role).num_ranks
