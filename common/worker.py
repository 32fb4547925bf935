"""What a worker process is told when it is started, whoever starts it (the Ray actor in `deploy`, a test, a benchmark).

Written by the pool manager and, for host and path, on the worker's own node (`deploy.worker_actor`); read by
`prefill_worker.server` and `decode_worker.server`. A worker knows nothing else about the cluster: peers introduce themselves in
requests, and whoever holds `cluster_token` is trusted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from common.config import (
    EngineConfig,
    LoggingConfig,
    ModelConfig,
    ParallelConfig,
    PoolConfig,
    TracingConfig,
    TransferConfig,
)
from common.types import Role, WorkerRef


@dataclass(frozen=True)
class WorkerSpec:
    worker_id: str
    incarnation: int
    role: Role
    model: ModelConfig
    model_path: str  # local file or folder with tokenizer and weights, as `common.model_store` resolved it
    transfer: TransferConfig
    cluster_token: str = field(repr=False)
    host: str = "127.0.0.1"  # every port of the worker binds here
    trusted_network: bool = False  # the operator's word; `host` is on loopback without it
    threads: int = 1  # CPU threads of the engine, in each of its ranks
    cores_file: str = (
        ""  # over which the workers of this host share all cores instead (`common.engine.cores`); empty: they do not
    )
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    tracing: TracingConfig = field(default_factory=TracingConfig)

    @property
    def parallel(self) -> ParallelConfig:
        """Of the pool that this worker is in."""
        return self._pool

    @property
    def engine(self) -> EngineConfig:
        """Likewise."""
        return self._pool.engine(self.model.engine)

    @property
    def _pool(self) -> PoolConfig:
        return self.model.prefill if self.role is Role.PREFILL else self.model.decode


class LoadedModel(Protocol):
    """What a process has loaded for its worker and can keep for the next one: weights, KV pool, what was compiled for them. Only
    worker servers look into it."""

    def close(self) -> None:
        """Gives up its memory. Idempotent."""
        ...


class WorkerServer(Protocol):
    """A worker as its host process sees it. `start` is called once, and then `stop` or `retire`, on one event loop."""

    async def start(self) -> WorkerRef:
        """Loads the model, opens the ports; returns when requests can be served. Raises a StartupError."""
        ...

    async def wait_failed(self) -> str:
        """Returns when the worker can serve no more (its engine raised), and says why; until then it waits."""
        ...

    async def stop(self, grace_s: float) -> None:
        """Stops admitting, lets requests finish for `grace_s`, cancels the rest, frees everything."""
        ...

    async def retire(self) -> LoadedModel:
        """Cancels what still runs and ends the worker, but keeps what it has loaded. Raises WorkerLost if that is not fit for
        another worker: a failed engine, or memory that somebody else may still write to."""
        ...
