"""Settings of engines and schedulers of a benchmark, without what reads configuration files."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from common.engine.engine import Engine, build_engine
from kvtransfer.region import PoolMemory

_BUILDING = threading.Lock()


@dataclass(frozen=True)
class Settings:
    """A `common.engine.settings.EngineSettings`."""

    device: str
    dtype: str = "auto"
    exact: bool = False
    exact_tile_rows: int = 16
    block_tokens: int = 16
    kv_pool_tokens: int = 32_768
    device_memory_share: float | None = None
    captured_rows: int = 0
    max_model_tokens: int | None = None
    kernels: str = "auto"
    weights: str = "model"
    kv_dtype: str = "model"
    prefix_cache: bool = False


@dataclass(frozen=True)
class PrefillSettings:
    chunk_tokens: int = 2048
    max_running: int = 32
    oldest_first_every: int = 8

    @property
    def shared_tokens(self) -> int:
        return self.chunk_tokens


@dataclass(frozen=True)
class DecodeSettings:
    max_running: int = 256
    max_waiting: int = 100_000
    step_tokens: int = 2048
    watermark_blocks: int = 2
    growth_tokens: int = 16
    priority_aging_s: float = 10.0
    max_overtaken: int = 16
    local_prefill: str = "always"
    local_prefill_tokens: int = 0


def engine_of(source: str, settings: Settings, announce: list[str], *, memory: PoolMemory | None = None) -> Engine:
    """`source` is random:NAME or a path. What the engine had to do without is appended to `announce`. In a process with several
    engines they are built one after the other: each takes its share of what is free, and captures its steps undisturbed."""
    with _BUILDING:
        return build_engine(
            Path(source),
            settings,
            threads=1,
            model_digest=source,
            tokenizer_digest="none",
            memory=memory,
            announce=announce.append,
        )
